"""The time since the last visible event, in buckets."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import example, given
from hypothesis import strategies as st

from histjax.data.events import EventLog
from histjax.features import TimeGap
from histjax.schema import Categorical, Schema, Task
from tests.data import logs


def gaps(times, ties='order', buckets=6, far=None, **fields):
  """Of events of the users a, b, c, c, c, .. at these times."""
  n = len(times)
  schema = Schema(
    user='user',
    time='time',
    item=(Categorical('item', 4),),
    tasks=(Task('click'),),
    **fields,
  )
  zeros = np.zeros(n, np.int64)
  user = ['a', 'b', *('c' for _ in range(n - 2))]
  log = EventLog.from_columns(
    {'user': user, 'time': times, 'item': zeros, 'click': zeros}, schema
  )
  if far is not None:  # Further than a log's times may be apart.
    log = dataclasses.replace(log, time=np.asarray(far))
  log, fitted = logs.derive(log, TimeGap(buckets))
  return fitted.of_events(log.events(ties), None)['time_gap'].tolist()


class TimeGapTest(parameterized.TestCase):
  @parameterized.parameters(
    # 2 minutes are 120 s: floor(log2(121)) = 6, capped at 5.
    ([1, 1, 1, 3], 60.0, [0, 0, 0, 5]),
    # 8 s: floor(log2(9)) = 3.
    ([1, 1, 1, 8001], 1e-3, [0, 0, 0, 3]),
  )
  def test_unit(self, times, unit, expected):
    self.assertEqual(gaps(times, time_unit=unit), expected)
    self.assertEqual(gaps(times, 'strict', time_unit=unit), expected)

  def test_timestamps(self):
    start = np.datetime64('2022-05-01')
    times = start + np.array([0, 0, 0, 8000], 'timedelta64[ms]')
    self.assertEqual(gaps(times), [0, 0, 0, 3])

  def test_ties(self):
    self.assertEqual(gaps([0, 0, 1, 4, 4]), [0, 0, 0, 2, 0])
    self.assertEqual(gaps([0, 0, 1, 4, 4], 'strict'), [0, 0, 0, 2, 2])

  @given(st.integers(0, 2**40))
  @example(2**50 - 2)  # Its logarithm is 50 in float64.
  def test_bucket_is_the_floor_of_the_logarithm(self, gap):
    found = gaps([0, 0, 5, 5], far=[0, 0, 5, 5 + gap], buckets=64)
    self.assertEqual(found[3], (gap + 1).bit_length() - 1)

  def test_no_buckets(self):
    with self.assertRaisesRegex(ValueError, 'buckets=0 must be >= 1'):
      TimeGap(0)


if __name__ == '__main__':
  absltest.main()
