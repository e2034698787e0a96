"""Programs that a scorer ran, run again and again without waiting."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from histjax.scoring import Scorer, graphs
from histjax.scoring.paged import Pool

_CALLS = 200  # Back to back, at most: each has its own output.


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A call of a program, and its request as long as there is no other.

  Attributes:
    call: the program.
    weights: its first argument.
    request: its last one.
    has_pool: whether it reads a pool in between,
    donates: and writes it.
    slot: that a CUDA graph reads, which is replayed in the program's place.
  """

  call: Callable[..., Any]
  weights: Any
  request: Any
  has_pool: bool
  donates: bool
  slot: graphs.Slot | None = None

  def times(
    self, seconds: float, pool: Pool
  ) -> tuple[Pool, dict[str, float | None]]:
    """Seconds, `call` of one of many and `kernels` of one, as `_kernels`.

    Calls read and write the same pages. One that writes is given the pool that
    the one before returned, so that it waits for it; of its kernels nothing is
    known (None), since what it is given it takes.

    Args:
      seconds: for the measurement, about.
      pool: may be donated; the one returned takes its place.
    """

    def one():
      nonlocal pool
      if self.slot is not None:
        out = self.slot.recording.launch(self.slot, tuple(pool))
        return out[-1] if self.donates else out
      if not self.has_pool:
        return self.call(self.weights, self.request)
      out = self.call(self.weights, *pool, self.request)
      if not self.donates:
        return out
      pool = Pool(*out[:2])
      return out[2]

    def enqueue(calls: int) -> float:
      begin = time.perf_counter()
      for _ in range(calls):
        out = one()
      jax.block_until_ready(out)
      return (time.perf_counter() - begin) / calls

    samples = [enqueue(1)]
    if samples[0] < seconds:
      calls = min(_CALLS, max(1, round(seconds / 3 / samples[0])))
      samples = [enqueue(calls) for _ in range(3)]
    arguments = (*pool, self.request) if self.has_pool else (self.request,)
    kernels = None
    if not self.donates:
      kernels = _kernels(self.call, self.weights, *arguments)
    return pool, {'call': float(np.median(samples)), 'kernels': kernels}


@contextlib.contextmanager
def recorded(scorer: Scorer) -> Iterator[list[Recorded]]:
  """The programs that a scorer starts meanwhile."""
  calls, call = [], scorer._call

  def recording(program, slot, *cached):
    result = call(program, slot, *cached)  # Compiles it, if it was not.
    has_pool = bool(cached)
    donates = has_pool and isinstance(result, tuple)
    one, request, replayed = program.call, slot.array, None
    if isinstance(slot, graphs.Slot):  # Its graph is made of this program.
      one, replayed = slot.recording._compiled, slot
      request = jax.device_put(slot.buffer.copy(), scorer.device)
    calls.append(
      Recorded(one, scorer._weights, request, has_pool, donates, replayed)
    )
    return result

  with mock.patch.object(scorer, '_call', recording):
    yield calls


def _kernels(call: Callable[..., Any], *arguments: Any) -> float | None:
  """Seconds of NVIDIA kernels and copies of a call, if CUPTI tells."""
  if jax.default_backend() != 'gpu':
    return None
  try:
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.measure(call, aggregate=False, iterations=5)
    _, calls = measured(*arguments)
  except (ImportError, AttributeError, TypeError, RuntimeError):
    return None  # An experimental extra, of no fixed interface.
  sums = [sum(t for _, t in kernels) for kernels in calls or []]
  return float(np.median(sums)) / 1e3 if sums else None
