"""Prepared rows are those of a log in memory, whatever it was cut into."""

import dataclasses
import itertools
import pathlib
import tempfile

import pyarrow as pa
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from histjax import features
from histjax.data import datasets, prepare
from histjax.data import splits as splits_lib
from histjax.data.prepare import Options
from histjax.data.rows import RowConfig
from histjax.progress import Progress
from histjax.schema import Categorical
from tests import support
from tests.data import logs, prepared_rows

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


if __name__ == '__main__':
  absltest.main()
