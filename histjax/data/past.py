"""What is kept of one user's events, encoded: rows are made of it step by step.

A `Past` grows by new events and may drop old ones: what is computed of an event
when it comes (its features, derived ones included, and what was before it) is
kept with it and never computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from histjax.features import Events, Lookback, base
from histjax.schema import Schema


@dataclasses.dataclass(frozen=True, eq=False)
class Past:
  """The last events of a user, oldest first, as a model reads them.

  Attributes:
    first: how many earlier events there were, which are not here.
    time: `[n]`, as `EventLog.time`; zeros if nothing reads it.
    is_timestamp: the log has timestamps; None: there is no event yet.
    request: uint64 `[n]`, digests; None: not given.
    dropped: uint64, sorted, the requests that have no event here any more.
    visible: int64 `[n]`, the number of the user's events before each one's
      impression, as `EventLog.visible`.
    features: `{name: [n]}` of items, hidden ones included.
    actions: `{name: [n]}`; of `requests.make_row`, of visible events alone.
    labels: `{task: [n]}`, likewise; empty if nothing reads them.
    derived: `{name: [n]}`, each event's when it was shown.
  """

  first: int
  time: np.ndarray
  is_timestamp: bool | None
  request: np.ndarray | None
  dropped: np.ndarray
  visible: np.ndarray
  features: Mapping[str, np.ndarray]
  actions: Mapping[str, np.ndarray]
  labels: Mapping[str, np.ndarray]
  derived: Mapping[str, np.ndarray]

  def __len__(self) -> int:
    """The number of events here."""
    return len(self.time)

  @functools.cached_property
  def stop(self) -> int:
    """The number of all of the user's events."""
    return self.first + len(self)

  @property
  def nbytes(self) -> int:
    """Bytes of the arrays."""
    return sum(x.nbytes for x in self._arrays())

  def since(self, number: int) -> Past:
    """Without the events before `number`, counted from the user's first."""
    drop = max(0, number - self.first)
    if not drop:
      return self

    def cut(x):
      return x[drop:].copy()  # Not a view, which would keep all of it.

    past = self._mapped(cut, first=self.first + drop)
    if self.request is None or past.request is None:
      return past
    gone = np.setdiff1d(self.request[:drop], past.request)
    return dataclasses.replace(past, dropped=np.union1d(self.dropped, gone))

  def until(self, number: int) -> Past:
    """Without the events from `number` on."""
    keep = max(0, number - self.first)
    return self._mapped(lambda x: x[:keep], first=self.first)

  def history(self, start: int, stop: int) -> dict[str, np.ndarray]:
    """Features of the events `[start, stop)`, counted from the user's first."""
    here = slice(start - self.first, stop - self.first)
    values = {**self.features, **self.derived, **self.actions}
    return {name: x[here] for name, x in values.items()}

  def events(self, schema: Schema, user: np.ndarray) -> Events:
    """As derived features read them; `derived` is left out.

    Args:
      schema: what they mean.
      user: uint64 `[1]`, the digest of the user's key.
    """
    size = len(self)
    return Events(
      schema=schema,
      user=np.repeat(user, size),
      begin=np.zeros(size, np.int64),
      visible=np.maximum(self.visible - self.first, 0),
      time=self.time,
      is_timestamp=bool(self.is_timestamp),
      features=self.features,
      # Of events that nobody sees no outcome is read.
      labels={
        name: np.pad(x, (0, size - len(x))) for name, x in self.labels.items()
      },
    )

  def joined(self, new: Past) -> Past:
    """With new events behind; `visible` and `derived` as they stand."""
    request = None
    if new.request is not None and self.request is not None:
      request = np.concatenate([self.request, new.request])
    fields: dict[str, Any] = {}
    for name in ('features', 'actions', 'labels', 'derived'):
      a, b = getattr(self, name), getattr(new, name)
      fields[name] = {k: np.concatenate([a[k], b[k]]) for k in a if k in b}
    return Past(
      first=self.first,
      time=np.concatenate([self.time, new.time]),
      is_timestamp=new.is_timestamp if len(new) else self.is_timestamp,
      request=request,
      dropped=self.dropped,
      visible=np.concatenate([self.visible, new.visible]),
      **fields,
    )

  def first_difference(self, other: Past) -> int | None:
    """The number of the first event that both have and that differs."""
    start = max(self.first, other.first)
    stop = min(self.stop, other.stop)
    if stop <= start:
      return None
    a, b = (x.since(start).until(stop)._compared() for x in (self, other))
    same = np.ones(stop - start, bool)
    for name in a.keys() & b.keys():
      same &= a[name] == b[name]
    if same.all():
      return None
    return start + int(np.argmin(same))

  def update(self, digest: hashlib.blake2b) -> None:
    """Adds the events to a digest, the same in one step as in several."""
    if not len(self):
      return
    columns = [x for _, x in sorted(self._compared().items())]
    rows = [
      np.ascontiguousarray(x).view(np.uint8).reshape(len(self), -1)
      for x in columns
    ]
    digest.update(np.concatenate(rows, axis=1).tobytes())

  def _compared(self) -> dict[str, np.ndarray]:
    """What came of the log, `{name: [n]}`; types do not depend on a batch."""
    # A batch of whole times may have come as integers.
    is_whole = self.time.dtype.kind in 'iu'
    whole = self.time if is_whole else np.floor(self.time)
    found = {
      'time': whole.astype(np.int64),
      'time/fraction': np.asarray(self.time - whole, np.float64),
    }
    if self.request is not None:
      found['request'] = self.request
    for kind in ('features', 'actions', 'labels'):
      found |= {f'{kind}/{k}': x for k, x in getattr(self, kind).items()}
    return found

  def _arrays(self) -> list[np.ndarray]:
    found = [self.time, self.visible, self.dropped]
    found += [] if self.request is None else [self.request]
    for part in (self.features, self.actions, self.labels, self.derived):
      found += part.values()
    return found

  def _mapped(
    self, cut: Callable[[np.ndarray], np.ndarray], first: int
  ) -> Past:
    fields: dict[str, Any] = {
      name: {k: cut(x) for k, x in getattr(self, name).items()}
      for name in ('features', 'actions', 'labels', 'derived')
    }
    return Past(
      first=first,
      time=cut(self.time),
      is_timestamp=self.is_timestamp,
      request=None if self.request is None else cut(self.request),
      dropped=self.dropped,
      visible=cut(self.visible),
      **fields,
    )


def place(past: Past, old: int, ties: str) -> Past:
  """With `visible` of the events from place `old` on: what was before each.

  Args:
    past: whose last events have none yet.
    old: how many have.
    ties: as `RowConfig.ties`.
  """
  visible = past.visible.copy()
  visible[old:] = past.first + np.arange(old, len(past))
  if ties == 'strict':
    before = np.searchsorted(past.time, past.time[old:], 'left')
    visible[old:] = past.first + before
  if past.request is not None and len(past) > old:
    values, first = np.unique(past.request, return_index=True)
    # A request's events see what was before the first of them.
    own = first[np.searchsorted(values, past.request[old:])]
    visible[old:] = visible[own]
  return dataclasses.replace(past, visible=visible)


@dataclasses.dataclass(frozen=True)
class Reach:
  """How far back later rows read.

  Attributes:
    depth: events before an impression that its score depends on, through the
      encoder; None: all.
    lookback: of derived features; None: all.
    ties: as `RowConfig.ties`.
    time_unit: as `Schema.time_unit`.
  """

  depth: int | None
  lookback: Lookback | None
  ties: str
  time_unit: float

  def first_needed(self, past: Past) -> int:
    """The first event to keep for impressions that come next.

    They are of the last event's request or of a new one; for one of an older
    request, `lacks` says whether what is kept is enough.

    Args:
      past: of the user.

    Returns:
      Its number, counted from the user's first.
    """
    if self.depth is None or not len(past):
      return past.first
    last = past.stop
    if self.ties == 'strict':  # The next event may have the time of the last.
      place = np.searchsorted(past.time, past.time[-1], 'left')
      last = past.first + int(place)
    if past.request is not None:
      last = min(last, int(past.visible[-1]))
    needed = min(self._needed(past, last, past.time[-1]), last - self.depth)
    return max(needed, past.first)

  def lacks(
    self,
    past: Past,
    visible: np.ndarray,
    time: np.ndarray,
    request: np.ndarray | None,
  ) -> bool:
    """Whether derived features of impressions read events that were dropped.

    Args:
      past: of the user.
      visible: `[c]`, the events before each.
      time: `[c]`.
      request: `[c]`, digests; None: not given.
    """
    if not past.first or not len(visible):
      return False
    if request is not None and len(past.dropped):
      if np.isin(request, past.dropped).any():
        return True
    return self._needed(past, int(visible.min()), time.min()) < past.first

  def _needed(self, past: Past, visible: int, time: Any) -> int:
    """The first event that derived features read of so many before `time`."""
    if self.lookback is None:
      return 0
    needed = visible - max(self.lookback.events, 1)
    if self.lookback.seconds:
      unit = 1e-9 if past.is_timestamp else self.time_unit
      oldest = base.before(np.asarray(time), self.lookback.seconds, unit)
      since = int(np.searchsorted(past.time, oldest, 'left'))
      # One more, whose time tells that there is no other.
      needed = min(needed, past.first + since - 1)
    return max(needed, 0)
