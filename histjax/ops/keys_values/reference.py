"""What the keys and values are: the kernel is tested against this."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops.candidate_tower.reference import normalize, row_sums
from histjax.ops.rotary import rotary


class KeyValueWeights(flax.struct.PyTreeNode):
  """The key and value weights of all layers, each norm's parameters folded in.

  Attributes:
    matrix: `[layers, D, 2 D]`, keys before values.
    bias: float32 `[layers, 2 D]`, keys before values.
    sums: float32 `[layers, 2 D]`, over the rows of `matrix`, as `with_sums`
      has them. Kernels need them from D 512 on; None: they are computed in the
      call.
  """

  matrix: Float[Array, 'layers D 2*D']
  bias: Float[Array, 'layers 2*D']
  sums: Float[Array, 'layers 2*D'] | None = None

  def with_sums(self) -> KeyValueWeights:
    """These weights with `sums`."""
    return self.replace(sums=row_sums(self.matrix))


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
) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
  """See `api.keys_values`; everything in float32."""
  num_rows, num_events = events.shape[:2]
  capacity, heads = keys.shape[2], keys.shape[3:]
  x = normalize(events.astype(jnp.float32))
  matrix = weights.matrix[layer].astype(jnp.float32)
  x = jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)
  x = x + weights.bias[layer][None, None, :]
  key, value = (
    y.reshape(num_rows, num_events, *heads) for y in jnp.split(x, 2, axis=-1)
  )
  event = jnp.arange(num_events, dtype=jnp.int32)[None, :]
  position = jnp.broadcast_to(event, (num_rows, num_events))
  slot = position
  if start is not None:
    slot = position = start[:, None] + event
    if count is not None:
      slot = jnp.where(event < count[:, None], slot, capacity)
  if rotate:
    key = rotary(key, position)
  row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]

  def written(cached, new):
    """A slot outside of the cache is dropped."""
    return cached.at[layer, row, slot].set(
      new.astype(cached.dtype), mode='drop', wrap_negative_indices=False
    )

  return written(keys, key), written(values, value)
