"""Kernels over sharded rows: how XLA may split what it cannot look into."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import (
  ArrayMapping,
  SdyShardingRule,
  custom_partitioning,
)


def by_rows(
  function: Callable[..., Any],
  in_axes: Sequence[int | None],
  out_axes: int | Sequence[int],
  *,
  mesh_in_context: bool = False,
) -> Callable[..., Any]:
  """Lets each device run a function of independent rows on its own rows.

  XLA takes a kernel for one opaque operation. This makes it run where the rows
  are: under jit with operands sharded along their rows by a mesh of Auto axes
  (other axes are gathered), within shard_map, on one device. It can be vmapped,
  which makes more rows, but not differentiated: call it within the rules of a
  `jax.custom_vjp`. Call it under jit if operands may be on several devices.

  Args:
    function: takes arrays and returns an array or a tuple of arrays, for any
      number of rows; it closes over no array.
    in_axes: the rows' axis of each argument; None if it has no rows, such as a
      weight. One at least has rows.
    out_axes: the rows' axis of the result, or of each array of the tuple.
    mesh_in_context: splits the rows over the Auto axes of the mesh that
      `jax.set_mesh` or `jax.sharding.use_abstract_mesh` put in context, not
      over those that the operands are sharded by. That is the way on TPU, whose
      compiler has no custom partitioning (github.com/jax-ml/jax/issues/38196).

  Returns:
    A function of the same positional arguments.
  """
  ins = tuple(in_axes)
  single = isinstance(out_axes, int)
  outs = (out_axes,) if isinstance(out_axes, int) else tuple(out_axes)

  def as_tuple(*args):
    out = function(*args)
    return (out,) if single else tuple(out)

  def partition(mesh, arg_shapes, result_shapes):
    del arg_shapes
    rows = result_shapes[0].sharding.spec[outs[0]]

    def sharding(axis):
      spec = () if axis is None else (*(None,) * axis, rows)
      return jax.NamedSharding(mesh, jax.P(*spec))

    return mesh, as_tuple, tuple(map(sharding, outs)), tuple(map(sharding, ins))

  def sharding_rule(mesh, arg_types, result_types):
    del mesh
    return _sharding_rule(arg_types, ins, result_types, outs)

  partitioned: Any
  if mesh_in_context:
    partitioned = _over_mesh(as_tuple, ins, outs)
  else:
    partitioned = custom_partitioning(as_tuple)
    partitioned.def_partition(
      partition, sharding_rule=sharding_rule, decode_shardings=True
    )
  mappable = jax.custom_batching.custom_vmap(partitioned)

  def over_map(size, mapped, *args):
    if any(m and axis is None for m, axis in zip(mapped, ins, strict=True)):
      whole = [
        x if m else jnp.broadcast_to(x, (size, *x.shape))
        for x, m in zip(args, mapped, strict=True)
      ]
      out = jax.lax.map(lambda args: mappable(*args), whole)
    else:
      out = mappable(
        *(
          x if axis is None else _fold(x, size, axis, m)
          for x, axis, m in zip(args, ins, mapped, strict=True)
        )
      )
      out = tuple(
        _unfold(x, size, axis) for x, axis in zip(out, outs, strict=True)
      )
    return out, (True,) * len(outs)

  mappable.def_vmap(over_map)

  def call(*args):
    out = mappable(*args)
    return out[0] if single else out

  return call


def _over_mesh(function, in_axes, out_axes):
  """The function within `shard_map`, if there is a mesh in context."""

  def call(*args):
    mesh = jax.sharding.get_abstract_mesh()
    auto = [
      name
      for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if kind == jax.sharding.AxisType.Auto
    ]
    if not auto:
      return function(*args)
    num_rows = next(
      x.shape[axis]
      for x, axis in zip(args, in_axes, strict=True)
      if axis is not None
    )
    split = list(auto)
    while num_rows % math.prod(mesh.shape[name] for name in split):
      split.pop()  # What is left over is computed by each device.

    def spec(axis):
      return jax.P() if axis is None else jax.P(*(None,) * axis, tuple(split))

    return jax.shard_map(
      function,
      in_specs=tuple(map(spec, in_axes)),
      out_specs=tuple(map(spec, out_axes)),
      axis_names=set(auto),
      check_vma=False,  # Kernels do not say over which axes they vary.
    )(*args)

  return call


def _sharding_rule(arg_types, in_axes, result_types, out_axes):
  """The factor 'rows' may be split, all others must be whole."""
  others: list[str] = []

  def mapping(x, axis):
    factors = []
    for i in range(x.rank):
      if i != axis:
        others.append(f'whole{len(others)}')
      factors.append('rows' if i == axis else others[-1])
    return ArrayMapping(*factors)

  args = tuple(map(mapping, arg_types, in_axes))
  results = tuple(map(mapping, result_types, out_axes))
  return SdyShardingRule(args, results, need_replication_factors=tuple(others))


def _fold(x, size: int, axis: int, mapped: bool):
  """A mapped axis, at the front, becomes part of the rows: `[rows * size]`.

  The rows stay the outer part, so that their sharding survives.
  """
  if mapped:
    x = jnp.moveaxis(x, 0, axis + 1)
  else:
    x = jnp.repeat(x[(slice(None),) * (axis + 1) + (None,)], size, axis + 1)
  shape = (*x.shape[:axis], x.shape[axis] * size, *x.shape[axis + 2 :])
  return x.reshape(shape)


def _unfold(x, size: int, axis: int):
  """The inverse of `_fold`."""
  shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis + 1, 0)
