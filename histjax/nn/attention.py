"""Attention in plain JAX operations, where a query sees more than a range."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from histjax import key_range as ranges
from histjax.types import KeyRange


def attention_with_self(
  query: Float[Array, 'B C N H'],
  key: Float[Array, 'B L N H'],
  value: Float[Array, 'B L N H'],
  key_range: KeyRange,
  own_key: Float[Array, 'B C N H'],
  own_value: Float[Array, 'B C N H'],
) -> Float[Array, 'B C N H']:
  """Attention to the history keys in range and to the query's own.

      out_c = softmax([q_c K^T, q_c k_c] / sqrt(H)) [V; v_c]

  Exact, and dense: it holds the scores `[B, N, C, L]`. A query whose range is
  empty gives its own value.

  Args:
    query: of the candidates.
    key: of the history; what no query of a row sees may hold anything.
    value: of the history; where no query of a row sees it, anything.
    key_range: int32 `[B, C]`, what each sees of the history.
    own_key: the key of each query's token.
    own_value: its value.

  Returns:
    `[B, C, N, H]` in the dtype of `query`; scores and sums are float32.
  """
  visible = ranges.mask(key_range, key.shape[1])  # [B, C, L]
  # 0 NaN = NaN, so what nobody sees is not only weighed by 0.
  seen = visible.any(axis=1)[:, :, None, None]
  key, value = (jnp.where(seen, x, jnp.zeros_like(x)) for x in (key, value))
  scale = query.shape[-1] ** -0.5
  scores = scale * jnp.einsum(
    'bcnh,blnh->bncl', query, key, preferred_element_type=jnp.float32
  )
  own_score = scale * jnp.einsum(
    'bcnh,bcnh->bnc', query, own_key, preferred_element_type=jnp.float32
  )
  scores = jnp.where(visible[:, None], scores, -jnp.inf)
  weights = jax.nn.softmax(
    jnp.concatenate([scores, own_score[..., None]], axis=-1), axis=-1
  )
  out = jnp.einsum(
    'bncl,blnh->bcnh',
    weights[..., :-1].astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )
  own_weight = weights[..., -1].transpose(0, 2, 1)[..., None]  # [B, C, N, 1]
  return (out + own_weight * own_value).astype(query.dtype)
