"""Compiles for a TPU v5e, which need not be there, what a notebook compiled.

Runs in the notebook's own process, after its last cell.
"""

import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp

from histjax import HistoryCache, Ranker, Scorer
from histjax.data import pipeline
from histjax.ops import devices, dispatch
from histjax.scoring import attention, pages, programs, weights
from histjax.training import optimizer, sharding, state, step
from histjax.training.config import TrainConfig
from tests import tpu

TOPOLOGY = 'v5e:2x2'  # One chip of it: Colab's v5e-1.


def compile_all(names: dict[str, Any]) -> None:
  """Prints what was compiled, and with which kernels.

  Args:
    names: the notebook's.
  """
  chip = tpu.devices(TOPOLOGY)[0]
  if isinstance(names.get('config'), TrainConfig):
    _training(names['config'], names['dataset'], chip)
  if 'example' in names:
    _init(names['config'], names['example'], chip)
  if 'of_each' in names:
    _attention(names, chip)
  gc.collect()  # Other notebooks' scorers.
  done: set[str] = set()
  # The server's, too.
  for scorer in [x for x in gc.get_objects() if isinstance(x, Scorer)]:
    _scoring(scorer, chip, done)


def _shapes(tree, where):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
  )


def _training(config: TrainConfig, dataset, chip) -> None:
  """The steps of training and of evaluation."""
  model, schema = Ranker(config.model), config.model.schema
  tx = optimizer.make_optimizer(config.optimizer, config.num_steps)
  mesh = sharding.data_mesh([chip])
  batches = pipeline.train_batches(dataset.splits['train'], config.pipeline)
  batch = _shapes(next(batches), jax.NamedSharding(mesh, sharding.ROWS))
  batches.close()
  with jax.default_device(chip):
    start = jax.eval_shape(
      lambda: state.create_state(model, tx, schema, config.seed)
    )
    start = _shapes(start, jax.NamedSharding(mesh, jax.P()))
    with dispatch.record() as used:
      train = step.make_train_step(model, tx, schema, mesh=mesh)
      train.lower(start, batch).compile()
    print(f'train: {dispatch.names(used)}')
    with dispatch.record() as used:
      evaluate = step.make_eval_step(model, schema=schema, mesh=mesh)
      evaluate.lower(start.variables, batch).compile()
    print(f'eval: {dispatch.names(used)}')


def _init(config, example, chip) -> None:
  """`Ranker.init`."""
  where = jax.sharding.SingleDeviceSharding(chip)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with dispatch.on(devices.Target.of(chip)), dispatch.record() as used:
    init = jax.jit(lambda *x: Ranker(config).init(*x))  # Of this target.
    init.lower(*_shapes((key, example), where)).compile()
  print(f'init: {dispatch.names(used)}')


def _attention(names: dict[str, Any], chip) -> None:
  """What shows where candidates look."""
  where = jax.sharding.SingleDeviceSharding(chip)
  cache = names['cache']
  given = (
    names['scorer'].variables,
    HistoryCache(cache.keys, cache.values, cache.length),
    names['of_each'],
    names['batch'].context,
  )
  with dispatch.on(devices.Target.of(chip)), dispatch.record() as used:
    look = attention._last_attention
    look.lower(names['config'].model, *_shapes(given, where)).compile()
  print(f'last_attention: {dispatch.names(used)}')


def _scoring(scorer: Scorer, chip, done: set[str]) -> None:
  """The largest program of each kind that is not done."""
  largest: dict[str, programs.Sizes] = {}
  for kind, sizes in scorer._programs:
    largest[kind] = max(sizes, largest.get(kind, sizes))
  target = devices.Target.of(chip)
  where = jax.sharding.SingleDeviceSharding(chip)
  spec: Any = None

  def pack(variables):
    nonlocal spec
    packed, spec = weights.pack(scorer.config, variables)
    return packed

  with dispatch.on(target), jax.default_device(chip):
    packed = _shapes(jax.eval_shape(pack, scorer.variables), where)
    plan = dataclasses.replace(scorer._plan, spec=spec, target=target)
    for kind, sizes in largest.items():
      if kind in done:
        continue
      done.add(kind)
      program = programs.Program(plan, kind, sizes)
      given = [*_states(scorer, kind, sizes), _request(program)]
      program.call.lower(packed, *_shapes(given, where)).compile()
      print(f'{kind}: {program.backends}')


def _request(program: programs.Program) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((program.layout.size,), jnp.int32)


def _states(scorer: Scorer, kind: str, sizes: programs.Sizes) -> list[Any]:
  """Keys and values that the program is given, if any."""
  events = sizes.capacity or sizes.events
  if kind.startswith('paged_'):
    shape = [sizes.rows * pages.number(events), pages.EVENTS]
  elif kind in ('score', 'extend'):
    shape = [sizes.rows, events]
  else:
    return []
  encoder = scorer.config.encoder
  heads = [encoder.num_heads, encoder.width // encoder.num_heads]
  shape = [encoder.num_layers, *shape, *heads]
  return 2 * [jax.ShapeDtypeStruct(shape, scorer.config.dtype)]
