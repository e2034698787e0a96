"""What came before an event is counted, whatever its outcome."""

import dataclasses
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import features
from histjax.data import datasets, requests
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig
from histjax.features import Activity, base
from histjax.schema import Categorical, Schema, Task
from histjax.serving import columns
from tests.data import logs

SMALL = datasets.Synthetic(num_users=20, requests_per_user=5)
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


def log_of(events, stamps=False):
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
    log = log_of(events, stamps)
    spans = (1, 4)
    # The log's first time is that of all events.
    later = log.time > log.time.min()
    log, fitted = logs.derive(log, Activity(spans), train=later)
    found = fitted.of_events(log.events(ties), None)
    names = ['activity_1', 'activity_4', 'activity_since']
    self.assertEqual([f.name for f in log.schema.derived], names)
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
        [found[n][i] for n in names], expected, atol=1e-5
      )

  @parameterized.parameters(False, True)
  def test_requests_are_of_the_log_s_clock(self, stamps):
    """What it was fitted to is kept, also by a file."""
    log, fitted = logs.derive(log_of([(0, 1), (1, 7)], stamps), Activity((1,)))
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    fitted.save(folder)
    fitted = features.load(folder)
    times = [7, np.datetime64('2022-05-02')]
    right, wrong = times[stamps], times[not stamps]
    told = ('numbers', 'timestamps')

    def row(time, past=()):
      return requests.make_row(
        log.schema,
        context={'user': 3},
        history=[{'item': 0, 'time': t} for t in past],
        candidates=[{'item': 0, 'time': time}],
        features=fitted,
      )

    self.assertLen(row(right, [right]).candidates['activity_since'], 1)
    message = f'{told[stamps]} in the training log and {told[not stamps]} in'
    with self.assertRaisesRegex(ValueError, f"'time': .*{message} candidates"):
      row(wrong)
    with self.assertRaisesRegex(ValueError, f"'time': .*{message} history"):
      row(right, [wrong])
    rows = RowConfig()
    said = columns.Columns.of_run(log.schema, rows, fitted).needed['events']
    kind = 'ISO 8601 text' if stamps else 'number'
    self.assertEqual(said['time']['type'], kind)
    # Of a file that did not keep it both are taken, as before.
    fitted = dataclasses.replace(fitted, is_timestamp=None)
    self.assertEqual(fitted.digest(), features.load(folder).digest())
    row(wrong)

  @parameterized.parameters(False, True)
  def test_spans_are_whole_nanoseconds(self, stamps):
    # As floating-point numbers these times would be 256 ns apart.
    start = np.datetime64('2022-05-01T00:00:00', 'ns')
    start = start if stamps else start.astype(np.int64)
    zeros = np.zeros(3, np.int64)
    log = EventLog.from_columns(
      {
        **dict.fromkeys(('user', 'item', 'click'), zeros),
        'time': start + np.array([0, 10**9, 10**9 + 1]),
      },
      dataclasses.replace(SCHEMA, time_unit=1e-9),
    )
    # The second is of more nanoseconds than 64 bits hold.
    log, fitted = logs.derive(log, Activity((1, 10**10)))
    found = fitted.of_events(log.events(), None)
    one, all_time = found['activity_1'], found['activity_10000000000']
    np.testing.assert_allclose(np.expm1(one), [0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(np.expm1(all_time), [0, 1, 2], atol=1e-6)

  def test_times_before(self):
    times = np.array([0, 5, 2**62])
    for seconds, unit, before in (
      (3, 1.0, [-3, 2, 2**62 - 3]),
      (1, 1e-9, [-(10**9), 5 - 10**9, 2**62 - 10**9]),
      (0.7, 0.3, [-2, 3, 2**62 - 2]),
      (np.inf, 1e-9, [-(2**63 - 1), 6 - 2**63, 2**62 - 2**63 + 1]),
    ):
      self.assertEqual(base.before(times, seconds, unit).tolist(), before)
    halves = base.before(np.array([0.5]), 3, 0.5)
    self.assertEqual(halves.tolist(), [-5.5])

  def test_a_request_from_before_the_log(self):
    log, fitted = logs.derive(log_of([(0, 10), (1, 20)]), Activity((1,)))
    row = requests.make_row(
      log.schema,
      context={},
      history=[],
      candidates=[{'time': 3, 'item': 0}],
      features=fitted,
    )
    self.assertEqual(row.candidates['activity_since'].tolist(), [0.0])

  @parameterized.parameters((0,), (-1, 2), (2, 2))
  def test_bad_spans(self, *spans):
    with self.assertRaisesRegex(ValueError, r'Activity.spans=.*whole seconds'):
      Activity(spans)

  def test_a_request_that_lasts_longer_than_the_span(self):
    schema = dataclasses.replace(SCHEMA, request='rid')
    zeros = np.zeros(3, np.int64)
    log = EventLog.from_columns(
      {
        **dict.fromkeys(('user', 'item', 'click'), zeros),
        'time': [0, 1, 90],
        'rid': [1, 2, 1],
      },
      schema,
    )
    log, fitted = logs.derive(log, Activity((1,)))
    found = fitted.of_events(log.events(), None)
    # The last one's request began before the second; nothing was before it.
    self.assertEqual(found['activity_1'].tolist()[::2], [0, 0])

  def test_of_a_dataset(self):
    plain = datasets.load(datasets.DataConfig(SMALL))
    found = datasets.load(
      datasets.DataConfig(SMALL, features=(Activity((10,)),))
    )
    self.assertEqual(
      [f.name for f in found.schema.item_features],
      [f.name for f in plain.schema.item] + ['activity_10', 'activity_since'],
    )
    row = found.splits['test'][0]
    expected = found.features.of_events(plain.log.events(), None)
    np.testing.assert_array_equal(
      row.candidates['activity_10'],
      expected['activity_10'][found.splits['test'].candidate_events(0)],
    )

  @parameterized.parameters((1,), (0,))
  def test_a_request_at_a_whole_time_of_a_log_of_fractions(self, user):
    """As the same event of the log, a new user's or a known one's."""
    zeros = np.zeros(2, np.int64)
    log = EventLog.from_columns(
      {
        **dict.fromkeys(('item', 'click'), zeros),
        'user': [0, user],
        'time': [1.75, 3.0],
      },
      SCHEMA,
    )
    log, fitted = logs.derive(log, Activity((1,)))
    past = [] if user else [{'time': 1.75, 'item': 0, 'click': 0}]
    row = requests.make_row(
      log.schema,
      context={},
      history=past,
      candidates=[{'time': 3, 'item': 0}],
      features=fitted,
    )
    wanted = fitted.of_events(log.events(), None)['activity_since'][1:]
    np.testing.assert_array_equal(row.candidates['activity_since'], wanted)


if __name__ == '__main__':
  absltest.main()
