"""The candidate tower as one kernel for CPUs, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from histjax.ops import cpu, rotary
from histjax.ops.candidate_tower import reference
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
  layer: int | None = None,
  final_norm: bool = True,
) -> Float[Array, 'B C D']:
  """See `api.candidate_tower`. It reads the layer where it lies."""
  cpu.check_dtype(weights.query.dtype)
  target = cpu.register('candidate_tower')
  num_rows, num_candidates, width = candidates.shape
  if position is None:
    sin = cos = jnp.zeros((0,), jnp.float32)
  else:
    sin, cos = rotary.sin_cos(position, width // num_heads)
  if count is None:
    count = jnp.full((num_rows,), num_candidates, jnp.int32)
  return jax.ffi.ffi_call(
    target, jax.ShapeDtypeStruct(candidates.shape, jnp.float32)
  )(
    candidates,
    sin,
    cos,
    keys,
    values,
    key_range.start,
    key_range.stop,
    count,
    weights.query,
    weights.output,
    weights.mlp_in,
    weights.mlp_out,
    weights.bias,
    weights.final_scale,
    weights.final_bias,
    cached=np.int64(layer if layer is not None and len(keys) > 1 else 0),
    final_norm=np.int64(final_norm),
    first=np.int64(layer or 0),
    heads=np.int64(num_heads),
    layers=np.int64(len(weights.query) if layer is None else 1),
    rotate=np.int64(position is not None),
  )


def suits(candidates: Any, *args: Any, **kwargs: Any) -> bool:
  """See `cpu.suits`."""
  del args, kwargs
  return cpu.suits(*candidates.shape[:2])
