"""Which pages of keys and values are whose: one allocation for all users."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from histjax.models.ranker import RankerConfig
from histjax.quantization import Quantized
from histjax.scoring import graphs
from histjax.scoring import pages as pages_lib
from histjax.scoring.config import ScorerConfig
from histjax.scoring.paged import Pool
from histjax.scoring.pages import EVENTS


class Shape(NamedTuple):
  """What a page holds: `[layers, EVENTS, N, H]` keys, and as many values.

  See `scoring.pages` for the shape in which they lie.
  """

  layers: int
  heads: int
  head_dim: int
  dtype: str
  cache_dtype: str | None = None

  @classmethod
  def of(cls, config: RankerConfig, options: ScorerConfig) -> Shape:
    """Of a model's states."""
    encoder = config.encoder
    return cls(
      encoder.num_layers,
      encoder.num_heads,
      encoder.head_dim,
      config.dtype,
      options.cache_dtype,
    )

  @property
  def nbytes(self) -> int:
    """Bytes of a page."""
    codes = EVENTS * self.head_dim
    codes *= jnp.dtype(self.cache_dtype or self.dtype).itemsize
    scale = 4 if self.cache_dtype else 0
    return 2 * self.layers * self.heads * (codes + scale)

  def zeros(self, pages: int, device: Any) -> jax.Array | Quantized:
    """Keys or values of so many pages."""
    page = pages_lib.shape(self.heads, self.head_dim)
    dims = (self.layers, pages, *page)
    dtype = self.cache_dtype or self.dtype
    codes = jnp.zeros(dims, dtype, device=device)
    if self.cache_dtype is None:
      return codes
    blocks = (self.layers, pages, 1, self.heads)
    return Quantized(codes, jnp.zeros(blocks, jnp.float32, device=device))


class Pages:
  """Pages on the device, allocated once: keys and values of all users.

  The first page stays zero: it stands for what a state does not have, so that
  what is beside a user's events in a cache is never another user's.

  Attributes:
    shape: of a page.
    num_pages: all of them.
    pool: their keys and values. A program that is given them donated returns
      those that take their place.
  """

  pool: Pool

  def __init__(self, shape: Shape, num_pages: int, device: Any = None):
    """Allocates the pages.

    Args:
      shape: of a page.
      num_pages: at least one.
      device: `Scorer.device`: programs are compiled for pages that are there;
        None: on JAX's default device, until a program returns them.
    """
    self.shape, self.num_pages, self._device = shape, num_pages, device
    self._free: list[int] = []
    self._allocate()

  @property
  def nbytes(self) -> int:
    """Bytes of device memory, free pages included."""
    return self.num_pages * self.shape.nbytes

  @property
  def num_free(self) -> int:
    """Pages that `take` can give."""
    return len(self._free)

  def take(self, number: int) -> list[int]:
    """Takes so many pages, of those that are free."""
    if not number:
      return []
    taken = self._free[-number:]
    del self._free[-number:]
    return taken

  def give(self, pages: list[int]) -> None:
    """Gives pages back; what they hold means nothing from now on."""
    self._free.extend(pages)

  def to_read(
    self, pages: Sequence[Sequence[int]], rows: int, capacity: int
  ) -> np.ndarray:
    """Pages of users as an index int32 `[rows, P]`; zeros are read besides."""
    width = pages_lib.number(capacity)
    flat: list[int] = []
    for part in pages:  # To write each to an array takes longer.
      flat += part
      flat += [0] * (width - len(part))
    flat += [0] * (width * (rows - len(pages)))
    packed = struct.pack(f'{len(flat)}i', *flat)
    return np.frombuffer(packed, np.int32).reshape(rows, width)

  def to_write(
    self,
    pages: Sequence[Sequence[int]],
    first: Sequence[int],
    rows: int,
    capacity: int,
  ) -> np.ndarray:
    """The same to write: of each user those from number `first` on."""
    # Beyond the last page: dropped.
    index = np.full(
      (rows, pages_lib.number(capacity)), self.num_pages, np.int32
    )
    for row, (part, begin) in enumerate(zip(pages, first, strict=True)):
      index[row, begin : len(part)] = part[begin:]
    return index

  def read(self, index: np.ndarray, capacity: int) -> Pool:
    """Copies states out, keys and values `[layers, rows, capacity, N, H]`."""
    with graphs.exclusive:
      return _read(self.pool, index, capacity=capacity, heads=self.shape.heads)

  def write(self, index: np.ndarray, keys: Any, values: Any) -> None:
    """Copies states `[layers, rows, L, N, H]` in, in place."""
    with graphs.exclusive:
      self.pool = _write(self.pool, index, Pool(keys, values))

  def delete(self) -> None:
    """Frees the memory, as soon as no program reads it."""
    for array in jax.tree.leaves(self.pool):
      array.delete()

  def reset(self) -> None:
    """Starts again, with new memory."""
    self.delete()
    self._allocate()

  def _allocate(self) -> None:
    zeros: list[jax.Array | Quantized] = []
    try:
      for _ in range(2):
        zeros.append(self.shape.zeros(self.num_pages, self._device))
      jax.block_until_ready(zeros)  # No memory is an error here, not later.
    except BaseException:
      for array in jax.tree.leaves(zeros):
        array.delete()  # The error's traceback holds it.
      raise
    self.pool = Pool(*zeros)
    self._free = list(range(self.num_pages - 1, 0, -1))


@functools.partial(jax.jit, static_argnames=('capacity', 'heads'))
def _read(pool, index, *, capacity, heads):
  return Pool(*(pages_lib.read(x, index, capacity, heads) for x in pool))


@functools.partial(jax.jit, donate_argnums=0)
def _write(pool, index, states):
  return Pool(
    *(pages_lib.write(x, index, y) for x, y in zip(pool, states, strict=True))
  )
