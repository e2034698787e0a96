"""What the kernels for CPUs share; their code is in `numba_kernels`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def check_dtype(dtype: Any) -> None:
  """Raises NotImplementedError unless matrices of this type can be read."""
  if jnp.dtype(dtype) != jnp.float32:
    raise NotImplementedError(
      f'numba_cpu computes in float32, and the matrices are {dtype}'
    )


def suits(num_rows: int, num_candidates: int) -> bool:
  """Whether rows have candidates enough.

  A row's last tile is computed as if it were full. XLA, which multiplies all
  rows at once, is faster with a few candidates in each of many rows.
  """
  return num_rows <= 4 or num_candidates >= 4


@functools.cache
def register(name: str) -> str:
  """Compiles a kernel and makes it known to XLA; returns its target's name.

  Raises:
    NotImplementedError: this JAX has another interface.
  """
  from histjax.ops import numba_kernels

  handler = jax.ffi.pycapsule(numba_kernels.handler(name).ctypes)
  target = f'histjax_{name}'
  try:
    jax.ffi.register_ffi_target(target, handler, platform='cpu')
  except jax.errors.JaxRuntimeError as error:
    raise NotImplementedError(
      'numba_cpu follows version '
      f'{numba_kernels.MAJOR}.{numba_kernels.MINOR} of the foreign function '
      f'interface of XLA, which JAX {jax.__version__} refuses: {error}'
    ) from error
  return target
