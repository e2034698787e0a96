"""What it costs to read, to keep and to use long histories, by fusion."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarking import cost, rankers
from benchmarking import timing as timing_lib
from benchmarking.machine import environment
from histjax.cache import HistoryCache
from histjax.models.ranker import RankerConfig
from histjax.nn import fusion as fusion_lib
from histjax.testing import random_batch
from histjax.types import History

HEADER = (
  f'{"fusion":16} {"L":>6} {"encode ms":>10} {"score ms":>9} '
  f'{"extend ms":>10} {"state MiB":>10}'
)
_EXTENDS = 16


def run(
  config: RankerConfig,
  lengths: Sequence[int],
  num_candidates: int,
  *,
  fusions: Sequence[str] = (),
  num_rows: int = 1,
  seconds: float = 0.5,
  repeats: int = 5,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times `encode`, `score` from its cache, and `extend` by one event.

  Parameters are random, and every history is full.

  Args:
    config: of the model; its fusion does not matter.
    lengths: history lengths L.
    num_candidates: C.
    fusions: amortizable ones; empty: all of them.
    num_rows: users at once.
    seconds: least time spent on `encode`, and on `score`.
    repeats: rounds, in which fusions take turns.
    progress: called with a line per fusion and length.

  Returns:
    A JSON-able report: `environment` and `results`, for each fusion and length
    `encode`, `score` and `extend`, each its `Timing` in seconds; `bytes` of
    the state; and `formula`, the FLOPs of the blocks' products by call, as
    `cost.formula` counts them.

  Raises:
    ValueError: a fusion has no cache, a history is too short to extend, or one
      that was extended gives other scores than one that was read.
  """
  for name in fusions:
    if name not in fusion_lib.amortizable():
      raise ValueError(
        f'fusions has {name!r}; choose from {list(fusion_lib.amortizable())}'
      )
  if min(lengths) <= _EXTENDS:
    raise ValueError(
      f'lengths={list(lengths)} must be above {_EXTENDS}, the events that are '
      'appended one by one'
    )
  progress(HEADER)
  results = []
  for length in lengths:
    batch = random_batch(config.schema, num_rows, length, num_candidates)
    scorers = {
      name: cost.random_scorer(config, name)
      for name in fusions or fusion_lib.amortizable()
    }
    measured = _measure(scorers, batch, seconds, repeats)
    for name, entry in measured.items():
      results.append({'fusion': name, 'history_length': length, **entry})
      progress(
        f'{name:16} {length:6} {1e3 * entry["encode"]["median"]:10.2f} '
        f'{1e3 * entry["score"]["median"]:9.2f} '
        f'{1e3 * entry["extend"]["median"]:10.3f} '
        f'{entry["bytes"] / 2**20:10.1f}'
      )
  return {
    'suite': 'histories',
    'environment': environment(),
    'dtype': config.dtype,
    'num_layers': config.encoder.num_layers,
    'width': config.encoder.width,
    'num_heads': config.encoder.num_heads,
    'num_rows': num_rows,
    'candidates': num_candidates,
    'results': results,
  }


def _measure(scorers, batch, seconds, repeats) -> dict[str, dict[str, Any]]:
  """Each fusion's entry; they take turns, so that all see the same machine."""
  full, candidates = batch.history, batch.candidates  # Of full histories.
  found: dict[str, dict[str, Any]] = {}
  calls: dict[tuple[str, str], Callable[[], Any]] = {}
  for name, scorer in scorers.items():
    cache = scorer.encode(full)
    calls[name, 'encode'] = functools.partial(scorer.encode, full)
    calls[name, 'score'] = functools.partial(
      scorer.score, cache, candidates, batch.context
    )
    num_rows, length = len(full.length), int(full.length[0])
    found[name] = {
      'bytes': cache.nbytes,
      'formula': {
        call: num_rows * cost.formula_of(way, length, m, scorer.config)
        for call, way, m in (
          ('encode', 'joint', 0),
          ('score', 'cached', candidates.shape[1]),
        )
      },
    }
  for function in calls.values():  # Compiles.
    jax.block_until_ready(function())
  times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
  for _ in range(repeats):
    for key, function in calls.items():
      times[key] += timing_lib.samples(function, seconds / repeats)
  for (name, call), seen in times.items():
    found[name][call] = _timing(seen)
  for name, scorer in scorers.items():
    cache, seconds_each = _extends(scorer, full)
    rankers.check(
      f'{name}, extended against encoded',
      scorer.score(cache, candidates, batch.context),
      calls[name, 'score'](),
      scorer.config.dtype,
    )
    found[name]['extend'] = _timing(seconds_each)
  return found


def _extends(scorer, full: History) -> tuple[HistoryCache, list[float]]:
  """The whole history, of which events are appended one by one, and seconds."""
  first = full.length - _EXTENDS
  cache = scorer.encode(full.replace(length=first))
  one = np.ones_like(full.length)
  times = []
  for i in range(_EXTENDS):
    at = int(first[0]) + i
    event = History({k: v[:, [at]] for k, v in full.features.items()}, one)
    start = time.perf_counter()
    cache = scorer.extend(cache, event)
    jax.block_until_ready(cache)
    times.append(time.perf_counter() - start)
  return cache, times[1:]  # The first compiles.


def _timing(times: Sequence[float]) -> dict[str, Any]:
  low, median, high = np.percentile(times, (10, 50, 90)).tolist()
  return dataclasses.asdict(timing_lib.Timing(median, low, high, len(times)))
