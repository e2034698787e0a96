"""The same application, its engines in replicas of Ray Serve on many hosts.

A frontend is the application of `app`, in uvicorn; any number of them, one a
host, say. It sends each user's requests to the replica that holds the user's
state: users are hashed into buckets, and Ray Serve's model multiplexing, of
which a bucket is a "model", keeps a bucket on its replica while that lives. A
request makes one hop, from frontend to replica: Ray's own proxy is not used.

A replica that is lost takes its states along: requests in flight are answered
503, and the next ones with `first` > 0 409, after which clients send the whole
history. So no score is ever of a wrong state.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import ray
from absl import logging
from ray import serve
from ray.serve.exceptions import RayServeException

from histjax.scoring import Scorer
from histjax.serving import batcher, planning
from histjax.serving.engine import Engine, Request, Result
from histjax.serving.server import and_settle

_NAME = 'histjax'
Make = Callable[[], tuple[Engine, Callable[[], Any]]]
"""An engine and what warms it up, as `server.make_engine` returns."""
Told = tuple[list[Result | Exception], str, float, dict[str, float]]
"""Results, and by which replica, and when by its clock it had counted what."""
_NO_ANSWER = ray.exceptions.RayError, RayServeException, TimeoutError
"""Of Ray, and of Ray Serve, which has no base in common with it."""
_FORGET_S = 600.0
"""After so long a replica that says nothing is no more told of."""


def _replica(most: int) -> type:
  """The deployment's class; a replica holds at most so many buckets."""

  class Replica:
    """An engine of its own, in a process of its own."""

    def __init__(self, make: Make, workdir: str):
      self._engine, warm_up = make()
      and_settle(warm_up)
      self._workdir, self._rolling = workdir, asyncio.Lock()

    @serve.multiplexed(max_num_models_per_replica=most)
    async def _hold(self, bucket: str) -> str:
      """Tells the routers that this replica has the bucket."""
      return bucket

    async def score(self, requests: list[Request]) -> Told:
      await self._hold(serve.get_multiplexed_model_id())
      results = await asyncio.to_thread(
        batcher.call, self._engine.score, requests
      )
      results = [_sent(x) for x in results]
      replica = serve.get_replica_context().replica_id.unique_id
      return results, replica, time.monotonic(), dict(self._engine.metrics())

    async def roll_over(self, model: str) -> None:
      """Serves what is in the workdir now, unless it is this model already."""
      async with self._rolling:
        if model != self._engine.fingerprint:
          await asyncio.to_thread(self._engine.roll_over, self._workdir)

    async def reconfigure(self, config: Mapping[str, str]) -> None:
      """Called with each new `user_config`, and with the first."""
      await self.roll_over(config['model'])

  return Replica


def _sent(result: Result | Exception) -> Result | Exception:
  """What any frontend can read: an error of others' code may not be unpickled.

  One that is not fails all that are sent with it.
  """
  if not isinstance(result, Exception):
    return result
  for kind in (planning.UnknownHistory, planning.TooManyEvents, ValueError):
    if isinstance(result, kind):  # As `app` tells them apart.
      return kind(str(result))
  logging.error('the engine failed', exc_info=result)
  return RuntimeError(repr(result))


class RemoteEngine:
  """Engines in replicas, for `app.Service`; use `stop` at the end."""

  def __init__(
    self,
    make: Make,
    workdir: str,
    *,
    replicas: int = 2,
    buckets: int = 256,
    timeout_s: float = 30.0,
    options: Mapping[str, Any] | None = None,
    which: Literal['best', 'latest'] = 'best',
  ):
    """Starts the replicas; `wait` until they score.

    In the Ray cluster that this process is in, else in that of RAY_ADDRESS or
    of this host, else in a new one.

    Args:
      make: called in each replica.
      workdir: of the run, where every host has it.
      replicas: to begin with.
      buckets: of users; many more than replicas, so that they share evenly.
      timeout_s: of a batch.
      options: of `serve.deployment`, as `ray_actor_options={'num_gpus': 1}` or
        `autoscaling_config`.
      which: parameters that `make` takes.

    Raises:
      ValueError: there is no replica, or fewer buckets than replicas.
    """
    if not 1 <= replicas <= buckets:
      raise ValueError(f'replicas={replicas} must be in [1, buckets={buckets}]')
    self._buckets, self._timeout_s = buckets, timeout_s
    self._lost = self._roll_overs = 0
    # By replica: when it was told, when by the replica's clock, and what.
    self._told: dict[str, tuple[float, float, dict[str, float]]] = {}
    # Some more than its share, so that a new one gets some of the others'.
    most = -(-5 * buckets // (4 * replicas))
    deployment: Any = serve.deployment(_replica(most))
    all_options = {'ray_actor_options': {'num_cpus': 1}, **(options or {})}
    self._deployment = deployment.options(
      name='engine',
      num_replicas=replicas,
      max_ongoing_requests=64,
      **all_options,
    )
    self._arguments = make, os.path.abspath(workdir)
    # Another run in the cluster is another application; the same one of another
    # frontend is this one, whose replicas stay unless the arguments differ.
    self._name = f'{_NAME}-{_digest(self._arguments[1])}'
    asked = self._arguments, replicas, buckets, options
    self._version = _digest(ray.cloudpickle.dumps(asked))
    if not ray.is_initialized():
      ray.init(log_to_driver=False)  # Forks: before JAX has threads.
    _tell_what_lacks(replicas, all_options['ray_actor_options'])
    self.scorer: Scorer = Scorer.from_workdir(workdir, which)
    serve.start(
      proxy_location='Disabled',
      logging_config={'log_level': 'WARNING', 'enable_access_log': False},
    )
    self._handle: Any = None

  def wait(self) -> None:
    """Returns when all replicas score what is in the workdir now.

    Raises:
      RuntimeError: they cannot; the message says why.
    """
    self._run(self.fingerprint)

  def _run(self, model: str) -> None:
    deployment = self._deployment.options(user_config={'model': model})
    deployment._version = self._version  # With another one all begin anew.
    bound = deployment.bind(*self._arguments)
    try:
      self._handle = serve.run(bound, name=self._name, route_prefix=None)
    except RuntimeError as error:  # Which says that something failed.
      found = serve.status().applications.get(self._name)
      told = [] if found is None else [*found.deployments.values()]
      lines = [x.message.strip().rpartition('\n')[2] for x in told]
      raise RuntimeError('; '.join([str(error), *lines])) from error

  @property
  def fingerprint(self) -> str:
    """Of the model."""
    return self.scorer.fingerprint

  def bucket(self, user: str | int) -> str:
    """The bucket of a user; 7 and '7' are one, as in a log."""
    try:
      key = planning.user_key(self.scorer.config.schema, user)
    except ValueError:  # Any replica says why.
      key = ''
    return str(int(_digest(key), 16) % self._buckets)

  def score(self, requests: Sequence[Request]) -> list[Result | Exception]:
    """Scores each where its user's state is."""
    parts: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      parts.setdefault(self.bucket(request.user), []).append(i)
    answers: dict[str, Any] = {}
    found: dict[int, Result | Exception] = {}
    end = time.monotonic() + self._timeout_s
    for bucket, part in parts.items():
      handle = self._handle.options(multiplexed_model_id=bucket)
      try:
        answers[bucket] = handle.score.remote([requests[i] for i in part])
      except _NO_ANSWER as error:
        found |= self._unanswered(part, error)
    for bucket, answer in answers.items():
      part = parts[bucket]
      try:
        results, replica, when, counts = answer.result(
          timeout_s=max(0.0, end - time.monotonic())
        )
      except _NO_ANSWER as error:
        found |= self._unanswered(part, error)
        continue
      self._keep(replica, when, counts)
      found |= dict(zip(part, results, strict=True))
    return [found[i] for i in range(len(requests))]

  def _unanswered(
    self, part: Sequence[int], error: Exception
  ) -> dict[int, batcher.UnavailableError]:
    """What these requests are told."""
    self._lost += len(part)
    lost = batcher.UnavailableError(
      f'a replica does not answer: {error!r:.200}'
    )
    return dict.fromkeys(part, lost)

  def _keep(self, replica: str, when: float, counts: dict[str, float]) -> None:
    """Keeps what is the latest; answers come in any order."""
    before = self._told.get(replica)
    if before is None or before[1] <= when:
      self._told[replica] = time.monotonic(), when, counts

  def metrics(self) -> Mapping[str, Any]:
    """Of this frontend, and what each replica last told with its results."""
    limit = time.monotonic() - _FORGET_S
    told = self._told.copy()  # Others add to it meanwhile.
    for replica, (when, _, _) in told.items():
      if when <= limit:
        self._told.pop(replica, None)
    return {
      'roll_overs': self._roll_overs,
      'lost': self._lost,
      'replicas': {k: x[2] for k, x in told.items() if x[0] > limit},
    }

  def roll_over(self, scorer: Scorer) -> None:
    """Serves what is in the workdir now: each replica between two batches.

    One replica is the first: if it cannot, the others are not asked, and all
    of them go on with what they have.

    Args:
      scorer: of the workdir.

    Raises:
      Exception: as `Engine.roll_over`.
      RuntimeError: another replica cannot.
    """
    try:
      self._handle.roll_over.remote(scorer.fingerprint).result()
    except ray.exceptions.RayTaskError as error:  # A long story of Ray's.
      raise getattr(error, 'cause', None) or error from None
    self._run(scorer.fingerprint)
    self.scorer = scorer
    self._roll_overs += 1

  def stop(self) -> None:
    """Ends the replicas."""
    serve.delete(self._name)


def _tell_what_lacks(replicas: int, each: Mapping[str, Any]) -> None:
  """Ray waits for it without a word: a cluster may grow."""
  there = ray.cluster_resources()
  for option, name in (('num_cpus', 'CPU'), ('num_gpus', 'GPU')):
    wanted = replicas * (each.get(option) or 0)
    if wanted > there.get(name, 0):
      logging.error(
        'replicas=%d take %g %ss, and the Ray cluster has %g: it waits for '
        'more; add nodes, or start fewer replicas',
        *(replicas, wanted, name, there.get(name, 0)),
      )


def _digest(of: str | bytes) -> str:
  data = of.encode() if isinstance(of, str) else of
  return hashlib.blake2b(data, digest_size=8).hexdigest()
