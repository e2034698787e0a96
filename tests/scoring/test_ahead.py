"""After `warm_up` nothing compiles, and it compiles nothing in vain."""

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest, parameterized

import histjax
from histjax import buckets, scoring
from histjax.scoring import ahead
from histjax.scoring.programs import Sizes
from histjax.types import Candidates, History
from tests import support
from tests.scoring.scorers import count_compilations, scorer

SCHEMA = histjax.Schema(
  user='user',
  time='time',
  context=(histjax.Dense('age'),),
  item=(histjax.Categorical('item', 9),),
  tasks=(histjax.Task('click'),),
)


BUCKETS = scoring.ScorerConfig(
  history_buckets=(4, 8), candidate_buckets=(2, 5), row_buckets=(1, 3)
)


def tiny(options=BUCKETS, **fields) -> scoring.Scorer:
  """Two buckets an axis; compiles fast."""
  config = support.config(
    schema=SCHEMA,
    encoder__num_layers=1,
    encoder__width=8,
    embedding_dim=4,
    interaction=histjax.InteractionConfig(kind='mlp', mlp_widths=(4,)),
    **fields,
  )
  return scoring.Scorer(config, support.init(config)[1], options)


class Traffic:
  """Random requests up to the sizes that `warm_up` was told of."""

  ROWS, EVENTS, CANDIDATES, NEW = 3, 8, 5, 2

  def __init__(self, s: scoring.Scorer, seed: int):
    self.s, self.rng = s, np.random.default_rng(seed)
    self.cache = s.encode(self.history(2, self.EVENTS))

  def history(self, num_rows, num_events, limit=None):
    shape = num_rows, num_events
    length = self.rng.integers(0, num_events + 1, num_rows, dtype=np.int32)
    if limit is not None:
      length = np.minimum(length, limit)
    features = support.features(self.rng, SCHEMA.history_features, shape)
    return History(features, length)

  def encode(self):
    number = self.rng.integers(1, self.ROWS + 1)
    size = self.rng.integers(0, self.EVENTS + 1)
    self.cache = self.s.encode(self.history(number, size))

  def extend(self):
    users = self.cache.info.num_users
    number = self.rng.integers(1, users + 1)
    room = self.EVENTS - self.cache.info.length[:number]
    size = self.rng.integers(0, self.NEW + 1)
    donate = bool(self.rng.integers(2))
    self.cache = self.s.extend(
      self.cache, self.history(number, size, room), donate=donate
    )

  def request(self, number=None, visible=True):
    number = number or self.rng.integers(1, self.cache.info.num_users + 1)
    shape = number, self.rng.integers(1, self.CANDIDATES + 1)
    mask = seen = None
    if visible and self.rng.integers(2):
      length = self.cache.info.length[:number, None]
      seen = self.rng.integers(0, length + 1, shape)
    if self.rng.integers(2):
      mask = self.rng.random(shape) < 0.7
    candidates = Candidates(
      support.features(self.rng, SCHEMA.item_features, shape), seen, mask
    )
    context = support.features(self.rng, SCHEMA.context, (number,))
    return self.cache, candidates, context

  def score(self):
    self.s.score(*self.request())

  def encode_and_score(self):
    number = self.rng.integers(1, self.ROWS + 1)
    size = self.rng.integers(0, self.EVENTS + 1)
    _, *rest = self.request(number, visible=False)
    history = self.history(number, size)
    self.cache, _ = self.s.encode_and_score(history, *rest)

  def extend_and_score(self):
    users = self.cache.info.num_users
    room = self.EVENTS - self.cache.info.length
    size = self.rng.integers(0, self.NEW + 1)
    events = self.history(users, size, room)
    _, *rest = self.request(visible=False)
    self.cache, _ = self.s.extend_and_score(
      self.cache, events, *rest, donate=bool(self.rng.integers(2))
    )


class WarmUpTest(parameterized.TestCase):
  def test_nothing_compiles_after(self):
    s = tiny()
    with self.assertLogs('absl', 'INFO') as logs:
      found = s.warm_up(
        rows=3,
        events=8,
        candidates=5,
        new_events=2,
        visible=True,
      )
    # 4 to encode; each with 2 numbers of candidates that say what they see or
    # not; 1 or 2 new events, donated or not; and 2 rows times 2 numbers of new
    # events that outgrow 4.
    self.assertEqual(found.num_programs, 4 + 4 * 4 + 4 * 4 + 4)
    self.assertGreater(found.seconds, 0)
    lines = [r.getMessage() for r in logs.records]
    self.assertIn('40 of 40 programs', lines[-1])
    self.assertTrue(any(x.startswith('candidate_tower runs') for x in lines))
    before = s.num_compilations
    traffic = Traffic(s, 0)
    calls = (
      traffic.encode,
      traffic.extend,
      traffic.extend,
      traffic.score,
    )
    with count_compilations() as compiled:
      for i in traffic.rng.integers(0, len(calls), 1000):
        calls[i]()
    self.assertEmpty(compiled)
    self.assertEqual(s.num_compilations, before)
    again = s.warm_up(rows=3, events=8, candidates=5)
    self.assertEqual(again.num_compilations, 0)
    self.assertEqual(again.num_programs, 4 + 4 * 2)

  def test_two_steps_in_one_program(self):
    s = tiny(
      scoring.ScorerConfig(
        history_buckets=(8,), candidate_buckets=(5,), row_buckets=(3,)
      )
    )
    found = s.warm_up(
      rows=3,
      events=8,
      candidates=5,
      new_events=2,
      calls=('encode_and_score', 'extend_and_score'),
    )
    # 'encode', whose caches the others are tried with; 1 or 2 new events,
    # donated or not.
    self.assertEqual(found.num_programs, 1 + 1 + 4)
    with count_compilations() as compiled:
      traffic = Traffic(s, 0)
      calls = traffic.encode_and_score, traffic.extend_and_score
      for i in traffic.rng.integers(0, 2, 100):
        calls[i]()
    self.assertEmpty(compiled)

  def test_requests_at_once(self):
    s = tiny()
    found = s.warm_up(rows=1, events=4, candidates=2, requests=2)
    self.assertEqual(found.num_programs, 1 + 2)
    traffic = Traffic(s, 0)
    with count_compilations() as compiled:
      for _ in range(20):
        requests = []
        for _ in range(traffic.rng.integers(1, 3)):
          traffic.cache = s.encode(traffic.history(1, 4))
          cache, candidates, context = traffic.request()
          features = {k: v[:, :2] for k, v in candidates.features.items()}
          requests.append((cache, Candidates(features), context))
        self.assertLen(s.score_many(requests), len(requests))
    self.assertEmpty(compiled)

  @parameterized.parameters(
    ({'rows': 1.5}, 'rows=1.5 must be an integer'),
    ({'rows': 0}, 'rows=0 must be an integer >= 1'),
    ({'events': 0}, 'events=0 must be an integer >= 1'),
    ({'candidates': -1}, 'candidates=-1 must be an integer >= 1'),
    ({'requests': 0}, 'requests=0 must be an integer >= 1'),
    ({'new_events': -1}, 'new_events=-1 must be an integer >= 0'),
    ({'calls': ('score', 'joint')}, "calls=.*'joint'.* must be some of"),
    ({'calls': 'score'}, "calls='score' must be some of"),
    ({'rows': 9}, '9 rows do not fit the largest bucket, 3'),
    ({'events': 99}, '99 events in a history do not fit the largest bucket, 8'),
    ({'candidates': 7}, '7 candidates do not fit the largest bucket, 5'),
  )
  def test_sizes(self, change, message):
    s = tiny()
    with count_compilations() as compiled:
      with self.assertRaisesRegex(ValueError, message):
        s.warm_up(**{'rows': 1, 'events': 4, 'candidates': 2, **change})
    self.assertEmpty(compiled)

  def test_models(self):
    sizes = {'rows': 1, 'events': 4, 'candidates': 2}
    with self.assertRaisesRegex(ValueError, 'call encode on the longer'):
      scorer('bidirectional').warm_up(**sizes, new_events=1)
    config = support.config(fusion='concat')
    other = scoring.Scorer(config, support.init(config)[1])
    with self.assertRaisesRegex(ValueError, 'cannot score from a cached'):
      other.warm_up(**sizes)


@pytest.mark.slow
def test_another_process_reads_what_this_one_compiled(tmp_path):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(pathlib.Path(__file__).parents[2]),
  }
  command = [sys.executable, '-c', _PROCESS, str(tmp_path / 'programs')]
  found = []
  for other in 'ab':  # Which JAX opens when the scorer is made.
    environment['JAX_COMPILATION_CACHE_DIR'] = str(tmp_path / other)
    output = subprocess.run(
      command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    found.append([int(x) for x in output.split()])
  first, second = found
  number = first[0]
  assert first == [number, 0, number]
  assert second == [number, number, 0]


_PROCESS = """
import sys

import jax

from tests.scoring import test_ahead

scorer = test_ahead.tiny()
jax.jit(lambda x: x + 1)(1.0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
found = scorer.warm_up(
  rows=1, events=4, candidates=2, new_events=1, cache_dir=sys.argv[1]
)
prefix = '/jax/compilation_cache/cache_'
print(
  found.num_compilations,
  events.count(prefix + 'hits'),
  events.count(prefix + 'misses'),
)
"""


class JobsTest(parameterized.TestCase):
  @parameterized.parameters(
    {'sizes': (4, 8), 'events': 8, 'num_new': 2},
    {'sizes': (4, 8), 'events': 6, 'num_new': 6},
    {'sizes': (2, 3, 9, 16), 'events': 12, 'num_new': 3},
    {'sizes': (2, 20), 'events': 15, 'num_new': 15},
    {'sizes': (2, 20), 'events': 15, 'num_new': 15, 'news': (1, 16)},
    {'sizes': (), 'events': 50, 'num_new': 20},
    {'sizes': (5,), 'events': 5, 'num_new': 0},
  )
  def test_are_what_requests_need(self, sizes, events, num_new, news=()):
    fit = functools.partial(
      buckets.fit, sizes=sizes, what='events', smallest=16
    )
    fit_new = functools.partial(
      buckets.fit, sizes=news, what='new events', smallest=1
    )
    lengths = ahead.up_to(events, fit)
    needed = set()
    for length in range(events + 1):
      capacity = fit(length)
      sizes = Sizes(2, capacity)
      needed.add(ahead.Job('encode', sizes, 0))
      sizes = sizes._replace(candidates=3)
      needed.add(ahead.Job('encode_and_score', sizes, 0))
      needed.add(ahead.Job('score', sizes, capacity))
    for capacity in lengths:
      for old in range(min(capacity, events) + 1):
        for new in range(num_new + 1 if num_new else 0):
          # The longest history need not be the one with most new events.
          for total in range(max(old, new), min(old + new, events) + 1):
            fits = total <= capacity
            for donate in {False, fits}:
              extended = Sizes(
                2,
                fit_new(new),
                capacity=capacity if fits else fit(total),
                donate=donate,
              )
              needed.add(ahead.Job('extend', extended, capacity))
              extended = extended._replace(candidates=3)
              needed.add(ahead.Job('extend_and_score', extended, capacity))
    found = list(
      ahead.jobs(ahead.CALLS, [2], lengths, [3], num_new, fit_new, False)
    )
    self.assertLen(found, len(set(found)))
    self.assertEqual(set(found), needed)

  def test_each_axis(self):
    found = list(
      ahead.jobs(('score',), [1, 2], [8], [4, 8], 0, int, True, requests=3)
    )
    scored = {x.sizes for x in found if x.kind == 'score'}
    self.assertEqual(
      scored,
      {
        Sizes(rows, 8, candidates, visible, requests=requests)
        for rows in (1, 2)
        for candidates in (4, 8)
        for visible in (False, True)
        for requests in (1, 2, 4)
      },
    )
    self.assertLen(found, 2 + len(scored))


if __name__ == '__main__':
  absltest.main()
