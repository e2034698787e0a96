"""Plain values become the row that a log of them would."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from histjax.data import requests
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig
from histjax.features import TimeGap
from tests.data import logs

SHOWN = {'ts': 9, 'item_id': 3, 'price': 1.0}
PAST = [
  {'ts': 1, 'item_id': 4, 'price': 3.0, 'stars': 5},
  {'ts': 4, 'item_id': 5, 'price': 5.0, 'stars': 1},
]


_LOG = EventLog.from_columns(
  {
    'uid': [0],
    'rid': [0],
    'user_age': [1],
    'click': [0],
    **{k: [v] for k, v in PAST[0].items()},
  },
  logs.schema(),
)
GAPS = logs.derive(_LOG, TimeGap(6))[1]


def make_row(history=PAST, candidates=(SHOWN,), context=None, **kwargs):
  return requests.make_row(
    dataclasses.replace(logs.schema(), derived=GAPS.derived),
    context=context or {'user_age': 2},
    history=history,
    candidates=candidates,
    features=GAPS,
    **kwargs,
  )


class MakeRowTest(parameterized.TestCase):
  def test_time_may_be_the_context_s(self):
    row = make_row(
      candidates=[{'item_id': 1, 'price': 0.0}] * 2,
      context={'user_age': 2, 'ts': 12},
    )
    # 8 s after the last event: floor(log2(9)) = 3.
    self.assertEqual(row.candidates['time_gap'].tolist(), [3, 3])
    self.assertEqual(row.visible.tolist(), [2, 2])

  def test_no_history(self):
    row = make_row(history=[])
    self.assertEqual(row.visible.tolist(), [0])
    self.assertEqual(row.history['item'].dtype, np.int32)
    self.assertEqual(row.history['price'].dtype, np.float32)
    self.assertEqual(row.history['time_gap'].shape, (0,))

  def test_time_is_not_needed_without_gaps(self):
    row = requests.make_row(
      logs.schema(),
      context={'user_age': 2},
      history=[{'item_id': 4, 'price': 3.0, 'stars': 5}],
      candidates=[{'item_id': 4, 'price': 3.0}],
    )
    self.assertEqual(row.visible.tolist(), [1])
    self.assertNotIn('time_gap', row.history)

  @parameterized.named_parameters(
    ('candidates', {'candidates': []}, 'candidates is empty'),
    (
      'unknown',
      {'context': {'user_aeg': 1}},
      "'user_age' is not in context.*did you mean 'user_aeg'",
    ),
    (
      'id',
      {'candidates': [SHOWN, {**SHOWN, 'item_id': 64}]},
      "'item_id': candidates row 1 holds 64: outside",
    ),
    (
      'action',
      {'history': [{k: v for k, v in PAST[0].items() if k != 'stars'}]},
      "'stars' is not in history",
    ),
    (
      'ragged',
      {'history': [PAST[0], {'ts': 2}]},
      "history row 1 lacks 'item_id'",
    ),
    (
      'order',
      {'history': PAST[::-1]},
      "'ts': history row 1 is earlier than the row before",
    ),
    (
      'early',
      {'candidates': [{**SHOWN, 'ts': 3}]},
      "'ts': candidate 0 is earlier than the history's last event",
    ),
    (
      'no_time',
      {'candidates': [{'item_id': 1, 'price': 0.0}]},
      "candidates lacks column 'ts'",
    ),
    (
      'overflow',
      {'config': RowConfig('pointwise', history_length=1, on_overflow='error')},
      'history has 2 events, more than history_length=1',
    ),
    ('nan', {'candidates': [{**SHOWN, 'price': float('nan')}]}, 'holds nan'),
  )
  def test_refused(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      make_row(**change)


if __name__ == '__main__':
  absltest.main()
