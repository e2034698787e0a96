"""The table and the figures of a study, from its summary alone."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_study.summary import RESAMPLED
from histjax.nn import fusion as fusion_lib

Values = Mapping[str, Any]


def write(
  summary: Values,
  output: str | os.PathLike[str],
  cost: str | os.PathLike[str] | None = None,
) -> list[str]:
  """Writes study.md, quality.png and, given costs, cost.png.

  Args:
    summary: of `study.summary.load`.
    output: a folder.
    cost: a JSON file `{'unit': 'ms per request of ...', 'fusions': {fusion:
      value}}` of measured scoring costs, if any.

  Returns:
    The paths.
  """
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / 'study.md', folder / 'quality.png']
  paths[0].write_text(markdown(summary))
  quality(summary).savefig(paths[1], dpi=150)
  if cost is not None:
    paths.append(folder / 'cost.png')
    costs = json.loads(pathlib.Path(cost).read_text())
    cost_figure(summary, costs).savefig(paths[2], dpi=150)
  return [str(path) for path in paths]


def markdown(summary: Values) -> str:
  """A table for each dataset."""
  baseline, margin = summary['baseline'], summary['margin']
  parts = [
    'Mean of the seeds +- standard deviation, on test. Differences are to '
    f'`{baseline}` with the same window, of ablations to their fusion without '
    'the change or to the ablation that is named after "to": 95 % interval of '
    f'{summary["resamples"]} resamples of users, '
    'then, in parentheses, of users and seeds. "Equivalent" is the two '
    f'one-sided tests at a margin of {margin}, 5 % each.'
  ]
  for name, rows in summary['datasets'].items():
    header = [
      *('fusion', 'window', 'seeds', 'AUC', 'GAUC', 'logloss', 'NE'),
      *('AUC difference', 'verdict', 'GAUC difference', 'verdict'),
      *('parameters', 'seconds'),
    ]
    lines = [f'## {name}', '', _line(header), _line(['---'] * len(header))]
    lines += [_line(_cells(row)) for row in rows]
    parts.append('\n'.join(lines))
  return '\n\n'.join(parts) + '\n'


def quality(summary: Values):
  """AUC and GAUC by variant: means with 95 % intervals, and each seed.

  Returns:
    A matplotlib figure, a row of panels for each dataset.
  """
  from matplotlib import figure as figure_lib

  datasets = summary['datasets']
  most = max(len(rows) for rows in datasets.values())
  figure = figure_lib.Figure(
    figsize=(10, (0.8 + 0.26 * most) * len(datasets)), layout='constrained'
  )
  panels = figure.subplots(len(datasets), 2, squeeze=False)
  for axes, (name, rows) in zip(panels, datasets.items(), strict=True):
    for axis, metric in zip(axes, RESAMPLED, strict=True):
      for place, row in enumerate(reversed(rows)):
        value = row[metric]
        if value['mean'] is None:
          continue
        color = _COLORS[row['kind']]
        axis.plot([value['low'], value['high']], [place, place], color=color)
        axis.plot(value['mean'], place, 'o', color=color, markersize=5)
        axis.plot(
          value['values'],
          [place] * len(value['values']),
          '|',
          color='black',
          markersize=5,
        )
      for row in rows:
        if (
          row['variant'] == summary['baseline']
          and row is _first(rows, row['variant'])
          and row[metric]['mean'] is not None
        ):
          axis.axvline(row[metric]['mean'], color='gray', linewidth=0.8)
      labels = [f'{r["variant"]}, {r["window"]}' for r in reversed(rows)]
      axis.set_yticks(range(len(rows)), labels, fontsize=8)
      axis.set_title(f'{name}, test {metric.upper()}', fontsize=10)
      axis.grid(alpha=0.3, axis='x')
    axes[1].set_yticklabels([])
  figure.suptitle(
    'mean of seeds (dot), seeds (bars), 95 % interval over users (line); '
    f'gray: {summary["baseline"]}',
    fontsize=9,
  )
  return figure


def cost_figure(summary: Values, cost: Values):
  """AUC against the measured cost of scoring, a point for each fusion.

  Returns:
    A matplotlib figure, a panel for each dataset.

  Raises:
    ValueError: no fusion of the study has a cost.
  """
  from matplotlib import figure as figure_lib

  datasets, costs = summary['datasets'], cost['fusions']
  figure = figure_lib.Figure(
    figsize=(5 * len(datasets), 3.6), layout='constrained'
  )
  axes = figure.subplots(1, len(datasets), squeeze=False)[0]
  for axis, (name, rows) in zip(axes, datasets.items(), strict=True):
    shown = [
      _first(rows, fusion)
      for fusion in costs
      if any(row['variant'] == fusion for row in rows)
    ]
    if not shown:
      raise ValueError(
        f'cost: none of {list(costs)} is a fusion of {name}; its fusions are '
        f'{sorted({row["variant"] for row in rows})}'
      )
    for row in shown:
      auc, interval = row['auc'], None
      if auc['mean'] is None:
        continue
      if auc['low'] is not None:  # Or it is undefined on some resamples.
        interval = [
          [max(auc['mean'] - auc['low'], 0)],
          [max(auc['high'] - auc['mean'], 0)],
        ]
      axis.errorbar(
        costs[row['variant']],
        auc['mean'],
        interval,
        fmt='o' if row['amortizable'] else 's',
        capsize=2,
        label=row['variant'],
      )
    axis.set(xscale='log', xlabel=cost['unit'], ylabel='test AUC', title=name)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, title='dot: amortizable', title_fontsize=7)
  return figure


_COLORS = {'floor': 'C7', 'grid': 'C0', 'ablation': 'C1'}


def _first(rows: Sequence[Values], variant: str) -> Values:
  """The row of a variant with the first of its windows."""
  return next(row for row in rows if row['variant'] == variant)


def _line(cells: Sequence[str]) -> str:
  return f'| {" | ".join(cells)} |'


def _cells(row: Values) -> list[str]:
  compared = row['compared']
  cells = [row['variant'], str(row['window']), str(len(row['seeds']))]
  cells += [_metric(row[m]) for m in ('auc', 'gauc', 'logloss', 'ne')]
  for metric in RESAMPLED:
    if compared is None or metric not in compared:
      cells += ['', '']
    else:
      ours, wider = compared[metric], compared[f'{metric}_seeds']
      to = (
        '' if compared['to'] in fusion_lib.FUSIONS else f' to {compared["to"]}'
      )
      cells.append(
        f'{ours["difference"]:+.4f} {_interval(ours)} ({_interval(wider)}){to}'
      )
      cells.append(
        ours['verdict']
        if ours['verdict'] == wider['verdict']
        else f'{ours["verdict"]} ({wider["verdict"]})'
      )
  cells.append(f'{row["num_parameters"]:,}')
  cells.append(f'{row["seconds"]:.0f}' if 'seconds' in row else '')
  return cells


def _interval(values: Values) -> str:
  return f'[{values["low"]:+.4f}, {values["high"]:+.4f}]'


def _metric(values: Values) -> str:
  if values['mean'] is None:
    return ''
  text = f'{values["mean"]:.4f}'
  if values['deviation'] is not None and len(values['values']) > 1:
    text += f' +- {values["deviation"]:.4f}'
  return text
