"""What came before an event is counted, whatever its outcome."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import activity, datasets
from histjax.data.events import EventLog
from histjax.schema import Categorical, Schema, Task

SCHEMA = Schema(
  user='user',
  time='time',
  time_unit=0.5,
  item=(Categorical('item', 3),),
  tasks=(Task('click'),),
)
EVENTS = st.lists(
  st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=30
)


def _log(events, stamps=False):
  user, time = np.array(events).T
  if stamps:  # Half seconds, as the numbers are.
    time = np.datetime64('2022-05-01') + time * np.timedelta64(500, 'ms')
  zeros = np.zeros(len(user), np.int64)
  columns = {'user': user, 'time': time, 'item': zeros, 'click': zeros}
  return EventLog.from_columns(columns, SCHEMA)


class ActivityTest(parameterized.TestCase):
  @parameterized.product(ties=('order', 'strict'), stamps=(False, True))
  @given(events=EVENTS)
  def test_definition(self, ties, stamps, events):
    log = _log(events, stamps)
    spans = (1, 4)
    found = activity.with_activity(log, spans, ties)
    names = ['activity_1', 'activity_4', 'activity_since']
    self.assertEqual([f.name for f in found.schema.item], ['item', *names])
    seconds = log.time * (1e-9 if stamps else 0.5)
    for i in range(len(log)):
      past = [
        seconds[j]
        for j in range(len(log))
        if log.user[j] == log.user[i]
        and (seconds[j] < seconds[i] if ties == 'strict' else j < i)
      ]
      last = past[-1] if past else seconds.min()
      expected = [
        *(np.log1p(sum(seconds[i] - t <= s for t in past)) for s in spans),
        np.log1p(seconds[i] - last) / 10,
      ]
      np.testing.assert_allclose(
        [found.features[n][i] for n in names], expected, atol=1e-5
      )

  @parameterized.parameters((0,), (-1, 2), (2, 2))
  def test_bad_spans(self, *spans):
    with self.assertRaisesRegex(ValueError, r'data: activity=.*whole seconds'):
      activity.with_activity(_log([(0, 0)]), spans)

  def test_of_a_dataset(self):
    plain = datasets.load(datasets.DataConfig())
    found = datasets.load(datasets.DataConfig(activity=(10,)))
    self.assertEqual(
      [f.name for f in found.schema.item],
      [f.name for f in plain.schema.item] + ['activity_10', 'activity_since'],
    )
    row = found.splits['test'][0]
    expected = activity.with_activity(plain.log, (10,))
    np.testing.assert_array_equal(
      row.candidates['activity_10'],
      expected.features['activity_10'][
        found.splits['test'].candidate_events(0)
      ],
    )


class RecentSharesTest(parameterized.TestCase):
  @parameterized.product(ties=('order', 'strict'), stamps=(False, True))
  @given(events=EVENTS, seed=st.integers(0, 99))
  def test_definition(self, ties, stamps, events, seed):
    log = _log(events, stamps)
    rng = np.random.default_rng(seed)
    item, train = rng.integers(0, 3, len(log)), rng.random(len(log)) < 0.7
    log = dataclasses.replace(log, features={'item': item})
    found = activity.with_recent_shares(log, train, ('item@2', 'item@5'), ties)
    usual = sorted(set(item[train]))
    names = [f'recent_item_{v}_of_{n}' for n in (2, 5) for v in usual]
    self.assertEqual([f.name for f in found.schema.item], ['item', *names])
    for i in range(len(log)):
      past = [
        item[j]
        for j in range(len(log))
        if log.user[j] == log.user[i]
        and (log.time[j] < log.time[i] if ties == 'strict' else j < i)
      ]
      expected = [
        sum(x == v for x in past[-n:]) / n for n in (2, 5) for v in usual
      ]
      np.testing.assert_allclose(
        [found.features[n][i] for n in names], expected, atol=1e-6
      )

  def test_rare_values_are_left_out(self):
    log = _log([(0, i) for i in range(400)])
    item = np.arange(400) % 2
    item[[7, 300, 301]] = 2  # One of the first 200, where 2 would be enough.
    log = dataclasses.replace(log, features={'item': item})
    found = activity.with_recent_shares(log, np.arange(400) < 200, ('item@3',))
    self.assertEqual(
      [f.name for f in found.schema.item],
      ['item', 'recent_item_0_of_3', 'recent_item_1_of_3'],
    )

  @parameterized.parameters('item', 'item@', 'item@0', 'other@3', 'item@3@4')
  def test_bad_names(self, name):
    message = f'data: recent_shares has {name!r}; .*must be'
    with self.assertRaisesRegex(ValueError, message):
      activity.with_recent_shares(_log([(0, 0)]), np.ones(1, bool), (name,))

  def test_of_a_dataset(self):
    found = datasets.load(datasets.DataConfig(recent_shares=('category@4',)))
    name = 'recent_category_1_of_4'
    self.assertIn(name, [f.name for f in found.schema.item])
    row = found.splits['test'][0]
    self.assertEqual(row.candidates[name].dtype, np.float32)
    self.assertIn(name, row.history)


if __name__ == '__main__':
  absltest.main()
