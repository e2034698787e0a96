"""Everything that training changes, as one pytree."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Key

from histjax import schema as schema_lib
from histjax.training import sharding
from histjax.training import tables as tables_lib
from histjax.training.optimizer import Optimizer
from histjax.types import Array, Candidates, History, RankingBatch


@flax.struct.dataclass
class LossWindow:
  """What happened since the last report; it stays on the device until then.

  Attributes:
    loss: the sum of the steps' losses.
    steps: how many steps.
    candidates: how many candidates were trained on, padding left out.
    diverged_at: the first step whose loss, gradient or new parameters were not
      finite; -1: none.
  """

  loss: Float[Array, '']
  steps: Int[Array, '']
  candidates: Int[Array, '']
  diverged_at: Int[Array, '']

  @classmethod
  def empty(cls) -> LossWindow:
    """No step yet."""
    zero = np.zeros((), np.int32)
    none = np.full((), -1, np.int32)
    return cls(np.zeros((), np.float32), zero, zero, none)


@flax.struct.dataclass
class TrainState:
  """The state of training before step `step`.

  Attributes:
    step: int32, how many updates were made.
    params: the network's, float32.
    tables: the embedding tables, float32, the model's collection `tables`.
    opt_state: the optimizer's, of `params`.
    table_state: the optimizer's of each table, `{table: state}`.
    rng: the key that dropout of step t is drawn from, as `fold_in(rng, t)`.
    window: the loss since the last report.
    average: the moving average of `params`; None: none is kept.
    table_average: that of each table, `{table: tables.Averages}`; or None.
    decay: of the averages, see `step.averaged`.
  """

  step: Int[Array, '']
  params: Any
  tables: Any
  opt_state: Any
  table_state: Any
  rng: Key[jax.Array, '']
  window: LossWindow
  average: Any = None
  table_average: Any = None
  decay: float | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def variables(self) -> dict[str, Any]:
    """The model's, as training goes on with them."""
    return _variables(self.params, self.tables)

  @property
  def scoring_variables(self) -> dict[str, Any]:
    """Those to evaluate and to score with; an average of tables is computed."""
    if self.decay is None:
      return self.variables
    return _variables(
      self.average,
      _averaged_tables(self.tables, self.table_average, self.step, self.decay),
    )


def _variables(params, tables):
  return {'params': params, 'tables': tables} if tables else {'params': params}


@functools.partial(jax.jit, static_argnames='decay')
def _averaged_tables(collection, averages, step, decay):
  named = tables_lib.by_name(collection)
  found = {
    name: tables_lib.caught_up(averages[name], rows, step, decay)
    for name, rows in named.items()
  }
  return tables_lib.like(collection, found)


def create_state(
  model: nn.Module,
  tx: Optimizer,
  schema: schema_lib.Schema,
  seed: int,
  *,
  average: float | None = None,
  mesh: Mesh | None = None,
  rules: sharding.Rules | None = None,
) -> TrainState:
  """The state before the first step; a function of the seed alone.

  Args:
    model: a `Ranker`, or any module with its call signature.
    tx: the optimizer.
    schema: says what batches hold.
    seed: of initialisation and dropout.
    average: decay of the averages to keep, too, see `step.averaged`; None:
      none.
    mesh: of `sharding.data_mesh`, which the state is put on as `rules` say;
      None: on the default device.
    rules: see `sharding.specs`.

  Returns:
    The state.
  """
  return _jit_create(model, tx, schema, average, mesh, rules)(seed)


def example_batch(schema: schema_lib.Schema) -> RankingBatch:
  """One row, one event and one candidate, all zeros: the shapes of a batch."""

  def zeros(features, shape):
    return {
      f.name: np.zeros(
        shape,
        np.int32 if isinstance(f, schema_lib.Categorical) else np.float32,
      )
      for f in features
    }

  return RankingBatch(
    context=zeros(schema.context, (1,)),
    history=History(
      zeros(schema.history_features, (1, 1)), np.ones(1, np.int32)
    ),
    candidates=Candidates(
      zeros(schema.item_features, (1, 1)),
      np.ones((1, 1), np.int32),
      np.ones((1, 1), bool),
    ),
    labels={t.name: np.zeros((1, 1), np.float32) for t in schema.tasks},
    group=np.zeros(1, np.int32),
  )


@functools.lru_cache(maxsize=8)
def _jit_create(model, tx, schema, average, mesh, rules):
  def create(seed) -> TrainState:
    init, dropout = jax.random.split(jax.random.key(seed))
    variables = model.init(init, example_batch(schema))
    params, tables = variables['params'], variables.get('tables', {})
    named = tables_lib.by_name(tables)
    averages: dict[str, Any] = {}
    if average is not None:
      averages = {
        'average': jax.tree.map(jnp.copy, params),
        'table_average': {
          name: tables_lib.Averages(jnp.copy(x), jnp.zeros(len(x), jnp.int32))
          for name, x in named.items()
        },
      }
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      tables=tables,
      opt_state=tx.network.init(params),
      table_state={name: tx.tables.init(x) for name, x in named.items()},
      rng=dropout,
      window=LossWindow.empty(),
      decay=average,
      **averages,
    )

  if mesh is None:
    return jax.jit(create)
  shapes = jax.eval_shape(create, 0)
  return jax.jit(create, out_shardings=sharding.of_state(shapes, mesh, rules))
