"""Prepared rows are those of a log in memory, whatever it was cut into."""

import dataclasses
import decimal
import itertools
import json
import pathlib
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
from histjax.data.prepare import Options, plan, stages
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


def schema(request: bool, vocabulary: bool = False):
  """That of `logs`, and a hidden column; ids with vocabularies or without."""
  found = logs.schema(request=request)
  item, *others = found.item
  kind = Categorical('kind', 3, column='item_kind')
  if vocabulary:  # Not of all ids: there are more, or too few events.
    item = Categorical(
      'item', 20, column='item_id', ids='vocabulary', min_count=1
    )
    kind = Categorical('kind', 3, column='item_kind', ids='vocabulary')
    age = Categorical('age', 90, column='user_age', ids='hash')
    found = dataclasses.replace(found, context=(age,))
  return dataclasses.replace(found, item=(item, *others), hidden=(kind,))


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
  log_schema = schema(request, fields.pop('vocabulary', False))
  source = datasets.Events(paths, log_schema, split, **options)
  return datasets.DataConfig(source, **{'features': FEATURES, **fields})


def run(data, folder, **options):
  engine = options.pop('engine', None)
  return prepare.prepare(
    data, folder, Options(**options), engine, progress=QUIET
  )


def prepared(data, folder) -> datasets.Dataset:
  return datasets.load(dataclasses.replace(data, prepared=str(folder)))


def contents(folder) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir()}


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
  @support.examples(8)
  @given(
    data=logs.columns(max_users=6, max_events=40, min_events=6),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    num_shards=st.integers(1, 5),
    request=st.booleans(),
    split=st.sampled_from([TIME, FRACTION]),
    vocabulary=st.booleans(),
  )
  def test_to_the_bit(
    self, rows, data, cuts, num_shards, request, split, vocabulary
  ):
    with tempfile.TemporaryDirectory() as folder:
      data_config = config(
        write(folder, data, cuts),
        rows=rows,
        eval_rows=dataclasses.replace(rows, snapshot_every=None),
        request=request,
        split=split,
        vocabulary=vocabulary,
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

  @parameterized.parameters(2**63 + 5, 2**64 + 5, -3)
  def test_integers_of_several_types(self, large):
    """Of one column, whose pieces differ in what holds them."""
    data = some_columns(120)
    users = [decimal.Decimal(int(u[1:])) for u in data['uid']]
    users[50:55] = [decimal.Decimal(large)] * 5
    users[100:105] = [decimal.Decimal(2**63 + 7)] * 5
    data['uid'] = pa.array(users, pa.decimal128(21, 0))
    data_config = config(write(self.folder, data, ()), rows=KINDS[0])
    with mock.patch.object(stages, '_MAX_ROWS', 16):
      run(data_config, self.folder / 'out', num_shards=2)
    found = prepared(data_config, self.folder / 'out')
    prepared_rows.check_same(self, found, datasets.load(data_config))

  def test_keys_are_stored_as_they_are(self):
    data = some_columns(120)
    names = {'u1': 'u2\0', 'u3': 'x' * 20_000, 'u4': 'ü'}
    data['uid'] = np.array([names.get(u, u) for u in data['uid']], object)
    data_config = config(write(self.folder, data, ()), features=FEATURES[3:4])
    run(data_config, self.folder / 'out', num_shards=2)
    for path in (self.folder / 'out').glob('index-*'):
      self.assertLess(path.stat().st_size, 50_000)
    found = prepared(data_config, self.folder / 'out')
    prepared_rows.check_same(self, found, datasets.load(data_config))
    keys = found.splits['train'].keys
    self.assertEqual(sorted(keys), sorted(set(data['uid'])))

  def test_features_named_as_arguments_of_numpy(self):
    data_config = config(write(self.folder, some_columns(60), ()), features=())
    item = tuple(
      Categorical(name, 50, column='item_id', ids='hash')
      for name in ('file', 'allow_pickle')
    )
    log_schema = dataclasses.replace(
      data_config.source.schema, item=item, hidden=()
    )
    data_config = dataclasses.replace(
      data_config,
      source=dataclasses.replace(data_config.source, schema=log_schema),
    )
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

  def test_keys_beyond_signed_integers_and_an_empty_shard(self):
    data = some_columns(60)
    data['uid'] = np.arange(60, dtype=np.uint64) % 2 + np.uint64(2**63)
    paths = write(self.folder, data, ())
    data_config = config(paths, rows=KINDS[0], features=FEATURES[3:4])
    run(data_config, self.folder / 'out', num_shards=12)
    keys = prepared(data_config, self.folder / 'out').splits['train'].keys
    self.assertEqual(sorted(keys.tolist()), [2**63, 2**63 + 1])


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

  @parameterized.parameters(False, True)
  def test_a_host_without_rows(self, pack):
    """Its part of a batch is empty, and shorter than the first row."""
    folder = self.enterContext(tempfile.TemporaryDirectory())
    users = np.append(np.zeros(100, int), 1 + np.arange(100) // 4)
    columns = {**some_columns(200), 'uid': users, 'user_age': users % 9}
    data_config = config(write(folder, columns, ()), rows=KINDS[3])
    run(data_config, f'{folder}/out', num_shards=1)  # Users in one order.
    options = pipeline.PipelineConfig(
      batch_events=1024, auto_buckets=2, num_threads=0, pack=pack
    )
    empty = 0
    memory = datasets.load(data_config).splits['train']
    some = prepared(data_config, f'{folder}/out').splits['train']
    self.assertEqual(some.history_lengths.argmax(), 0)
    for host in (0, 1):
      found, wanted = (
        list(
          pipeline.eval_batches(
            rows, options, row_multiple=16, shard_index=host, shard_count=2
          )
        )
        for rows in (some, memory)
      )
      chex.assert_trees_all_equal(found, wanted, strict=True)
      empty += sum(not batch.candidates.mask.any() for batch in found)
    self.assertGreater(empty, 0)

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


if __name__ == '__main__':
  absltest.main()
