"""What training at scale takes, by arithmetic: bytes, seconds, what binds.

Of a step on n chips, with a batch of B rows of L events and C candidates:

    ids       N = B (L + C), of Zipf's law over the items
    touched   K = sum_i 1 - (1 - p_i)^N, the distinct rows of the table
    FLOPs     3 x the forward pass's (`cost.formula`, 'joint'), B times
    sent      a ring's all-reduce of x bytes sends 2 (n - 1) / n x from each
              chip: K rows, 2 bytes a value, their gradients, 4, and the
              gradient of the P parameters; an all-gather of N ids
    memory    of a chip: its rows of the table, 4 bytes a value, and 4 of
              row-wise Adagrad; K rows and gradients, on every chip for a step

The chips' numbers are of their makers: Google Cloud's documentation of TPU v5e,
v5p and v6e (peak bfloat16, HBM, half of the bidirectional interconnect), and
NVIDIA's data sheet of the H100 SXM with one 400 Gbit/s adapter a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarking import cost

_SENT = (
  'ids',
  'rows of the table',
  'their gradients',
  'gradients of the network',
)
_BOUNDS = ('products', 'links', 'table')


@dataclasses.dataclass(frozen=True)
class Chip:
  """What its maker says.

  Attributes:
    flops: a second, bfloat16.
    memory: bytes.
    memory_rate: bytes a second, of that memory.
    link_rate: bytes a second that it can send to others.
  """

  flops: float
  memory: float
  memory_rate: float
  link_rate: float


CHIPS = {
  'v5e': Chip(197e12, 16e9, 819e9, 200e9),
  'v5p': Chip(459e12, 95e9, 2765e9, 600e9),
  'v6e': Chip(918e12, 32e9, 1640e9, 400e9),
  'h100': Chip(989e12, 80e9, 3350e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Job:
  """What is trained, and on what.

  Attributes:
    chip: one of `CHIPS`.
    num_chips: n.
    table_axis: over how many of them the table's rows are split.
    items: rows of the table.
    item_width: values of a row.
    zipf: the exponent of Zipf's law.
    rows: B / n, of one chip.
    num_events: L.
    num_candidates: C.
    num_layers: of the encoder.
    width: D.
    efficiency: the share of a chip's FLOPs and rates that is reached.
  """

  chip: str = 'v5e'
  num_chips: int = 256
  table_axis: int = 256
  items: int = 10**9
  item_width: int = 64
  zipf: float = 1.0
  rows: int = 8
  num_events: int = 512
  num_candidates: int = 256
  num_layers: int = 4
  width: int = 256
  efficiency: float = 0.4

  def __post_init__(self):
    if self.chip not in CHIPS:
      raise ValueError(f'chip={self.chip!r} must be one of {sorted(CHIPS)}')
    if not 0 < self.efficiency <= 1:
      raise ValueError(f'efficiency={self.efficiency} must be in (0, 1]')
    if not 0 <= self.zipf < np.inf:
      raise ValueError(f'zipf={self.zipf} must be >= 0 and finite')
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == 'int' and value < 1:
        raise ValueError(f'{field.name}={value} must be at least 1')
    if self.num_chips % self.table_axis:
      raise ValueError(
        f'table_axis={self.table_axis} must divide num_chips={self.num_chips}'
      )


def touched(items: int, ids: int, exponent: float = 1.0) -> float:
  """How many distinct of `items` are among `ids` drawn by Zipf's law.

      sum_i 1 - (1 - p_i)^ids,  p_i = i^-s / sum_j j^-s

  The first ranks one by one, the others as an integral over log-spaced ones.
  """
  first = min(items, 10_000)
  rank = np.arange(1, first + 1, dtype=np.float64)
  count = np.ones(first)
  if items > first:
    edges = np.unique(
      np.geomspace(first + 1, items + 1, 20_000).astype(np.int64)
    )
    rank = np.concatenate([rank, np.sqrt(edges[:-1] * (edges[1:] - 1.0))])
    count = np.concatenate([count, np.diff(edges)])
  share = rank**-exponent
  share /= (share * count).sum()
  with np.errstate(divide='ignore'):  # Of one item: log 0, which is right.
    missed = ids * np.log1p(-share)
  return float((count * -np.expm1(missed)).sum())


def step(job: Job) -> dict[str, Any]:
  """Bytes and seconds of a step, and what binds it."""
  chip, n = CHIPS[job.chip], job.num_chips
  num_rows = job.rows * n
  tokens = job.num_events + job.num_candidates
  ids = num_rows * tokens
  rows = touched(job.items, ids, job.zipf)
  flops = (
    3
    * job.rows
    * cost.formula(
      'joint',
      job.num_events,
      job.num_candidates,
      num_layers=job.num_layers,
      width=job.width,
    )
  )
  parameters = 12 * job.num_layers * job.width**2
  values = 4 * job.item_width
  ring = 2 * (n - 1) / n
  split = job.table_axis
  sent = {
    'ids': 4 * ids * (n - 1) / n,
    'rows of the table': (split - 1) / split * values * rows,
    'their gradients': ring * values * rows,
    'gradients of the network': ring * 4 * parameters,
  }
  read = values * rows * 2 + 8 * rows  # Where all of them are on one chip.
  seconds = {
    'products': flops / (chip.flops * job.efficiency),
    'links': sum(sent.values()) / (chip.link_rate * job.efficiency),
    'table': read / (chip.memory_rate * job.efficiency),
  }
  table = job.items * (values + 4) / split
  working = 2 * values * rows + 4 * ids
  bound = max(seconds, key=lambda k: seconds[k])
  return {
    'batch': num_rows,
    'ids': ids,
    'touched': rows,
    'table_bytes': job.items * values,
    'chip_bytes': table + working,
    'fits': table + working < chip.memory,
    'sent': sent,
    'seconds': seconds,
    'bound': bound,
    'own_bytes': 1.5 * values * touched(job.items, ids // n, job.zipf),
    'rate': num_rows * job.num_candidates / sum(seconds.values()),
  }


def step_table(jobs: Mapping[str, Job]) -> str:
  """A Markdown table of steps, one column a job."""
  found = {name: step(job) for name, job in jobs.items()}
  rows = [['', *found]]

  def row(what: str, text: Callable[[dict[str, Any]], str]) -> None:
    rows.append([what, *(text(x) for x in found.values())])

  row('rows of the batch', lambda x: f'{x["batch"]:,}')
  row('ids in it', lambda x: f'{x["ids"] / 1e6:.2f} M')
  row('distinct rows of the table', lambda x: f'{x["touched"] / 1e6:.2f} M')
  row('the table', lambda x: _bytes(x['table_bytes']))
  row(
    'on a chip: table, optimizer, touched rows',
    lambda x: _bytes(x['chip_bytes']) + ('' if x['fits'] else ', too much'),
  )
  for what in _SENT:
    rows.append(
      [
        f'sent by a chip: {what}',
        *(_bytes(x['sent'][what]) for x in found.values()),
      ]
    )
  for what in _BOUNDS:
    rows.append(
      [
        f'ms: {what}',
        *(f'{1e3 * x["seconds"][what]:.1f}' for x in found.values()),
      ]
    )
  row('bound by', lambda x: x['bound'])
  row(
    'candidates a second, nothing overlapped',
    lambda x: f'{x["rate"] / 1e6:.1f} M',
  )
  row(
    'rows and gradients of its own ids alone',
    lambda x: _bytes(x['own_bytes']),
  )
  return _markdown(rows)


def prepare_table(
  report: Mapping[str, Any], events: float, hours: float
) -> str:
  """What `prepare` needs for a log, as measured on a smaller one.

  Args:
    report: of the suite 'prepare'.
    events: of the log.
    hours: that it may take.

  Raises:
    ValueError: either is not above 0 and finite.
  """
  for name, value in (('events', events), ('hours', hours)):
    if not 0 < value < np.inf:
      raise ValueError(f'{name}={value} must be above 0 and finite')
  measured = report['prepare']
  rate = measured['events_per_second'] / measured['workers']
  workers = int(np.ceil(events / (rate * hours * 3600)))
  rows = [
    ['', ''],
    ['events', f'{events:.3g}'],
    ['events a second and worker, measured', f'{rate:,.0f}'],
    [f'workers of one core, for {hours:g} hours', f'{workers:,}'],
  ]
  for name in ('log', 'spill', 'shards'):
    size = report['bytes'][name] * events
    rows.append([f'bytes: {name}', _bytes(size)])
  return _markdown(rows)


def _bytes(size: float) -> str:
  for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
    if size < 1000 or unit == 'TB':
      return f'{size:.3g} {unit}' if size < 1000 else f'{size:,.0f} {unit}'
    size /= 1000
  raise AssertionError


def _markdown(rows) -> str:
  head, *rest = ('| ' + ' | '.join(row) + ' |' for row in rows)
  return '\n'.join(
    [head, '| ' + ' | '.join(['---'] * len(rows[0])) + ' |', *rest]
  )
