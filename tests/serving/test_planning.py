"""What a user's key is: as a log's columns have it."""

import dataclasses
import types

from absl.testing import absltest
from hypothesis import example, given
from hypothesis import strategies as st

from histjax.data import columns
from histjax.nn.encoder import EncoderConfig
from histjax.schema import Dense, Schema, Task
from histjax.serving import planning
from tests.training.runs import MODEL


def outcome(function, *args):
  try:
    return function(*args)
  except ValueError as error:
    return str(error)


def of_a_log(schema, user):
  table = columns.from_mapping({'u': [user]}, ['u'], 'request.user', schema)
  return columns.canonical_keys(columns.encode_keys(table, 'u')[1])[0]


class LongestStateTest(absltest.TestCase):
  def test_a_window_bounds_it(self):
    def longest(window, history_length):
      config = dataclasses.replace(
        MODEL, encoder=EncoderConfig(num_layers=2, window=window)
      )
      return planning.longest_state(config, history_length)

    self.assertEqual(longest(100, None), 512)  # Twice 2 x 99 + 1, padded.
    self.assertEqual(longest(100, 199), 512)
    self.assertEqual(longest(100, 198), 198)  # Each new event moves its start.
    self.assertEqual(longest(None, 200), 200)
    self.assertIsNone(longest(None, None))


class KeyTest(absltest.TestCase):
  @given(
    st.integers(-(2**65), 2**65)
    | st.text(max_size=3)
    | st.sampled_from([True, 1.0, None, b'x']),
    st.sampled_from([('',), (), ('NA', '7')]),
    st.sampled_from([(), (('u', 'integer'),), (('u', 'text'),)]),
  )
  @example('007', ('',), (('u', 'integer'),))
  @example('', (), ())
  @example('NA', ('NA',), ())
  @example('\ud800', (), ())
  def test_that_of_a_log(self, user, null_values, types_of):
    schema = Schema(
      'u',
      't',
      item=(Dense('x'),),
      tasks=(Task('y'),),
      null_values=null_values,
      column_types=types_of,
    )
    model = types.SimpleNamespace(schema=schema)
    self.assertEqual(
      outcome(planning.Model.key, model, user), outcome(of_a_log, schema, user)
    )


if __name__ == '__main__':
  absltest.main()
