"""How calls are timed.

Two numbers say how fast a program is. *Throughput* is the time of a call when
many are enqueued back to back: the device's own time, launches from the host
hidden. *Latency* is that of one call that is waited for. The calls of a
measurement get different inputs, and each takes the result of the one before
it, so that no compiler can merge, hoist or overlap them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

Step = Callable[[Any, Any], tuple[Any, Any]]
"""`(x, rest) -> (x of the next call, other results)`; x keeps its shape."""


@dataclasses.dataclass(frozen=True)
class Timing:
  """Wall time of one call, in seconds.

  Attributes:
    median: over the calls.
    low: their 10th percentile.
    high: their 90th percentile.
    calls: how many were timed.
  """

  median: float
  low: float
  high: float
  calls: int


def measure(
  function: Callable[[], Any], *, repeats: int = 5, seconds: float = 0.5
) -> Timing:
  """Times `function()` until both `repeats` and `seconds` are reached.

  Args:
    function: returns JAX arrays, which are waited for.
    repeats: the least number of timed calls.
    seconds: the least time spent on them.

  Returns:
    The timing, without the first call.
  """
  jax.block_until_ready(function())
  times = samples(function, seconds, repeats)
  low, median, high = np.percentile(times, (10, 50, 90))
  return Timing(float(median), float(low), float(high), len(times))


def samples(
  function: Callable[[], Any], seconds: float, repeats: int = 1
) -> list[float]:
  """Seconds of each call, for `seconds` in all and `repeats` at least."""
  times: list[float] = []
  while len(times) < repeats or sum(times) < seconds:
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return times


class Program(Protocol):
  """A contender compiled for one workload, its inputs on the device."""

  def output(self) -> list[np.ndarray]:
    """Its results on the first inputs, float32."""

  def enqueue(self, calls: int) -> float:
    """Seconds a call, about `calls` of them back to back."""

  def single(self, index: int) -> float:
    """Seconds of one call that is waited for."""

  def kernels(self) -> float | None:
    """Seconds of all kernels of one call, if the device can tell."""


class JaxProgram:
  """A jitted `Step` over several inputs."""

  def __init__(self, step: Step, x: Any, rests: Sequence[Any]):
    """Compiles the single call; the chain compiles when it first runs.

    Args:
      step: the function; its first result is `x` of the next call.
      x: the first argument of the first call.
      rests: the second arguments, as many as there are distinct inputs.
    """
    self._x, self._rests = x, list(rests)
    one = jax.jit(step)

    def chain(x, rests):
      others = []
      for rest in rests:
        x, other = one(x, rest)
        others.append(other)
      return x, others

    self._one = one.lower(x, self._rests[0]).compile()
    self._chain = jax.jit(chain)

  def output(self) -> list[np.ndarray]:
    """The results of the first call, x first."""
    out = jax.tree.leaves(self._one(self._x, self._rests[0]))
    return [np.asarray(y, np.float32) for y in out]

  def enqueue(self, calls: int) -> float:
    """See `Program`; the calls come in programs of one call an input."""
    x, other = self._x, None
    rounds = max(1, round(calls / len(self._rests)))
    start = time.perf_counter()
    for _ in range(rounds):
      x, other = self._chain(x, self._rests)
    jax.block_until_ready((x, other))
    elapsed = time.perf_counter() - start
    return elapsed / (rounds * len(self._rests))

  def single(self, index: int) -> float:
    """See `Program`."""
    rest = self._rests[index % len(self._rests)]
    start = time.perf_counter()
    jax.block_until_ready(self._one(self._x, rest))
    return time.perf_counter() - start

  def kernels(self) -> float | None:
    """See `Program`; CUPTI's times of NVIDIA kernels, the median of 5 calls."""
    if jax.default_backend() != 'gpu':
      return None
    try:
      from jax.experimental.mosaic.gpu import profiler

      measured = profiler.measure(self._one, aggregate=False, iterations=5)
      _, calls = measured(self._x, self._rests[0])
    except (ImportError, AttributeError, TypeError, RuntimeError):
      return None  # An experimental extra, of no fixed interface.
    milliseconds = [sum(t for _, t in kernels) for kernels in calls or []]
    return float(np.median(milliseconds)) / 1e3


def time_programs(
  programs: Mapping[str, Program],
  *,
  repeats: int = 15,
  seconds: float = 0.02,
  singles: int = 100,
) -> dict[str, dict[str, Any]]:
  """Times programs in turns, so that a machine's moods strike all alike.

  Args:
    programs: by name.
    repeats: throughput samples of each, and rounds.
    seconds: the least time of a sample.
    singles: single calls of each.

  Returns:
    By name, times in seconds: `throughput` (median, low, high of the samples,
    of which low and high are 10th and 90th percentiles), `latency` (p50, p99)
    and `kernels`.
  """
  calls = {k: _calls(program, seconds) for k, program in programs.items()}
  throughput: dict[str, list[float]] = {k: [] for k in programs}
  latency: dict[str, list[float]] = {k: [] for k in programs}
  for i in range(repeats):
    for name, program in programs.items():
      # Not timed: on a CPU, threads of the one before still spin for a while.
      program.enqueue(calls[name])
      throughput[name].append(program.enqueue(calls[name]))
      first, last = singles * i // repeats, singles * (i + 1) // repeats
      latency[name].extend(program.single(j) for j in range(first, last))
  result: dict[str, dict[str, Any]] = {}
  for name, program in programs.items():
    low, median, high = np.percentile(throughput[name], (10, 50, 90))
    p50, p99 = np.percentile(latency[name], (50, 99))
    result[name] = {
      'throughput': {
        'median': float(median),
        'low': float(low),
        'high': float(high),
        'samples': repeats,
      },
      'latency': {'p50': float(p50), 'p99': float(p99), 'calls': singles},
      'kernels': program.kernels(),
    }
  return result


def _calls(program: Program, seconds: float) -> int:
  """How many calls take at least `seconds`; warms up, too."""
  calls = 1
  while True:
    each = program.enqueue(calls)
    if each * calls >= seconds / 2:
      return max(1, round(seconds / each))
    calls *= 4
