"""Where the parts of a request lie in one array.

A program that takes a request as one int32 array and gives its logits as one
float32 array moves two buffers, where one of a feature each would cost as much
as the model does. Dense values travel as their bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from histjax import schema as schema_lib

_FEW = 2**14
"""Values that are looked at all at once: of more, a pass for each part of them
takes less time, of fewer, its calls take more."""
_TOO_LARGE = np.nextafter(np.float32(schema_lib.MAX_DENSE), np.float32(np.inf))
_AS_LIST = 32
"""Values of which a list is looked at in less time than an array."""


class Part(NamedTuple):
  """Features of one shape, one after another: ids, then dense values.

  Attributes:
    name: of the part, 'candidates' for example.
    shape: of each feature, as padded.
    ids: names of the categorical features.
    dense: names of the others.
    sizes: of their tables; None: any int32 will do.
  """

  name: str
  shape: tuple[int, ...]
  ids: tuple[str, ...] = ()
  dense: tuple[str, ...] = ()
  sizes: tuple[int, ...] | None = None

  @property
  def stacked(self) -> tuple[int, ...]:
    """The shape of all of them."""
    return (len(self.ids) + len(self.dense), *self.shape)

  @property
  def size(self) -> int:
    """The number of its values."""
    return math.prod(self.stacked)


def features(
  name: str, spec: tuple[schema_lib.Feature, ...], shape: tuple[int, ...]
) -> Part:
  """The part that holds the features of `spec`."""
  ids = schema_lib.categorical(spec)
  return Part(
    name,
    shape,
    tuple(f.name for f in ids),
    tuple(f.name for f in schema_lib.dense(spec)),
    tuple(f.size for f in ids),
  )


def numbers(name: str, shape: tuple[int, ...]) -> Part:
  """The part that holds one array of integers, by the part's own name."""
  return Part(name, shape, (name,))


@dataclasses.dataclass(frozen=True)
class View:
  """A part within a buffer in host memory, to write to.

  Attributes:
    part: which.
    features: `{name: int32 or float32, part.shape}`.
    ids: uint32 `[ids, ..]`, all ids.
    dense: float32 `[dense, ..]`, all dense values.
  """

  part: Part
  features: dict[str, np.ndarray]
  ids: np.ndarray
  dense: np.ndarray

  @functools.cached_property
  def columns(self) -> tuple[tuple[str, np.ndarray, np.dtype], ...]:
    """Names, arrays and types of the features."""
    return tuple((name, x, x.dtype) for name, x in self.features.items())

  @functools.cached_property
  def number(self) -> np.ndarray:
    """int32 `part.shape`, of a part of `numbers`."""
    return self.features[self.part.name]

  @functools.cached_property
  def _checked(self) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Ids, `[N]` or if many `[ids, N]`, their sizes of tables, and dense."""
    sizes = list(self.part.sizes or ())
    ids, dense = self.ids[: len(sizes)], self.dense.reshape(-1)
    each = ids.size // max(1, len(sizes))
    if ids.size <= _AS_LIST:
      return ids.reshape(-1), [x for x in sizes for _ in range(each)], dense
    return ids.reshape(len(sizes), each), sizes, dense

  def is_good(self) -> bool:
    """Whether ids are of their tables and dense values small, if features.

    Only of a whole part: some of its rows are not one piece of memory.
    """
    ids, sizes, dense = self._checked
    if sizes:  # An id below 0 is a large one.
      largest = ids if ids.ndim == 1 else np.maximum.reduce(ids, axis=1)
      if not all(map(operator.lt, largest.tolist(), sizes)):
        return False
    if len(dense) <= _AS_LIST:
      return all(map(schema_lib.MAX_DENSE.__ge__, map(abs, dense.tolist())))
    return bool(np.logical_and.reduce(np.abs(dense) <= schema_lib.MAX_DENSE))

  def clear(self) -> None:
    """Writes zeros."""
    self.ids.fill(0)
    self.dense.fill(0)

  def rows(self, first: int, number: int) -> View:
    """Some of the rows."""
    here = slice(first, first + number)
    return View(
      self.part._replace(shape=(number, *self.part.shape[1:])),
      {name: x[here] for name, x in self.features.items()},
      self.ids[:, here],
      self.dense[:, here],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """The parts of a request, or of several at once, one after another.

  Attributes:
    parts: of all rows.
    requests: that share the rows, each as many of them.
  """

  parts: tuple[Part, ...]
  requests: int = 1

  @functools.cached_property
  def size(self) -> int:
    """The number of int32 values of a buffer."""
    return sum(part.size for part in self.parts)

  @functools.cached_property
  def _limits(self) -> tuple[np.ndarray, np.ndarray]:
    """uint32 `[size]` each: what to look at, and what it must be below."""
    mask = np.zeros(self.size, np.uint32)
    limit = np.ones(self.size, np.uint32)
    for name, view in self.views(mask.view(np.int32)).items():
      if view.part.sizes is None:  # Any number.
        continue
      below = self.views(limit.view(np.int32))[name]
      for i, size in enumerate(view.part.sizes):
        view.ids[i] = 2**32 - 1  # An id below 0 is a large one.
        below.ids[i] = size
      view.dense.view(np.uint32)[...] = 2**31 - 1  # All but the sign.
      below.dense[...] = _TOO_LARGE
    return mask, limit

  def is_good(self, buffer: np.ndarray, views: dict[str, View]) -> bool:
    """Whether all ids are of their tables and all dense values small.

    Args:
      buffer: int32 `[size]`.
      views: its.
    """
    if self.size <= _FEW:
      mask, limit = self._limits
      bad = (buffer.view(np.uint32) & mask) >= limit
      return not np.logical_or.reduce(bad)
    return all([view.is_good() for view in views.values()])

  def views(self, buffer: np.ndarray) -> dict[str, View]:
    """The parts of a buffer, int32 `[size]`, by name."""
    found, offset = {}, 0
    for part in self.parts:
      here = buffer[offset : offset + part.size].reshape(part.stacked)
      ids, dense = here[: len(part.ids)], here[len(part.ids) :]
      dense = dense.view(np.float32)
      by_name = dict(zip(part.ids, ids, strict=True))
      by_name |= dict(zip(part.dense, dense, strict=True))
      found[part.name] = View(part, by_name, ids.view(np.uint32), dense)
      offset += part.size
    return found

  def split(self, views: dict[str, View]) -> list[dict[str, View]]:
    """The views of each request's rows."""
    if self.requests == 1:
      return [views]
    found = []
    for i in range(self.requests):
      own = {}
      for name, view in views.items():
        number = view.part.shape[0] // self.requests
        own[name] = view.rows(i * number, number)
      found.append(own)
    return found

  def unpack(self, request: jax.Array) -> dict[str, Any]:
    """What `views` were written to, in a program.

    Args:
      request: int32 `[size]`.

    Returns:
      By part, `{feature: array}`; of `numbers`, the array.
    """
    found: dict[str, Any] = {}
    offset = 0
    for part in self.parts:
      here = request[offset : offset + part.size].reshape(part.stacked)
      by_name = {name: here[i] for i, name in enumerate(part.ids)}
      for i, name in enumerate(part.dense, len(part.ids)):
        by_name[name] = jax.lax.bitcast_convert_type(here[i], jnp.float32)
      only = part.ids == (part.name,) and part.sizes is None
      found[part.name] = by_name[part.name] if only else by_name
      offset += part.size
    return found
