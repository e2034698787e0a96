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
  visible = log.visible(config.ties)
  events, offsets = _group(log, np.flatnonzero(mask), config)
  starts = offsets[:-1]
  visible = visible[events]
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
  features = dict(log.features)
  if log.schema.time_gap_buckets:
    features['time_gap'] = log.time_gap(config.ties)
  if config.kind != 'pointwise':
    _check_context(log, events, starts, config)
  return Rows(log, config, features, events, offsets, start, stop, visible)


def _group(log, events, config) -> tuple[np.ndarray, np.ndarray]:
  """Candidates in the order of rows, and each row's first, `[rows + 1]`."""
  if config.kind == 'pointwise':
    return events, np.arange(len(events) + 1)
  if config.kind == 'streaming':
    group = log.user[events].astype(np.int64)
  else:
    group = _request(log, config)[events]
    order = np.argsort(group, kind='stable')
    events, group = events[order], group[order]
  first = np.flatnonzero(np.diff(group, prepend=-1))
  if config.max_candidates is None:
    return events, np.append(first, len(events))
  count = np.diff(np.append(first, len(events)))
  pieces = -(-count // config.max_candidates)
  piece = np.arange(pieces.sum()) - np.repeat(
    np.cumsum(pieces) - pieces, pieces
  )
  starts = np.repeat(first, pieces) + piece * config.max_candidates
  return events, np.append(starts, len(events))


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
