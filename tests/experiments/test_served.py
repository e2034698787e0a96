"""A run that is loaded again scores requests as its validation did."""

import functools
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import config_util
import histjax
from histjax.data import datasets
from histjax.serving import batch
from histjax.training import evaluation, loop
from histjax.training import run as run_lib
from tests.training import runs

TASKS = ('click', 'stay')
CATEGORICAL = {'type': 'categorical', 'ids': 'hash', 'size': 32}


def values(path):
  """A run of one step on snapshots with every derived feature."""
  rows = {'kind': 'snapshot', 'history_length': 6, 'ties': 'strict'}
  return config_util.config_dict(
    {
      'data': {
        'source': {
          'type': 'events',
          'paths': (str(path),),
          'schema': {
            'user': 'uid',
            'time': 'ts',
            'context': [{**CATEGORICAL, 'name': 'land'}],
            'item': [
              {**CATEGORICAL, 'name': 'item', 'column': 'sku'},
              {**CATEGORICAL, 'name': 'shop'},
              {'type': 'dense', 'name': 'price', 'log': True},
            ],
            'action': [{'type': 'categorical', 'name': 'clicked', 'size': 2}],
            'tasks': [
              {'name': 'click', 'column': 'clicked'},
              {'name': 'stay', 'column': 'seconds', 'threshold': 10.0},
            ],
          },
          'split': {
            'type': 'time_split',
            'validation_start': '2024-01-05',
            'test_start': '2024-01-07',
          },
        },
        'features': (
          {'type': 'time_gap', 'buckets': 16},
          {'type': 'rates', 'by': ('item', 'shop*item')},
          {'type': 'recent_rates', 'last': 3},
          {'type': 'history_rates', 'by': ('*', 'shop', 'item@2')},
          {'type': 'activity', 'spans': (3600, 86_400)},
          {'type': 'recent_shares', 'of': ('shop@4',)},
        ),
        'without': ('item',),
        'rows': {**rows, 'snapshot_every': 43_200.0},
        'eval_rows': rows,
      },
      'model': {
        'encoder': {'num_layers': 1, 'width': 8, 'num_heads': 2},
        'interaction': {'kind': 'mlp', 'mlp_widths': (8,)},
        'embedding_dim': 4,
      },
      'pipeline': {
        'batch_events': 512,
        'history_buckets': (8,),
        'candidate_buckets': (64,),
      },
      'num_steps': 1,
      'tensorboard': False,
    }
  ).to_dict()


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  """`(folder, dataset)`; the log has tied times, and the run is in `run`."""
  folder = tmp_path_factory.mktemp('served')
  rng = np.random.default_rng(0)
  size = 240
  user = rng.integers(0, 7, size)
  start = np.datetime64('2024-01-01', 'ms')
  minutes = rng.integers(0, 9 * 24 * 12, size) * 5
  table = pa.table(
    {
      'uid': [f'0{u}' for u in user],
      'ts': start + minutes * np.timedelta64(60_000, 'ms'),
      'land': [('de', 'us')[u % 2] for u in user],
      'sku': [f'00{i}' for i in rng.integers(0, 9, size)],
      'shop': rng.integers(0, 3, size),
      'price': rng.gamma(2.0, 5.0, size),
      'clicked': rng.integers(0, 2, size),
      'seconds': rng.gamma(2.0, 6.0, size),
    }
  )
  parquet.write_table(table, folder / 'log.parquet')
  config, dataset = config_util.load(values(folder / 'log.parquet'))
  loop.train_and_evaluate(
    config, folder / 'run', dataset=dataset, mesh=runs.mesh()
  )
  late = table['ts'].to_numpy() >= np.datetime64('2024-01-07')
  parquet.write_table(table.filter(pa.array(late)), folder / 'test.parquet')
  return folder, dataset


def evaluated(run, dataset):
  """The test split's events, row by row, and their logits by `evaluate`."""
  rows = dataset.splits['test']
  found = evaluation.predict(
    histjax.Ranker(run.config.model),
    run.variables,
    rows,
    run.config.pipeline,
    runs.mesh(),
  )
  events = [rows.candidate_events(r) for r in range(len(rows))]
  return np.concatenate(events), found.predictions().logits


def test_files_are_scored_as_evaluation_does(served, tmp_path):
  folder, dataset = served
  run = run_lib.load(folder / 'run')
  load = functools.partial(batch.Model.from_workdir, folder / 'run', as_of=True)
  batch.rank_files(
    load,
    [str(folder / 'log.parquet')],
    [str(folder / 'test.parquet')],
    tmp_path / 'ranked.parquet',
    batch.Options(top_k=1000, users_per_batch=4, users_per_shard=3),
  )
  found = parquet.read_table(tmp_path / 'ranked.parquet').sort_by('row')
  order, logits = evaluated(run, dataset)
  # The log's order is by user and time; the file's is not.
  shown = parquet.read_table(folder / 'test.parquet')
  shown = {name: shown[name].to_numpy() for name in shown.column_names}
  mine = np.lexsort((shown['ts'], shown['uid']))
  assert len(mine) == len(order) == found.num_rows > 40
  price = np.log1p(shown['price'][mine]).astype(np.float32)
  np.testing.assert_array_equal(price, dataset.log.features['price'][order])
  for task in TASKS:
    wanted = 1 / (1 + np.exp(-logits[task]))
    scores = found[f'score_{task}'].to_numpy()[mine]
    np.testing.assert_allclose(scores, wanted, atol=1e-6)


def test_rows_of_requests_are_those_of_the_log(served):
  folder, dataset = served
  scorer = histjax.Scorer.from_workdir(folder / 'run', which='latest')
  rows = dataset.splits['test']
  table = parquet.read_table(folder / 'log.parquet').to_pylist()
  users = {
    u: sorted((e for e in table if e['uid'] == u), key=lambda e: e['ts'])
    for u in {e['uid'] for e in table}
  }
  for wanted in rows:
    events = users[str(rows.keys[wanted.group])]
    shown = [e for e in events if e['ts'].day >= 7]
    row = scorer.make_row(
      context=shown[0], history=events, candidates=shown, as_of=True
    )
    for part in ('context', 'history', 'candidates'):
      np.testing.assert_equal(getattr(row, part), getattr(wanted, part))
    np.testing.assert_array_equal(row.visible, wanted.visible)
  assert len(rows) == 7


def test_what_cannot_be_loaded(served, tmp_path):
  folder, dataset = served
  workdir = tmp_path / 'run'
  shutil.copytree(folder / 'run', workdir)
  (workdir / 'features.npz').unlink()
  with pytest.raises(FileNotFoundError, match=r'features\.npz does not exist'):
    run_lib.load(workdir)
  other = datasets.load(datasets.DataConfig(datasets.Synthetic(num_users=2)))
  other.features.save(workdir)
  with pytest.raises(ValueError, match='is of another run than the checkpoi'):
    run_lib.load(workdir)
  dataset.features.save(workdir)
  run_lib.load(workdir)
  with pytest.raises(ValueError, match="which='newest'"):
    run_lib.load(workdir, 'newest')
  with pytest.raises(FileNotFoundError, match='name the workdir of a training'):
    histjax.Scorer.from_workdir(tmp_path)


def test_a_scorer_of_parameters_knows_no_columns(served):
  folder, _ = served
  run = run_lib.load(folder / 'run')
  scorer = histjax.Scorer(run.config.model, run.variables)
  with pytest.raises(ValueError, match='made of parameters'):
    scorer.make_row(context={}, history=[], candidates=[{}])
