"""A history that no candidate changes: what its fusions share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax import key_range as ranges
from histjax import ops
from histjax.nn.fusion import base
from histjax.ops import devices, dispatch
from histjax.types import Paged, Segments

EVENTS_OF_A_TILE = 64  # Of the Hopper kernels.


class SharedHistory(base.Transformer):
  """Blocks in which no event sees a candidate: keys and values serve all."""

  amortizable = True
  packable = True
  events_attend = True  # To each other, in layers that candidates share.

  def encode(
    self,
    history: Float[Array, 'B L D'],
    length: Int[Array, 'B'],
    *,
    segments: Segments | None = None,
    train: bool = False,
    into: tuple[Paged, Paged] | None = None,
  ) -> tuple[Any, Any]:
    """Keys and values of every layer; one pass over the history.

    Args:
      history: tokens `[B, L, D]`.
      length: int32 `[B]`.
      segments: of packed rows.
      train: whether dropout is on.
      into: pages to write them into, if a kernel does that.

    Returns:
      `[layers, B, L, N, H]` each, or those pages.
    """
    tower = self._packed(history=True, train=train, segments=segments)
    position = base.ordinals(history.shape, segments)
    key_range = self._history_range(length, history.shape[1], segments)
    x = self._place_events(history, length)
    if tower is not None:
      cache = self._read(tower, x, key_range, length, into)
      if cache is None and into is not None:
        cache = self._read(tower, x, key_range, length, None)
      if cache is not None:
        return cache
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
            key[None],
            value[None],
            key_range,
            block=block,
            train=train,
          )
        return x, key, value

      x, key, value = self._layer_function(layer, train)(block, x)
      keys.append(key)
      values.append(value)
    return jnp.stack(keys), jnp.stack(values)

  def _read(self, tower, x, key_range, length, into):
    """`ops.read_histories`; None: there is no kernel for all layers."""
    config = self.config
    if config.candidate_tower not in (None, 'pallas_gpu'):
      return None
    if not self.events_attend:  # Which they do there.
      return None
    try:
      devices.check_hopper(dispatch.target_of())
      return ops.read_histories(
        x,
        key_range,
        tower,
        self.get_variable('tower', 'keys_values'),
        num_heads=config.num_heads,
        rotate=config.positions == 'rotary',
        count=length,
        cache=into,
        implementation='pallas_gpu',
      )
    except NotImplementedError:  # Not here, or not of these sizes.
      return None

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
      keys, values = cache
      x = self._layer(
        i - 1, tower, x, position, keys, values, key_range, count=count
      )
      cache = self._written(i, x, cache, start, count)
    return cache

  def _layer(
    self, i, tower, x, position, keys, values, key_range, *, count=None,
    block=None, train=False,
  ):  # fmt: skip
    """Events after layer `i`, by the tower's kernel if it is not None.

    Keys and values are those of all layers, or of this one: `[1, B, L, N, H]`.
    """
    if tower is None:
      block = self.blocks[i] if block is None else block
      at = i if len(keys) > 1 else 0
      return block(x, position, keys[at], values[at], key_range, train=train)
    return self._tower(
      x,
      position,
      keys,
      values,
      key_range,
      tower,
      count=count,
      layer=i,
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
        x = self._layer(i, tower, x, position, keys, values, key_range)
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
