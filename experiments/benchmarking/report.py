"""What a benchmark leaves behind: tables, JSON and plots."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarking import (
  cost,
  devices,
  load_plot,
  scoring,
  serving_report,
  tables,
  train_rows,
)
from histjax.training import report as run_report


def write_report(report: Mapping[str, Any], output: str) -> list[str]:
  """Writes `<output>.json` and the plot `<output>.png`; returns their paths.

  What is not finite, as the error of wrong results, becomes null.
  """
  path = pathlib.Path(output)
  path.parent.mkdir(parents=True, exist_ok=True)
  json_path = path.with_name(path.name + '.json')
  run_report.write_json(json_path, report)
  plots = {
    'attention': roofline,
    'tower': roofline,
    'request': requests_plot,
    'scoring': scoring.plot,
    'cost': cost.plot,
    'serving': serving_report.plot,
    'load': load_plot.plot,
    'tables': tables.plot,
    'devices': devices.plot,
    'train_step': train_rows.plot,
  }
  with_plot = report['suite'] in plots
  if report['suite'] == 'train_step':  # Full rows have none.
    with_plot = any('num_users' in r['workload'] for r in report['results'])
  if not with_plot:
    return [str(json_path)]
  figure_path = path.with_name(path.name + '.png')
  plots[report['suite']](report).savefig(figure_path, dpi=150)
  return [str(json_path), str(figure_path)]


def broken(report: Mapping[str, Any]) -> list[str]:
  """What of this library failed, but for calls that a backend refuses.

  A rival that fails is a result; the library's own code must not.
  """
  return [
    f'{entry["name"]} {" ".join([name, *call])}: {part["failed"]}'
    for entry in report['results']
    for name, row in entry.get('contenders', {}).items()
    if name.startswith('histjax')
    for call, part in _parts(row)
    if not part.get('failed', 'NotImplementedError').startswith(
      'NotImplementedError'
    )
  ]


def _parts(row: Mapping[str, Any]):
  """The row, and of it what is one call's."""
  yield (), row
  for call, part in row.items():
    if isinstance(part, Mapping):
      yield (call,), part


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
  """One workload's calls by contender: milliseconds, and requests a second."""
  lines = [f'{entry["name"]}: {entry["workload"]}']
  for name, row in entry['contenders'].items():
    if 'failed' in row:
      lines.append(f'  {name:22} failed: {row["failed"]}')
      continue
    for call, times in row.items():
      head = f'  {name:22} {call:18} '
      if 'failed' in times:
        lines.append(f'{head}failed: {times["failed"]}')
      elif 'p50' in times:
        lines.append(
          f'{head}p50 {1e3 * times["p50"]:9.3f} ms   '
          f'p99 {1e3 * times["p99"]:9.3f} ms   ({times["calls"]} calls)'
        )
      elif call == 'in_flight':
        rates = (f'{k}: {rate:.5g}' for k, rate in times.items())
        lines.append(f'{head}requests/s  {"   ".join(rates)}')
    lines.append(f'  {name:22} runs {row["runs"]}')
  for name, ratios in entry.get('ratios', {}).items():
    told = [
      f'{call} {part["p50"]:.2f} (p99 {part["p99"]:.2f})'
      for call, part in ratios.items()
      if isinstance(part, dict) and 'p50' in part
    ]
    told += [f'{k} in flight {x:.2f}' for k, x in ratios['in_flight'].items()]
    if told:
      lines.append(f'  {name}, times as fast as PyTorch: {", ".join(told)}')
    for call, ratio in ratios.items():
      if not isinstance(ratio, dict):
        lines.append(f'  {name}, {call}: {ratio:.2f}')
  return '\n'.join(lines)


def requests_plot(report: Mapping[str, Any]):
  """Bars of p50 with whiskers to p99, and requests a second by their number.

  Returns:
    A matplotlib figure, a row of two panels for each workload, logarithmic:
    the floor is far below on a CPU.
  """
  from matplotlib import figure as figure_lib

  results = report['results']
  figure = figure_lib.Figure(
    figsize=(9, 2.8 * len(results) + 0.4), layout='constrained'
  )
  axes = figure.subplots(len(results), 2, squeeze=False)
  for entry, (bars, rates) in zip(results, axes, strict=True):
    calls: list[str] = []
    rows = {k: v for k, v in entry['contenders'].items() if 'failed' not in v}
    for number, (name, row) in enumerate(rows.items()):
      timed = {k: v for k, v in row.items() if 'p50' in v}
      calls += [call for call in timed if call not in calls]
      width = 0.8 / len(rows)
      p50 = np.array([1e3 * x['p50'] for x in timed.values()])
      p99 = np.array([1e3 * x['p99'] for x in timed.values()])
      bars.bar(
        [calls.index(call) + (number + 0.5) * width - 0.4 for call in timed],
        p50,
        width,
        yerr=[0 * p50, p99 - p50],
        capsize=2,
        color=f'C{number}',
        label=name,
      )
      flight = row.get('in_flight', {})
      if flight and 'failed' not in flight:
        depths = [int(depth) for depth in flight]
        rates.plot(
          depths, list(flight.values()), marker='o', color=f'C{number}'
        )
        rates.set_xticks(depths)
    bars.set_xticks(range(len(calls)), calls)
    bars.set(ylabel='ms, p50 and p99', title=entry['name'], yscale='log')
    rates.set(xlabel='in flight', ylabel='score, requests/s', yscale='log')
    for axis in (bars, rates):
      axis.grid(alpha=0.3)
    if rows:
      bars.legend(fontsize=7)
  figure.suptitle(
    f'{report["suite"]}, {report["environment"]["device"]}, host to host',
    fontsize=10,
  )
  return figure


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
