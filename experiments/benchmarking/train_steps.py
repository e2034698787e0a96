"""The suite `train_step`: updates of whole models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarking import contenders as contenders_lib
from benchmarking import (
  machine,
  rankers,
  report,
  tables,
  timing,
  train_rows,
  workloads,
)
from histjax.models.ranker import Ranker

Workload = workloads.Request | workloads.TrainRows
SUITES: dict[str, dict[str, Workload]] = {
  'train_step': workloads.TRAIN_STEP,
}


def run(
  suite: str,
  named: Mapping[str, Workload],
  contenders: Sequence[str] | None = None,
  *,
  repeats: int = 15,
  seconds: float = 1.0,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times updates that are waited for, batches copied from the host included.

  Args:
    suite: 'train_step'.
    named: workloads by name.
    contenders: of full rows, 'histjax', which picks implementations by
      itself, or 'histjax:<name>', one of `ops.history_attention`; None: the
      first and 'histjax:xla'. Of a log, see `train_rows.run`; None: all of
      those. One that cannot run here is reported with its error.
    repeats: rounds, in which contenders take turns.
    seconds: the least time spent on each call, over all rounds.
    progress: called with a line at a time.

  Returns:
    A JSON-able report: `suite`, `environment` and `results`, one per
    workload: `name`, `workload` and `contenders`, by name `runs`, the
    implementations used, and of the call `update` `loss`, the mean of the first
    ones, `p50`, `p99` and `calls`, or `failed`; of a log, see `train_rows.run`.

  Raises:
    ValueError: contenders' losses differ; nothing was timed.
  """
  results = []
  for name, workload in named.items():
    if isinstance(workload, workloads.TrainRows):
      every = [f'histjax:{kind}' for kind in train_rows.KINDS]
      every += ['torch:pointwise', 'torch:streaming']
      results.append(
        {
          'name': name,
          'workload': dataclasses.asdict(workload),
          'contenders': train_rows.run(
            workload,
            list(contenders or every),
            repeats=repeats,
            seconds=seconds,
            progress=progress,
          ),
        }
      )
      progress(train_rows.table(results[-1]))
      continue
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    losses: dict[str, float] = {}
    for contender in contenders or ('histjax', 'histjax:xla'):
      try:
        implementation = contender.partition(':')[2] or None
        update, runs = _update(workload, implementation)
        sums = [float(update()) for _ in range(tables.LOSSES)]
      except NotImplementedError as e:
        rows[contender] = {'failed': f'NotImplementedError: {e}'}
        continue
      rows[contender] = {'runs': runs}
      calls[contender], losses[contender] = update, sums[-1] / len(sums)
    tables.check_losses(losses)
    for contender, row in _in_turns(calls, repeats, seconds).items():
      rows[contender]['update'] = {'loss': losses[contender], **row}
    results.append(
      {
        'name': name,
        'workload': dataclasses.asdict(workload),
        'contenders': rows,
      }
    )
    progress(report.request_table(results[-1]))
  return {
    'suite': suite,
    'environment': machine.environment() | machine.clocks(),
    'results': results,
  }


def _in_turns(calls, repeats: int, seconds: float) -> dict[Any, dict]:
  times: dict[Any, list[float]] = {k: [] for k in calls}
  for _ in range(repeats):
    for key, call in calls.items():
      times[key].extend(timing.samples(call, seconds / repeats))
  return {
    key: {
      'p50': float(np.percentile(values, 50)),
      'p99': float(np.percentile(values, 99)),
      'calls': len(values),
    }
    for key, values in times.items()
  }


def _update(workload: workloads.Request, implementation):
  """One `update`; its state is the one before's result."""
  from histjax.training import optimizer as optimizer_lib
  from histjax.training import state as state_lib
  from histjax.training import step as step_lib

  config = rankers.config(workload, attention=implementation)
  model = Ranker(config)
  optimizer = optimizer_lib.make_optimizer(optimizer_lib.OptimizerConfig())
  state = state_lib.create_state(model, optimizer, rankers.SCHEMA, seed=0)
  step = step_lib.make_train_step(model, optimizer, rankers.SCHEMA)
  rng = np.random.default_rng(0)
  shape = (workload.num_rows, workload.num_candidates)
  batch = rankers.batch(workload, 0).replace(
    labels={
      task.name: rng.integers(0, 2, shape).astype(np.float32)
      for task in rankers.SCHEMA.tasks
    }
  )

  def update():
    nonlocal state
    state = step(state, batch)
    return state.window.loss

  attention = workloads.Attention(
    workload.num_rows,
    workload.num_events + workload.num_candidates,
    workload.num_events,
    workload.width // workload.num_heads,
    'causal',
    num_heads=workload.num_heads,
    dtype=workload.dtype,
  )
  backend = contenders_lib.attention_backend(attention, implementation)
  return update, {'history_attention': backend}
