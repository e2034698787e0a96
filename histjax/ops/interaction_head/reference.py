"""What the interaction head means: the kernel is tested against this."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops.interaction_head.weights import HeadWeights


def interaction_head(
  user: Float[Array, 'B U'],
  features: Float[Array, 'B C F'],
  readout: Float[Array, 'B C D'],
  weights: HeadWeights,
  *,
  count: Int[Array, 'B'] | None = None,
) -> Float[Array, 'B C T']:
  """See `api.interaction_head`; everything in float32."""
  del count
  shape = weights.shape
  matrices, vectors = weights.unpack()

  def product(x, name, by=matrices):
    return jnp.matmul(x, by[name], precision=jax.lax.Precision.HIGHEST)

  user = jnp.broadcast_to(
    user[:, None, :], (*features.shape[:2], user.shape[-1])
  )
  x0 = jnp.concatenate([user, features, readout], axis=-1).astype(jnp.float32)
  hidden = x0
  for i in range(len(shape.mlp)):
    name = f'mlp_{i}'
    hidden = jax.nn.relu(product(hidden, name) + vectors[name][None, None])
  x = x0
  for i in range(shape.cross_layers):
    low_rank = product(x, f'down_{i}')
    name = f'up_{i}'
    x = x0 * (product(low_rank, name) + vectors[name][None, None]) + x

  def logit(task):
    parts = product(hidden, f'logits_mlp_{task}', vectors)
    if shape.cross_layers:
      parts += product(x, f'logits_x_{task}', vectors)
    return parts + vectors['logits_bias'][task]

  return jnp.stack([logit(task) for task in range(shape.tasks)], axis=-1)
