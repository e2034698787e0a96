"""The suite `prepare`: a log to shards of rows, these to a training step."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import event_log
from benchmarking import machine, memory
from histjax import config as config_lib
from histjax.data import datasets, pipeline, prepare
from histjax.models.ranker import Ranker
from histjax.training import optimizer as optimizer_lib
from histjax.training import state as state_lib
from histjax.training import step as step_lib
from histjax.training.config import TrainConfig

_STEPS = 20
"""Batches that are trained on."""


def run(
  values: dict[str, Any],
  log: event_log.LogConfig,
  folder: pathlib.Path,
  *,
  gibibytes: float,
  num_workers: int,
  num_batches: int = 200,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Writes a log if it is not there, prepares it, and feeds a step from it.

  Args:
    values: of a config, as `config_util.Config.values`, whose log has the
      columns of `event_log`.
    log: to prepare.
    folder: to work in; `log/` and `shards/` are left there.
    gibibytes: of `prepare`, its bound of memory.
    num_workers: processes.
    num_batches: that the pipeline alone is timed over.
    progress: called with a line at a time.

  Returns:
    A JSON-able report: `suite`, `environment`, `log`, `bytes`, an event of the
    log, the spill and the shards; `prepare` with `seconds` by stage,
    `cpu_seconds` of all cores, `events_per_second` and `peak_bytes`; and
    `feed`.

  Raises:
    ValueError: shards are there already, which cannot be timed.
  """
  source, shards = folder / 'log', folder / 'shards'
  if shards.exists():
    raise ValueError(f'{shards} is there already; delete it')
  event_log.write(source, log, num_workers=num_workers)
  values['data']['source']['paths'] = [str(source)]
  data = config_lib.from_dict(datasets.DataConfig, values['data'])
  start, spent = time.perf_counter(), memory.cpu_seconds()
  with memory.PeakMemory() as peak:
    done = prepare.prepare(
      data,
      shards,
      prepare.Options(gibibytes * 2**30),
      prepare.Local(num_workers),
    )
  seconds = time.perf_counter() - start
  spent = memory.cpu_seconds() - spent
  report = {
    'suite': 'prepare',
    'environment': machine.environment(),
    'log': dataclasses.asdict(log),
    'users': done.num_users,
    'rows': done.num_rows,
    'shards': done.num_shards,
    'bytes': {
      'log': _size(source) / done.num_events,
      'spill': done.spill_bytes / done.num_events,
      'shards': _size(shards) / done.num_events,
    },
    'prepare': {
      'memory_bound': int(gibibytes * 2**30),
      'peak_bytes': peak.bytes,
      'workers': num_workers,
      'seconds': {'all': seconds, **done.seconds},
      'cpu_seconds': spent,
      'events_per_second': done.num_events / seconds,
    },
    'results': [],
  }
  progress(
    f'{done.num_events:,} events in {seconds:.0f} s: '
    f'{done.num_events / seconds:,.0f} a second; peak '
    f'{peak.bytes / 2**30:.2f} GiB'
  )
  report['feed'] = feed(values, data, shards, num_batches)
  progress(json.dumps(report['feed'], indent=1))
  return report


def feed(
  values: dict[str, Any],
  data: datasets.DataConfig,
  shards: pathlib.Path,
  num_batches: int,
) -> dict[str, Any]:
  """How fast shards are read into batches, and how fast a step takes them.

  Returns:
    `batches_per_second` and `rows_per_second` of the pipeline alone; of the
    step alone, on batches that are in memory; and `ratio`, of the first to it.
  """
  dataset = datasets.load(dataclasses.replace(data, prepared=str(shards)))
  values = {**values, 'data': data}
  values['model'] = {**values['model'], 'schema': dataset.schema}
  config = config_lib.from_dict(TrainConfig, values)
  steps = min(_STEPS, num_batches)
  batches = pipeline.train_batches(dataset.splits['train'], config.pipeline)
  some = [next(batches) for _ in range(steps)]  # Opens files, too.
  rows = candidates = 0
  start = time.perf_counter()
  for _ in range(num_batches):
    batch = next(batches)
    real = np.asarray(batch.candidates.mask)
    rows += int(real.any(1).sum())
    candidates += int(real.sum())
  seconds = (time.perf_counter() - start) / num_batches
  batches.close()
  model = Ranker(config.model)
  tx = optimizer_lib.make_optimizer(config.optimizer, 1000)
  state = state_lib.create_state(model, tx, config.model.schema, 0)
  step = step_lib.make_train_step(model, tx, config.model.schema)
  for batch in some:  # Compiles each shape.
    state = step(state, batch)
  jax.block_until_ready(state)
  start = time.perf_counter()
  for batch in some:
    state = step(state, batch)
  jax.block_until_ready(state)
  step_seconds = (time.perf_counter() - start) / steps
  per_batch = rows / num_batches
  return {
    'batch_events': config.pipeline.batch_events,
    'encoder': config_lib.to_dict(config.model.encoder),
    'pipeline': {
      'batches_per_second': 1 / seconds,
      'rows_per_second': per_batch / seconds,
      'candidates_per_second': candidates / num_batches / seconds,
    },
    'step': {
      'batches_per_second': 1 / step_seconds,
      'rows_per_second': per_batch / step_seconds,
    },
    'ratio': step_seconds / seconds,
  }


def _size(folder: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


def table(report: dict[str, Any]) -> str:
  """The report's figures for people, as Markdown."""
  made, size, feed = report['prepare'], report['bytes'], report['feed']
  seconds, count = made['seconds'], report['log']['num_events']
  rows = [
    ('events, users', f'{count:,}, {report["users"]:,}'),
    ('shards', f'{report["shards"]}'),
    ('workers, one core each', f'{made["workers"]}'),
    ('bound of memory, `--memory`', f'{made["memory_bound"] / 2**30:g} GiB'),
    ('peak memory of all processes', f'{made["peak_bytes"] / 2**30:.2f} GiB'),
    ('seconds', f'{seconds["all"]:.0f}'),
    *(
      (f'of these, {what}', f'{spent:.0f}')
      for what, spent in seconds.items()
      if what != 'all'
    ),
    ('events a second', rounded(made['events_per_second'])),
    (
      'events a second and core',
      rounded(made['events_per_second'] / made['workers']),
    ),
    *(
      ('events a second of CPU time', rounded(count / made[name]))
      for name in ('cpu_seconds',)
      if name in made
    ),
    ('bytes an event: log', f'{size["log"]:.1f}'),
    ('bytes an event: spill', f'{size["spill"]:.1f}'),
    ('bytes an event: shards', f'{size["shards"]:.1f}'),
    (
      'rows a second that Grain reads, alone',
      rounded(feed['pipeline']['rows_per_second']),
    ),
    (
      'rows a second that the step takes, alone',
      rounded(feed['step']['rows_per_second']),
    ),
    ('times as many as the step takes', f'{feed["ratio"]:.1f}'),
  ]
  lines = [f'| {name} | {value} |' for name, value in rows]
  return '\n'.join(['| | |', '| --- | --- |', *lines])


def rounded(rate: float) -> str:
  """Two digits, which are all that such a rate has."""
  return f'{float(f"{rate:.2g}"):,.0f}'
