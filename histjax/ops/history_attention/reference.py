"""What history attention means: the backends are tested against this.

It holds all scores `[B, N, Q, L]` in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from histjax import key_range as ranges
from histjax.types import KeyRange


def history_attention(
  query: Float[Array, 'B Q N H'],
  key: Float[Array, 'B L N H'],
  value: Float[Array, 'B L N H'],
  key_range: KeyRange,
  *,
  scale: float,
) -> Float[Array, 'B Q N H']:
  """See `api.history_attention`."""
  weights, seen = _weights(query, key, key_range, scale)
  # 0 NaN = NaN, so what no query of the row sees is not only weighed by 0.
  v = jnp.where(seen, value.astype(weights.dtype), 0)
  out = jnp.einsum(
    'bnql,blnh->bqnh', weights, v, precision=jax.lax.Precision.HIGHEST
  )
  return out.astype(query.dtype)


def attention_weights(
  query: Float[Array, 'B Q N H'],
  key: Float[Array, 'B L N H'],
  key_range: KeyRange,
  *,
  scale: float | None = None,
) -> Float[Array, 'B N Q L']:
  """How much of each value `history_attention` takes.

      weights = softmax over visible keys of scale Q K^T

  Args:
    query: any queries.
    key: of the history; what no query of a row sees may hold anything.
    key_range: `[B, Q]`, what each query sees.
    scale: of the scores; None: `H^-1/2`.

  Returns:
    float32 (float64 of float64); they sum to 1 over L, to 0 where a query sees
    nothing.
  """
  if scale is None:
    scale = query.shape[-1] ** -0.5
  return _weights(query, key, key_range, scale)[0]


def _weights(query, key, key_range: KeyRange, scale: float):
  """The weights, and whether any query of the row sees a key `[B, L, 1, 1]`."""
  visible = ranges.mask(key_range, key.shape[1])[:, None]  # [B, 1, Q, L]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  q, k = query.astype(dtype), key.astype(dtype)
  seen = visible.any(axis=(1, 2))[:, :, None, None]  # [B, L, 1, 1]
  k = jnp.where(seen, k, 0)  # 0 NaN = NaN.

  highest = jax.lax.Precision.HIGHEST
  scores = scale * jnp.einsum('bqnh,blnh->bnql', q, k, precision=highest)
  largest = scores.max(axis=-1, keepdims=True, initial=-jnp.inf, where=visible)
  largest = jax.lax.stop_gradient(jnp.maximum(largest, jnp.finfo(dtype).min))
  weights = jnp.exp(jnp.where(visible, scores - largest, -jnp.inf))
  total = weights.sum(axis=-1, keepdims=True)
  # Selected once more for the gradient: a huge value that this query does not
  # see may make that of its weight infinite.
  weights = jnp.where(visible, weights / jnp.where(total > 0, total, 1), 0)
  return weights, seen
