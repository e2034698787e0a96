"""The candidate appended to a history that does not see it: amortizable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from histjax import key_range as ranges
from histjax.nn.fusion import base, shared
from histjax.nn.fusion import tower as tower_lib
from histjax.ops import dispatch
from histjax.types import Paged, Segments, dense

# Tiles of 64 queries that a Hopper GPU computes at once, two to a block, and
# from this D on, one to some blocks of a cluster. In one pass more would cost
# what they save: they are joined, and in device memory between layers.
TILES_AT_ONCE = 264
WIDE = 256
WIDE_TILES_AT_ONCE = 66
# From this D on a layer is several kernels, whose clusters compute 256 columns
# of 256 queries of any users.
WIDER = 512
CLUSTERS_AT_ONCE = 66
OF_A_CLUSTER = 256


class AppendCross(shared.SharedHistory):
  """The candidate is appended to the history and attends to it.

  The paper's fusion (arXiv 2412.06924, "append" with cross-attention). In
  every layer `Q = W_q [H_1..H_n, C_1..C_m]`, `K = W_k [H_1..H_n]`,
  `V = W_v [H_1..H_n]`: no token ever sees a candidate, so one pass over the
  history serves all of them. `__call__` is that joint pass: block by block with
  one attention call a layer, whose last one has candidates' queries only, since
  nothing reads the history's; with packed weights, `encode` and `score`.
  """

  has_tower = True

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
      return block.update_all(
        x, joint_position, num_events, joint_range, train=train
      )

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
    keys: Float[Array, 'layers B L N H'] | Paged,
    values: Float[Array, 'layers B L N H'] | Paged,
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
      keys: of `encode` or `extend`, or pages of them.
      values: likewise.
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
    states = self.blocks, dense(keys), dense(values)
    for block, key, value in zip(*states, strict=True):
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
        if written is None and (self.config.width >= WIDER or not _on_gpu()):
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
    into: tuple[Paged, Paged] | None = None,
  ) -> tuple[Any, Any, Float[Array, 'B C D']]:
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
      history, length, candidates, visible, count=count, into=into
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
        keys, values = cache
        x = self._layer(
          i, tower, x, place_of_all, keys, values, all_see, count=live
        )
    keys, values = cache
    fused = self._tower(
      x[:, num_events:],  # Nothing reads events after the last layer.
      place,
      keys,
      values,
      seen,
      tower,
      count=count,
      layer=last,
    )
    return keys, values, fused

  def _one_pass_pays(self, num_rows, num_events, num_candidates):
    """Whether that is faster than events and then candidates."""
    config = self.config
    if not self.events_attend or config.num_layers == 1 or not num_events:
      return False
    wide = config.width >= WIDE
    platform = dispatch.target_of().platform
    if platform != 'cuda':  # On others than CPUs not measured.
      return platform == 'cpu' and (num_rows == 1 or wide)
    number = num_events + num_candidates
    if config.width >= WIDER:

      def rounds(queries):
        tiles = -(-num_rows * queries // OF_A_CLUSTER)
        return -(-tiles * (config.width // OF_A_CLUSTER) // CLUSTERS_AT_ONCE)

      return rounds(number) < rounds(num_events) + rounds(num_candidates)
    tiles = num_rows * -(-number // shared.EVENTS_OF_A_TILE)
    return tiles <= (WIDE_TILES_AT_ONCE if wide else TILES_AT_ONCE)

  def _whole_blocks(self, events, num_candidates):
    """Events padded so that all queries are whole blocks of the kernels."""
    if not _on_gpu() or self.config.width >= WIDER:
      return events
    number, block = events.shape[1] + num_candidates, shared.EVENTS_OF_A_TILE
    if self.config.width < WIDE and number > block:
      block *= 2  # One of two tiles.
    return jnp.pad(events, [(0, 0), (0, -number % block), (0, 0)])


def _on_gpu():
  return dispatch.target_of().platform == 'cuda'


class AppendIsolated(shared.SharedHistory):
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
