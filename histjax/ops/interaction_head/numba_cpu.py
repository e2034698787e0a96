"""The interaction head as one kernel for CPUs, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from histjax.ops import cpu
from histjax.ops.interaction_head.weights import HeadWeights


def interaction_head(
  user: Float[Array, 'B U'],
  features: Float[Array, 'B C F'],
  readout: Float[Array, 'B C D'],
  weights: HeadWeights,
  *,
  count: Int[Array, 'B'] | None = None,
) -> Float[Array, 'B C T']:
  """See `api.interaction_head`."""
  cpu.check_dtype(weights.tiles.dtype)
  target = cpu.register('interaction_head')
  num_rows, num_candidates, _ = features.shape
  shape = weights.shape
  if count is None:
    count = jnp.full((num_rows,), num_candidates, jnp.int32)
  # Traced: an array of NumPy would be a constant, which no partitioned function
  # can have.
  widths = jnp.stack([jnp.full((), n, jnp.int32) for n in shape.mlp])
  return jax.ffi.ffi_call(
    target,
    jax.ShapeDtypeStruct((num_rows, num_candidates, shape.tasks), jnp.float32),
  )(
    features,
    user,
    readout,
    count,
    weights.tiles,
    weights.vectors,
    widths,
    cross_layers=np.int64(shape.cross_layers),
    rank=np.int64(shape.rank),
    tasks=np.int64(shape.tasks),
  )


def suits(user: Any, features: Any, *args: Any, **kwargs: Any) -> bool:
  """See `cpu.suits`."""
  del user, args, kwargs
  return cpu.suits(*features.shape[:2])
