"""The parameters of `AppendCross`, packed for the kernel of all its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from histjax import ops


def pack_tower(params: Mapping[str, Any], dtype: DTypeLike) -> ops.TowerWeights:
  """The weights of an `AppendCross` for `ops.candidate_tower`.

  Args:
    params: its parameters: `blocks_0`, `blocks_1`, .., `final_norm`.
    dtype: of the matrices, the type that candidates are computed in.
  """
  num_layers = sum(name.startswith('blocks_') for name in params)
  layers = [_pack_block(params[f'blocks_{i}']) for i in range(num_layers)]
  *matrices, bias = (jnp.stack(x) for x in zip(*layers, strict=True))
  query, output, mlp_in, mlp_out = (x.astype(dtype) for x in matrices)
  return ops.TowerWeights(
    query=query,
    output=output,
    mlp_in=mlp_in,
    mlp_out=mlp_out,
    bias=bias,
    final_scale=params['final_norm']['scale'].astype(jnp.float32),
    final_bias=params['final_norm']['bias'].astype(jnp.float32),
  )


def _pack_block(block):
  """float32 query, output, mlp_in, mlp_out, and their biases in one vector."""
  block = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), block)

  def fold(norm, kernel):
    shift = jnp.matmul(
      norm['bias'], kernel, precision=jax.lax.Precision.HIGHEST
    )
    return norm['scale'][:, None] * kernel, shift

  query, query_bias = fold(block['attention_norm'], block['query']['kernel'])
  mlp_in, in_bias = fold(block['mlp_norm'], block['mlp_in']['kernel'])
  bias = jnp.concatenate(
    [
      query_bias,
      block['output']['bias'],
      in_bias + block['mlp_in']['bias'],
      block['mlp_out']['bias'],
    ]
  )
  output, mlp_out = block['output']['kernel'], block['mlp_out']['kernel']
  return query, output, mlp_in, mlp_out, bias
