"""What a benchmark leaves behind: tables, JSON and plots."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarking import cost, scoring


def write_report(report: Mapping[str, Any], output: str) -> list[str]:
  """Writes `<output>.json` and the plot `<output>.png`; returns their paths."""
  path = pathlib.Path(output)
  path.parent.mkdir(parents=True, exist_ok=True)
  json_path = path.with_name(path.name + '.json')
  json_path.write_text(json.dumps(report, indent=2) + '\n')
  plots = {
    'attention': roofline,
    'tower': roofline,
    'scoring': scoring.plot,
    'cost': cost.plot,
  }
  if report['suite'] not in plots:
    return [str(json_path)]
  figure_path = path.with_name(path.name + '.png')
  plots[report['suite']](report).savefig(figure_path, dpi=150)
  return [str(json_path), str(figure_path)]


def broken(report: Mapping[str, Any]) -> list[str]:
  """What of this library failed, but for calls that a backend refuses.

  A rival that fails is a result; the library's own code must not.
  """
  return [
    f'{entry["name"]} {name}: {row["failed"]}'
    for entry in report['results']
    for name, row in entry.get('contenders', {}).items()
    if name.startswith('histjax')
    and not row.get('failed', 'NotImplementedError').startswith(
      'NotImplementedError'
    )
  ]


def ceilings_line(report: Mapping[str, Any]) -> str:
  """The device and its measured ceilings, in a line."""
  ceilings = report['ceilings']
  return (
    f'{report["environment"]["device"]}: matmul '
    f'{ceilings["flops"] / 1e12:.4g} TFLOP/s, copy '
    f'{ceilings["bytes"] / 1e9:.4g} GB/s, exp '
    f'{ceilings["exponentials"] / 1e9:.4g} G/s'
  )


def table(entry: Mapping[str, Any]) -> str:
  """One workload's contenders, the fastest first, in microseconds."""
  floor = ', '.join(
    f'{k} {1e6 * seconds:.1f}' for k, seconds in entry['floor'].items()
  )
  lines = [
    f'{entry["name"]}: {entry["flops"] / 1e9:.2f} GFLOP; floors in us: {floor}',
    f'  {"contender":22} {"back to back":>12} {"p10..p90":>15} '
    f'{"single p50":>10} {"p99":>8} {"kernels":>8} {"TFLOP/s":>8} '
    f'{"ceiling":>7} {"error":>8} {"vs best":>7}',
  ]
  rows = entry['contenders'].items()
  rows = sorted(
    rows, key=lambda x: x[1].get('throughput', {}).get('median', np.inf)
  )
  for name, row in rows:
    if 'failed' in row:
      lines.append(f'  {name:22} failed: {row["failed"]}')
      continue
    through, latency = row['throughput'], row['latency']
    kernels = '' if row['kernels'] is None else f'{1e6 * row["kernels"]:.1f}'
    ratio = entry['ratios'].get(name, {}).get('throughput')
    lines.append(
      f'  {name:22} {1e6 * through["median"]:>12.1f} '
      f'{1e6 * through["low"]:>7.1f}{1e6 * through["high"]:>8.1f} '
      f'{1e6 * latency["p50"]:>10.1f} {1e6 * latency["p99"]:>8.1f} '
      f'{kernels:>8} '
      f'{row["flops_per_second"] / 1e12:>8.4g} '
      f'{row["fraction_of_ceiling"]:>7.1%} {row["relative_error"]:>8.1e} '
      f'{"" if ratio is None else format(ratio, ".2f"):>7}'
    )
  return '\n'.join(lines)


def request_table(entry: Mapping[str, Any]) -> str:
  """One workload's calls by contender, in milliseconds."""
  lines = [f'{entry["name"]}: {entry["workload"]}']
  for name, row in entry['contenders'].items():
    if 'failed' in row:
      lines.append(f'  {name:22} failed: {row["failed"]}')
      continue
    for call, times in row.items():
      if call != 'runs':
        lines.append(
          f'  {name:22} {call:18} p50 {1e3 * times["p50"]:9.3f} ms   '
          f'p99 {1e3 * times["p99"]:9.3f} ms   ({times["calls"]} calls)'
        )
    lines.append(f'  {name:22} runs {row["runs"]}')
  return '\n'.join(lines)


def roofline(report: Mapping[str, Any]):
  """Rate against intensity, under the ceilings measured in the run.

  Returns:
    A matplotlib figure with logarithmic axes; a column of points is a
    workload, ours filled, the best rival hollow.
  """
  from matplotlib import figure as figure_lib

  ceilings = report['ceilings']
  figure = figure_lib.Figure(figsize=(8, 4.8), layout='constrained')
  axis = figure.subplots()
  entries = [
    (e, e['flops'] / e['bytes'])
    for e in report['results']
    if any('throughput' in row for row in e['contenders'].values())
  ]
  intensities = [intensity for _, intensity in entries]
  x = np.geomspace(
    min([*intensities, 10]) / 2, max([*intensities, 1000]) * 2, 200
  )
  roof = np.minimum(ceilings['flops'], x * ceilings['bytes']) / 1e12
  axis.plot(x, roof, color='black', linewidth=1)
  for number, (entry, intensity) in enumerate(entries):
    color = f'C{number % 10}'
    rows = entry['contenders']
    ours = min(
      (k for k in rows if k in entry['ratios'] or k.startswith('histjax')),
      key=lambda k: rows[k].get('throughput', {}).get('median', np.inf),
      default=None,
    )
    for name, face in ((ours, color), (entry['best_rival'], 'none')):
      if name is not None and 'flops_per_second' in rows[name]:
        axis.scatter(
          intensity,
          rows[name]['flops_per_second'] / 1e12,
          edgecolors=color,
          facecolors=face,
          label=f'{entry["name"]}: {name}',
        )
    bound = entry['flops'] / max(entry['floor'].values()) / 1e12
    axis.scatter(intensity, bound, marker='_', color=color, s=80)
  axis.set(
    xscale='log',
    yscale='log',
    xlabel='FLOP per byte moved at least',
    ylabel='TFLOP/s',
    title=f'{report["suite"]}, {report["environment"]["device"]}; '
    'dashes: the floor that binds',
  )
  axis.grid(alpha=0.3)
  if entries:
    axis.legend(fontsize=6, ncols=2, loc='best')
  return figure
