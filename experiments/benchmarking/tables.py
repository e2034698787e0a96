"""The suite `tables`: what an update costs, by the rows of an embedding table.

Beside the library's steps, which read and write the rows that a batch touches,
those of the same optimizer with gradients of whole tables, as
`jax.value_and_grad` of a model's parameters gives them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarking import machine, timing
from histjax import schema as schema_lib
from histjax import testing
from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn.encoder import EncoderConfig
from histjax.training import losses
from histjax.training import optimizer as optimizer_lib
from histjax.training import state as state_lib
from histjax.training import step as step_lib
from histjax.types import RankingBatch

ROWS = (10_000, 1_000_000, 10_000_000)
CONTENDERS = ('histjax', 'dense')
_BATCHES = 4
LOSSES = 5
"""Updates whose mean loss is compared, from one state on, before any is timed.

After some tens the order of sums shows, as Adam divides small gradients by
themselves.
"""
LOSS_ERROR = 1e-3
"""Of these, relative, sums in another order and in bfloat16."""
_DENSE_SHARE = 0.6
"""Of the memory; a step that needs more is not run."""


@dataclasses.dataclass(frozen=True)
class Workload:
  """The model and the batches, equal for all sizes.

  Attributes:
    width: of the tables.
    num_rows: rows of a batch.
    num_events: L.
    num_candidates: C.
    encoder_width: D.
    num_layers: of the encoder.
    dtype: of the network's products.
  """

  width: int = 64
  num_rows: int = 64
  num_events: int = 64
  num_candidates: int = 16
  encoder_width: int = 64
  num_layers: int = 2
  dtype: Literal['float32', 'bfloat16'] = 'float32'


def run(
  rows: Sequence[int] = ROWS,
  workload: Workload | None = None,
  *,
  contenders: Sequence[str] | None = None,
  repeats: int = 15,
  seconds: float = 1.0,
  progress: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times updates that are waited for, on batches of uniformly random ids.

  Args:
    rows: of the table of items; of users there are 10000.
    workload: the model and the batches.
    contenders: some of `CONTENDERS`; None: both. 'dense' runs if it fits into
      the memory.
    repeats: rounds, in which the sizes take turns.
    seconds: the least time spent on each size, over all rounds.
    progress: called with a line at a time.

  Returns:
    A JSON-able report: `suite`, `environment`, `workload` and `results`, one
    per size: `name`, `rows`, `touched` (distinct items of the batches, the
    mean) and `contenders`: of each `loss` (the mean of the first updates),
    `p50`, `p99` and `calls` of an update, `temporary_bytes` (what it allocates
    beside its arguments and results), `argument_bytes` (of the state and a
    batch), or `failed`.

  Raises:
    ValueError: no such contender, or losses that differ.
  """
  workload = workload or Workload()
  names = contenders or CONTENDERS
  if unknown := set(names) - set(CONTENDERS):
    raise ValueError(f'contenders={sorted(unknown)} must be of {CONTENDERS}')
  results: dict[int, dict[str, Any]] = {}
  calls: dict[int, Callable[[], Any]] = {}
  for size in rows:
    batches = batches_of(workload, size)
    results[size] = {
      'name': f'{size} rows',
      'rows': size,
      'touched': float(np.mean([touched_by(batch) for batch in batches])),
      'contenders': {},
    }
    if 'histjax' in names:
      calls[size], found = _update(workload, size, batches)
      results[size]['contenders']['histjax'] = found
  times: dict[int, list[float]] = {size: [] for size in calls}
  for _ in range(repeats):
    for size, call in calls.items():
      times[size] += timing.samples(call, seconds / repeats)
  for size, values in times.items():
    results[size]['contenders']['histjax'] |= percentiles(values)
    progress(line(results[size], 'histjax'))
  calls.clear()
  for size in rows if 'dense' in names else ():
    found = results[size]['contenders']
    found['dense'] = _dense(workload, size, repeats, seconds)
    check_losses({k: x['loss'] for k, x in found.items() if 'loss' in x})
    progress(line(results[size], 'dense'))
  return {
    'suite': 'tables',
    'environment': machine.environment() | machine.clocks(),
    'workload': dataclasses.asdict(workload),
    'results': list(results.values()),
  }


def check_losses(losses: Mapping[str, float]) -> None:
  """Raises ValueError if updates of contenders are not the same."""
  for name, loss in losses.items():
    first, wanted = next(iter(losses.items()))
    if not abs(loss / wanted - 1) <= LOSS_ERROR:
      raise ValueError(
        f'{name}: the loss of the first updates is {loss:.7g}, that of {first} '
        f'{wanted:.7g}: these are not equal updates'
      )


def line(entry: dict[str, Any], name: str) -> str:
  """What is known of one contender at one size."""
  found = entry['contenders'][name]
  head = f'{entry["rows"]:>10} rows  {name:8}'
  if 'failed' in found:
    return f'{head} failed: {found["failed"]}'
  return (
    f'{head} p50 {1e3 * found["p50"]:9.2f} ms   p99 {1e3 * found["p99"]:9.2f} '
    f'ms   temporary {found["temporary_bytes"] / 2**20:9.1f} MiB, state and '
    f'batch {found["argument_bytes"] / 2**20:9.1f} MiB'
  )


def plot(report: Mapping[str, Any]):
  """Time and temporary memory by rows, as a matplotlib figure."""
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(figsize=(9, 3.6), layout='constrained')
  for axis, (key, scale, label) in zip(
    figure.subplots(1, 2),
    (
      ('p50', 1e3, 'ms an update, p50'),
      ('temporary_bytes', 2**-20, 'MiB beside state and batch'),
    ),
    strict=True,
  ):
    for name in ('histjax', 'dense'):
      points = [
        (entry['rows'], scale * entry['contenders'][name][key])
        for entry in report['results']
        if key in entry['contenders'].get(name, {})
      ]
      if points:
        axis.plot(*zip(*points, strict=True), marker='o', label=name)
    axis.set(xlabel='rows', ylabel=label, xscale='log', yscale='log')
    axis.grid(alpha=0.3)
    axis.legend()
  figure.suptitle(
    f'tables of width {report["workload"]["width"]}, '
    f'{report["environment"]["device"]}',
    fontsize=10,
  )
  return figure


def schema_of(size: int) -> schema_lib.Schema:
  """With so many items."""
  return schema_lib.Schema(
    user='user',
    time='time',
    context=(schema_lib.Categorical('user', 10_000),),
    item=(schema_lib.Categorical('item', size), schema_lib.Dense('duration')),
    action=(schema_lib.Categorical('rating', 5),),
    tasks=(schema_lib.Task('click'),),
  )


def model_of(workload: Workload, size: int, multiple: int = 1) -> Ranker:
  """The ranker, whose tables have a multiple of so many rows."""
  return Ranker(
    RankerConfig(
      schema=schema_of(size),
      encoder=EncoderConfig(
        num_layers=workload.num_layers,
        width=workload.encoder_width,
        num_heads=4,
      ),
      embedding_dim=workload.width,
      table_row_multiple=multiple,
      dtype=workload.dtype,
    )
  )


def batches_of(workload: Workload, size: int) -> list[RankingBatch]:
  """A few batches of random rows, with labels."""
  schema, found = schema_of(size), []
  shape = (workload.num_rows, workload.num_candidates)
  for seed in range(_BATCHES):
    rng = np.random.default_rng(seed)
    batch = testing.random_batch(
      schema,
      workload.num_rows,
      workload.num_events,
      workload.num_candidates,
      seed,
    )
    labels = {'click': rng.integers(0, 2, shape).astype(np.float32)}
    found.append(batch.replace(labels=labels))
  return found


def touched_by(batch: RankingBatch) -> int:
  """Its distinct items."""
  ids = [x.features['item'].ravel() for x in (batch.history, batch.candidates)]
  return len(np.unique(np.concatenate(ids)))


def optimizer() -> optimizer_lib.Optimizer:
  """That of both contenders."""
  return optimizer_lib.make_optimizer(
    optimizer_lib.OptimizerConfig(clip_norm=1.0)
  )


def _update(workload, size, batches):
  """A call that updates, and what its program needs."""
  schema, tx = schema_of(size), optimizer()
  model = model_of(workload, size)
  state = state_lib.create_state(model, tx, schema, 0)
  step: Any = step_lib.make_train_step(model, tx, schema)
  memory = memory_of(step.lower(state, batches[0]).compile())
  number = 0

  def update():
    nonlocal state, number
    state = step(state, batches[number % len(batches)])
    number += 1
    return state.window.loss

  for _ in range(LOSSES):
    update()
  return update, memory | {'loss': float(state.window.loss) / LOSSES}


def _dense(workload, size, repeats, seconds):
  """The same model and optimizer, with gradients of whole tables."""
  schema, tx = schema_of(size), optimizer()
  model, batches = model_of(workload, size), batches_of(workload, size)
  assert tx.clip_norm is not None
  transformation = optax.chain(
    optax.clip_by_global_norm(tx.clip_norm),
    optax.partition(
      {
        'params': tx.network,
        'tables': optax.chain(
          tx.tables, optax.scale_by_learning_rate(tx.table_rate)
        ),
      },
      {'params': 'params', 'tables': 'tables'},
    ),
  )

  def create(key):  # The parameters of `create_state`.
    key, _ = jax.random.split(key)
    variables = model.init(key, state_lib.example_batch(schema))
    return variables, transformation.init(variables)

  def step(carried, batch):
    variables, opt_state = carried

    def loss_of(variables):
      logits: Any = model.apply(variables, batch)
      return losses.batch_loss(logits, batch)

    loss, grads = jax.value_and_grad(loss_of)(variables)
    updates, opt_state = transformation.update(grads, opt_state, variables)
    variables = optax.apply_updates(variables, updates)
    finite = jnp.isfinite(optax.tree.norm(variables))
    return (variables, opt_state), (loss, finite)

  shapes = jax.eval_shape(create, jax.random.key(0))
  compiled = jax.jit(step, donate_argnums=0).lower(shapes, batches[0]).compile()
  found = memory_of(compiled)
  # Beside its state while it is made, which is as large.
  needed = 2 * found['argument_bytes'] + found['temporary_bytes']
  limit = _DENSE_SHARE * device_bytes()
  if needed > limit:
    return found | {
      'failed': f'it needs {needed / 2**30:.1f} GiB, of {limit / 2**30:.1f}'
    }
  carried, number = jax.jit(create)(jax.random.key(0)), 0

  def update():
    nonlocal carried, number
    carried, out = compiled(carried, batches[number % len(batches)])
    number += 1
    return out

  found['loss'] = float(np.mean([float(update()[0]) for _ in range(LOSSES)]))
  return found | percentiles(timing.samples(update, seconds, min(repeats, 5)))


def memory_of(compiled: Any) -> dict[str, Any]:
  """What a program needs on a device."""
  memory = compiled.memory_analysis()
  return {
    'temporary_bytes': memory.temp_size_in_bytes,
    'argument_bytes': memory.argument_size_in_bytes,
  }


def device_bytes() -> int:
  """Of a device's memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')


def percentiles(values: Sequence[float]) -> dict[str, Any]:
  """Of the seconds of calls."""
  return {
    'p50': float(np.percentile(values, 50)),
    'p99': float(np.percentile(values, 99)),
    'calls': len(values),
  }
