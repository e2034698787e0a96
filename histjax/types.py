"""The data that crosses module boundaries, each shape stated once.

Axes: `B` rows (users or requests), `L` history length, `C` candidates, `Q`
queries (`L + C` in the joint pass), `N` heads, `H` head dimension, `D` width.
Events are ordered oldest first. All containers are pytrees.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import flax.struct
from jaxtyping import Bool, Float, Int, Shaped

Array: TypeAlias = Any
"""A `jax.Array` or `np.ndarray`: containers hold either."""

STRUCTURES = ('any', 'prefix', 'causal', 'ascending')
"""What `KeyRange.structure` may be."""


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
      'ascending': `start = 0`; of two queries of a row the later one has no
      smaller `stop`.
  """

  start: Int[Array, 'B Q']
  stop: Int[Array, 'B Q']
  structure: Literal['any', 'prefix', 'causal', 'ascending'] = (
    flax.struct.field(pytree_node=False, default='any')
  )


class Paged(flax.struct.PyTreeNode):
  """Keys or values of users whose events lie in pages of a pool.

  Stands for an array `[layers, B, L, N, H]`, in which event `e` of row `b` is
  `pool[:, index[b, e // E], e % E]`, with L = P E.

  Attributes:
    pool: `[layers, pages, E, N, H]`.
    index: int32 `[B, P]`, in bounds where there are events that are read.
      Where a pool is written, other pages are written nowhere.
  """

  pool: Shaped[Array, 'layers pages E N H']
  index: Int[Array, 'B P']

  @property
  def shape(self) -> tuple[int, ...]:
    """`[layers, B, L, N, H]`."""
    layers, _, events, *heads = self.pool.shape
    rows, pages = self.index.shape
    return (layers, rows, pages * events, *heads)

  @property
  def dtype(self) -> Any:
    """Of the pool."""
    return self.pool.dtype

  def __len__(self) -> int:
    return len(self.pool)


def dense(x: Any) -> Any:
  """The array that a `Paged` stands for; anything else as it is."""
  if not isinstance(x, Paged):
    return x
  found = x.pool.at[:, x.index].get(mode='clip')
  return found.reshape(x.shape)


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


class Segments(flax.struct.PyTreeNode):
  """Which of the rows packed into one, the segments, all in it belongs to.

  Events of a segment are consecutive, and so are its candidates. Each sees
  its own segment alone, whose first event has position 0.

  Attributes:
    events: int32 `[B, L]`, the first event of each event's segment.
    candidates: int32 `[B, C]`, the first event of each candidate's segment.
    index: int32 `[B, C]`, the number of each candidate's segment in the row.
  """

  events: Int[Array, 'B L']
  candidates: Int[Array, 'B C']
  index: Int[Array, 'B C']


class RankingBatch(flax.struct.PyTreeNode):
  """A batch of rows: a user, a history, candidates and (if known) labels.

  A packed row holds several, one after the other: `history.length` counts the
  events of all, `candidates.visible` from the row's first event on.

  Attributes:
    context: `{name: [B]}`, features of the user or the request; packed:
      `{name: [B, C]}`.
    history: the events.
    candidates: the items to score.
    labels: `{task: [B, C]}` float32 in {0, 1}; empty when scoring.
    group: int32 `[B]`, packed `[B, C]`, the user as a dense index. GAUC
      averages over it. The model never reads it.
    segments: of packed rows; None: they are not packed.
  """

  context: dict[str, Shaped[Array, 'B ...']]
  history: History
  candidates: Candidates
  labels: dict[str, Float[Array, 'B C']]
  group: Int[Array, 'B ...']
  segments: Segments | None = None
