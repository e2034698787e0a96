"""Pages of keys and values, as programs read and write them.

A pool is keys and values `[layers, pages, ..]`, or `Quantized` ones with scales
`[layers, pages, 1, N]`. A page is `[EVENTS, N, H]`, in the shape that `shape`
says. A row of an index names the pages of a user's state, in the order of its
events.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from histjax import quantization
from histjax.types import Paged

EVENTS = quantization.BLOCK
"""Of a page. A state wastes half a page on average, whatever its length."""

_LANES = 128


def number(events: int) -> int:
  """How many pages so many events take."""
  return -(-events // EVENTS)


def shape(heads: int, head_dim: int) -> tuple[int, int]:
  """Of a page: as many numbers side by side as a TPU has lanes.

  With fewer, as H or D often are, XLA lays pages side by side, and a program
  that reads or writes a few has to copy all of them there and back.
  """
  size = EVENTS * heads * head_dim
  lanes = _LANES if size % _LANES == 0 else size
  return size // lanes, lanes


def read(pool: Any, index: Int[Array, 'B P'], capacity: int, heads: int) -> Any:
  """States `[layers, B, capacity, N, H]` of keys or values.

  Args:
    pool: keys or values.
    index: the pages of each state, all in bounds.
    capacity: P pages hold it.
    heads: N.
  """

  def copy(x, unit):
    found = x.at[:, index.reshape(-1)].get(mode='promise_in_bounds')
    # Keys and values have H numbers, scales none.
    tail = () if unit == 1 else (math.prod(x.shape[2:]) // (unit * heads),)
    found = found.reshape(x.shape[0], index.shape[0], -1, heads, *tail)
    return found[:, :, : -(-capacity * unit // EVENTS)]

  return jax.tree.map(copy, pool, _units(pool))


def paged(pool: jax.Array, index: Int[Array, 'B P'], heads: int) -> Paged:
  """The states for what reads, or writes, them where they are.

  Args:
    pool: keys or values, no codes.
    index: the pages of each state; those to write may be beyond the last.
    heads: N.
  """
  head_dim = math.prod(pool.shape[2:]) // (EVENTS * heads)
  shape = (*pool.shape[:2], EVENTS, heads, head_dim)
  return Paged(pool.reshape(shape), index)


def _units(pool: Any) -> Any:
  """How many rows a page has in a state: an event, or a block, is one."""
  if isinstance(pool, quantization.Quantized):
    return quantization.Quantized(EVENTS, 1)  # type: ignore[arg-type]
  return EVENTS


def extended(
  pool: Any,
  index: Int[Array, 'B P'],
  states: Any,
  length: Int[Array, 'B'],
  new: Int[Array, 'B'],
  new_events: int,
) -> Any:
  """As `write`, of the pages that hold new events alone.

  Args:
    pool: keys or values.
    index: as `write`; other pages are dropped, whatever it has there.
    states: as `write`.
    length: of each state, without the new events.
    new: of each state, the new events.
    new_events: the most of `new`.
  """
  width = index.shape[1]
  # Events may begin at the end of a page.
  few = min(width, number(new_events + EVENTS - 1))
  first = jnp.clip(length // EVENTS, 0, width - few)
  begin = jnp.arange(width, dtype=jnp.int32)[None] * EVENTS
  of_new = jnp.maximum(begin, length[:, None]) < jnp.minimum(
    begin + EVENTS, (length + new)[:, None]
  )
  index = jnp.where(of_new, index, jnp.iinfo(jnp.int32).max)

  def cut(x, unit, axis):
    of_row = functools.partial(
      jax.lax.dynamic_slice_in_dim, slice_size=few * unit, axis=axis
    )
    return jax.vmap(of_row, (axis, 0), axis)(x, first * unit)

  def of_pages(unit, new):
    after = width * unit - new.shape[2]
    new = jnp.pad(new, [(0, after if i == 2 else 0) for i in range(new.ndim)])
    return cut(new, unit, 1)

  return write(
    pool, cut(index, 1, 0), jax.tree.map(of_pages, _units(pool), states)
  )


def write(pool: Any, index: Int[Array, 'B P'], states: Any) -> Any:
  """The pool with states in it.

  Args:
    pool: keys or values.
    index: the pages of each state; beyond the last page: it is dropped.
    states: of `read`, with another capacity if need be.
  """

  def copy(x, unit, new):
    layers, pages, *page = x.shape
    of_page = unit * math.prod(new.shape[3:])
    if new.shape[0] != layers or of_page != math.prod(page):
      raise ValueError(
        f'states {new.shape} are not of the pages {x.shape}: layers, heads and '
        'their size must be the same'
      )
    size = index.shape[1] * unit
    after = [(0, size - n if i == 2 else 0) for i, n in enumerate(new.shape)]
    where = index.reshape(1, -1)
    layer = jnp.arange(layers, dtype=jnp.int32)[:, None]
    number = jnp.arange(index.size, dtype=jnp.int32)[None, :]
    beyond = layers * pages + layer * index.size + number
    rows = jnp.where(where < pages, layer * pages + where, beyond)
    # Pages are copied whole, and none twice.
    written = (
      x.reshape(layers * pages, *page)
      .at[rows.reshape(-1)]
      .set(
        jnp.pad(new, after).astype(x.dtype).reshape(-1, *page),
        mode='drop',
        unique_indices=True,
        wrap_negative_indices=False,
      )
    )
    return written.reshape(x.shape)

  return jax.tree.map(copy, pool, _units(pool), states)
