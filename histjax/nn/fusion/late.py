"""Late fusion: no Transformer, the events' tokens as they are.

Nothing makes an event depend on another, so `config` gives the width, the
dropout of tokens and the window alone: a candidate reads the last W of the
events that it sees.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax import key_range as ranges
from histjax.nn.fusion import base
from histjax.types import Segments

_OBSTACLE = (
  'without a Transformer it has no keys and values to keep, and score_joint '
  'is cheap: it makes the tokens of the events once for all candidates'
)


class TargetAttention(base.Fusion):
  """Events are summed with weights that the candidate gives them.

  DIN's activation unit (Zhou et al., arXiv 1706.06978): over the events that
  the candidate sees,

      fused = sum_i a(H_i, C) H_i
      a(H_i, C) = w PReLU(W_e H_i + W_c C + W_p (H_i * C) + b) + b'

  As in DIN the weights are not normalized, so that their sum tells how strong
  an interest is, and an empty history gives zeros. (`W_e` and `W_c` span what
  DIN's further input, `H_i - C`, would.) The hidden layer has `width` channels.
  """

  obstacle = _OBSTACLE
  packable = True

  @nn.compact
  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    segments: Segments | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates; memory grows as `B C L D`."""
    visible = base.visible_events(length, visible, candidates.shape[1])
    history, read = _read(history, visible, self.config.window, segments)
    dropout = nn.Dropout(self.config.dropout, deterministic=not train)
    history, candidates = dropout(history), dropout(candidates)

    def dense(name, x, use_bias=False):
      return nn.Dense(
        self.config.width, use_bias=use_bias, dtype=self.dtype, name=name
      )(x)

    hidden = (
      dense('event', history, use_bias=True)[:, None]
      + dense('candidate', candidates)[:, :, None]
      + dense('product', history[:, None] * candidates[:, :, None])
    )  # [B, C, L, D]
    hidden = nn.PReLU(name='activation')(hidden)
    weight = nn.Dense(1, dtype=self.dtype, name='weight')(hidden)[..., 0]
    weight = jnp.where(read, weight, 0)  # [B, C, L]
    return jnp.einsum('bcl,bld->bcd', weight, history)


class MeanPool(base.Fusion):
  """The mean of the events that the candidate sees, zeros if there are none.

  The candidate itself meets it in the layers on top.
  """

  obstacle = _OBSTACLE
  packable = True

  @nn.compact
  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    segments: Segments | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The means, `[B, C, D]`; they differ where `visible` does."""
    visible = base.visible_events(length, visible, candidates.shape[1])
    history, read = _read(history, visible, self.config.window, segments)
    dropout = nn.Dropout(self.config.dropout, deterministic=not train)
    total = jnp.einsum(
      'bcl,bld->bcd', read.astype(self.dtype), dropout(history)
    )
    count = jnp.maximum(read.sum(axis=2, keepdims=True), 1)
    return total / count.astype(self.dtype)


class NoHistory(base.Fusion):
  """Zeros: the ranker without the history, to see what that is worth."""

  obstacle = 'it reads none; score_joint costs what candidates do'
  packable = True

  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    segments: Segments | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """Zeros `[B, C, D]`."""
    del history, length, visible, segments, train
    return jnp.zeros_like(candidates)


def _read(history, visible, window, segments):
  """Events, zeros where no candidate sees them, and who sees which `[B, C, L]`.

  Padding may hold anything, NaN included, which a weight of 0 does not undo.
  """
  first = None if segments is None else segments.candidates
  key_range = ranges.candidate_range(visible, window=window, first=first)
  read = ranges.mask(key_range, history.shape[1])
  return jnp.where(read.any(axis=1)[..., None], history, 0), read
