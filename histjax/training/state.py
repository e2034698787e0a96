"""Everything that training changes, as one pytree."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, Key

from histjax import schema as schema_lib
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
    params: the model's, float32.
    opt_state: the optimizer's.
    rng: the key that dropout of step t is drawn from, as `fold_in(rng, t)`.
    window: the loss since the last report.
    average: the moving average of the parameters; None: none is kept.
  """

  step: Int[Array, '']
  params: Any
  opt_state: Any
  rng: Key[jax.Array, '']
  window: LossWindow
  average: Any = None

  @property
  def scoring_params(self) -> Any:
    """The parameters to evaluate and to score with."""
    return self.params if self.average is None else self.average


def create_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  schema: schema_lib.Schema,
  seed: int,
  *,
  average: bool = False,
  mesh: Mesh | None = None,
) -> TrainState:
  """The state before the first step; a function of the seed alone.

  Args:
    model: a `Ranker`, or any module with its call signature.
    tx: the optimizer.
    schema: says what batches hold.
    seed: of initialisation and dropout.
    average: whether to keep the average of the parameters, too.
    mesh: the state is replicated over it; None: on the default device.

  Returns:
    The state.
  """
  return _jit_create(model, tx, schema, average, mesh)(seed)


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
def _jit_create(model, tx, schema, average, mesh):
  def create(seed) -> TrainState:
    init, dropout = jax.random.split(jax.random.key(seed))
    params = model.init(init, example_batch(schema))['params']
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=tx.init(params),
      rng=dropout,
      window=LossWindow.empty(),
      average=jax.tree.map(jnp.copy, params) if average else None,
    )

  out = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return jax.jit(create, out_shardings=out)
