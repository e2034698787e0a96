"""Every dataset by its name, and a log of one's own from a dict."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from histjax import config as config_lib
from histjax.data import datasets, synthetic
from histjax.data.rows import RowConfig
from histjax.data.splits import FractionSplit, TimeSplit
from histjax.features import (
  Activity,
  HistoryRates,
  Rates,
  RecentRates,
  RecentShares,
  TimeGap,
)
from histjax.schema import Categorical, Dense, Schema, Task
from tests.data import official

SMALL = datasets.Synthetic(num_users=20, requests_per_user=5)
OWN = Schema(
  user='member',
  time='when',
  item=(Categorical('post', 1000, ids='hash'), Dense('age_hours', log=True)),
  action=(Categorical('reaction', 4),),
  tasks=(Task('clicked', column='reaction', threshold=1),),
)


def write_own(path, **change):
  data = {
    'member': ['ann', 'bob', 'ann', 'ann'],
    'when': pa.array([60, 5, 10, 99], pa.timestamp('s')),
    'post': ['p1', 'p2', 'p3', 'p1'],
    'age_hours': [0.5, 1.0, 2.0, 8.0],
    'reaction': [0, 3, 1, 0],
    **change,
  }
  pq.write_table(pa.table(data), path)
  return str(path)


def test_synthetic():
  data = datasets.load(datasets.DataConfig(SMALL))
  assert {k: len(v) for k, v in data.splits.items()} == {
    'train': 20,
    'validation': 20,
    'test': 20,
  }
  assert data.schema == synthetic.schema(SMALL)
  assert data.splits['test'].candidate_counts.tolist() == [2] * 20


def test_tasks():
  config = datasets.DataConfig(SMALL, tasks=('like',))
  data = datasets.load(config)
  assert [t.name for t in data.schema.tasks] == ['like']
  assert list(data.splits['train'][0].labels) == ['like']
  assert list(synthetic.bayes_auc(data.splits['test'])) == ['like']


def test_eval_rows():
  config = datasets.DataConfig(
    SMALL, eval_rows=RowConfig('request', history_length=3)
  )
  data = datasets.load(config)
  assert data.splits['train'].config.kind == 'streaming'
  assert data.splits['test'].config.kind == 'request'


def test_movielens(tmp_path):
  official.write_folder(tmp_path, 'ml-1m', official.movielens_files())
  data = datasets.load(
    datasets.DataConfig(
      datasets.Movielens(data_dir=str(tmp_path / 'd'), manual_dir=str(tmp_path))
    )
  )
  # floor(0.8 * 3) = 2 and floor(0.9 * 3) = 2; of one rating: 0 and 0.
  counts = {k: v.candidate_counts.tolist() for k, v in data.splits.items()}
  assert counts == {'train': [2], 'validation': [], 'test': [1, 1]}


def test_kuairand(tmp_path):
  official.write_folder(tmp_path, 'KuaiRand-Pure', official.kuairand_files())
  source = datasets.Kuairand(
    data_dir=str(tmp_path / 'd'), manual_dir=str(tmp_path)
  )
  strict = RowConfig(ties='strict')
  data = datasets.load(datasets.DataConfig(source, strict))
  assert [t.name for t in data.schema.tasks] == ['click']
  counts = {k: v.candidate_counts.tolist() for k, v in data.splits.items()}
  assert counts == {'train': [1], 'validation': [2, 1], 'test': [1]}
  both = datasets.DataConfig(source, strict, tasks=('long_view', 'click'))
  names = [t.name for t in datasets.load(both).schema.tasks]
  assert names == ['long_view', 'click']


def test_kuairand_needs_strict_ties():
  strict = RowConfig(ties='strict')
  for fields in ({}, {'rows': strict, 'eval_rows': RowConfig()}):
    with pytest.raises(ValueError, match="set ties='strict'"):
      datasets.DataConfig(datasets.Kuairand(), **fields)


def test_evaluation_counts_events_once():
  often = RowConfig('snapshot', snapshot_every=86_400.0)
  datasets.DataConfig(rows=often, eval_rows=RowConfig('snapshot'))
  for fields in ({}, {'eval_rows': often}):
    with pytest.raises(ValueError, match='evaluate events more than once'):
      datasets.DataConfig(rows=often, **fields)


def test_own_log(tmp_path):
  config = datasets.DataConfig(
    datasets.Events(
      paths=(write_own(tmp_path / 'log.parquet'),),
      schema=OWN,
      split=TimeSplit('1970-01-01T00:01:00', '1970-01-01T00:01:30'),
    ),
    features=(TimeGap(16),),
  )
  data = datasets.load(config)
  rows = data.splits
  assert rows['train'].keys.tolist() == ['ann', 'bob']
  assert len(rows['train']) == 2
  (test,) = rows['test']
  assert test.visible.tolist() == [2]
  assert test.history['reaction'].tolist() == [1, 0]
  assert test.candidates['time_gap'].tolist() == [5]  # 39 s.
  (validation,) = rows['validation']
  assert validation.labels['clicked'].tolist() == [0]
  source = dataclasses.replace(config.source, require_sorted=True)
  config = dataclasses.replace(config, source=source)
  with pytest.raises(ValueError, match="user 'ann' further up"):
    datasets.load(config)


@pytest.mark.parametrize('ties', ['order', 'strict'])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_derived_features_see_ties_as_their_rows_do(tmp_path, split, ties):
  """What an event sees of others of its time: all before it, or nothing."""
  rng = np.random.default_rng(0)
  size = 400
  path = write_own(
    tmp_path / 'log.parquet',
    member=rng.integers(0, 6, size),
    when=rng.integers(0, 40, size),
    post=[f'p{i}' for i in rng.integers(0, 3, size)],
    age_hours=rng.random(size),
    reaction=rng.integers(0, 4, size),
  )
  other = {'order': 'strict', 'strict': 'order'}[ties]
  of_train, of_rest = (ties, other) if split == 'train' else (other, ties)
  config = datasets.DataConfig(
    datasets.Events((path,), OWN),
    RowConfig(ties=of_train),
    RowConfig(ties=of_rest),
    features=(
      Rates(('post',)),
      RecentRates(2),
      Activity((3,)),
      RecentShares(('post@2',)),
      TimeGap(9),
      HistoryRates(('*',)),
    ),
  )
  data = datasets.load(config)
  log, rows = data.log, data.splits[split]
  derived = {f.name for f in log.schema.derived} - {'rate_post'}
  assert len(derived) == 9
  same = (log.user[1:] == log.user[:-1]) & (log.time[1:] == log.time[:-1])
  for name in derived:
    values = rows.features[name]
    # As of the first of its time: of all such events, or not.
    equal = bool((values[1:] == values[:-1])[same].all())
    assert equal == (ties == 'strict'), name


@pytest.mark.parametrize(
  'config',
  [
    datasets.DataConfig(),
    datasets.DataConfig(
      datasets.Kuairand(),
      rows=RowConfig(ties='strict'),
      features=(TimeGap(3), HistoryRates(('*',))),
    ),
    datasets.DataConfig(
      datasets.Events(('a',), OWN, TimeSplit(3, '2022-05-01'))
    ),
    datasets.DataConfig(datasets.Events(('a',), OWN, FractionSplit(0.5, 0.25))),
  ],
)
def test_config_survives_json(config):
  values = json.loads(json.dumps(config_lib.to_dict(config)))
  assert config_lib.from_dict(datasets.DataConfig, values) == config


def test_misspelt_schema_is_refused():
  values = config_lib.to_dict(OWN)
  values['item'][0]['sise'] = 3
  with pytest.raises(ValueError, match=r'item\.0\.sise.*size'):
    config_lib.from_dict(Schema, values)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'source': {'type': 'movies'}}, "source.type='movies' must be one of"),
    ({'source': {'type': 'events'}}, 'source.paths is missing'),
    (
      {'source': {'type': 'events', 'paths': (), 'schema': OWN}},
      'paths is empty',
    ),
    ({'source': {'type': 'kuairand', 'paths': ('a',)}}, 'paths is not a field'),
    ({'features': ({'type': 'gap'},)}, "type='gap' must be one of.*time_gap"),
  ],
)
def test_bad_config(fields, message):
  with pytest.raises(ValueError, match=message):
    config_lib.from_dict(datasets.DataConfig, fields)


def test_unknown_task():
  config = datasets.DataConfig(SMALL, tasks=('share',))
  with pytest.raises(ValueError, match="'share' is none of"):
    datasets.load(config)


def test_own_log_needs_no_tfds(tmp_path):
  path = write_own(tmp_path / 'log.parquet')
  code = (
    'import sys; from histjax import schema as s;'
    'from histjax.data import datasets;'
    "x = s.Schema('member', 'when', (s.Dense('age_hours'),),"
    " (s.Task('reaction', threshold=1),));"
    f'd = datasets.load(datasets.DataConfig(datasets.Events(({path!r},),'
    ' x)));'
    "print(len(d.log), 'tensorflow_datasets' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ['4', 'False']


def test_group_is_the_users_own_key(tmp_path):
  path = write_own(tmp_path / 'log.parquet', member=[900, 7, 900, 900])
  data = datasets.load(datasets.DataConfig(datasets.Events((path,), OWN)))
  rows = data.splits['train']
  assert [int(rows.keys[r.group]) for r in rows] == [900]
  assert np.issubdtype(rows.keys.dtype, np.integer)
