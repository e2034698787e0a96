"""The parameters of an interaction head in the order in which a kernel reads.

A head is two chains of products that both begin at x0. What a chain multiplies
is cut into tiles of 64 by 64, padded with zeros and stored in the order in
which they are needed, so that to stream them takes one counter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

TILE = 64


def blocks(width: int) -> int:
  """Tiles that hold so many channels."""
  return -(-width // TILE)


@dataclasses.dataclass(frozen=True)
class HeadShape:
  """The sizes of an interaction head.

  Attributes:
    user: channels of the user, U.
    features: of a candidate's features, F.
    readout: of its readout, D.
    mlp: hidden channels of the MLP.
    cross_layers: 0 if there is only the MLP.
    rank: of their matrices.
    tasks: T.
  """

  user: int
  features: int
  readout: int
  mlp: tuple[int, ...]
  cross_layers: int
  rank: int
  tasks: int

  @property
  def width(self) -> int:
    """Channels of x0."""
    return self.user + self.features + self.readout

  @property
  def near(self) -> int:
    """Blocks of 64 channels of `[user ; features]`."""
    return blocks(self.user + self.features)

  @property
  def deep(self) -> int:
    """Blocks of 64 channels of x0."""
    return self.near + blocks(self.readout)

  @property
  def place(self) -> np.ndarray:
    """Where the channels of x0 are among those of its blocks."""
    split = self.user + self.features
    place = np.arange(self.width)
    place[split:] += self.near * TILE - split
    return place

  def matrices(self) -> dict[str, tuple[np.ndarray, np.ndarray, tuple]]:
    """Of each matrix its rows and columns in tiles, and how many tiles."""
    found = {}
    x0 = (self.place, self.deep)
    left = x0
    for i, width in enumerate(self.mlp):
      right = (np.arange(width), blocks(width))
      found[f'mlp_{i}'] = left, right
      left = right
    low = (np.arange(self.rank), blocks(self.rank))
    for i in range(self.cross_layers):
      found[f'down_{i}'] = x0, low
      found[f'up_{i}'] = low, x0
    return {
      name: (rows, columns, (deep, wide))
      for name, ((rows, deep), (columns, wide)) in found.items()
    }

  def mlp_tiles(self) -> list[tuple[str, int, int]]:
    """The MLP's tiles in order: the matrix, the block of rows, of columns."""
    sizes = {name: x[2] for name, x in self.matrices().items()}
    return [
      (f'mlp_{i}', k, n)
      for i in range(len(self.mlp))
      for k in range(sizes[f'mlp_{i}'][0])
      for n in range(sizes[f'mlp_{i}'][1])
    ]

  def cross_tiles(self) -> list[tuple[str, int, int]]:
    """The cross layers', likewise.

    A layer makes x block by block, and each is at once multiplied by its part
    of the next layer's `V`.
    """
    if not self.cross_layers:
      return []
    low, deep = blocks(self.rank), self.deep
    order = [('down_0', k, n) for k in range(deep) for n in range(low)]
    for i in range(self.cross_layers):
      for block in range(deep):
        order += [(f'up_{i}', k, block) for k in range(low)]
        if i + 1 < self.cross_layers:
          order += [(f'down_{i + 1}', block, n) for n in range(low)]
    return order

  def vectors(self) -> Iterator[tuple[str, np.ndarray, int]]:
    """Each vector's name, the places of its numbers, and its blocks."""
    for i, width in enumerate(self.mlp):
      yield f'mlp_{i}', np.arange(width), blocks(width)
    for i in range(self.cross_layers):
      yield f'up_{i}', self.place, self.deep
    last = np.arange(self.mlp[-1])
    for task in range(self.tasks):
      if self.cross_layers:
        yield f'logits_x_{task}', self.place, self.deep
      yield f'logits_mlp_{task}', last, blocks(self.mlp[-1])
    yield 'logits_bias', np.arange(self.tasks), blocks(self.tasks)

  def vector_rows(self) -> dict[str, int]:
    """The first row of each vector in `HeadWeights.vectors`."""
    rows, at = {}, 0
    for name, _, count in self.vectors():
      rows[name] = at
      at += count
    return rows


class HeadWeights(flax.struct.PyTreeNode):
  """The parameters of an interaction head, packed.

  Attributes:
    tiles: `[n, 64, 64]`, of the MLP and then of the cross layers.
    vectors: float32 `[m, 64]`: biases and the logits' weights.
    shape: the sizes; static.
  """

  tiles: Float[Array, 'n 64 64']
  vectors: Float[Array, 'm 64']
  shape: HeadShape = flax.struct.field(pytree_node=False)

  @classmethod
  def pack(
    cls,
    shape: HeadShape,
    matrices: dict[str, Float[Array, 'K N']],
    vectors: dict[str, Float[Array, 'n']],
    dtype: DTypeLike,
  ) -> HeadWeights:
    """Packs what `HeadShape.matrices` and `HeadShape.vectors` name.

    Of arrays of NumPy its fields are such arrays, too: nothing is compiled.

    Args:
      shape: the sizes.
      matrices: the user's rows before the features', and those before the
        readout's.
      vectors: likewise.
      dtype: of the matrices.
    """
    numpy = _numpy(vectors['logits_bias'])
    padded = {}
    for name, (rows, columns, (deep, wide)) in shape.matrices().items():
      spread = _spread(matrices[name].astype(np.float32), rows, deep, 0)
      padded[name] = _spread(spread, columns, wide, 1)
    tiles = [
      padded[name][k * TILE : (k + 1) * TILE, n * TILE : (n + 1) * TILE]
      for name, k, n in shape.mlp_tiles() + shape.cross_tiles()
    ]
    rows_of_64 = [
      _spread(vectors[name].astype(np.float32), places, count, 0)
      for name, places, count in shape.vectors()
    ]
    return cls(
      tiles=numpy.stack(tiles).astype(dtype),
      vectors=numpy.concatenate(rows_of_64).reshape(-1, TILE),
      shape=shape,
    )

  def unpack(self) -> tuple[dict[str, Array], dict[str, Array]]:
    """The matrices and vectors that were packed, in float32."""
    shape = self.shape
    order = shape.mlp_tiles() + shape.cross_tiles()
    number = {name_k_n: i for i, name_k_n in enumerate(order)}
    matrices = {}
    for name, (rows, columns, (deep, wide)) in shape.matrices().items():
      padded = _numpy(self.tiles).block(
        [
          [self.tiles[number[name, k, n]] for n in range(wide)]
          for k in range(deep)
        ]
      )
      matrices[name] = _take(_take(padded, rows, 0), columns, 1)
    first = shape.vector_rows()
    vectors = {
      name: _take(
        self.vectors[first[name] : first[name] + count].reshape(-1), places, 0
      )
      for name, places, count in shape.vectors()
    }
    return matrices, vectors


def _runs(places: np.ndarray) -> list[tuple[int, int]]:
  """Of places side by side, how many there are and where they begin."""
  cuts = np.flatnonzero(np.diff(places) != 1) + 1
  return [(len(x), int(x[0])) for x in np.split(places, cuts) if len(x)]


def _numpy(x: Any) -> Any:
  """The library that this array is of."""
  return np if isinstance(x, np.ndarray) else jnp


def _spread(x: Any, places: np.ndarray, count: int, axis: int) -> Any:
  """What is in `x` at these places of `count` blocks, zeros between them."""
  parts, done, end = [], 0, 0
  for size, first in [*_runs(places), (0, count * TILE)]:
    gap = list(x.shape)
    gap[axis] = first - end
    parts += [_numpy(x).zeros(gap, x.dtype), _cut(x, done, size, axis)]
    done, end = done + size, first + size
  return _numpy(x).concatenate(parts, axis)


def _take(x: Any, places: np.ndarray, axis: int) -> Any:
  """What lies at these places, in float32."""
  parts = [_cut(x, first, size, axis) for size, first in _runs(places)]
  return _numpy(x).concatenate(parts, axis).astype(np.float32)


def _cut(x: Any, first: int, size: int, axis: int) -> Any:
  cut = slice(first, first + size)
  return x[cut] if axis == 0 else x[:, cut]
