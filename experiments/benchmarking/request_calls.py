"""What a contender of the suite `request` is, and those written in JAX."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking import rankers
from benchmarking.workloads import Request
from histjax import quantization, scoring
from histjax.scoring import flight, paged, transport
from histjax.scoring import layout as layout_lib
from histjax.scoring import pages as pages_lib
from histjax.serving import pages

DEPTHS = (1, 2, 4, 8)
"""Requests in flight."""


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


CACHE_DTYPES: Mapping[str, quantization.Kind | None] = {
  'histjax': None,
  'histjax-int8': 'int8',
  'histjax-float8': 'float8_e4m3fn',
}


def make(
  name: str,
  workload: Request,
  variables: Mapping[str, Any],
  requests: Sequence[rankers.Inputs],
) -> Contender:
  """The contender of a name.

  Args:
    name: 'histjax' (`Pages`), 'histjax-int8' or 'histjax-float8', likewise
      with states in 8 bits, or 'histjax-arrays' (`Arrays`), which pick
      implementations by themselves; with ':<name>' an implementation of
      `ops.candidate_tower`; 'torch' or 'torch:<kind>', see
      `torch_requests`; 'floor', see `Floor`.
    workload: what to compute.
    variables: of `histjax.Ranker`.
    requests: to serve.

  Raises:
    ValueError: no such contender.
    ImportError: PyTorch is not installed.
  """
  owner, _, kind = name.partition(':')
  if owner == 'torch':
    from benchmarking import torch_requests  # Only where it is installed.

    return torch_requests.Contender(kind, workload, variables, requests)
  if owner in CACHE_DTYPES:
    return Pages(
      kind or None, workload, variables, requests, CACHE_DTYPES[owner]
    )
  if owner == 'histjax-arrays':
    return Arrays(kind or None, workload, variables, requests)
  if name == 'floor':
    return Floor(workload, requests)
  raise ValueError(
    f'contender {name!r} is unknown; use {", ".join(map(repr, CACHE_DTYPES))} '
    "or 'histjax-arrays', each with ':<name of an implementation>' if wanted, "
    "'torch', 'torch:<kind>' or 'floor'"
  )


class Arrays:
  """`histjax.Scorer`, a user's state in arrays of its own."""

  def __init__(
    self,
    implementation: str | None,
    workload: Request,
    variables: Mapping[str, Any],
    requests: Sequence[rankers.Inputs],
  ):
    """Caches the first request's history; see `make`."""
    self._requests = requests
    self._scorer = _scorer(implementation, workload, variables)
    self._old = rankers.old_events(requests[0].history)
    self._cache = self._scorer.encode(requests[0].history)
    self._done = self._scorer.warm_up(
      rows=workload.num_rows,
      events=workload.num_events,
      candidates=workload.num_candidates,
      requests=max(DEPTHS),
      calls=['score'],
    )

  @property
  def runs(self) -> dict[str, str]:
    """See `Contender`; and how many programs are replayed as graphs."""
    first, done = self._requests[0], self._done
    found = self._scorer.backends(self._cache, first.candidates, first.context)
    return {**found, 'replayed': f'{done.num_recorded} of {done.num_programs}'}

  def call(self, name: str) -> Call:
    """See `Contender`."""
    requests, scorer = self._requests, self._scorer

    def logits(cache, index):
      request = requests[index]
      return scorer.score(cache, request.candidates, request.context)

    if name == 'score':
      return Call(lambda index, _: logits(self._cache, index))
    if name == 'new user':

      def new_user(index, _):
        request = requests[index]
        return scorer.encode_and_score(
          request.history, request.candidates, request.context
        )[1]

      return Call(new_user)

    def prepare(index):
      del index
      cache = scorer.encode(self._old)  # `extend` uses it up.
      jax.block_until_ready((cache.keys, cache.values))
      return cache

    def extend(index, cache):
      request = requests[index]
      return scorer.extend_and_score(
        cache, request.new_events, request.candidates, request.context
      )[1]

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
      group = _Group(
        lambda indices: self._scorer.score_many_async(
          [request(i) for i in indices]
        ),
        size,
      )
      yield f'score_many of {size}', group.submit


class Pages:
  """`PagedScorer`: users' states in a pool, as a server holds them."""

  def __init__(
    self,
    implementation: str | None,
    workload: Request,
    variables: Mapping[str, Any],
    requests: Sequence[rankers.Inputs],
    cache_dtype: quantization.Kind | None = None,
  ):
    """Writes the first request's histories into the pool; see `make`."""
    self._requests, self._workload = requests, workload
    self._rows = workload.num_rows
    scorer = self._scorer = _scorer(
      implementation, workload, variables, cache_dtype
    )
    self._paged = paged.PagedScorer(scorer)
    shape = pages.Shape.of(scorer.config, scorer.options)
    number = pages_lib.number(workload.num_events)
    count = 3 * self._rows * number + 1
    pool = pages.Pages(shape, count, scorer.device).pool
    index = np.arange(1, count, dtype=np.int32).reshape(3, self._rows, number)
    length, events = requests[0].history.length, workload.num_events
    # Of those who are scored, of new users, and of those with new events.
    self._scored, self._new = (
      paged.Place(x, x, length, events) for x in index[:2]
    )
    old = rankers.old_events(requests[0].history).length
    before = np.arange(number) < old[:, None] // pages_lib.EVENTS
    write = np.where(before, count, index[2])  # These pages stay.
    self._extended = paged.Place(index[2], write, old, events)
    # Of several requests, each of the same users.
    self._places = {
      n: paged.Place(
        np.tile(index[0], (n, 1)),
        np.tile(index[0], (n, 1)),
        np.tile(length, n),
        events,
      )
      for n in range(1, max(DEPTHS) + 1)
    }
    self._pool = pool
    self._programs = self._recorded = 0
    self._warm_up(self._rows, rankers.NEW_EVENTS, paged.CALLS)
    self._warm_up(self._rows * max(DEPTHS), 0, ['score'])
    for place in (self._scored, self._extended._replace(write=index[2])):
      self._write(0, place)

  def _warm_up(self, rows: int, new_events: int, calls: Any) -> None:
    workload = self._workload
    self._pool, done = self._paged.warm_up(
      self._pool,
      rows=rows,
      events=workload.num_events,
      candidates=workload.num_candidates,
      new_events=new_events,
      visible=False,
      calls=calls,
    )
    self._programs += done.num_programs
    self._recorded += done.num_recorded

  @property
  def runs(self) -> dict[str, str]:
    """See `Contender`; and how many programs are replayed as graphs."""
    first = self._requests[0]
    cache = self._scorer.encode(first.history)
    found = self._scorer.backends(cache, first.candidates, first.context)
    return {**found, 'replayed': f'{self._recorded} of {self._programs}'}

  def call(self, name: str) -> Call:
    """See `Contender`."""
    if name == 'score':
      return Call(lambda index, _: self._score(index).result())
    if name == 'new user':
      return Call(lambda index, _: self._write(index, self._new).result())

    def extend(index, prepared):
      del prepared
      request = self._requests[index]
      self._pool, pending = self._paged.extend(
        self._pool,
        self._extended,
        request.new_events,
        request.candidates,
        request.context,
      )
      return pending.result()

    return Call(extend)

  def pipelines(
    self, depth: int
  ) -> Iterable[tuple[str, Callable[[int], Pending]]]:
    """See `Contender`; several requests can be the rows of one, too."""
    for size in [n for n in DEPTHS if n <= depth]:
      yield f'{size} at once', _Group(self._start, size).submit

  def _write(self, index: int, place: paged.Place) -> Pending:
    request = self._requests[index]
    self._pool, pending = self._paged.encode(
      self._pool,
      place,
      request.history,
      request.candidates,
      request.context,
    )
    return pending

  def _score(self, index: int) -> Pending:
    request = self._requests[index]
    return self._paged.score(
      self._pool, self._scored, request.candidates, request.context
    )

  def _start(self, indices: list[int]) -> Sequence[Pending]:
    # A group that is not full has the program of one that is.
    given = [self._requests[i % len(self._requests)] for i in indices]
    return self._paged.score_many(
      self._pool,
      self._places[len(given)],
      [(x.candidates, x.context) for x in given],
    )


def _scorer(
  implementation, workload, variables, cache_dtype=None
) -> scoring.Scorer:
  return scoring.Scorer(
    rankers.config(workload, candidate_tower=implementation),
    variables,
    scoring.ScorerConfig(
      microbatch=max(1024, workload.num_candidates),
      history_buckets=(workload.num_events,),
      candidate_buckets=(workload.num_candidates,),
      row_buckets=tuple(workload.num_rows * n for n in DEPTHS),
      new_event_buckets=(rankers.NEW_EVENTS,),
      cache_dtype=cache_dtype,
    ),
  )


class _Group:
  """Requests that wait for one another, to be scored as one."""

  def __init__(self, start: Callable[[list[Any]], Sequence[Pending]], size):
    self._start, self._size = start, size
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
    found = self._start(list(requests))
    for member, pending in zip(members, found, strict=True):
      member.pending = pending


@dataclasses.dataclass(eq=False)
class _Member:
  group: _Group
  pending: Pending | None = None

  def result(self) -> rankers.Logits:
    """Of a group that may not be full, at the end."""
    if self.pending is None:
      self.group.start()
    assert self.pending is not None
    return self.pending.result()


class Floor:
  """A trivial program with the bytes of a request, in and out.

  One int32 array goes in, ids and the bits of dense values, and one float32
  array comes out, by the library's own transport. It bounds whatever takes this
  way through JAX.
  """

  def __init__(self, workload: Request, requests: Sequence[rankers.Inputs]):
    """Packs the requests, which is not timed."""
    self._shape = (
      len(rankers.SCHEMA.tasks),
      workload.num_rows,
      workload.num_candidates,
    )
    self._packed = {
      call: [_packed(request, call) for request in requests]
      for call in rankers.CALLS
    }
    self._transport = transport.of_device(jax.devices()[0])

  @property
  def runs(self) -> dict[str, str]:
    """By call, the memory that requests and logits go through."""
    memory = 'NumPy' if self._transport.output is None else 'pinned_host'
    return dict.fromkeys(self._packed, memory)

  def call(self, name: str) -> Call:
    """See `Contender`."""
    start = self._starter(name, 1)

    def run(index, prepared):
      del prepared
      return start([index])[0].result()

    return Call(run)

  def pipelines(
    self, depth: int
  ) -> Iterable[tuple[str, Callable[[int], Pending]]]:
    """See `Contender`; several requests go in one array, too."""
    for size in [n for n in DEPTHS if n <= depth]:
      group = _Group(self._starter('score', size), size)
      yield f'{size} at once', group.submit

  def _starter(self, name: str, size: int) -> Callable[[list[int]], list[Any]]:
    """What starts a program with the bytes of `size` requests."""
    packed = self._packed[name]
    layout = layout_lib.Layout(
      (layout_lib.numbers('all', (size, packed[0].size)),)
    )
    shape, carrier = (size, *self._shape), self._transport

    def trivial(request):
      return jnp.resize(carrier.read(request)[0], shape).astype(jnp.float32)

    program = jax.jit(trivial, out_shardings=carrier.output)
    owner: Any = types.SimpleNamespace(layout=layout)

    def start(indices):
      slot = carrier.slot(layout)
      for i, index in enumerate(indices):
        slot.views['all'].features['all'][i] = packed[index % len(packed)]
      logits = program(slot.array)
      at_work = flight.Flight(owner, slot, logits, carrier)
      return [_Bytes(at_work, i) for i in range(len(indices))]

    return start


@dataclasses.dataclass(frozen=True)
class _Bytes:
  flight: flight.Flight
  index: int

  def result(self) -> rankers.Logits:
    """`{task: [B, C]}`."""
    found = self.flight.fetch()[0][self.index]
    return {t.name: found[i] for i, t in enumerate(rankers.SCHEMA.tasks)}


def _packed(request: rankers.Inputs, call: str) -> np.ndarray:
  parts = [request.context, request.candidates.features]
  if call == 'new user':
    parts.append(request.history.features)
  elif call == 'extend and score':
    parts.append(request.new_events.features)
  return np.concatenate(
    [x.ravel().view(np.int32) for part in parts for x in part.values()]
  )
