"""The suite `devices`: an update on one device and on all, tables split.

The rows of a batch are always split over all devices of a contender. The tables
are whole on each ('histjax:whole') or split by rows over them
('histjax:split'), see `training.sharding`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarking import machine, tables, timing
from histjax.training import sharding
from histjax.training import state as state_lib
from histjax.training import step as step_lib

ROWS = (1_000_000,)
WORKLOAD = tables.Workload(
  num_rows=512,
  num_events=256,
  num_candidates=64,
  encoder_width=256,
  num_layers=4,
  dtype='bfloat16',
)
CONTENDERS = ('histjax:one', 'histjax:whole', 'histjax:split')
_COUNTED = 50
"""Updates between two looks at the counters of the links."""


def run(
  rows: Sequence[int] = ROWS,
  workload: tables.Workload = WORKLOAD,
  *,
  contenders: Sequence[str] | None = None,
  repeats: int = 15,
  seconds: float = 1.0,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Compares losses, then times updates, in turns.

  Args:
    rows: of the table of items, multiples of the number of devices.
    workload: the model and the batches, whose ids are uniformly random.
    contenders: some of `CONTENDERS`; None: all.
    repeats: rounds, in which contenders take turns.
    seconds: the least time spent on each, over all rounds.
    progress: called with a line at a time.

  Returns:
    A JSON-able report: `suite`, `environment`, `workload`, `devices` and
    `results`, one per size: `name`, `rows`, `touched` (distinct items of a
    batch, the mean), `touched_bytes` (of their rows and gradients) and
    `contenders`: of each `compile_seconds`, `loss` (the mean of the first
    updates), `update` (seconds of one where none is waited for, as in
    training: the median over rounds), `p50`, `p99` and `calls` of one that is
    waited for, and of one device `argument_bytes`, `temporary_bytes` and
    `link_bytes` (sent in an update, by the counters of NVLink; None: there are
    none); or `failed`, as one that needs more memory than a device has.
    `ratios`: to one device, `speed` of `update`, `waited_for` of `p50`, and
    `loss`, the relative difference.

  Raises:
    ValueError: no such contender, one device alone, or losses that differ.
  """
  names = contenders or CONTENDERS
  if unknown := set(names) - set(CONTENDERS):
    raise ValueError(f'contenders={sorted(unknown)} must be of {CONTENDERS}')
  number = jax.device_count()
  if number < 2:
    raise ValueError('there is one device; this suite compares it to several')
  results: list[dict[str, Any]] = []
  found = {
    'suite': 'devices',
    'environment': machine.environment() | machine.clocks(),
    'workload': dataclasses.asdict(workload),
    'devices': number,
    'results': results,
  }
  for size in rows:
    entry = _compare(workload, size, names, repeats, seconds, progress)
    results.append(entry)
  return found


def _compare(workload, size, names, repeats, seconds, progress):
  batches = tables.batches_of(workload, size)
  touched = float(np.mean([tables.touched_by(batch) for batch in batches]))
  rows: dict[str, dict[str, Any]] = {}
  calls: dict[str, Callable[[], Any]] = {}
  for name in names:
    call, rows[name] = _update(workload, size, batches, name)
    if call is not None:
      calls[name] = call
    progress(f'{size} rows  {name}: {rows[name]}')
  tables.check_losses({name: rows[name]['loss'] for name in calls})
  _time(rows, calls, repeats, seconds)
  for name in calls:
    row = rows[name]
    progress(
      f'{size} rows  {name}: {1e3 * row["update"]:.2f} ms, waited for p50 '
      f'{1e3 * row["p50"]:.2f} ms, p99 {1e3 * row["p99"]:.2f} ms, sent '
      f'{row["link_bytes"]}'
    )
  one = rows.get('histjax:one', {})
  return {
    'name': f'{size} rows',
    'rows': size,
    'touched': touched,
    # float32, a row and its gradient.
    'touched_bytes': 2 * 4 * workload.width * touched,
    'contenders': rows,
    'ratios': {
      name: {
        'speed': one['update'] / row['update'],
        'waited_for': one['p50'] / row['p50'],
        'loss': abs(row['loss'] / one['loss'] - 1),
      }
      for name, row in rows.items()
      if 'p50' in row and 'p50' in one
    },
  }


def _time(rows, calls, repeats, seconds) -> None:
  """Adds times to rows; contenders take turns."""
  times: dict[str, list[float]] = {name: [] for name in calls}
  updates: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(repeats):
    for name, call in calls.items():
      times[name] += timing.samples(call, seconds / repeats)
      number = int(seconds / repeats / np.median(times[name]))
      updates[name].append(_update_seconds(call, max(2, number)))
  for name, call in calls.items():
    row = rows[name]
    row['update'] = float(np.median(updates[name]))
    row |= tables.percentiles(times[name])
    row['link_bytes'] = _sent_by(call)


def _update(workload, size, batches, name):
  """A call that updates, and what is known of it; None: it does not fit."""
  kind = name.partition(':')[2]
  number = 1 if kind == 'one' else jax.device_count()
  split = number if kind == 'split' else 1
  mesh = sharding.data_mesh(jax.devices()[:number], table=split)
  schema, tx = tables.schema_of(size), tables.optimizer()
  model = tables.model_of(workload, size, split)
  step: Any = step_lib.make_train_step(
    model, tx, schema, row_dtype=workload.dtype, mesh=mesh
  )
  placed = [sharding.put_batch(batch, mesh) for batch in batches]
  shapes = jax.eval_shape(lambda: state_lib.create_state(model, tx, schema, 0))
  shapes = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.of_state(shapes, mesh),
  )
  begin = time.perf_counter()
  compiled = step.lower(shapes, placed[0]).compile()
  found = {
    'devices': number,
    'compile_seconds': time.perf_counter() - begin,
    **tables.memory_of(compiled),
  }
  needed = found['argument_bytes'] + found['temporary_bytes']
  limit = tables.device_bytes()
  if needed > limit:
    failed = f'it needs {needed / 2**30:.1f} GiB, of {limit / 2**30:.1f}'
    return None, found | {'failed': f'NotImplementedError: {failed}'}
  state = state_lib.create_state(model, tx, schema, 0, mesh=mesh)
  at = 0

  def update():
    nonlocal state, at
    state = compiled(state, placed[at % len(placed)])
    at += 1
    return state.window.loss

  for _ in range(tables.LOSSES):
    update()
  found['loss'] = float(state.window.loss) / tables.LOSSES
  return update, found


def _update_seconds(call: Callable[[], Any], number: int) -> float:
  """Of one of so many, of which the last alone is waited for."""
  begin = time.perf_counter()
  for _ in range(number):
    last = call()
  jax.block_until_ready(last)
  return (time.perf_counter() - begin) / number


def _sent_by(call: Callable[[], Any]) -> float | None:
  """Bytes that the first device sends over its links in a call."""
  jax.block_until_ready(call())
  before = _counters()
  if before is None:
    return None
  _update_seconds(call, _COUNTED)
  after = _counters()
  return None if after is None else (after - before) / _COUNTED


def _counters() -> int | None:
  """Bytes sent by the first GPU's links since it was started; None: unknown."""
  output = machine.nvidia_smi('nvlink', '-gt', 'd')
  found = re.findall(r'Data Tx: (\d+) KiB', output)
  return 1024 * sum(map(int, found)) if found else None


def plot(report: Mapping[str, Any]):
  """Updates a second by contender, as a matplotlib figure."""
  from matplotlib import figure as figure_lib

  entries = report['results']
  figure = figure_lib.Figure(
    figsize=(4 * len(entries), 3.2), layout='constrained'
  )
  axes = figure.subplots(1, len(entries), squeeze=False)[0]
  for axis, entry in zip(axes, entries, strict=True):
    rates = {
      name.partition(':')[2]: 1 / row['update']
      for name, row in entry['contenders'].items()
      if 'update' in row
    }
    axis.bar(list(rates), list(rates.values()))
    axis.set(title=entry['name'], ylabel='updates a second')
  figure.suptitle(
    f'one and {report["devices"]} devices, {report["environment"]["device"]}',
    fontsize=10,
  )
  return figure
