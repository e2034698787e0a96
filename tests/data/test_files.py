"""Files and trees of files: what is read, what is told, what is refused."""

import bz2
import dataclasses
import gzip
import lzma
import unittest.mock

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from absl.testing import absltest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from histjax.data import columns as columns_lib
from histjax.data import files
from histjax.data.events import EventLog
from histjax.schema import Categorical, Schema, Task

SCHEMA = Schema(
  'user',
  'time',
  item=(Categorical('sku', 1000, ids='hash'),),
  context=(Categorical('land', 1000, ids='hash'),),
  tasks=(Task('y'),),
)
COLUMNS = ['user', 'time', 'sku', 'land', 'y']


def events(count=2, first=0):
  return {
    'user': ['a', 'b'] * (count // 2),
    'time': list(range(first, first + count)),
    'sku': ['007'] * count,
    'land': ['NA'] * count,
    'y': [0, 1] * (count // 2),
  }


def write(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.table(data)
  if path.suffix == '.csv':
    pa_csv.write_csv(table, path)
  else:
    pq.write_table(table, path)
  return path


def keys(path, column='user', schema=SCHEMA):
  table = files.read([str(path)], [column], schema)
  codes, found = columns_lib.encode_keys(table, column)
  return found[codes].tolist()


def text_file(folder, text, encoding='utf-8', name='log.csv'):
  path = folder / name
  path.write_bytes(text.encode(encoding))
  return path


def test_a_tree_is_read_whole(tmp_path):
  write(tmp_path / 'log/c.parquet', events(6, 100))
  write(tmp_path / 'log/day=1/a.parquet', events(2, 200))
  write(tmp_path / 'log/day=1/hour=3/a.csv', events(4, 300))
  write(tmp_path / 'log/more/x.parquet/part-0.parquet', events(8, 400))
  log = EventLog.from_files([str(tmp_path / 'log')], SCHEMA)
  assert len(log) == 20
  assert sorted(log.time.tolist()) == [
    *range(100, 106),
    *range(200, 202),
    *range(300, 304),
    *range(400, 408),
  ]


def test_columns_of_partitions(tmp_path):
  def part(folder, first):
    data = {k: v for k, v in events(2, first).items() if k != 'land'}
    write(tmp_path / folder / 'a.parquet', data)

  part('land=NA/day=01', 0)
  part('land=C%C3%B4te%20d%2FIvoire/day=1', 2)
  assert keys(tmp_path, 'land') == ['Côte d/Ivoire'] * 2 + ['NA'] * 2
  assert keys(tmp_path, 'day') == ['1', '1', '01', '01']
  log = EventLog.from_files([str(tmp_path)], SCHEMA)
  wanted = EventLog.from_columns(
    {**events(4), 'land': ['NA'] * 2 + ['Côte d/Ivoire'] * 2}, SCHEMA
  )
  for name in ('sku', 'land'):
    np.testing.assert_array_equal(log.features[name], wanted.features[name])
  part('land=__HIVE_DEFAULT_PARTITION__', 4)
  with pytest.raises(ValueError, match=r"'land'.*a.parquet row 0 has no value"):
    EventLog.from_files([str(tmp_path)], SCHEMA)


def test_digest_is_of_the_columns_of_folders(tmp_path):
  path = write(tmp_path / 'log' / 'day=1' / 'x.parquet', events())
  log, wanted = str(tmp_path / 'log'), [*COLUMNS, 'day']
  before = [files.digest([log], some) for some in (wanted, COLUMNS)]
  path.parent.rename(tmp_path / 'log' / 'day=2')
  after = [files.digest([log], some) for some in (wanted, COLUMNS)]
  assert after[0] != before[0]
  assert after[1] == before[1]
  (tmp_path / 'log' / 'day=2').rename(tmp_path / 'log' / 'user=7')
  assert files.digest([log], wanted) == before[1]  # It has its own.


def test_a_partition_gives_way_to_the_file_s_own_column(tmp_path):
  path = write(tmp_path / 'user=x/a.parquet', events())
  assert keys(path) == ['a', 'b']


def test_what_is_not_read_is_named(tmp_path):
  write(tmp_path / 'a.parquet', events())
  for name in ('_SUCCESS', '.a.parquet.crc', '_part.parquet', 'notes.txt'):
    (tmp_path / name).write_text('x')
  write(tmp_path / '_temporary/b.parquet', events())
  write(tmp_path / 'day=1/events.orc', events())
  with unittest.mock.patch.object(files.logging, 'warning') as warning:
    assert keys(tmp_path) == ['a', 'b']
  (call,) = warning.call_args_list
  said = call.args[0] % call.args[1:]
  assert 'day=1/events.orc, notes.txt' in said
  for name in ('SUCCESS', 'crc', '_part', 'temporary'):
    assert name not in said


def test_nothing_is_said_of_a_folder_that_is_read_whole(tmp_path):
  write(tmp_path / 'a.parquet', events())
  (tmp_path / '_SUCCESS').write_text('')
  with unittest.mock.patch.object(files.logging, 'warning') as warning:
    keys(tmp_path)
  warning.assert_not_called()


def test_a_partition_s_column_may_begin_with_an_underscore(tmp_path):
  write(tmp_path / '_day=1/a.parquet', events())
  assert keys(tmp_path, '_day') == ['1', '1']


def test_empty_parts(tmp_path):
  nothing = pa.table({name: pa.array([], pa.null()) for name in COLUMNS})
  pq.write_table(nothing, tmp_path / 'a.parquet')
  text_file(tmp_path, '', name='b.csv')
  text_file(tmp_path, ','.join(COLUMNS), name='c.csv')
  with pytest.raises(ValueError, match=r'a.parquet and 2 more holds no rows'):
    keys(tmp_path)
  write(tmp_path / 'd.parquet', events())
  assert keys(tmp_path) == ['a', 'b']
  table = files.read([str(tmp_path)], ['y'], SCHEMA)
  assert table.where(1).endswith('d.parquet row 1')


def test_an_empty_part_lacks_no_column(tmp_path):
  pq.write_table(
    pa.table({'users': pa.array([], 'int64')}), tmp_path / 'a.parquet'
  )
  write(tmp_path / 'b.parquet', events())
  with pytest.raises(ValueError, match=r"'user' is not in .*a\.parquet"):
    keys(tmp_path)


@pytest.mark.parametrize('path', ['', 'gs://bucket/log.parquet'])
def test_no_local_path(path):
  with pytest.raises(
    ValueError, match=f"paths has '{path}', which is no local"
  ):
    files.read([path], ['user'], SCHEMA)


def test_home(tmp_path, monkeypatch):
  write(tmp_path / 'a.parquet', events())
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(files.read(['~/a.parquet'], ['user'], SCHEMA)) == 2


def test_links(tmp_path):
  write(tmp_path / 'log/a.parquet', events())
  (tmp_path / 'log/b.parquet').symlink_to(tmp_path / 'log/a.parquet')
  with pytest.raises(ValueError, match=r'b\.parquet is given twice'):
    keys(tmp_path / 'log')
  (tmp_path / 'log/b.parquet').unlink()
  (tmp_path / 'log/loop').symlink_to(tmp_path / 'log')
  with pytest.raises(ValueError, match='loop links to a folder that it is in'):
    keys(tmp_path / 'log')


def test_values_of_csv_are_as_written(tmp_path):
  spelled = ['007', '07', '7', 'NA', 'nan', 'NULL', ' x', '2022-05-01', 'true']
  lines = ['user,time,sku', *(f'{s},1,NA' for s in spelled)]
  for end in ('\n', '\r\n'):
    for start in ('', '\ufeff'):
      path = text_file(tmp_path, start + end.join(lines) + end)
      assert keys(path) == spelled
      assert keys(path, 'sku') == ['NA'] * len(spelled)


@pytest.mark.parametrize('value', ['', '""'])
def test_empty_is_missing(tmp_path, value):
  path = text_file(tmp_path, f'user,time\na,1\n{value},2\n')
  with pytest.raises(
    ValueError, match=r"'user'.*csv row 1 has no value \(''\)"
  ):
    keys(path)
  schema = Schema('user', 'time', SCHEMA.item, SCHEMA.tasks, null_values=())
  assert keys(path, schema=schema) == ['a', '']


def test_newlines_in_quotes(tmp_path):
  note = 'a "quoted" line\n' * 200
  quoted = '"' + note.replace('"', '""') + '"'
  line = f'u,1,{quoted}\n'
  count = 700  # 2.3 MB; a block is 1 MiB.
  path = text_file(tmp_path, 'user,time,note\n' + line * count)
  assert keys(path, 'note') == [note] * count
  assert len(keys(path)) == count


def test_an_event_larger_than_a_block(tmp_path):
  note = 'x\n' * 1_200_000
  path = text_file(
    tmp_path, f'user,note,time\na,short,1\nb,"{note}",2\nc,short,3\n'
  )
  assert keys(path) == ['a', 'b', 'c']
  assert keys(path, 'note')[1] == note


@pytest.mark.parametrize('column', ['user', 'note'])
def test_a_quote_that_nothing_closes(tmp_path, column):
  path = text_file(tmp_path, 'user,note\na,x\nb,"y\nc,z\nd,z\n')
  with pytest.raises(ValueError, match=r"csv row 1.*'note'.*nothing closes"):
    keys(path, column)
  path = text_file(tmp_path, 'user,note\na,x\nb,"y\nc"\n')
  assert len(keys(path, column)) == 2


@pytest.mark.parametrize('block', [2**20, 7])
@pytest.mark.parametrize(
  ('text', 'lines'),
  [
    ('u,t,note\na,1,"x\nb,2,y\nc,3,"z"\n', (2, 4)),  # At the end,
    ('u,t,note\na,1,"x"\nb,2,"y\nc,3,"z"\nd,4,z\n', (3, 4)),  # in between,
    ('u,note,t\na,"x,1\nb,"y",2\nc,"z",3\n', (2, 3)),  # in no last column.
    ('u,t,note\na,1,"x ""\nb,2,y\nc,3,"z"', (2, 4)),
  ],
)
def test_a_quote_that_the_next_one_closes(
  tmp_path, monkeypatch, text, lines, block
):
  path = text_file(tmp_path, text)
  begun, closed = lines
  message = rf'csv line {begun}: .*nothing closes before line {closed}'
  monkeypatch.setattr(files, '_SCAN', block)
  for read in (
    lambda: keys(path, 'u'),
    lambda: list(files.stream([str(path)], ['u'], SCHEMA, max_rows=1)),
  ):
    with pytest.raises(ValueError, match=message):
      read()


@pytest.mark.parametrize(
  'text',
  [
    'u,note\na,"x\n""y"""\nb,"x\n"\nc,"""\n"',
    'u,note\na,5" and 6"\n\nb, "x\nc,"\n"\n',  # Quotes within texts.
    'u,note\r\na,"x\r\ny"\r\n\r\nb,"x"y\r\nc,"z" \r\n',
  ],
)
def test_quotes_that_are_closed(tmp_path, text):
  assert keys(text_file(tmp_path, text), 'u') == ['a', 'b', 'c']


@pytest.mark.parametrize('ending', ['csv', 'csv.gz', 'csv.bz2', 'csv.zst'])
@pytest.mark.parametrize('note', ['', 'a longer note ' * 9])
@pytest.mark.parametrize('count', [3, 200_000])
def test_number_of_rows_is_guessed(tmp_path, ending, note, count):
  path = tmp_path / f'log.{ending}'
  data = 'u,t\n' + ''.join(f'{i % 997},{note}{i % 31}\n' for i in range(count))
  with pa.output_stream(str(path), 'detect') as stream:
    stream.write(data.encode())
  guess = files.num_rows([path])
  assert 0.75 * count <= guess <= 1.5 * count + 2


def test_other_encodings_are_named(tmp_path):
  for text, where in (
    ('user,time\né,1\n', "line 2: 'é,1'"),
    ('user,é\nx,1\n', "line 1: 'user,é'"),
    ('user,time\n' + 'x,1\n' * 400_000 + 'é,1\n', "line 400002: 'é,1'"),
  ):
    path = text_file(tmp_path, text, 'latin-1')
    message = rf'not in UTF-8 \({where}\?\); convert it, as by .iconv'
    with pytest.raises(ValueError, match=message):
      keys(path)


@pytest.mark.parametrize('mark', [True, False])
@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32'])
@pytest.mark.parametrize('order', ['le', 'be'])
def test_wide_encodings_are_named(tmp_path, encoding, order, mark):
  """As Excel and PowerShell write, with a byte order mark or without one."""
  text = '\ufeff' * mark + 'user,time\na,1\n'
  path = text_file(tmp_path, text, f'{encoding}-{order}')
  said = encoding.upper() if mark else f'{encoding}{order}'.upper()
  with pytest.raises(ValueError, match=rf'is in {said}, not in UTF-8; .*iconv'):
    keys(path)
  assert keys(text_file(tmp_path, '\ufeffuser,time\na,1\n', 'utf-8')) == ['a']


def test_texts_that_look_like_something_else_are_ids(tmp_path):
  """Each is its own user and its own item, in CSV as in Parquet."""
  texts = ['2024-01-02', '12:30', '1e5', '100000', 'NaN', 'nan', 'NULL', 'None']
  texts += ['007', '7', 'true', 'inf', '0x1F', '1_000', '-', 'N/A', '1.0']
  log_schema = dataclasses.replace(SCHEMA, null_values=('',))
  lines = ''.join(f'{text},{text},1\n' for text in texts)
  table = files.read(
    [str(text_file(tmp_path, f'user,sku,time\n{lines}'))],
    ['user', 'sku', 'time'],
    log_schema,
  )
  codes, found = columns_lib.encode_keys(table, 'user')
  assert [str(found[code]) for code in codes] == texts
  pq.write_table(pa.table({'user': texts}), tmp_path / 'a.parquet')
  other = files.read([str(tmp_path / 'a.parquet')], ['user'], log_schema)
  assert columns_lib.encode_keys(other, 'user')[1].tolist() == found.tolist()
  item = Categorical('sku', 2**31 - 1, ids='hash')
  assert len(set(columns_lib.digest_ids(table, item).tolist())) == len(texts)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('user;time\na;1\n', r"header 'user;time' is one column; separate"),
    ('user,time,user\na,1,b\n', r"'user' occurs 2 times in"),
    ('\n\n', 'cannot be read as csv: Empty'),
    ('user,time\na\n', 'cannot be read as csv.*a value for every column'),
  ],
)
def test_refused(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    keys(text_file(tmp_path, text))


PACKED = {
  'gzip; end its name in .csv.gz': gzip.compress,
  'bzip2; end its name in .csv.bz2': bz2.compress,
  'Zstandard; end its name in .csv.zst': lambda text: pa.compress(
    text, 'zstd', asbytes=True
  ),
  'xz; unpack it': lzma.compress,
}


@pytest.mark.parametrize('message', PACKED)
def test_packed_and_named_csv(tmp_path, message):
  path = tmp_path / 'log.csv'
  path.write_bytes(PACKED[message](b'user,time\na,1\n'))
  with pytest.raises(ValueError, match=f'no text of CSV, but {message}'):
    keys(path)


def test_one_format_named_as_another(tmp_path):
  text_file(tmp_path, 'user,time\na,1\n', name='log.parquet')
  with pytest.raises(ValueError, match='a text; if it is CSV, end its name in'):
    keys(tmp_path / 'log.parquet')
  write(tmp_path / 'a.parquet', events()).rename(tmp_path / 'a.csv')
  with pytest.raises(ValueError, match=r'Parquet; end its name in \.parquet'):
    keys(tmp_path / 'a.csv')
  # A column may be called so.
  assert keys(text_file(tmp_path, 'PAR1,BZh,user\n1,2,a\n')) == ['a']


@pytest.mark.parametrize(
  ('labels', 'threshold', 'message'),
  [
    (['yes', 'no'], None, "holds 'yes'.*'y' must be 0 or 1 .or true or false"),
    (['good', '3'], 3.0, "holds 'good'.*'y' must be a number"),
    ([-1, 1], None, "row 0 holds -1.*'y' is 0 or 1; fix it, or set the thres"),
    ([5, 1], None, "row 0 holds 5.*'y' is 0 or 1; fix it, or set the thres"),
  ],
)
def test_labels_that_are_actions_too(tmp_path, labels, threshold, message):
  """What is wrong is said of the label, and not of the action's table."""
  schema = dataclasses.replace(
    SCHEMA,
    action=(Categorical('did', 2, column='y'),),
    tasks=(Task('y', threshold=threshold),),
  )
  path = write(tmp_path / 'a.csv', events() | {'y': labels})
  with pytest.raises(ValueError, match=message):
    EventLog.from_files([str(path)], schema)


def test_a_header_in_the_middle(tmp_path):
  path = text_file(
    tmp_path, 'user,time,sku,land,y\na,1,x,NA,0\nuser,time,sku,land,y\n'
  )
  with pytest.raises(ValueError, match=r"row 1 holds '(time|y)' \(the header"):
    EventLog.from_files([str(path)], SCHEMA)


def test_a_column_twice_that_is_not_read(tmp_path):
  path = text_file(tmp_path, 'user,note,note\na,1,2\n')
  assert keys(path) == ['a']


def test_parquet_and_csv_together(tmp_path):
  """Integers and timestamps of the one, texts of the other, are one log."""
  data = {
    'user': [7, 8],
    'time': pa.array([10**12, 2 * 10**12], pa.timestamp('us', 'Asia/Tokyo')),
    'sku': [1, 2**53],
    'land': ['NA', 'DE'],
    'y': [True, False],
  }
  write(tmp_path / 'a.parquet', data)
  text_file(
    tmp_path,
    'land,user,time,y,sku\n'
    'NA,7,1970-01-12T13:46:40Z,1,1\n'
    'DE,8,1970-01-24T03:33:20,0,9007199254740992\n'
    'DE,guest,1970-01-24T03:33:20,0,1\n',
    name='b.csv',
  )
  log = EventLog.from_files([str(tmp_path)], SCHEMA, extra=['sku'])
  assert log.keys.tolist() == ['7', '8', 'guest']
  assert log.user.tolist() == [0, 0, 1, 1, 2]
  assert log.is_timestamp
  for values in (*log.features.values(), *log.labels.values(), log.time):
    assert values[0] == values[1]
    assert values[2] == values[3]
  assert log.extra['sku'].tolist()[-1] == '1'


KEYS = st.one_of(
  st.integers(-(2**63), 2**64 - 1).map(str),
  st.text(
    st.characters(exclude_categories=['Cs']),
    min_size=1,
    max_size=6,
  ),
  st.sampled_from(['007', '07', '7', 'NA', 'nan', 'NULL', '7.0', '1e3', '"']),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  rows=st.lists(st.tuples(KEYS, KEYS, KEYS), min_size=1, max_size=8),
)
def test_csv_and_parquet_of_the_same_texts_are_equal(tmp_path, rows):
  user, sku, land = zip(*rows, strict=True)
  data = {
    'user': list(user),
    'sku': list(sku),
    'land': list(land),
    'time': [str(10 * i) for i in range(len(rows))],
    'y': [str(i % 2) for i in range(len(rows))],
  }
  first = EventLog.from_files([str(write(tmp_path / 'a.csv', data))], SCHEMA)
  second = EventLog.from_files(
    [str(write(tmp_path / 'a.parquet', data))], SCHEMA
  )
  third = EventLog.from_columns(data, SCHEMA)
  for log in (second, third):
    assert log.keys.tolist() == first.keys.tolist()
    for field in ('user', 'time'):
      np.testing.assert_array_equal(getattr(log, field), getattr(first, field))
    for field in ('features', 'labels'):
      for name, values in getattr(log, field).items():
        np.testing.assert_array_equal(values, getattr(first, field)[name])


def test_undeclared_column(tmp_path):
  schema = Schema(
    'user', 'time', SCHEMA.item, SCHEMA.tasks, column_types={'usr': 'integer'}
  )
  path = write(tmp_path / 'a.parquet', events())
  with pytest.raises(ValueError, match=r"'usr', a column.*mean 'user'"):
    EventLog.from_files([str(path)], schema)


def test_patterns(tmp_path):
  write(tmp_path / 'a.parquet', events())
  with pytest.raises(ValueError, match='patterns are not expanded: name files'):
    files.read([str(tmp_path / '*.parquet')], ['user'], SCHEMA)


def test_one_path_is_a_list_of_one(tmp_path):
  path = write(tmp_path / 'a.csv', events())
  assert len(files.read(str(path), ['user'], SCHEMA)) == 2


if __name__ == '__main__':
  absltest.main()
