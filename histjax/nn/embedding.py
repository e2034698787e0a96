"""Embedding tables, shared by name, and the tokens made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from histjax import schema as schema_lib
from histjax.ops import devices, dispatch

CHANNELS = 16  # What the rows of a packed matrix are a multiple of.


class EmbeddingTables(nn.Module):
  """One embedding table per table name of a schema.

  They are the collection `tables`, and no parameters: training reads the rows
  of a batch's ids and puts these in the tables' place, so that nothing that it
  computes has a table's size; see `training.tables`.

  Attributes:
    sizes: `{table: number of ids}`, as `Schema.tables`.
    dim: width of every table.
    dtype: of the vectors returned; the tables themselves are float32.
    row_multiple: tables get rows that no id has, up to a multiple of this.
  """

  sizes: Mapping[str, int]
  dim: int
  dtype: DTypeLike = jnp.float32
  row_multiple: int = 1

  def setup(self):
    # Small at first: a vector never trained on must not outweigh the others.
    init = nn.initializers.normal(stddev=0.05)
    self.embeddings = {
      table: self.variable(
        'tables',
        table,
        lambda size: init(
          self.make_rng('params'),
          (size + -size % self.row_multiple, self.dim),
          jnp.float32,
        ),
        size,
      )
      for table, size in self.sizes.items()
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
        table = jnp.asarray(self.embeddings[feature.table].value)
        if len(table) > self.sizes[feature.table]:  # These rows are no id's.
          value = jnp.where(value < self.sizes[feature.table], value, -1)
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
      'undecided',
      nn.initializers.normal(stddev=0.05),
      (self.width,),
      jnp.float32,
    )

  def events(
    self,
    item: Float[Array, 'B L F'],
    action: Float[Array, 'B L G'] | None,
    *,
    train: bool = False,
  ) -> Float[Array, 'B L D']:
    """Tokens of history events, `[B, L, D]`; `action` None: has no action."""
    if self._in_one_product(train):
      return self._product('events', item, action)
    token = self.item(item)
    return token if action is None else token + self.action(action)

  def candidates(
    self, item: Float[Array, 'B C F'], *, train: bool = False
  ) -> Float[Array, 'B C D']:
    """Tokens of candidates, `[B, C, D]`."""
    if self._in_one_product(train):
      return self._product('candidates', item, None)
    undecided = self.undecided.astype(self.dtype)
    return self.item(item) + undecided[None, None, :]

  @staticmethod
  def pack(params: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Array]:
    """The collection `tower`: tokens as one product, which GPUs launch once.

    What is added to a token is a row of the matrix, for a channel that is 1.

    Args:
      params: of the module.
      dtype: of the matrices.
    """
    item, bias = params['item']['kernel'], params['item']['bias']
    packed = {}
    for name, parts in (
      ('events', (item, *_kernels(params.get('action')), bias[None])),
      ('candidates', (item, (bias + params['undecided'])[None])),
    ):
      matrix = jnp.concatenate(parts)
      matrix = jnp.pad(matrix, [(0, -len(matrix) % CHANNELS), (0, 0)])
      packed[name] = matrix.astype(dtype)
    return packed

  def _in_one_product(self, train):
    """Whether there is what `pack` makes, and a target that gains by it."""
    if train or not self.has_variable('tower', 'events'):
      return False
    try:
      devices.check_hopper(dispatch.target_of())
    except NotImplementedError:
      return False
    return True

  def _product(self, name, item, action):
    matrix: Array = self.get_variable('tower', name)
    parts = [item] if action is None else [item, action]
    width = sum(x.shape[-1] for x in parts)
    one = jnp.arange(len(matrix) - width) == 0
    one = jnp.broadcast_to(one.astype(self.dtype), (*item.shape[:2], len(one)))
    token = jnp.matmul(
      jnp.concatenate([*parts, one], axis=-1),
      matrix,
      preferred_element_type=jnp.float32,
    )
    return token.astype(self.dtype)


def _kernels(params: Mapping[str, Array] | None) -> list[Array]:
  return [] if params is None else [params['kernel']]


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
