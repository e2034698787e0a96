"""Whatever happens to users, stores and models, scores are right."""

import hypothesis
import numpy as np
import pytest
from absl.testing import absltest
from hypothesis import stateful
from hypothesis import strategies as st

from histjax.serving.cache_store import StoreConfig
from histjax.serving.engine import (
  Engine,
  EngineConfig,
  Request,
  Result,
  UnknownHistory,
)
from tests.serving import worlds

PAGE = 2 * 2 * 16 * 2 * 8 * 4
"""Bytes of a page of the small models."""
USERS = st.integers(0, 4)


class Serving(stateful.RuleBasedStateMachine):
  """Five users of a store that holds about three."""

  variant = 'strict'
  derived = True
  longest = 30

  def __init__(self):
    super().__init__()
    self.now = 0.0
    self.seed = 0
    self.store = StoreConfig(device_bytes=4 * PAGE, host_bytes=20_000, ttl=10.0)
    self.engine = Engine(
      worlds.scorer(self.variant, self.derived),
      EngineConfig(self.store, max_events=32, max_new_events=2, max_rows=4),
      maker=worlds.maker(self.variant, self.derived),
      clock=lambda: self.now,
    )
    rng = np.random.default_rng(0)
    self.events = {u: worlds.events(rng, 4 * u, u) for u in range(5)}
    self.sent = dict.fromkeys(range(5), 0)
    self.scored = self.unknown = self.roll_overs = 0

  def requests(self, users, rng):
    """New requests; each tells what the last one did not."""
    found = []
    for user in users:
      first = self.sent[user]
      found.append(worlds.request(rng, user, self.events[user], first))
      self.sent[user] = len(self.events[user])
    return found

  def check(self, requests, results, counts):
    """Compares results; who is not known any more sends everything."""
    again = {}
    for request, result, count in zip(requests, results, counts, strict=True):
      if isinstance(result, UnknownHistory):
        assert request.first
        self.unknown += 1
        again[request.user] = Request(
          request.user,
          request.candidates,
          request.context,
          self.events[request.user][:count],
        )
        continue
      assert isinstance(result, Result), result
      self.scored += 1
      assert result.num_events == count
      history = self.events[request.user][:count]
      worlds.check(
        result,
        worlds.expected(
          self.variant, self.derived, request, history, self.seed
        ),
      )
    if again:
      results = self.engine.score([*again.values()])
      counts = [len(r.events) for r in again.values()]
      self.check([*again.values()], results, counts)

  @stateful.rule(
    users=st.lists(USERS, min_size=1, max_size=4),
    number=st.sampled_from([0, 1, 1, 2, 3]),
    rng=st.integers(0, 2**32 - 1),
  )
  def ask(self, users, number, rng):
    rng = np.random.default_rng(rng)
    requests, counts = [], []
    for user in users:  # One may come twice, with events in between.
      past = self.events[user]
      if len(past) + number <= self.longest:
        start = past[-1]['ts'] if past else 0
        past += worlds.events(rng, number, user, start)
      requests += self.requests([user], rng)
      counts.append(len(past))
    self.check(requests, self.engine.score(requests), counts)

  @stateful.rule(user=USERS, rng=st.integers(0, 2**32 - 1))
  def retry(self, user, rng):
    """The last events once more: none is appended twice."""
    rng = np.random.default_rng(rng)
    past = self.events[user]
    first = max(0, len(past) - int(rng.integers(0, 4)))
    request = worlds.request(rng, user, past, first)
    self.sent[user] = len(past)
    self.check([request], self.engine.score([request]), [len(past)])

  @stateful.rule(user=USERS, rng=st.integers(0, 2**32 - 1))
  def rewrite(self, user, rng):
    """Another history, as long as the last one or longer."""
    rng = np.random.default_rng(rng)
    self.events[user] = worlds.events(rng, len(self.events[user]) or 1, user)
    self.sent[user] = 0
    requests = self.requests([user], rng)
    count = len(self.events[user])
    self.check(requests, self.engine.score(requests), [count])

  @stateful.rule(seconds=st.sampled_from([1.0, 2.0, 4.0, 11.0]))
  def wait(self, seconds):
    self.now += seconds

  @stateful.precondition(lambda self: self.scored > 5 * self.roll_overs)
  @stateful.rule(seed=st.integers(0, 1))
  def roll_over(self, seed):
    self.roll_overs += 1
    self.seed = seed
    self.engine.roll_over(
      worlds.scorer(self.variant, self.derived, seed),
      worlds.maker(self.variant, self.derived),
    )
    assert self.engine.metrics()['states'] == 0

  @stateful.invariant()
  def within_budget(self):
    found = self.engine.metrics()
    assert found['used_bytes'] <= found['device_bytes']
    assert found['device_bytes'] <= self.store.device_bytes
    assert found['host_bytes'] <= self.store.host_bytes
    assert found['states'] <= found['users'] <= 5

  @stateful.invariant()
  def counts_add_up(self):
    counts = self.engine.store.counts
    assert counts.hits + counts.extends + counts.misses == self.scored
    assert counts.unknown == self.unknown


class Window(Serving):
  """States that begin anywhere, and rows of the last events alone."""

  variant = 'window_strict'
  longest = 46


class Truncated(Serving):
  """Rows of the last events, which move with every new one."""

  variant = 'truncated'
  longest = 46


class Bidirectional(Serving):
  """States that serve their own events alone."""

  variant = 'bidirectional'


for machine in (Serving, Window, Truncated, Bidirectional):
  machine.TestCase.settings = hypothesis.settings(
    max_examples=hypothesis.settings().max_examples // 3 or 1,
    stateful_step_count=25,
  )
ServingTest = Serving.TestCase
WindowTest = pytest.mark.slow(Window.TestCase)
TruncatedTest = pytest.mark.slow(Truncated.TestCase)
BidirectionalTest = pytest.mark.slow(Bidirectional.TestCase)
del machine


if __name__ == '__main__':
  absltest.main()
