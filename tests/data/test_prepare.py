"""Prepared rows are those of a log in memory, whatever it was cut into."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import chex
import jax
import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet

from histjax import features
from histjax.data import datasets, pipeline, prepare
from histjax.data import splits as splits_lib
from histjax.data.prepare import Options, plan
from histjax.data.rows import RowConfig
from histjax.progress import Progress
from histjax.schema import Categorical
from tests import support
from tests.data import logs, prepared_rows
from tests.marks import slow_unless

ROOT = pathlib.Path(__file__).parents[2]
QUIET = Progress(say=lambda line: None)
FEATURES = (
  features.TimeGap(6),
  features.HistoryRates(('*', 'item')),
  features.Activity((3,)),
  features.Rates(('kind',), 1.0),
  features.RecentRates(2),
  features.RecentShares(('kind@3',)),
)
TIME = splits_lib.TimeSplit(1, 5)
FRACTION = splits_lib.FractionSplit(0.6, 0.2)


def schema(request: bool):
  return dataclasses.replace(
    logs.schema(request=request),
    hidden=(Categorical('kind', 3, column='item_kind'),),
  )


def some_columns(size: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  users = rng.integers(0, 20, size)
  return {
    'uid': np.array([f'u{u}' for u in users]),
    'ts': rng.integers(0, 40, size),
    'rid': rng.integers(0, 4, size),
    'user_age': users % 9,
    'item_id': rng.integers(0, logs.SIZE, size),
    'price': rng.normal(size=size).round(3),
    'stars': rng.integers(1, 6, size),
    'click': rng.integers(0, 2, size),
  }


def write(folder, data, cuts) -> tuple[str, ...]:
  """The columns as files, cut at these fractions, in folders of hive's."""
  data = {**data, 'item_kind': data['item_id'] % 3}
  size = len(data['uid'])
  places = sorted({0, size, *(int(c * size) for c in cuts)})
  for number, (a, b) in enumerate(itertools.pairwise(places)):
    day = pathlib.Path(folder) / 'log' / f'day={number}'
    day.mkdir(parents=True)
    part = {k: v[a:b] for k, v in data.items()}
    parquet.write_table(pa.table(part), day / 'part-0.parquet')
  return (str(pathlib.Path(folder) / 'log'),)


def config(paths, **fields) -> datasets.DataConfig:
  split = fields.pop('split', FRACTION)
  request = fields.pop('request', False)
  options = fields.pop('source', {})
  source = datasets.Events(paths, schema(request), split, **options)
  return datasets.DataConfig(source, **{'features': FEATURES, **fields})


def run(data, folder, **options):
  engine = options.pop('engine', None)
  return prepare.prepare(
    data, folder, Options(**options), engine, progress=QUIET
  )


def prepared(data, folder) -> datasets.Dataset:
  return datasets.load(dataclasses.replace(data, prepared=str(folder)))


KINDS = (
  RowConfig('pointwise', 3),
  RowConfig('request', 4, ties='strict'),
  RowConfig('streaming', 5, max_candidates=3),
  RowConfig('streaming'),
  RowConfig('snapshot', 4),
  RowConfig('snapshot', snapshot_every=3, ties='strict'),
)


class SameRowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  @parameterized.parameters(*[(rows,) for rows in KINDS])
  @support.examples(6)
  @given(
    data=logs.columns(max_users=6, max_events=40),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    num_shards=st.integers(1, 5),
    request=st.booleans(),
    split=st.sampled_from([TIME, FRACTION]),
  )
  def test_to_the_bit(self, rows, data, cuts, num_shards, request, split):
    with tempfile.TemporaryDirectory() as folder:
      data_config = config(
        write(folder, data, cuts),
        rows=rows,
        eval_rows=dataclasses.replace(rows, snapshot_every=None),
        request=request,
        split=split,
        without=('price',),
        tasks=('click',),
      )
      try:
        memory = datasets.load(data_config)
      except ValueError as error:  # Such as labels that are all the same.
        with self.assertRaises(ValueError) as told:
          run(data_config, f'{folder}/out', num_shards=num_shards)
        self.assertEqual(str(told.exception), str(error))
        return
      run(data_config, f'{folder}/out', num_shards=num_shards)
      found = prepared(data_config, f'{folder}/out')
      prepared_rows.check_same(self, found, memory)

  @slow_unless(lambda num_workers: num_workers == 1)
  @parameterized.parameters(1, 2)
  def test_ranges_and_processes(self, num_workers):
    """Counts in an order are the same, cut into ranges and by processes."""
    data = some_columns(300)
    data_config = config(write(self.folder, data, (0.3, 0.5)), rows=KINDS[2])
    cut_as = plan._plan

    def cut(*args):
      return {**cut_as(*args), 'num_ranges': 5, 'run_bytes': 1000}

    with mock.patch.object(plan, '_plan', cut):
      done = run(
        data_config,
        self.folder / 'out',
        num_shards=3,
        engine=prepare.Local(num_workers),
      )
    self.assertEqual((done.num_events, done.num_users), (300, 20))
    found = prepared(data_config, self.folder / 'out')
    prepared_rows.check_same(self, found, datasets.load(data_config))

  def test_integers_texts_and_times(self):
    """Keys and times of one log may be of several types."""
    data = some_columns(120)
    users = np.array([int(u[1:]) for u in data['uid']])
    data['uid'] = users
    (log,) = write(self.folder, data, (0.5,))
    first = pathlib.Path(log) / 'day=0' / 'part-0.parquet'
    table = parquet.read_table(first)
    for name, kind in (('uid', pa.string()), ('ts', pa.float64())):
      column = table[name].cast(kind)
      table = table.set_column(table.column_names.index(name), name, column)
    parquet.write_table(table, first)
    data_config = config((log,), rows=KINDS[0])
    run(data_config, self.folder / 'out', num_shards=2)
    found = prepared(data_config, self.folder / 'out')
    prepared_rows.check_same(self, found, datasets.load(data_config))

  def test_csv(self):
    data = some_columns(60)
    data['item_kind'] = data['item_id'] % 3
    path = self.folder / 'log.csv.gz'
    with pa.CompressedOutputStream(str(path), 'gzip') as stream:
      csv.write_csv(pa.table(data), stream)
    data_config = config((str(path),), rows=KINDS[3])
    run(data_config, self.folder / 'out', num_shards=2)
    found = prepared(data_config, self.folder / 'out')
    prepared_rows.check_same(self, found, datasets.load(data_config))

  def test_an_empty_file_and_an_empty_shard(self):
    data = some_columns(6)
    (log,) = write(self.folder, data, (0.5,))
    empty = parquet.read_table(log).slice(0, 0)
    parquet.write_table(empty, pathlib.Path(log) / 'zzz.parquet')
    data_config = config(
      (log,), rows=KINDS[3], features=(FEATURES[2], FEATURES[5])
    )
    done = run(data_config, self.folder / 'out', num_shards=12)
    self.assertEqual(done.num_events, 6)
    found = prepared(data_config, self.folder / 'out')
    prepared_rows.check_same(self, found, datasets.load(data_config))


class BatchesTest(parameterized.TestCase):
  @parameterized.parameters(KINDS[0], KINDS[2])
  def test_each_host_reads_its_own(self, rows):
    """Every row once an epoch, from wherever it stopped, on any hosts."""
    folder = self.enterContext(tempfile.TemporaryDirectory())
    data_config = config(write(folder, some_columns(200), ()), rows=rows)
    run(data_config, f'{folder}/out', num_shards=3)
    some = prepared(data_config, f'{folder}/out').splits['train']
    options = pipeline.PipelineConfig(batch_events=64, auto_buckets=2)

    def batches(index=0, count=1):
      made = pipeline.train_batches(
        some,
        options,
        row_multiple=2,
        shard_index=index,
        shard_count=count,
        num_epochs=2,
      )
      self.addCleanup(made.close)
      return made

    whole, hosts = batches(), [batches(i, 2) for i in range(2)]
    seen = []
    for number, batch in enumerate(whole):
      parts = [next(host) for host in hosts]
      joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
      chex.assert_trees_all_equal(joined, batch)
      seen += batch.group[batch.candidates.mask.any(1)].tolist()
      if number == 3:
        state = json.loads(json.dumps(whole.get_state()))
    self.assertLen(seen, 2 * len(some))
    again = batches()
    again.set_state(state)
    self.assertLen(list(again), 2 * whole.batches_per_epoch - 4)

  def test_too_long_a_row(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    data_config = config(write(folder, some_columns(200), ()), rows=KINDS[3])
    run(data_config, f'{folder}/out', num_shards=3)
    options = pipeline.PipelineConfig(history_buckets=(2,))
    messages = []
    for made in (
      datasets.load(data_config),
      prepared(data_config, f'{folder}/out'),
    ):
      with self.assertRaises(ValueError) as told:
        pipeline.train_batches(made.splits['train'], options)
      messages.append(str(told.exception))
    self.assertRegex(
      messages[0], "a row of user 'u.*' has .* events of history"
    )
    self.assertEqual(*messages)


class ErrorsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def _log(self, **columns):
    data = {**some_columns(200), **columns}
    return write(self.folder, data, (0.5,))

  def _same_error(self, data_config, *, begun: bool):
    """As in memory; `begun`: work has been spent before."""
    with self.assertRaises(ValueError) as wanted:
      datasets.load(data_config)
    with self.assertRaises(ValueError) as told:
      run(data_config, self.folder / 'out', num_shards=3)
    self.assertEqual(str(told.exception), str(wanted.exception))
    self.assertEqual((self.folder / 'out').exists(), begun)
    return str(told.exception)

  def test_values(self):
    stars = np.ones(200)
    stars[190] = np.nan
    said = self._same_error(config(self._log(stars=stars)), begun=True)
    self.assertRegex(said, 'day=1/part-0.parquet row 90 holds nan')

  @parameterized.named_parameters(
    ('column', {'item_id': None}, {}, "column 'item_id' is not in"),
    ('type', {'ts': np.array(['soon'] * 200)}, {}, "column 'ts'.*'soon'"),
    (
      'split',
      {},
      {'split': splits_lib.TimeSplit('2024-01-01', '2024-01-02')},
      'write it as|holds numbers',
    ),
    ('rows', {}, {'rows': RowConfig('request')}, "ties='strict'"),
    (
      'feature',
      {},
      {'features': (features.RecentRates(2),)},
      'RecentRates needs Rates',
    ),
    ('task', {}, {'tasks': ('buy',)}, "task 'buy'"),
  )
  def test_before_work_is_spent(self, columns, fields, message):
    data = {**some_columns(200), **columns}
    data = {k: v for k, v in data.items() if v is not None}
    paths = write(self.folder, data, (0.5,)) if 'item_id' in data else None
    if paths is None:
      data['item_id'] = np.arange(200) % 60
      paths = write(self.folder, data, (0.5,))
      last = pathlib.Path(paths[0]) / 'day=1' / 'part-0.parquet'
      parquet.write_table(parquet.read_table(last).drop(['item_id']), last)
    said = self._same_error(config(paths, **fields), begun=False)
    self.assertRegex(said, message)

  def test_files(self):
    (log,) = self._log()
    first = f'{log}/day=0/part-0.parquet'
    self.assertRegex(
      self._same_error(config((log, first)), begun=False), 'is given twice'
    )
    self.assertRegex(
      self._same_error(config((f'{log}/none',)), begun=False), 'does not exist'
    )

  def test_unsorted(self):
    ts = np.arange(200)
    ts[120] = 0
    uid = np.array(['u1'] * 200)
    data_config = config(
      self._log(ts=ts, uid=uid), source={'require_sorted': True}
    )
    said = self._same_error(data_config, begun=True)
    self.assertRegex(said, 'day=1/part-0.parquet row 20 holds 0: earlier')

  def test_a_log_in_memory(self):
    with self.assertRaisesRegex(ValueError, 'Synthetic, which is made in mem'):
      run(datasets.DataConfig(datasets.Synthetic()), self.folder / 'out')

  def test_features_of_a_whole_log(self):
    data = config(self._log(), features=(_Mean(),))
    with self.assertRaisesRegex(ValueError, '_Mean.fit reads a whole log'):
      run(data, self.folder / 'out')
    data = config(self._log_again(), features=(_Shuffled(),))
    with self.assertRaisesRegex(ValueError, 'give _Shuffled.counted'):
      run(data, self.folder / 'out')

  def _log_again(self):
    return (str(self.folder / 'log'),)

  def test_too_little_memory(self):
    with self.assertRaisesRegex(ValueError, 'too little for 1 workers: give'):
      run(config(self._log()), self.folder / 'out', memory=2.0**28)
    data = config(self._log_again())
    with mock.patch.object(plan, '_EVENT', 2.0**24):
      with self.assertRaisesRegex(ValueError, 'a shard of 2 has .* raise mem'):
        run(data, self.folder / 'out', memory=2.0**29, num_shards=2)


class ResumeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.config = config(write(self.folder, some_columns(200), (0.5,)))

  @slow_unless(lambda stages: len(stages) == 2)
  @parameterized.parameters(
    (('reading', 'writing'),), (('learning', 'counting', 'writing'),)
  )
  def test_killed(self, stages):
    """Really killed; ends as if it had not been."""
    for where in stages:
      process = subprocess.Popen(
        [
          *(sys.executable, '-m', 'tests.data.prepare_process'),
          *(str(self.folder), where),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
      )
      self.assertEqual(process.stdout.readline(), 'pause\n')
      process.send_signal(signal.SIGKILL)
      self.assertEqual(process.wait(), -signal.SIGKILL)
      process.stdout.close()
      with self.assertRaisesRegex(ValueError, 'not to the end; run prepare'):
        prepared(self.config, self.folder / 'out')
    out = self.folder / 'out'
    self.assertLen(list(out.glob('shard-*.json')), 1)
    self.assertNotEmpty(list(out.glob('.*.tmp')))
    done = run(self.config, out)
    self.assertEqual((done.num_shards, done.num_resumed), (4, 1))
    run(self.config, self.folder / 'at_once', num_shards=4)
    self.assertEqual(contents(out), contents(self.folder / 'at_once'))
    again = run(self.config, out)
    self.assertEqual((again.num_resumed, again.seconds), (4, {}))
    found = prepared(self.config, out)
    prepared_rows.check_same(self, found, datasets.load(self.config))

  def test_other_configs_and_logs(self):
    out = self.folder / 'out'
    run(self.config, out, num_shards=2)
    before = contents(out)
    (log,) = self.config.source.paths
    rows = dataclasses.replace(self.config, rows=RowConfig(history_length=9))
    seen = []
    for data_config, options, message in (
      (rows, {}, r'rows\.history_length: None'),
      (self.config, {'num_shards': 3}, 'num_shards: 2 there, 3 asked for'),
      (
        config((f'{log}/day=0',)),
        {},
        'files of the log: 2 there, 1 asked for',
      ),
    ):
      with self.assertRaisesRegex(ValueError, message) as told:
        run(data_config, out, **options)
      seen.append(str(told.exception))
    with self.assertRaisesRegex(ValueError, 'made with another config') as told:
      prepared(rows, out)
    self.assertIn('rows.history_length', str(told.exception))
    last = pathlib.Path(log) / 'day=1' / 'part-0.parquet'
    os.utime(last, ns=(0, 0))  # Written again, and the same.
    run(self.config, out)
    table = parquet.read_table(last)
    clicks = pa.array(1 - table['click'].to_numpy())
    place = table.column_names.index('click')
    parquet.write_table(table.set_column(place, 'click', clicks), last)
    with self.assertRaisesRegex(ValueError, 'day=1/part-0.parquet has changed'):
      run(self.config, out)
    self.assertEqual(contents(out), before)

  def test_damage(self):
    out = self.folder / 'out'
    run(self.config, out, num_shards=2)
    records = out / 'train-00001-of-00002.array_record'
    index = out / 'index-00000-of-00002.npz'
    for path, change, message in (
      (records, lambda b: b[:-1], 'cut off or changed'),
      (index, lambda b: b[:-1] + b'x', 'does not have its checksum'),
      (out / 'features.npz', lambda b: b[:-9], 'damaged'),
    ):
      whole = path.read_bytes()
      path.write_bytes(change(whole))
      with self.assertRaisesRegex(ValueError, message):
        prepared(self.config, out)
      path.write_bytes(whole)
    whole = records.read_bytes()
    records.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with self.assertRaisesRegex(ValueError, 'out/train cannot be read .*hash'):
      list(prepared(self.config, out).splits['train'])
    records.write_bytes(whole)
    list(prepared(self.config, out).splits['train'])
    (self.folder / 'letter').mkdir()
    (self.folder / 'letter' / 'letter.txt').write_text('Dear')
    with self.assertRaisesRegex(ValueError, 'holds files and no manifest.json'):
      run(self.config, self.folder / 'letter')


def contents(folder) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir()}


@dataclasses.dataclass(frozen=True)
class _Mean(features.DerivedFeature):
  def fit(self, events, train):
    return {'mean': np.mean(events.features['price'])}

  def features(self, schema, state):
    return ()

  def apply(self, events, impressions, state):
    return {}


@dataclasses.dataclass(frozen=True)
class _Shuffled(features.DerivedFeature):
  def features(self, schema, state):
    return ()

  def apply(self, events, impressions, state):
    return {}

  def apply_training(self, events, history_length, state, train):
    return {}


if __name__ == '__main__':
  absltest.main()
