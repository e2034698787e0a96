"""The pre-norm Transformer block whose keys and values are history only."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from histjax import config as dicts
from histjax import ops
from histjax.nn import attention
from histjax.ops import dispatch, rotary
from histjax.ops.candidate_tower import api as tower_api
from histjax.ops.history_attention import api as attention_api
from histjax.types import KeyRange

REMAT_POLICIES = (
  'nothing_saveable',
  'dots_with_no_batch_dims_saveable',
  'dots_saveable',
  'everything_saveable',
)
"""What `EncoderConfig.remat` may be; see `jax.checkpoint_policies`."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """The Transformer over the history.

  Attributes:
    num_layers: blocks.
    width: D, channels of a token.
    num_heads: N; `width / num_heads` is the head dimension H.
    mlp_width: hidden channels of the MLP; None: `4 * width`.
    dropout: probability, on tokens and on both residual branches.
    causal: an event sees itself and earlier ones; False: all events.
    window: with `causal`, each layer sees at most this many events back.
    positions: 'rotary' over event ordinals (relative); 'recency' learned
      vectors by distance from the end, for rows whose candidates share one
      history; 'none'.
    num_recency: with 'recency', distances told apart.
    attention: the implementation of `ops.history_attention`; None picks.
    candidate_tower: that of `ops.candidate_tower`, which scores, and reads
      histories to score, with weights packed by `models.ranker.pack`; None
      picks. Where `attention` alone is named, all goes layer by layer.
    remat: in training, what the backward pass keeps of a block; the rest is
      computed again. A policy of `jax.checkpoint_policies`, one of
      `REMAT_POLICIES`, from the one of least memory to that of least time;
      None: XLA keeps what it wants to.
  """

  num_layers: int = 2
  width: int = 64
  num_heads: int = 4
  mlp_width: int | None = None
  dropout: float = 0.0
  causal: bool = True
  window: int | None = None
  positions: Literal['rotary', 'recency', 'none'] = 'rotary'
  num_recency: int = 512
  attention: str | None = None
  candidate_tower: str | None = None
  remat: str | None = None

  def __post_init__(self):
    dicts.normalize(self)
    for field in ('num_layers', 'width', 'num_heads', 'num_recency'):
      value = getattr(self, field)
      if value < 1:
        raise ValueError(f'encoder.{field}={value} must be at least 1')
    if self.mlp_width is not None and self.mlp_width < 1:
      raise ValueError(
        f'encoder.mlp_width={self.mlp_width} must be at least 1, or None for '
        '4 * width'
      )
    if self.width % self.num_heads:
      raise ValueError(
        f'encoder.width={self.width} must be a multiple of '
        f'encoder.num_heads={self.num_heads}'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f'encoder.dropout={self.dropout} must be in [0, 1)')
    if self.remat is not None and self.remat not in REMAT_POLICIES:
      raise ValueError(
        f'encoder.remat={self.remat!r} must be one of {REMAT_POLICIES}, or '
        'None to compute nothing twice'
      )
    attention_api.check_name(self.attention, 'encoder.attention')
    tower_api.check_name(self.candidate_tower, 'encoder.candidate_tower')
    if self.positions == 'rotary' and self.head_dim % 2:
      raise ValueError(
        f'encoder.width / encoder.num_heads = {self.head_dim} must be even '
        "for encoder.positions='rotary'"
      )
    if self.window is not None and (self.window < 1 or not self.causal):
      raise ValueError(
        f'encoder.window={self.window} must be at least 1 and needs '
        'encoder.causal=True; set encoder.window=None for the whole history'
      )

  @property
  def head_dim(self) -> int:
    """H."""
    return self.width // self.num_heads


def layer_norm(dtype: DTypeLike) -> nn.LayerNorm:
  """A norm over the last axis, in the form that XLA compiles best."""
  # It makes one kernel of a norm whose variance is a sum over deviations, but
  # on a CPU a second pass over the input costs more.
  one_pass = dispatch.target_of().platform == 'cpu'
  return nn.LayerNorm(dtype=dtype, use_fast_variance=one_pass)


class Block(nn.Module):
  """`x += Attention(norm(x), history)`, then `x += MLP(norm(x))`.

  Keys and values are a function of the history's tokens alone, so they are
  made by `keys_values` and given to `__call__`, whose queries may be events,
  candidates or both.
  """

  config: EncoderConfig
  dtype: DTypeLike = jnp.float32

  def setup(self):
    config = self.config
    self.attention_norm = layer_norm(self.dtype)
    self.query = nn.Dense(config.width, use_bias=False, dtype=self.dtype)
    self.key = nn.Dense(config.width, use_bias=False, dtype=self.dtype)
    self.value = nn.Dense(config.width, use_bias=False, dtype=self.dtype)
    self.output = nn.Dense(config.width, dtype=self.dtype)
    self.mlp_norm = layer_norm(self.dtype)
    self.mlp_in = nn.Dense(
      config.mlp_width or 4 * config.width, dtype=self.dtype
    )
    self.mlp_out = nn.Dense(config.width, dtype=self.dtype)
    self.dropout = nn.Dropout(config.dropout)

  def keys_values(
    self, history: Float[Array, 'B L D'], position: Int[Array, 'B L']
  ) -> tuple[Float[Array, 'B L N H'], Float[Array, 'B L N H']]:
    """The keys, rotated if the config says so, and the values of events."""
    return self._keys_values(self.attention_norm(history), position)

  def __call__(
    self,
    x: Float[Array, 'B Q D'],
    position: Int[Array, 'B Q'],
    key: Float[Array, 'B L N H'],
    value: Float[Array, 'B L N H'],
    key_range: KeyRange,
    *,
    with_self: bool = False,
    train: bool = False,
  ) -> Float[Array, 'B Q D']:
    """Updates tokens `x`; each sees the keys in its range.

    With `with_self` each sees its own key, too, which is not among those.

    The attention's output before its projection, `[B, Q, D]`, is sown as the
    intermediate `attention`. Where the collection `attention_weights` is
    mutable, `weights`, `[B, N, Q, L]`, is sown into it (not with `with_self`).
    """
    tokens = x, self.attention_norm(x), position
    return self._update(tokens, key, value, key_range, with_self, train)

  def update_all(
    self,
    x: Float[Array, 'B Q D'],
    position: Int[Array, 'B Q'],
    num_events: int,
    key_range: KeyRange,
    *,
    train: bool = False,
  ) -> Float[Array, 'B Q D']:
    """Updates tokens of which the first `num_events` are the history.

    As `__call__` with the `keys_values` of these, but that all are normed at
    once, so that the gradients of events, as queries and as keys, are added up
    before they go through the norm.
    """
    normed = self.attention_norm(x)
    key, value = self._keys_values(
      normed[:, :num_events], position[:, :num_events]
    )
    tokens = x, normed, position
    return self._update(tokens, key, value, key_range, False, train)

  def _keys_values(self, normed, position):
    key = self._turn(self.key(normed), position)
    # XLA would join the two products, and then copy both halves out.
    return key, self._heads(self.value(jax.lax.optimization_barrier(normed)))

  def _update(self, tokens, key, value, key_range, with_self, train):
    x, normed, position = tokens
    query = self._turn(self.query(normed), position)
    if with_self:
      own_key, own_value = self._keys_values(normed, position)
      attended = attention.attention_with_self(
        query, key, value, key_range, own_key, own_value
      )
    else:
      attended = ops.history_attention(
        query, key, value, key_range, implementation=self.config.attention
      )
      self._sow_weights(query, key, key_range)
    attended = attended.reshape(x.shape)  # [B, Q, D]
    self.sow('intermediates', 'attention', attended)
    x = x + self.dropout(self.output(attended), deterministic=not train)
    hidden = nn.gelu(self.mlp_in(self.mlp_norm(x)))
    return x + self.dropout(self.mlp_out(hidden), deterministic=not train)

  def _sow_weights(self, query, key, key_range) -> None:
    """For who asks to see them; else nothing is computed."""
    name = 'attention_weights'
    if self.is_mutable_collection(name) and not self.is_initializing():
      weights = ops.attention_weights(query, key, key_range)
      self.sow(name, 'weights', weights)

  def _heads(self, x):
    return x.reshape(*x.shape[:2], self.config.num_heads, -1)  # [B, L, N, H]

  def _turn(self, x, position):
    x = self._heads(x)
    if self.config.positions == 'rotary':
      x = rotary.rotary(x, position)
    return x
