"""Shards hold what the files hold, and no more than they may at once."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from absl.testing import absltest
from pyarrow import parquet

from histjax.data import columns as columns_lib
from histjax.data import files, hashing, joins, parts, runs, shards, users
from histjax.data.rows import RowConfig
from histjax.features import FittedFeatures
from histjax.schema import Categorical, Schema, Task
from tests.serving import many_users

SCHEMA = Schema(
  'user',
  'time',
  item=(Categorical('item', 97),),
  action=(Categorical('clicked', 2),),
  tasks=(Task('click', column='clicked'),),
)
JOIN = joins.Join(SCHEMA, RowConfig(ties='strict'), FittedFeatures())


def write(folder, name, size, **columns):
  rng = np.random.default_rng(len(name))
  data = {
    'user': rng.integers(0, 9, size),
    'time': rng.integers(0, 20, size),
    'item': rng.integers(0, 97, size),
    'clicked': rng.integers(0, 2, size),
    **columns,
  }
  path = folder / f'{name}.parquet'
  parquet.write_table(pa.table(data), path)
  return str(path)


def prepare(folder, events, candidates, **limits):
  return shards.prepare(
    folder / 'work', JOIN, events, candidates, shards.Limits(**limits)
  )


def test_shards_hold_what_files_hold(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, '_MAX_ROWS', 1024)
  log = [write(tmp_path, f'log{i}', 3000) for i in range(2)]
  shown = write(
    tmp_path, 'shown', 2500, user=np.arange(2500) % 11, time=np.full(2500, 30)
  )
  data = prepare(tmp_path, log, [shown], users=4, memory=2.0**20)
  assert data.keys.tolist() == list(range(11))
  assert data.bounds.tolist() == [0, 4, 8, 11]
  assert (data.num_known, data.num_candidates) == (9, 2500)
  assert len(list((tmp_path / 'work').glob('log-*.arrow'))) > 1
  events = pa.concat_tables([parquet.read_table(p) for p in log])
  wanted = {
    'log': events.append_column('place', [np.arange(6000)]),
    'candidates': parquet.read_table(shown).append_column(
      'place', [np.arange(2500)]
    ),
  }
  for s, begin in enumerate(data.bounds[:-1]):
    shard = data.read(s)
    for name, found in (('log', shard.events), ('candidates', shard.shown)):
      table = wanted[name].to_pydict()
      rows = [
        i
        for i, user in enumerate(table['user'])
        if begin <= user < data.bounds[s + 1]
      ]
      if name == 'log':
        rows.sort(key=lambda i: (table['user'][i], table['time'][i]))
      else:
        assert found['row'].tolist() == rows
      take = {k: np.array(v)[rows] for k, v in table.items()}
      np.testing.assert_array_equal(found['user'] + begin, take['user'])
      np.testing.assert_array_equal(found['time'], take['time'])
      np.testing.assert_array_equal(found['feature/item'], take['item'])


def test_rows_are_named_by_their_files(tmp_path):
  log = write(tmp_path, 'log', 50)
  paths = [
    write(tmp_path, name, size, time=np.full(size, 30))
    for name, size in (('one', 3), ('two', 4))
  ]
  data = prepare(tmp_path, [log], paths)
  assert data.where(2) == f'{paths[0]} row 2'
  assert data.where(3) == f'{paths[1]} row 0'
  paths.append(write(tmp_path, 'bad', 3, time=np.array([30, 30, 0])))
  message = (
    r'bad\.parquet row 2 is earlier than .*, or set as_of=True \(--as_of\)'
  )
  with pytest.raises(ValueError, match=message):
    prepare(tmp_path, [log], paths)


def test_times_are_of_one_type(tmp_path):
  log = [
    write(tmp_path, 'log', 50),
    write(tmp_path, 'late', 50, time=np.arange(50) / 4),
  ]
  shown = write(tmp_path, 'shown', 50, time=np.full(50, 30))
  data = prepare(tmp_path, log, [shown], users=2)
  for s in range(len(data)):
    shard = data.read(s)
    assert shard.events['time'].dtype == np.float64
    assert shard.shown['time'].dtype == np.float64
  stamps = np.datetime64('2024-01-01', 'us') + np.arange(50)
  log.append(write(tmp_path, 'stamps', 50, time=stamps))
  with pytest.raises(ValueError, match=r'numbers in the log and timestamps in'):
    prepare(tmp_path, log, [shown])


def test_memory_is_bounded(tmp_path):
  """Of a log that would take ten times as much at once."""
  paths = many_users.write(tmp_path, num_users=1500, events=40, candidates=20)
  join = many_users.model().join
  limits = shards.Limits(2.0**21)
  tracemalloc.start()
  try:
    data = shards.prepare(tmp_path / 'work', join, *paths, limits)
    assert len(data) >= 10
    for s in range(len(data)):
      shard = data.read(s)
      joins.make_rows(
        join,
        shard.keys,
        shard.events,
        shard.shown,
        is_timestamp=shard.is_timestamp,
      )
      del shard
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < limits.memory
  whole = data.num_candidates + int(np.mean(data.lengths) * len(data.keys))
  assert whole * 60 > 2 * limits.memory


@pytest.mark.parametrize('memory', [0, float('nan'), float('inf')])
def test_memory_that_is_none(memory):
  with pytest.raises(ValueError, match=r'memory=.* at least 2.*and finite'):
    shards.Limits(memory)


def test_users_of_one_digest(tmp_path, monkeypatch):
  monkeypatch.setattr(hashing, 'digests', lambda keys: np.zeros(len(keys)))
  with pytest.raises(ValueError, match="user 'a' and another have the same"):
    users.Users(np.array(['a', 'b'], object))
  known = users.Users(np.array(['a'], object))
  table = pa.table({'user': ['b']})
  columns = parts.Columns((table,), ('here',), SCHEMA)
  with pytest.raises(ValueError, match="user 'a' and another have the same"):
    known.find(columns, 'user')


def test_users_are_found_across_types(tmp_path):
  known = users.Users(np.array(['-1', '7', '007', 'x'], object))
  columns = parts.Columns(
    (pa.table({'u': [7, 8, -1]}), pa.table({'u': ['x', '07', '007']})),
    ('one', 'two'),
    SCHEMA,
  )
  assert known.find(columns, 'u').tolist() == [1, -1, 0, 3, -1, 2]


def test_streams_are_what_is_read(tmp_path):
  log = [write(tmp_path, f'log{i}', 3000) for i in range(2)]
  csv = tmp_path / 'more.csv.gz'
  text = 'clicked,item,time,user\n' + ''.join(
    f'{i % 2},{i % 97},{i},"u{i % 7}{" " * 2000 * (i == 2)}"\n'
    for i in range(40_000)
  )
  with pa.output_stream(str(csv), compression='gzip') as stream:
    stream.write(text.encode())
  paths, names = [*log, str(csv)], ['user', 'time']
  told = []
  pieces = list(
    files.stream(
      paths, names, SCHEMA, max_rows=1000, tell=lambda *x: told.append(x)
    )
  )
  assert max(map(len, pieces)) <= 1000
  whole = files.read(paths, names, SCHEMA)
  assert sum(map(len, pieces)) == len(whole)
  row = 0
  for piece in pieces:
    assert piece.where(1) == whole.where(row + 1)
    row += len(piece)
  times = [columns_lib.raw(piece, 'time').astype(str) for piece in pieces]
  np.testing.assert_array_equal(
    np.concatenate(times), columns_lib.raw(whole, 'time').astype(str)
  )
  done, total = zip(*told, strict=True)
  assert list(done) == sorted(done) and done[-1] == total[0]
  assert set(total) == {sum((tmp_path / p).stat().st_size for p in paths)}


def test_a_stream_with_an_event_larger_than_a_block(tmp_path, monkeypatch):
  monkeypatch.setattr(files, '_BLOCK', 1000)
  path = tmp_path / 'log.csv'
  path.write_text(
    'user,time\n' + ''.join(f'{"x" * (i * 97 % 4000)},{i}\n' for i in range(99))
  )
  pieces = files.stream([str(path)], ['user', 'time'], SCHEMA, max_rows=3)
  found = [t for p in pieces for t in columns_lib.raw(p, 'time').tolist()]
  assert found == [str(i) for i in range(99)]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('user,time\n', 'holds no rows; name files with some'),
    ('user,time\n1,2\n"3,4\n5,6\n', 'every line must have a value'),
    ('user,item\n1,2\n', "column 'time' is not in"),
    ('time,user\n1,2\n3,"4\n5,6\n', "column 'user' begins with a quote that"),
  ],
)
def test_a_stream_that_cannot_be_read(tmp_path, text, message):
  path = tmp_path / 'log.csv'
  path.write_text(text)
  arguments = [str(path)], ['user', 'time'], SCHEMA
  with pytest.raises(ValueError, match=message):
    files.read(*arguments)
  with pytest.raises(ValueError, match=message):
    list(files.stream(*arguments))


def test_digests_are_of_contents(tmp_path):
  one, two = (write(tmp_path, name, 30) for name in ('abc', 'xyz'))
  other = write(tmp_path, 'other', 30)
  assert files.digest([one]) == files.digest([two])
  assert files.digest([one]) != files.digest([other])
  assert files.digest([one, other]) != files.digest([other, one])


def test_runs_without_rows(tmp_path):
  written = runs.Runs(tmp_path, 'log', np.array([0, 2]), 100)
  written.add({'user': np.zeros(0, np.int64), 'time': np.zeros(0)})
  written.close()
  found = runs.read_runs(tmp_path, 'log', 0)
  assert {n: (x.dtype, len(x)) for n, x in found.items()} == {
    'user': (np.int64, 0),
    'time': (np.float64, 0),
  }


if __name__ == '__main__':
  absltest.main()
