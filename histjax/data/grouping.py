"""Which events become candidates of one row, and what history it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from histjax.data.rows import RowConfig, Rows

if TYPE_CHECKING:
  from histjax.data.events import EventLog


def make_rows(log: EventLog, mask: np.ndarray, config: RowConfig) -> Rows:
  """Rows of the events of `mask`; see `EventLog.rows`."""
  mask = np.asarray(mask)
  if mask.dtype != bool or mask.shape != (len(log),):
    raise ValueError(
      f'mask is {mask.dtype}{list(mask.shape)}; it must be bool [{len(log)}], '
      'one for each event of the log'
    )
  events, offsets, visible = _group(log, np.flatnonzero(mask), config)
  starts = offsets[:-1]
  if len(events):
    least = np.minimum.reduceat(visible, starts)
    stop = np.maximum.reduceat(visible, starts)
  else:
    least = stop = np.zeros(0, np.int64)
  start = log.offsets[log.user[events[starts]]]
  if config.history_length is not None:
    if config.on_overflow == 'error':
      _check_overflow(log, events[starts], least - start, config)
    start = np.maximum(start, least - config.history_length)
  features, seen = dict(log.features), {}
  if log.schema.time_gap_buckets:
    features['time_gap'] = log.time_gap(config.ties)
    seen['time_gap'] = log.time_gap_of(events, visible)
  if log.schema.history_rates:
    every, past = np.arange(len(log)), log.visible(config.ties)
    begin = log.offsets[log.user]
    if config.history_length is not None:
      begin = np.maximum(begin, past - config.history_length)
    features |= log.history_rates(every, begin, past)
    begin = np.repeat(start, np.diff(offsets))
    seen |= log.history_rates(events, begin, visible)
  if config.kind != 'pointwise':
    _check_context(log, events, starts, config)
  return Rows(
    log, config, features, events, offsets, start, stop, visible, seen
  )


def _group(log, events, config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Candidates in the order of rows, each row's first `[rows + 1]`, visible."""
  visible = log.visible(config.ties)
  if config.kind == 'pointwise':
    return events, np.arange(len(events) + 1), visible[events]
  if config.kind == 'snapshot':
    events, taken, group = _snapshots(log, events, visible, config)
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


def _snapshots(log, events, visible, config):
  """Candidates with each snapshot: events, where histories end, and groups."""
  user = log.user[events].astype(np.int64)
  if config.snapshot_every is None or not len(events):
    first = np.searchsorted(user, user)  # Users come in order.
    return events, visible[events[first]], user
  unit = 1e-9 if log.is_timestamp else log.schema.time_unit
  begin = log.time[events].min()
  period = np.floor((log.time - begin) * unit / config.snapshot_every)
  period = period.astype(np.int64)
  parts = []
  later = None
  for number in range(int(period[events].max()), -1, -1):
    before = np.bincount(log.user[period < number], minlength=log.num_users)
    taken = (log.offsets[:-1] + before)[user]
    due = period[events] >= number
    if later is not None:  # Candidates of later periods may have had it.
      due &= (period[events] == number) | (taken != later)
    parts.append((events[due], taken[due], number * log.num_users + user[due]))
    later = taken
  return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


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


def _check_overflow(log, first, length, config) -> None:
  bad = np.flatnonzero(length > config.history_length)
  if bad.size:
    r = bad[0]
    raise ValueError(
      f'rows: user {log.key(first[r])!r} has {length[r]} events '
      f'before a candidate, more than history_length={config.history_length}; '
      "raise it, or set on_overflow='truncate' to keep the most recent"
    )


def _check_context(log, events, starts, config) -> None:
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
