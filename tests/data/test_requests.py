"""Plain values become the row that a log of them would."""

import dataclasses
import datetime

import chex
import numpy as np
import pandas as pd
import pyarrow as pa
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


def make_row(
  history=PAST, candidates=(SHOWN,), context=None, features=GAPS, **kwargs
):
  return requests.make_row(
    dataclasses.replace(logs.schema(), derived=GAPS.derived),
    context={'user_age': 2} if context is None else context,
    history=history,
    candidates=candidates,
    features=features,
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

  def test_a_candidate_s_own_time_comes_first(self):
    row = make_row(context={'user_age': 2, 'ts': 500})
    self.assertEqual(row.candidates['time_gap'].tolist(), [2])  # 5 s.

  def test_arrays_of_another_byte_order(self):
    shown = {'ts': [500], 'item_id': [1], 'price': [1.5]}
    swapped = {
      'ts': np.array([500], '>i8'),
      'item_id': np.array([1], '>u2'),
      'price': np.array([1.5], '>f4'),
    }
    a, b = make_row(candidates=shown), make_row(candidates=swapped)
    for name, values in a.candidates.items():
      np.testing.assert_array_equal(values, b.candidates[name])

  def test_request_may_be_the_context_s(self):
    history = [{**e, 'rid': i} for i, e in enumerate(PAST)]
    for context, shown, visible in (
      ({'rid': 1}, SHOWN, 1),
      ({'rid': 0}, SHOWN, 0),
      ({'rid': 5}, SHOWN, 2),
      ({'rid': 5}, {**SHOWN, 'rid': 1}, 1),
    ):
      row = requests.make_row(
        logs.schema(request=True),
        context={'user_age': 2, **context},
        history=history,
        candidates=[shown],
      )
      self.assertEqual(row.visible.tolist(), [visible])

  @parameterized.parameters(
    ((5, 5), (2, 2)), ((5, 6), (2, 2)), ((1, 1), (1, 1)), ((5, 1, 0), (2, 1, 0))
  )
  def test_requests_of_several_candidates(self, given, visible):
    """Each sees what was before its own request's first event."""
    for config, wanted in (
      (None, visible),
      (RowConfig('snapshot'), (min(visible),) * len(visible)),
    ):
      row = requests.make_row(
        logs.schema(request=True),
        context={'user_age': 2},
        history=[{**e, 'rid': i} for i, e in enumerate(PAST)],
        candidates=[{**SHOWN, 'rid': rid} for rid in given],
        config=config,
      )
      self.assertEqual(row.visible.tolist(), list(wanted))
      self.assertLen(row.history['stars'], max(wanted))

  @parameterized.parameters((0, 0), (1, 1), (2, 2), (None, 2))
  def test_visible(self, visible, seen):
    for config in (None, RowConfig('snapshot')):
      row = make_row(visible=visible, config=config)
      self.assertEqual(row.visible.tolist(), [seen])
      self.assertLen(row.history['stars'], seen)

  def test_as_of(self):
    config = RowConfig('streaming', history_length=1, ties='strict')
    early = {**SHOWN, 'ts': 2}
    row = make_row(candidates=[early, SHOWN], config=config, as_of=True)
    self.assertEqual(row.visible.tolist(), [1, 2])
    history = [{**e, 'rid': i} for i, e in enumerate((*PAST, PAST[1]))]
    row = requests.make_row(
      logs.schema(request=True),
      context={'user_age': 2, 'rid': 1},
      history=history,
      candidates=[{**early, 'ts': 0}, SHOWN],
      config=RowConfig(ties='strict'),
      as_of=True,
    )
    self.assertEqual(row.visible.tolist(), [0, 1])

  def test_history_of_the_length_that_may_be(self):
    config = RowConfig('pointwise', history_length=2, on_overflow='error')
    self.assertEqual(make_row(config=config).visible.tolist(), [2])

  def test_iterators_are_columns_and_rows(self):
    wanted = make_row()
    columns = {name: iter([e[name] for e in PAST]) for name in PAST[0]}
    for row in (
      make_row(history=iter(PAST), candidates=iter([SHOWN])),
      make_row(history=columns),
    ):
      chex.assert_trees_all_equal(row.history, wanted.history, strict=True)
      chex.assert_trees_all_equal(row.candidates, wanted.candidates)

  def test_one_clock(self):
    past = ['2022-05-01T10:00:00', '2022-05-01T10:00:04']
    berlin = datetime.timezone(datetime.timedelta(hours=2))
    ways = [
      past,
      [datetime.datetime.fromisoformat(t) for t in past],
      [datetime.datetime.fromisoformat(t + '+00:00') for t in past],
      [np.datetime64(t, 'us') for t in past],
      np.array(past, 'datetime64[ns]'),
      pa.array(np.array(past, 'datetime64[s]'), pa.timestamp('s', 'UTC')),
    ]
    now = [
      '2022-05-01T12:00:07+02:00',
      datetime.datetime(2022, 5, 1, 12, 0, 7, tzinfo=berlin),
      np.datetime64('2022-05-01T10:00:07', 'ms'),
    ]
    for times in ways:
      for moment in now:
        row = make_row(
          history={
            'ts': times,
            'item_id': [4, 5],
            'price': [3.0, 5.0],
            'stars': [5, 1],
          },
          candidates=[{**SHOWN, 'ts': moment}],
          config=RowConfig('pointwise', ties='strict'),
          features=dataclasses.replace(GAPS, is_timestamp=True),
        )
        self.assertEqual(row.visible.tolist(), [2])
        self.assertEqual(row.history['time_gap'].tolist(), [0, 2])
        self.assertEqual(row.candidates['time_gap'].tolist(), [2])

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
    with self.assertRaisesRegex(ValueError, "history lacks column 'ts'"):
      requests.make_row(
        logs.schema(),
        context={'user_age': 2},
        history=[{'item_id': 4, 'price': 3.0, 'stars': 5}],
        candidates=[SHOWN],
        config=RowConfig(ties='strict'),
      )

  def test_derived_features_need_the_requests(self):
    schema = dataclasses.replace(
      logs.schema(request=True), derived=GAPS.derived
    )
    with self.assertRaisesRegex(ValueError, "'rid' is not in history"):
      requests.make_row(
        schema,
        context={'user_age': 2},
        history=PAST,
        candidates=[SHOWN],
        features=GAPS,
      )

  def test_features_of_another_model(self):
    other = logs.derive(_LOG, TimeGap(7))[1]
    schema = dataclasses.replace(logs.schema(), derived=other.derived)
    with self.assertRaisesRegex(ValueError, "'time_gap', which `features` do"):
      requests.make_row(
        schema,
        context={'user_age': 2},
        history=PAST,
        candidates=[SHOWN],
        features=GAPS,
      )

  @parameterized.named_parameters(
    ('candidates', {'candidates': []}, 'candidates is empty'),
    (
      'unknown',
      {'context': {'user_aeg': 1}},
      "context has column 'user_aeg', which .*; rename it to 'user_age', or",
    ),
    (
      'unknown_of_a_candidate',
      {'candidates': [{**SHOWN, 'sku': 1}]},
      "candidates has column 'sku', .*; leave it out; known are .*'item_id'",
    ),
    (
      'unknown_of_an_event',
      {'history': [{**e, 7: 1} for e in PAST]},
      'history has column 7, which the model does not know; leave it out',
    ),
    ('no_context_column', {'context': {}}, "'user_age' is not in context"),
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
      "'ts': candidate 0 is earlier than .*; drop the events after it$",
    ),
    (
      'early_strict',
      {
        'candidates': [{**SHOWN, 'ts': 3}],
        'config': RowConfig('pointwise', ties='strict'),
      },
      'drop the events after it, or set as_of=True$',
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
    (
      'huge',
      {'candidates': [SHOWN, {**SHOWN, 'price': 3e38}]},
      r"'price': candidates row 1 holds 3e\+38: too large",
    ),
    (
      'text_for_a_number',
      {'candidates': [{**SHOWN, 'price': 'cheap'}]},
      "'price': candidates row 0 holds 'cheap': a number is needed",
    ),
    (
      'integer_of_65_bits',
      {'candidates': [{**SHOWN, 'item_id': 2**64}]},
      "'item_id' of candidates: row 0 holds 18446744073709551616.*64 bits",
    ),
    (
      'integer_of_64_bits',
      {'candidates': [{**SHOWN, 'item_id': 2**63}]},
      "'item_id': candidates row 0 holds 9223372036854775808",
    ),
    (
      'nested',
      {'candidates': [{**SHOWN, 'price': [1.0]}]},
      "'price': candidates row 0 holds .1.0.: a number is needed.*list",
    ),
    (
      'missing',
      {'candidates': [{**SHOWN, 'price': None}]},
      "'price': candidates row 0 has no value",
    ),
    (
      'nested_context',
      {'context': {'user_age': [2]}},
      "'user_age': context row 0 holds .2.",
    ),
    ('no_context', {'context': [1]}, 'context is a list; give {column: value}'),
    ('frame', {'candidates': pd.DataFrame({'item': [1]})}, 'is a DataFrame; g'),
    ('text', {'candidates': 'abc'}, 'candidates is a str; give'),
    ('none', {'history': None}, 'history is a NoneType; give'),
    ('number', {'candidates': 5}, 'candidates is a int; give'),
    ('rows', {'candidates': [1, 2]}, 'candidates row 0 is a int; give'),
    (
      'scalars',
      {'candidates': SHOWN},
      "'ts' of candidates is 9, a int; give one value an event",
    ),
    (
      'one_text',
      {'candidates': {'ts': '12', 'item_id': [1], 'price': [1.0]}},
      "'ts' of candidates is '12', a str",
    ),
    (
      'one_text_of_bytes',
      {'candidates': {'ts': b'12', 'item_id': [1], 'price': [1.0]}},
      "'ts' of candidates is b'12', a bytes",
    ),
    (
      'no_dimensions',
      {'candidates': {'ts': [9], 'item_id': np.array(1), 'price': [1.0]}},
      r"'item_id' of candidates is array\(1\), a ndarray; give one value",
    ),
    ('negative_visible', {'visible': -1}, 'visible=-1 must be an integer in'),
    ('true_visible', {'visible': True}, 'visible=True must be an integer in'),
    ('visible_of_each', {'visible': [0]}, r'visible=\[0\] must be an integer'),
    ('half_visible', {'visible': 0.5}, 'visible=0.5 must be an integer in'),
    (
      'as_of_a_time',
      {
        'as_of': 9,
        'config': RowConfig('pointwise', ties='strict'),
      },
      "as_of=9 must be True or False; the time .* is the column 'ts'",
    ),
    ('empty_event', {'history': [{}]}, 'history row 0 is empty; give'),
    (
      'empty_candidate',
      {'candidates': [{}]},
      'candidates row 0 is empty; give',
    ),
    (
      'lengths',
      {'candidates': {'ts': [9], 'item_id': [1, 2], 'price': [1.0]}},
      'columns of candidates differ in length',
    ),
    (
      'clocks',
      {'candidates': [{**SHOWN, 'ts': '2022-05-01'}]},
      "'ts': the times are numbers in the training log and timestamps in",
    ),
  )
  def test_refused(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      make_row(**change)


if __name__ == '__main__':
  absltest.main()
