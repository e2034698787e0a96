"""The candidate tower layer by layer, for any platform.

Products take and give the type of the candidates, the residual stream and the
norms are float32. The attention is `ops.history_attention`, whose fused
kernels serve here too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops import dispatch
from histjax.ops.candidate_tower import reference
from histjax.ops.history_attention import api as attention
from histjax.ops.rotary import rotary
from histjax.types import KeyRange


def candidate_tower(
  candidates: Float[Array, 'B C D'],
  position: Int[Array, 'B C'] | None,
  keys: Float[Array, 'layers B L N H'],
  values: Float[Array, 'layers B L N H'],
  key_range: KeyRange,
  weights: reference.TowerWeights,
  *,
  num_heads: int,
  count: Int[Array, 'B'] | None = None,
  final_norm: bool = True,
) -> Float[Array, 'B C D']:
  """See `api.candidate_tower`."""
  dtype = weights.query.dtype

  def linear(x, weight, bias):
    return jnp.matmul(x.astype(dtype), weight) + bias[None, None, :]

  x = candidates.astype(jnp.float32)
  for i, (query_bias, output_bias, in_bias, out_bias) in enumerate(
    reference.split_bias(weights)
  ):
    query = linear(_normalize(x), weights.query[i], query_bias)
    query = query.reshape(*x.shape[:2], num_heads, -1)
    if position is not None:
      query = rotary(query, position)
    attended = attention.history_attention(
      query.astype(dtype), keys[i], values[i], key_range
    ).reshape(x.shape)
    x = x + linear(attended, weights.output[i], output_bias)
    hidden = linear(_normalize(x), weights.mlp_in[i], in_bias)
    x = x + linear(jax.nn.gelu(hidden), weights.mlp_out[i], out_bias)
  return reference.finish(x, weights, count, final_norm)


def _normalize(x: Float[Array, 'B C D']) -> Float[Array, 'B C D']:
  """`reference.normalize`, in the form that XLA computes fastest there."""
  if dispatch.target_of().platform in ('cuda', 'rocm'):
    # One kernel. Both moments at once would be a second.
    return reference.normalize(x)
  # One pass over `x` for both moments, as Flax.
  mean = x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
  return (x - mean) * jax.lax.rsqrt(
    jnp.maximum(variance, 0) + reference.EPSILON
  )
