"""Keys and values of many users in one allocation, by pages of events."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from histjax.models.ranker import RankerConfig

EVENTS = 16
"""Of a page. A state wastes half a page on average, whatever its length."""


class Shape(NamedTuple):
  """What a page holds: `[layers, EVENTS, N, H]` keys, and as many values."""

  layers: int
  heads: int
  head_dim: int
  dtype: str

  @classmethod
  def of(cls, config: RankerConfig) -> Shape:
    """Of a model's states."""
    encoder = config.encoder
    return cls(
      encoder.num_layers, encoder.num_heads, encoder.head_dim, config.dtype
    )

  @property
  def nbytes(self) -> int:
    """Bytes of a page."""
    size = self.layers * EVENTS * self.heads * self.head_dim
    return 2 * size * jnp.dtype(self.dtype).itemsize


def pages_of(events: int) -> int:
  """How many pages so many events take."""
  return -(-events // EVENTS)


class Pool:
  """Pages on the device, allocated once: keys and values of all users.

  The first page stays zero: it stands for what a state does not have, so that
  what is beside a user's events in a cache is never another user's.

  Attributes:
    shape: of a page.
    num_pages: all of them.
  """

  def __init__(self, shape: Shape, num_pages: int, device: Any = None):
    """Allocates the pages.

    Args:
      shape: of a page.
      num_pages: at least one.
      device: where; None: JAX's default device.
    """
    self.shape, self.num_pages, self._device = shape, num_pages, device
    self._keys: Any = None
    self._values: Any = None
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

  def read(
    self, pages: list[list[int]], rows: int, capacity: int
  ) -> tuple[jax.Array, jax.Array]:
    """Copies states out.

    Args:
      pages: of each user.
      rows: at least as many; further ones are zeros.
      capacity: at least the events of each.

    Returns:
      Keys and values `[layers, rows, capacity, N, H]`.
    """
    index = np.zeros((rows, pages_of(capacity)), np.int32)
    for row, part in enumerate(pages):
      index[row, : len(part)] = part
    return _read(self._keys, self._values, index, capacity=capacity)

  def write(
    self, pages: list[list[int]], first: list[int], keys: Any, values: Any
  ) -> None:
    """Copies states in, in place.

    Args:
      pages: of each row; empty: it is not copied.
      first: of each row, the pages from there on are copied.
      keys: `[layers, rows, L, N, H]`, more rows than given if they are padded.
      values: likewise.
    """
    index = np.full(
      (keys.shape[1], pages_of(keys.shape[2])), self.num_pages, np.int32
    )  # Beyond the last page: dropped.
    for row, (part, begin) in enumerate(zip(pages, first, strict=True)):
      index[row, begin : len(part)] = part[begin:]
    self._keys, self._values = _write(
      self._keys, self._values, index, keys, values
    )

  def delete(self) -> None:
    """Frees the memory, as soon as no program reads it."""
    self._keys.delete()
    self._values.delete()

  def reset(self) -> None:
    """Starts again, with new memory."""
    self.delete()
    self._allocate()

  def _allocate(self) -> None:
    shape = self.shape
    dims = (shape.layers, self.num_pages, EVENTS, shape.heads, shape.head_dim)
    self._keys, self._values = (
      jnp.zeros(dims, shape.dtype, device=self._device) for _ in range(2)
    )
    self._free = list(range(self.num_pages - 1, 0, -1))


@functools.partial(jax.jit, static_argnames='capacity')
def _read(keys, values, index, *, capacity):
  def copy(pool):
    found = pool.at[:, index.reshape(-1)].get(mode='promise_in_bounds')
    shape = (pool.shape[0], index.shape[0], -1, *pool.shape[3:])
    return found.reshape(shape)[:, :, :capacity]

  return copy(keys), copy(values)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _write(keys, values, index, new_keys, new_values):
  def copy(pool, new):
    more = index.shape[1] * EVENTS - new.shape[2]
    new = jnp.pad(new, [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)])
    new = new.reshape(pool.shape[0], -1, *pool.shape[2:])
    return pool.at[:, index.reshape(-1)].set(
      new.astype(pool.dtype), mode='drop', wrap_negative_indices=False
    )

  return copy(keys, new_keys), copy(values, new_values)
