"""What the TPU kernels share."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rows(x, first, last):
  """`[T, ..]` in float32 with zeros in all rows but `[first, last)`."""
  row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  inside = (row >= first) & (row < last)
  return jnp.where(inside, x.astype(jnp.float32), 0)


def dot(x, y, contract):
  """A product in float32 whose wider factor is rounded to the other's type."""
  dtype = min(x.dtype, y.dtype, key=lambda d: d.itemsize)
  # A precision means passes over float32 factors; others have none to choose.
  precision = None if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    contract,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
