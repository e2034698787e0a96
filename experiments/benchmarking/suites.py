"""The suites `attention` and `tower`: contenders on equal work, in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarking import contenders as contenders_lib
from benchmarking import machine, report, timing, workloads
from histjax.ops import dispatch

SUITES: dict[str, Mapping[str, Any]] = {
  'attention': workloads.ATTENTION,
  'tower': workloads.TOWER,
}
_DISTINCT_INPUTS = 4
_BOUNDS = {
  # Relative error of 4 layers with 8-bit mantissas between products.
  'bfloat16': 2e-2,
  # On accelerators, float32 products default to fewer bits.
  'float32': 1e-3,
}
_GPU = (
  'jax:cudnn',
  'jax:xla',
  'tokamax',
  'torch:sdpa',
  'torch:cudnn',
  'torch:flex',
)


def default_contenders(
  workload: workloads.Attention | workloads.Tower, platform: str
) -> list[str]:
  """Who is compared on a platform, the library first."""
  ours = ['histjax']
  if platform == 'cpu':
    return [*ours, 'jax:xla', 'torch:eager', 'torch:sdpa']
  ours.append('histjax:xla')
  if platform != 'gpu':
    return [*ours, 'jax:xla', 'tokamax']
  ours.append('histjax:pallas_gpu')
  ragged = isinstance(workload, workloads.Tower) and workload.ragged
  return [*ours, *_GPU, *(['torch:varlen'] if ragged else [])]


def run(
  suite: str,
  named: Mapping[str, workloads.Attention | workloads.Tower],
  contenders: Sequence[str] | None = None,
  *,
  repeats: int = 15,
  seconds: float = 0.02,
  singles: int = 100,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Checks contenders against the float32 reference, then times them.

  Args:
    suite: its name, for the report.
    named: workloads by name.
    contenders: their names, see `contenders` and `torch_rivals`; None:
      `default_contenders`. One that fails is reported with its error.
    repeats: samples of throughput.
    seconds: the least time of a sample.
    singles: calls timed one by one.
    progress: called with a line at a time.

  Returns:
    A JSON-able report: `suite`, `environment`, `ceilings` and `results`, an
    entry per workload; see `workload_entry`.
  """
  dtype = next(iter(named.values())).dtype
  ceilings = machine.ceilings(dtype)
  result: dict[str, Any] = {
    'suite': suite,
    'environment': machine.environment() | machine.clocks(),
    'ceilings': ceilings,
    'results': [],
  }
  progress(report.ceilings_line(result))
  platform = jax.default_backend()
  for name, workload in named.items():
    entry = _compare(
      name,
      workload,
      contenders or default_contenders(workload, platform),
      ceilings,
      {'repeats': repeats, 'seconds': seconds, 'singles': singles},
      progress,
    )
    result['results'].append(entry)
    progress(report.table(entry))
  return result


def _compare(name, workload, contenders, ceilings, options, progress):
  sets = [workload.inputs(seed) for seed in range(_DISTINCT_INPUTS)]
  expected = contenders_lib.reference(workload, sets[0])
  programs: dict[str, timing.Program] = {}
  rows: dict[str, dict[str, Any]] = {}
  for contender in contenders:
    start = time.perf_counter()
    try:
      with dispatch.record() as used:
        program = _program(contender, workload, sets)
      error = contenders_lib.difference(workload, program.output(), expected)
      program.enqueue(1)  # Compiles what is timed.
    except Exception as e:  # A rival that is missing or fails is a result.
      lines = str(e).strip().splitlines()
      rows[contender] = {
        'failed': f'{type(e).__name__}: {lines[0][:200] if lines else ""}'
      }
      progress(f'  {name} {contender}: {rows[contender]["failed"]}')
      continue
    seconds = time.perf_counter() - start
    rows[contender] = {'relative_error': error, 'compile_seconds': seconds}
    if used:
      rows[contender]['runs'] = dispatch.names(used)
    if not error <= _BOUNDS[workload.dtype]:
      rows[contender]['failed'] = f'wrong: relative error {error:.1e}'
      progress(f'  {name} {contender}: {rows[contender]["failed"]}')
      continue
    programs[contender] = program
    progress(f'  {name} {contender}: compiled in {seconds:.1f} s')
  for contender, times in timing.time_programs(programs, **options).items():
    rows[contender] |= times
  return workload_entry(name, workload, rows, ceilings)


def _program(contender: str, workload, sets) -> timing.Program:
  if contender.startswith('torch:'):
    from benchmarking import torch_rivals  # Only where it is installed.

    return torch_rivals.program(contender, workload, sets)
  return contenders_lib.program(contender, workload, sets)


def workload_entry(
  name: str,
  workload: workloads.Attention | workloads.Tower,
  rows: dict[str, dict[str, Any]],
  ceilings: Mapping[str, float],
) -> dict[str, Any]:
  """What the report says of one workload.

  Returns:
    `name`; `workload`, its fields; `flops`, `bytes` and `exponentials`, as
    counted; `floor`, seconds that each of these takes at its ceiling;
    `contenders`, `{name: times, flops_per_second, fraction_of_ceiling}` or
    `{name: failed}`; `best_rival`, the fastest that is not this library; and
    `ratios`, how many times faster ours are, `{name: {throughput, latency}}`.
  """
  counted = {
    'flops': workload.flops(),
    'bytes': workload.num_bytes(),
    'exponentials': workload.exponentials(),
  }
  timed = {k: row for k, row in rows.items() if 'throughput' in row}
  for row in timed.values():
    rate = counted['flops'] / row['throughput']['median']
    row['flops_per_second'] = rate
    row['fraction_of_ceiling'] = rate / ceilings['flops']
  ours = {k: v for k, v in timed.items() if k.startswith('histjax')}
  rivals = {k: v for k, v in timed.items() if k not in ours}

  def best(part, key):
    return min(
      ((row[part][key], k) for k, row in rivals.items()),
      default=(float('nan'), None),
    )

  throughput, best_rival = best('throughput', 'median')
  latency, _ = best('latency', 'p50')
  return {
    'name': name,
    'workload': dataclasses.asdict(workload),
    **counted,
    'floor': {k: counted[k] / ceilings[k] for k in counted},
    'contenders': rows,
    'best_rival': best_rival,
    'ratios': {
      k: {
        'throughput': throughput / row['throughput']['median'],
        'latency': latency / row['latency']['p50'],
      }
      for k, row in ours.items()
      if rivals
    },
  }
