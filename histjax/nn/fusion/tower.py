"""The parameters of `AppendCross` and `CrossOnly`, packed for kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from histjax import ops

SUMS_FROM = 512  # D, from which on kernels need sums of weights.


def pack_tower(params: Mapping[str, Any], dtype: DTypeLike) -> ops.TowerWeights:
  """The weights of such a fusion for `ops.candidate_tower`.

  Args:
    params: its parameters: `blocks_0`, `blocks_1`, .., `final_norm`.
    dtype: of the matrices, the type that candidates are computed in.
  """
  layers = [
    _pack_block(params[f'blocks_{i}']) for i in range(_num_layers(params))
  ]
  *matrices, bias = (jnp.stack(x) for x in zip(*layers, strict=True))
  query, output, mlp_in, mlp_out = (x.astype(dtype) for x in matrices)
  weights = ops.TowerWeights(
    query=query,
    output=output,
    mlp_in=mlp_in,
    mlp_out=mlp_out,
    bias=bias,
    final_scale=params['final_norm']['scale'].astype(jnp.float32),
    final_bias=params['final_norm']['bias'].astype(jnp.float32),
  )
  return weights.with_sums() if query.shape[1] >= SUMS_FROM else weights


def pack_keys_values(
  params: Mapping[str, Any], dtype: DTypeLike
) -> ops.KeyValueWeights:
  """The key and value weights of its blocks for `ops.keys_values`.

  Args:
    params: as of `pack_tower`.
    dtype: of the matrices.
  """
  matrices, biases = [], []
  for i in range(_num_layers(params)):
    block = _in_float32(params[f'blocks_{i}'])
    kernels = [block[name]['kernel'] for name in ('key', 'value')]
    matrix, bias = _fold(
      block['attention_norm'], jnp.concatenate(kernels, axis=1)
    )
    matrices.append(matrix)
    biases.append(bias)
  weights = ops.KeyValueWeights(
    matrix=jnp.stack(matrices).astype(dtype), bias=jnp.stack(biases)
  )
  return weights.with_sums() if len(matrices[0]) >= SUMS_FROM else weights


def _num_layers(params):
  return sum(name.startswith('blocks_') for name in params)


def _in_float32(block):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), block)


def _fold(norm, kernel):
  """The matrix and the bias of a norm and the product behind it."""
  shift = jnp.matmul(norm['bias'], kernel, precision=jax.lax.Precision.HIGHEST)
  return norm['scale'][:, None] * kernel, shift


def _pack_block(block):
  """float32 query, output, mlp_in, mlp_out, and their biases in one vector."""
  block = _in_float32(block)
  query, query_bias = _fold(block['attention_norm'], block['query']['kernel'])
  mlp_in, in_bias = _fold(block['mlp_norm'], block['mlp_in']['kernel'])
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
