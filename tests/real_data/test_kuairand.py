"""KuaiRand-Pure itself, against the files read in plain Python.

Collected only if HISTJAX_DATA_DIR names a folder with KuaiRand-Pure/.
"""

import os
import pathlib

import numpy as np
import pytest

from configs import kuairand_snapshot
from fusion_study import floors
from histjax import config as config_lib
from histjax import metrics
from histjax.data import datasets, kuairand, requests
from histjax.data.rows import RowConfig
from histjax.features import TimeGap
from tests import support
from tests.data import official

FOLDER = pathlib.Path(os.environ.get('HISTJAX_DATA_DIR', '.'))
FOLDER = FOLDER / 'KuaiRand-Pure' / 'data'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return datasets.load(
    datasets.DataConfig(
      datasets.Kuairand(
        data_dir=str(tmp_path_factory.mktemp('kuairand')),
        manual_dir=str(FOLDER.parents[1]),
      ),
      rows=RowConfig('streaming', history_length=50, ties='strict'),
      eval_rows=RowConfig('pointwise', history_length=50, ties='strict'),
      tasks=('click', 'long_view'),
      features=(TimeGap(24),),
    )
  )


@pytest.fixture(scope='module')
def lines():
  """The log's lines as dicts of integers, by user and time."""
  found = official.read_csv(FOLDER / 'log_standard_4_22_to_5_08_pure.csv')
  found = [{k: int(v) for k, v in line.items()} for line in found]
  return sorted(found, key=lambda line: (line['user_id'], line['time_ms']))


def test_counts(data):
  log = data.log
  assert len(log) == 228_329
  assert log.num_users == 25_156
  assert len(np.unique(log.features['video_id'])) == 6361
  assert round(float(log.labels['click'].mean()), 3) == 0.442
  assert round(float(log.labels['long_view'].mean()), 3) == 0.311


def test_repeated_lines_are_all_there(data):
  log = data.log
  lines = np.stack([log.user, log.features['video_id'], log.time], 1)
  assert len(lines) - len(np.unique(lines, axis=0)) == 5885


def test_columns_are_those_of_the_file(data, lines):
  log = data.log
  columns = {
    'video_id': log.features['video_id'],
    'is_click': log.labels['click'],
    'long_view': log.labels['long_view'],
    'tab': log.features['tab'],
    'time_ms': log.time,
    'user_id': log.keys[log.user],
  }
  for name, values in columns.items():
    np.testing.assert_array_equal(values, [line[name] for line in lines])
  feedback = [
    line['is_like']
    + 2 * line['is_follow']
    + 4 * line['is_comment']
    + 8 * line['is_forward']
    + 16 * line['is_hate']
    + 32 * line['is_profile_enter']
    for line in lines
  ]
  np.testing.assert_array_equal(log.features['feedback'], feedback)


def test_user_and_video_features_are_joined(data, lines):
  users = {
    int(u['user_id']): u
    for u in official.read_csv(FOLDER / 'user_features_pure.csv')
  }
  videos = {
    int(v['video_id']): v
    for v in official.read_csv(FOLDER / 'video_features_basic_pure.csv')
  }
  log = data.log
  for i in np.random.default_rng(0).integers(len(log), size=2000):
    user = users[lines[i]['user_id']]
    video = videos[lines[i]['video_id']]
    for number in (0, 3, 4, 8, 12):
      text = user[f'onehot_feat{number}']
      wanted = 1 + int(float(text)) if text else 0
      assert log.features[f'onehot_feat{number}'][i] == wanted
    tags = [int(t) + 1 for t in video['tag'].split(',') if t]
    assert [log.features[f'tag_{k}'][i].item() for k in range(3)] == tags + [
      0
    ] * (3 - len(tags))
    music = video['music_type']
    wanted = 1 + int(float(music)) if music else 0
    assert log.features['music_type'][i] == wanted


def test_splits(data, lines):
  date = np.array([line['date'] for line in lines])
  wanted = {
    'train': date <= 20220430,
    'validation': (date == 20220501) | (date == 20220502),
    'test': (date >= 20220503) & (date <= 20220508),
  }
  for split, rows in data.splits.items():
    np.testing.assert_array_equal(
      np.sort(rows.events), np.flatnonzero(wanted[split])
    )
  sizes = {k: int(v.candidate_counts.sum()) for k, v in data.splits.items()}
  assert sizes == {'train': 94_784, 'validation': 40_344, 'test': 93_201}


def test_history_is_strictly_earlier(data, lines):
  rows = data.splits['test']
  by_user: dict[int, list] = {}
  for line in lines:
    by_user.setdefault(line['user_id'], []).append(line)
  for r in np.random.default_rng(0).integers(len(rows), size=2000):
    line = lines[rows.candidate_events(r)[0]]
    past = [
      x for x in by_user[line['user_id']] if x['time_ms'] < line['time_ms']
    ][-50:]
    row = rows[r]
    assert row.history['video_id'].tolist() == [x['video_id'] for x in past]
    assert row.history['is_click'].tolist() == [x['is_click'] for x in past]
    gap = 0
    if past:
      seconds = (line['time_ms'] - past[-1]['time_ms']) / 1000
      gap = int(np.floor(np.log2(1 + seconds)))
    assert row.candidates['time_gap'].tolist() == [gap]


def test_nothing_of_after_the_impression_in_a_candidate(data):
  """No candidate feature tells the label where the same features agree."""
  row = data.splits['train'][0]
  assert set(row.candidates) & {'is_click', 'long_view', 'feedback'} == set()
  assert 'play_ratio' not in row.candidates
  log, events = data.log, data.splits['train'].events
  labels = log.labels['click'][events]
  for name in row.candidates:
    if name in ('video_id', 'author_id', 'duration', 'time_gap'):
      continue
    values = log.features[name][events]
    _, place = np.unique(values, return_inverse=True)
    count = np.bincount(place)
    rate = np.bincount(place, weights=labels) / count
    # Of any common value the click rate is anything but 0 or 1.
    assert np.all((rate[count > 500] > 0.02) & (rate[count > 500] < 0.98))


def test_batches_are_valid(data):
  for rows in data.splits.values():
    batch = rows.batch(
      range(64), num_rows=64, num_events=200, num_candidates=150
    )
    support.check_batch(batch, data.schema)


@pytest.mark.parametrize(
  ('terms', 'auc', 'gauc'),
  [
    (('user', 'video_id'), 0.6935, 0.6095),
    (('user', 'video_id', 'tab'), 0.7155, 0.6354),
    (('history', 'video_id', 'tab'), 0.7337, 0.5570),
  ],
)
def test_floors(data, terms, auc, gauc):
  """Without a model, as computed outside of the library, too."""
  train, test = data.splits['train'], data.splits['test']
  found = floors.floor_logits(test, train, terms, 'click', window=50)
  labels = data.log.labels['click'][test.events]
  assert metrics.auc(found, labels) == pytest.approx(auc, abs=6e-5)
  user = data.log.user[test.events]
  assert metrics.gauc(found, labels, user) == pytest.approx(gauc, abs=6e-5)


@pytest.mark.slow
def test_requests_of_a_published_model(tmp_path_factory):
  """What `configs/kuairand_snapshot.py` is tested on, made of requests."""
  places = {
    'data_dir': str(tmp_path_factory.mktemp('snapshot')),
    'manual_dir': str(FOLDER.parents[1]),
  }
  values = kuairand_snapshot.get_config().data.to_dict()
  values['source'] |= places
  values['eval_rows']['max_candidates'] = None
  data = datasets.load(config_lib.from_dict(datasets.DataConfig, values))
  rows = data.splits['test']
  columns, names = kuairand.load_columns(**places), data.schema.columns
  order = np.lexsort((columns['time_ms'], columns['user_id']))
  starts = np.searchsorted(columns['user_id'][order], rows.keys)
  stops = np.searchsorted(columns['user_id'][order], rows.keys, 'right')
  for r in np.random.default_rng(0).integers(len(rows), size=150):
    wanted = rows[r]
    mine = order[starts[wanted.group] : stops[wanted.group]]
    shown = mine[columns['date'][mine] >= kuairand.TEST_DATE]
    row = requests.make_row(
      data.schema,
      context={name: columns[name][shown[0]] for name in names},
      history={name: columns[name][mine] for name in names},
      candidates={name: columns[name][shown] for name in names},
      config=rows.config,
      features=data.features,
      as_of=True,
    )
    for part in ('context', 'history', 'candidates'):
      np.testing.assert_equal(getattr(row, part), getattr(wanted, part))
    np.testing.assert_array_equal(row.visible, wanted.visible)
