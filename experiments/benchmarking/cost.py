"""How the cost of scoring grows with the history and with the candidates.

With l layers, n events, m candidates and width d, a layer's matrices cost
`O(d^2)` a token and its attention `O(n d)` a query, so that

    plain    O(l m n d^2 + l m n^2 d)          one row per candidate
    joint    O(l (n + m) d^2 + l n (n + m) d)  candidates have no keys
    paper    O(l (n + m) d^2 + l (n + m)^2 d)  its bound of a joint pass
    cached   O(l m d^2 + l n m d)              the history was read before

(arXiv 2412.06924, section 3). Where events do not attend, as in `cross_only`,
they cost `O(l n d^2)`: the joint pass is `O(l (n + m) d^2 + l n m d)`.
`formula` has the constants.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarking import rankers
from benchmarking import scoring as scoring_suite
from benchmarking import timing as timing_lib
from benchmarking.machine import environment, matmul_ceiling
from histjax import scoring
from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn import fusion as fusion_lib
from histjax.testing import random_batch

WAYS = ('plain', 'joint', 'cached')
_DRAWN = (*WAYS, 'paper')
_AXES = {'history_length': 'L', 'candidates': 'C'}


def formula(
  way: str,
  num_events: int,
  num_candidates: int,
  *,
  num_layers: int,
  width: int,
  mlp_width: int | None = None,
  own_keys: bool = False,
  events_attend: bool = True,
) -> float:
  """Floating-point operations of the blocks' matrix products, of one row.

  A product of `[q, a]` and `[a, b]` counts `2 q a b`: per token `4 d^2` for
  keys and values and `4 d^2 + 4 d f` for the rest, per query and key `4 d`.
  Tables, norms, softmax and the head are not in it.

  Args:
    way: 'plain', 'joint', 'cached', or 'paper', the bound of the paper.
    num_events: n.
    num_candidates: m.
    num_layers: l.
    width: d.
    mlp_width: f; None: 4 d.
    own_keys: whether each candidate attends to itself, too.
    events_attend: whether events go through the layers, or are only made keys
      and values of in each.
  """
  n, m, d = num_events, num_candidates, width
  keys_values = 4 * d * d
  rest = 4 * d * d + 4 * d * (mlp_width or 4 * d)
  if way == 'paper':
    tokens = n + m
    return num_layers * tokens * (keys_values + rest + 4 * d * tokens)
  own = keys_values + 4 * d if own_keys else 0
  cached = num_layers * (rest + own + 4 * n * d)  # Of one candidate.
  # Nothing reads the last layer's events, only their keys and values.
  updates = num_layers - 1 if events_attend else 0
  encode = n * (num_layers * keys_values + updates * (rest + 4 * n * d))
  return {
    'cached': m * cached,
    'joint': encode + m * cached,
    'plain': m * (encode + cached),
  }[way]


def run(
  config: RankerConfig,
  lengths: Sequence[int],
  candidates: Sequence[int],
  *,
  num_rows: int = 1,
  seconds: float = 0.2,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Counts and times the three ways, over L and over C, for each fusion.

  L varies at the middle one of `candidates`, C at the middle one of
  `lengths`. Every amortizable fusion is measured, with random parameters.

  Args:
    config: of the model; its fusion does not matter.
    lengths: history lengths L, ascending, at least two.
    candidates: numbers of candidates C, likewise.
    num_rows: users scored at once.
    seconds: least time spent on each measurement.
    progress: called with a line per workload, and with the table.

  Returns:
    A JSON-able report: `environment`, `ceiling_flops`; `results`, as that of
    the suite 'scoring', with `fusion` and `formula`, `{way: FLOPs}`, besides;
    `slopes`, see `slopes`.

  Raises:
    ValueError: there are not two lengths, or not two numbers of candidates; or
      the ways give different scores.
  """
  for name, values in (('lengths', lengths), ('candidates', candidates)):
    if len(values) < 2 or list(values) != sorted(set(values)):
      raise ValueError(
        f'{name}={list(values)} must be ascending, and two at least: one point '
        'has no slope'
      )
  ceiling = matmul_ceiling(config.dtype)
  middle = lengths[len(lengths) // 2], candidates[len(candidates) // 2]
  points = {(n, middle[1]) for n in lengths} | {
    (middle[0], m) for m in candidates
  }
  results = []
  for name in fusion_lib.amortizable():
    scorer = random_scorer(config, name)
    model = scorer.config
    progress(f'{name}\n{scoring_suite.HEADER}')
    for n, m in sorted(points):
      batch = random_batch(config.schema, num_rows, n, m)
      entry = scoring_suite.time_ways(scorer, batch, ceiling, seconds)
      progress(scoring_suite.line(entry))
      counted = {w: num_rows * formula_of(w, n, m, model) for w in _DRAWN}
      results.append({'fusion': name, **entry, 'formula': counted})
  report = {
    'suite': 'cost',
    'environment': environment(),
    'dtype': config.dtype,
    'num_layers': config.encoder.num_layers,
    'width': config.encoder.width,
    'num_heads': config.encoder.num_heads,
    'ceiling_flops': ceiling,
    'middle': dict(zip(_AXES, middle, strict=True)),
    'results': results,
    'slopes': slopes(results, dict(zip(_AXES, middle, strict=True))),
  }
  progress(table(report))
  return report


def fusions(
  config: RankerConfig,
  num_events: int,
  num_candidates: int,
  *,
  num_rows: int = 1,
  seconds: float = 0.2,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times scoring with every fusion, for `study.report.cost_figure`.

  Each in its fastest way: an amortizable one from a cache, which was made
  before, the others jointly. Parameters are random.

  Args:
    config: of the model; its fusion does not matter.
    num_events: L.
    num_candidates: C.
    num_rows: users scored at once.
    seconds: least time spent on each measurement.
    progress: called with a line per fusion.

  Returns:
    A JSON-able report: `environment`, `unit`, `fusions`, `{fusion: median in
    that unit}`, and `results`, with each one's way and `Timing`.

  Raises:
    ValueError: cached and joint scores of a fusion differ.
  """
  found: dict[str, float] = {}
  results = []
  for name in fusion_lib.FUSIONS:
    scorer = random_scorer(config, name)
    model = scorer.config
    batch = random_batch(config.schema, num_rows, num_events, num_candidates)
    way, call = 'joint', functools.partial(scorer.score_joint, batch)
    if scorer.config.amortizable:
      cache = scorer.encode(batch.history)
      way, joint = 'cached', call()
      call = functools.partial(
        scorer.score, cache, batch.candidates, batch.context
      )
      rankers.check(f'{name}, cached against joint', call(), joint, model.dtype)
    timing = timing_lib.measure(call, seconds=seconds)
    found[name] = 1e3 * timing.median
    results.append({'fusion': name, 'way': way, **dataclasses.asdict(timing)})
    progress(f'{name:18} {way:8} {found[name]:10.3f} ms')
  return {
    'suite': 'fusions',
    'environment': environment(),
    'dtype': config.dtype,
    'num_layers': config.encoder.num_layers,
    'width': config.encoder.width,
    'num_heads': config.encoder.num_heads,
    'unit': f'ms to score {num_candidates} candidates, {num_events} events',
    'fusions': found,
    'results': results,
  }


def random_scorer(config: RankerConfig, fusion: str) -> scoring.Scorer:
  """A scorer with another fusion, of random parameters."""
  model = dataclasses.replace(config, fusion=fusion)
  example = random_batch(config.schema, 1, 16, 16)
  variables = jax.jit(Ranker(model).init)(jax.random.key(0), example)
  return scoring.Scorer(model, variables)


def slopes(
  results: Sequence[Mapping[str, Any]], middle: Mapping[str, int]
) -> list[dict[str, Any]]:
  """The powers of L and C that costs grow with, by least squares of logs.

  Args:
    results: of `run`.
    middle: where the axis that does not vary stands.

  Returns:
    For each fusion and way `{'fusion', 'way', 'history_length': powers,
    'candidates': powers}`, powers being `{'flops', 'formula', 'seconds'}`.
  """
  rows = []
  for fusion in dict.fromkeys(r['fusion'] for r in results):
    for way in WAYS:
      row: dict[str, Any] = {'fusion': fusion, 'way': way}
      for axis in _AXES:
        line = _along(results, fusion, axis, middle)
        x = np.log([r[axis] for r in line])
        costs = {
          'flops': [r[way]['flops'] for r in line],
          'formula': [r['formula'][way] for r in line],
          'seconds': [r[way]['median'] for r in line],
        }
        row[axis] = {
          name: float(np.polyfit(x, np.log(y), 1)[0])
          for name, y in costs.items()
        }
      rows.append(row)
  return rows


def table(report: Mapping[str, Any]) -> str:
  """The slopes, in Markdown."""
  lines = [
    '| fusion | way | FLOPs ~ L^ | formula | time ~ L^ | FLOPs ~ C^ | formula '
    '| time ~ C^ |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for row in report['slopes']:
    cells = [row['fusion'], row['way']]
    for axis in _AXES:
      names = ('flops', 'formula', 'seconds')
      cells += [f'{row[axis][name]:.2f}' for name in names]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def plot(report: Mapping[str, Any]):
  """FLOPs and times against L and C, a row of panels for each fusion.

  Lines are the formulas: the FLOPs themselves, and beside times what these
  take at the measured rate of matrix products.

  Returns:
    A matplotlib figure with logarithmic axes.
  """
  from matplotlib import figure as figure_lib

  results, middle = report['results'], report['middle']
  names = list(dict.fromkeys(r['fusion'] for r in results))
  figure = figure_lib.Figure(
    figsize=(13, 3.1 * len(names) + 0.4), layout='constrained'
  )
  panels = figure.subplots(len(names), 4, squeeze=False)
  for axes, name in zip(panels, names, strict=True):
    for i, axis in enumerate(_AXES):
      line = _along(results, name, axis, middle)
      _panel(axes[i], line, axis, 'flops', rate=1.0)
      _panel(axes[2 + i], line, axis, 'median', rate=report['ceiling_flops'])
      (fixed,) = set(_AXES) - {axis}
      for panel in (axes[i], axes[2 + i]):
        panel.set_title(f'{_AXES[fixed]} = {middle[fixed]}', fontsize=9)
    axes[0].set_ylabel(f'{name}\nFLOPs')
    axes[2].set_ylabel('seconds per call')
    axes[0].legend(fontsize=7)
  figure.suptitle(
    f'points: measured; lines: formulas, beside times at '
    f'{report["ceiling_flops"] / 1e9:.0f} GFLOP/s; dotted: the bound of the '
    f'paper. {report["num_layers"]} layers, width {report["width"]}, '
    f'{report["dtype"]}, {report["environment"]["device"]}',
    fontsize=9,
  )
  return figure


def _panel(panel, line, axis: str, measured: str, rate: float) -> None:
  x = [r[axis] for r in line]
  for i, way in enumerate(_DRAWN):
    formulas = [r['formula'][way] / rate for r in line]
    if way == 'paper':
      panel.plot(x, formulas, ':', color='gray', label='paper')
      continue
    panel.plot(x, formulas, '-', color=f'C{i}', linewidth=0.9)
    values = [r[way][measured] for r in line]
    panel.plot(x, values, 'o', color=f'C{i}', markersize=4, label=way)
  panel.set(xscale='log', yscale='log', xlabel=_AXES[axis])
  panel.set_xticks(x, [str(v) for v in x])
  panel.minorticks_off()
  panel.grid(alpha=0.3)


def _along(results, fusion: str, axis: str, middle: Mapping[str, int]):
  """The results of a fusion in which only `axis` varies, in its order."""
  (fixed,) = set(_AXES) - {axis}
  rows = [
    r for r in results if r['fusion'] == fusion and r[fixed] == middle[fixed]
  ]
  return sorted(rows, key=lambda r: r[axis])


def formula_of(way: str, n: int, m: int, config: RankerConfig) -> float:
  """`formula` of a model."""
  return formula(
    way,
    n,
    m,
    num_layers=config.encoder.num_layers,
    width=config.encoder.width,
    mlp_width=config.encoder.mlp_width,
    own_keys=config.fusion == 'append_isolated',
    events_attend=config.fusion != 'cross_only',
  )
