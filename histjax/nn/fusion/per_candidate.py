"""The candidate seen by the history: a pass over it for each candidate."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax import key_range as ranges
from histjax.nn.fusion import base

_OBSTACLE = "in it every candidate changes the history's tokens"


class Concat(base.Transformer):
  """The candidate is concatenated to every event, `W [H_i ; C] + b`.

  As in TransAct (Xia et al., arXiv 2306.00248) and the paper's baseline: each
  candidate changes every token, so it needs a pass of its own over the
  history. The result is the mean over the events that the candidate sees of
  the last layer's output, zeros if it sees none.
  """

  obstacle = _OBSTACLE

  @staticmethod
  def hops(num_layers: int) -> int:
    """One a layer and one for the mean."""
    return num_layers + 1

  @nn.compact
  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates; memory grows as `B C L D`."""
    num_rows, num_events, width = history.shape
    num_candidates = candidates.shape[1]
    visible = base.visible_events(length, visible, num_candidates)
    history = self._place_events(history, length)
    event = nn.Dense(width, dtype=self.dtype, name='event')(history)
    candidate = nn.Dense(
      width, use_bias=False, dtype=self.dtype, name='candidate'
    )(self._place_candidates(candidates))
    x = event[:, None] + candidate[:, :, None]  # [B, C, L, D]
    x = x.reshape(num_rows * num_candidates, num_events, width)
    x = self.token_dropout(x, deterministic=not train)
    seen = visible.reshape(-1)  # [B * C]
    key_range = self._history_range(seen, num_events)
    position = base.ordinals(x.shape)

    def layer(block, x):
      key, value = block.keys_values(x, position)
      return block(x, position, key, value, key_range, train=train)

    for block in self.blocks:
      x = self._layer_function(layer, train)(block, x)
    ordinal = position[:1]
    read = ordinal < seen[:, None]  # [B * C, L]
    if self.config.window is not None:
      read &= ordinal >= (seen - self.config.window)[:, None]
    x = jnp.where(read[..., None], self.final_norm(x), 0)
    pooled = (
      x.sum(axis=1) / jnp.maximum(read.sum(axis=1), 1).astype(x.dtype)[:, None]
    )
    return pooled.reshape(num_rows, num_candidates, width)


class AppendSelf(base.Transformer):
  """The candidate is one more token of the history, and sees and is seen.

  As in BST (Chen et al., arXiv 1905.06874) and the paper's "append" with
  self-attention: `Q`, `K` and `V` are all of `[H_1..H_n, C]`, so each candidate
  has a sequence of its own: the events that it sees and, at their end, itself.
  Nothing in it comes after the candidate, so every token attends to every
  other: `config.causal` changes nothing, and `config.window` W cuts the
  sequence to the last W events. The result is the candidate's last state.
  """

  obstacle = _OBSTACLE
  hops = base.Fusion.hops  # The window cuts the sequence itself.

  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates; memory grows as `B C L D` (`B C W D`)."""
    num_rows, num_candidates, width = candidates.shape
    visible = base.visible_events(length, visible, num_candidates)
    num_events = history.shape[1]
    if self.config.window is not None:
      num_events = min(num_events, self.config.window)
    start = jnp.maximum(visible - num_events, 0)
    end = visible - start  # [B, C], where the candidate stands.
    x = _slices(self._place_events(history, length), start, num_events + 1)
    slot = jnp.arange(num_events + 1, dtype=jnp.int32)[None, None, :]
    target = self._place_candidates(candidates)
    x = jnp.where((slot == end[..., None])[..., None], target[:, :, None], x)
    x = x.reshape(num_rows * num_candidates, num_events + 1, width)
    x = self.token_dropout(x, deterministic=not train)
    end = end.reshape(-1)  # [B * C]
    position = base.ordinals(x.shape)
    key_range = ranges.history_range(end + 1, num_events + 1, causal=False)
    end = end[:, None]
    last_range = ranges.candidate_range(end + 1, whole_history=True)

    def layer(block, x):
      key, value = block.keys_values(x, position)
      return block(x, position, key, value, key_range, train=train)

    def last_layer(block, x):
      key, value = block.keys_values(x, position)  # Nothing reads its events.
      return block(_at(x, end), end, key, value, last_range, train=train)

    for block in self.blocks[:-1]:
      x = self._layer_function(layer, train)(block, x)
    x = self._layer_function(last_layer, train)(self.blocks[-1], x)
    return self.final_norm(x).reshape(num_rows, num_candidates, width)


def _at(x, index):
  """`[B, 1, D]`, `x[b, index[b, 0]]`; NaN where that is outside."""
  row = jnp.arange(len(x), dtype=jnp.int32)[:, None]
  return x.at[row, index].get(mode='fill', wrap_negative_indices=False)


def _slices(history, start, size):
  """`[B, C, size, D]`, the tokens from `start[b, c]`; zeros behind the last."""
  history = jnp.pad(history, ((0, 0), (0, 1), (0, 0)))

  def cut(tokens, first):
    return jax.lax.dynamic_slice_in_dim(tokens, first, size)

  return jax.vmap(jax.vmap(cut, (None, 0)))(history, start)
