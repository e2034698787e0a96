"""A log of events, in memory, by user and time: what a user brings.

log = EventLog.from_files(['events.parquet'], schema)
masks = TimeSplit('2022-05-01', '2022-05-03').masks(log)
rows = log.rows(masks['train'], RowConfig('streaming', history_length=50))
"""

from __future__ import annotations

import dataclasses
import datetime
import fractions
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from histjax.data import columns as columns_lib
from histjax.data import files, grouping
from histjax.data import history_rates as history_rates_lib
from histjax.data import rows as rows_lib
from histjax.schema import Categorical, Schema

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
      the schema but `time_gap`.
    labels: `{task: [n]}` float32 in {0, 1}.
    request: int64 `[n]`, equal within a user's request; None if the schema
      names no request column.
    extra: `{column: [n]}`, further columns, as they came.
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
    wanted = _wanted(schema, extra)
    table = files.read(paths, wanted, schema)
    return cls._from_table(table, schema, extra, require_sorted)

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
    wanted = _wanted(schema, extra)
    table = columns_lib.from_mapping(
      columns, wanted, 'the columns given', schema
    )
    return cls._from_table(table, schema, extra, require_sorted)

  @classmethod
  def _from_table(cls, table, schema, extra, require_sorted) -> EventLog:
    if not len(table):
      raise ValueError(f'{table.sources[0]} has no events; give at least one')
    user, keys = columns_lib.encode_keys(table, schema.user)
    time, is_timestamp = columns_lib.encode_time(table, schema.time)
    if require_sorted:
      _check_sorted(table, schema, user, keys, time)
    order = np.lexsort((time, user))  # Stable: ties keep the log's order.
    features = {
      f.name: (
        columns_lib.encode_categorical(table, f)
        if isinstance(f, Categorical)
        else columns_lib.encode_dense(table, f)
      )[order]
      for f in schema.logged
    }
    labels = {
      t.name: columns_lib.encode_label(table, t)[order] for t in schema.tasks
    }
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
    )

  def __len__(self) -> int:
    """The number of events."""
    return len(self.user)

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

  def time_gap(self, ties: Ties = 'order') -> np.ndarray:
    """The feature `time_gap`, int32 `[n]`; see `Schema.time_gap_buckets`."""
    return self.time_gap_of(np.arange(len(self)), self.visible(ties))

  def time_gap_of(self, events: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """`time_gap` of events that see their user's past up to `visible`.

    Args:
      events: int64 `[c]`, indices of events.
      visible: int64 `[c]`, indices of events; see `visible`.

    Returns:
      int32 `[c]`.
    """
    begin = self.offsets[self.user[events]]
    gap = self.time[events] - self.time[np.maximum(visible - 1, 0)]
    return gap_buckets(
      np.where(visible > begin, gap, 0), self.schema, self.is_timestamp
    )

  def history_rates(
    self, events: np.ndarray, start: np.ndarray, visible: np.ndarray
  ) -> dict[str, np.ndarray]:
    """`Schema.history_rates` of events that see `[start, visible)`.

    Args:
      events: int64 `[c]`, indices of events.
      start: int64 `[c]`, the first event that each sees.
      visible: int64 `[c]`, the event after the last one.

    Returns:
      `{feature: float32 [c]}`.
    """
    named = [r.feature for r in self.schema.rates_of_history if r.feature]
    return history_rates_lib.history_rates(
      self.schema,
      self.labels,
      self.features,
      {name: self.features[name][events] for name in named},
      start,
      visible,
    )

  def rows(self, mask: np.ndarray, config: rows_lib.RowConfig) -> rows_lib.Rows:
    """The events of `mask` as candidates, each with its user's past.

    Args:
      mask: bool `[n]`, the events to predict, such as one of
        `TimeSplit.masks`. Earlier events are history whatever their mask.
      config: how events are grouped into rows.

    Raises:
      ValueError: the rows cannot be made as asked; the message says why.
    """
    return grouping.make_rows(self, mask, config)


@dataclasses.dataclass(frozen=True)
class FractionSplit:
  """Splits each user's events in time order, by number.

  Of a user's n events, the first `floor(train n)` are for training, those up
  to `floor((train + validation) n)` for validation, the rest for testing.
  The fractions are taken as the decimals they are written as, so that 0.8 of
  10 is 8 and 0.8 + 0.1 is 0.9.

  Attributes:
    train: the fraction to train on.
    validation: the fraction to choose models on.
  """

  train: float = 0.8
  validation: float = 0.1

  def __post_init__(self):
    first, second = self._fractions()
    if not 0 <= first <= second <= 1:
      raise ValueError(
        f'split: train={self.train} and validation={self.validation} must be '
        '>= 0 and add up to at most 1'
      )

  def _fractions(self) -> tuple[fractions.Fraction, fractions.Fraction]:
    train = fractions.Fraction(repr(self.train))
    return train, train + fractions.Fraction(repr(self.validation))

  def masks(self, log: EventLog) -> dict[str, np.ndarray]:
    """`{'train', 'validation', 'test'}: bool [n]`."""
    count = np.diff(log.offsets)[log.user]
    ordinal = np.arange(len(log)) - log.offsets[log.user]
    first, second = (
      count * f.numerator // f.denominator for f in self._fractions()
    )
    return _three(ordinal, first, second)


@dataclasses.dataclass(frozen=True)
class TimeSplit:
  """Splits events by two moments, the same for all users.

  Attributes:
    validation_start: the first moment of validation; training is before it.
    test_start: the first moment of testing. Both are numbers in the time
      column's unit or, if it holds timestamps, ISO 8601 strings (without a
      time zone: UTC).
  """

  validation_start: int | float | str
  test_start: int | float | str

  def masks(self, log: EventLog) -> dict[str, np.ndarray]:
    """`{'train', 'validation', 'test'}: bool [n]`.

    Raises:
      ValueError: the moments are not of the log's kind, or not in order.
    """
    first = _moment(self.validation_start, log, 'validation_start')
    second = _moment(self.test_start, log, 'test_start')
    if first > second:
      raise ValueError(
        f'split: validation_start={self.validation_start!r} is after '
        f'test_start={self.test_start!r}; swap them'
      )
    return _three(log.time, first, second)


Split = FractionSplit | TimeSplit


def gap_buckets(
  gap: np.ndarray, schema: Schema, is_timestamp: bool
) -> np.ndarray:
  """`Schema.time_gap_buckets` of gaps in the log's unit, as int32."""
  seconds = gap * (1e-9 if is_timestamp else schema.time_unit)
  # frexp, not log2: powers of two must not round down.
  bucket = np.frexp(1 + seconds)[1] - 1
  return np.minimum(bucket, schema.time_gap_buckets - 1).astype(np.int32)


def _three(position, first, second) -> dict[str, np.ndarray]:
  return {
    'train': position < first,
    'validation': (position >= first) & (position < second),
    'test': position >= second,
  }


def _moment(value, log: EventLog, field: str):
  if isinstance(value, int | float):
    if log.is_timestamp:
      raise ValueError(
        f'split: {field}={value!r} is a number, but column '
        f"{log.schema.time!r} holds timestamps; write it as '2022-05-01'"
      )
    return value
  if not log.is_timestamp:
    raise ValueError(
      f'split: {field}={value!r} is no number, but column '
      f"{log.schema.time!r} holds numbers; give it in the column's unit"
    )
  try:
    moment = datetime.datetime.fromisoformat(value)
  except ValueError as error:
    raise ValueError(
      f'split: {field}={value!r} is no ISO 8601 moment ({error}); write it '
      "as '2022-05-01' or '2022-05-01T08:00'"
    ) from error
  if moment.tzinfo is not None:
    moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
  return np.datetime64(moment, 'ns').astype(np.int64)


def _plain(key) -> int | str:
  return key.item() if isinstance(key, np.generic) else key


def _wanted(schema: Schema, extra: Sequence[str]) -> list[str]:
  names = [schema.user, schema.time]
  if schema.request:
    names.append(schema.request)
  names += [f.column for f in schema.logged]
  names += [t.column for t in schema.tasks]
  names = list(dict.fromkeys([*names, *extra]))
  schema.check_types_of(names)
  return names


def _check_sorted(table, schema, user, keys, time) -> None:
  order = np.argsort(user, kind='stable')
  late = (np.diff(user[order]) == 0) & (np.diff(time[order]) < 0)
  if late.any():
    row = int(order[np.flatnonzero(late)[0] + 1])
    key = _plain(keys[user[row]])
    table.fail(
      schema.time,
      row,
      time[row].item(),
      f'earlier than an event of user {key!r} further up; sort the log by '
      'time, or set require_sorted=False to have it sorted',
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
