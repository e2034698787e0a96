"""Moments of any type, unit and zone are of one clock."""

import datetime
import os
import time
import unittest.mock
import zoneinfo

import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized

from histjax.data import columns as columns_lib
from histjax.schema import Categorical, Schema, Task
from tests.data.test_columns import parts, table

MOMENT = 1_651_399_200_000_000_000  # 2022-05-01T10:00 in UTC.
BERLIN = zoneinfo.ZoneInfo('Europe/Berlin')


class PandasTimestamp(datetime.datetime):
  """As pandas.Timestamp: a datetime with nanoseconds beside."""

  nanosecond = 7


class TimeTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('datetime', [datetime.datetime(2022, 5, 1, 10)]),
    ('aware', [datetime.datetime(2022, 5, 1, 12, tzinfo=BERLIN)]),
    ('numpy', [np.datetime64('2022-05-01T10')]),
    ('text', ['2022-05-01T10:00:00']),
    ('text_space', ['2022-05-01 10:00']),
    ('text_z', ['2022-05-01T10:00:00Z']),
    ('text_zone', ['2022-05-01T12:00:00.000+02:00']),
    ('text_short_zone', ['2022-05-01T08-02']),
    *(
      (f'numpy_{unit}', np.array(['2022-05-01T10'], f'datetime64[{unit}]'))
      for unit in ('2h', 'h', 'm', '25s', 's', '10ms', 'ms', 'us', '2ns', 'ns')
    ),
    *(
      (f'arrow_{unit}', pa.array([MOMENT // factor], pa.timestamp(unit, zone)))
      for unit, factor, zone in (
        ('s', 10**9, None),
        ('ms', 10**6, 'Europe/Berlin'),
        ('us', 10**3, 'UTC'),
        ('ns', 1, '+02:00'),
      )
    ),
  )
  def test_one_clock(self, values):
    found, is_timestamp = columns_lib.encode_time(table(values), 'item')
    self.assertTrue(is_timestamp)
    self.assertEqual(found.tolist(), [MOMENT])
    self.assertEqual(found.dtype, np.int64)

  def test_mixed_objects(self):
    day = datetime.date(2022, 5, 1)
    values = [
      day,
      datetime.datetime(2022, 5, 1, 10),
      datetime.datetime(2022, 5, 1, 12, tzinfo=BERLIN),
      np.datetime64('2022-05-01T10:00:00.000000001', 'ns'),
      np.datetime64('2022-05', 'M'),
      np.datetime64(MOMENT // (25 * 10**6), '25ms'),
      PandasTimestamp(2022, 5, 1, 10, 0, 0, 3),
    ]
    found, _ = columns_lib.encode_time(table(values), 'item')
    midnight = MOMENT - 10 * 3600 * 10**9
    self.assertEqual(
      found.tolist(),
      [midnight, *[MOMENT] * 2, MOMENT + 1, midnight, MOMENT, MOMENT + 3007],
    )

  def test_the_machine_s_zone_does_not_matter(self):
    self.addCleanup(time.tzset)
    with unittest.mock.patch.dict(os.environ, TZ='Asia/Tokyo'):
      time.tzset()
      self.test_mixed_objects()
      self.test_mixed_zones_of_text()

  def test_mixed_zones_of_text(self):
    found, _ = columns_lib.encode_time(
      table(['2022-05-01T10:00Z', '2022-05-01 10:00', '2022-05-01']), 'item'
    )
    self.assertEqual(found.tolist()[:2], [MOMENT] * 2)

  def test_parts_of_other_units(self):
    columns = parts(
      pa.array([MOMENT // 1000], pa.timestamp('us', 'Asia/Tokyo')),
      ['2022-05-01T10:00'],
      pa.array([MOMENT // 86400 // 10**9], pa.date32()),
    )
    found, _ = columns_lib.encode_time(columns, 'item')
    self.assertEqual(found.tolist()[:2], [MOMENT] * 2)

  @parameterized.parameters(
    (['5', '007'], [5, 7], np.int64),
    (['5', '7.5'], [5, 7.5], np.float64),
    (['20220501'], [20220501], np.int64),
    ([5.0, 7.5], [5, 7.5], np.float64),
    (pa.array([5], pa.uint64()), [5], np.int64),
  )
  def test_numbers(self, values, wanted, dtype):
    found, is_timestamp = columns_lib.encode_time(table(values), 'item')
    self.assertFalse(is_timestamp)
    self.assertEqual(found.tolist(), wanted)
    self.assertEqual(found.dtype, dtype)

  @parameterized.parameters(
    (['1', '2022-05-01'], "row 1 holds '2022-05-01': a time must be a number"),
    (['2022-05-01', '1'], "row 1 holds '1': a time must be a number or an ISO"),
    (['2022-05-01', 'May'], "row 1 holds 'May'"),
    (['1970-01-01', '1969-12-31'], '1970 or later'),
    (['2400-01-01'], 'between 1970 and 2262'),
    ([datetime.datetime(2400, 1, 1)], 'between 1970 and 2262'),
    (np.array(['2400-01-01'], 'datetime64[D]'), 'between 1970 and 2262'),
    ([np.datetime64('NaT', 'ns')], r'no value \(null\)'),
    (np.array(['2022', 'NaT'], 'datetime64[ns]'), r'no value \(null\)'),
    ([datetime.datetime(2022, 5, 1), 5], 'row 1 holds 5, a int, and row 0'),
    ([datetime.timedelta(1)], 'a number is needed.*duration'),
    ([2**63], 'row 0 holds 9223372036854775808: it must be below'),
    ([1.0, float('inf')], 'row 1 holds inf: it must be finite'),
    (['nan'], 'must be finite'),
    ([True], 'row 0 holds True: a time must be a number'),
  )
  def test_refused(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      columns_lib.encode_time(table(values), 'item')

  def test_two_clocks(self):
    with self.assertRaisesRegex(
      ValueError, 'part0 row 0 and on are numbers, part1 row 0 and on timest'
    ):
      columns_lib.encode_time(parts([5], ['2022-05-01']), 'item')
    with self.assertRaisesRegex(
      ValueError, 'numbers in the log and timestamps in a request; give all'
    ):
      columns_lib.check_clocks('t', {'the log': False, 'a request': True})

  def test_declared(self):
    # Declared on the time column, which here is the one of this name.
    def encode(values, kind):
      declared = Schema(
        'user',
        'item',
        item=(Categorical('i', 2),),
        tasks=(Task('y'),),
        column_types={'item': kind},
      )
      columns = columns_lib.from_mapping(
        {'item': values}, ['item'], 'memory', declared
      )
      return columns_lib.encode_time(columns, 'item')

    self.assertTrue(encode(['2022-05-01'], 'timestamp')[1])
    for bad in (['20220501'], [20220501]):
      with self.assertRaisesRegex(ValueError, 'row 0 holds .*20220501'):
        encode(bad, 'timestamp')
    for kind in ('number', 'integer'):
      self.assertEqual(encode(['7'], kind)[0].tolist(), [7])
      with self.assertRaisesRegex(ValueError, "'item'.*row 0 holds .*number"):
        encode(np.array(['2022-05-01'], 'datetime64[s]'), kind)


if __name__ == '__main__':
  absltest.main()
