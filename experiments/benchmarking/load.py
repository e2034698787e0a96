"""Open-loop load on a real server, whose every score is checked.

Requests come at times that were drawn before, whether the server keeps up or
not, and are timed from then on: who waits in a queue is not left out. Users are
drawn by Zipf's law; each request brings the user's new events.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import msgspec
import numpy as np

from histjax.data.rows import collate
from histjax.scoring import Scorer
from histjax.serving import messages

_FOLDER = pathlib.Path(__file__).parents[1]
_BEGIN = 1_700_000_000
"""Seconds; the time of everybody's first event."""


@dataclasses.dataclass(frozen=True)
class Load:
  """What users send.

  Attributes:
    users: drawn by Zipf's law, the k-th with weight `k ** -zipf`.
    zipf: exponent.
    history: events of a user's first request.
    new_events: of each later one, on average; a geometric number.
    candidates: of each request.
    seed: of all that is drawn.
  """

  users: int = 2000
  zipf: float = 1.1
  history: int = 100
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
    latency: seconds from `at` to the reply; None: there was no good one.
    status: of HTTP, the last one; 0: no connection.
    reply: as decoded.
    sent: requests that it took: a 409 is followed by the whole history.
  """

  user: int
  at: float
  candidates: Mapping[str, list[Any]]
  latency: float | None = None
  status: int = 0
  reply: messages.ScoreReply | None = None
  sent: int = 0


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
    self.known: collections.Counter[int] = collections.Counter()
    weights = np.arange(1, load.users + 1) ** -load.zipf
    self._weights = weights / weights.sum()

  def schedule(self, rate: float, seconds: float) -> list[Record]:
    """Requests of a Poisson process."""
    number = self._rng.poisson(rate * seconds)
    times = np.sort(self._rng.uniform(0, seconds, number))
    users = self._rng.choice(self.load.users, number, p=self._weights)
    return [
      Record(int(user), float(at), self._table('candidates', 2**30))
      for user, at in zip(users, times, strict=True)
    ]

  def act(self, user: int) -> None:
    """The user does something; before each request."""
    if user not in self._events:
      self._events[user] = self._table('events', 0, self.load.history)
      return
    more = int(self._rng.geometric(1 / (1 + self.load.new_events))) - 1
    events = self._events[user]
    new = self._table('events', self.count(user), more)
    for name, values in new.items():
      events[name] += values

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
      name: _values(kind, rng, 1)[0]
      for name, kind in self._columns['context'].items()
    }

  def _table(self, part: str, place: int, number: int | None = None):
    number = self.load.candidates if number is None else number
    table = {
      name: _values(kind, self._rng, number)
      for name, kind in self._columns[part].items()
    }
    if self._time in table:
      later = np.arange(number) if part == 'events' else np.zeros(number, int)
      table[self._time] = (_BEGIN + 60 * (place + later)).tolist()
    return table


def _values(kind: Mapping[str, Any], rng: np.random.Generator, number: int):
  """Random values of a column, as `/v1/schema` describes it."""
  if 'task' in kind:
    threshold = kind['threshold']
    if threshold is None:
      return rng.integers(0, 2, number).tolist()
    return (threshold + rng.integers(-1, 2, number)).tolist()
  if kind['type'] == 'number':
    return rng.uniform(0, 1, number).tolist()
  least, most = kind.get('minimum', 0), kind.get('maximum', 1 << 20)
  return rng.integers(least, most + 1, number).tolist()


def run(
  url: str,
  users: Users,
  records: Sequence[Record],
  *,
  timeout: float = 5.0,
  connections: int = 64,
) -> float:
  """Sends requests at their times; fills in the records.

  Args:
    url: of the server.
    users: whose they are.
    records: of `Users.schedule`.
    timeout: seconds, of each.
    connections: at most.

  Returns:
    Seconds until the last reply.
  """
  return asyncio.run(_run(url, users, records, timeout, connections))


async def _run(url, users, records, timeout, connections) -> float:
  limits = httpx.Limits(
    max_connections=connections, max_keepalive_connections=connections
  )
  async with httpx.AsyncClient(
    base_url=url, timeout=timeout, limits=limits
  ) as client:
    begin = time.perf_counter()
    tasks = []
    for record in records:
      wait = begin + record.at - time.perf_counter()
      if wait > 0:
        await asyncio.sleep(wait)
      users.act(record.user)
      tasks.append(asyncio.create_task(_send(client, users, record, begin)))
    await asyncio.gather(*tasks)
    return time.perf_counter() - begin


async def _send(client, users: Users, record: Record, begin: float) -> None:
  user = record.user
  first = 0 if users.whole else users.known[user]
  stop = users.count(user)
  while record.sent < 3:
    record.sent += 1
    body = messages.encode(
      messages.MSGPACK,
      {
        'user': user,
        'candidates': record.candidates,
        'context': users.context(user),
        'events': users.events(user, first, stop),
        'first': first,
      },
    )
    headers = {'content-type': messages.MSGPACK, 'accept': messages.MSGPACK}
    try:
      response = await client.post('/v1/score', content=body, headers=headers)
    except httpx.TransportError:
      record.status = 0
      return
    record.status = response.status_code
    if record.status == 409 and first:  # It was forgotten there.
      first = 0
      continue
    break
  if record.status != 200:
    return
  record.latency = time.perf_counter() - begin - record.at
  record.reply = msgspec.msgpack.decode(
    response.content, type=messages.ScoreReply
  )
  users.known[user] = max(users.known[user], record.reply.num_events)


def wrong(
  records: Sequence[Record],
  users: Users,
  scorers: Mapping[str, Scorer],
  bound: float,
) -> tuple[int, float, list[str]]:
  """Scores all again, each user's whole history from the beginning.

  Args:
    records: that were sent.
    users: whose they are.
    scorers: by fingerprint.
    bound: of the difference, absolute and relative.

  Returns:
    How many scores there are, the largest difference over what is allowed, and
    what is wrong, a line for each.
  """
  found, number, worst = [], 0, 0.0
  for i, record in enumerate(records):
    if record.reply is None:
      continue
    reply = record.reply
    scorer = scorers.get(reply.model)
    if scorer is None:
      found.append(f'request {i} was scored by {reply.model[:12]}')
      continue
    name = scorer.config.schema.user
    row = scorer.make_row(
      context={name: record.user, **users.context(record.user)},
      history=users.events(record.user, 0, reply.num_events),
      candidates=record.candidates,
    )
    batch = collate([row])
    cache = scorer.encode(batch.history)
    logits = scorer.score(cache, batch.candidates, batch.context)
    for task, expected in logits.items():
      given = np.array(reply.logits[task])
      number += given.size
      error = np.abs(given - expected[0, : given.size])
      allowed = bound * (1 + np.abs(expected[0, : given.size]))
      worst = max(worst, float((error / allowed).max()))
      if not (error <= allowed).all():
        found.append(
          f'request {i}, {task}, user {record.user}, {reply.source}: off by '
          f'{error.max():.2e}'
        )
  return number, worst, found


def summary(records: Sequence[Record], seconds: float) -> dict[str, Any]:
  """Latencies in ms, rates, and how states were used."""
  good = [x for x in records if x.latency is not None and x.reply is not None]
  latency = [1000 * x.latency for x in good if x.latency is not None]
  sources = collections.Counter(x.reply.source for x in good if x.reply)
  sizes = sum(x.reply.batch_size for x in good if x.reply)
  statuses = collections.Counter(str(x.status) for x in records)
  found: dict[str, Any] = {
    'requests': len(records),
    'answered': len(good),
    'rate': len(good) / seconds,
    'statuses': dict(statuses),
    'sources': dict(sources),
    'batch_size': sizes / max(1, len(good)),
  }
  if latency:
    for percent in (50, 90, 99):
      found[f'p{percent}'] = float(np.percentile(latency, percent))
  return found


def ideal_hit_rate(records: Sequence[Record], capacity: int) -> float:
  """Of a least-recently-used store of so many users, in the drawn order."""
  kept: collections.OrderedDict[int, None] = collections.OrderedDict()
  hits = 0
  for record in records:
    if record.user in kept:
      hits += 1
      kept.move_to_end(record.user)
      continue
    kept[record.user] = None
    if len(kept) > capacity:
      kept.popitem(last=False)
  return hits / max(1, len(records))


def highest_rate(
  try_rate: Callable[[float], Mapping[str, Any]],
  *,
  first: float,
  limit_ms: float,
  step: float = 1.4,
  tries: int = 12,
) -> tuple[float, list[dict[str, Any]]]:
  """The highest rate at which all are answered, 99 of 100 within a limit.

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
  best, tried, rate, going_up = 0.0, [], first, None
  for _ in range(tries):
    found = dict(try_rate(rate))
    good = (
      found['answered'] == found['requests']
      and found.get('p99', np.inf) <= limit_ms
    )
    tried.append({'offered': rate, 'good': good, **found})
    if good:
      best = max(best, found['rate'])
    if going_up is not None and good != going_up:
      break
    going_up = good
    rate = rate * step if good else rate / step
  return best, tried


@contextlib.contextmanager
def server(command: Sequence[str], url: str) -> Iterator[str]:
  """A binary of experiments/ in a process of its own, ready; its address."""
  name, *arguments = command
  process = subprocess.Popen(
    [sys.executable, str(_FOLDER / name), *arguments],
    env=os.environ | {'PYTHONUNBUFFERED': '1'},
  )
  try:
    deadline = time.monotonic() + 600
    while True:
      if process.poll() is not None:
        raise RuntimeError(f'the server ended with {process.returncode}')
      with contextlib.suppress(httpx.TransportError):
        if httpx.get(f'{url}/health/ready').status_code == 200:
          break
      if time.monotonic() > deadline:
        raise RuntimeError('the server was not ready after 600 s')
      time.sleep(0.2)
    yield url
  finally:
    process.terminate()
    process.wait(60)


def schema(url: str) -> dict[str, Any]:
  """What the server says of its columns."""
  return httpx.get(f'{url}/v1/schema').raise_for_status().json()


def metrics(url: str) -> dict[str, float]:
  """The server's own counts, those without labels."""
  text = httpx.get(f'{url}/metrics').raise_for_status().text
  lines = [x.split() for x in text.splitlines() if x.startswith('histjax_')]
  return {x[0]: float(x[1]) for x in lines if len(x) == 2 and '{' not in x[0]}
