"""Times the three ways to score, and says what share of the machine they use.

Times are of whole calls that wait for their result, after a warm-up that
compiles; medians over at least `repeats` calls. Arithmetic is counted by XLA
on the dense reference implementation, whose loops it can see through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarking import rankers
from benchmarking.machine import environment, matmul_ceiling
from benchmarking.timing import measure
from histjax import scoring
from histjax.models.ranker import Ranker, RankerConfig
from histjax.testing import random_batch
from histjax.types import RankingBatch


def flops(config: RankerConfig, batch: RankingBatch) -> dict[str, float]:
  """Floating-point operations of each way to score `batch`.

  Returns:
    `{'plain', 'joint', 'encode', 'cached'}`; 'cached' is of scoring alone.
  """
  dense = dataclasses.replace(
    config,
    encoder=dataclasses.replace(config.encoder, attention='reference'),
  )
  model = Ranker(dense)
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)

  def count(function, *args) -> float:
    compiled = jax.jit(function).lower(*args).compile()
    cost: Any = compiled.cost_analysis()
    return float(cost['flops'])

  def encode(variables, batch):
    return model.apply(variables, batch.history, method='encode')

  def score(variables, cache, batch):
    return model.apply(
      variables, cache, batch.candidates, batch.context, method='score'
    )

  single = batch.replace(
    candidates=jax.tree.map(lambda x: x[:, :1], batch.candidates)
  )
  cache = jax.eval_shape(encode, variables, batch)
  num_candidates = batch.candidates.shape[1]
  return {
    'plain': num_candidates * count(model.apply, variables, single),
    'joint': count(model.apply, variables, batch),
    'encode': count(encode, variables, batch),
    'cached': count(score, variables, cache, batch),
  }


def scoring_suite(
  config: RankerConfig,
  variables: Mapping[str, Any],
  lengths: Sequence[int],
  candidates: Sequence[int],
  *,
  num_rows: int = 1,
  seconds: float = 0.5,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times plain, joint and cached scoring over history lengths and candidates.

  Args:
    config: of the model; its fusion must be amortizable.
    variables: its parameters and tables.
    lengths: history lengths L.
    candidates: numbers of candidates C.
    num_rows: users scored at once.
    seconds: least time spent on each measurement.
    progress: called with a line per workload.

  Returns:
    A JSON-able report: `environment`, `ceiling_flops`, and `results`, one
    entry per workload: for each way its `Timing` in seconds, FLOPs, fraction
    of the ceiling, and the largest difference of its scores from plain ones.

  Raises:
    ValueError: the fusion is not amortizable, or the ways give different
      scores.
  """
  config.require_amortizable()
  scorer = scoring.Scorer(config, variables)
  ceiling = matmul_ceiling(config.dtype)
  results = []
  for num_events in lengths:
    for num_candidates in candidates:
      batch = random_batch(config.schema, num_rows, num_events, num_candidates)
      results.append(time_ways(scorer, batch, ceiling, seconds))
      progress(line(results[-1]))
  return {
    'suite': 'scoring',
    'environment': environment(),
    'dtype': config.dtype,
    'num_layers': config.encoder.num_layers,
    'width': config.encoder.width,
    'num_heads': config.encoder.num_heads,
    'ceiling_flops': ceiling,
    'results': results,
  }


def time_ways(
  scorer: scoring.Scorer, batch: RankingBatch, ceiling: float, seconds: float
) -> dict[str, Any]:
  """One entry of the `results` of `scoring_suite`.

  Raises:
    ValueError: the ways give different scores; nothing was timed.
  """
  cache = scorer.encode(batch.history)
  ways: dict[str, Callable] = {
    'plain': lambda: scorer.score_plain(batch),
    'joint': lambda: scorer.score_joint(batch),
    'encode': lambda: scorer.encode(batch.history),
    'cached': lambda: scorer.score(cache, batch.candidates, batch.context),
  }
  plain, differences = ways['plain'](), {'plain': 0.0}
  for name in ('joint', 'cached'):
    scores = ways[name]()
    rankers.check(f'{name}, against plain', scores, plain, scorer.config.dtype)
    differences[name] = max(
      float(np.abs(scores[task] - plain[task]).max()) for task in plain
    )
  counted = flops(scorer.config, batch)
  entry: dict[str, Any] = {
    'rows': batch.history.length.shape[0],
    'history_length': batch.history.features[
      next(iter(batch.history.features))
    ].shape[1],
    'candidates': batch.candidates.shape[1],
  }
  for name, function in ways.items():
    timing = measure(function, seconds=seconds)
    entry[name] = dataclasses.asdict(timing) | {
      'flops': counted[name],
      'fraction_of_ceiling': counted[name] / timing.median / ceiling,
    }
    if name in differences:
      entry[name]['max_difference_from_plain'] = differences[name]
  return entry


HEADER = (
  f'{"rows":>5} {"L":>6} {"C":>6} {"plain ms":>10} {"joint ms":>10} '
  f'{"encode ms":>10} {"cached ms":>10} {"plain/joint":>12} '
  f'{"plain/cached":>12} {"largest diff":>13}'
)


def line(entry: Mapping[str, Any]) -> str:
  """An entry's times, under `HEADER`."""
  ms = {k: 1e3 * entry[k]['median'] for k in _WAYS}
  difference = max(
    entry[k]['max_difference_from_plain'] for k in ('joint', 'cached')
  )
  return (
    f'{entry["rows"]:>5} {entry["history_length"]:>6} '
    f'{entry["candidates"]:>6} {ms["plain"]:>10.2f} {ms["joint"]:>10.2f} '
    f'{ms["encode"]:>10.2f} {ms["cached"]:>10.2f} '
    f'{ms["plain"] / ms["joint"]:>11.1f}x '
    f'{ms["plain"] / ms["cached"]:>11.1f}x {difference:>13.2e}'
  )


_WAYS = ('plain', 'joint', 'encode', 'cached')


def plot(report: Mapping[str, Any]):
  """Latency against C at the longest L, and against L at the largest C.

  Returns:
    A matplotlib figure with logarithmic axes.
  """
  from matplotlib import figure as figure_lib

  results = report['results']
  figure = figure_lib.Figure(figsize=(9, 3.6), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  panels = (('candidates', 'history_length'), ('history_length', 'candidates'))
  for axis, (x, fixed) in zip(axes, panels, strict=True):
    value = max(r[fixed] for r in results)
    rows = sorted((r for r in results if r[fixed] == value), key=lambda r: r[x])
    for way in _WAYS:
      median = np.array([r[way]['median'] for r in rows])
      low = median - [r[way]['low'] for r in rows]
      high = np.array([r[way]['high'] for r in rows]) - median
      axis.errorbar(
        [r[x] for r in rows],
        1e3 * median,
        1e3 * np.maximum([low, high], 0),
        marker='o',
        markersize=3,
        label=way,
      )
    axis.set(xscale='log', yscale='log', xlabel=x.replace('_', ' '))
    values = [r[x] for r in rows]
    axis.set_xticks(values, [str(v) for v in values])
    axis.minorticks_off()
    axis.set_title(f'{fixed.replace("_", " ")} = {value}', fontsize=10)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('milliseconds per call')
  axes[0].legend()
  device = report['environment']['device']
  figure.suptitle(
    f'{report["num_layers"]} layers, width {report["width"]}, '
    f'{report["dtype"]}, {device}',
    fontsize=10,
  )
  return figure
