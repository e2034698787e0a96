"""What a column is read as, by what it is used for; what is refused."""

import datetime
import decimal
import re

import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import columns as columns_lib
from histjax.data import hashing
from histjax.data import values as values_lib
from histjax.schema import MAX_DENSE, Categorical, Dense, Schema, Task

SIZE = 2**31 - 1
HASHED = Categorical('item', SIZE, ids='hash')
INDEX = Categorical('item', 10)
# No surrogates, which no file can hold, and no empty text, which is missing.
texts = st.text(st.characters(exclude_categories=['Cs']), min_size=1)
integers = st.integers(-(2**63), 2**64 - 1)


def schema(**kwargs) -> Schema:
  feature = Categorical('hashed', SIZE, column='item', ids='hash')
  return Schema('user', 'time', item=(feature,), tasks=(Task('y'),), **kwargs)


def table(values, **kwargs) -> columns_lib.Columns:
  return columns_lib.from_mapping(
    {'item': values}, ['item'], 'memory', schema(**kwargs)
  )


def parts(*values, **kwargs) -> columns_lib.Columns:
  tables = [pa.table({'item': pa.array(v)}) for v in values]
  names = [f'part{i}' for i in range(len(tables))]
  return columns_lib.Columns(tuple(tables), tuple(names), schema(**kwargs))


def hashed(values, **kwargs) -> list[int]:
  return columns_lib.encode_categorical(
    table(values, **kwargs), HASHED
  ).tolist()


class KeyTest(parameterized.TestCase):
  @given(st.lists(integers, min_size=1, max_size=8))
  def test_an_integer_is_its_decimal_text(self, values):
    as_text = [str(v) for v in values]
    self.assertEqual(hashed(values), hashed(as_text))
    codes, keys = columns_lib.encode_keys(table(values), 'item')
    text_codes, text_keys = columns_lib.encode_keys(table(as_text), 'item')
    self.assertEqual(codes.tolist(), text_codes.tolist())
    self.assertEqual(
      columns_lib.canonical_keys(keys), columns_lib.canonical_keys(text_keys)
    )
    self.assertEqual([int(text_keys[c]) for c in text_codes], values)

  @given(st.lists(texts, min_size=1, max_size=8))
  def test_a_text_is_itself(self, values):
    codes, keys = columns_lib.encode_keys(table(values), 'item')
    self.assertEqual([keys[c] for c in codes], values)
    self.assertLen(keys, len(set(values)))
    self.assertEqual(
      hashed(values), hashing.hash_strings(values, SIZE).tolist()
    )

  def test_spellings_are_keys_of_their_own(self):
    spelled = ['7', '07', '007', '7.0', '+7', ' 7', '7 ', '-0', '0x7', '\u0667']
    spelled += ['NA', 'nan', 'NULL', 'None', 'true', '2022-05-01', '1e3']
    _, keys = columns_lib.encode_keys(table(spelled), 'item')
    self.assertEqual(set(keys), set(spelled))
    self.assertLen(set(hashed(spelled)), len(spelled))

  def test_order_is_of_numbers_then_texts(self):
    _, keys = columns_lib.encode_keys(
      table(['b', '10', '9', '007', '-1', 'a']), 'item'
    )
    self.assertEqual(keys.tolist(), ['-1', '9', '10', '007', 'a', 'b'])

  @parameterized.named_parameters(
    ('int32', pa.array([7, 10], pa.int32())),
    ('uint64', pa.array([7, 10], pa.uint64())),
    ('decimal', pa.array([7, 10], pa.decimal128(20, 0))),
    ('text', pa.array(['7', '10'])),
    ('dictionary', pa.array(['7', '10']).dictionary_encode()),
    ('bytes', pa.array([b'7', b'10'])),
    ('numpy_bytes', np.array([b'7', b'10'])),
    ('python_decimal', [decimal.Decimal(7), decimal.Decimal(10)]),
    ('view', pa.array(['7', '10'], pa.string_view())),
    ('generator', (k for k in ('7', '10'))),
  )
  def test_types_of_one_key(self, values):
    columns = table(values)
    codes, keys = columns_lib.encode_keys(columns, 'item')
    self.assertEqual(columns_lib.canonical_keys(keys), ['7', '10'])
    self.assertEqual(codes.tolist(), [0, 1])
    rows = columns_lib.encode_categorical(columns, HASHED)
    self.assertEqual(rows.tolist(), hashed([7, 10]))

  def test_parts_of_other_types_are_joined(self):
    columns = parts(
      pa.array([2**63, 7], pa.uint64()),
      ['guest', '7'],
      pa.array([-1], pa.int8()),
    )
    codes, keys = columns_lib.encode_keys(columns, 'item')
    self.assertEqual(keys.tolist(), ['-1', '7', str(2**63), 'guest'])
    self.assertEqual(codes.tolist(), [2, 1, 3, 1, 0])
    self.assertEqual(
      columns_lib.encode_categorical(columns, HASHED).tolist(),
      hashed([str(2**63), '7', 'guest', '7', '-1']),
    )
    whole = parts(pa.array([2**63], pa.uint64()), [-1])
    _, keys = columns_lib.encode_keys(whole, 'item')
    self.assertEqual(keys.tolist(), ['-1', str(2**63)])

  @parameterized.named_parameters(
    ('float', [7.0], "row 0 holds 7.0: of type double.*declare it 'integer'"),
    ('bool', [True], "holds True: of type bool.*declare it 'integer'"),
    ('date', [datetime.date(2022, 5, 1)], 'of type timestamp.*no key'),
    (
      'date_of_parquet',
      pa.array([datetime.date(2024, 1, 2)]),
      'of type date32.*look like dates or times.*write the column as the texts',
    ),
    (
      'time',
      pa.array([datetime.time(12, 30)]),
      'of type time64.*look like dates or times',
    ),
    ('list', [[7]], 'of type list'),
    ('decimal', [decimal.Decimal('7.5')], 'of type double'),
    ('null', [None, 'a'], r'row 0 has no value \(null\)'),
    ('pandas_nan', ['a', float('nan')], r'row 1 has no value \(null\)'),
    ('empty', ['a', ''], r"row 1 has no value \(''\).*Schema.null_values"),
    ('not_utf8', [b'a', b'\xff'], 'row 1 holds .*not UTF-8'),
    ('surrogate', ['a', '\ud800'], 'surrogates'),
    ('65_bits', [1, 2**64], 'row 1 holds 18446744073709551616.*64 bits'),
    ('mixed', [1, 'a'], 'row 0 holds 1, a int, and row 1 .a., a str'),
  )
  def test_refused(self, values, message):
    with self.assertRaisesRegex(ValueError, f"column 'item'.*{message}"):
      columns_lib.encode_keys(table(values), 'item')
    with self.assertRaisesRegex(ValueError, f"column 'item'.*{message}"):
      columns_lib.encode_categorical(table(values), HASHED)

  def test_what_is_missing_can_be_set(self):
    self.assertLen(hashed(['a', ''], null_values=()), 2)
    for word in ('NULL', 'NA'):
      with self.assertRaisesRegex(ValueError, f"no value .'{word}'"):
        hashed(['a', word], null_values=('', 'NULL', 'NA'))

  def test_declared_integers(self):
    kinds = {'column_types': {'item': 'integer'}}
    for values in (['007', '8'], [7.0, 8.0], [7, 8]):
      self.assertEqual(hashed(values, **kinds), hashed([7, 8]))
    self.assertEqual(hashed([True], **kinds), hashed([1]))
    self.assertEqual(hashed([str(2**64 - 1)], **kinds), hashed([2**64 - 1]))
    self.assertEqual(hashed([2.0**53 - 1], **kinds), hashed([2**53 - 1]))
    for bad in (['7', 'x'], [7.0, 7.5], [7.0, 2.0**53]):
      with self.assertRaisesRegex(ValueError, 'row 1 holds'):
        hashed(bad, **kinds)

  def test_declared_text(self):
    kinds = {'column_types': {'item': 'text'}}
    self.assertEqual(hashed([7, 8], **kinds), hashed(['7', '8']))
    with self.assertRaisesRegex(ValueError, 'declared a text'):
      hashed([7.0], **kinds)


class IndexTest(parameterized.TestCase):
  @parameterized.parameters(
    ([3, 4],),
    ([3.0, 4.0],),
    (['3', '004'],),
    (['3.0', '4e0'],),
    (pa.array([3, 4], pa.uint64()),),
  )
  def test_values(self, values):
    ids = columns_lib.encode_categorical(table(values), INDEX)
    self.assertEqual(ids.tolist(), [3, 4])
    self.assertEqual(ids.dtype, np.int32)

  def test_booleans(self):
    for values in ([True, False], ['true', 'False']):
      ids = columns_lib.encode_categorical(table(values), INDEX)
      self.assertEqual(ids.tolist(), [1, 0])

  @parameterized.parameters(
    ([1, 10], r'row 1 holds 10: outside.*\[0, 10\)'),
    ([1, 2**63], 'row 1 holds 9223372036854775808'),
    ([-1, 2**63], 'row 1 holds 9.22.*whole number'),
    ([1, 2**64 - 1], 'row 1 holds 18446744073709551615'),
    (['1', '18446744073709551615'], 'row 1 holds'),
    (['1', 'x'], "row 1 holds 'x'.*ids='hash'"),
    (['1', '0x1'], "row 1 holds '0x1'"),
    (['1', ' 1'], "row 1 holds ' 1'"),
    ([1.0, 1.5], 'row 1 holds 1.5: a whole number.*make quantities dense'),
    ([1.0, float('nan')], 'row 1 holds nan: it must be finite'),
    ([1.0, 1e300], r'row 1 holds 1e\+300: a whole number'),
    (['item', '1'], r"row 0 holds 'item' \(the header once more"),
  )
  def test_refused(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      columns_lib.encode_categorical(table(values), INDEX)

  @parameterized.parameters(
    [[0, 8, 9, 10, -1, 2**40]], [['0', '8', '9', '10', '-1', '1e6']]
  )
  def test_ids_out_of_the_vocabulary_have_the_last_row(self, values):
    feature = Categorical('item', 10, out_of_vocabulary=True)
    found = columns_lib.encode_categorical(table(values), feature)
    self.assertEqual(found.tolist(), [0, 8, 9, 9, 9, 9])
    self.assertEqual(found.dtype, np.int32)

  def test_row_of_a_later_part(self):
    with self.assertRaisesRegex(ValueError, 'part2 row 1 holds 1.5'):
      columns_lib.encode_categorical(parts([1], [2, 3], [4.0, 1.5]), INDEX)


class LabelTest(parameterized.TestCase):
  @parameterized.product(
    kind=(np.float16, np.float32, np.float64, str),
    threshold=(4.1, 0.7, 3.3),
  )
  def test_threshold_in_a_column_of_any_width(self, kind, threshold):
    task = Task('y', column='item', threshold=threshold)
    values = np.array([threshold - 0.1, threshold, threshold + 0.1], kind)
    for found in (
      columns_lib.encode_label(table(values), task),
      columns_lib.encode_label(parts([5], values, ['0']), task)[1:-1],
      values_lib.labels(
        Schema('user', 'time', item=(Dense('price'),), tasks=(task,)),
        {'item': values},
        3,
        'past',
      )['y'],
    ):
      self.assertEqual(found.tolist(), [0, 1, 1])

  def test_threshold_that_a_type_does_not_hold(self):
    task = Task('y', column='item', threshold=1e6)
    values = np.array([6e4, 1.0], np.float16)
    found = columns_lib.encode_label(table(values), task)
    self.assertEqual(found.tolist(), [0, 0])


class RoundedTest(parameterized.TestCase):
  @parameterized.parameters(
    (np.float16, 2**11), (np.float32, 2**24), (np.float64, 2**53)
  )
  def test_ids_that_floats_do_not_tell_apart(self, dtype, whole):
    feature = Categorical('item', SIZE, out_of_vocabulary=True)
    below = table(np.array([whole - 1], dtype))
    self.assertEqual(
      columns_lib.encode_categorical(below, feature).tolist(),
      [min(whole - 1, SIZE - 1)],
    )
    for value in (whole, -whole):
      with self.assertRaisesRegex(ValueError, "'item': memory row 1 holds"):
        found = table(np.array([0, value], dtype))
        columns_lib.encode_categorical(found, feature)
      with self.assertRaisesRegex(ValueError, "'item': memory row 1 holds"):
        hashed(np.array([0, value], dtype), column_types={'item': 'integer'})

  def test_says_why(self):
    with self.assertRaisesRegex(
      ValueError, 'float rounds numbers from 16,777,2'
    ):
      columns_lib.encode_categorical(
        table(np.array([2**24 + 1], np.float32)), Categorical('item', SIZE)
      )


class DecimalTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 6, 9)
  def test_as_the_text_of_it(self, scale):
    texts = [f'{k / 10:.1f}' for k in range(300)]
    found = columns_lib.numbers(
      table(pa.array(texts).cast(pa.decimal128(18, scale))), 'item'
    )
    np.testing.assert_array_equal(found, [float(text) for text in texts])

  def test_a_threshold_is_reached(self):
    for text in ('0.1', '4.4'):
      values = pa.array([text]).cast(pa.decimal128(18, 6))
      task = Task('item', threshold=float(text))
      found = columns_lib.encode_label(table(values), task)
      self.assertEqual(found.tolist(), [1.0])


class DenseTest(parameterized.TestCase):
  @parameterized.parameters(
    ([1, 2],),
    (['1', '2.0'],),
    (['1e0', '+2'],),
    ([decimal.Decimal('1.0'), decimal.Decimal('2.00')],),
    (np.array([1, 2], np.float16),),
  )
  def test_values(self, values):
    dense = columns_lib.encode_dense(table(values), Dense('item', scale=2.0))
    self.assertEqual(dense.tolist(), [0.5, 1.0])
    self.assertEqual(dense.dtype, np.float32)

  def test_parts_of_other_types(self):
    dense = columns_lib.encode_dense(
      parts([1], ['2.5'], [True], [0.5]), Dense('item')
    )
    self.assertEqual(dense.tolist(), [1, 2.5, 1, 0.5])

  @parameterized.parameters(
    ([1.0, 3e38], r'row 1 holds 3e\+38: too large.*raise its scale'),
    ([1.0, -1e39], r'row 1 holds -1e\+39: too large'),
    (['1', '1e39'], r'row 1 holds 1e\+39: too large'),
    (['1', '1e999'], 'row 1 holds inf: it must be finite'),
    (['1', 'nan'], 'row 1 holds nan: it must be finite'),
    (['1', 'NULL'], r"row 1 holds 'NULL' \(a missing value\? .*: a number is"),
    (['1', 'cheap'], "row 1 holds 'cheap': a number is needed"),
    (['1', 'x' * 10**6], 'row 1 holds .x{70,80}...: a number is needed'),
    (['true', '1'], r"row 0 holds 'true' \(true and .* others\): a number"),
    (['true', 'maybe'], "row 1 holds 'maybe': a number"),
    (['true', '1', 'x'], "row 2 holds 'x': a number"),
    (['1', ''], r"row 1 has no value \(''\).*before loading$"),
    ([[1.0], [2.0]], 'of type list'),
  )
  def test_refused(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      columns_lib.encode_dense(table(values), Dense('item'))

  def test_marks_are_no_quantities_under_log_either(self):
    feature = Dense('item', log=True)
    columns_lib.encode_dense(table([1e30]), feature)
    for mark in (3e38, 1e39, float(np.finfo(np.float32).max)):
      with self.assertRaisesRegex(ValueError, r'row 1 holds .*e\+3[89]: too l'):
        columns_lib.encode_dense(table([1.0, mark]), feature)

  @given(
    st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([MAX_DENSE, -MAX_DENSE])
    | st.sampled_from([1.0, -1.0]).map(
      lambda sign: sign * np.nextafter(MAX_DENSE, np.inf)
    )
  )
  def test_bound(self, value):
    def encode():
      return columns_lib.encode_dense(table([value]), Dense('item'))[0]

    if abs(value) <= MAX_DENSE:
      self.assertEqual(encode(), np.float32(value))
    else:
      with self.assertRaisesRegex(ValueError, 'too large'):
        encode()


class TimeUnitTest(parameterized.TestCase):
  @parameterized.parameters(
    (1_700_000_000_000, 1.0, 'milliseconds since 1970, set time_unit=0.001'),
    (1.7e15, 1.0, 'microseconds since 1970, set time_unit=1e-06'),
    (1_700_000_000_000_000, 1e-3, 'microseconds .* time_unit=1e-06'),
    (1_700_000_000_000_000_000, 1e-6, 'nanoseconds .* time_unit=1e-09'),
    (1_700_000_000, 60.0, 'seconds since 1970, set time_unit=1$'),
    (10**17, 1e-3, 'set time_unit to the seconds that a unit has'),
  )
  def test_another_unit(self, value, unit, message):
    read_as = schema(time_unit=unit)
    message = f"'time'.*row 1 holds {value}: .* years in units of .*{message}"
    for values in ([1, value], [str(1), str(value)]):
      columns = columns_lib.from_mapping(
        {'time': values}, ['time'], 'm', read_as
      )
      with self.assertRaisesRegex(ValueError, re.sub(r'\+', r'\\+', message)):
        columns_lib.encode_time(columns, 'time')
    with self.assertRaisesRegex(ValueError, 'years in units of'):  # A request.
      values_lib.times(read_as, {'time': [1, value]}, 2, True, 'events')

  @parameterized.parameters(
    (1_700_000_000, 1.0), (1_700_000_000_000, 1e-3), (1.7e18, 1e-9), (9.2e9, 1)
  )
  def test_the_unit(self, value, unit):
    columns = columns_lib.from_mapping(
      {'time': [value]}, ['time'], 'm', schema(time_unit=unit)
    )
    found, is_timestamp = columns_lib.encode_time(columns, 'time')
    self.assertEqual((found.tolist(), is_timestamp), ([value], False))

  def test_timestamps_know_theirs(self):
    columns = columns_lib.from_mapping(
      {'time': ['2024-01-02']}, ['time'], 'm', schema(time_unit=1e6)
    )
    self.assertTrue(columns_lib.encode_time(columns, 'time')[1])


class FromMappingTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('text', 'abc', "it is 'abc', one str; give a list"),
    ('scalar', 3.0, 'it is 3.0, one float; give a list'),
    ('numpy_scalar', np.float32(3), 'dimensions|give a list'),
    ('none', None, 'it is None, one NoneType'),
    ('dict', {'a': 1}, 'one dict; give a list'),
    ('set', {1, 2}, 'one set; give a list'),
    ('matrix', np.zeros((2, 2)), 'it has 2 dimensions'),
    ('complex', np.zeros(2, complex), 'not a column of numbers or strings'),
    ('objects', [object()], 'not a column of numbers or strings'),
  )
  def test_refused(self, values, message):
    with self.assertRaisesRegex(ValueError, f"'item' of memory: .*({message})"):
      table(values)

  @parameterized.parameters([[]], ['abc'], [None], [3])
  def test_no_table(self, columns):
    with self.assertRaisesRegex(ValueError, 'is no table; give {column'):
      columns_lib.from_mapping(columns, ['item'], 'memory', schema())

  def test_arrow_table_and_iterators(self):
    arrow = pa.table({'item': ['1', '2'], 'other': [1, 2]})
    for source in (arrow, {'item': iter(['1', '2'])}, {'item': range(1, 3)}):
      columns = columns_lib.from_mapping(source, ['item'], 'm', schema())
      self.assertEqual(columns_lib.numbers(columns, 'item').tolist(), [1, 2])

  def test_raw(self):
    self.assertEqual(columns_lib.raw(table([1, 2]), 'item').tolist(), [1, 2])
    mixed = columns_lib.raw(parts([1], ['x'], [2.5]), 'item')
    self.assertEqual(mixed.tolist(), ['1', 'x', '2.5'])
    self.assertEqual(columns_lib.raw(table(['a', '']), 'item')[1], '')
    with self.assertRaisesRegex(ValueError, 'row 1 has no value'):
      columns_lib.raw(table(['a', None]), 'item')


if __name__ == '__main__':
  absltest.main()
