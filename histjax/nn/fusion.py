"""Early fusion: how the candidate meets the history.

Every fusion is a module with one signature, so that they can be compared:

    fused = fusion(history, candidates, length, visible)      # [B, C, D]

An *amortizable* one also has `encode`, `score` and `extend`, which split that
call into a part that depends on the history alone and a part per candidate:

    keys, values = fusion.encode(history, length)
    fused = fusion.score(keys, values, length, candidates, visible)

Here `history` and `candidates` are tokens `[B, L, D]` and `[B, C, D]`,
`length` is int32 `[B]`, and `visible` int32 `[B, C]` or None for all events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from histjax import ops
from histjax.nn import embedding
from histjax.nn import encoder as encoder_lib
from histjax.ops.history_attention import ranges
from histjax.types import KeyRange


class _Transformer(nn.Module):
  """What the fusions share: blocks, final norm, positions."""

  config: encoder_lib.EncoderConfig
  dtype: DTypeLike = jnp.float32

  def setup(self):
    config = self.config
    self.blocks = [
      encoder_lib.Block(config, self.dtype) for _ in range(config.num_layers)
    ]
    self.final_norm = nn.LayerNorm(dtype=self.dtype)
    self.token_dropout = nn.Dropout(config.dropout)
    if config.positions == 'recency':
      self.recency = self.param(
        'recency',
        nn.initializers.normal(stddev=0.05),
        (config.num_recency, config.width),
      )

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

  def _history_range(self, length, num_events) -> KeyRange:
    return ranges.history_range(
      length,
      num_events,
      causal=self.config.causal,
      window=self.config.window,
    )


class AppendCross(_Transformer):
  """The candidate is appended to the history and attends to it.

  The paper's fusion (arXiv 2412.06924, "append" with cross-attention). In
  every layer `Q = W_q [H_1..H_n, C_1..C_m]`, `K = W_k [H_1..H_n]`,
  `V = W_v [H_1..H_n]`: no token ever sees a candidate, so one pass over the
  history serves all of them. `__call__` is that joint pass, with one attention
  call a layer; its last layer has candidates' queries only, since nothing
  reads the history's.
  """

  amortizable = True

  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates; the final norm's output."""
    num_events, num_candidates = history.shape[1], candidates.shape[1]
    candidate_range, candidate_position = self._candidates_see(
      length, visible, num_candidates
    )
    joint_range = ranges.concatenate(
      self._history_range(length, num_events), candidate_range
    )
    event_position = _ordinals(history.shape)
    x = jnp.concatenate(
      [
        self._place_events(history, length),
        self._place_candidates(candidates),
      ],
      axis=1,
    )  # [B, L + C, D]
    x = self.token_dropout(x, deterministic=not train)
    position = jnp.concatenate([event_position, candidate_position], axis=1)
    for block in self.blocks[:-1]:
      key, value = block.keys_values(x[:, :num_events], event_position)
      x = block(x, position, key, value, joint_range, train=train)
    block = self.blocks[-1]
    key, value = block.keys_values(x[:, :num_events], event_position)
    x = block(
      x[:, num_events:],
      candidate_position,
      key,
      value,
      candidate_range,
      train=train,
    )
    return self.final_norm(x)

  def encode(
    self, history: Float[Array, 'B L D'], length: Int[Array, 'B']
  ) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
    """Keys and values of every layer; one pass over the history."""
    position = _ordinals(history.shape)
    key_range = self._history_range(length, history.shape[1])
    x = self._place_events(history, length)
    keys, values = [], []
    for i, block in enumerate(self.blocks):
      key, value = block.keys_values(x, position)
      keys.append(key)
      values.append(value)
      if i + 1 < len(self.blocks):  # Nothing reads the last layer's events.
        x = block(x, position, key, value, key_range)
    return jnp.stack(keys), jnp.stack(values)

  def score(
    self,
    keys: Float[Array, 'layers B L N H'],
    values: Float[Array, 'layers B L N H'],
    length: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    tower: ops.TowerWeights | None = None,
    count: Int[Array, 'B'] | None = None,
    implementation: str | None = None,
  ) -> Float[Array, 'B C D']:
    """The fused candidates, from the cached keys and values.

    Args:
      keys: of `encode` or `extend`.
      values: likewise.
      length: int32 `[B]`, events cached.
      candidates: tokens `[B, C, D]`.
      visible: int32 `[B, C]`, or None for all events.
      tower: `pack_tower` of this module's parameters, for
        `ops.candidate_tower` to compute all layers; None: block by block.
      count: with `tower`, as `ops.candidate_tower`.
      implementation: likewise.
    """
    key_range, position = self._candidates_see(
      length, visible, candidates.shape[1]
    )
    x = self._place_candidates(candidates)
    if tower is not None:
      return ops.candidate_tower(
        x,
        position if self.config.positions == 'rotary' else None,
        keys,
        values,
        key_range,
        tower,
        num_heads=self.config.num_heads,
        count=count,
        implementation=implementation,
      )
    for block, key, value in zip(self.blocks, keys, values, strict=True):
      x = block(x, position, key, value, key_range)
    return self.final_norm(x)

  def extend(
    self,
    keys: Float[Array, 'layers B L N H'],
    values: Float[Array, 'layers B L N H'],
    length: Int[Array, 'B'],
    events: Float[Array, 'B E D'],
    count: Int[Array, 'B'],
  ) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
    """Writes `count[b]` new events of each row behind its `length[b]` ones.

    Equal to `encode` of the longer history if that is causal and its
    positions relative, which the caller sees to, as to the capacity: an event
    past L is dropped.
    """
    num_new, capacity = events.shape[1], keys.shape[2]
    offset = jnp.arange(num_new, dtype=jnp.int32)[None, :]
    position = length[:, None] + offset  # [B, E]
    slot = jnp.where(offset < count[:, None], position, capacity)
    row = jnp.arange(events.shape[0], dtype=jnp.int32)[:, None]
    key_range = ranges.candidate_range(
      jnp.minimum(position, (length + count)[:, None] - 1) + 1,
      window=self.config.window,
    )
    x = events
    new_keys, new_values = [], []
    for i, block in enumerate(self.blocks):
      key, value = block.keys_values(x, position)
      key = keys[i].at[row, slot].set(key, mode='drop')
      value = values[i].at[row, slot].set(value, mode='drop')
      new_keys.append(key)
      new_values.append(value)
      if i + 1 < len(self.blocks):
        x = block(x, position, key, value, key_range)
    return jnp.stack(new_keys), jnp.stack(new_values)

  def _candidates_see(self, length, visible, num_candidates):
    """The candidates' key ranges and their positions, behind what they see."""
    whole_history = visible is None
    if visible is None:
      visible = jnp.broadcast_to(
        length[:, None], (length.shape[0], num_candidates)
      )
    key_range = ranges.candidate_range(
      visible, window=self.config.window, whole_history=whole_history
    )
    return key_range, visible.astype(jnp.int32)


class Concat(_Transformer):
  """The candidate is concatenated to every event, `W [H_i ; C] + b`.

  As in TransAct (Xia et al., arXiv 2306.00248) and the paper's baseline: each
  candidate changes every token, so it needs a pass of its own over the
  history. The result is the mean over the events that the candidate sees of
  the last layer's output, zeros if it sees none.
  """

  amortizable = False

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
    if visible is None:
      visible = jnp.broadcast_to(length[:, None], (num_rows, num_candidates))
    history = self._place_events(history, length)
    event = nn.Dense(width, dtype=self.dtype, name='event')(history)
    candidate = nn.Dense(
      width, use_bias=False, dtype=self.dtype, name='candidate'
    )(self._place_candidates(candidates))
    x = event[:, None] + candidate[:, :, None]  # [B, C, L, D]
    x = x.reshape(num_rows * num_candidates, num_events, width)
    x = self.token_dropout(x, deterministic=not train)
    seen = visible.reshape(-1).astype(jnp.int32)  # [B * C]
    key_range = self._history_range(seen, num_events)
    position = _ordinals(x.shape)
    for block in self.blocks:
      key, value = block.keys_values(x, position)
      x = block(x, position, key, value, key_range, train=train)
    ordinal = position[:1]
    read = ordinal < seen[:, None]  # [B * C, L]
    if self.config.window is not None:
      read &= ordinal >= (seen - self.config.window)[:, None]
    x = jnp.where(read[..., None], self.final_norm(x), 0)
    pooled = (
      x.sum(axis=1) / jnp.maximum(read.sum(axis=1), 1).astype(x.dtype)[:, None]
    )
    return pooled.reshape(num_rows, num_candidates, width)


FUSIONS: dict[str, type[AppendCross] | type[Concat]] = {
  'append_cross': AppendCross,
  'concat': Concat,
}


def pack_tower(params: Mapping[str, Any], dtype: DTypeLike) -> ops.TowerWeights:
  """The weights of an `AppendCross` for `ops.candidate_tower`.

  Args:
    params: its parameters: `blocks_0`, `blocks_1`, .., `final_norm`.
    dtype: of the matrices, the type that candidates are computed in.
  """
  num_layers = sum(name.startswith('blocks_') for name in params)
  layers = [_pack_block(params[f'blocks_{i}']) for i in range(num_layers)]
  *matrices, bias = (jnp.stack(x) for x in zip(*layers, strict=True))
  query, output, mlp_in, mlp_out = (x.astype(dtype) for x in matrices)
  return ops.TowerWeights(
    query=query,
    output=output,
    mlp_in=mlp_in,
    mlp_out=mlp_out,
    bias=bias,
    final_scale=params['final_norm']['scale'].astype(jnp.float32),
    final_bias=params['final_norm']['bias'].astype(jnp.float32),
  )


def _pack_block(block):
  """float32 query, output, mlp_in, mlp_out, and their biases in one vector."""
  block = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), block)

  def fold(norm, kernel):
    shift = jnp.matmul(
      norm['bias'], kernel, precision=jax.lax.Precision.HIGHEST
    )
    return norm['scale'][:, None] * kernel, shift

  query, query_bias = fold(block['attention_norm'], block['query']['kernel'])
  mlp_in, in_bias = fold(block['mlp_norm'], block['mlp_in']['kernel'])
  bias = jnp.concatenate(
    [
      query_bias,
      block['output']['bias'],
      in_bias + block['mlp_in']['bias'],
      block['mlp_out']['bias'],
    ]
  )
  output, mlp_out = block['output']['kernel'], block['mlp_out']['kernel']
  return query, output, mlp_in, mlp_out, bias


def amortizable() -> tuple[str, ...]:
  """The names of the fusions that have encode, score and extend."""
  return tuple(name for name, f in FUSIONS.items() if f.amortizable)


def _ordinals(shape) -> Int[Array, 'B L']:
  """int32 `[B, L]`, `0, 1, .., L - 1` in each row."""
  ordinal = jnp.arange(shape[1], dtype=jnp.int32)
  return jnp.broadcast_to(ordinal[None, :], shape[:2])
