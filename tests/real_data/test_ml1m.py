"""MovieLens 1M itself, against the files read in plain NumPy.

Collected only if HISTJAX_DATA_DIR names a folder with ml-1m/.
"""

import os
import pathlib

import numpy as np
import pytest

from fusion_study import floors
from histjax import metrics
from histjax.data import datasets, pipeline
from histjax.data.rows import RowConfig
from tests import support
from tests.data import official

pytestmark = pytest.mark.slow
FOLDER = pathlib.Path(os.environ.get('HISTJAX_DATA_DIR', '.')) / 'ml-1m'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return datasets.load(
    datasets.DataConfig(
      datasets.Movielens(
        data_dir=str(tmp_path_factory.mktemp('ml1m')),
        manual_dir=str(FOLDER.parent),
      ),
      rows=RowConfig('streaming', history_length=50, max_candidates=100),
      eval_rows=RowConfig('pointwise', history_length=50),
    )
  )


@pytest.fixture(scope='module')
def ratings():
  """user, movie, rating, time; by user and time, ties in file order."""
  table = official.read_dat(FOLDER / 'ratings.dat', 4)
  return table[np.lexsort((table[:, 3], table[:, 0]))]


def test_counts(data):
  log = data.log
  assert len(log) == 1_000_209
  assert log.num_users == 6040
  assert len(np.unique(log.features['movie_id'])) == 3706


def test_columns_are_those_of_the_file(data, ratings):
  log = data.log
  np.testing.assert_array_equal(log.keys[log.user], ratings[:, 0])
  np.testing.assert_array_equal(log.features['movie_id'], ratings[:, 1])
  np.testing.assert_array_equal(log.features['rating'], ratings[:, 2])
  np.testing.assert_array_equal(log.labels['like'], ratings[:, 2] >= 4)


def test_splits(data, ratings):
  """First floor(0.8 n), up to floor(0.9 n), the rest, in whole numbers."""
  wanted = {'train': [], 'validation': [], 'test': []}
  _, start, count = np.unique(
    ratings[:, 0], return_index=True, return_counts=True
  )
  for first, n in zip(start.tolist(), count.tolist(), strict=True):
    a, b = n * 8 // 10, n * 9 // 10
    wanted['train'] += range(first, first + a)
    wanted['validation'] += range(first + a, first + b)
    wanted['test'] += range(first + b, first + n)
  for split, rows in data.splits.items():
    np.testing.assert_array_equal(np.sort(rows.events), wanted[split])
  sizes = {k: int(v.candidate_counts.sum()) for k, v in data.splits.items()}
  assert sizes == {'train': 797_758, 'validation': 99_692, 'test': 102_759}


def test_history_is_the_fifty_events_before(data, ratings):
  rows = data.splits['test']
  user = ratings[:, 0]
  rng = np.random.default_rng(0)
  for r in rng.integers(len(rows), size=300):
    event = rows.candidate_events(r)[0]
    before = np.flatnonzero(user[:event] == user[event])[-50:]
    row = rows[r]
    assert row.visible.tolist() == [len(before)]
    np.testing.assert_array_equal(row.history['movie_id'], ratings[before, 1])
    np.testing.assert_array_equal(row.history['rating'], ratings[before, 2])
    assert row.candidates['movie_id'] == ratings[event, 1]
    assert 'rating' not in row.candidates


def test_streaming_rows_see_the_past_alone(data, ratings):
  rows = data.splits['train']
  rng = np.random.default_rng(1)
  for r in rng.integers(len(rows), size=100):
    row, events = rows[r], rows.candidate_events(r)
    for c in rng.integers(len(events), size=5):
      stop = row.visible[c]
      # The last event it sees is the one right before it.
      if stop:
        assert row.history['movie_id'][stop - 1] == ratings[events[c] - 1, 1]
        assert ratings[events[c] - 1, 0] == ratings[events[c], 0]
      first = events[c] - stop
      np.testing.assert_array_equal(
        row.history['movie_id'][:stop], ratings[first : events[c], 1]
      )


def test_an_epoch(data):
  rows = data.splits['train']
  config = pipeline.PipelineConfig()
  batches = pipeline.train_batches(rows, config, row_multiple=8, num_epochs=1)
  seen = np.zeros(len(data.log), int)
  count = 0
  for number, batch in enumerate(batches):
    if number % 10 == 0:
      support.check_batch(batch, data.schema)
    mask = batch.candidates.mask
    count += mask.sum()
    movie = batch.candidates.features['movie_id'][mask]
    np.add.at(seen, movie, 1)
  assert count == 797_758
  wanted = np.bincount(
    data.log.features['movie_id'][rows.events], minlength=len(seen)
  )
  np.testing.assert_array_equal(seen, wanted)


def test_floor(data):
  """Without a model, as computed outside of the library, too."""
  train, test = data.splits['train'], data.splits['test']
  found = floors.floor_logits(test, train, ('user', 'movie_id'), 'like', 50)
  labels = data.log.labels['like'][test.events]
  assert metrics.auc(found, labels) == pytest.approx(0.7871, abs=6e-5)
  user = data.log.user[test.events]
  assert metrics.gauc(found, labels, user) == pytest.approx(0.7118, abs=6e-5)
