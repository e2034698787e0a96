"""A log from files and memory, its splits, and what is refused."""

import dataclasses
import datetime
import fractions
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from absl.testing import absltest, parameterized
from hypothesis import given

from histjax import config as config_lib
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.data.splits import FractionSplit, TimeSplit
from histjax.schema import Categorical, Dense, Schema, Task
from tests.data import logs

DATA = {
  'uid': ['b', 'a', 'b', 'b'],
  'ts': [3, 1, 1, 1],
  'user_age': [2, 1, 2, 2],
  'item_id': [0, 1, 2, 3],
  'price': [1.0, 3.0, 5.0, 7.0],
  'stars': [5, 4, 3, 1],
  'click': [1, 0, 1, 0],
}


def with_value(name: str, value, row: int = 2) -> dict:
  return {**DATA, name: [*DATA[name][:row], value, *DATA[name][row + 1 :]]}


def load(data, schema=None, **kwargs) -> EventLog:
  return EventLog.from_columns(data, schema or logs.schema(), **kwargs)


class LogTest(parameterized.TestCase):
  def test_sorts_by_user_time_and_file_order(self):
    log = load(DATA, extra=['click'])
    self.assertEqual(log.keys.tolist(), ['a', 'b'])
    self.assertEqual(log.user.tolist(), [0, 1, 1, 1])
    self.assertEqual(log.time.tolist(), [1, 1, 1, 3])
    self.assertEqual(log.features['item'].tolist(), [1, 2, 3, 0])
    self.assertEqual(log.features['price'].tolist(), [1.0, 2.0, 3.0, 0.0])
    self.assertEqual(log.labels['liked'].tolist(), [1, 0, 0, 1])
    self.assertEqual(log.extra['click'].tolist(), [0, 1, 0, 1])
    self.assertEqual(log.offsets.tolist(), [0, 1, 4])
    self.assertEqual(log.key(3), 'b')
    self.assertLen(log, 4)

  def test_period(self):
    """What another unit makes of times can be seen."""
    data = {'uid': [1, 1], 'ts': [1_700_000_000, 1_700_086_400]}
    data |= {name: [1, 1] for name in ('user_age', 'item_id', 'price')}
    data |= {'stars': [1, 5], 'click': [0, 1]}
    log_schema = logs.schema()
    for unit, said in (
      (1.0, '2023-11-14T22:13:20.000 to 2023-11-15T22:13:20.000, if'),
      (1e-3, '1970-01-20T16:13:20.000 to 1970-01-20T16:14:46.400, if'),
    ):
      log = EventLog.from_columns(
        data, dataclasses.replace(log_schema, time_unit=unit)
      )
      self.assertIn(f'from ts 1700000000 to 1700086400: {said}', log.period)
    data['ts'] = ['2024-01-02', '2024-01-03T04:05:06.789']
    log = EventLog.from_columns(data, log_schema)
    self.assertEqual(
      log.period,
      'Events are from 2024-01-02T00:00:00.000 to 2024-01-03T04:05:06.789 '
      '(UTC)',
    )

  def test_with_tasks(self):
    log = load(DATA).with_tasks(['click'])
    self.assertEqual([t.name for t in log.schema.tasks], ['click'])
    self.assertEqual(list(log.labels), ['click'])
    with self.assertRaisesRegex(ValueError, "task 'clik' is none of"):
      log.with_tasks(['clik'])

  @parameterized.parameters(
    ([30, 4, 30, 30], [4, 30]),
    (['30', '4', '30', '30'], ['4', '30']),
    (['x', '30', '4', '030'], ['4', '30', '030', 'x']),
    ([2**63, 5, 2**63, 2**63], [5, 2**63]),
  )
  def test_user_keys(self, users, keys):
    users = np.array(users, np.uint64 if users[0] == 2**63 else None)
    log = load({**DATA, 'uid': users})
    self.assertEqual(log.keys.tolist(), keys)
    self.assertEqual(
      [log.key(i) for i in range(4)], [keys[u] for u in log.user]
    )
    self.assertIs(type(log.key(0)), type(keys[0]))

  @parameterized.parameters('order', 'strict')
  @given(data=logs.columns())
  def test_order_of_the_file_does_not_matter_but_for_ties(self, ties, data):
    data = {**data, 'ts': np.arange(len(data['ts']))}
    order = np.random.default_rng(0).permutation(len(data['ts']))
    first = load(data)
    second = load({name: v[order] for name, v in data.items()})
    for name in first.features:
      np.testing.assert_array_equal(first.features[name], second.features[name])
    np.testing.assert_array_equal(first.visible(ties), second.visible(ties))

  def test_log_scale(self):
    schema = Schema(
      user='uid',
      time='ts',
      item=(Dense('price', log=True, offset=1, scale=2),),
      tasks=(Task('click'),),
    )
    np.testing.assert_allclose(
      load(DATA, schema).features['price'],
      (np.log(1 + np.array([3.0, 5.0, 7.0, 1.0])) - 1) / 2,
      rtol=1e-6,
    )

  def test_whole_floats_and_booleans_are_ids_and_labels(self):
    data = {**DATA, 'stars': [5.0, 4.0, 3.0, 1.0], 'click': [True, False] * 2}
    log = load(data)
    self.assertEqual(log.features['stars'].tolist(), [4, 3, 1, 5])
    self.assertEqual(log.labels['click'].tolist(), [0, 1, 0, 1])

  def test_hashed_ids(self):
    schema = Schema(
      user='uid',
      time='ts',
      item=(Categorical('item', 1000, column='item_id', ids='hash'),),
      tasks=(Task('click'),),
    )
    numbers = load({**DATA, 'item_id': [7, -1, 10**15, 7]}, schema)
    strings = load({**DATA, 'item_id': ['7', '-1', str(10**15), '7']}, schema)
    np.testing.assert_array_equal(
      numbers.features['item'], strings.features['item']
    )
    names = load({**DATA, 'item_id': ['x', 'y', 'x', 'z']}, schema)
    item = names.features['item']
    self.assertEqual(item[1], item[3])  # Both of 'x'.
    self.assertLen(set(item.tolist()), 3)

  def test_dictionary_and_decimal_columns(self):
    data = {
      **DATA,
      'uid': pa.array(DATA['uid']).dictionary_encode(),
      'price': pa.array(DATA['price']).cast(pa.decimal128(8, 2)),
    }
    np.testing.assert_array_equal(
      load(data).features['price'], load(DATA).features['price']
    )


class TimeTest(parameterized.TestCase):
  SECONDS = (3, 1, 1, 1)

  @parameterized.parameters(
    pa.timestamp('s'),
    pa.timestamp('ms'),
    pa.timestamp('us'),
    pa.timestamp('ns'),
    pa.timestamp('ms', 'Europe/Berlin'),
  )
  def test_timestamps(self, kind):
    time = pa.array([s * 10**9 for s in self.SECONDS])
    time = time.cast(pa.timestamp('ns')).cast(kind, safe=False)
    log = load({**DATA, 'ts': time})
    self.assertTrue(log.is_timestamp)
    self.assertEqual(log.time.tolist(), [10**9] * 3 + [3 * 10**9])

  @parameterized.parameters(
    '1970-01-01T00:00:{:02d}', '1970-01-01T02:00:{:02d}+02:00'
  )
  def test_strings(self, form):
    log = load({**DATA, 'ts': [form.format(s) for s in self.SECONDS]})
    self.assertEqual(log.time.tolist(), [10**9] * 3 + [3 * 10**9])


class SplitTest(parameterized.TestCase):
  @parameterized.product(
    train=(0.8, 0.7, 0.1, 1 / 3), validation=(0.1, 0.2), n=(1, 9, 10, 20, 100)
  )
  def test_fractions(self, train, validation, n):
    data = {k: np.resize(v, n) for k, v in DATA.items()}
    data |= {'uid': np.zeros(n, int), 'ts': np.arange(n)}
    masks = FractionSplit(train, validation).masks(load(data))
    first = fractions.Fraction(str(train))
    second = first + fractions.Fraction(str(validation))
    self.assertEqual(masks['train'].sum(), (first * n).__floor__())
    self.assertEqual(
      masks['train'].sum() + masks['validation'].sum(),
      (second * n).__floor__(),
    )
    # In time order, and each event in one part.
    order = np.select(list(masks.values()), [0, 1, 2], -1)
    self.assertEqual(order.tolist(), sorted(order.tolist()))
    self.assertNotIn(-1, order)

  @parameterized.product(
    train=(2 / 3, 1 / 3, 0.00012345678901234567),
    validation=(1 / 6, 1 / 3),
    n=(1000, 3000, 60_000),
  )
  def test_fractions_of_many_digits_and_events(self, train, validation, n):
    # Two users, so that counts differ.
    user = np.repeat([1, 2], [n, n // 2])
    data = {k: np.resize(v, len(user)) for k, v in DATA.items()}
    data |= {'uid': user, 'ts': np.arange(len(user))}
    masks = FractionSplit(train, validation).masks(load(data))
    self.assertTrue((np.sum(list(masks.values()), axis=0) == 1).all())
    first = fractions.Fraction(repr(train))
    second = first + fractions.Fraction(repr(validation))
    for key, count in ((1, n), (2, n // 2)):
      sizes = [int(mask[user == key].sum()) for mask in masks.values()]
      ends = [0, *(math.floor(f * count) for f in (first, second)), count]
      self.assertEqual(sizes, np.diff(ends).tolist())

  def test_fractions_of_numpy(self):
    data = {k: np.resize(v, 10) for k, v in DATA.items()} | {'uid': [1] * 10}
    masks = FractionSplit(np.float64(0.8), np.float64(0.1)).masks(load(data))
    self.assertEqual([m.sum() for m in masks.values()], [8, 1, 1])

  def test_nine_tenths_of_ten_is_nine(self):
    # In floats 0.7 + 0.2 is below 0.9.
    data = {k: np.resize(v, 10) for k, v in DATA.items()} | {'uid': [1] * 10}
    masks = FractionSplit(0.7, 0.2).masks(load(data))
    self.assertEqual([m.sum() for m in masks.values()], [7, 2, 1])

  def test_times(self):
    masks = TimeSplit(2, 3).masks(load(DATA))
    self.assertEqual(
      {k: v.tolist() for k, v in masks.items()},
      {
        'train': [True, True, True, False],
        'validation': [False] * 4,
        'test': [False, False, False, True],
      },
    )

  @parameterized.parameters(
    ('1970-01-01T00:00:02', '1970-01-01T00:00:03'),
    ('1970-01-01T02:00:02+02:00', '1970-01-01 00:00:03'),
  )
  def test_moments(self, first, second):
    time = pa.array([3, 1, 1, 1], pa.timestamp('s'))
    masks = TimeSplit(first, second).masks(load({**DATA, 'ts': time}))
    self.assertEqual(masks['test'].tolist(), [False, False, False, True])
    self.assertEqual(masks['train'].sum(), 3)

  @parameterized.parameters(float, np.float64, int, np.int64)
  def test_whole_times_beyond_what_floats_hold(self, kind):
    first = 2**60
    data = {**DATA, 'ts': [first + 1, first - 1, first, first - 2]}
    log = load(data, dataclasses.replace(logs.schema(), time_unit=1e-9))
    masks = TimeSplit(kind(first), kind(first + 1024)).masks(log)
    self.assertEqual(log.time[masks['train']].tolist(), [first - 1, first - 2])
    split = TimeSplit(kind(0), kind(first))
    self.assertEqual(config_lib.to_dict(split)['test_start'], first)
    masks = split.masks(log)
    self.assertEqual(log.time[masks['test']].tolist(), [first, first + 1])

  def test_moments_to_the_nanosecond(self):
    times = pa.array([1, 123456500, 123456499, 2], pa.timestamp('ns'))
    splits = TimeSplit('1970-01-01', '1970-01-01T00:00:00.123456500')
    masks = splits.masks(load({**DATA, 'ts': times}))
    self.assertEqual(masks['test'].sum(), 1)

  @parameterized.parameters(
    '9999-12-31', '2300-01-01', '0001-01-01T00:00+02:00', '1500-01-01'
  )
  def test_moments_beyond_64_bits(self, moment):
    time = pa.array([3, 1, 1, 1], pa.timestamp('s'))
    for split, field in (
      (TimeSplit(moment, '2022-05-01'), 'validation_start'),
      (TimeSplit('2022-05-01', moment), 'test_start'),
    ):
      with self.assertRaisesRegex(ValueError, f'{field}=.*1678 and 2261'):
        split.masks(load({**DATA, 'ts': time}))

  def test_refused(self):
    for bad in (float('nan'), float('inf'), np.float64('nan')):
      with self.assertRaisesRegex(ValueError, 'train=(nan|inf) must be finite'):
        FractionSplit(bad, 0.1)
      with self.assertRaisesRegex(ValueError, 'validation=(nan|inf) must be'):
        FractionSplit(0.8, bad)
      with self.assertRaisesRegex(ValueError, 'test_start=(nan|inf) must be'):
        TimeSplit(2, bad).masks(load(DATA))
    with self.assertRaisesRegex(ValueError, 'train=0.8 and validation=0.3'):
      FractionSplit(0.8, 0.3)
    with self.assertRaisesRegex(ValueError, 'validation_start=3 is after'):
      TimeSplit(3, 2).masks(load(DATA))
    with self.assertRaisesRegex(ValueError, "'2022-05-01' is no number"):
      TimeSplit('2022-05-01', 5).masks(load(DATA))
    time = pa.array([3, 1, 1, 1], pa.timestamp('s'))
    stamped = load({**DATA, 'ts': time})
    with self.assertRaisesRegex(ValueError, 'test_start=5 is a number'):
      TimeSplit('2022-05-01', 5).masks(stamped)
    with self.assertRaisesRegex(ValueError, 'finer than a nanosecond'):
      TimeSplit('1970-01-01', '1970-01-01T00:00:00.0000000001').masks(stamped)
    with self.assertRaisesRegex(ValueError, "'May 1st' is no ISO 8601"):
      TimeSplit('May 1st', '2022-05-01').masks(stamped)
    with self.assertRaisesRegex(ValueError, 'datetime.*is no ISO 8601.*write'):
      TimeSplit(datetime.datetime(2022, 5, 1), '2023-05-01').masks(stamped)


class BadValueTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('negative_time', 'ts', -1, r"'ts'.*row 2 holds -1: a time must be >= 0"),
    ('null_time', 'ts', None, "'ts'.*row 2 has no value"),
    ('nan_time', 'ts', float('nan'), "'ts'.*row 2 holds nan.*finite"),
    ('null_user', 'uid', None, "'uid'.*row 2 has no value.*fill it in"),
    ('nan_dense', 'price', float('nan'), "'price'.*row 2 holds nan"),
    ('infinite_dense', 'price', float('inf'), "'price'.*row 2 holds inf"),
    ('null_dense', 'price', None, "'price'.*row 2 has no value"),
    ('huge_dense', 'price', 1e300, "'price'.*row 2 holds 1e\\+300.*scale"),
    (
      'id_too_large',
      'item_id',
      logs.SIZE,
      r"'item_id'.*row 2 holds 64: outside.*'item', \[0, 64\).*ids='hash'",
    ),
    ('negative_id', 'item_id', -3, "'item_id'.*row 2 holds -3: outside"),
    ('fractional_id', 'item_id', 1.5, "'item_id'.*row 2 holds 1.5.*whole"),
    ('label', 'click', 2, "'click'.*row 2 holds 2.*'click' is 0 or 1.*thresh"),
    ('nan_label', 'click', float('nan'), "'click'.*row 2 holds nan"),
    ('fraction_label', 'click', 0.5, "'click'.*row 2 holds 0.5"),
  )
  def test_value(self, name, value, message):
    with self.assertRaisesRegex(ValueError, message):
      load(with_value(name, value))

  @parameterized.named_parameters(
    ('string_id', 'item_id', list('abcd'), "'item_id'.*'a'.*ids='hash'"),
    ('string_dense', 'price', list('abcd'), "'price'.*'a'.*a number is needed"),
    ('string_time', 'ts', list('abcd'), "'ts'.*'a'.*ISO 8601"),
    ('mixed', 'price', [1, 'x', 2, 3], "'price'.*not a column of numbers"),
    ('dates', 'price', [datetime.date(2022, 1, 1)] * 4, 'a number is needed'),
    ('fraction_user', 'uid', [0.5] * 4, "'uid'.*0.5.*which is no key"),
    (
      'before_1970',
      'ts',
      [datetime.datetime(1969, 1, 1)] * 4,
      "'ts'.*1970 or later",
    ),
    ('short', 'price', [1.0], 'differ in length'),
    (
      'rounded_time',
      'ts',
      np.full(4, 1.7e9, np.float32),
      "'ts'.*row 0 holds 1700000000.0: float rounds .* above 16,777,216;.*64",
    ),
    ('far_future', 'ts', pa.array([2**40] * 4, pa.timestamp('s')), '2262'),
  )
  def test_column(self, name, values, message):
    with self.assertRaisesRegex(ValueError, message):
      load({**DATA, name: values})

  def test_unknown_column(self):
    data = {k: v for k, v in DATA.items() if k != 'item_id'} | {'item_ids': []}
    with self.assertRaisesRegex(
      ValueError, "'item_id' is not in .*'price'.*did you mean 'item_ids'"
    ):
      load(data)

  def test_negative_under_log(self):
    schema = Schema(
      user='uid',
      time='ts',
      item=(Dense('price', log=True),),
      tasks=(Task('click'),),
    )
    with self.assertRaisesRegex(ValueError, "'price'.*holds -2.0: log needs"):
      load(with_value('price', -2.0), schema)

  def test_no_events(self):
    with self.assertRaisesRegex(ValueError, 'has no events'):
      load({name: [] for name in DATA})

  def test_require_sorted(self):
    # User b goes from 3 back to 1 in the third row.
    with self.assertRaisesRegex(
      ValueError, "'ts'.*row 2 holds 1: earlier .* user 'b' further up"
    ):
      load(DATA, require_sorted=True)
    load({**DATA, 'ts': [1, 9, 1, 2]}, require_sorted=True)


@pytest.fixture
def write(tmp_path):
  def write_file(name, data=None):
    path = tmp_path / name
    table = pa.table({k: pa.array(v) for k, v in (data or DATA).items()})
    if name.endswith('.parquet'):
      pq.write_table(table, path)
    elif name.endswith('.gz'):
      with pa.CompressedOutputStream(str(path), 'gzip') as out:
        pa_csv.write_csv(table, out)
    else:
      pa_csv.write_csv(table, path)
    return str(path)

  return write_file


@pytest.mark.parametrize('name', ['log.parquet', 'log.csv', 'log.csv.gz'])
def test_formats_agree(write, name):
  log = EventLog.from_files([write(name)], logs.schema())
  wanted = load(DATA)
  for field in ('features', 'labels'):
    for key, values in getattr(wanted, field).items():
      np.testing.assert_array_equal(getattr(log, field)[key], values)
  assert log.keys.tolist() == wanted.keys.tolist()
  mask = np.ones(4, bool)
  assert len(make_rows(log, mask, RowConfig())) == 2


def test_parts_of_a_folder_in_order(write, tmp_path):
  write('a.csv', {k: v[:2] for k, v in DATA.items()})
  write('b.csv', {k: v[2:] for k, v in DATA.items()})
  write('_b.csv')
  (tmp_path / 'notes.txt').write_text('not a log')
  log = EventLog.from_files([str(tmp_path)], logs.schema())
  np.testing.assert_array_equal(
    log.features['item'], load(DATA).features['item']
  )


def test_message_names_file_and_row(write):
  first = write('a.csv')
  second = write('b.csv', with_value('click', 7, row=1))
  with pytest.raises(ValueError, match=r"'click': .*b\.csv row 1 holds 7"):
    EventLog.from_files([first, second], logs.schema())


def test_csv_timestamps(tmp_path):
  path = tmp_path / 'log.csv'
  path.write_text(
    'uid,ts,item_id,click,note\n'
    'x,2022-05-01 10:00:00,1,0,a\n'
    'x,2022-05-01 09:59:56,2,1,b\n'
  )
  schema = Schema(
    user='uid',
    time='ts',
    item=(Categorical('item_id', 4),),
    tasks=(Task('click'),),
  )
  log = EventLog.from_files([str(path)], schema)
  assert log.features['item_id'].tolist() == [2, 1]
  assert np.diff(log.time).tolist() == [4 * 10**9]


def test_bad_files(write, tmp_path):
  def message(*paths):
    with pytest.raises(ValueError) as error:
      EventLog.from_files(list(paths), logs.schema())
    return str(error.value)

  good = write('good.csv')
  assert 'missing.csv does not exist' in message(str(tmp_path / 'missing.csv'))
  assert 'paths is empty' in message()
  assert 'is given twice' in message(good, good)
  empty = tmp_path / 'empty.csv'
  empty.write_text('')
  assert 'empty.csv cannot be read as csv' in message(str(empty))
  header = tmp_path / 'header.csv'
  header.write_text(','.join(DATA) + '\n')
  assert 'header.csv holds no rows' in message(str(header))
  broken = tmp_path / 'broken.parquet'
  broken.write_bytes(b'PAR1 not really')
  assert 'broken.parquet cannot be read as parquet' in message(str(broken))
  other = tmp_path / 'log.json'
  other.write_text('{}')
  assert 'neither Parquet nor CSV' in message(str(other))
  ragged = tmp_path / 'ragged.csv'
  ragged.write_text(','.join(DATA) + '\n1,2\n')
  assert 'ragged.csv cannot be read as csv' in message(str(ragged))
  twice = tmp_path / 'twice.csv'
  twice.write_text('uid,' + ','.join(DATA) + '\n' + '1,' * 7 + '1\n')
  assert "'uid' occurs 2 times" in message(str(twice))
  renamed = write(
    'renamed.parquet',
    {('uids' if k == 'uid' else k): v for k, v in DATA.items()},
  )
  assert "did you mean 'uids'" in message(renamed)
  capital = write('capital.parquet', {k.upper(): x for k, x in DATA.items()})
  assert "did you mean 'UID'" in message(capital)
  (tmp_path / 'none').mkdir()
  assert 'none holds no' in message(str(tmp_path / 'none'))
  mixed = write('mixed.csv', {**DATA, 'ts': ['2022-05-01'] * 4})
  assert 'good.csv row 0 and on are numbers' in message(good, mixed)


if __name__ == '__main__':
  absltest.main()
