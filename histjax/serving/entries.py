"""Who is known and whose pages are whose: order, age and budgets."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

from histjax.data.past import Past
from histjax.scoring import pages as pages_lib
from histjax.serving.known import Counts, Known, State, StoreConfig
from histjax.serving.pages import Pages


class Entry:
  """Of a user: `Known`, the state's pages, and when it was last used."""

  def __init__(self, known: Known, used: float):
    self.known, self.used = known, used
    self.pages: list[int] = []


class Entries:
  """Entries by user, the least recently used first. The caller has a lock.

  Attributes:
    pages: that states are in.
    host_bytes: of all entries.
    num_states: entries that have a state.
  """

  def __init__(
    self,
    options: StoreConfig,
    pages: Pages,
    counts: Counts,
    clock: Callable[[], float],
  ):
    """Without an entry.

    Args:
      options: budgets and age.
      pages: all free.
      counts: to add to.
      clock: in seconds.
    """
    self.pages, self.host_bytes, self.num_states = pages, 0, 0
    self._options, self._counts, self._clock = options, counts, clock
    self._entries: collections.OrderedDict[str, Entry] = (
      collections.OrderedDict()
    )

  def __len__(self) -> int:
    """The number of users."""
    return len(self._entries)

  def __iter__(self) -> Iterator[str]:
    """The users."""
    return iter([*self._entries])

  def __getitem__(self, user: str) -> Entry:
    """The entry of a user who is there."""
    return self._entries[user]

  def get(self, user: str) -> Entry | None:
    """The entry of a user."""
    return self._entries.get(user)

  def touch(self, user: str) -> Entry:
    """The entry of a user who is there, and was seen just now."""
    entry = self._entries[user]
    entry.used = self._clock()
    self._entries.move_to_end(user)
    return entry

  def expire(self) -> None:
    """Forgets who was not seen for too long."""
    if self._options.ttl is None:
      return
    limit = self._clock() - self._options.ttl
    while self._entries:
      user, entry = next(iter(self._entries.items()))
      if entry.used > limit:
        break
      self.forget(user)
      self._counts.expirations += 1

  def keep(self, user: str, past: Past, digest: hashlib.blake2b) -> None:
    """As `CacheStore.keep`."""
    entry = self._entries.get(user)
    if entry is None:
      entry = self._entries[user] = Entry(Known(past, digest), 0.0)
    else:
      self.host_bytes -= entry.known.nbytes
      entry.known = Known(past, digest, entry.known.state)
    self.host_bytes += entry.known.nbytes
    self.touch(user)
    while self.host_bytes > self._options.host_bytes:
      self.forget(next(iter(self._entries)))
      self._counts.forgotten += 1

  def place(
    self,
    users: Sequence[str],
    states: Sequence[State],
    same: Sequence[int],
    *,
    whole: bool = True,
  ) -> tuple[list[list[int]], list[int]]:
    """Makes room for states; those of `users` do not make room themselves.

    Args:
      users: each once.
      states: of each.
      same: as `CacheStore.put`.
      whole: whether what is not the same can be all of a state. False: one of
        which a part is to stay, and is lost meanwhile, has no place.

    Returns:
      The pages of each, none if there is no room, and which is the first of
      them that must be written.
    """
    busy, first, lost = set(users), [], set()
    for user, state, number in zip(users, states, same, strict=True):
      entry = self._entries.get(user)
      old = None if entry is None else entry.known.state
      if old is None:  # Lost meanwhile: nothing of it is there.
        if number and not whole:
          lost.add(user)
        number = 0
      elif number and old.start != state.start:
        raise ValueError(
          f'same={number}, but the state of user {user!r} begins with event '
          f'{old.start} and not {state.start}'
        )
      first.append(number // pages_lib.EVENTS)
    pages = [
      [] if user in lost else self._place(user, state, busy)
      for user, state in zip(users, states, strict=True)
    ]
    self._counts.refused += len(lost)
    return pages, first

  def release(self, user: str) -> None:
    """Drops the state of a user who is there."""
    entry = self._entries[user]
    self.pages.give(entry.pages)
    entry.pages = []
    self.num_states -= entry.known.state is not None
    entry.known = dataclasses.replace(entry.known, state=None)

  def forget(self, user: str) -> None:
    """Drops everything of a user who is there."""
    self.release(user)
    self.host_bytes -= self._entries.pop(user).known.nbytes

  def _place(self, user: str, state: State, busy: set[str]) -> list[int]:
    entry = self._entries.get(user)
    if entry is None:
      self._counts.refused += 1
      return []
    wanted = pages_lib.number(state.length)
    self.pages.give(entry.pages[wanted:])
    del entry.pages[wanted:]
    missing = wanted - len(entry.pages)
    for other in self._victims(busy, missing - self.pages.num_free):
      self.release(other)
      self._counts.evictions += 1
    if missing > self.pages.num_free:
      self.release(user)
      self._counts.refused += 1
      return []
    entry.pages += self.pages.take(missing)
    self.num_states += entry.known.state is None
    entry.known = Known(entry.known.past, entry.known.digest, state)
    return entry.pages

  def _victims(self, busy: set[str], missing: int) -> list[str]:
    """Whose pages make room, the least recently used first; none if too few."""
    found, number = [], 0
    for user, entry in self._entries.items():
      if number >= missing:
        break
      if user not in busy and entry.pages:
        found.append(user)
        number += len(entry.pages)
    return found if number >= missing else []
