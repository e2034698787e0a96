"""Whole histories, read in one call; where there is a kernel for that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops import devices, dispatch, partition
from histjax.ops.candidate_tower import reference as tower
from histjax.ops.candidate_tower.reference import TowerWeights
from histjax.ops.keys_values import reference
from histjax.ops.keys_values.reference import KeyValueWeights
from histjax.types import KeyRange

_kernel = dispatch.lazy(f'{__package__}.pallas_gpu', 'read_histories')


def _over_rows(
  events, position, key_range, weights, keys_values, *, num_heads, count
) -> Any:
  """The kernels, run by each device on the rows that it holds."""
  parts = (events, position, key_range, count, weights, keys_values)
  leaves, tree = jax.tree.flatten(parts)
  with_rows = len(jax.tree.leaves(parts[:4]))
  axes = [0 if i < with_rows else None for i in range(len(leaves))]

  def on_leaves(*leaves):
    *arrays, count, weights, keys_values = jax.tree.unflatten(tree, leaves)
    return _kernel(
      *arrays, weights, keys_values, num_heads=num_heads, count=count
    )

  return partition.by_rows(on_leaves, axes, (1, 1))(*leaves)


def _reference(
  events, position, key_range, weights, keys_values, *, num_heads, count
):
  num_rows, num_events, width = events.shape
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
      rotate=position is not None,
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
  return keys, values


_BACKENDS = {
  'pallas_gpu': dispatch.Backend(_over_rows, devices.check_hopper),
  'reference': dispatch.Backend(_reference, dispatch.any_target),
}


def read_histories(
  events: Float[Array, 'B L D'],
  position: Int[Array, 'B L'] | None,
  key_range: KeyRange,
  weights: TowerWeights,
  keys_values: KeyValueWeights,
  *,
  num_heads: int,
  count: Int[Array, 'B'] | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
  """The keys and values of all layers, of histories that nothing precedes.

  `ops.keys_values` of each layer and, between them, `ops.candidate_tower` of
  one layer, whose candidates are the events. Where a layer is several kernels
  that costs less in one call: what passes between layers stays as kernels give
  and take it. For scoring: no gradients. Works under jit, vmap and with `B`
  sharded.

  Args:
    events: tokens `[B, L, D]`, of the matrices' type or float32.
    position: int32 `[B, L]`, the rotary positions of queries, and of keys
      their slots; None: neither is rotated.
    key_range: int32 `[B, L]` each, what events see of their row's events; those
      from `count` on must not be seen by those before.
    weights: of the layers between.
    keys_values: of all layers.
    num_heads: N, with `N H = D`.
    count: int32 `[B]`. The keys and values of events `e >= count[b]` are
      finite and mean nothing. None: all L count.
    implementation: 'pallas_gpu' (Hopper; bfloat16, D and F multiples of 256
      from D 512 on, H 64 or 128, L a multiple of 8) or 'reference' (float32,
      everywhere, readable). None: the fastest that supports the call.

  Raises:
    ValueError: no such implementation.
    NotImplementedError: the named implementation cannot compute this call on
      this device; the message says why.
  """
  arrays = (events, position, key_range, weights, keys_values)
  arrays = jax.tree.map(jnp.asarray, arrays)
  dispatch.check_implementation(_BACKENDS, implementation)
  out: Any = dispatch.run(
    'read_histories',
    _BACKENDS,
    implementation,
    dispatch.target_of(arrays[0]),
    *arrays,
    num_heads=num_heads,
    count=count,
  )[1]
  return out
