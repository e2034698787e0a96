"""Tables and the plot of the suite `serving`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ('hit', 'extend', 'miss', 'no cache')
"""Of requests; see `serving`."""


def table(cell: Mapping[str, Any]) -> str:
  """One L and C: milliseconds by way, users and kind."""
  errors = cell['relative_error'].values()
  lines = [
    f'{cell["name"]}: a state takes {cell["state_bytes"] / 1024:.0f} KiB, '
    f'{1e3 * cell["copy_seconds"]:.3f} ms from host memory to the device; '
    f'relative error {max(errors):.1e}',
    f'  {"way":10} {"users":>5} {"kind":9} {"p50 ms":>10} {"p99 ms":>10} '
    f'{"calls":>6} {"over hit":>8}',
  ]
  for way in ('device', 'in process', 'http'):
    for users, kinds in cell.get(way, {}).items():
      for kind in KINDS:
        times = kinds[kind]
        p50 = times.get('p50', times.get('call'))
        rest = f'{"":>10} {"":>6}'
        if 'p99' in times:
          rest = f'{1e3 * times["p99"]:10.3f} {times["calls"]:6}'
        over = cell['ratios'][way][users].get(kind, 1.0)
        line = f'  {way:10} {users:>5} {kind:9} {1e3 * p50:10.3f} {rest} '
        line += f'{over:8.2f}'
        if times.get('kernels'):
          line += f'   kernels {1e3 * times["kernels"]:.3f}'
        lines.append(line)
  return '\n'.join(lines)


def plot(report: Mapping[str, Any]):
  """Milliseconds against L, a panel for each C and way, a line for each kind.

  Returns:
    A matplotlib figure; thin, dashed: all users at once.
  """
  from matplotlib import figure as figure_lib

  cells = report['results']
  counts = sorted({cell['candidates'] for cell in cells})
  ways = [w for w in ('device', 'in process', 'http') if w in cells[0]]
  figure = figure_lib.Figure(
    figsize=(3.4 * len(counts) + 0.6, 2.8 * len(ways) + 0.4),
    layout='constrained',
  )
  axes = figure.subplots(
    len(ways), len(counts), squeeze=False, sharex=True, sharey='row'
  )
  for way, row in zip(ways, axes, strict=True):
    for count, axis in zip(counts, row, strict=True):
      here = [cell for cell in cells if cell['candidates'] == count]
      for style, users in enumerate(
        sorted({u for cell in here for u in cell[way]}, key=int)
      ):
        those = [cell for cell in here if users in cell[way]]
        for color, kind in enumerate(KINDS):
          times = [cell[way][users][kind] for cell in those]
          axis.plot(
            [cell['length'] for cell in those],
            [1e3 * t.get('p50', t.get('call')) for t in times],
            marker='o',
            markersize=3,
            linewidth=(1.6, 0.8)[min(style, 1)],
            linestyle=('-', '--')[min(style, 1)],
            color=f'C{color}',
            label=f'{kind}, {users} at once',
          )
      axis.set(xscale='log', yscale='log', title=f'{way}, C {count}')
      axis.set_xticks([cell['length'] for cell in here])
      axis.set_xticklabels([str(cell['length']) for cell in here])
      axis.minorticks_off()
      axis.grid(alpha=0.3)
    row[0].set_ylabel('ms, p50')
  for axis in axes[-1]:
    axis.set_xlabel('L')
  axes[0][0].legend(fontsize=6)
  model = report['model']
  figure.suptitle(
    f'serving, {report["environment"]["device"]}; D {model["width"]}, '
    f'{model["num_layers"]} layers, {model["dtype"]}',
    fontsize=10,
  )
  return figure
