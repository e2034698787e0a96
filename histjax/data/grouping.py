"""Which events become candidates of one row, and what each of them sees."""

from __future__ import annotations

import dataclasses
import fractions
import math
from typing import Literal

import numpy as np

from histjax import config as dicts
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
    dicts.normalize(self)
    if self.history_length is not None and self.history_length < 0:
      raise ValueError(
        f'rows: history_length={self.history_length} must be >= 0, or None'
      )
    if self.max_candidates is not None and self.max_candidates < 1:
      raise ValueError(
        f'rows: max_candidates={self.max_candidates} must be >= 1, or None'
      )
    if self.snapshot_every is not None and (
      self.kind != 'snapshot' or not 0 < self.snapshot_every < math.inf
    ):
      raise ValueError(
        f'rows: snapshot_every={self.snapshot_every} must be > 0 seconds and '
        f"finite, with kind='snapshot', which is {self.kind!r}; or None"
      )


def group_candidates(
  log: EventLog,
  events: np.ndarray,
  config: RowConfig,
  first_time: int | float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Groups candidates into rows.

  Args:
    log: all events.
    events: int64, the candidates, as indices of events.
    config: how.
    first_time: of all candidates, if `log` is a part of a larger one.

  Returns:
    `(events [c], offsets [rows + 1], visible [c])`: the candidates row by row,
    where each row begins, and the event after the last that each sees.

  Raises:
    ValueError: the log does not say what a request is, or `snapshot_every` is
      too small for its times.
  """
  visible = log.visible(config.ties)
  if config.kind == 'pointwise':
    return events, np.arange(len(events) + 1), visible[events]
  if config.kind == 'snapshot':
    events, taken, group = _snapshots(log, events, visible, config, first_time)
    visible = np.minimum(taken, visible[events])
  elif config.kind == 'streaming':
    group, visible = log.user[events].astype(np.int64), visible[events]
  else:
    group = _request(log, config)[events]
    order = np.argsort(group, kind='stable')
    events, group = events[order], group[order]
    visible = visible[events]
  first = np.flatnonzero(np.diff(group, prepend=-1))
  count = np.diff(np.append(first, len(events)))
  if config.kind == 'snapshot' and len(events):
    # One history, without any candidate's request that had begun before.
    visible = np.repeat(np.minimum.reduceat(visible, first), count)
  if config.max_candidates is None:
    return events, np.append(first, len(events)), visible
  pieces = -(-count // config.max_candidates)
  piece = np.arange(pieces.sum()) - np.repeat(
    np.cumsum(pieces) - pieces, pieces
  )
  starts = np.repeat(first, pieces) + piece * config.max_candidates
  return events, np.append(starts, len(events)), visible


def _snapshots(log, events, visible, config, first_time):
  """Candidates with each snapshot: events, where histories end, and groups."""
  user = log.user[events].astype(np.int64)
  if config.snapshot_every is None or not len(events):
    first = np.searchsorted(user, user)  # Users come in order.
    return events, visible[events[first]], user
  unit = 1e-9 if log.is_timestamp else log.schema.time_unit
  begin = log.time[events].min() if first_time is None else first_time
  period = _periods(log.time, begin, unit, config.snapshot_every)
  last = period[events].max()
  if not last < 2**53:
    raise ValueError(
      f'rows: snapshot_every={config.snapshot_every} gives {last:g} snapshots '
      'until the last candidate, more than are told apart; raise it'
    )
  # Others are as the next: no event is in between.
  numbers = np.unique(period[(period >= 0) & (period <= last)])
  parts = []
  later = None
  for place, number in reversed([*enumerate(numbers.tolist())]):
    before = np.bincount(log.user[period < number], minlength=log.num_users)
    taken = (log.offsets[:-1] + before)[user]
    due = period[events] >= number
    if later is not None:  # Candidates of later periods may have had it.
      due &= (period[events] == number) | (taken != later)
    parts.append((events[due], taken[due], place * log.num_users + user[due]))
    later = taken
  return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _periods(time, begin, unit: float, every: float) -> np.ndarray:
  """float64 `[n]`, `floor((time - begin) * unit / every)`, exactly.

  All are taken as the decimals that they are written as: 0.9 s are three
  periods of 0.3.
  """

  def exact(x):
    return fractions.Fraction(repr(x))

  times, place = np.unique(time, return_inverse=True)
  rate = exact(float(unit)) / exact(float(every))
  if times.dtype.kind == 'i':
    since, size = times - int(begin), max(map(abs, (times[0], times[-1])))
    if max(2 * int(size) * rate.numerator, rate.denominator) < 2**63:
      found = since * rate.numerator // rate.denominator
      return found.astype(np.float64)[place]
  with np.errstate(over='ignore', invalid='ignore'):
    near = (times - begin) * unit / every
    found = np.floor(near)
    # Rounded, it may be on the other side of a whole number.
    unsure = np.abs(near - np.rint(near)) <= 2.0**-48 * np.abs(near)
  for i in np.flatnonzero(unsure & (np.abs(near) < 2**53)):
    since = exact(times[i].item()) - exact(np.asarray(begin).item())
    found[i] = math.floor(since * rate)
  return found[place]


def _request(log, config) -> np.ndarray:
  """The first event of each event's request, int64 `[n]`."""
  if log.request is None and config.ties != 'strict':
    raise ValueError(
      "rows: kind='request' without a request column takes events of equal "
      "time as one request, which ties='order' would let see each other; set "
      "ties='strict', or name the column in Schema.request"
    )
  stop = log.visible(config.ties)
  if log.request is None:
    return stop  # Strict: the first event of the same time.
  # Not `stop`: with strict ties two requests of one time share it.
  return log.visible('order')


def check_overflow(log: EventLog, first, length, config: RowConfig) -> None:
  """Raises ValueError if a row's history is longer than it may be."""
  bad = np.flatnonzero(length > config.history_length)
  if bad.size:
    r = bad[0]
    raise ValueError(
      f'rows: user {log.key(first[r])!r} has {length[r]} events '
      f'before a candidate, more than history_length={config.history_length}; '
      "raise it, or set on_overflow='truncate' to keep the most recent"
    )


def check_context(log: EventLog, events, starts, config: RowConfig) -> None:
  """Raises ValueError if a row's candidates disagree on a context feature."""
  for feature in log.schema.context:
    values = log.features[feature.name][events]
    if not len(values):
      return
    low = np.minimum.reduceat(values, starts)
    bad = np.flatnonzero(low != np.maximum.reduceat(values, starts))
    if bad.size:
      user = log.key(events[starts[bad[0]]])
      raise ValueError(
        f'rows: context feature {feature.name!r} (column {feature.column!r}) '
        f'changes within a {config.kind} row of user {user!r}, which holds '
        "one value; move it to Schema.item, or use kind='pointwise'"
      )
