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

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import jax
import numpy as np

from histjax.cache import CacheInfo, HistoryCache, info_of
from histjax.data.past import Past
from histjax.models.ranker import RankerConfig
from histjax.quantization import Quantized
from histjax.scoring import pages as scoring_pages
from histjax.scoring.config import ScorerConfig
from histjax.scoring.paged import Place, Pool
from histjax.scoring.pages import EVENTS
from histjax.serving import pages as pages_lib
from histjax.serving.entries import Entries, Entry
from histjax.serving.known import (
  Counts,
  Known,
  LostStateError,
  State,
  StoreConfig,
  Update,
)

__all__ = [
  'CacheStore',
  'Counts',
  'Known',
  'LostStateError',
  'State',
  'StoreConfig',
  'Update',
]

T = TypeVar('T')

_NOWHERE = np.zeros((0, 0), np.int32)


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
      ValueError: the budget does not hold two pages of events, or the device
        does not hold the budget.
    """
    self.options = options
    self.counts = Counts()
    self._scorer_config = scorer_config or ScorerConfig()
    self._device = device
    self._lock = threading.RLock()
    self._seconds: dict[tuple[str, int], float] = {}
    self._fingerprint, self._config = fingerprint, config
    self._entries = Entries(options, self._allocate(config), self.counts, clock)

  @property
  def _pages(self) -> pages_lib.Pages:
    return self._entries.pages

  @property
  def fingerprint(self) -> str:
    """Of the model whose states are kept."""
    return self._fingerprint

  @property
  def device_bytes(self) -> int:
    """Bytes of all pages, free ones included."""
    return self._pages.nbytes

  @property
  def num_pages(self) -> int:
    """Pages for states, free ones included."""
    return self._pages.num_pages - 1

  @property
  def used_bytes(self) -> int:
    """Bytes of the pages that hold states."""
    used = self.num_pages - self._pages.num_free
    return used * self._pages.shape.nbytes

  @property
  def host_bytes(self) -> int:
    """Bytes that the host keeps of users' events."""
    return self._entries.host_bytes

  @property
  def max_events(self) -> int:
    """The longest state that there is room for if it is the only one."""
    return self.num_pages * EVENTS

  def __len__(self) -> int:
    """The number of users of whom something is kept."""
    return len(self._entries)  # As all counts: nobody waits for a program.

  @property
  def num_states(self) -> int:
    """The number of users who have a state on the device."""
    return self._entries.num_states

  def find(self, user: str) -> Known | None:
    """What is known of a user, who was seen just now."""
    with self._lock:
      self._entries.expire()
      entry = self._entries.get(user)
      return None if entry is None else self._entries.touch(user).known

  def keep(self, user: str, past: Past, digest: hashlib.blake2b) -> None:
    """Keeps a user's events; the state on the device stays as it is.

    Others are forgotten to make room; if all of them would not do, this one is.
    """
    with self._lock:
      self._entries.expire()
      self._entries.keep(user, past, digest)

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
      self._entries.expire()
      found, states, taken = [], [], []
      for i, user in enumerate(users):
        entry = self._entries.get(user)
        if entry is None or fingerprint != self._fingerprint:
          continue
        state = entry.known.state
        if state is None or (capacity is not None and state.length > capacity):
          continue
        self._entries.touch(user)
        found.append(i)
        states.append(state)
        taken.append(entry.pages)
      if not found:
        return [], None
      length = np.array([x.length for x in states], np.int32)
      length.setflags(write=False)
      capacity = capacity or self._scorer_config.events(int(length.max()))
      rows = self._scorer_config.rows(len(found))
      index = self._pages.to_read(taken, rows, capacity)
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
      self._entries.expire()
      if info.fingerprint != self._fingerprint:
        self.counts.foreign += len(users)
        return [False] * len(users)
      states = [
        State(first, first + length)
        for first, length in zip(start, info.length.tolist(), strict=True)
      ]
      same = same or [0] * len(users)
      places = self._entries.place(users, states, same)
      index = self._pages.to_write(*places, cache.num_rows, cache.capacity)
      with self._guard(users):
        self._pages.write(index, cache.keys, cache.values)
      self.counts.put_seconds += time.perf_counter() - begin
      return [
        self._has(u, state) for u, state in zip(users, states, strict=True)
      ]

  def use(
    self,
    states: Mapping[str, State],
    capacity: int,
    program: Callable[[Pool, Place], T],
  ) -> T:
    """Runs a program that reads states where they are.

    Args:
      states: of each user that which is wanted.
      capacity: a bucket that holds each.
      program: called with the pool and the places, rows padded.

    Raises:
      LostStateError: a user has another one, or none; nothing was run.
    """
    with self._lock:
      pages = [self._holding(u, x).pages for u, x in states.items()]
      for user in states:
        self._entries.touch(user)
      lengths = [state.stop - state.start for state in states.values()]
      return program(self._pages.pool, self._to_read(pages, lengths, capacity))

  def update(
    self,
    updates: Sequence[Update],
    capacity: int,
    program: Callable[[Pool, Place], tuple[Pool, T]],
  ) -> T:
    """Keeps what becomes known of users, and runs a program that writes states.

    Of a state that is extended it writes the pages of new events alone. One
    that the host's budget for events does not leave in place has none after it.

    Args:
      updates: of users, each once.
      capacity: a bucket that holds each state.
      program: called with the pool, which it donates, and the places, rows
        padded; returns the pool that takes its place.

    Raises:
      LostStateError: a state that is to be read is not there; nothing was run.
      Exception: the program's own; then these states are lost, or all if it
        took the pool's memory.
    """
    with self._lock:
      self._entries.expire()
      # Before anybody makes room: a program reads all before it writes.
      place = self._to_read(
        [self._holding(x.user, x.old).pages if x.same else [] for x in updates],
        [x.same for x in updates],
        capacity,
      )
      for x in updates:
        self._entries.keep(x.user, x.past, x.digest)
      places = self._entries.place(
        [x.user for x in updates],
        [x.state for x in updates],
        [x.same for x in updates],
        whole=False,
      )
      write = self._pages.to_write(*places, len(place.read), capacity)
      with self._guard([x.user for x in updates]):
        self._pages.pool, result = program(
          self._pages.pool, place._replace(write=write)
        )
      return result

  def states(
    self, users: Sequence[str], fingerprint: str
  ) -> list[State | None]:
    """Of each user the state of this model, if there is one."""
    with self._lock:
      self._entries.expire()
      if fingerprint != self._fingerprint:
        return [None] * len(users)
      found = [self._entries.get(user) for user in users]
      return [None if x is None else x.known.state for x in found]

  def drop(self, user: str) -> None:
    """Drops the state on the device; what the host keeps stays."""
    with self._lock:
      if self._entries.get(user) is not None:
        self._entries.release(user)

  def forget(self, user: str) -> None:
    """Drops everything of a user."""
    with self._lock:
      if self._entries.get(user) is not None:
        self._entries.forget(user)

  def roll_over(
    self,
    config: RankerConfig,
    fingerprint: str,
    *,
    keep_events: bool,
    scorer_config: ScorerConfig | None = None,
    warm_up: Callable[[], object] | None = None,
  ) -> None:
    """Drops all states; from now on those of another model are kept.

    Args:
      config: of the other model.
      fingerprint: of its config and parameters; see `Scorer.fingerprint`.
      keep_events: what the host keeps means the same to the other model.
      scorer_config: of its scorer; None: as before.
      warm_up: called once its pages are there, under the store's lock.

    Raises:
      ValueError: the budget does not hold two of its pages; nothing changed.
      Exception: of the device, which has no memory, or of `warm_up`. The store
        is of the model that it was of; users' events are kept, and the states,
        too, unless the other model's pages are of another shape.
    """
    scorer_config = scorer_config or self._scorer_config
    shape = pages_lib.Shape.of(config, scorer_config)
    number = self._number(shape)
    with self._lock:
      pages = self._pages
      before = self._config, self._scorer_config, self._seconds
      if (config, scorer_config) != before[:2]:
        self._seconds = {}  # Of programs that are not used any more.
      self._config, self._scorer_config = config, scorer_config
      try:
        if shape != pages.shape:
          for user in self._entries:
            self._entries.release(user)
          pages.delete()  # Before the new ones: the budget holds no two.
          self._entries.pages = pages_lib.Pages(shape, number, self._device)
        if warm_up is not None:
          warm_up()
      except BaseException:
        self._config, self._scorer_config, self._seconds = before
        if shape != pages.shape:
          self._pages.delete()
          self._entries.pages = pages
          pages.reset()
        raise
      self._fingerprint = fingerprint
      for user in self._entries:
        if keep_events:
          self._entries.release(user)
        else:
          self._entries.forget(user)

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

  def check_room(self, capacity: int) -> None:
    """Raises a ValueError if no state of so many events can ever be kept."""
    needed = scoring_pages.number(capacity)
    nbytes = self._pages.shape.nbytes
    if needed > self.num_pages:
      least = (needed + 1) * nbytes
      raise ValueError(
        f'a state of {capacity} events takes {needed} pages of {nbytes} bytes, '
        f'and the store has {self.num_pages}; raise device_bytes to {least} '
        f'(--store_mib={-(-least >> 20)}), or serve shorter histories '
        '(--warm_up)'
      )

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

  def _allocate(self, config: RankerConfig) -> pages_lib.Pages:
    shape = pages_lib.Shape.of(config, self._scorer_config)
    number = self._number(shape)
    try:
      return pages_lib.Pages(shape, number, self._device)
    except RuntimeError as error:  # JAX's has no type of its own for it.
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise ValueError(
        f'device_bytes={self.options.device_bytes} are more than the device '
        'has free; lower it (--store_mib)'
      ) from error

  def _number(self, shape: pages_lib.Shape) -> int:
    """Of pages that the budget holds."""
    number = self.options.device_bytes // shape.nbytes
    if number < 2:
      raise ValueError(
        f'device_bytes={self.options.device_bytes} must hold at least two '
        f'pages of {shape.nbytes} bytes; raise it (--store_mib)'
      )
    return number

  @contextlib.contextmanager
  def _guard(self, users: Sequence[str] = ()) -> Iterator[None]:
    """Around what writes states of users and donates the pool.

    If it fails they have none; if it took the pool's memory, nobody has.
    """
    try:
      yield
    except BaseException:
      lost = self._pages.pool.keys.is_deleted()
      for user in self._entries if lost else users:
        if self._entries.get(user) is not None:
          self._entries.release(user)
      if lost:
        self._pages.reset()
      raise

  def _to_read(
    self,
    taken: Sequence[Sequence[int]],
    lengths: Sequence[int],
    capacity: int,
  ) -> Place:
    """Where states are, rows padded; nothing to write."""
    rows = self._scorer_config.rows(len(taken))
    read = self._pages.to_read(taken, rows, capacity)
    return Place(read, _NOWHERE, np.array(lengths, np.int32), capacity)

  def _has(self, user: str, state: State) -> bool:
    entry = self._entries.get(user)
    return entry is not None and entry.known.state == state

  def _holding(self, user: str, state: State) -> Entry:
    """The entry of a user who has this state."""
    entry = self._entries.get(user)
    if entry is None or (
      entry.known.state is not state and entry.known.state != state
    ):
      raise LostStateError(f'user {user!r} has no state {state}')
    return entry
