"""Replicas in Ray: users stay where their states are; one may be lost."""

import dataclasses
import itertools
import os
import pathlib
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
import ray

from histjax.serving import client, cluster, engine
from tests.serving import bodies
from tests.serving.conftest import running, service_of

pytestmark = [
  pytest.mark.slow,
  # Ray starts its processes so; `serve.py` does it before JAX has threads.
  pytest.mark.filterwarnings(r'ignore:os\.fork\(\) was called:RuntimeWarning'),
]
USERS = range(12)
FAILING = 99
"""A `first` that a derived feature of others' code takes offence at."""
BROKEN = 'broken'
"""A file of the workdir, with which no engine rolls over."""


class FeatureError(Exception):
  """Cannot be unpickled: its arguments are not those of `Exception`."""

  def __init__(self, feature, value):
    super().__init__(f'{feature} is {value}')


class Telling(engine.Engine):
  """Tells by `num_events` in which process it is."""

  def roll_over(self, scorer, maker=None):
    if pathlib.Path(scorer, BROKEN).exists():
      raise ValueError('it cannot be served')
    super().roll_over(scorer, maker)

  def score(self, requests):
    return [
      dataclasses.replace(x, num_events=os.getpid())
      if isinstance(x, engine.Result)
      else FeatureError('age', -1)
      if request.first == FAILING
      else x
      for request, x in zip(requests, super().score(requests), strict=True)
    ]


def make(workdir):
  return Telling(workdir), lambda: None


@pytest.fixture(scope='module')
def remote(workdir):
  ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
  ray.init(
    num_cpus=2,
    include_dashboard=False,
    log_to_driver=False,
    object_store_memory=100 << 20,
  )
  found = cluster.RemoteEngine(
    lambda: make(str(workdir)),
    str(workdir),
    options={
      'ray_actor_options': {'num_cpus': 0.5},
      'health_check_period_s': 1,
    },
  )
  found.wait()
  # Its router may learn of one replica after the other.
  for user in itertools.count():
    found.score([engine.Request(**bodies.body(user=f'early {user}'))])
    if len(found.metrics()['replicas']) == 2:
      break
    assert user < 1000
    time.sleep(0.05)
  yield found
  found.stop()
  ray.shutdown()


def test_scores_are_those_of_one_process(remote, scored):
  requests = [
    engine.Request(**bodies.body(user=user)) for user in (*USERS, 'x')
  ]
  bad = dataclasses.replace(requests[0], candidates={'item': [1]})
  unknown = dataclasses.replace(requests[0], user='nobody', first=3)
  failing = dataclasses.replace(requests[0], first=FAILING)
  *found, error, lost, failed = remote.score([*requests, bad, unknown, failing])
  for one, other in zip(found, scored.score(requests), strict=True):
    # Float32, of order 1, in programs of other sizes.
    np.testing.assert_allclose(
      one.logits['click'], other.logits['click'], atol=1e-5
    )
  assert isinstance(error, ValueError)
  assert "'category' is not in" in str(error)
  assert isinstance(lost, engine.UnknownHistory)
  assert repr(failed) == """RuntimeError("FeatureError('age is -1')")"""


def test_counters_by_replica(remote):
  """Of all requests so far, where each was scored."""
  before = remote.metrics()['replicas'].values()
  before = {n: sum(x[n] for x in before) for n in ('hits', 'misses')}
  requests = [
    engine.Request(**bodies.body(user=f'counted {i}')) for i in range(8)
  ]
  remote.score(requests)
  remote.score(requests)
  service = service_of(remote)
  replicas = remote.metrics()['replicas']
  assert len(replicas) == 2
  assert sum(x['misses'] for x in replicas.values()) == before['misses'] + 8
  assert sum(x['hits'] for x in replicas.values()) == before['hits'] + 8
  text = service.metrics.text().decode()
  for name, counts in replicas.items():
    for count in ('hits', 'misses', 'extends', 'evictions'):
      line = f'histjax_replica_{count}{{replica="{name}"}} {counts[count]:.1f}'
      assert line in text.splitlines()


def test_users_stay_and_a_lost_replica_is_replaced(remote, scored):
  body = {k: v for k, v in bodies.body().items() if k != 'user'}
  (wanted,) = scored.score([engine.Request(user=0, **body)])

  def ask(one, first=0):
    replies = [one.score(first + user, **body) for user in USERS]
    for reply in replies:
      np.testing.assert_allclose(
        reply.logits['click'], wanted.logits['click'], atol=1e-5
      )
    return [reply.num_events for reply in replies]

  with (
    running(service_of(remote)) as found,
    client.Client(found.url, retries=20, timeout_s=60) as one,
  ):

    def ask_until(known):
      """Asks of others until a process answers that is not known.

      Users whom one replica has stay there, also when there is another one.
      """
      for first in itertools.count(100, len(USERS)):
        if first > 100 * len(USERS):
          pytest.fail('there is no other replica')
        if set(found := ask(one, first)) - known:
          return first, found
        threading.Event().wait(1)

    def settled(first):
      """Answers, once three rounds are alike: by chance one in 100,000 is so.

      Ray's router is told which replica has whom, but some time later.
      """
      rounds = [ask(one, first) for _ in range(2)]
      for _ in range(60):
        rounds.append(ask(one, first))
        last = zip(*rounds[-3:], strict=True)
        if sum(len(set(x)) == 1 for x in last) >= 11:
          return rounds[-1]
        threading.Event().wait(1)
      pytest.fail(f'users do not stay: {rounds}')

    known = {ask(one)[0]}
    first, answers = ask_until(known)
    known |= set(answers)
    before = settled(first)
    os.kill(before[0], signal.SIGKILL)
    assert before[0] not in ask(one, first)  # Each is answered, and rightly.
    ask_until(known.union(before))


def test_users_and_buckets(remote, workdir):
  assert remote.bucket(7) == remote.bucket('7')
  assert len({remote.bucket(user) for user in range(1000)}) > 200
  with pytest.raises(ValueError, match='replicas=3'):
    cluster.RemoteEngine(lambda: None, str(workdir), replicas=3, buckets=2)


def scored_by(remote):
  """Processes, and what was done with the states, of all users."""
  requests = [engine.Request(**bodies.body(user=user)) for user in USERS]
  found = remote.score(requests)
  return {x.num_events for x in found}, {x.source for x in found}


def test_roll_over(remote, workdir):
  """Processes stay; where one cannot, all serve what they did."""
  scored_by(remote)
  processes, sources = scored_by(remote)
  assert sources == {'hit'}
  another = types.SimpleNamespace(
    fingerprint='another', config=remote.scorer.config
  )
  before = remote.scorer
  (workdir / BROKEN).touch()
  with pytest.raises(ValueError, match='it cannot be served'):
    remote.roll_over(another)
  (workdir / BROKEN).unlink()
  assert scored_by(remote) == (processes, {'hit'})
  assert remote.scorer is before
  remote.roll_over(another)
  assert remote.metrics()['roll_overs'] == 1
  # Which replica a bucket is in is found anew.
  found, sources = scored_by(remote)
  assert found <= processes
  assert sources == {'encoded'}
  remote.scorer = before


def test_what_replicas_cannot_start_with_is_told(remote, workdir, tmp_path):
  def fails():
    raise ValueError('max_events=64 does not do')

  (tmp_path / 'other').symlink_to(workdir)
  other = cluster.RemoteEngine(
    fails,
    str(tmp_path / 'other'),
    replicas=1,
    options={'ray_actor_options': {'num_cpus': 0}},
  )
  with pytest.raises(RuntimeError, match='ValueError: max_events=64 does not'):
    other.wait()
  other.stop()
  processes, _ = scored_by(remote)  # One run does not end another.
  assert processes


def rates(url, seen, stop):
  """Asks as fast as there are answers; every reply is looked at."""

  def ask(number):
    with client.Client(url, retries=30, timeout_s=60) as one:
      for i in itertools.count():
        if stop.is_set():
          return
        user = f'{number} {i % 5}'
        body = {k: v for k, v in bodies.body().items() if k != 'user'}
        logits = one.score(user, **body).logits['click']
        seen.append((time.monotonic(), logits))

  return [threading.Thread(target=ask, args=(i,)) for i in range(4)]


def test_the_rate_is_back_after_a_replica_is_killed(remote, scored):
  """No score is wrong, no request is lost, and in 30 s all is as before."""
  body = {k: v for k, v in bodies.body().items() if k != 'user'}
  (wanted,) = scored.score([engine.Request(user='0 0', **body)])
  seen: list = []
  stop = threading.Event()
  with running(service_of(remote)) as found:
    with client.Client(found.url, retries=30, timeout_s=60) as one:
      (process,) = {one.score('0 0', **body).num_events}
    threads = rates(found.url, seen, stop)
    for thread in threads:
      thread.start()

    def rate(seconds):
      begin, before = time.monotonic(), len(seen)
      threading.Event().wait(seconds)
      return (len(seen) - before) / (time.monotonic() - begin)

    rate(3)  # Programs are compiled.
    usual = rate(4)
    os.kill(process, signal.SIGKILL)
    killed = time.monotonic()
    after = [rate(1)]
    while after[-1] < 0.8 * usual and time.monotonic() - killed < 30:
      after.append(rate(1))
    back = time.monotonic() - killed
    stop.set()
    alive = [thread.is_alive() for thread in threads]
    for thread in threads:
      thread.join()
  lost = remote.metrics()['lost']
  print(
    f'\n{usual:.0f} requests/s; after the loss {[round(x) for x in after]}, '
    f'back after {back:.1f} s; {lost} answered 503 and sent again'
  )
  assert all(alive)  # No client gave up.
  assert after[-1] >= 0.8 * usual
  assert lost < 40
  for _, logits in seen:
    np.testing.assert_allclose(logits, wanted.logits['click'], atol=1e-5)
