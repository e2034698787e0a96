"""What is read without Arrow is what Arrow reads, and refused alike."""

import dataclasses
import decimal
import enum
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import hashing, plain
from histjax.data import values as values_lib
from histjax.schema import Categorical, Dense, Schema, Task
from histjax.vocabulary import Vocabulary

SOURCE = 'events'


class Level(enum.IntEnum):
  LOW = 1


SMALL = st.integers(-3, 12)
BIG = st.sampled_from(
  [2**31, 2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63)]
) | st.integers(-(2**70), 2**70)
FLOATS = st.floats() | st.sampled_from([0.0, -0.0, 1.0, 1e30, 1e31, 2.0**53])
TEXTS = st.text(max_size=3) | st.sampled_from(
  ['', 'NA', '7', '007', '-0', '1e3', 'true', '\ud800', 'x' * 65]
)
OTHERS = st.sampled_from(
  [
    *(None, True, False, Level.LOW, decimal.Decimal('1.5'), b'x', [1]),
    *(np.int32(5), np.int64(-1), np.uint64(2**63), np.float32(0.5)),
    *(np.float64('nan'), np.bool_(True), np.str_('a')),
    np.datetime64('2024-01-01T00:00:00'),
  ]
)
ITEMS = (SMALL, BIG, FLOATS, TEXTS, OTHERS)
DTYPES = ('i1', 'i8', 'u4', 'u8', '>i8', 'f2', 'f4', 'f8', 'g', '?', 'O', 'U2')


@st.composite
def columns(draw):
  """Values of a column, mostly of one kind, in a container."""
  kinds = draw(st.sampled_from([(kind,) for kind in ITEMS] + [ITEMS]))
  kinds = draw(st.sampled_from([kinds, (SMALL, FLOATS)]))
  found = draw(st.lists(st.one_of(*kinds), min_size=1, max_size=6))
  if draw(st.booleans()):
    return draw(st.sampled_from([list, tuple]))(found)
  drawn = draw(st.lists(SMALL, min_size=1, max_size=6))
  array = np.array(drawn).astype(draw(st.sampled_from(DTYPES)))
  if array.dtype.kind == 'f' and draw(st.booleans()):
    array[0] = draw(st.sampled_from([np.nan, np.inf, 1.5, 6e4]))
  return draw(st.sampled_from([array, array[::2], array[:, None], array[0]]))


USES = {
  'index': Categorical('x', 10),
  'hash': Categorical('x', 1000, ids='hash'),
  'vocabulary': Categorical('x', 4, ids='vocabulary'),
  'dense': Dense('x', offset=1.0, scale=2.0),
  'fine': Dense('x', scale=1e-30),
  'log': Dense('x', log=True),
}
KNOWN = {
  'x': Vocabulary(hashing.digests(np.array(['a', '7', '2'], object))),
}
TYPES = ((), (('x', 'integer'),), (('x', 'number'),), (('x', 'text'),))


def read(use: str, values, schema: Schema):
  """What the values are read as, as a request's are."""
  columns_read = values_lib.read({'x': values}, SOURCE)
  length = values_lib.length_of(columns_read)
  if use == 'time':
    return values_lib.times(schema, columns_read, length, True, SOURCE)
  if use == 'labels':
    return values_lib.labels(schema, columns_read, length, SOURCE)
  if use == 'keys':
    return values_lib.keys(schema, columns_read, 'x', SOURCE)
  return values_lib.encode(
    schema, columns_read, schema.item, length, SOURCE, KNOWN
  )


def outcome(use: str, values, schema: Schema):
  """The arrays with their types, bit by bit; or the error's text."""
  try:
    found = read(use, values, schema)
  except Exception as error:
    return type(error), str(error)
  found = found if isinstance(found, dict | tuple) else (found,)
  parts = found.values() if isinstance(found, dict) else found
  return [
    (x.dtype, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x
    for x in parts
  ]


def by_arrow(use: str, values, schema: Schema):
  with mock.patch.multiple(
    plain,
    **dict.fromkeys(('encode', 'digests', 'time', 'labels'), lambda *_: None),
  ):
    return outcome(use, values, schema)


class MyInt(int):
  """Not quite an int."""


ODD = (
  *(True, None, 2.5, float('nan'), 'i', b'i' * 10, 'i' * 10, MyInt(3)),
  *(2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, 10**400, [1], (1, 2)),
  *(np.int32(5), np.float64(0.5), np.float32(0.5), np.bool_(True), 1j),
  *(np.array([105]), np.array(7), decimal.Decimal(1), {'a': 1}, Level.LOW),
)
"""Values in a long list of others."""


def schema_of(use: str, types=(), null_values=('',)) -> Schema:
  item = USES.get(use, Dense('other'))
  log = Schema(
    user='x' if use == 'keys' else 'user',
    time='x' if use == 'time' else 'time',
    item=(item,),
    tasks=(
      Task('y', column='x' if use == 'labels' else 'y'),
      Task('z', column='x' if use == 'labels' else 'z', threshold=1.5),
    ),
    null_values=null_values,
  )
  try:
    return dataclasses.replace(log, column_types=types)
  except ValueError:  # It cannot be so declared.
    return log


class PlainTest(parameterized.TestCase):
  @parameterized.parameters(*USES, 'time', 'labels', 'keys')
  def test_as_arrow(self, use):
    @given(
      columns(),
      st.sampled_from(TYPES),
      st.sampled_from([('',), (), ('NA', '7')]),
    )
    def check(values, types, null_values):
      schema = schema_of(use, types, null_values)
      self.assertEqual(
        outcome(use, values, schema), by_arrow(use, values, schema)
      )

    check()

  @parameterized.parameters(
    ('index', [1, 2]),
    ('index', np.array([1, 2], np.int32)),
    ('hash', [5, -5]),
    ('hash', ['a', '7', 'ä']),
    ('vocabulary', [7, -5]),
    ('vocabulary', ['a', '7', '007']),
    ('dense', [1.5, 2.5]),
    ('dense', [1, 2.5]),
    ('log', (1, 2)),
    ('dense', np.array([1.5], np.float32)),
    ('time', [1, 2]),
    ('time', [1.5, 2.5]),
    ('labels', [0, 1]),
    ('keys', ['u1', 'u2']),
    ('keys', [7, 8]),
  )
  def test_without_arrow(self, use, values):
    schema = schema_of(use)
    wanted = by_arrow(use, values, schema)
    with mock.patch.object(
      values_lib.columns_lib, 'from_mapping', side_effect=AssertionError
    ):
      self.assertEqual(outcome(use, values, schema), wanted)

  @parameterized.product(
    use=('index', 'hash', 'dense', 'log', 'time', 'labels', 'keys'),
    of=('int', 'float'),
  )
  def test_an_odd_one_among_many(self, use, of):
    schema = schema_of(use)
    rest = [1, 0, 1] * 40 if of == 'int' else [0.0, 1.0, 1.0] * 40
    for odd in ODD:
      for place in (0, 57, len(rest)):
        for kind in (list, tuple):
          values = kind([*rest[:place], odd, *rest[place:]])
          self.assertEqual(
            outcome(use, values, schema),
            by_arrow(use, values, schema),
            (odd, place),
          )

  def test_the_caller_s_array_is_not_kept(self):
    feature = Categorical('x', 10)
    schema = dataclasses.replace(schema_of('index'), item=(feature,))
    for dtype in (np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
      values = np.array([3, 9, 0]).astype(dtype)
      found = plain.encode(schema, {'x': values}, (feature,), 3, {})['x']
      self.assertEqual(found.dtype, np.int32)
      values[:] = 1
      self.assertEqual(found.tolist(), [3, 9, 0])

  @parameterized.parameters(*USES)
  def test_one_value_as_a_column(self, use):
    @given(
      st.one_of(*ITEMS) | st.sampled_from(ODD),
      st.sampled_from(TYPES),
      st.sampled_from([('',), (), ('NA', '7')]),
    )
    def check(value, types, null_values):
      schema = schema_of(use, types, null_values)

      def one(value):
        found = values_lib.encode_one(
          schema, {'x': value}, schema.item, SOURCE, KNOWN
        )
        return {k: np.array([x]) for k, x in found.items()}

      def column(value):
        return values_lib.encode(
          schema, {'x': [value]}, schema.item, 1, SOURCE, KNOWN
        )

      found = []
      for way in (one, column):
        try:
          (array,) = way(value).values()
          found.append((array.dtype, array.tobytes()))
        except Exception as error:
          found.append((type(error), str(error)))
      self.assertEqual(*found)

    check()

  def test_one_value_that_is_missing(self):
    schema = schema_of('index')
    with self.assertRaisesRegex(ValueError, "'x'"):
      values_lib.encode_one(schema, {'y': 1}, schema.item, SOURCE, KNOWN)

  def test_one_of_the_last_row(self):
    feature = Categorical('x', 10, out_of_vocabulary=True)
    schema = Schema('user', 'time', (feature,), (Task('click'),))
    for value, row in ((3, 3), (9, 9), (10, 9), (-1, 9)):
      found = plain.encode_one(schema, {'x': value}, (feature,), {})
      self.assertEqual(found['x'], row)

  def test_ids_out_of_the_vocabulary_have_the_last_row(self):
    feature = Categorical('item', 10, out_of_vocabulary=True)
    schema = Schema('user', 'time', (feature,), (Task('click'),))
    values = [0, 8, 9, 10, -1, 2**40]
    found = plain.encode(schema, {'item': values}, (feature,), len(values), {})
    self.assertEqual(found['item'].tolist(), [0, 8, 9, 9, 9, 9])

  def test_a_text_is_read_again(self):
    """Texts are kept by their value: another feature's size does not matter."""
    for size in (10, 1000):
      feature = Categorical('x', size, ids='hash')
      schema = dataclasses.replace(schema_of('hash'), item=(feature,))
      self.assertEqual(
        outcome('hash', ['abc'], schema), by_arrow('hash', ['abc'], schema)
      )


if __name__ == '__main__':
  absltest.main()
