"""A log and candidates, larger than memory, cut by user into shards on disk.

Files are read a piece at a time. First the column of users alone, so that
shards can be cut by what they will hold; then all columns, which are checked,
encoded and written as runs: Arrow files of one batch a shard. So a bad value is
found before anything is scored, and to read a shard is to read a batch a run.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from histjax.data import atomic, files
from histjax.data import columns as columns_lib
from histjax.data.joins import KEEP, Join, Table
from histjax.data.parts import Columns, MissingColumnError
from histjax.data.runs import Runs, read_runs
from histjax.data.users import Users
from histjax.schema import Schema

PLAN = 'plan.json'
_USERS = 'users.arrow'
_COPIES = 4
"""Of a shard's rows, at most, that reading, sorting and deriving hold."""

_HEAD = 1024
"""Rows of each file that are read before all others."""

_TEXT = 32
"""Bytes of a key that is kept, about."""

_MAX_ROWS = 2**17
"""Of a file, read at once."""

Tell = Callable[[str, int, int], None]
"""Is told, while files are read, of which, and how many bytes of how many."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """How large a shard may be.

  Attributes:
    memory: bytes that a shard's rows may take while they are scored, beside
      the model and its batches.
    users: of a shard, at most; None: as many as `memory` lets it have.
  """

  memory: float = 2.0**31
  users: int | None = None

  def __post_init__(self):
    if not 2**20 <= self.memory < math.inf:
      raise ValueError(
        f'memory={self.memory:.0f} bytes ({self.memory / 2**30:g} GiB) must be '
        'at least 2**20, and finite; give --memory=0.001 or more'
      )
    if self.users is not None and self.users < 1:
      raise ValueError(f'users_per_shard={self.users} must be >= 1, or None')


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
  """Some users, their events and their candidates.

  Attributes:
    keys: `[users]`, in order.
    events: `Table.encode` of the log's, with 'user', an index into `keys`;
      sorted by user, then time, then the log's order.
    shown: likewise of the candidates, in their order, and 'row', int64 `[c]`,
      the row of each in the files, one after the other.
    is_timestamp: whether times are timestamps.
  """

  keys: np.ndarray
  events: Mapping[str, np.ndarray]
  shown: Mapping[str, np.ndarray]
  is_timestamp: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
  """What `prepare` wrote.

  Attributes:
    folder: where.
    keys: `[users]` of the candidates, in the order of the output.
    bounds: int64 `[shards + 1]`: shard s has the users `bounds[s:s + 2]`.
    num_known: how many users are in the log.
    num_candidates: rows of candidates.
    lengths: quantiles of the users' numbers of events, least and most included.
    counts: likewise of their candidates.
    is_timestamp: whether times are timestamps.
    time_type: of times.
    sources: the first row of each file of candidates, and its name.
    kept: `{column: Arrow's type}` of `joins.Join.keep`, the same in all shards.
  """

  folder: pathlib.Path
  keys: np.ndarray
  bounds: np.ndarray
  num_known: int
  num_candidates: int
  lengths: np.ndarray
  counts: np.ndarray
  is_timestamp: bool
  time_type: str
  sources: list[tuple[int, str]]
  kept: dict[str, str]

  def __len__(self) -> int:
    return len(self.bounds) - 1

  @classmethod
  def load(cls, folder: pathlib.Path) -> Shards:
    """Reads what `prepare` wrote there.

    Raises:
      FileNotFoundError: it was not, or not to the end.
    """
    plan = json.loads((folder / PLAN).read_text())
    with pa.memory_map(str(folder / _USERS)) as source:
      keys = pa.ipc.open_file(source).read_all()['user']
      values = np.array(keys.to_numpy())
    if not pa.types.is_integer(keys.type):
      values = values.astype(object)
    for name in ('bounds', 'lengths', 'counts'):
      plan[name] = np.array(plan[name], np.int64)
    return cls(folder=folder, keys=values, **plan)

  def where(self, row: int) -> str:
    """A row of the candidates for people: its file and the row in that."""
    place = bisect.bisect_right(self.sources, row, key=lambda s: s[0]) - 1
    start, name = self.sources[place]
    return f'{name} row {row - start}'

  def read(self, shard: int) -> Shard:
    """One shard."""
    begin, end = self.bounds[shard], self.bounds[shard + 1]
    events, shown = (
      read_runs(self.folder, name, shard) for name in ('log', 'candidates')
    )
    for rows in (events, shown):
      rows['user'] = rows['user'] - begin
      if 'time' in rows:
        rows['time'] = rows['time'].astype(self.time_type, copy=False)
    order = np.lexsort((events['time'], events['user']))
    return Shard(
      self.keys[begin:end],
      {name: values[order] for name, values in events.items()},
      shown,
      self.is_timestamp,
    )


def check(join: Join, events: Sequence[str], candidates: Sequence[str]) -> None:
  """Reads the first rows of each file: its columns, and what they hold.

  Args:
    join: what is read of both.
    events: files of the log.
    candidates: files of candidates.

  Raises:
    ValueError: a column is missing, or a value there is bad.
  """
  for field, table, paths in (
    ('--candidates', join.candidates_table, candidates),
    ('--events', join.log_table, events),
  ):
    for path in files.with_header(paths, field):
      head = files.stream(
        [str(path)], table.columns, join.schema, max_rows=_HEAD
      )
      try:
        table.encode(next(head))
      except files.NoEvents:
        pass
      except MissingColumnError as error:
        use = table.use(error.column)
        if use == 'the time' and field == '--candidates':
          use += ", which a derived feature, ties='strict' or --as_of needs"
        raise ValueError(f'{field}: {error}. It is {use}; give it') from error


def prepare(
  folder: pathlib.Path,
  join: Join,
  events: Sequence[str],
  candidates: Sequence[str],
  limits: Limits,
  *,
  allow_new_users: bool = False,
  tell: Tell = lambda what, done, total: None,
) -> Shards:
  """Cuts a log and candidates into shards.

  Beside a shard's memory it takes about 100 bytes for each distinct user of
  the candidates, and their keys; and what is stored of a row group.

  Args:
    folder: to write to; what is in it is deleted.
    join: what is read of both.
    events: files of the log.
    candidates: files of candidates.
    limits: how large shards may be.
    allow_new_users: even if no user at all is in the log.
    tell: of progress.

  Raises:
    ValueError: a file or a value in it is bad, no user is in the log, one is
      larger than a shard may be, or a candidate is earlier than its user's last
      event.
  """
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  schema = join.schema
  max_rows = _piece(join, limits)
  users = Users.of_files(
    candidates,
    schema,
    functools.partial(tell, 'users of the candidates'),
    max_rows,
  )
  counted = [
    _count(users, paths, schema, functools.partial(tell, what), max_rows)
    for what, paths in (
      ('candidates of each user', candidates),
      ('events of each user', events),
    )
  ]
  counts, lengths = counted
  if not allow_new_users and not lengths.any():
    raise _no_user_is_known(users, events, schema)
  bounds = _bounds(join, users, lengths, counts, limits)
  pass_ = _Pass(folder, join, users, bounds, limits)
  pass_.read('log', join.log_table, events, tell)
  pass_.read('candidates', join.candidates_table, candidates, tell)
  _write_plan(folder, users, bounds, lengths, counts, pass_)
  return Shards.load(folder)


def _write_plan(
  folder: pathlib.Path, users: Users, bounds, lengths, counts, pass_: _Pass
) -> None:
  keys = pa.array(users.keys)
  path = folder / _USERS
  schema = pa.schema([('user', keys.type)])
  with atomic.named(path), pa.ipc.new_file(path, schema) as writer:
    writer.write_table(pa.table({'user': keys}))
  quantiles = np.linspace(0, len(users) - 1, min(len(users), 1000)).astype(int)
  plan = {
    'bounds': bounds.tolist(),
    'num_known': int((lengths > 0).sum()),
    'num_candidates': int(counts.sum()),
    'lengths': np.sort(lengths)[quantiles].tolist(),
    'counts': np.sort(counts)[quantiles].tolist(),
    'is_timestamp': pass_.kinds.get('the log', False),
    'time_type': np.result_type(*pass_.time_types).str,
    'sources': pass_.sources,
    'kept': {
      name: kinds.copy().pop() if len(kinds) == 1 else 'large_string'
      for name, kinds in pass_.kept.items()
    },
  }
  atomic.write_json(folder / PLAN, plan)


class _Pass:
  """Encodes files into runs, and checks how candidates follow the log."""

  def __init__(self, folder, join: Join, users: Users, bounds, limits: Limits):
    self.kinds: dict[str, bool] = {}
    fitted = join.features.is_timestamp
    if fitted is not None:
      self.kinds['the training log'] = fitted
    self.time_types: set[np.dtype] = set()
    self.sources: list[tuple[int, str]] = []
    self.kept: dict[str, set[str]] = {name: set() for name in join.keep}
    self._folder, self._join, self._users = folder, join, users
    self._bounds, self._max_bytes = bounds, int(limits.memory / 16)
    self._max_rows = _piece(join, limits)
    self._last: np.ndarray | None = None

  def read(self, name: str, table: Table, paths, tell: Tell) -> None:
    runs = Runs(self._folder, name, self._bounds, self._max_bytes)
    schema, first = self._join.schema, 0
    for columns in files.stream(
      paths,
      table.columns,
      schema,
      max_rows=self._max_rows,
      tell=functools.partial(tell, f'values of the {name}'),
    ):
      user = self._users.find(columns, schema.user)
      arrays, is_timestamp = table.encode(columns)
      if 'time' in arrays:
        self.time_types.add(arrays['time'].dtype)
        self._check_clock(name, columns, is_timestamp)
      rows = {'user': user, **arrays}
      if name == 'log':
        keep = user >= 0
        rows = {n: values[keep] for n, values in rows.items()}
        self._remember(rows)
      else:
        rows['row'] = first + np.arange(len(columns))
        if columns.first[0] == 0:
          self.sources.append((first, columns.sources[0]))
        first += len(columns)
        for name, kinds in self.kept.items():
          kinds.add(str(pa.array(arrays[f'{KEEP}{name}']).type))
        self._check_order(columns, rows)
      runs.add(rows)
    runs.close()

  def _check_clock(self, name: str, columns: Columns, is_timestamp: bool):
    """All of one kind, within a table and between the two."""
    kinds = {**self.kinds, f'the {name}': is_timestamp}
    if self.kinds.get(f'the {name}', is_timestamp) != is_timestamp:
      kinds = {**self.kinds, columns.where(0): is_timestamp}
    columns_lib.check_clocks(self._join.schema.time, kinds)
    self.kinds[f'the {name}'] = is_timestamp

  def _remember(self, rows) -> None:
    """The time of each user's last event."""
    time = rows['time']
    if self._last is None:
      self._last = np.full(len(self._users), -1, time.dtype)
    if self._last.dtype != time.dtype:
      self._last = self._last.astype(np.float64)
    np.maximum.at(self._last, rows['user'], time)

  def _check_order(self, columns: Columns, rows) -> None:
    if self._join.as_of or 'time' not in rows or self._last is None:
      return
    early = np.flatnonzero(rows['time'] < self._last[rows['user']])
    if early.size:
      user = self._users.keys[rows['user'][early[0]]]
      strict = self._join.config.ties == 'strict'
      also = ', or set as_of=True (--as_of)' if strict else ''
      raise ValueError(
        f'user {str(user)!r}: column {self._join.schema.time!r}: the candidate '
        f"of {columns.where(int(early[0]))} is earlier than the user's last "
        f'event in the log; drop the events after it{also}'
      )


def _count(users: Users, paths, schema: Schema, tell, max_rows) -> np.ndarray:
  """int64 `[users]`, how many rows each has."""
  total = np.zeros(len(users), np.int64)
  for columns in files.stream(
    paths, [schema.user], schema, max_rows=max_rows, tell=tell
  ):
    user = users.find(columns, schema.user)
    total += np.bincount(user[user >= 0], minlength=len(users))
  return total


def _width(join: Join, table: Table) -> int:
  """Bytes of a row of a shard: its codes, offsets and values."""
  width = 48 + 4 * (len(table.features) + len(join.features.derived) + 4)
  return width + _TEXT * len(table.keep)


def _piece(join: Join, limits: Limits) -> int:
  """Rows of a file that are read at once."""
  width = max(
    _width(join, table) for table in (join.log_table, join.candidates_table)
  )
  return max(1024, min(_MAX_ROWS, int(limits.memory / (16 * width))))


def _bounds(join: Join, users: Users, lengths, counts, limits: Limits):
  """int64 `[shards + 1]`, users in order, as many as fit."""
  size = _COPIES * (
    lengths * _width(join, join.log_table)
    + counts * _width(join, join.candidates_table)
  )
  large = np.flatnonzero(size > limits.memory)
  if large.size:
    u = large[0]
    raise ValueError(
      f'user {str(users.keys[u])!r} has {lengths[u]} events and {counts[u]} '
      f'candidates, which take {size[u] / 2**20:.0f} MiB, more than '
      f'memory={limits.memory / 2**20:.0f} MiB; raise it'
    )
  total = np.append(0, np.cumsum(size))
  bounds = [0]
  while bounds[-1] < len(users):
    stop = np.searchsorted(total, total[bounds[-1]] + limits.memory, 'right')
    stop = min(int(stop) - 1, len(users))
    if limits.users is not None:
      stop = min(stop, bounds[-1] + limits.users)
    bounds.append(stop)
  return np.array(bounds, np.int64)


def _no_user_is_known(users: Users, events, schema: Schema) -> ValueError:
  log = next(files.stream(events, [schema.user], schema))
  _, keys = columns_lib.encode_keys(log, schema.user)
  own, theirs = (
    columns_lib.canonical_keys(k[:1])[0] for k in (users.keys, keys)
  )
  return ValueError(
    f'none of the {len(users)} users of the candidates, such as {own!r}, is in '
    f'the log, whose users are such as {theirs!r}; correct the users, or set '
    '--allow_new_users to rank without any history'
  )
