"""Rows: what one user has been through, and candidates to predict.

A row is a stretch of one user's log as history and some of the later events
as candidates, each with the number of history events that it may see. Rows
are made when they are asked for; only offsets into the log are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from histjax.schema import Schema
from histjax.types import Candidates, History, RankingBatch

if TYPE_CHECKING:
  from histjax.data.events import EventLog


@dataclasses.dataclass(frozen=True)
class RowConfig:
  """How candidates are grouped into rows, and how much history they get.

  The grouping decides what shares a forward pass, never what a candidate may
  see: within `history_length`, that is the same for all kinds.

  Attributes:
    kind: 'pointwise': one candidate a row. 'request': the candidates of one
      request (equal `Schema.request`; without such a column, equal time,
      which needs ties='strict'). 'streaming': all of a user's candidates, in
      time order, each seeing only what came before it. 'snapshot': all of a
      user's candidates with one history, taken before the first of them; see
      `snapshot_every`.
    history_length: the most recent events kept; for rows of several
      candidates, before the candidate that sees the least. Later ones always
      see all events in between, too. None: all.
    on_overflow: what to do with more events than `history_length`: 'truncate'
      keeps the most recent ones; 'error' refuses them.
    max_candidates: split rows of more candidates. None: never.
    ties: 'order': an event sees all earlier ones in the log's order. 'strict':
      only those of a strictly earlier time. Either way an event never sees
      others of its own request.
    snapshot_every: of 'snapshot', seconds between the moments at which
      histories are taken, the same for all users, from the time of the first
      candidate on. A candidate comes once with every history of its user that
      was taken before it and differs from the next: to train on, not to
      evaluate. None: one snapshot, before the user's first candidate.
  """

  kind: Literal['pointwise', 'request', 'streaming', 'snapshot'] = 'streaming'
  history_length: int | None = None
  on_overflow: Literal['truncate', 'error'] = 'truncate'
  max_candidates: int | None = None
  ties: Literal['order', 'strict'] = 'order'
  snapshot_every: float | None = None

  def __post_init__(self):
    _check_choice(
      self, 'kind', ('pointwise', 'request', 'streaming', 'snapshot')
    )
    _check_choice(self, 'on_overflow', ('truncate', 'error'))
    _check_choice(self, 'ties', ('order', 'strict'))
    if self.history_length is not None and self.history_length < 0:
      raise ValueError(
        f'rows: history_length={self.history_length} must be >= 0, or None'
      )
    if self.max_candidates is not None and self.max_candidates < 1:
      raise ValueError(
        f'rows: max_candidates={self.max_candidates} must be >= 1, or None'
      )
    if self.snapshot_every is not None and (
      self.kind != 'snapshot' or not self.snapshot_every > 0
    ):
      raise ValueError(
        f'rows: snapshot_every={self.snapshot_every} must be > 0 seconds and '
        f"with kind='snapshot', which is {self.kind!r}; or None"
      )


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


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
  """Rows of one log, by index.

  Attributes:
    log: the events.
    config: how the rows were made.
    features: `log.features` and those that the schema derives, of events of
      histories.
    events: int64 `[candidates]`, the candidates of all rows, one row after
      the other, as indices of events.
    offsets: int64 `[rows + 1]`; row r has `events[offsets[r]:offsets[r + 1]]`.
    start: int64 `[rows]`, the first event of each row's history.
    stop: int64 `[rows]`, the event after the last one.
    visible: int64 `[candidates]`, the event after the last visible one.
    seen: `{name: [candidates]}`, the features of candidates that depend on
      what they see: `time_gap` and `Schema.history_rates`, if any.
  """

  log: EventLog
  config: RowConfig
  features: dict[str, np.ndarray]
  events: np.ndarray
  offsets: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  visible: np.ndarray
  seen: dict[str, np.ndarray]

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
        f.name: self._of_candidates(f.name, slots)
        for f in self.schema.item_features
      },
      visible=(self.visible[slots] - self.start[r]).astype(np.int32),
      labels={name: y[events] for name, y in self.log.labels.items()},
      group=int(self.log.user[first]),
    )

  @property
  def _context(self):
    return self.schema.context

  def _of_candidates(self, name: str, slots) -> np.ndarray:
    """A feature of the candidates in these places of `events`."""
    if name in self.seen:
      return self.seen[name][slots]
    return self.features[name][self.events[slots]]

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
  ) -> RankingBatch:
    """`collate` of the rows `indices`, without making each of them.

    Args:
      indices: int `[at most num_rows]`.
      num_rows: B; missing rows are empty: length 0, mask False, zeros.
      num_events: L, at least the longest history.
      num_candidates: C, at least the most candidates.

    Returns:
      The rows, padded with zeros, in NumPy.

    Raises:
      ValueError: a row does not fit.
    """
    indices = np.asarray(indices, np.int64)
    length = np.zeros(num_rows, np.int32)
    count = np.zeros(num_rows, np.int32)
    check_fits('rows', len(indices), num_rows, 'num_rows')
    n = len(indices)
    length[:n] = self.stop[indices] - self.start[indices]
    count[:n] = self.offsets[indices + 1] - self.offsets[indices]
    check_fits('events', max(length, default=0), num_events, 'num_events')
    check_fits(
      'candidates', max(count, default=0), num_candidates, 'num_candidates'
    )
    events, real = _grid(self.start[indices], length, num_events)
    slots, mask = _grid(self.offsets[indices], count, num_candidates)
    shown = np.where(mask, self.events[slots], 0)
    first = np.zeros(num_rows, np.int64)
    first[:n] = self.events[self.offsets[indices]]
    start = np.zeros(num_rows, np.int64)
    start[:n] = self.start[indices]
    full = np.arange(num_rows) < n

    def take(source, index, keep):
      return np.where(keep, source[index], source.dtype.type(0))

    return RankingBatch(
      context={
        f.name: take(self.features[f.name], first, full) for f in self._context
      },
      history=History(
        features={
          f.name: take(self.features[f.name], events, real)
          for f in self.schema.history_features
        },
        length=length,
      ),
      candidates=Candidates(
        features={
          f.name: take(self._of_candidates(f.name, slots), np.s_[:], mask)
          for f in self.schema.item_features
        },
        visible=np.where(mask, self.visible[slots] - start[:, None], 0).astype(
          np.int32
        ),
        mask=mask,
      ),
      labels={
        name: take(y, shown, mask) for name, y in self.log.labels.items()
      },
      group=take(self.log.user, first, full),
    )


def collate(
  rows: Sequence[Row], *, num_rows: int, num_events: int, num_candidates: int
) -> RankingBatch:
  """Pads rows to one shape and stacks them.

  Args:
    rows: at most `num_rows`, at least one, all of one schema.
    num_rows: B; missing rows are empty: length 0, mask False, zeros.
    num_events: L, at least the longest history.
    num_candidates: C, at least the most candidates.

  Returns:
    The batch, padded with zeros at the end of each axis, in NumPy.

  Raises:
    ValueError: there is no row, or one does not fit.
  """
  if not rows:
    raise ValueError('rows is empty; there must be at least one')
  check_fits('rows', len(rows), num_rows, 'num_rows')
  length = np.zeros(num_rows, np.int32)
  length[: len(rows)] = [_size(r.history) for r in rows]
  group = np.zeros(num_rows, np.int32)
  group[: len(rows)] = [r.group for r in rows]
  mask = np.zeros((num_rows, num_candidates), bool)
  for b, row in enumerate(rows):
    check_fits('events', length[b], num_events, 'num_events')
    check_fits('candidates', len(row.visible), num_candidates, 'num_candidates')
    mask[b, : len(row.visible)] = True

  def stack(parts, width):
    out = np.zeros((num_rows, width), np.asarray(parts[0]).dtype)
    for b, part in enumerate(parts):
      out[b, : len(part)] = part
    return out

  def stack_all(field, width):
    return {
      name: stack([getattr(r, field)[name] for r in rows], width)
      for name in getattr(rows[0], field)
    }

  context = {
    name: np.concatenate(
      [
        np.stack([r.context[name] for r in rows]),
        np.zeros(num_rows - len(rows), np.asarray(rows[0].context[name]).dtype),
      ]
    )
    for name in rows[0].context
  }
  return RankingBatch(
    context=context,
    history=History(stack_all('history', num_events), length),
    candidates=Candidates(
      stack_all('candidates', num_candidates),
      stack([r.visible for r in rows], num_candidates),
      mask,
    ),
    labels=stack_all('labels', num_candidates),
    group=group,
  )


def check_fits(what: str, size, room: int, argument: str) -> None:
  """Raises a ValueError if `size` things do not fit into `room`."""
  if size > room:
    raise ValueError(
      f'{size} {what} do not fit into {argument}={room}; raise it, or '
      'shorten the row'
    )


def _size(features: dict[str, np.ndarray]) -> int:
  return len(next(iter(features.values())))


def _grid(start, count, width) -> tuple[np.ndarray, np.ndarray]:
  """Indices `[B, width]` from `start` on, and which of them are real."""
  offset = np.arange(width)[None]
  real = offset < count[:, None]
  begin = np.zeros(len(count), np.int64)
  begin[: len(start)] = start
  return np.where(real, begin[:, None] + offset, 0), real


def _check_choice(config, field: str, choices: tuple[str, ...]) -> None:
  value = getattr(config, field)
  if value not in choices:
    raise ValueError(f'rows: {field}={value!r} must be one of {choices}')
