"""One update, as a jitted function of the state and a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from histjax.ops import devices, dispatch
from histjax.training import losses, sharding
from histjax.training.losses import RankLossConfig
from histjax.training.state import LossWindow, TrainState
from histjax.types import RankingBatch

TrainStep = Callable[[TrainState, RankingBatch], TrainState]
EvalStep = Callable[[Any, RankingBatch], dict[str, Array]]
_CACHED = 8
"""How many jitted functions are kept, so that a second run in a notebook, or a
second validation, compiles nothing."""


def averaged(
  average: Any, params: Any, step: Int[Array, ''], decay: float
) -> Any:
  """The moving average of the parameters after one more step.

      a_t = a_{t-1} + (1 - d_t) (p_t - a_{t-1}),  d_t = min(d, t / (9 + t))

  for t = 1, 2, ...; the average of late iterates (Polyak and Juditsky 1992,
  doi:10.1137/0330046), as an exponential one with a shorter memory at first,
  so that the start is soon forgotten.

  Args:
    average: a_{t-1}; of the initial parameters, they themselves.
    params: p_t.
    step: int32, t - 1.
    decay: d.
  """
  t = step.astype(jnp.float32)
  rate = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
  return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  *,
  task_weights: Mapping[str, float] | None = None,
  rank_loss: RankLossConfig | None = None,
  average: float | None = None,
  mesh: Mesh | None = None,
) -> TrainStep:
  """The jitted update; the state given to it is donated, so use its result.

  With a mesh the batch is sharded over 'data' and the state replicated; the
  loss is the mean over the global batch, so the update does not depend on how
  many devices share it.

  Args:
    model: a `Ranker`, or any module with its call signature.
    tx: the optimizer.
    task_weights: see `losses.loss_sum`.
    rank_loss: the loss of pairs, if any.
    average: decay of `averaged`, for a state with an average; None: without.
    mesh: of `sharding.data_mesh`; None: wherever the arguments are.

  Returns:
    `(state, batch) -> state`; the loss is in `state.window`. The same
    function, with what it has compiled, for the same arguments.
  """
  weights = tuple((task_weights or {}).items())
  return _jit_train_step(model, tx, weights, rank_loss, average, mesh)


def make_pmap_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  *,
  task_weights: Mapping[str, float] | None = None,
  rank_loss: RankLossConfig | None = None,
  average: float | None = None,
) -> TrainStep:
  """The update through `jax.pmap`, for programs built on it.

  The same as `make_train_step`, up to the order of float32 sums and to
  dropout: here each device draws its own masks.

  Args:
    model: a `Ranker`, or any module with its call signature.
    tx: the optimizer.
    task_weights: see `losses.loss_sum`.
    rank_loss: the loss of pairs, if any.
    average: as `make_train_step`.

  Returns:
    `(state, batch) -> state`. Every array of the state has a leading axis of
    one copy per device; those of the batch one of a shard per device, as
    `split_for_pmap` makes.
  """

  loss = _loss(task_weights, rank_loss)

  def step(state: TrainState, batch: RankingBatch) -> TrainState:
    return _update(model, tx, state, batch, loss, average, 'data')

  return jax.pmap(step, axis_name='data', donate_argnums=0)


def split_for_pmap(batch: RankingBatch, num_devices: int) -> RankingBatch:
  """`[B, ...]` as `[num_devices, B / num_devices, ...]`.

  Raises:
    ValueError: B is not a multiple of `num_devices`.
  """
  sharding.check_rows(batch, num_devices)
  return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)


@functools.lru_cache(maxsize=_CACHED)
def make_eval_step(model: nn.Module, *, mesh: Mesh | None = None) -> EvalStep:
  """The jitted forward pass, without dropout.

  Args:
    model: a `Ranker`, or any module with its call signature.
    mesh: of `sharding.data_mesh`; None: wherever the arguments are.

  Returns:
    `(params, batch) -> {task: [B, C]}`. The same function, with what it has
    compiled, for the same arguments.
  """

  def step(params: Any, batch: RankingBatch) -> dict[str, Array]:
    with _in_context(mesh):
      logits: Any = model.apply({'params': params}, batch, train=False)
    return logits

  out = None if mesh is None else NamedSharding(mesh, P('data'))
  return jax.jit(step, out_shardings=out)


@functools.lru_cache(maxsize=_CACHED)
def _jit_train_step(
  model, tx, task_weights, rank_loss, average, mesh
) -> TrainStep:
  loss = _loss(dict(task_weights), rank_loss)

  def step(state: TrainState, batch: RankingBatch) -> TrainState:
    with _in_context(mesh):
      return _update(model, tx, state, batch, loss, average)

  out = None if mesh is None else NamedSharding(mesh, P())
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def _loss(task_weights, rank_loss) -> Callable[..., jax.Array]:
  return functools.partial(
    losses.batch_loss, task_weights=task_weights, rank_loss=rank_loss
  )


@contextlib.contextmanager
def _in_context(mesh: Mesh | None) -> Iterator[None]:
  """Tells operations which devices they run on; see `ops.partition.by_rows`."""
  if mesh is None:
    yield
    return
  target = devices.Target.of(mesh.devices.flat[0])
  with dispatch.on(target), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    yield


def _update(
  model: nn.Module,
  tx: optax.GradientTransformation,
  state: TrainState,
  batch: RankingBatch,
  batch_loss: Callable[..., jax.Array],
  average: float | None,
  axis_name: str | None = None,
) -> TrainState:
  """One step; `axis_name` is the mapped axis of pmap, if there is one."""

  def over_devices(x):
    return x if axis_name is None else jax.lax.psum(x, axis_name)

  rng = jax.random.fold_in(state.rng, state.step)
  if axis_name is not None:
    rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
  mask = batch.candidates.mask

  def loss_fn(params):
    logits: Any = model.apply(
      {'params': params}, batch, train=True, rngs={'dropout': rng}
    )
    return batch_loss(logits, batch, over_devices=over_devices)

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  loss, grads = over_devices(loss), over_devices(grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if mask is None:
    mask = jnp.ones(batch.candidates.shape, bool)
  window = _extend(
    state.window,
    step=state.step,
    loss=loss,
    candidates=over_devices(jnp.sum(mask, dtype=jnp.int32)),
    finite=jnp.isfinite(loss)
    & jnp.isfinite(optax.tree.norm(grads))
    & jnp.isfinite(optax.tree.norm(params)),
  )
  return dataclasses.replace(
    state,
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    window=window,
    average=None
    if average is None
    else averaged(state.average, params, state.step, average),
  )


def _extend(window: LossWindow, *, step, loss, candidates, finite):
  diverged = jnp.where(
    finite | (window.diverged_at >= 0), window.diverged_at, step
  )
  return LossWindow(
    loss=window.loss + loss,
    steps=window.steps + 1,
    candidates=window.candidates + candidates,
    diverged_at=diverged.astype(jnp.int32),
  )
