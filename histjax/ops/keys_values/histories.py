"""Whole histories, read in one call; where there is a kernel for that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops import devices, dispatch, partition
from histjax.ops.candidate_tower import api as tower_api
from histjax.ops.candidate_tower import reference as tower
from histjax.ops.candidate_tower.reference import TowerWeights
from histjax.ops.keys_values import api, reference
from histjax.ops.keys_values.reference import KeyValueWeights
from histjax.types import KeyRange, Paged

_kernel = dispatch.lazy(f'{__package__}.pallas_gpu', 'read_histories')


def _over_rows(
  events, key_range, weights, keys_values, *, num_heads, rotate, count, cache
) -> Any:
  """The kernels, run by each device on the rows that it holds."""
  if cache is not None:  # Which has no rows.
    return _kernel(
      events, key_range, weights, keys_values, num_heads=num_heads,
      rotate=rotate, count=count, cache=cache,
    )  # fmt: skip
  parts = (events, key_range, count, weights, keys_values)
  leaves, tree = jax.tree.flatten(parts)
  with_rows = len(jax.tree.leaves(parts[:3]))
  axes = [0 if i < with_rows else None for i in range(len(leaves))]

  def on_leaves(*leaves):
    events, key_range, count, *both = jax.tree.unflatten(tree, leaves)
    return _kernel(
      events, key_range, *both, num_heads=num_heads, rotate=rotate, count=count
    )

  return partition.by_rows(on_leaves, axes, (1, 1))(*leaves)


def _reference(
  events, key_range, weights, keys_values, *, num_heads, rotate, count, cache
):
  num_rows, num_events, width = events.shape
  position = None
  if rotate:
    event = jnp.arange(num_events, dtype=jnp.int32)
    position = jnp.broadcast_to(event, (num_rows, num_events))
  shape = (len(weights.query), num_rows, num_events, num_heads)
  empty = jnp.zeros((*shape, width // num_heads), weights.query.dtype)
  keys, values, x = empty, empty, events
  for i in range(shape[0]):
    keys, values = reference.keys_values(
      x,
      keys,
      values,
      keys_values,
      layer=i,
      rotate=rotate,
      count=count,
    )
    key, value, of_layer = tower.of_layer(keys, values, weights, i)
    x = tower.candidate_tower(
      x,
      position,
      key,
      value,
      key_range,
      of_layer,
      num_heads=num_heads,
      count=count,
      final_norm=False,
    )
  if cache is None:
    return keys, values
  return tuple(
    _put(y, new) for y, new in zip(cache, (keys, values), strict=True)
  )


def _put(paged: Paged, new: jax.Array) -> Paged:
  """The pages with these keys or values in them."""
  layers, _, events = paged.pool.shape[:3]
  new = new.reshape(layers, *paged.index.shape, events, *new.shape[3:])
  pool = paged.pool.at[:, paged.index].set(
    new, mode='drop', wrap_negative_indices=False
  )
  return paged.replace(pool=pool)


_BACKENDS = {
  'pallas_gpu': dispatch.Backend(_over_rows, devices.check_hopper),
  'reference': dispatch.Backend(_reference, dispatch.any_target),
}


def read_histories(
  events: Float[Array, 'B L D'],
  key_range: KeyRange,
  weights: TowerWeights,
  keys_values: KeyValueWeights,
  *,
  num_heads: int,
  rotate: bool,
  count: Int[Array, 'B'] | None = None,
  cache: tuple[Paged, Paged] | None = None,
  implementation: str | None = None,
) -> tuple[Any, Any]:
  """The keys and values of all layers, of histories that nothing precedes.

  `ops.keys_values` of each layer and, between them, `ops.candidate_tower` of
  one layer, whose candidates are the events. Where a layer is several kernels
  that costs less in one call: what passes between layers stays as kernels give
  and take it. For scoring: no gradients. Works under jit, vmap and with `B`
  sharded.

  Args:
    events: tokens `[B, L, D]`, of the matrices' type or float32.
    key_range: int32 `[B, L]` each, what events see of their row's events; those
      from `count` on must not be seen by those before.
    weights: of the layers between.
    keys_values: of all layers.
    num_heads: N, with `N H = D`.
    rotate: whether queries and keys are rotated, by their place in the history.
    count: int32 `[B]`. The keys and values of events `e >= count[b]` are
      finite and mean nothing. None: all L count.
    cache: pages of keys and of values, both of one index, with L events a row.
      They are written where they are, if nothing else needs what was there:
      those of events that count, others perhaps. One device holds them.
      None: arrays are made.
    implementation: 'pallas_gpu' (Hopper; bfloat16, D and F multiples of 256
      from D 512 on, H 64 or 128, L a multiple of 8) or 'reference' (float32,
      everywhere, readable). None: the fastest that supports the call.

  Returns:
    The keys and the values, `[layers, B, L, N, H]`, or the pages.

  Raises:
    ValueError: an argument is malformed, or no such implementation.
    NotImplementedError: the named implementation cannot compute this call on
      this device; the message says why.
  """
  events, key_range, weights, keys_values, count = jax.tree.map(
    jnp.asarray, (events, key_range, weights, keys_values, count)
  )
  dispatch.check_implementation(_BACKENDS, implementation)
  _check(
    events, key_range, weights, keys_values, num_heads, rotate, count, cache
  )
  out: Any = dispatch.run(
    'read_histories',
    _BACKENDS,
    implementation,
    dispatch.target_of(events),
    events,
    key_range,
    weights,
    keys_values,
    num_heads=num_heads,
    rotate=rotate,
    count=count,
    cache=cache,
  )[1]
  return out


def _check(
  events, key_range, weights, keys_values, num_heads, rotate, count, cache
):
  """Raises ValueError at a malformed call, as the operations of a layer do."""
  if events.ndim != 3:
    raise ValueError(f'events has shape {events.shape}; make it [B, L, D]')
  num_rows, num_events, width = events.shape
  if num_heads < 1 or width % num_heads:
    raise ValueError(
      f'num_heads={num_heads} must be at least 1 and divide D={width}'
    )
  cached = jax.ShapeDtypeStruct(
    (len(weights.query), num_rows, num_events, num_heads, width // num_heads),
    weights.query.dtype,
  )
  api.check(events, cached, cached, keys_values, 0, rotate, None, count)
  tower_api.check(
    tower_api.Call(events, None, cached, cached, key_range, weights, count),
    num_heads,
    None,
  )
  for name, y in zip(('keys', 'values'), cache or (), strict=False):
    if y.shape != cached.shape or y.dtype != cached.dtype:
      raise ValueError(
        f'cache has {y.dtype} {name} {y.shape}; with the other arguments they '
        f'must be {cached.dtype} [layers, B, L, N, H] = {cached.shape}'
      )
