"""The data that crosses module boundaries, each shape stated once.

Axes: `B` rows (users or requests), `L` history length, `C` candidates, `Q`
queries (`L + C` in the joint pass), `N` heads, `H` head dimension, `D` width.
Events are ordered oldest first. All containers are pytrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Array: TypeAlias = Any
"""A `jax.Array` or `np.ndarray`: containers hold either."""


class KeyRange(flax.struct.PyTreeNode):
  """The contiguous range of history keys that each query sees.

  Key `j` is visible to query `q` of row `b` iff
  `start[b, q] <= j < stop[b, q]`. A range with `start >= stop` is empty.

  Attributes:
    start: int32 `[B, Q]`.
    stop: int32 `[B, Q]`, at most L.
    structure: what is known of the ranges when the program is traced, for
      backends that cannot take arbitrary ones. It must be true; it never
      changes a result.
      'any': nothing.
      'prefix': `start = 0` and `stop[b, q] = length[b]` for every q.
      'causal': `start = 0`; query `q < L` has `stop = min(q + 1, length[b])`,
      a query `q >= L` (a candidate) has `stop = length[b]`.
  """

  start: Int[Array, 'B Q']
  stop: Int[Array, 'B Q']
  structure: Literal['any', 'prefix', 'causal'] = flax.struct.field(
    pytree_node=False, default='any'
  )


class History(flax.struct.PyTreeNode):
  """What each user did, oldest event first, padded at the end.

  Attributes:
    features: `{name: [B, L]}`; int32 ids of categorical features, float32
      values of dense ones.
    length: int32 `[B]`, the number of real events; later ones are padding.
  """

  features: dict[str, Shaped[Array, 'B L']]
  length: Int[Array, 'B']


class Candidates(flax.struct.PyTreeNode):
  """What each user is being ranked for, padded at the end.

  Attributes:
    features: `{name: [B, C]}`, as `History.features` without the features
      that only become known after the impression (the user's action).
    visible: int32 `[B, C]`, the number of history events that happened before
      the impression: candidate `c` may attend to events `[0, visible[c])`.
      None: all of them, as when serving.
    mask: bool `[B, C]`, False at padding. None: no padding.
  """

  features: dict[str, Shaped[Array, 'B C']]
  visible: Int[Array, 'B C'] | None = None
  mask: Bool[Array, 'B C'] | None = None

  @property
  def shape(self) -> tuple[int, int]:
    """`(B, C)`."""
    return next(iter(self.features.values())).shape


class RankingBatch(flax.struct.PyTreeNode):
  """A batch of rows: a user, a history, candidates and (if known) labels.

  Attributes:
    context: `{name: [B]}`, features of the user or the request.
    history: the events.
    candidates: the items to score.
    labels: `{task: [B, C]}` float32 in {0, 1}; empty when scoring.
    group: int32 `[B]`, the user of each row as a dense index. GAUC averages
      over it. The model never reads it.
  """

  context: dict[str, Shaped[Array, 'B']]
  history: History
  candidates: Candidates
  labels: dict[str, Float[Array, 'B C']]
  group: Int[Array, 'B']


@dataclasses.dataclass(frozen=True)
class CacheInfo:
  """What the host knows of a cache, so that no call waits for the device.

  Attributes:
    length: int32 `[users]`, the events of each user; further rows are padding.
    fingerprint: of the model that made it, `Scorer.fingerprint`.
  """

  length: np.ndarray
  fingerprint: str

  @property
  def num_users(self) -> int:
    """The number of real rows."""
    return len(self.length)


@dataclasses.dataclass(frozen=True)
class HistoryCache:
  """Everything about a user that scoring a candidate needs.

  A pytree of its arrays. `info` is no part of that: what comes out of `jax.jit`
  or `jax.tree.map` has none, and no program is compiled once more for it.

  Attributes:
    keys: `[layers, B, L, N, H]`, per layer, rotated to absolute positions.
    values: `[layers, B, L, N, H]`.
    length: int32 `[B]`, the number of events encoded. `L` is the capacity.
    context: `{name: [B, ...]}`, the part of the head that depends on the user
      alone, already multiplied out.
    info: of a cache that a `Scorer` made, for its checks; None: not known.
  """

  keys: Shaped[Array, 'layers B L N H']
  values: Shaped[Array, 'layers B L N H']
  length: Int[Array, 'B']
  context: Mapping[str, Any]
  info: CacheInfo | None = None

  @property
  def capacity(self) -> int:
    """The number of events that fit, `L`."""
    return self.keys.shape[2]

  @property
  def num_rows(self) -> int:
    """The number of rows `B`, padding included."""
    return self.keys.shape[1]

  def replace(self, **fields: Any) -> HistoryCache:
    """A copy with other values in some fields."""
    return dataclasses.replace(self, **fields)


jax.tree_util.register_dataclass(
  HistoryCache,
  data_fields=['keys', 'values', 'length', 'context'],
  meta_fields=[],
  drop_fields=['info'],
)
