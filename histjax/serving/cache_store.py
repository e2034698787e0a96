"""The states of users between their requests: device pages, host tails.

What is kept of a user is in two places:

* on the host the last events, encoded (`histjax.data.past.Past`), as far back
  as a later row can read, a running digest of all events, and their number:
  tens of bytes an event;
* on the device the keys and values of those events, kilobytes an event, in
  pages of one allocation.

Both have a budget in bytes that is never exceeded, and the least recently used
go first. Who loses the pages alone is read again from the tail, without the
client: the tail is the store's second tier. A tier of keys and values in host
memory is left out, since it would lose: at 45 GiB/s the states of 32 users take
0.7 ms to come back (L 512, D 128, 4 layers, bfloat16) and 2.8 ms (L 1024,
D 256), and reading their events again 0.22 and 0.92 ms on an H200. Of a layer a
copy moves `4 L D` bytes and reading computes some `24 L D^2` operations, so it
takes `D > operations per second / (6 bytes per second)` for a copy to win: 1000
at 300 TFLOP/s. `CacheStore.cheaper` says it of the machine at hand.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import jax
import numpy as np

from histjax.cache import CacheInfo, HistoryCache, info_of
from histjax.data.past import Past
from histjax.models.ranker import RankerConfig
from histjax.quantization import Quantized
from histjax.scoring import pages as pages_lib
from histjax.scoring.config import ScorerConfig
from histjax.scoring.paged import Place, Pool
from histjax.serving import pages

T = TypeVar('T')
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
    get_seconds: to copy states out; where the device works on its own, to ask
      for it.
    put_seconds: to copy states in, likewise.
    hit_seconds: to score from states, likewise.
    extend_seconds: to read new events and score, likewise.
    encode_seconds: to read histories and score, likewise.
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
    past: as `Known`.
    digest: likewise.
    state: that a program writes.
    same: how many events it begins with that are those of the state that the
      user has; 0: it does not read that.
  """

  user: str
  past: Past
  digest: hashlib.blake2b
  state: State
  same: int = 0


class _Entry:
  """Of a user: `Known`, the state's pages, and when it was last used."""

  def __init__(self, known: Known, used: float):
    self.known, self.used = known, used
    self.pages: list[int] = []


class CacheStore:
  """Users' states, of one model at a time. Thread-safe.

  A state is copied out when it is used, so nothing that happens in the store
  afterwards changes a request that runs.

  Attributes:
    counts: what happened; add to it under no lock but the caller's own.
  """

  def __init__(
    self,
    config: RankerConfig,
    fingerprint: str,
    options: StoreConfig,
    scorer_config: ScorerConfig | None = None,
    *,
    device: jax.Device | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Allocates the pages.

    Args:
      config: of the model.
      fingerprint: `Scorer.fingerprint`.
      options: how much is kept.
      scorer_config: of the scorer, whose buckets caches are padded to.
      device: where the pages are; None: JAX's default device.
      clock: in seconds; for tests.

    Raises:
      ValueError: the budget does not hold two pages of events.
    """
    self.options = options
    self.counts = Counts()
    self._scorer_config = scorer_config or ScorerConfig()
    self._device, self._clock = device, clock
    self._lock = threading.RLock()
    self._entries: collections.OrderedDict[str, _Entry] = (
      collections.OrderedDict()
    )
    self._host_bytes = 0
    self._seconds: dict[tuple[str, int], float] = {}
    self._fingerprint = fingerprint
    self._pages = self._allocate(config)

  @property
  def fingerprint(self) -> str:
    """Of the model whose states are kept."""
    return self._fingerprint

  @property
  def device_bytes(self) -> int:
    """Bytes of all pages, free ones included."""
    return self._pages.nbytes

  @property
  def used_bytes(self) -> int:
    """Bytes of the pages that hold states."""
    used = self._pages.num_pages - 1 - self._pages.num_free
    return used * self._pages.shape.nbytes

  @property
  def host_bytes(self) -> int:
    """Bytes that the host keeps of users' events."""
    return self._host_bytes

  @property
  def max_events(self) -> int:
    """The longest state that there is room for if it is the only one."""
    return (self._pages.num_pages - 1) * pages_lib.EVENTS

  def __len__(self) -> int:
    """The number of users of whom something is kept."""
    with self._lock:
      return len(self._entries)

  @property
  def num_states(self) -> int:
    """The number of users who have a state on the device."""
    with self._lock:
      return sum(x.known.state is not None for x in self._entries.values())

  def find(self, user: str) -> Known | None:
    """What is known of a user, who was seen just now."""
    with self._lock:
      self._expire()
      entry = self._entries.get(user)
      if entry is None:
        return None
      self._touch(user, entry)
      return entry.known

  def keep(self, user: str, past: Past, digest: hashlib.blake2b) -> None:
    """Keeps a user's events; the state on the device stays as it is.

    Others are forgotten to make room; if all of them would not do, this one is.
    """
    with self._lock:
      self._expire()
      entry = self._entries.get(user)
      if entry is None:
        entry = _Entry(Known(past, digest), self._clock())
        self._entries[user] = entry
      else:
        self._host_bytes -= entry.known.nbytes
        entry.known = Known(past, digest, entry.known.state)
      self._touch(user, entry)
      self._host_bytes += entry.known.nbytes
      while self._host_bytes > self.options.host_bytes:
        self._forget(next(iter(self._entries)))
        self.counts.forgotten += 1

  def get(
    self, users: Sequence[str], fingerprint: str, capacity: int | None = None
  ) -> tuple[list[int], HistoryCache | None]:
    """Copies states out; one program for each bucket of rows and of events.

    Args:
      users: at least one.
      fingerprint: of the model that asks; of another one nothing is found.
      capacity: of the cache, a bucket; longer states are not found. None: that
        of the longest state.

    Returns:
      Which of the users have a state, as indices, and the cache with theirs,
      in that order; None if there are none.
    """
    begin = time.perf_counter()
    with self._lock:
      self._expire()
      found, states, pages = [], [], []
      for i, user in enumerate(users):
        entry = self._entries.get(user)
        if entry is None or fingerprint != self._fingerprint:
          continue
        state = entry.known.state
        if state is None or (capacity is not None and state.length > capacity):
          continue
        self._touch(user, entry)
        found.append(i)
        states.append(state)
        pages.append(entry.pages)
      if not found:
        return [], None
      length = np.array([x.length for x in states], np.int32)
      length.setflags(write=False)
      capacity = capacity or self._scorer_config.events(int(length.max()))
      rows = self._scorer_config.rows(len(found))
      index = self._pages.to_read(pages, rows, capacity)
      keys, values = self._pages.read(index, capacity)
      self.counts.get_seconds += time.perf_counter() - begin
    info = CacheInfo(length, fingerprint, self._scorer_config.row_buckets)
    return found, HistoryCache.of_users(keys, values, info)

  def put(
    self,
    users: Sequence[str],
    cache: HistoryCache,
    start: Sequence[int],
    same: Sequence[int] | None = None,
  ) -> list[bool]:
    """Copies states in, in place; other users' states make room.

    Args:
      users: of the cache, each once; `keep` has been given their events.
      cache: their states.
      start: the number of the first event of each state.
      same: how many events each state begins with that are those of the state
        that the user has here; None: it is not known.

    Returns:
      Of each user, whether the state is kept: not if it is of another model
      than the store's, or finds no room.

    Raises:
      ValueError: no `Scorer` made the cache, or it is not of so many users.
    """
    info = info_of(cache)
    if len(users) != info.num_users or len(set(users)) < len(users):
      raise ValueError(
        f'put was given {len(users)} users, {len(set(users))} of them '
        f'different, and a cache of {info.num_users}; give each user once'
      )
    pool = self._pages.pool
    if isinstance(cache.keys, Quantized) != isinstance(pool.keys, Quantized):
      raise ValueError(
        'the cache is quantized and the store is not, or the other way round; '
        'give both one ScorerConfig.cache_dtype'
      )
    begin = time.perf_counter()
    with self._lock:
      self._expire()
      if info.fingerprint != self._fingerprint:
        self.counts.foreign += len(users)
        return [False] * len(users)
      states = [
        State(first, first + length)
        for first, length in zip(start, info.length.tolist(), strict=True)
      ]
      same = same or [0] * len(users)
      pages = self._place_all(users, states, same)
      index = self._pages.to_write(
        pages,
        [keep // pages_lib.EVENTS for keep in same],
        cache.num_rows,
        cache.capacity,
      )
      with self._guard(users):
        self._pages.write(index, cache.keys, cache.values)
      self.counts.put_seconds += time.perf_counter() - begin
      return [
        self._has(u, state) for u, state in zip(users, states, strict=True)
      ]

  def use(
    self,
    users: Sequence[str],
    capacity: int,
    program: Callable[[Pool, Place], T],
  ) -> T:
    """Runs a program that reads states where they are.

    Args:
      users: who have states, as `states` says.
      capacity: a bucket that holds each.
      program: called with the pool and the places, rows padded.
    """
    with self._lock:
      entries = [self._entries[user] for user in users]
      for user, entry in zip(users, entries, strict=True):
        self._touch(user, entry)
      return program(
        self._pages.pool, self._read_place(entries, capacity, None)
      )

  def update(
    self,
    updates: Sequence[Update],
    capacity: int,
    program: Callable[[Pool, Place], tuple[Pool, T]],
  ) -> T:
    """Keeps what becomes known of users, and runs a program that writes states.

    Args:
      updates: of users, each once.
      capacity: a bucket that holds each state.
      program: called with the pool, which it donates, and the places, rows
        padded; returns the pool that takes its place.

    Raises:
      Exception: the program's own; then all states are lost.
    """
    with self._lock:
      old = [self._entries.get(update.user) for update in updates]
      place = self._read_place(
        [x if u.same else None for u, x in zip(updates, old, strict=True)],
        capacity,
        [u.same for u in updates],
      )
      for update in updates:
        self.keep(update.user, update.past, update.digest)
      pages = self._place_all(
        [u.user for u in updates],
        [u.state for u in updates],
        [u.same for u in updates],
      )
      write = self._pages.to_write(
        pages,
        [u.same // pages_lib.EVENTS for u in updates],
        len(place.read),
        capacity,
      )
      with self._guard([u.user for u in updates]):
        self._pages.pool, result = program(
          self._pages.pool, place._replace(write=write)
        )
      return result

  def states(
    self, users: Sequence[str], fingerprint: str
  ) -> list[State | None]:
    """Of each user the state of this model, if there is one."""
    with self._lock:
      self._expire()
      if fingerprint != self._fingerprint:
        return [None] * len(users)
      found = [self._entries.get(user) for user in users]
      return [None if x is None else x.known.state for x in found]

  def drop(self, user: str) -> None:
    """Drops the state on the device; what the host keeps stays."""
    with self._lock:
      if user in self._entries:
        self._release(self._entries[user])

  def forget(self, user: str) -> None:
    """Drops everything of a user."""
    with self._lock:
      if user in self._entries:
        self._forget(user)

  def roll_over(
    self, config: RankerConfig, fingerprint: str, *, keep_events: bool
  ) -> None:
    """Drops all states; from now on those of another model are kept.

    Args:
      config: of the other model.
      fingerprint: likewise.
      keep_events: what the host keeps means the same to the other model.
    """
    with self._lock:
      for entry in self._entries.values():
        self._release(entry)
      if not keep_events:
        self._entries.clear()
        self._host_bytes = 0
      self._fingerprint = fingerprint
      self._seconds.clear()
      if pages.Shape.of(config, self._scorer_config) != self._pages.shape:
        self._pages.delete()  # Before the new one: the budget holds one.
        self._pages = self._allocate(config)

  def measured(
    self, what: Literal['encode', 'copy'], capacity: int, seconds: float
  ) -> None:
    """Notes what one state of a bucket took, waited for; the least counts."""
    key = what, capacity
    with self._lock:
      self._seconds[key] = min(seconds, self._seconds.get(key, seconds))

  def measure_copy(self, capacity: int) -> float:
    """Seconds to copy a state of a bucket from host memory to the device."""
    with self._lock:
      index = self._pages.to_read([], self._scorer_config.rows(1), capacity)
      copied = self._pages.read(index, capacity)
      sharding = jax.tree.leaves(copied)[0].sharding
    host = jax.device_get(copied)
    begin = time.perf_counter()
    jax.block_until_ready(jax.device_put(host, sharding))
    seconds = time.perf_counter() - begin
    self.measured('copy', capacity, seconds)
    return seconds

  def cheaper(self, capacity: int) -> Literal['encode', 'copy']:
    """Whether reading a history again beats a copy from host memory.

    Args:
      capacity: a bucket that both were measured for, as `Engine.warm_up` does.

    Raises:
      ValueError: one was not.
    """
    found = [self._seconds.get((what, capacity)) for what in ('encode', 'copy')]
    encode, copy = found
    if encode is None or copy is None:
      raise ValueError(
        f'capacity={capacity}: measured were {sorted(self._seconds)}; measure '
        'both (Engine.warm_up does)'
      )
    return 'encode' if encode <= copy else 'copy'

  def warm_up(self, rows: Sequence[int], capacities: Sequence[int]) -> None:
    """Compiles `get` and `put` for these buckets."""
    with self._lock, self._guard():
      for number in rows:
        for capacity in capacities:
          index = self._pages.to_read([], number, capacity)
          keys, values = self._pages.read(index, capacity)
          index = self._pages.to_write([], [], number, capacity)
          self._pages.write(index, keys, values)

  def warm_up_programs(self, program: Callable[[Pool], tuple[Pool, T]]) -> T:
    """Runs what compiles programs over the pool, which it donates."""
    with self._lock, self._guard():
      self._pages.pool, result = program(self._pages.pool)
      return result

  def _allocate(self, config: RankerConfig) -> pages.Pages:
    shape = pages.Shape.of(config, self._scorer_config)
    number = self.options.device_bytes // shape.nbytes
    if number < 2:
      raise ValueError(
        f'device_bytes={self.options.device_bytes} must hold at least two '
        f'pages of {shape.nbytes} bytes'
      )
    return pages.Pages(shape, number, self._device)

  @contextlib.contextmanager
  def _guard(self, users: Sequence[str] = ()) -> Iterator[None]:
    """Around what writes states of users and donates the pool.

    If it fails they have none; if it took the pool's memory, nobody has.
    """
    try:
      yield
    except BaseException:
      lost = self._pages.pool.keys.is_deleted()
      for user in [*self._entries] if lost else users:
        if user in self._entries:
          self._release(self._entries[user])
      if lost:
        self._pages.reset()
      raise

  def _read_place(
    self,
    entries: Sequence[_Entry | None],
    capacity: int,
    lengths: Sequence[int] | None,
  ) -> Place:
    """Where the states of entries are, rows padded."""
    if lengths is None:
      lengths = [
        0 if x is None or x.known.state is None else x.known.state.length
        for x in entries
      ]
    rows = self._scorer_config.rows(len(entries))
    read = self._pages.to_read(
      [[] if x is None else x.pages for x in entries], rows, capacity
    )
    return Place(read, read, np.array(lengths, np.int32), capacity)

  def _place_all(
    self,
    users: Sequence[str],
    states: Sequence[State],
    same: Sequence[int],
  ) -> list[list[int]]:
    """Pages for states, those that users have among them; none: no room."""
    busy = set(users)
    return [
      self._place(user, state, keep, busy)
      for user, state, keep in zip(users, states, same, strict=True)
    ]

  def _has(self, user: str, state: State) -> bool:
    entry = self._entries.get(user)
    return entry is not None and entry.known.state == state

  def _place(
    self, user: str, state: State, same: int, busy: set[str]
  ) -> list[int]:
    """Pages for a state, those it has among them; none if there is no room."""
    entry = self._entries.get(user)
    if entry is None:  # Forgotten meanwhile.
      self.counts.refused += 1
      return []
    old = entry.known.state
    if old is not None and not (same and old.start == state.start):
      if same:
        raise ValueError(
          f'same={same}, but the state of user {user!r} begins with event '
          f'{old.start} and not {state.start}'
        )
    wanted = pages_lib.number(state.length)
    surplus = entry.pages[wanted:]
    self._pages.give(surplus)
    del entry.pages[wanted:]
    missing = wanted - len(entry.pages)
    if missing > self._pages.num_free:
      for other in self._victims(busy, missing - self._pages.num_free):
        self._release(other)
        self.counts.evictions += 1
    if missing > self._pages.num_free:
      self._release(entry)
      self.counts.refused += 1
      return []
    entry.pages += self._pages.take(missing)
    entry.known = dataclasses.replace(entry.known, state=state)
    return entry.pages

  def _victims(self, busy: set[str], missing: int) -> list[_Entry]:
    """Whose pages make room, the least recently used first; none if too few."""
    found, pages = [], 0
    for user, entry in self._entries.items():
      if pages >= missing:
        break
      if user not in busy and entry.pages:
        found.append(entry)
        pages += len(entry.pages)
    return found if pages >= missing else []

  def _release(self, entry: _Entry) -> None:
    self._pages.give(entry.pages)
    entry.pages = []
    entry.known = dataclasses.replace(entry.known, state=None)

  def _forget(self, user: str) -> None:
    entry = self._entries.pop(user)
    self._release(entry)
    self._host_bytes -= entry.known.nbytes

  def _touch(self, user: str, entry: _Entry) -> None:
    entry.used = self._clock()
    self._entries.move_to_end(user)

  def _expire(self) -> None:
    """Forgets who was not seen for too long; they are the first entries."""
    if self.options.ttl is None:
      return
    limit = self._clock() - self.options.ttl
    for user in list(self._expired(limit)):
      self._forget(user)
      self.counts.expirations += 1

  def _expired(self, limit: float) -> Iterator[str]:
    for user, entry in self._entries.items():
      if entry.used > limit:
        return
      yield user
