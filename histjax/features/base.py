"""What derived features share: what they read, what they keep, their protocol.

A derived feature of an item is no column of the log: it is computed from what
the user had been through. A log and a request are the same to it, `Events` and
`Impressions`, so training and serving cannot differ.
"""

from __future__ import annotations

import abc
import dataclasses
import fractions
import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np

from histjax.mixing import mix
from histjax.schema import Categorical, Feature, Schema

State: TypeAlias = Mapping[str, np.ndarray]
"""What a feature has learnt of the training events: arrays by name."""


class Counts(NamedTuple):
  """Of each of some events, those of the same value that come before it.

  Attributes:
    events: `[t]`, how many.
    positive: `[t]`, how many of them are positive.
  """

  events: np.ndarray
  positive: np.ndarray


class Lookback(NamedTuple):
  """How far back a derived feature reads; both bounds hold together.

  Attributes:
    events: before the last one that the impression sees (`visible`).
    seconds: before the impression; events of exactly so long ago are read.
  """

  events: int = 0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
  """Events by user and then time: those of a log, or one user's past.

  Attributes:
    schema: what their columns mean.
    user: uint64 `[n]`, a digest of the user's key.
    begin: int64 `[n]`, the first event of each one's user.
    visible: int64 `[n]`, the event after the last one that the user had been
      through before each; see `EventLog.visible`.
    time: `[n]` in the log's unit; int64 nanoseconds if it has timestamps.
    is_timestamp: it has.
    features: `{name: [n]}`, ids and values of the features of items, hidden
      and (of earlier ones in `DataConfig.features`) derived ones included.
    labels: `{task: [n]}`, 0 or 1.
  """

  schema: Schema
  user: np.ndarray
  begin: np.ndarray
  visible: np.ndarray
  time: np.ndarray
  is_timestamp: bool
  features: Mapping[str, np.ndarray]
  labels: Mapping[str, np.ndarray]

  def __len__(self) -> int:
    return len(self.user)

  @property
  def seconds(self) -> float:
    """Seconds per unit of `time`."""
    return 1e-9 if self.is_timestamp else self.schema.time_unit

  def impressions(self, history_length: int | None) -> Impressions:
    """The events as they were when they were shown.

    Args:
      history_length: each saw so many of the events before it; None: all.
    """
    start = self.begin
    if history_length is not None:
      start = np.maximum(start, self.visible - history_length)
    return Impressions(
      user=self.user,
      begin=self.begin,
      shown=self.visible,
      start=start,
      visible=self.visible,
      time=self.time,
      features=self.features,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Impressions:
  """Items shown to users, for which features are asked.

  Events are given by their index in `Events`.

  Attributes:
    user: uint64 `[c]`, as in `Events`.
    begin: int64 `[c]`, the first event of the user.
    shown: int64 `[c]`, the event after the last one shown before.
    start: int64 `[c]`, the first event that the candidate sees.
    visible: int64 `[c]`, the event after the last one that it sees, at most
      `shown`: of events in between it is known that they were shown, and not
      what came of them.
    time: `[c]`, as in `Events`.
    features: `{name: [c]}`, ids and values of the features of items.
    event: int64 `[c]`, which events they are; None: they are not among them.
  """

  user: np.ndarray
  begin: np.ndarray
  shown: np.ndarray
  start: np.ndarray
  visible: np.ndarray
  time: np.ndarray
  features: Mapping[str, np.ndarray]
  event: np.ndarray | None = None

  def since(self, first: int) -> Impressions:
    """Those from number `first` on."""
    return Impressions(
      user=self.user[first:],
      begin=self.begin[first:],
      shown=self.shown[first:],
      start=self.start[first:],
      visible=self.visible[first:],
      time=self.time[first:],
      features={name: x[first:] for name, x in self.features.items()},
      event=None if self.event is None else self.event[first:],
    )


@dataclasses.dataclass(frozen=True)
class DerivedFeature(abc.ABC):
  """A derived feature's config, and how it is fitted and computed.

  Subclass it as a frozen dataclass, in a module that a config imports, and
  list it in `DataConfig.features` by the class's name in snake case:
  `{'type': 'time_gap', 'buckets': 24}` is `TimeGap(buckets=24)`.

  Attributes:
    needs_time: it reads `time`.
    needs_user: it reads `user`.
    needs_labels: it reads `labels`.
    of_view: its value depends on what the candidate sees (`start`, `visible`),
      not only on what was shown before (`shown`).
  """

  needs_time: ClassVar[bool] = False
  needs_user: ClassVar[bool] = False
  needs_labels: ClassVar[bool] = False
  of_view: ClassVar[bool] = False

  def reads(self) -> tuple[str, ...]:
    """The features of items that it reads; they may be hidden."""
    return ()

  def check(self, schema: Schema) -> None:
    """Raises ValueError if it cannot be computed with this schema."""
    del schema

  def lookback(self, history_length: int | None) -> Lookback | None:
    """How far back its values read; None: to the user's first event.

    A server drops what no feature reads any more. What it keeps of an event
    are its derived features, too, so those that read them count from there.
    `impressions.begin` is then the first event that is kept: a feature that
    counts from the user's first event returns None.

    Args:
      history_length: as `Events.impressions`.
    """
    del history_length
    return None

  def fit(self, events: Events, train: np.ndarray) -> State:
    """Learns from the training events.

    A log that is larger than memory is learnt from part by part: give `collect`
    and `merge` rather than this, and both can be done.

    Args:
      events: all of the log. Their schema has the features that come before
        in `DataConfig.features`, their `features` do not.
      train: bool `[n]`, which of them to learn from.

    Raises:
      ValueError: nothing can be learnt from them.
    """
    return self.merge([self.collect(events, train)], events.schema)

  def collect(self, events: Events, train: np.ndarray) -> State:
    """What `merge` needs of some users' events.

    Args:
      events: all of these users. Their schema has no derived features.
      train: bool `[n]`, which of them to learn from.
    """
    del events, train
    return {}

  def merge(self, parts: Sequence[State], schema: Schema) -> State:
    """Learns from what was collected of parts of a log.

    Args:
      parts: of `collect`, each of other users, at least one.
      schema: with the features that come before in `DataConfig.features`.

    Raises:
      ValueError: nothing can be learnt from them.
    """
    del parts, schema
    return {}

  def counted(self, events: Events) -> dict[str, np.ndarray]:
    """The values whose earlier training events `apply_training` counts.

    Returns:
      `{name: int64 [n]}`; empty: it reads no other users' events.
    """
    del events
    return {}

  @abc.abstractmethod
  def features(self, schema: Schema, state: State) -> tuple[Feature, ...]:
    """The features of items that it adds."""

  @abc.abstractmethod
  def apply(
    self, events: Events, impressions: Impressions, state: State
  ) -> dict[str, np.ndarray]:
    """Its values, `{name: [c]}`, int32 or float32.

    The result for an impression must depend on nothing but the state, the
    impression and the events of its user before `shown`, to the last bit.
    """

  def apply_training(
    self,
    events: Events,
    history_length: int | None,
    state: State,
    train: np.ndarray,
    before: Mapping[str, Counts] | None = None,
  ) -> dict[str, np.ndarray]:
    """Its values of all events, `{name: [n]}`, for rows to train on.

    They are those of `apply`, unless the state knows the events' own labels.

    Args:
      events: all of the log.
      history_length: as `Events.impressions`.
      state: of `fit`.
      train: bool `[n]`, as `fit`.
      before: for each of `counted`, of the training events, those of all users
        that come before; None: `events` are all of the log.
    """
    del train, before
    return self.apply(events, events.impressions(history_length), state)


def before(time: np.ndarray, seconds: float, unit: float) -> np.ndarray:
  """Times so long before others; whole ones exactly, up to one that is none.

  Args:
    time: `[n]`, >= 0.
    seconds: how long.
    unit: seconds per unit of `time`, as the decimal that it is written as.

  Returns:
    `[n]` of the type of `time`; an integer is rounded up, so that it is the
    first whole time that is at most `seconds` ago.
  """
  if time.dtype.kind == 'f':
    return time - seconds / unit
  return time - _whole(float(seconds), float(unit))


@functools.lru_cache(64)  # A request asks for few, which take 10 us each.
def _whole(seconds: float, unit: float) -> int:
  if seconds == math.inf:
    return 2**63 - 1
  exact = fractions.Fraction(repr(seconds)) / fractions.Fraction(repr(unit))
  return min(math.floor(exact), 2**63 - 1)


def ranks(events: Events) -> np.ndarray:
  """A random order of events, uint64 `[n]`.

      rank = mix(mix(user's digest) + number among the user's events)

  It depends on nothing but the user and the event's number, so that it is the
  same for a part of a log as for all of it.
  """
  number = (np.arange(len(events)) - events.begin).astype(np.uint64)
  return mix(mix(events.user) + number)


def count_before(
  value: np.ndarray, rank: np.ndarray, label: np.ndarray
) -> Counts:
  """Counts, for each event, those of its value and of lower rank.

  Args:
    value: integers `[t]`.
    rank: `[t]`; of equal ones the earlier event is lower.
    label: float64 `[t]`, 0 or 1.
  """
  order = np.lexsort((rank, value))
  value = value[order]
  first = np.searchsorted(value, value, 'left')
  events, positive = np.empty(len(order)), np.empty(len(order))
  events[order] = np.arange(len(order)) - first
  total = np.cumsum(label[order]) - label[order]
  positive[order] = total - total[first]
  return Counts(events, positive)


def summed(
  parts: Sequence[State], values: str, *counts: str
) -> tuple[np.ndarray, list[np.ndarray]]:
  """The distinct values of all parts, and the sums of what is counted of each.

  Args:
    parts: of `collect`.
    values: the name of distinct values `[v]`.
    *counts: names of numbers `[v]`.
  """
  value = np.concatenate([part[values] for part in parts])
  found, place = np.unique(value, return_inverse=True)
  totals = []
  for name in counts:
    count = np.concatenate([part[name] for part in parts])
    total = np.bincount(place, count, len(found))  # float64: exact to 2**53.
    totals.append(total.astype(count.dtype))
  return found, totals


def check_names(
  feature: DerivedFeature, field: str, schema: Schema, names: tuple[str, ...]
) -> None:
  """Raises ValueError unless all `names` are categorical features of items."""
  known = [
    f.name for f in (*schema.item, *schema.hidden) if isinstance(f, Categorical)
  ]
  for name in names:
    if name not in known:
      raise ValueError(
        f'data.features: {type(feature).__name__}.{field} names {name!r}; it '
        f'must be one of the categorical features of items, {known}'
      )


def feature_and_last(name: str, field: str) -> tuple[str, int | None]:
  """`('tab', 5)` of 'tab@5', `('tab', None)` of 'tab'.

  Raises:
    ValueError: what follows '@' is no number; the message names the `field`.
  """
  feature, at, last = name.partition('@')
  if at and not (last.isdecimal() and int(last) > 0):
    raise ValueError(
      f"data.features: {field} has {name!r}; '@' must be followed by a whole "
      'number >= 1, of events'
    )
  return feature, int(last) if at else None
