"""Open-loop load: who comes when, what they bring, what came of it.

Requests come at times that were drawn before, whether the server keeps up or
not, and are timed from then on: who waits in a queue is not left out. Users are
drawn by Zipf's law; each request brings the user's new events. Bodies are made
before the first is sent, and replies are read after the last one came, so that
a machine that both share has as little as possible to do for the load.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from histjax.scoring import pages
from histjax.serving import messages

_BEGIN = 1_700_000_000
"""Seconds; the time of everybody's first event."""


@dataclasses.dataclass(frozen=True)
class Load:
  """What users send.

  Attributes:
    users: drawn by Zipf's law, the k-th with weight `k ** -zipf`.
    zipf: exponent.
    history: events of a user's first request.
    longest: history; who has so many events has no more.
    new_events: of each later request, on average; a geometric number.
    candidates: of each request.
    seed: of all that is drawn.
  """

  users: int = 2000
  zipf: float = 1.1
  history: int = 100
  longest: int = 512
  new_events: float = 1.0
  candidates: int = 100
  seed: int = 0


@dataclasses.dataclass
class Record:
  """One request and what came of it.

  Attributes:
    user: its number.
    at: seconds from the start, as drawn.
    candidates: columns.
    stop: the user's events, those of this request included.
    body: what is sent.
    latency: seconds from `at` to the reply; None: there was no good one.
    status: of HTTP, the last one; 0: no connection.
    content: of the reply.
    sent: requests that it took: a 409 is followed by the whole history.
  """

  user: int
  at: float
  candidates: Mapping[str, np.ndarray]
  stop: int
  body: bytes = b''
  latency: float | None = None
  status: int = 0
  content: bytes = b''
  sent: int = 0

  @functools.cached_property
  def reply(self) -> messages.ScoreReply:
    """As decoded, of a request with a latency."""
    return msgspec.msgpack.decode(self.content, type=messages.ScoreReply)


class Users:
  """Random users whose events are of a server's schema."""

  def __init__(
    self,
    load: Load,
    schema: Mapping[str, Any],
    time_column: str,
    *,
    whole: bool = False,
  ):
    """Makes users.

    Args:
      load: what they do.
      schema: reply of `GET /v1/schema`.
      time_column: of events and candidates, if they have one.
      whole: send the whole history each time.
    """
    self.whole = whole
    self.load, self._columns = load, schema['columns']
    self._time = time_column
    self._rng = np.random.default_rng(load.seed)
    self._events: dict[int, dict[str, list[Any]]] = {}
    self._sent: collections.Counter[int] = collections.Counter()
    weights = np.arange(1, load.users + 1) ** -load.zipf
    self._weights = weights / weights.sum()

  def schedule(self, rate: float, seconds: float) -> list[Record]:
    """Requests of a Poisson process, with bodies."""
    number = self._rng.poisson(rate * seconds)
    times = np.sort(self._rng.uniform(0, seconds, number))
    users = self._rng.choice(self.load.users, number, p=self._weights)
    return [
      self._record(user, at)
      for user, at in zip(users.tolist(), times.tolist(), strict=True)
    ]

  def all(self) -> list[Record]:
    """A request of each user, who was not here before, the rarest first."""
    return [self._record(user, 0.0) for user in range(self.load.users)[::-1]]

  def count(self, user: int) -> int:
    """The user's events so far."""
    return len(next(iter(self._events[user].values())))

  def events(self, user: int, first: int = 0, stop: int | None = None):
    """Columns of the user's events."""
    return {k: v[first:stop] for k, v in self._events[user].items()}

  def context(self, user: int) -> dict[str, Any]:
    """The same in all requests of a user."""
    rng = np.random.default_rng([self.load.seed, user])
    return {
      name: _values(kind, rng, 1)[0].item()
      for name, kind in self._columns['context'].items()
    }

  def body(self, record: Record, first: int) -> bytes:
    """A request with the user's events from number `first` on."""
    user = record.user
    return messages.encode(
      messages.MSGPACK,
      {
        'user': user,
        'candidates': {k: v.tolist() for k, v in record.candidates.items()},
        'context': self.context(user),
        'events': self.events(user, first, record.stop),
        'first': first,
      },
    )

  def _record(self, user: int, at: float) -> Record:
    self._act(user)
    record = Record(
      user,
      at,
      self._table('candidates', 2**30, self.load.candidates),
      self.count(user),
    )
    record.body = self.body(record, 0 if self.whole else self._sent[user])
    self._sent[user] = record.stop
    return record

  def _act(self, user: int) -> None:
    """The user does something; before each request."""
    if user not in self._events:
      first = self._table('events', 0, self.load.history)
      self._events[user] = {k: v.tolist() for k, v in first.items()}
      return
    more = int(self._rng.geometric(1 / (1 + self.load.new_events))) - 1
    more = min(more, max(0, self.load.longest - self.count(user)))
    new = self._table('events', self.count(user), more)
    for name, values in new.items():
      self._events[user][name] += values.tolist()

  def _table(self, part: str, place: int, number: int):
    table = {
      name: _values(kind, self._rng, number)
      for name, kind in self._columns[part].items()
    }
    if self._time in table:
      later = np.arange(number) if part == 'events' else np.zeros(number, int)
      table[self._time] = _BEGIN + 60 * (place + later)
    return table


def _values(
  kind: Mapping[str, Any], rng: np.random.Generator, number: int
) -> np.ndarray:
  """Random values of a column, as `/v1/schema` describes it."""
  if 'task' in kind:
    threshold = kind['threshold']
    if threshold is None:
      return rng.integers(0, 2, number)
    return threshold + rng.integers(-1, 2, number)
  if kind['type'] == 'number':
    return rng.uniform(0, 1, number)
  least, most = kind.get('minimum', 0), kind.get('maximum', 1 << 20)
  return rng.integers(least, most + 1, number)


def summary(records: Sequence[Record], seconds: float) -> dict[str, Any]:
  """Latencies in ms, rates, and how states were used."""
  good = [x for x in records if x.latency is not None]
  latency = [1000 * x.latency for x in good if x.latency is not None]
  found: dict[str, Any] = {
    'requests': len(records),
    'answered': len(good),
    'rate': len(good) / seconds,
    'statuses': dict(collections.Counter(str(x.status) for x in records)),
    'sources': dict(collections.Counter(x.reply.source for x in good)),
    'sent': sum(x.sent for x in records),
  }
  if latency:
    found['batch_size'] = float(np.mean([x.reply.batch_size for x in good]))
    for percent in (50, 90, 99):
      found[f'p{percent}'] = float(np.percentile(latency, percent))
    timings = [msgspec.structs.asdict(x.reply.timings_ms) for x in good]
    found['phases'] = {
      name: float(np.median([x[name] for x in timings])) for name in timings[0]
    }
  return found


def hit_rates(
  records: Sequence[Record], number: int, num_pages: int
) -> dict[str, float]:
  """The store's, beside a least-recently-used one's of so many pages.

  Args:
    records: all that were sent, in the drawn order.
    number: of the last of them, those that count.
    num_pages: of the store.

  Returns:
    `measured`, of answered requests whose user had a state; `ideal`, likewise
    of the store that knows what comes in which order.
  """
  kept: collections.OrderedDict[int, int] = collections.OrderedDict()
  free, hits = num_pages, []
  for record in records:
    hits.append(record.user in kept)
    free += kept.pop(record.user, 0)
    kept[record.user] = pages.number(record.stop)
    free -= kept[record.user]
    while free < 0:
      free += kept.popitem(last=False)[1]
  last = [x for x in records[-number:] if x.latency is not None]
  return {
    'measured': float(np.mean([x.reply.source != 'encoded' for x in last])),
    'ideal': float(np.mean(hits[-number:])),
  }


def highest_rate(
  try_rate: Callable[[float], Mapping[str, Any]],
  *,
  first: float,
  limit_ms: float,
  step: float = 1.4,
  tries: int = 12,
) -> tuple[float, list[dict[str, Any]]]:
  """The highest rate at which all are answered, 99 of 100 within a limit.

  By steps, up or down, until one is good and the next is not; then once between
  them.

  Args:
    try_rate: the `summary` of a run at a rate.
    first: the rate to begin at.
    limit_ms: of p99.
    step: from one rate to the next.
    tries: at most.

  Returns:
    Requests a second as measured, 0 if not even the lowest would do, and what
    was tried.
  """
  best, tried, rate = 0.0, [], first
  lowest_bad, highest_good = np.inf, 0.0
  for _ in range(tries):
    found = dict(try_rate(rate))
    good = (
      found['answered'] == found['requests']
      and found.get('p99', np.inf) <= limit_ms
    )
    tried.append({'offered': rate, 'good': good, **found})
    if good:
      best, highest_good = max(best, found['rate']), max(highest_good, rate)
    else:
      lowest_bad = min(lowest_bad, rate)
    if lowest_bad / max(highest_good, 1e-9) <= 1.001 * step**0.5:
      break
    if highest_good == 0:
      rate = lowest_bad / step
    elif lowest_bad == np.inf:
      rate = highest_good * step
    else:
      rate = (lowest_bad * highest_good) ** 0.5
  return best, tried
