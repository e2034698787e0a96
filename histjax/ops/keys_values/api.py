"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops import devices, dispatch, partition
from histjax.ops.keys_values import reference
from histjax.ops.keys_values.reference import KeyValueWeights

_kernel = dispatch.lazy(f'{__package__}.pallas_gpu', 'keys_values')


def _over_rows(
  events, keys, values, weights, *, layer, rotate, start, count
) -> Any:
  """The kernel, run by each device on the rows that it holds."""
  leaves, tree = jax.tree.flatten((weights, start, count))
  axes: list[int | None] = [None] * len(jax.tree.leaves(weights))
  axes += [0] * (len(leaves) - len(axes))

  def on_leaves(events, keys, values, *leaves):
    weights, start, count = jax.tree.unflatten(tree, leaves)
    return _kernel(
      events,
      keys,
      values,
      weights,
      layer=layer,
      rotate=rotate,
      start=start,
      count=count,
    )

  return partition.by_rows(on_leaves, [0, 1, 1, *axes], (1, 1))(
    events, keys, values, *leaves
  )


# The fastest first; 'reference' computes every call on every device.
_BACKENDS = {
  'pallas_gpu': dispatch.Backend(_over_rows, devices.check_hopper),
  'reference': dispatch.Backend(reference.keys_values, dispatch.any_target),
}


def keys_values(
  events: Float[Array, 'B E D'],
  keys: Float[Array, 'layers B L N H'],
  values: Float[Array, 'layers B L N H'],
  weights: KeyValueWeights,
  *,
  layer: int,
  rotate: bool,
  start: Int[Array, 'B'] | None = None,
  count: Int[Array, 'B'] | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
  """A cache with one layer's keys and values of events.

      key   = rotated(norm(x) W_k + b_k, position)
      value = norm(x) W_v + b_v

  `nn.encoder.Block.keys_values` is the definition and what trains; this is for
  reading histories where there is a kernel, which has no gradients and writes
  into the cache's memory if nothing else needs what was there. Sums are in
  float32. Works under jit, vmap and with `B` sharded.

  Args:
    events: the residual stream `[B, E, D]`, of the matrix' type or float32.
    keys: `[layers, B, L, N, H]`, of the matrix' type.
    values: `[layers, B, L, N, H]`, of the matrix' type.
    weights: see `KeyValueWeights`.
    layer: the layer, of the weights and of the cache.
    rotate: whether keys are rotated, by their slot in the cache.
    start: int32 `[B]`; event `e` goes into slot `start[b] + e`, and nowhere if
      the cache ends before. None: into slot `e`, and E must be at least L.
    count: int32 `[B]`. Events `e >= count[b]` go nowhere; without `start` their
      slots hold something finite that means nothing, and need not be computed.
      None: all E count.
    implementation: 'pallas_gpu' (Hopper; bfloat16; D 64, 128, 192 or 256 and H
      16, 32 or 64; without `start` L a multiple of 8, and also D a multiple of
      256 from 512 on with H 64 or 128) or 'reference' (float32, everywhere,
      readable). None: the fastest that supports the call.

  Returns:
    The keys and the values, with other layers and slots as they were.

  Raises:
    ValueError: an argument is malformed, or no such implementation.
    NotImplementedError: the named implementation cannot compute this call on
      this device; the message says why.
  """
  events, keys, values = map(jnp.asarray, (events, keys, values))
  start, count = (None if x is None else jnp.asarray(x) for x in (start, count))
  check(events, keys, values, weights, layer, rotate, start, count)
  dispatch.check_implementation(_BACKENDS, implementation)
  if 0 in events.shape or 0 in keys.shape:
    return keys, values
  out: Any = dispatch.run(
    'keys_values',
    _BACKENDS,
    implementation,
    dispatch.target_of(events),
    events,
    keys,
    values,
    weights,
    layer=layer,
    rotate=rotate,
    start=start,
    count=count,
  )[1]
  return out


def check(events, keys, values, weights, layer, rotate, start, count):
  """Raises ValueError at a malformed call."""
  if events.ndim != 3:
    raise ValueError(f'events has shape {events.shape}; make it [B, E, D]')
  if keys.ndim != 5:
    raise ValueError(
      f'keys has shape {keys.shape}; make it [layers, B, L, N, H]'
    )
  num_rows, num_events, width = events.shape
  layers, _, capacity, num_heads, head_dim = keys.shape
  dtype = weights.matrix.dtype
  if events.dtype not in (dtype, jnp.float32):
    raise ValueError(
      f'events is {events.dtype}; cast it to {dtype}, the type of '
      'weights.matrix, or to float32'
    )
  if num_heads * head_dim != width:
    raise ValueError(
      f'keys has N={num_heads} heads of H={head_dim}; N H must be D={width}'
    )
  if rotate and head_dim % 2:
    raise ValueError(
      f'rotate=True turns pairs of channels, and H={head_dim} is odd; make '
      'D / N even'
    )
  cached = (layers, num_rows, capacity, num_heads, head_dim)
  axes = '[layers, B, L, N, H]'
  expected: dict[str, tuple[Any, str, tuple[int, ...], Any]] = {
    'keys': (keys, axes, cached, dtype),
    'values': (values, axes, cached, dtype),
    'weights.matrix': (
      weights.matrix, '[layers, D, 2 D]', (layers, width, 2 * width), dtype
    ),
    'weights.bias': (
      weights.bias, '[layers, 2 D]', (layers, 2 * width), jnp.float32
    ),
    'weights.sums': (
      weights.sums, '[layers, 2 D]', (layers, 2 * width), jnp.float32
    ),
    'start': (start, '[B]', (num_rows,), jnp.int32),
    'count': (count, '[B]', (num_rows,), jnp.int32),
  }  # fmt: skip
  for name, (x, axes, sizes, wanted) in expected.items():
    if x is not None and (x.shape != sizes or x.dtype != wanted):
      raise ValueError(
        f'{name} is {x.dtype} {x.shape}; with the other arguments it must be '
        f'{jnp.dtype(wanted).name} {axes} = {sizes}'
      )
  if not 0 <= layer < layers:
    raise ValueError(f'layer={layer} must be one of the {layers} of keys')
  if start is None and num_events < capacity:
    raise ValueError(
      f'events has E={num_events} and keys L={capacity}; make E at least L, or '
      'pass start'
    )
