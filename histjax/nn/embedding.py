"""Embedding tables, shared by name, and the tokens made of them."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from histjax import schema as schema_lib


class EmbeddingTables(nn.Module):
  """One embedding table per table name of a schema.

  Attributes:
    sizes: `{table: number of rows}`, as `Schema.tables`.
    dim: width of every table.
    dtype: of the vectors returned; the tables themselves are float32.
  """

  sizes: Mapping[str, int]
  dim: int
  dtype: DTypeLike = jnp.float32

  def setup(self):
    # Small at first: a vector never trained on must not outweigh the others.
    init = nn.initializers.normal(stddev=0.05)
    self.embeddings = {
      table: self.param(table, init, (rows, self.dim), jnp.float32)
      for table, rows in self.sizes.items()
    }

  def __call__(
    self,
    features: Mapping[str, Shaped[Array, '...']],
    spec: tuple[schema_lib.Feature, ...],
  ) -> Float[Array, '... F']:
    """Concatenates the vectors of categorical and values of dense features.

    Args:
      features: `{name: [...]}`, int32 ids or float32 values, all of one shape.
      spec: the features to read, in the order of the result.

    Returns:
      `[..., F]` with `F = dim * categorical + dense`. An id outside its table,
      negative or beyond its end, gives NaN, never another id's vector.

    Raises:
      ValueError: a feature of `spec` is missing.
    """
    parts = []
    for feature in spec:
      if feature.name not in features:
        raise ValueError(
          f'feature {feature.name!r} is missing; the batch has '
          f'{sorted(features)}, the schema asks for {[f.name for f in spec]}'
        )
      value = jnp.asarray(features[feature.name])
      if isinstance(feature, schema_lib.Categorical):
        table = jnp.asarray(self.embeddings[feature.table])
        # A negative id is no index from the end.
        vector = table.at[value].get(mode='fill', wrap_negative_indices=False)
        parts.append(vector.astype(self.dtype))
      else:
        parts.append(value[..., None].astype(self.dtype))
    return jnp.concatenate(parts, axis=-1)


class EventTokens(nn.Module):
  """Turns events and candidates into tokens of one space.

  `token(event) = W_item item + W_action action + b`, a projected concatenation;
  a candidate has the same item features through the same weights, and a
  learned vector ("to be decided") in place of `W_action action`.

  Attributes:
    width: D.
    dtype: of the computation and the result.
  """

  width: int
  dtype: DTypeLike = jnp.float32

  def setup(self):
    self.item = nn.Dense(self.width, dtype=self.dtype)
    self.action = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
    self.undecided = self.param(
      'undecided', nn.initializers.normal(stddev=0.05), (self.width,)
    )

  def events(
    self,
    item: Float[Array, 'B L F'],
    action: Float[Array, 'B L G'] | None,
  ) -> Float[Array, 'B L D']:
    """Tokens of history events, `[B, L, D]`; `action` None: has no action."""
    token = self.item(item)
    return token if action is None else token + self.action(action)

  def candidates(self, item: Float[Array, 'B C F']) -> Float[Array, 'B C D']:
    """Tokens of candidates, `[B, C, D]`."""
    undecided = self.undecided.astype(self.dtype)
    return self.item(item) + undecided[None, None, :]


def recency(
  length: Shaped[Array, 'B'], num_events: int, num_positions: int
) -> jax.Array:
  """The distance of each event from the end, int32 `[B, L]`.

  The last real event has 1, the one before it 2, and so on; a candidate is 0.
  Events further back than `num_positions - 1` share the last position.
  """
  ordinal = jnp.arange(num_events, dtype=jnp.int32)[None, :]
  distance = length.astype(jnp.int32)[:, None] - ordinal
  return jnp.clip(distance, 1, num_positions - 1)
