"""The suites `request` and `train_step`: whole models, ids in, logits out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarking import contenders as contenders_lib
from benchmarking import machine, report, timing, workloads
from histjax import schema as schema_lib
from histjax import scoring
from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn.encoder import EncoderConfig
from histjax.testing import random_batch

SUITES: dict[str, dict[str, workloads.Request]] = {
  'request': workloads.REQUEST,
  'train_step': workloads.TRAIN_STEP,
}
_SCHEMA = schema_lib.Schema(
  user='user',
  time='time',
  context=(
    schema_lib.Categorical('user', 100_000),
    schema_lib.Dense('age'),
  ),
  item=(
    schema_lib.Categorical('item', 1_000_000),
    schema_lib.Categorical('category', 1000),
    schema_lib.Dense('duration'),
  ),
  action=(schema_lib.Categorical('rating', 5),),
  tasks=(schema_lib.Task('click'), schema_lib.Task('like')),
)
"""Of the models timed: as many features and tables as a small real ranker."""

Calls = dict[str, Callable[[], Any]]


def run(
  suite: str,
  named: Mapping[str, workloads.Request],
  contenders: Sequence[str] | None = None,
  *,
  repeats: int = 15,
  seconds: float = 1.0,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times calls that are waited for, arguments copied from the host included.

  Args:
    suite: 'request' or 'train_step'.
    named: workloads by name.
    contenders: 'histjax', which picks implementations by itself, or
      'histjax:<name>': of `ops.candidate_tower` in requests, of
      `ops.history_attention` in updates. None: the first and 'histjax:xla'.
      One that fails is reported with its error.
    repeats: rounds, in which contenders take turns.
    seconds: the least time spent on each call, over all rounds.
    progress: called with a line at a time.

  Returns:
    A JSON-able report: `suite`, `environment` and `results`, one per
    workload: `name`, `workload` and `contenders`, by name `runs`, the
    implementations used, and per call `p50`, `p99` and `calls`, or `failed`.
  """
  make = {'request': _request_calls, 'train_step': _train_calls}[suite]
  results = []
  for name, workload in named.items():
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for contender in contenders or ('histjax', 'histjax:xla'):
      try:
        implementation = contender.partition(':')[2] or None
        made, runs = make(workload, implementation)
        for call in made.values():
          jax.block_until_ready(call())  # Compiles.
      except NotImplementedError as e:
        rows[contender] = {'failed': str(e)}
        continue
      rows[contender] = {'runs': runs}
      calls |= {(contender, k): call for k, call in made.items()}
    for (contender, call), row in _in_turns(calls, repeats, seconds).items():
      rows[contender][call] = row
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


def _config(
  workload: workloads.Request, **implementations: Any
) -> RankerConfig:
  return RankerConfig(
    schema=_SCHEMA,
    encoder=EncoderConfig(
      num_layers=workload.num_layers,
      width=workload.width,
      num_heads=workload.num_heads,
      **implementations,
    ),
    dtype=workload.dtype,
  )


def _batch(workload: workloads.Request, seed: int):
  return random_batch(
    _SCHEMA,
    workload.num_rows,
    workload.num_events,
    workload.num_candidates,
    seed,
  )


def _request_calls(workload: workloads.Request, implementation):
  """`encode`, `score` from its cache, both together, and the joint pass."""
  config = _config(workload, candidate_tower=implementation)
  batch = _batch(workload, 0)
  params = jax.jit(Ranker(config).init)(jax.random.key(0), batch)['params']
  scorer = scoring.Scorer(
    config,
    params,
    scoring.ScorerConfig(microbatch=max(1024, workload.num_candidates)),
  )
  cache = scorer.encode(batch.history)

  def encode():
    return scorer.encode(batch.history)

  calls: Calls = {
    'encode': encode,
    'score': lambda: scorer.score(cache, batch.candidates, batch.context),
    'encode and score': lambda: scorer.score(encode(), batch.candidates),
    'joint': lambda: scorer.score_joint(batch),
  }
  return calls, scorer.backends(cache, batch.candidates)


def _train_calls(workload: workloads.Request, implementation):
  """One `update` by Adam; its state is the one before it's result."""
  import optax

  from histjax.training import state as state_lib
  from histjax.training import step as step_lib

  config = _config(workload, attention=implementation)
  model, optimizer = Ranker(config), optax.adam(1e-3)
  state = state_lib.create_state(model, optimizer, _SCHEMA, seed=0)
  step = step_lib.make_train_step(model, optimizer)
  rng = np.random.default_rng(0)
  shape = (workload.num_rows, workload.num_candidates)
  batch = _batch(workload, 0).replace(
    labels={
      task.name: rng.integers(0, 2, shape).astype(np.float32)
      for task in _SCHEMA.tasks
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
  calls: Calls = {'update': update}
  return calls, {'history_attention': backend}
