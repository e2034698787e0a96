"""A log of events, in memory, by user and time: what a user brings.

log = EventLog.from_files(['events.parquet'], schema)
masks = TimeSplit('2022-05-01', '2022-05-03').masks(log)
rows = make_rows(log, masks['train'], RowConfig('streaming', history_length=50))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from histjax import features as features_lib
from histjax import vocabulary
from histjax.data import columns as columns_lib
from histjax.data import files, hashing
from histjax.data.parts import Columns
from histjax.schema import Schema, categorical

Ties = Literal['order', 'strict']


@dataclasses.dataclass(frozen=True, eq=False)
class EventLog:
  """Events sorted by user, then time, then the order they came in.

  Attributes:
    schema: what the columns mean.
    keys: `[users]`, each user's own key: integers, or texts (objects) of which
      those that are integers come first.
    user: int32 `[n]`, index into `keys`, non-decreasing.
    time: int64 or float64 `[n]`, in the log's unit; int64 nanoseconds since
      1970 (UTC) if it had timestamps.
    is_timestamp: the log had timestamps.
    features: `{name: [n]}`, int32 ids and float32 values of all features of
      the schema that are columns of the log; ids with a vocabulary are digests,
      uint64, until `with_vocabularies`.
    labels: `{task: [n]}` float32 in {0, 1}.
    request: int64 `[n]`, equal within a user's request; None if the schema
      names no request column.
    extra: `{column: [n]}`, further columns, as they came.
    hashed: of each feature with `ids='hash'`, how many ids share a row.
  """

  schema: Schema
  keys: np.ndarray
  user: np.ndarray
  time: np.ndarray
  is_timestamp: bool
  features: dict[str, np.ndarray]
  labels: dict[str, np.ndarray]
  request: np.ndarray | None
  extra: dict[str, np.ndarray]
  hashed: tuple[vocabulary.IdCounts, ...] = ()

  @classmethod
  def from_files(
    cls,
    paths: Sequence[str],
    schema: Schema,
    *,
    extra: Sequence[str] = (),
    require_sorted: bool = False,
  ) -> EventLog:
    """Reads Parquet and CSV files; see `files.read`.

    Args:
      paths: files or folders of files, in the order of the log.
      schema: names the columns to read.
      extra: further columns to keep, unread.
      require_sorted: refuse a log whose users' times decrease somewhere;
        otherwise it is sorted, stably.

    Raises:
      ValueError: a file or a value in it is bad; the message says which.
    """
    wanted = columns_of(schema, extra)
    table = files.read(paths, wanted, schema)
    return cls.from_parts(table, schema, extra, require_sorted)

  @classmethod
  def from_columns(
    cls,
    columns: Any,
    schema: Schema,
    *,
    extra: Sequence[str] = (),
    require_sorted: bool = False,
  ) -> EventLog:
    """As `from_files`, of columns in memory; see `columns.from_mapping`."""
    wanted = columns_of(schema, extra)
    table = columns_lib.from_mapping(
      columns, wanted, 'the columns given', schema
    )
    return cls.from_parts(table, schema, extra, require_sorted)

  @classmethod
  def from_parts(
    cls,
    table: Columns,
    schema: Schema,
    extra: Sequence[str] = (),
    require_sorted: bool = False,
  ) -> EventLog:
    """As `from_files`, of columns that have been read."""
    if not len(table):
      raise ValueError(f'{table.sources[0]} has no events; give at least one')
    user, keys = columns_lib.encode_keys(table, schema.user)
    time, is_timestamp = columns_lib.encode_time(table, schema.time)
    if require_sorted:
      check_sorted(
        user,
        keys,
        time,
        lambda row, problem: table.fail(
          schema.time, row, time[row].item(), problem
        ),
      )
    order = np.lexsort((time, user))  # Stable: ties keep the log's order.
    # First: of a column that is an action, too, a label says more.
    labels = {
      t.name: columns_lib.encode_label(table, t)[order] for t in schema.tasks
    }
    features = columns_lib.encode(table, schema.logged)
    features = {name: x[order] for name, x in features.items()}
    request = None
    if schema.request:
      request = columns_lib.encode_keys(table, schema.request)[0][order]
    return cls(
      schema=schema,
      keys=keys,
      user=user[order].astype(np.int32),
      time=time[order],
      is_timestamp=is_timestamp,
      features=features,
      labels=labels,
      request=request,
      extra={name: columns_lib.raw(table, name)[order] for name in extra},
      hashed=tuple(
        vocabulary.of_hash(f, columns_lib.distinct_digests(table, f))
        for f in categorical(schema.logged)
        if f.ids == 'hash'
      ),
    )

  def __len__(self) -> int:
    """The number of events."""
    return len(self.user)

  @property
  def period(self) -> str:
    """From when to when events are, for people."""
    schema, times = self.schema, (self.time.min(), self.time.max())
    unit = 1e-9 if self.is_timestamp else schema.time_unit
    first, last = (
      np.datetime64(round(float(t) * unit * 1000), 'ms') for t in times
    )
    if self.is_timestamp:
      return f'Events are from {first} to {last} (UTC)'
    return (
      f'Events are from {schema.time} {times[0]} to {times[1]}: {first} to '
      f'{last}, if these are units of {unit:g} s (time_unit) since 1970'
    )

  @property
  def num_users(self) -> int:
    """The number of users."""
    return len(self.keys)

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """int64 `[users + 1]`: user `u` has the events `offsets[u:u + 2]`."""
    return np.searchsorted(self.user, np.arange(self.num_users + 1))

  def key(self, event: int) -> int | str:
    """The user's own key of an event."""
    return _plain(self.keys[self.user[event]])

  def with_tasks(self, names: Sequence[str]) -> EventLog:
    """This log with the labels of the tasks `names` alone; empty: of all."""
    if not names:
      return self
    schema = self.schema.with_tasks(names)
    labels = {name: self.labels[name] for name in names}
    return dataclasses.replace(self, schema=schema, labels=labels)

  def with_vocabularies(
    self, vocabularies: Mapping[str, vocabulary.Vocabulary]
  ) -> EventLog:
    """This log with the rows of ids that have a vocabulary.

    Args:
      vocabularies: `{table: vocabulary}`, as `vocabulary.fit` gives them.
    """
    if not vocabulary.of(self.schema):
      return self
    features = vocabulary.apply(self.schema, self.features, vocabularies)
    return dataclasses.replace(self, features=features)

  def visible(self, ties: Ties = 'order') -> np.ndarray:
    """Where each event's past ends.

    An event sees the events of its user from the first up to, and without,
    the one returned. Events of its own request are never among them: they
    were shown with it, before the user did anything about it.

    Args:
      ties: 'order': an event sees all earlier ones in the log's order;
        'strict': only those of a strictly earlier time.

    Returns:
      int64 `[n]`, indices of events, at most each event's own.
    """
    stop = np.arange(len(self))
    if self.request is not None:
      stop = stop[_first_of_group(self.user, self.request)]
    if ties == 'strict':
      stop = _first_of_group(self.user, self.time)[stop]
    return stop

  def events(self, ties: Ties = 'order') -> features_lib.Events:
    """The log as derived features read it.

    Args:
      ties: as `visible`.
    """
    return features_lib.Events(
      schema=self.schema,
      user=hashing.digests(self.keys)[self.user],
      begin=self.offsets[self.user],
      visible=self.visible(ties),
      time=self.time,
      is_timestamp=self.is_timestamp,
      features=self.features,
      labels=self.labels,
    )


def _plain(key) -> int | str:
  return key.item() if isinstance(key, np.generic) else key


def columns_of(schema: Schema, extra: Sequence[str] = ()) -> list[str]:
  """The columns that are read of a log, each once."""
  names = list(dict.fromkeys([*schema.columns, *extra]))
  schema.check_types_of(names)
  return names


def check_sorted(
  user: np.ndarray,
  keys: np.ndarray,
  time: np.ndarray,
  fail: Callable[[int, str], object],
) -> None:
  """Calls `fail(event, problem)` if a user's times decrease somewhere.

  Args:
    user: `[n]`, an index into `keys`, in the log's order.
    keys: `[users]`.
    time: `[n]`.
    fail: raises a ValueError.
  """
  order = np.argsort(user, kind='stable')
  late = (np.diff(user[order]) == 0) & (np.diff(time[order]) < 0)
  if late.any():
    row = int(order[np.flatnonzero(late)[0] + 1])
    fail(
      row,
      f'earlier than an event of user {_plain(keys[user[row]])!r} further up; '
      'sort the log by time, or set require_sorted=False to have it sorted',
    )


def _first_of_group(*labels: np.ndarray) -> np.ndarray:
  """For each event the index of the first one with the same labels."""
  order = np.lexsort(labels[::-1])  # Stable: the first of a group is first.
  new = np.zeros(len(order), bool)
  new[:1] = True
  for label in labels:
    new[1:] |= np.diff(label[order]) != 0
  starts = np.flatnonzero(new)
  first = np.empty(len(order), np.int64)
  first[order] = np.repeat(
    order[starts], np.diff(np.append(starts, len(order)))
  )
  return first
