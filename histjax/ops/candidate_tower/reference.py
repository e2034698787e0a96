"""What the candidate tower means: the backends are tested against this."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops.history_attention import reference as attention
from histjax.ops.rotary import rotary
from histjax.types import KeyRange

EPSILON = 1e-6
"""Added to the variance in every norm, as in Flax."""


class TowerWeights(flax.struct.PyTreeNode):
  """The weights of all layers, the scale and bias of each norm folded in.

  A norm followed by a linear map, `(z * g + b) W + c` with `z` of zero mean
  and unit variance, is `z (g W) + (b W + c)`, so no norm but the last keeps
  parameters. `F` is the width of the MLP.

  Attributes:
    query: `[layers, D, D]`.
    output: `[layers, D, D]`.
    mlp_in: `[layers, D, F]`.
    mlp_out: `[layers, F, D]`.
    bias: float32 `[layers, 3 D + F]`: query, output, mlp_in, mlp_out.
    final_scale: float32 `[D]`.
    final_bias: float32 `[D]`.
    sums: float32 `[layers, D + F]`, over the rows of `query` and of `mlp_in`,
      as `with_sums` has them. Kernels need them from D 512 on; None: they are
      computed in the call.
  """

  query: Float[Array, 'layers D D']
  output: Float[Array, 'layers D D']
  mlp_in: Float[Array, 'layers D F']
  mlp_out: Float[Array, 'layers F D']
  bias: Float[Array, 'layers 3*D+F']
  final_scale: Float[Array, 'D']
  final_bias: Float[Array, 'D']
  sums: Float[Array, 'layers D+F'] | None = None

  def with_sums(self) -> TowerWeights:
    """These weights with `sums`."""
    sums = [row_sums(x) for x in (self.query, self.mlp_in)]
    return self.replace(sums=jnp.concatenate(sums, axis=1))

  def layer(self, index: int) -> TowerWeights:
    """A tower of that layer alone, and the last norm."""
    final = {'final_scale': self.final_scale, 'final_bias': self.final_bias}
    one = jax.tree.map(lambda x: x[index][None], self)
    return one.replace(**final)


def row_sums(
  matrices: Float[Array, 'layers K M'],
) -> Float[Array, 'layers M']:
  """Over the rows of each matrix, in float32."""
  return matrices.astype(jnp.float32).sum(axis=1)


def sums_of(weights: Any) -> jax.Array:
  """`sums` of weights that have `with_sums`, computed if they are not there."""
  return (weights if weights.sums is not None else weights.with_sums()).sums


def of_layer(keys, values, weights: TowerWeights, layer: int | None) -> tuple:
  """Keys, values and weights of that layer, `[1, ..]`; all if it is None.

  Keys and values may be of that layer already.
  """
  if layer is None:
    return keys, values, weights
  at = layer if len(keys) > 1 else 0
  return keys[at][None], values[at][None], weights.layer(layer)


def candidate_tower(
  candidates: Float[Array, 'B C D'],
  position: Int[Array, 'B C'] | None,
  keys: Float[Array, 'layers B L N H'],
  values: Float[Array, 'layers B L N H'],
  key_range: KeyRange,
  weights: TowerWeights,
  *,
  num_heads: int,
  count: Int[Array, 'B'] | None = None,
  final_norm: bool = True,
) -> Float[Array, 'B C D']:
  """See `api.candidate_tower`; everything in float32."""

  def linear(x, weight, bias):
    weight = weight.astype(jnp.float32)
    y = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
    return y + bias[None, None, :]

  head_dim = keys.shape[-1]
  x = candidates.astype(jnp.float32)
  for i, (query_bias, output_bias, in_bias, out_bias) in enumerate(
    split_bias(weights)
  ):
    query = linear(normalize(x), weights.query[i], query_bias)
    query = query.reshape(*x.shape[:2], num_heads, head_dim)
    if position is not None:
      query = rotary(query, position)
    attended = attention.history_attention(
      query,
      keys[i].astype(jnp.float32),
      values[i].astype(jnp.float32),
      key_range,
      scale=head_dim**-0.5,
    ).reshape(x.shape)
    x = x + linear(attended, weights.output[i], output_bias)
    hidden = jax.nn.gelu(linear(normalize(x), weights.mlp_in[i], in_bias))
    x = x + linear(hidden, weights.mlp_out[i], out_bias)
  return finish(x, weights, count, final_norm)


def split_bias(
  weights: TowerWeights,
) -> list[tuple[Float[Array, 'D'], ...]]:
  """Per layer the biases of query, output, mlp_in and mlp_out."""
  width, hidden = weights.mlp_in.shape[1:]
  ends = [width, 2 * width, 2 * width + hidden]
  return [tuple(jnp.split(bias, ends)) for bias in weights.bias]


def normalize(x: Float[Array, '... D']) -> Float[Array, '... D']:
  """Zero mean and unit variance over the last axis."""
  x = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + EPSILON)


def finish(
  x: Float[Array, 'B C D'],
  weights: TowerWeights,
  count: Int[Array, 'B'] | None,
  final_norm: bool,
) -> Float[Array, 'B C D']:
  """The last norm, if wanted; zeros where candidates do not count."""
  if final_norm:
    x = normalize(x) * weights.final_scale[None, None, :]
    x = (x + weights.final_bias[None, None, :]).astype(weights.query.dtype)
  if count is None:
    return x
  index = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :, None]
  return jnp.where(index < count[:, None, None], x, 0)
