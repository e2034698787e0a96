"""What the fusions share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from histjax import key_range as ranges
from histjax.nn import embedding
from histjax.nn import encoder as encoder_lib
from histjax.types import KeyRange, Paged, Segments


class Fusion(nn.Module):
  """A fusion, called as the package says.

  Attributes:
    config: the encoder; a fusion without a Transformer reads its `width`,
      `window` and `dropout` alone.
    dtype: of the computation.
    amortizable: whether it has `encode`, `score` and `extend`, of which
      `encode_and_score` and `extend_and_score` are made.
    obstacle: if it has not, why: the end of a sentence for users.
    has_tower: whether `pack` makes weights for `ops.candidate_tower`.
    packable: whether it takes the `segments` of packed rows.
  """

  config: encoder_lib.EncoderConfig
  dtype: DTypeLike = jnp.float32

  amortizable = False
  obstacle = ''
  has_tower = False
  packable = False

  @staticmethod
  def pack(params: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """The collection `tower` to score with; empty if the fusion has none.

    Args:
      params: the module's parameters.
      dtype: of the computation.
    """
    del params, dtype
    return {}

  def encode_and_score(
    self,
    history: Float[Array, 'B L D'],
    length: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    count: Int[Array, 'B'] | None = None,
    into: tuple[Paged, Paged] | None = None,
  ) -> tuple[Any, Any, Float[Array, 'B C D']]:
    """`encode`, and `score` from what that gives.

    Args:
      history: tokens `[B, L, D]`.
      length: int32 `[B]`.
      candidates: tokens `[B, C, D]`.
      visible: int32 `[B, C]`, or None for all events.
      count: as `score`.
      into: as `encode` of those that have it.

    Returns:
      The keys and values, or the pages that were written; the fused candidates.
    """
    of: Any = self  # If `amortizable`.
    options = {} if into is None else {'into': into}
    keys, values = of.encode(history, length, **options)
    fused = of.score(keys, values, length, candidates, visible, count=count)
    return keys, values, fused

  def extend_and_score(
    self,
    keys: Float[Array, 'layers B L N H'],
    values: Float[Array, 'layers B L N H'],
    length: Int[Array, 'B'],
    events: Float[Array, 'B E D'],
    new: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    count: Int[Array, 'B'] | None = None,
  ) -> tuple[
    Float[Array, 'layers B L N H'],
    Float[Array, 'layers B L N H'],
    Float[Array, 'B C D'],
  ]:
    """`extend`, and `score` from what that gives.

    Args:
      keys: of `encode` or `extend`.
      values: of `encode` or `extend`.
      length: int32 `[B]`, events cached.
      events: tokens `[B, E, D]`.
      new: int32 `[B]`, new events of each row.
      candidates: tokens `[B, C, D]`.
      visible: int32 `[B, C]`, of old and new events; None: all of them.
      count: as `score`.

    Returns:
      The longer cache's keys and values, the fused candidates.
    """
    of: Any = self  # If `amortizable`.
    keys, values = of.extend(keys, values, length, events, new)
    fused = of.score(
      keys, values, length + new, candidates, visible, count=count
    )
    return keys, values, fused

  @staticmethod
  def hops(num_layers: int) -> int:
    """Windows between a score and the oldest event that it can depend on."""
    del num_layers
    return 1

  @staticmethod
  def check(config: encoder_lib.EncoderConfig) -> None:
    """Raises ValueError at an encoder that the fusion cannot have."""
    del config


class Transformer(Fusion):
  """A fusion of blocks, a final norm and positions."""

  @staticmethod
  def hops(num_layers: int) -> int:
    """One a layer: what a query sees has seen a window itself."""
    return num_layers

  def setup(self):
    config = self.config
    self.blocks = [
      encoder_lib.Block(config, self.dtype) for _ in range(config.num_layers)
    ]
    self.final_norm = encoder_lib.layer_norm(self.dtype)
    self.token_dropout = nn.Dropout(config.dropout)
    if config.positions == 'recency':
      self.recency = self.param(
        'recency',
        nn.initializers.normal(stddev=0.05),
        (config.num_recency, config.width),
        jnp.float32,
      )

  def _layer_function(self, function, train: bool):
    """`function(block, *arrays)`, rematerialised as the config says."""
    if self.config.remat is None or not train:
      return function
    policy = getattr(jax.checkpoint_policies, self.config.remat)
    return nn.remat(function, policy=policy)

  def _place_events(self, history, length):
    """Adds the learned positions, if the config has them."""
    if self.config.positions != 'recency':
      return history
    index = embedding.recency(length, history.shape[1], self.config.num_recency)
    return history + self.recency.astype(self.dtype)[index]

  def _place_candidates(self, candidates):
    if self.config.positions != 'recency':
      return candidates
    return candidates + self.recency[0].astype(self.dtype)[None, None, :]

  def _history_range(self, length, num_events, segments=None) -> KeyRange:
    return ranges.history_range(
      length,
      num_events,
      causal=self.config.causal,
      window=self.config.window,
      first=None if segments is None else segments.events,
    )


def visible_events(
  length: Int[Array, 'B'],
  visible: Int[Array, 'B C'] | None,
  num_candidates: int,
) -> Int[Array, 'B C']:
  """int32 `[B, C]`, `visible` or, if it is None, `length` for all."""
  if visible is None:
    visible = jnp.broadcast_to(
      length[:, None], (length.shape[0], num_candidates)
    )
  return visible.astype(jnp.int32)


def ordinals(
  shape: tuple[int, ...], segments: Segments | None = None
) -> Int[Array, 'B L']:
  """int32 `[B, L]`, `0, 1, ..` in each row, or in each of its segments."""
  ordinal = jnp.arange(shape[1], dtype=jnp.int32)
  ordinal = jnp.broadcast_to(ordinal[None, :], shape[:2])
  return ordinal if segments is None else ordinal - segments.events
