"""What a store knows of users, and what it counts."""

from __future__ import annotations

import dataclasses
import hashlib

from histjax import config as dicts
from histjax.data.past import Past

_OVERHEAD = 2048
"""Bytes of an entry besides its arrays, at most: objects, names, the key."""


@dataclasses.dataclass(frozen=True)
class StoreConfig:
  """How much is kept, and for how long.

  Attributes:
    device_bytes: of keys and values, allocated at once; free pages count.
    host_bytes: of what the host keeps of users' events.
    ttl: seconds after a user's last request; then all of it is dropped. None:
      for as long as there is room.
  """

  device_bytes: int = 1 << 28
  host_bytes: int = 1 << 28
  ttl: float | None = None

  def __post_init__(self):
    dicts.normalize(self)
    for field in ('device_bytes', 'host_bytes'):
      if getattr(self, field) < 0:
        raise ValueError(f'{field}={getattr(self, field)} must be at least 0')
    if self.ttl is not None and not self.ttl > 0:
      raise ValueError(f'ttl={self.ttl} must be > 0 seconds, or None')


@dataclasses.dataclass(frozen=True)
class State:
  """Which of a user's events are on the device: `[start, stop)`."""

  start: int
  stop: int

  @property
  def length(self) -> int:
    """The number of events."""
    return self.stop - self.start


class LostStateError(LookupError):
  """A state that was to be read is not there any more."""


@dataclasses.dataclass(frozen=True)
class Known:
  """What is known of a user.

  Attributes:
    past: the last events.
    digest: running, of all events.
    state: what is on the device; None: nothing.
  """

  past: Past
  digest: hashlib.blake2b
  state: State | None = None

  @property
  def nbytes(self) -> int:
    """Bytes of host memory."""
    return self.past.nbytes + _OVERHEAD


@dataclasses.dataclass
class Counts:
  """Since the store was made; seconds are the host's.

  Attributes:
    hits: requests whose state was used as it was.
    extends: whose state was extended by new events.
    misses: whose events were read from the first one needed.
    unknown: that were refused, since events before theirs are not known.
    evictions: states that lost their pages to others.
    forgotten: users who lost everything to others.
    expirations: users who were not seen for `StoreConfig.ttl`.
    refused: states that no room could be made for.
    foreign: states of another model that were not taken.
    rows_seconds: to check requests and make rows of them.
    get_seconds: to copy states out; where the device works on its own, to ask
      for it.
    put_seconds: to copy states in, or to ask for it.
    hit_seconds: to score from states, or to ask for it.
    extend_seconds: to read new events and score, or to ask for it.
    encode_seconds: to read histories and score, or to ask for it.
  """

  hits: int = 0
  extends: int = 0
  misses: int = 0
  unknown: int = 0
  evictions: int = 0
  forgotten: int = 0
  expirations: int = 0
  refused: int = 0
  foreign: int = 0
  rows_seconds: float = 0.0
  get_seconds: float = 0.0
  put_seconds: float = 0.0
  hit_seconds: float = 0.0
  extend_seconds: float = 0.0
  encode_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Update:
  """What becomes known of a user.

  Attributes:
    user: the canonical key.
    past: the user's events, as `Known` holds them.
    digest: of all of them, as `Known` holds it.
    state: that a program writes.
    same: how many events it begins with that are those of the state that the
      user has; 0: it does not read that.
  """

  user: str
  past: Past
  digest: hashlib.blake2b
  state: State
  same: int = 0

  @property
  def old(self) -> State:
    """The state that is read, of `same` events."""
    return State(self.state.start, self.state.start + self.same)
