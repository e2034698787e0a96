"""The candidate appended to a history that does not see it: amortizable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from histjax import key_range as ranges
from histjax import ops
from histjax.nn.fusion import base
from histjax.nn.fusion import tower as tower_lib
from histjax.ops import devices, dispatch
from histjax.types import Segments

EVENTS_OF_A_TILE = 64  # Of the Hopper kernels.
WIDE = 256  # D from which they are cut in another way.
# That a Hopper GPU computes at once; of more, each layer would be read and
# written once more than it is saved.
TILES_AT_ONCE = 264
WIDE_TILES_AT_ONCE = 66


class _SharedHistory(base.Transformer):
  """Blocks in which no event sees a candidate: keys and values serve all."""

  amortizable = True
  packable = True

  def encode(
    self,
    history: Float[Array, 'B L D'],
    length: Int[Array, 'B'],
    *,
    segments: Segments | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
    """Keys and values of every layer; one pass over the history.

    Args:
      history: tokens `[B, L, D]`.
      length: int32 `[B]`.
      segments: of packed rows.
      train: whether dropout is on.
    """
    tower = self._packed(history=True, train=train, segments=segments)
    position = base.ordinals(history.shape, segments)
    key_range = self._history_range(length, history.shape[1], segments)
    x = self._place_events(history, length)
    if tower is not None:
      cache = self._written(0, x, None, None, length)
      if cache is not None:
        if self.config.causal:
          position = key_range.stop - 1  # Of real events.
        return self._follow(tower, x, position, cache, key_range, None, length)
    x = self.token_dropout(x, deterministic=not train)
    keys, values = [], []
    for i, block in enumerate(self.blocks):
      last = i + 1 == len(self.blocks)  # Nothing reads its events.

      def layer(block, x, i=i, last=last):
        key, value = block.keys_values(x, position)
        if not last:
          x = self._layer(
            i,
            tower,
            x,
            position,
            key,
            value,
            key_range,
            block=block,
            train=train,
          )
        return x, key, value

      x, key, value = self._layer_function(layer, train)(block, x)
      keys.append(key)
      values.append(value)
    return jnp.stack(keys), jnp.stack(values)

  def _new_cache(self, shape, dtype):
    """A cache for events `[B, L, D]` that holds nothing yet."""
    config = self.config
    cached = (
      config.num_layers, *shape[:2], config.num_heads, config.head_dim
    )  # fmt: skip
    return jax.lax.empty(cached, dtype), jax.lax.empty(cached, dtype)

  def _written(self, layer, x, cache, start, count):
    """The cache with a layer's events, as `ops.keys_values`; None: no kernel.

    Then `Block.keys_values` has to make what is written. Without a cache a new
    one is made.
    """
    config = self.config
    if config.candidate_tower not in (None, 'pallas_gpu'):
      return None
    weights: ops.KeyValueWeights = self.get_variable('tower', 'keys_values')
    try:
      devices.check_hopper(dispatch.target_of())
      keys, values = cache or self._new_cache(x.shape, weights.matrix.dtype)
      return ops.keys_values(
        x,
        keys,
        values,
        weights,
        layer=layer,
        rotate=config.positions == 'rotary',
        start=start,
        count=count,
        implementation='pallas_gpu',
      )
    except NotImplementedError:  # Not here, or not of these sizes.
      return None

  def _follow(self, tower, x, position, cache, key_range, start, count):
    """The cache with all layers, of which the first is there; by kernels."""
    for i in range(1, len(self.blocks)):
      key, value = (y[i - 1] for y in cache)
      x = self._layer(
        i - 1, tower, x, position, key, value, key_range, count=count
      )
      cache = self._written(i, x, cache, start, count)
    return cache

  def _layer(
    self, i, tower, x, position, key, value, key_range, *, count=None,
    block=None, train=False,
  ):  # fmt: skip
    """Events after layer `i`, by the tower's kernel if it is not None."""
    if tower is None:
      block = self.blocks[i] if block is None else block
      return block(x, position, key, value, key_range, train=train)
    return self._tower(
      x,
      position,
      key[None],
      value[None],
      key_range,
      tower.layer(i),
      count=count,
      final_norm=False,
    )

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
      implementation=self.config.candidate_tower,
      **options,
    )

  def _packed(
    self,
    *,
    history: bool = False,
    train: bool = False,
    segments: Segments | None = None,
  ) -> ops.TowerWeights | None:
    """The packed weights for `ops.candidate_tower`; None: block by block.

    Everything that decides between the two is here: whether the collection
    `tower` is given, which implementations are named, and the target.

    Args:
      history: whether events are read, for which on a CPU without the kernel
        blocks are faster.
      train: whether dropout is on, which the operation does not have.
      segments: of packed rows, whose positions it does not have either.
    """
    if not self.has_variable('tower', 'weights'):
      return None
    if segments is not None:
      raise ValueError(
        "the collection 'tower' is for scoring and the batch has packed rows, "
        'which are for training; leave one of them out'
      )
    if train:
      raise ValueError(
        "the collection 'tower' is for scoring; with train=True, leave it out"
      )
    weights: ops.TowerWeights = self.get_variable('tower', 'weights')
    config = self.config
    if config.candidate_tower is None:
      on_cpu = dispatch.target_of().platform == 'cpu'
      slow = on_cpu and not ops.has_cpu_kernel(weights.query.dtype)
      if config.attention is not None or (history and slow):
        return None
    return weights

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
    tower = self._packed(history=True)
    if tower is not None:
      # Once for all kernels, which move whole tiles.
      after = -events.shape[1] % EVENTS_OF_A_TILE
      padded = jnp.pad(events, [(0, 0), (0, after), (0, 0)])
      cache = self._written(0, padded, (keys, values), length, count)
      if cache is not None:
        _, key_range = self._new_see(length, count, padded.shape[1])
        position = key_range.stop - 1  # Of real events.
        return self._follow(
          tower, padded, position, cache, key_range, length, count
        )
    position, key_range = self._new_see(length, count, events.shape[1])
    x = events
    for i in range(len(self.blocks)):
      keys, values = self._scattered(i, x, position, (keys, values), count)
      if i + 1 < len(self.blocks):
        x = self._layer(i, tower, x, position, keys[i], values[i], key_range)
    return keys, values

  def _scattered(self, layer, x, position, cache, count):
    """The cache with a layer's new events, at their positions; by XLA."""
    offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
    # Outside of the cache, where it is dropped.
    slot = jnp.where(offset < count[:, None], position, cache[0].shape[2])
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    # One scatter into all layers: a donated cache is not copied.
    return tuple(
      cached.at[layer, row, slot].set(
        new, mode='drop', wrap_negative_indices=False
      )
      for cached, new in zip(
        cache, self.blocks[layer].keys_values(x, position), strict=True
      )
    )

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
    keys, values = self.extend(keys, values, length, events, new)
    fused = self.score(
      keys, values, length + new, candidates, visible, count=count
    )
    return keys, values, fused

  def encode_and_score(
    self,
    history: Float[Array, 'B L D'],
    length: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    count: Int[Array, 'B'] | None = None,
  ) -> tuple[
    Float[Array, 'layers B L N H'],
    Float[Array, 'layers B L N H'],
    Float[Array, 'B C D'],
  ]:
    """`encode`, and `score` from what that gives.

    Args:
      history: tokens `[B, L, D]`.
      length: int32 `[B]`.
      candidates: tokens `[B, C, D]`.
      visible: int32 `[B, C]`, or None for all events.
      count: as `score`.

    Returns:
      The keys and values, the fused candidates.
    """
    keys, values = self.encode(history, length)
    fused = self.score(keys, values, length, candidates, visible, count=count)
    return keys, values, fused

  def _new_see(self, length, count, num_new):
    """The positions of new events and their key ranges, `[B, E]`."""
    offset = jnp.arange(num_new, dtype=jnp.int32)[None, :]
    position = length[:, None] + offset
    key_range = ranges.candidate_range(
      jnp.minimum(position, (length + count)[:, None] - 1) + 1,
      window=self.config.window,
    )
    if self.config.window is None:
      key_range = key_range.replace(structure='ascending')
    return position, key_range

  def _candidates_see(self, length, visible, num_candidates, segments=None):
    """The candidates' key ranges and their positions, behind what they see."""
    position = base.visible_events(length, visible, num_candidates)
    first = None if segments is None else segments.candidates
    key_range = ranges.candidate_range(
      position,
      window=self.config.window,
      whole_history=visible is None,
      first=first,
    )
    return key_range, position if first is None else position - first


class AppendCross(_SharedHistory):
  """The candidate is appended to the history and attends to it.

  The paper's fusion (arXiv 2412.06924, "append" with cross-attention). In
  every layer `Q = W_q [H_1..H_n, C_1..C_m]`, `K = W_k [H_1..H_n]`,
  `V = W_v [H_1..H_n]`: no token ever sees a candidate, so one pass over the
  history serves all of them. `__call__` is that joint pass: block by block with
  one attention call a layer, whose last one has candidates' queries only, since
  nothing reads the history's; with packed weights, `encode` and `score`.
  """

  has_tower = True
  events_attend = True

  @staticmethod
  def pack(params: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """The collection `tower`: all layers' weights for kernels, norms folded in.

    `weights` for `ops.candidate_tower`, `keys_values` for `ops.keys_values`.
    """
    return {
      'weights': tower_lib.pack_tower(params, dtype),
      'keys_values': tower_lib.pack_keys_values(params, dtype),
    }

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
    """The fused candidates; the final norm's output.

    Args:
      history: tokens `[B, L, D]`.
      candidates: tokens `[B, C, D]`.
      length: int32 `[B]`.
      visible: int32 `[B, C]`, or None for all events.
      segments: of packed rows.
      train: whether dropout is on.
    """
    tower = self._packed(history=True, train=train, segments=segments)
    if tower is not None:
      keys, values = self.encode(history, length)
      return self.score(keys, values, length, candidates, visible)
    num_events, num_candidates = history.shape[1], candidates.shape[1]
    candidate_range, candidate_position = self._candidates_see(
      length, visible, num_candidates, segments
    )
    joint_range = ranges.concatenate(
      self._history_range(length, num_events, segments), candidate_range
    )
    event_position = base.ordinals(history.shape, segments)
    x = jnp.concatenate(
      [
        self._place_events(history, length),
        self._place_candidates(candidates),
      ],
      axis=1,
    )  # [B, L + C, D]
    x = self.token_dropout(x, deterministic=not train)
    joint_position = jnp.concatenate(
      [event_position, candidate_position], axis=1
    )

    def layer(block, x):
      key, value = block.keys_values(x[:, :num_events], event_position)
      return block(x, joint_position, key, value, joint_range, train=train)

    def last_layer(block, x):
      key, value = block.keys_values(x[:, :num_events], event_position)
      x = x[:, num_events:]  # Nothing reads its events.
      return block(
        x, candidate_position, key, value, candidate_range, train=train
      )

    for block in self.blocks[:-1]:
      x = self._layer_function(layer, train)(block, x)
    x = self._layer_function(last_layer, train)(self.blocks[-1], x)
    return self.final_norm(x)

  def score(
    self,
    keys: Float[Array, 'layers B L N H'],
    values: Float[Array, 'layers B L N H'],
    length: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    count: Int[Array, 'B'] | None = None,
    segments: Segments | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates, from the cached keys and values.

    Args:
      keys: of `encode` or `extend`.
      values: of `encode` or `extend`.
      length: int32 `[B]`, events cached.
      candidates: tokens `[B, C, D]`.
      visible: int32 `[B, C]`, or None for all events.
      count: int32 `[B]`; candidates from there on mean nothing, and need not
        be computed. None: all C count.
      segments: of packed rows.
      train: whether dropout is on.
    """
    key_range, position = self._candidates_see(
      length, visible, candidates.shape[1], segments
    )
    x = self._place_candidates(candidates)
    tower = self._packed(train=train, segments=segments)
    if tower is not None:
      return self._tower(
        x, position, keys, values, key_range, tower, count=count
      )
    x = self.token_dropout(x, deterministic=not train)
    for block, key, value in zip(self.blocks, keys, values, strict=True):
      x = block(x, position, key, value, key_range, train=train)
    return self.final_norm(x)

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
    """As the shared one; where it pays, in one pass over the layers.

    A layer of a few events takes as long as one of a few thousand, so both are
    queries of one call: event j sees `length + j + 1` keys, its own included.
    """
    tower = self._packed(history=True)
    sizes = (*events.shape[:2], candidates.shape[1])
    if tower is not None and self._one_pass_pays(*sizes):
      events = self._whole_blocks(events, sizes[2])
      position, key_range = self._new_see(length, new, events.shape[1])

      def write(i, x, cache):
        # What is no new event it leaves out.
        written = self._written(i, x, cache, length, new)
        if written is None and not _on_gpu():
          x = x[:, : events.shape[1]]
          written = self._scattered(i, x, position, cache, new)
        return written

      found = self._one_pass(
        tower,
        write,
        (keys, values),
        (events, position, key_range, new),
        (candidates, *self._candidates_see(length + new, visible, sizes[2])),
        count,
      )
      if found is not None:
        return found
    return super().extend_and_score(
      keys, values, length, events[:, : sizes[1]], new, candidates, visible,
      count=count,
    )  # fmt: skip

  def encode_and_score(
    self,
    history: Float[Array, 'B L D'],
    length: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    count: Int[Array, 'B'] | None = None,
  ) -> tuple[
    Float[Array, 'layers B L N H'],
    Float[Array, 'layers B L N H'],
    Float[Array, 'B C D'],
  ]:
    """As the shared one; by kernels in one pass, as `extend_and_score`."""
    tower = self._packed(history=True)
    num_events, num_candidates = history.shape[1], candidates.shape[1]
    if (
      tower is not None
      and _on_gpu()
      and self._one_pass_pays(len(history), num_events, num_candidates)
    ):
      events = self._place_events(history, length)
      events = self._whole_blocks(events, num_candidates)
      key_range = self._history_range(length, events.shape[1])
      position = base.ordinals(events.shape)
      if self.config.causal:
        position = key_range.stop - 1  # Of real events.
      found = self._one_pass(
        tower,
        # All of `x`, or XLA would fuse a slice of it with the call and lose
        # that it writes in place.
        lambda i, x, cache: self._written(i, x, cache, None, length),
        self._new_cache(history.shape, self.dtype),
        (events, position, key_range, length),
        (candidates, *self._candidates_see(length, visible, num_candidates)),
        count,
      )
      if found is not None:
        return found
    return super().encode_and_score(
      history, length, candidates, visible, count=count
    )

  def _one_pass(self, tower, write, cache, events, candidates, count):
    """The cache with events, and the fused candidates.

    Args:
      tower: of all layers.
      write: number of a layer, events and more, cache -> the cache with that
        layer's events; None: there is no kernel, and nothing is computed.
      cache: given.
      events: tokens, their positions and key ranges, and how many count.
      candidates: tokens, their key ranges and positions.
      count: of candidates.
    """
    events, position, key_range, new = events
    candidates, seen, place = candidates
    num_events, last = events.shape[1], len(self.blocks) - 1
    x = jnp.concatenate([events, self._place_candidates(candidates)], axis=1)
    place_of_all = jnp.concatenate([position, place], axis=1)
    # If candidates see whole histories, the structure is that of events.
    all_see = ranges.concatenate(key_range, seen)
    live = count
    if count is not None:  # Events come first; without candidates, alone.
      live = jnp.where(count > 0, num_events + count, new)
    for i in range(last + 1):
      cache = write(i, x, cache)
      if cache is None:
        return None
      if i < last:
        key, value = (y[i] for y in cache)
        x = self._layer(
          i, tower, x, place_of_all, key, value, all_see, count=live
        )
    keys, values = cache
    fused = self._tower(
      x[:, num_events:],  # Nothing reads events after the last layer.
      place,
      keys[last:],
      values[last:],
      seen,
      tower.layer(last),
      count=count,
    )
    return keys, values, fused

  def _one_pass_pays(self, num_rows, num_events, num_candidates):
    """Whether that is faster than events and then candidates."""
    if not self.events_attend or len(self.blocks) == 1 or not num_events:
      return False
    platform = dispatch.target_of().platform
    if platform != 'cuda':
      return platform == 'cpu'  # Not measured on others.
    number = num_events + num_candidates
    tiles = num_rows * -(-number // EVENTS_OF_A_TILE)
    wide = self.config.width >= WIDE
    return tiles <= (WIDE_TILES_AT_ONCE if wide else TILES_AT_ONCE)

  def _whole_blocks(self, events, num_candidates):
    """Events padded so that all queries are whole blocks of the kernels."""
    if not _on_gpu():
      return events
    number, block = events.shape[1] + num_candidates, EVENTS_OF_A_TILE
    if self.config.width < WIDE and number > block:
      block *= 2  # One of two tiles.
    return jnp.pad(events, [(0, 0), (0, -number % block), (0, 0)])


def _on_gpu():
  return dispatch.target_of().platform == 'cuda'


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
    segments: Segments | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates; the final norm's output."""
    keys, values = self.encode(history, length, segments=segments, train=train)
    return self.score(
      keys,
      values,
      length,
      candidates,
      visible,
      segments=segments,
      train=train,
    )

  def score(
    self,
    keys: Float[Array, 'layers B L N H'],
    values: Float[Array, 'layers B L N H'],
    length: Int[Array, 'B'],
    candidates: Float[Array, 'B C D'],
    visible: Int[Array, 'B C'] | None,
    *,
    count: Int[Array, 'B'] | None = None,
    segments: Segments | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates, from the cached keys and values."""
    del count
    key_range, position = self._candidates_see(
      length, visible, candidates.shape[1], segments
    )
    x = self._place_candidates(candidates)
    x = self.token_dropout(x, deterministic=not train)

    def layer(block, x, key, value):
      return block(
        x, position, key, value, key_range, with_self=True, train=train
      )

    for block, key, value in zip(self.blocks, keys, values, strict=True):
      x = self._layer_function(layer, train)(block, x, key, value)
    return self.final_norm(x)
