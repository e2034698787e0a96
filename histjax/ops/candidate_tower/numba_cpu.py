"""The candidate tower as one kernel for CPUs, in float32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from histjax.ops import rotary
from histjax.ops.candidate_tower import reference
from histjax.types import KeyRange

_TARGET = 'histjax_candidate_tower'


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
  check_dtype(weights.query.dtype)
  target = _register()
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


def check_dtype(dtype: Any) -> None:
  """Raises NotImplementedError unless matrices of this type can be read."""
  if jnp.dtype(dtype) != jnp.float32:
    raise NotImplementedError(
      f'numba_cpu computes in float32, and the matrices are {dtype}'
    )


def suits(candidates: Any, *args: Any, **kwargs: Any) -> bool:
  """Whether rows have candidates enough.

  A row's last tile is computed as if it were full. XLA, which multiplies all
  rows at once, is faster with a few candidates in each of many rows.
  """
  del args, kwargs
  num_rows, num_candidates = candidates.shape[:2]
  return num_rows <= 4 or num_candidates >= 4


@functools.cache
def _register() -> str:
  """Compiles the kernel and makes it known to XLA; returns its name there."""
  from histjax.ops.candidate_tower import numba_kernel

  handler = jax.ffi.pycapsule(numba_kernel.handler.ctypes)
  try:
    jax.ffi.register_ffi_target(_TARGET, handler, platform='cpu')
  except jax.errors.JaxRuntimeError as error:
    raise NotImplementedError(
      'numba_cpu follows version '
      f'{numba_kernel.MAJOR}.{numba_kernel.MINOR} of the foreign function '
      f'interface of XLA, which JAX {jax.__version__} refuses: {error}'
    ) from error
  return _TARGET
