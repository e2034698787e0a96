"""The plot of a load report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
  'store': 'states kept',
  'encode': 'history read on each request',
  'plain': 'history read for each candidate',
}


def plot(report: Mapping[str, Any]):
  """p99 by offered rate, and the highest rate within the limit.

  Returns:
    A matplotlib figure, logarithmic: the kinds are far from each other.
  """
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(figsize=(9, 3.6), layout='constrained')
  curve, bars = figure.subplots(1, 2)
  limit = report['settings']['limit_ms']
  for number, (kind, found) in enumerate(report['results'].items()):
    color = f'C{number}'
    tried = sorted(
      (x for x in found['tried'] if 'p99' in x), key=lambda x: x['offered']
    )
    rates = [x['offered'] for x in tried] or [found['capacity']]
    p99 = [x['p99'] for x in tried] or [found['alone']['p99']]
    curve.plot(rates, p99, marker='o', color=color, label=_NAMES[kind])
    rate = found['rate'] or found['capacity']
    bar = bars.bar(
      number, rate, color=color, hatch=None if found['rate'] else '//'
    )
    text = f'{rate:.3g}' if found['rate'] else f'{rate:.2g}, no limit'
    bars.bar_label(bar, [text], fontsize=8)
  curve.axhline(limit, color='black', linewidth=1)
  curve.set(xscale='log', yscale='log', xlabel='offered, requests/s')
  curve.set(ylabel='p99 from the scheduled arrival, ms')
  bars.set_xticks(range(len(report['results'])), list(report['results']))
  bars.set(yscale='log', ylabel=f'requests/s with p99 <= {limit:g} ms')
  bars.margins(y=0.15)
  for axis in (curve, bars):
    axis.grid(alpha=0.3)
  curve.legend(fontsize=7)
  load, environment = report['load'], report['environment']
  figure.suptitle(
    f'load, {environment["device"]}, {environment["cpu_count"]} cores; '
    f'histories of {load["history"]} to {load["longest"]} events, '
    f'{load["candidates"]} candidates',
    fontsize=10,
  )
  return figure
