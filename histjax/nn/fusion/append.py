"""The candidate appended to a history that does not see it: amortizable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax import key_range as ranges
from histjax import ops
from histjax.nn.fusion import base


class _SharedHistory(base.Transformer):
  """Blocks in which no event sees a candidate: keys and values serve all."""

  amortizable = True

  def encode(
    self,
    history: Float[Array, 'B L D'],
    length: Int[Array, 'B'],
    *,
    train: bool = False,
    tower: ops.TowerWeights | None = None,
    implementation: str | None = None,
  ) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
    """Keys and values of every layer; one pass over the history.

    Args:
      history: tokens `[B, L, D]`.
      length: int32 `[B]`.
      train: whether dropout is on.
      tower: `pack_tower` of this module's parameters, for
        `ops.candidate_tower` to compute each layer; None: block by block.
      implementation: with `tower`, of that operation; None picks, and on a CPU
        without the kernel 'numba_cpu' picks the blocks.
    """
    tower = _tower_or_blocks(tower, implementation, train)
    position = base.ordinals(history.shape)
    key_range = self._history_range(length, history.shape[1])
    x = self._place_events(history, length)
    x = self.token_dropout(x, deterministic=not train)
    keys, values = [], []
    for i, block in enumerate(self.blocks):
      key, value = block.keys_values(x, position)
      keys.append(key)
      values.append(value)
      if i + 1 == len(self.blocks):  # Nothing reads the last layer's events.
        break
      if tower is None:
        x = block(x, position, key, value, key_range, train=train)
      else:
        x = self._tower(
          x,
          position,
          key[None],
          value[None],
          key_range,
          tower.layer(i),
          final_norm=False,
          implementation=implementation,
        )
    return jnp.stack(keys), jnp.stack(values)

  def _tower(self, x, position, keys, values, key_range, weights, **options):
    """`ops.candidate_tower`; the residual stream between layers is float32."""
    return ops.candidate_tower(
      x,
      position if self.config.positions == 'rotary' else None,
      keys,
      values,
      key_range,
      weights,
      num_heads=self.config.num_heads,
      **options,
    )

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
    position = base.visible_events(length, visible, num_candidates)
    key_range = ranges.candidate_range(
      position, window=self.config.window, whole_history=visible is None
    )
    return key_range, position


def _tower_or_blocks(tower, implementation, train):
  """The tower, or None where layers are faster as `Block`.

  That is on a CPU without the kernel, where none is named.
  """
  if tower is not None and train:
    raise ValueError('tower is for scoring; with train=True, pass None')
  if tower is None or implementation is not None:
    return tower
  on_cpu = jax.default_backend() == 'cpu'
  return None if on_cpu and not ops.has_cpu_kernel(tower.query.dtype) else tower


class AppendCross(_SharedHistory):
  """The candidate is appended to the history and attends to it.

  The paper's fusion (arXiv 2412.06924, "append" with cross-attention). In
  every layer `Q = W_q [H_1..H_n, C_1..C_m]`, `K = W_k [H_1..H_n]`,
  `V = W_v [H_1..H_n]`: no token ever sees a candidate, so one pass over the
  history serves all of them. `__call__` is that joint pass: block by block with
  one attention call a layer, whose last one has candidates' queries only, since
  nothing reads the history's; with `tower`, `encode` and `score`.
  """

  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    train: bool = False,
    tower: ops.TowerWeights | None = None,
    implementation: str | None = None,
  ) -> Float[Array, 'B C D']:
    """The fused candidates; the final norm's output.

    Args:
      history: tokens `[B, L, D]`.
      candidates: tokens `[B, C, D]`.
      length: int32 `[B]`.
      visible: int32 `[B, C]`, or None for all events.
      train: whether dropout is on.
      tower: as `encode`.
      implementation: likewise.
    """
    if _tower_or_blocks(tower, implementation, train) is not None:
      keys, values = self.encode(
        history, length, tower=tower, implementation=implementation
      )
      return self.score(
        keys,
        values,
        length,
        candidates,
        visible,
        tower=tower,
        implementation=implementation,
      )
    num_events, num_candidates = history.shape[1], candidates.shape[1]
    candidate_range, candidate_position = self._candidates_see(
      length, visible, num_candidates
    )
    joint_range = ranges.concatenate(
      self._history_range(length, num_events), candidate_range
    )
    event_position = base.ordinals(history.shape)
    x = jnp.concatenate(
      [
        self._place_events(history, length),
        self._place_candidates(candidates),
      ],
      axis=1,
    )  # [B, L + C, D]
    x = self.token_dropout(x, deterministic=not train)
    position = jnp.concatenate([event_position, candidate_position], axis=1)
    key_range = joint_range
    for i, block in enumerate(self.blocks):
      last = i + 1 == len(self.blocks)
      key, value = block.keys_values(x[:, :num_events], event_position)
      if last:  # Nothing reads its events.
        x = x[:, num_events:]
        position, key_range = candidate_position, candidate_range
      x = block(x, position, key, value, key_range, train=train)
    return self.final_norm(x)

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
      return self._tower(
        x,
        position,
        keys,
        values,
        key_range,
        tower,
        count=count,
        implementation=implementation,
      )
    for block, key, value in zip(self.blocks, keys, values, strict=True):
      x = block(x, position, key, value, key_range)
    return self.final_norm(x)


class AppendIsolated(_SharedHistory):
  """The candidate attends to the history and to itself.

  As the rankers of M-FALCON (Zhai et al., arXiv 2402.17152) and Phoenix: in
  every layer candidate c sees the keys `[H_1..H_n, C_c]` under one softmax,
  and no token sees another candidate, so the history's pass serves all of
  them. That pass runs in the operation `history_attention`, candidates in
  `nn.attention.attention_with_self`, whose memory grows as `B N C L`.
  """

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
    keys, values = self.encode(history, length, train=train)
    return self.score(keys, values, length, candidates, visible, train=train)

  def score(
    self,
    keys: Float[Array, 'layers B L N H'],
    values: Float[Array, 'layers B L N H'],
    length: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates, from the cached keys and values."""
    key_range, position = self._candidates_see(
      length, visible, candidates.shape[1]
    )
    x = self._place_candidates(candidates)
    x = self.token_dropout(x, deterministic=not train)
    for block, key, value in zip(self.blocks, keys, values, strict=True):
      x = block(x, position, key, value, key_range, with_self=True, train=train)
    return self.final_norm(x)
