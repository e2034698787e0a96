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
from jaxtyping import Array, Float, Int

from histjax import schema as schema_lib
from histjax.ops import devices, dispatch
from histjax.training import losses, sharding
from histjax.training import tables as tables_lib
from histjax.training.losses import RankLossConfig
from histjax.training.optimizer import Optimizer
from histjax.training.state import LossWindow, TrainState
from histjax.types import RankingBatch

TrainStep = Callable[[TrainState, RankingBatch], TrainState]
EvalStep = Callable[[Any, RankingBatch], dict[str, Array]]
_SMALL = 2**18
"""Elements of an array up to which it is joined with others, as of parameters
whose squares are summed."""
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
  tx: Optimizer,
  schema: schema_lib.Schema,
  *,
  task_weights: Mapping[str, float] | None = None,
  rank_loss: RankLossConfig | None = None,
  max_unique: Mapping[str, int] | None = None,
  row_dtype: str = 'float32',
  mesh: Mesh | None = None,
  rules: sharding.Rules | None = None,
) -> TrainStep:
  """The jitted update; the state given to it is donated, so use its result.

  With a mesh the batch is split over all of it; the loss is the mean over the
  global batch, so the update does not depend on how many devices share it. The
  rows of tables that a batch touches are read and written alone, see `tables`;
  where tables are split, every device picks those that it has, and their sum
  is on all devices while the step lasts.

  Args:
    model: a `Ranker`, or any module with its call signature.
    tx: the optimizer.
    schema: says which feature of a batch is of which table.
    task_weights: see `losses.loss_sum`.
    rank_loss: the loss of pairs, if any.
    max_unique: `{table: K}`, how many distinct rows of it a batch touches at
      most, of all devices together. A batch that has more makes the loss NaN.
      It bounds what a step gathers and sends; that of tables left out is the
      number of ids in a batch.
    row_dtype: in which the rows of split tables are sent; 'bfloat16' sends half
      of the bytes, and rounds no more than a model that computes in it, as
      `RankerConfig.dtype` says. Gradients and updates are float32.
    mesh: of `sharding.data_mesh`; None: wherever the arguments are.
    rules: how the state is split over it, see `sharding.specs`.

  Returns:
    `(state, batch) -> state`; the loss is in `state.window`. The same
    function, with what it has compiled, for the same arguments.
  """
  weights = tuple((task_weights or {}).items())
  most = tuple((max_unique or {}).items())
  return _jit_train_step(
    model, tx, schema, weights, rank_loss, most, row_dtype, mesh, rules
  )


def make_pmap_train_step(
  model: nn.Module,
  tx: Optimizer,
  schema: schema_lib.Schema,
  *,
  task_weights: Mapping[str, float] | None = None,
  rank_loss: RankLossConfig | None = None,
) -> TrainStep:
  """The update through `jax.pmap`, for programs built on it.

  The same as `make_train_step`, up to the order of float32 sums and to
  dropout: here each device draws its own masks.

  Args:
    model: a `Ranker`, or any module with its call signature.
    tx: the optimizer.
    schema: as `make_train_step`.
    task_weights: see `losses.loss_sum`.
    rank_loss: the loss of pairs, if any.

  Returns:
    `(state, batch) -> state`. Every array of the state has a leading axis of
    one copy per device; those of the batch one of a shard per device, as
    `split_for_pmap` makes.
  """

  loss = _loss(task_weights, rank_loss)

  def step(state: TrainState, batch: RankingBatch) -> TrainState:
    places = _Places(schema, {}, axis_name='data')
    return _update(model, tx, state, batch, loss, places)

  return jax.pmap(step, axis_name='data', donate_argnums=0)


def split_for_pmap(batch: RankingBatch, num_devices: int) -> RankingBatch:
  """`[B, ...]` as `[num_devices, B / num_devices, ...]`.

  Raises:
    ValueError: B is not a multiple of `num_devices`.
  """
  sharding.check_rows(batch, num_devices)
  return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)


@functools.lru_cache(maxsize=_CACHED)
def make_eval_step(
  model: nn.Module,
  *,
  schema: schema_lib.Schema | None = None,
  mesh: Mesh | None = None,
  rules: sharding.Rules | None = None,
) -> EvalStep:
  """The jitted forward pass, without dropout.

  Args:
    model: a `Ranker`, or any module with its call signature.
    schema: as `make_train_step`; needed where tables are split.
    mesh: of `sharding.data_mesh`; None: wherever the arguments are.
    rules: as `make_train_step`.

  Returns:
    `(variables, batch) -> {task: [B, C]}`. The same function, with what it has
    compiled, for the same arguments.
  """

  def step(variables: Any, batch: RankingBatch) -> dict[str, Array]:
    with _in_context(mesh):
      if mesh is not None and mesh.shape['table'] > 1:
        if schema is None:
          raise ValueError('schema=None: tables are split over the mesh')
        places = _Places(schema, {}, mesh, rules, variables)
        tables = tables_lib.by_name(variables['tables'])
        ids, batch = places.touch(batch, tables)
        rows = {k: places.lookup(k, tables[k], ids[k]) for k in ids}
        collection = tables_lib.like(variables['tables'], {**tables, **rows})
        variables = {**variables, 'tables': collection}
      logits: Any = model.apply(variables, batch, train=False)
    return logits

  out = None if mesh is None else NamedSharding(mesh, sharding.ROWS)
  return jax.jit(step, out_shardings=out)


@functools.lru_cache(maxsize=_CACHED)
def _jit_train_step(
  model, tx, schema, task_weights, rank_loss, max_unique, row_dtype, mesh, rules
) -> TrainStep:
  loss = _loss(dict(task_weights), rank_loss)

  def step(state: TrainState, batch: RankingBatch) -> TrainState:
    with _in_context(mesh):
      places = _Places(
        schema,
        dict(max_unique),
        mesh,
        rules,
        state.variables,
        row_dtype=row_dtype,
      )
      found = _update(model, tx, state, batch, loss, places)
      if mesh is not None:
        found = jax.lax.with_sharding_constraint(
          found, sharding.of_state(found, mesh, rules)
        )
    return found

  return jax.jit(step, donate_argnums=0)


class _Places:
  """Which devices a step's ids and rows are on."""

  def __init__(
    self,
    schema: schema_lib.Schema,
    max_unique: Mapping[str, int],
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
    variables: Any = None,
    axis_name: str | None = None,
    row_dtype: str = 'float32',
  ):
    self.row_dtype = row_dtype
    self.schema, self.max_unique, self.mesh = schema, max_unique, mesh
    self.axis_name = axis_name  # Of pmap.
    self.axes: dict[str, tuple[str, ...]] = {}
    self.network_is_whole = True  # On every device.
    if mesh is not None and 'tables' in variables:
      specs = sharding.specs(variables, mesh, rules)
      self.axes = {
        name: sharding.table_axes(spec, mesh)
        for name, spec in tables_lib.by_name(specs['tables']).items()
      }
      of_network = jax.tree.leaves(
        specs.get('params', {}), is_leaf=lambda x: isinstance(x, P)
      )
      self.network_is_whole = all(spec == P() for spec in of_network)

  def sum(self, x):
    """Over the devices of pmap; the compiler sums over those of a mesh."""
    return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

  def touch(self, batch, tables):
    def everywhere(ids):
      if self.axis_name is not None:
        return jax.lax.all_gather(ids, self.axis_name, tiled=True)
      if self.mesh is None:
        return ids
      return jax.lax.with_sharding_constraint(
        ids, NamedSharding(self.mesh, P())
      )

    return tables_lib.touch(
      self.schema, batch, tables, self.max_unique, everywhere
    )

  def lookup(self, name, table, index):
    """`tables.lookup` where the table is; the result is everywhere."""
    axes = self.axes.get(name)
    if not axes:
      return tables_lib.lookup(table, index)

    def local(part, index):
      rows = tables_lib.lookup(part, _own(part, index, axes))
      # Few are sent as they are: XLA would join them with those of a large
      # table of the same type, and copy all.
      sent = self.row_dtype if rows.size > _SMALL else rows.dtype
      # Each is of one device: the sum rounds nothing.
      return jax.lax.psum(rows.astype(sent), axes).astype(rows.dtype)

    return jax.shard_map(
      local, in_specs=(P(axes), P()), out_specs=P(), check_vma=False
    )(table, index)

  def update(self, name, tx, table, index, gradient, **options):
    """`tables.update` where the table is."""
    axes = self.axes.get(name)
    if not axes:
      return tables_lib.update(tx, table, index, gradient, **options)
    decay = options.pop('decay')

    def local(part, index, gradient, options):
      found, finite = tables_lib.update(
        tx,
        part,
        _own(part.rows, index, axes),
        gradient,
        **options,
        decay=decay,
      )
      return found, jax.lax.psum((~finite).astype(jnp.int32), axes) == 0

    return jax.shard_map(
      local,
      in_specs=(P(axes), P(), P(), P()),
      out_specs=(P(axes), P()),
      check_vma=False,
    )(table, index, gradient, options)


def _own(part, index, axes):
  """Where ids are in this device's part of a table; beyond it: elsewhere."""
  index = index - len(part) * jax.lax.axis_index(axes)
  return jnp.where((index >= 0) & (index < len(part)), index, len(part))


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
  tx: Optimizer,
  state: TrainState,
  batch: RankingBatch,
  batch_loss: Callable[..., jax.Array],
  places: _Places,
) -> TrainState:
  """One step."""
  rng = jax.random.fold_in(state.rng, state.step)
  if places.axis_name is not None:
    rng = jax.random.fold_in(rng, jax.lax.axis_index(places.axis_name))
  mask = batch.candidates.mask
  tables = tables_lib.by_name(state.tables)
  ids, local = places.touch(batch, tables)
  rows = {name: places.lookup(name, tables[name], ids[name]) for name in ids}

  def loss_fn(params, rows):
    # A table that no feature of the batch reads stays as it is.
    collection = tables_lib.like(state.tables, {**tables, **rows})
    logits: Any = model.apply(
      {'params': params, 'tables': collection},
      local,
      train=True,
      rngs={'dropout': rng},
    )
    return batch_loss(logits, batch, over_devices=places.sum)

  value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1))
  loss, grads = value_and_grad(state.params, rows)
  loss, grads = places.sum(loss), places.sum(grads)
  norm = _norm(grads, places.network_is_whole)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  if tx.clip_norm is not None:
    scale = jnp.where(norm < tx.clip_norm, 1, tx.clip_norm / norm)
    grads = jax.tree.map(lambda x: x * scale.astype(x.dtype), grads)
  updates, opt_state = tx.network.update(
    grads[0], state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  finite &= jnp.isfinite(_norm(params, places.network_is_whole))
  table_state, table_average = dict(state.table_state), state.table_average
  table_average = None if table_average is None else dict(table_average)
  for name, index in ids.items():
    before = tables_lib.Table(
      tables[name],
      table_state[name],
      None if table_average is None else table_average[name],
    )
    after, table_finite = places.update(
      name,
      tx.tables,
      before,
      index,
      grads[1][name],
      rate=jnp.asarray(tx.table_rate(state.step), jnp.float32),
      step=state.step,
      decay=state.decay,
    )
    finite &= table_finite
    tables[name], table_state[name] = after.rows, after.state
    if table_average is not None:
      table_average[name] = after.average
  if mask is None:
    mask = jnp.ones(batch.candidates.shape, bool)
  window = _extend(
    state.window,
    step=state.step,
    loss=loss,
    candidates=places.sum(jnp.sum(mask, dtype=jnp.int32)),
    finite=finite,
  )
  return dataclasses.replace(
    state,
    step=state.step + 1,
    params=params,
    tables=tables_lib.like(state.tables, tables),
    opt_state=opt_state,
    table_state=table_state,
    window=window,
    average=None
    if state.decay is None
    else averaged(state.average, params, state.step, state.decay),
    table_average=table_average,
  )


def _norm(tree: Any, joined: bool) -> Float[Array, '']:
  """The Euclidean norm of all numbers of a tree.

  Small arrays are joined first: on a GPU a sum takes as long to start as to
  compute, and a network has dozens. Where they are split, none may be.
  """
  leaves = [x.astype(jnp.float32).ravel() for x in jax.tree.leaves(tree)]
  small = [x for x in leaves if joined and x.size <= _SMALL]
  if small:
    leaves = [x for x in leaves if x.size > _SMALL]
    leaves.append(jnp.concatenate(small))
  return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in leaves))


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
