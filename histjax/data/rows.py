"""Rows: what one user has been through, and candidates to predict.

A row is a stretch of one user's log as history and some of the later events
as candidates, each with the number of history events that it may see. Rows
are made when they are asked for; only offsets into the log are kept.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from histjax import vocabulary
from histjax.data import batching, grouping
from histjax.data.events import EventLog
from histjax.data.grouping import RowConfig
from histjax.features import Counts, FittedFeatures, Impressions
from histjax.schema import Categorical, Schema
from histjax.types import RankingBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """One row, unpadded. l events and c candidates of one user.

  Attributes:
    context: `{name: scalar}`.
    history: `{name: [l]}`, oldest first.
    candidates: `{name: [c]}`.
    visible: int32 `[c]`; candidate i may see the events `[0, visible[i])`.
    labels: `{task: [c]}` float32 in {0, 1}; empty when serving.
    group: the user, as an index into `Rows.keys`.
  """

  context: dict[str, np.generic]
  history: dict[str, np.ndarray]
  candidates: dict[str, np.ndarray]
  visible: np.ndarray
  labels: dict[str, np.ndarray]
  group: int = 0


class LabelSummary(NamedTuple):
  """Of the labels of a task.

  Attributes:
    total: how many there are.
    positive: how many are 1.
    users: how many users have both kinds.
  """

  total: int
  positive: int
  users: int

  @classmethod
  def of(cls, user: np.ndarray, is_positive: np.ndarray) -> LabelSummary:
    """Of labels `[n]`, each of a user, an integer >= 0."""
    positives = np.bincount(user, is_positive)
    count = np.bincount(user)
    mixed = (positives > 0) & (positives < count)
    return cls(len(user), int(is_positive.sum()), int(mixed.sum()))


Flat = tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]


class RowSource(Sequence[Row]):
  """Rows by index, in memory or not: what is trained and tested on."""

  config: RowConfig

  @property
  @abc.abstractmethod
  def schema(self) -> Schema:
    """The features and tasks."""

  @property
  @abc.abstractmethod
  def keys(self) -> np.ndarray:
    """`[users]`: the user's own key of each `group`."""

  @property
  @abc.abstractmethod
  def history_lengths(self) -> np.ndarray:
    """int32 `[rows]`."""

  @property
  @abc.abstractmethod
  def candidate_counts(self) -> np.ndarray:
    """int32 `[rows]`."""

  @abc.abstractmethod
  def batch(
    self,
    indices: Sequence[int] | np.ndarray,
    *,
    num_rows: int,
    num_events: int,
    num_candidates: int,
    pieces: Sequence[int] | np.ndarray | None = None,
  ) -> RankingBatch:
    """Pads the rows `indices` to one shape.

    Args:
      indices: int `[at most num_rows]`; packed, any number of them.
      num_rows: B; missing rows are empty: length 0, mask False, zeros.
      num_events: L, at least the longest history.
      num_candidates: C, at least the most candidates.
      pieces: int `[at most num_rows]`, of packed rows: how many of the
        `indices` each packs, in their order. None: they are not packed.

    Returns:
      The rows, padded with zeros at the end of each axis, in NumPy.

    Raises:
      ValueError: a row does not fit.
    """

  def key(self, index: int) -> int | str:
    """The user's own key of a row."""
    key = self.keys[self[index].group]
    return key.item() if isinstance(key, np.generic) else key

  @abc.abstractmethod
  def order(self) -> Iterator[np.ndarray]:
    """int64 arrays that say which rows these are, and in what order."""

  @abc.abstractmethod
  def label_summary(self, task: str) -> LabelSummary:
    """Of all candidates."""

  @abc.abstractmethod
  def seen_users(self) -> np.ndarray:
    """bool `[users]`, whose candidates these are."""

  @abc.abstractmethod
  def seen_ids(self, name: str) -> np.ndarray:
    """int32, sorted: the ids of all candidates.

    Args:
      name: of a categorical feature in `Schema.item`.
    """

  @abc.abstractmethod
  def flat(self, names: Sequence[str]) -> Iterator[Flat]:
    """All candidates, row after row, some at a time.

    Args:
      names: the features of items to give.

    Yields:
      int `[c]`, each one's `group`, its features and its labels.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(RowSource):
  """Rows of one log, by index.

  Attributes:
    log: the events.
    config: how the rows were made.
    features: `{name: [n]}`, `log.features` and derived ones, of all events.
    events: int64 `[candidates]`, the candidates of all rows, one row after
      the other, as indices of events.
    offsets: int64 `[rows + 1]`; row r has `events[offsets[r]:offsets[r + 1]]`.
    start: int64 `[rows]`, the first event of each row's history.
    stop: int64 `[rows]`, the event after the last one.
    visible: int64 `[candidates]`, the event after the last visible one.
    derived: `{name: [candidates]}`, the derived features of candidates.
  """

  log: EventLog
  config: RowConfig
  features: dict[str, np.ndarray]
  events: np.ndarray
  offsets: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  visible: np.ndarray
  derived: dict[str, np.ndarray]

  @property
  def schema(self) -> Schema:
    """The log's schema."""
    return self.log.schema

  @property
  def keys(self) -> np.ndarray:
    """`[users]`: the user's own key of each `group`."""
    return self.log.keys

  @property
  def history_lengths(self) -> np.ndarray:
    """int32 `[rows]`."""
    return (self.stop - self.start).astype(np.int32)

  @property
  def candidate_counts(self) -> np.ndarray:
    """int32 `[rows]`."""
    return np.diff(self.offsets).astype(np.int32)

  def __len__(self) -> int:
    return len(self.start)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    r = range(len(self))[index]  # Negative indices, and IndexError.
    slots = slice(self.offsets[r], self.offsets[r + 1])
    events = self.events[slots]
    history = slice(self.start[r], self.stop[r])
    first = events[0]
    return Row(
      context={f.name: self.features[f.name][first] for f in self._context},
      history={
        f.name: self.features[f.name][history]
        for f in self.schema.history_features
      },
      candidates={
        f.name: self.of_candidates(f.name, slots)
        for f in self.schema.item_features
      },
      visible=(self.visible[slots] - self.start[r]).astype(np.int32),
      labels={name: y[events] for name, y in self.log.labels.items()},
      group=int(self.log.user[first]),
    )

  @property
  def _context(self):
    return self.schema.context

  def of_candidates(self, name: str, slots) -> np.ndarray:
    """A feature of the candidates in these places of `events`."""
    if name in self.derived:
      return self.derived[name][slots]
    return self.features[name][self.events[slots]]

  def order(self) -> Iterator[np.ndarray]:
    """See `RowSource.order`."""
    yield from (self.events, self.offsets, self.start, self.stop)

  def label_summary(self, task: str) -> LabelSummary:
    """See `RowSource.label_summary`."""
    label = self.log.labels[task][self.events] == 1
    return LabelSummary.of(self.log.user[self.events], label)

  def seen_users(self) -> np.ndarray:
    """See `RowSource.seen_users`."""
    seen = np.zeros(len(self.keys), bool)
    seen[self.log.user[self.events]] = True
    return seen

  def seen_ids(self, name: str) -> np.ndarray:
    """See `RowSource.seen_ids`."""
    return np.unique(self.of_candidates(name, slice(None)))

  def flat(self, names: Sequence[str]) -> Iterator[Flat]:
    """See `RowSource.flat`; all at once."""
    yield (
      self.log.user[self.events],
      {name: self.of_candidates(name, slice(None)) for name in names},
      {name: y[self.events] for name, y in self.log.labels.items()},
    )

  def candidate_events(self, index: int) -> np.ndarray:
    """The candidates of a row as indices of events of the log, int64 `[c]`."""
    return self.events[self.offsets[index] : self.offsets[index + 1]]

  def batch(
    self,
    indices: Sequence[int] | np.ndarray,
    *,
    num_rows: int,
    num_events: int,
    num_candidates: int,
    pieces: Sequence[int] | np.ndarray | None = None,
  ) -> RankingBatch:
    """See `RowSource.batch`."""
    indices = np.asarray(indices, np.int64)
    first, last = self.offsets[indices], self.offsets[indices + 1]
    begin, end = self.start[indices], self.stop[indices]
    users = self.events[first]
    history = batching.Grid(begin, end, num_rows, num_events, 'events', pieces)
    shown = batching.Grid(
      first, last, num_rows, num_candidates, 'candidates', pieces
    )
    events = self.events[shown.index]
    # Events are numbered from the first of the row that they are packed into.
    visible = self.visible[shown.index] - shown.of_piece(begin - history.place)
    return batching.batch(
      context={f.name: self.features[f.name][users] for f in self._context},
      history=history,
      history_features={
        f.name: self.features[f.name] for f in self.schema.history_features
      },
      shown=shown,
      candidates={
        f.name: self.of_candidates(f.name, shown.index)
        for f in self.schema.item_features
      },
      visible=visible,
      labels={name: y[events] for name, y in self.log.labels.items()},
      group=self.log.user[users],
      packed=pieces is not None,
    )


def make_rows(
  log: EventLog,
  mask: np.ndarray,
  config: RowConfig,
  features: FittedFeatures | None = None,
  *,
  train: np.ndarray | None = None,
  before: Mapping[str, Counts] | None = None,
  first_time: int | float | None = None,
) -> Rows:
  """The events of `mask` as candidates, each with its user's past.

  Args:
    log: all events. Those before a candidate are history, whatever their mask.
    mask: bool `[n]`, the events to predict, such as one of `TimeSplit.masks`.
    config: how events are grouped into rows.
    features: what is derived; `log.schema.derived` names what the rows get.
    train: bool `[n]`, in rows to train on: the training events, whose own
      labels `features` may know. None: features are as a server computes them.
    before: of a part of a larger log, with `train`; see
      `FittedFeatures.of_events`.
    first_time: likewise, of all events to predict.

  Raises:
    ValueError: the rows cannot be made as asked; the message says why.
  """
  mask = np.asarray(mask)
  if mask.dtype != bool or mask.shape != (len(log),):
    raise ValueError(
      f'mask is {mask.dtype}{list(mask.shape)}; it must be bool [{len(log)}], '
      'one for each event of the log'
    )
  for feature in vocabulary.of(log.schema):
    if log.features[feature.name].dtype != np.int32:
      raise ValueError(
        f'feature {feature.name!r} has a vocabulary, which the log does not '
        'have yet: `vocabulary.fit` it to training events, or take that of '
        '`histjax.features.load(workdir)`, and use log.with_vocabularies'
      )
  events, offsets, visible = grouping.group_candidates(
    log, np.flatnonzero(mask), config, first_time
  )
  starts = offsets[:-1]
  if len(events):
    least = np.minimum.reduceat(visible, starts)
    stop = np.maximum.reduceat(visible, starts)
  else:
    least = stop = np.zeros(0, np.int64)
  begin = log.offsets[log.user[events]]
  start = begin[starts]
  if config.history_length is not None:
    if config.on_overflow == 'error':
      grouping.check_overflow(log, events[starts], least - start, config)
    start = np.maximum(start, least - config.history_length)
  if config.kind != 'pointwise':
    grouping.check_context(log, events, starts, config)
  known, derived = {}, {}
  if features is not None and features.configs:
    past = log.events(config.ties)
    known = features.of_events(
      past, config.history_length, train=train, before=before
    )
    impressions = Impressions(
      user=past.user[events],
      begin=begin,
      shown=past.visible[events],
      start=np.repeat(start, np.diff(offsets)),
      visible=visible,
      time=log.time[events],
      features={name: x[events] for name, x in log.features.items()},
      event=events,
    )
    derived = features.of_impressions(past, impressions, known)
  return Rows(
    log,
    config,
    {**log.features, **known},
    events,
    offsets,
    start,
    stop,
    visible,
    derived,
  )


def empty_batch(
  schema: Schema,
  *,
  num_rows: int,
  num_events: int,
  num_candidates: int,
  packed: bool = False,
) -> RankingBatch:
  """A batch without rows, as `RowSource.batch` pads no `indices`.

  Args:
    schema: of the rows.
    num_rows: B.
    num_events: L.
    num_candidates: C.
    packed: whether it is one of packed rows.

  Returns:
    Zeros, with the types of other batches, in NumPy.
  """
  none = np.zeros(0, np.int64)
  pieces = none if packed else None

  def grid(width, what):
    return batching.Grid(none, none, num_rows, width, what, pieces)

  def flat(features):
    return {
      f.name: np.zeros(
        0, np.int32 if isinstance(f, Categorical) else np.float32
      )
      for f in features
    }

  shown = grid(num_candidates, 'candidates')
  labels = {task.name: np.zeros(0, np.float32) for task in schema.tasks}
  return batching.batch(
    context=flat(schema.context),
    history=grid(num_events, 'events'),
    history_features=flat(schema.history_features),
    shown=shown,
    candidates={
      name: batching.take(x, shown)
      for name, x in flat(schema.item_features).items()
    },
    visible=np.zeros(shown.real.shape, np.int64),
    labels={name: batching.take(x, shown) for name, x in labels.items()},
    group=np.zeros(0, np.int32),
    packed=packed,
  )


def collate(
  rows: Sequence[Row],
  *,
  num_rows: int | None = None,
  num_events: int | None = None,
  num_candidates: int | None = None,
  pieces: Sequence[int] | np.ndarray | None = None,
) -> RankingBatch:
  """Pads rows to one shape and stacks them.

  Args:
    rows: at most `num_rows`, packed any number, at least one, all of one
      schema.
    num_rows: B; missing rows are empty: length 0, mask False, zeros. None: as
      many as there are.
    num_events: L, at least the longest history; None: its length, or 1.
    num_candidates: C, at least the most candidates; None: their number.
    pieces: as `RowSource.batch`.

  Returns:
    The batch, padded with zeros at the end of each axis, in NumPy.

  Raises:
    ValueError: there is no row, one does not fit, or they are of two kinds.
  """
  if not rows:
    raise ValueError('rows is empty; there must be at least one')
  for field in ('context', 'history', 'candidates', 'labels'):
    names = getattr(rows[0], field).keys()
    for i, row in enumerate(rows):
      if getattr(row, field).keys() != names:
        raise ValueError(
          f'rows[{i}].{field} has {sorted(getattr(row, field))}, that of '
          f'rows[0] {sorted(names)}; collate rows of one kind'
        )
  lengths = [len(next(iter(r.history.values()))) for r in rows]
  counts = [len(r.visible) for r in rows]

  packs = [1] * len(rows) if pieces is None else pieces
  num_rows = len(packs) if num_rows is None else num_rows
  if num_events is None:
    num_events = max(1, batching.sums(lengths, packs).max())
  if num_candidates is None:
    num_candidates = batching.sums(counts, packs).max()

  def join(field):
    return {
      name: np.concatenate([getattr(r, field)[name] for r in rows])
      for name in getattr(rows[0], field)
    }

  def grid(sizes, width, what):
    end = np.cumsum(sizes)
    return batching.Grid(end - sizes, end, num_rows, width, what, pieces)

  shown = grid(counts, num_candidates, 'candidates')
  history = grid(lengths, num_events, 'events')

  def candidates(field):
    return {name: batching.take(x, shown) for name, x in join(field).items()}

  return batching.batch(
    context={
      name: np.stack([r.context[name] for r in rows])
      for name in rows[0].context
    },
    history=history,
    history_features=join('history'),
    shown=shown,
    candidates=candidates('candidates'),
    visible=batching.take(np.concatenate([r.visible for r in rows]), shown)
    + shown.of_piece(history.place),
    labels=candidates('labels'),
    group=np.array([r.group for r in rows], np.int32),
    packed=pieces is not None,
  )
