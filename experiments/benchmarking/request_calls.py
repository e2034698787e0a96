"""What a contender of the suite `request` is, and those written in JAX."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking import rankers
from benchmarking.workloads import Request
from histjax import scoring


class Pending(Protocol):
  """A request in flight."""

  def result(self) -> rankers.Logits:
    """Waits for its logits."""


@dataclasses.dataclass(frozen=True)
class Call:
  """What is timed.

  Attributes:
    run: a request's logits, of its number and what `prepare` made.
    prepare: what the call uses up, of the same number; not timed.
  """

  run: Callable[[int, Any], rankers.Logits]
  prepare: Callable[[int], Any] = lambda index: None


class Contender(Protocol):
  """Serves the requests that it was made with, by their numbers."""

  @property
  def runs(self) -> dict[str, str]:
    """What it runs, once its calls are made."""

  def call(self, name: str) -> Call:
    """One of `rankers.CALLS`, compiled."""

  def pipelines(
    self, depth: int
  ) -> Iterable[tuple[str, Callable[[int], Pending]]]:
    """Ways to have `depth` requests of 'score' in flight, by name.

    Each starts a request, of any number, once the one `depth` before it has
    been waited for.
    """


def make(
  name: str,
  workload: Request,
  params: Mapping[str, Any],
  requests: Sequence[rankers.Inputs],
) -> Contender:
  """The contender of a name.

  Args:
    name: 'histjax', which picks implementations by itself; 'histjax:<name>', an
      implementation of `ops.candidate_tower`; 'torch' or 'torch:<kind>', see
      `torch_requests`; 'floor', see `Floor`.
    workload: what to compute.
    params: of `histjax.Ranker`.
    requests: to serve.

  Raises:
    ValueError: no such contender.
    ImportError: PyTorch is not installed.
  """
  owner, _, kind = name.partition(':')
  if owner == 'torch':
    from benchmarking import torch_requests  # Only where it is installed.

    return torch_requests.Contender(kind, workload, params, requests)
  if owner == 'histjax':
    return Ours(kind or None, workload, params, requests)
  if name == 'floor':
    return Floor(workload, requests)
  raise ValueError(
    f"contender {name!r} is unknown; use 'histjax', 'histjax:<name of an "
    "implementation>', 'torch', 'torch:<kind>' or 'floor'"
  )


class Ours:
  """`histjax.Scorer`."""

  def __init__(
    self,
    implementation: str | None,
    workload: Request,
    params: Mapping[str, Any],
    requests: Sequence[rankers.Inputs],
  ):
    """Caches the first request's history; see `make`."""
    self._requests = requests
    self._scorer: Any = scoring.Scorer(
      rankers.config(workload, candidate_tower=implementation),
      params,
      scoring.ScorerConfig(microbatch=max(1024, workload.num_candidates)),
    )
    self._old = rankers.old_events(requests[0].history)
    self._cache = self._scorer.encode(requests[0].history)

  @property
  def runs(self) -> dict[str, str]:
    """See `Contender`."""
    first = self._requests[0]
    return self._scorer.backends(self._cache, first.candidates, first.context)

  def call(self, name: str) -> Call:
    """See `Contender`."""
    requests, scorer = self._requests, self._scorer

    def logits(cache, index):
      request = requests[index]
      return scorer.score(cache, request.candidates, request.context)

    if name == 'score':
      return Call(lambda index, _: logits(self._cache, index))
    if name == 'new user':
      return Call(
        lambda index, _: logits(scorer.encode(requests[index].history), index)
      )

    def prepare(index):
      del index
      cache = scorer.encode(self._old)  # `extend` uses it up.
      jax.block_until_ready((cache.keys, cache.values))
      return cache

    def extend(index, cache):
      return logits(scorer.extend(cache, requests[index].new_events), index)

    return Call(extend, prepare)

  def pipelines(
    self, depth: int
  ) -> Iterable[tuple[str, Callable[[int], Pending]]]:
    """See `Contender`."""

    def request(index):
      found = self._requests[index % len(self._requests)]
      return self._cache, found.candidates, found.context

    yield 'score_async', lambda index: self._scorer.score_async(*request(index))
    for size in sorted({depth // 2, depth} - {0, 1}):
      yield f'score_many of {size}', self._grouped(size, request)

  def _grouped(self, size, request) -> Callable[[int], Pending]:
    group = _Group(self._scorer, size)
    return lambda index: group.submit(request(index))


class _Group:
  """Requests that wait for one another, to be scored as one."""

  def __init__(self, scorer: scoring.Scorer, size: int):
    self._scorer, self._size = scorer, size
    self._waiting: list[tuple[Any, _Member]] = []

  def submit(self, request: Any) -> _Member:
    """Starts the group when it is full."""
    member = _Member(self)
    self._waiting.append((request, member))
    if len(self._waiting) == self._size:
      self.start()
    return member

  def start(self) -> None:
    """Scores those that wait."""
    requests, members = zip(*self._waiting, strict=True)
    self._waiting = []
    found = self._scorer.score_many_async(requests)
    for member, pending in zip(members, found, strict=True):
      member.pending = pending


@dataclasses.dataclass(eq=False)
class _Member:
  group: _Group
  pending: scoring.Pending | None = None

  def result(self) -> rankers.Logits:
    """Of a group that may not be full, at the end."""
    if self.pending is None:
      self.group.start()
    assert self.pending is not None
    return self.pending.result()


class Floor:
  """A trivial program with the bytes of a request, in and out.

  One int32 array goes in, ids and the bits of dense values; one float32 array
  comes out, to pinned host memory where that is faster. It bounds whatever
  takes this way through JAX.
  """

  def __init__(self, workload: Request, requests: Sequence[rankers.Inputs]):
    """Packs the requests, which is not timed."""
    shape = (
      len(rankers.SCHEMA.tasks),
      workload.num_rows,
      workload.num_candidates,
    )
    self._packed = {
      call: [_packed(request, call) for request in requests]
      for call in rankers.CALLS
    }

    def program(packed):
      return jnp.resize(packed, shape).astype(jnp.float32)

    self._programs = {'device': jax.jit(program)}
    device = jax.devices()[0]
    kinds = [m.kind for m in device.addressable_memories()]
    if 'pinned_host' in kinds and device.platform != 'cpu':
      sharding = jax.sharding.SingleDeviceSharding(
        device, memory_kind='pinned_host'
      )
      self._programs['pinned_host'] = jax.jit(program, out_shardings=sharding)
    self._chosen: dict[str, str] = {}

  @property
  def runs(self) -> dict[str, str]:
    """By call, the memory that logits are written to."""
    return dict(self._chosen)

  def call(self, name: str) -> Call:
    """See `Contender`."""
    packed = self._packed[name]
    calls = {
      kind: _floor_call(program, packed)
      for kind, program in self._programs.items()
    }
    seconds = {
      kind: min(_seconds(call, i % len(packed)) for i in range(20))
      for kind, call in calls.items()
    }
    self._chosen[name] = min(seconds, key=lambda k: seconds[k])
    return calls[self._chosen[name]]

  def pipelines(
    self, depth: int
  ) -> Iterable[tuple[str, Callable[[int], Pending]]]:
    """See `Contender`."""
    del depth
    packed = self._packed['score']
    for kind, program in self._programs.items():
      yield kind, functools.partial(_fetch, program, packed)


@dataclasses.dataclass(frozen=True)
class _Fetch:
  array: jax.Array

  def result(self) -> dict[str, np.ndarray]:
    """`{task: [B, C]}`."""
    found = np.asarray(self.array)
    return {t.name: found[i] for i, t in enumerate(rankers.SCHEMA.tasks)}


def _fetch(program, packed, index: int) -> _Fetch:
  return _Fetch(program(packed[index % len(packed)]))


def _floor_call(program, packed) -> Call:
  return Call(lambda index, _: _fetch(program, packed, index).result())


def _seconds(call: Call, index: int) -> float:
  start = time.perf_counter()
  call.run(index, None)
  return time.perf_counter() - start


def _packed(request: rankers.Inputs, call: str) -> np.ndarray:
  parts = [request.context, request.candidates.features]
  if call == 'new user':
    parts.append(request.history.features)
  elif call == 'extend and score':
    parts.append(request.new_events.features)
  return np.concatenate(
    [x.ravel().view(np.int32) for part in parts for x in part.values()]
  )
