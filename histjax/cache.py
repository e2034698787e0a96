"""What scoring keeps of users: the keys and values of their histories.

Users' states are values: `take` picks some, `stack` joins those of several
caches, and both are padded to buckets, so that they compile little.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from histjax import buckets, quantization
from histjax.quantization import Kind, Quantized
from histjax.types import Array


@dataclasses.dataclass(frozen=True)
class CacheInfo:
  """What the host knows of a cache, so that no call waits for the device.

  Attributes:
    length: int32 `[users]`, the events of each user; further rows are padding.
    fingerprint: of the model that made it, `Scorer.fingerprint`.
    row_buckets: `ScorerConfig.row_buckets`, that rows are padded to.
  """

  length: np.ndarray
  fingerprint: str
  row_buckets: tuple[int, ...] = ()

  @property
  def num_users(self) -> int:
    """The number of real rows."""
    return len(self.length)


@dataclasses.dataclass(frozen=True)
class HistoryCache:
  """Everything that scoring a candidate needs of a user's history.

  Nothing of the request is in it. A pytree of its arrays. `info` is no part of
  that: what comes out of `jax.jit` or `jax.tree.map` has none, and no program
  is compiled once more for it.

  Attributes:
    keys: `[layers, B, L, N, H]`, per layer, rotated to absolute positions; an
      array, or `quantization.Quantized`.
    values: `[layers, B, L, N, H]`, of the type of the keys.
    length: int32 `[B]`, the number of events encoded, in host memory if a
      `Scorer` made it. `L` is the capacity.
    info: of a cache that a `Scorer` made, for its checks; None: not known.
  """

  keys: Shaped[Array, 'layers B L N H'] | Quantized
  values: Shaped[Array, 'layers B L N H'] | Quantized
  length: Int[Array, 'B']
  info: CacheInfo | None = None

  @classmethod
  def of_users(
    cls, keys: Array | Quantized, values: Array | Quantized, info: CacheInfo
  ) -> HistoryCache:
    """The cache whose `length` is that of `info`, 0 for padding."""
    length = np.zeros(keys.shape[1], np.int32)
    length[: info.num_users] = info.length
    length.setflags(write=False)
    return cls(keys, values, length, info)

  @property
  def capacity(self) -> int:
    """The number of events that fit, `L`."""
    return self.keys.shape[2]

  @property
  def num_rows(self) -> int:
    """The number of rows `B`, padding included."""
    return self.keys.shape[1]

  @property
  def nbytes(self) -> int:
    """Bytes of device memory."""
    return self.keys.nbytes + self.values.nbytes

  def replace(self, **fields: Any) -> HistoryCache:
    """A copy with other values in some fields."""
    return dataclasses.replace(self, **fields)

  def take(self, rows: Iterable[int]) -> HistoryCache:
    """The states of some users, in this order; one may come twice.

    Args:
      rows: each in `[0, users)`; at least one.

    Raises:
      ValueError: a row is no user's, or no `Scorer` made the cache.
    """
    return stack([self], [rows])


def stack(
  caches: Sequence[HistoryCache], rows: Sequence[Iterable[int]] | None = None
) -> HistoryCache:
  """The states of all users of several caches, one after another.

  One program for each number of caches and their shapes; of caches that are
  all of one shape, one for each power of two.

  Args:
    caches: at least one, all of one model.
    rows: of each cache, the users to take; None: all.

  Returns:
    A cache with the largest capacity of them, its rows padded to a bucket.

  Raises:
    ValueError: no caches, one that no `Scorer` made or that is of another
      model or type than the first or on other devices, or a row that is no
      user's.
  """
  if not caches:
    raise ValueError('stack was given no caches; give at least one')
  infos = [info_of(x) for x in caches]
  first = infos[0]
  for i, info in enumerate(infos):
    if info.fingerprint != first.fingerprint:
      raise ValueError(
        f'caches[{i}] was made by the model {info.fingerprint[:12]}, caches[0] '
        f'by {first.fingerprint[:12]}; stack those of one model'
      )
    if (kind := _dtype(caches[i])) != _dtype(caches[0]):
      raise ValueError(
        f'caches[{i}] holds {kind}, caches[0] {_dtype(caches[0])}; quantize '
        'all or none'
      )
    check_devices(caches[i], devices(caches[0]), f'caches[{i}] is', 'caches[0]')
  if rows is None:
    rows = [range(x.num_users) for x in infos]
  chosen = [_numbers(i, part) for i, part in enumerate(rows)]
  if len(chosen) != len(caches):
    raise ValueError(
      f'{len(chosen)} rows for {len(caches)} caches; give as many'
    )
  offset, index = 0, []
  for i, (cache, info, part) in enumerate(
    zip(caches, infos, chosen, strict=True)
  ):
    for row in part:
      if not 0 <= row < info.num_users:
        raise ValueError(
          f'row {row} of caches[{i}] is no user: it has {info.num_users}'
        )
      index.append(offset + row)
    offset += cache.num_rows
  if not index:
    raise ValueError('rows name no user; name at least one')
  size = buckets.fit(len(index), first.row_buckets, 'rows', 1)
  padded = np.zeros(size, np.int32)  # Padding is a copy that nobody sees.
  padded[: len(index)] = index
  arrays = [(x.keys, x.values) for x in caches]
  if len({x.keys.shape for x in caches}) == 1:
    arrays += [arrays[0]] * (buckets.bucket_size(len(arrays), 1) - len(arrays))
  keys, values = _stack(*zip(*arrays, strict=True), padded)
  length = np.concatenate(
    [x.length[part] for x, part in zip(infos, chosen, strict=True)]
  )
  length.setflags(write=False)
  return HistoryCache.of_users(
    keys, values, dataclasses.replace(first, length=length)
  )


def _numbers(i: int, rows: Any) -> list[int]:
  """Rows of a cache as integers; no mask, of which True would be row 1."""
  try:
    found = list(rows)
    if any(isinstance(row, (bool, np.bool_)) for row in found):
      raise TypeError
    return [operator.index(row) for row in found]
  except TypeError as e:
    raise ValueError(
      f'rows of caches[{i}]: {rows!r} are not integers; give the numbers of '
      'users, as [0, 2]'
    ) from e


def info_of(cache: Any) -> CacheInfo:
  """What the host knows of a cache; ValueError if that is nothing."""
  if not isinstance(cache, HistoryCache) or cache.info is None:
    raise ValueError(
      f'cache is a {type(cache).__name__} that no Scorer made, or what a '
      'transformation of JAX made of one; take it as encode or extend returned '
      'it'
    )
  keys = _codes(cache)
  if isinstance(keys, jax.Array) and keys.is_deleted():
    raise ValueError(
      'cache was given to extend, which wrote the new events into its memory; '
      'use the cache that extend returned, or extend with donate=False'
    )
  shape, users = keys.shape, cache.info.length.tolist()
  length = np.asarray(cache.length).tolist()
  if (
    cache.values.shape != shape
    or length[: len(users)] != users
    or not (len(users) <= shape[1] == len(length))
    or max(users, default=0) > shape[2]
  ):
    raise ValueError(
      f'cache has keys {shape}, values {cache.values.shape} and length {length}'
      f', and was made of histories of {users} events; these must be '
      '[layers, B, L, N, H] of all users and events: pick users by take'
    )
  return cache.info


def devices(cache: HistoryCache) -> Set[jax.Device] | None:
  """Those it is bound to; None: to none."""
  keys = _codes(cache)
  if not isinstance(keys, jax.Array) or not keys.committed:
    return None
  return keys.sharding.device_set


def check_devices(
  cache: HistoryCache, wanted: Set[jax.Device] | None, what: str, other: str
) -> None:
  """Raises ValueError if it is bound to other devices than these."""
  found = devices(cache)
  if found is None or wanted is None or found == wanted:
    return
  here, there = (', '.join(sorted(map(str, x))) for x in (found, wanted))
  raise ValueError(
    f'{what} on {here}, {other} on {there}; encode there, or replace keys and '
    'values by copies that jax.device_put makes there'
  )


def quantize(cache: HistoryCache, kind: Kind) -> HistoryCache:
  """The cache with keys and values in 8 bits; see `quantization`.

  Args:
    cache: that a `Scorer` made, not quantized yet.
    kind: 'int8' or 'float8_e4m3fn'.

  Raises:
    ValueError: no such kind, or another cache.
  """
  info_of(cache)
  if isinstance(cache.keys, Quantized):
    raise ValueError(f'cache is quantized already, to {_dtype(cache)}')
  quantization.check(kind)
  keys, values = _quantize(cache.keys, cache.values, cache.length, kind)
  return cache.replace(keys=keys, values=values)


def _codes(cache: HistoryCache) -> Array:
  """The keys, or what stands for them in 8 bits."""
  return cache.keys.codes if isinstance(cache.keys, Quantized) else cache.keys


def _dtype(cache: HistoryCache) -> str:
  return _codes(cache).dtype.name


@functools.partial(jax.jit, static_argnames='kind')
def _quantize(keys, values, length, kind):
  return (
    quantization.quantize(keys, length, kind),
    quantization.quantize(values, length, kind),
  )


@jax.jit
def _stack(keys, values, index):
  def join(*parts):
    """Of events or their blocks, which are the third axis."""
    longest = max(x.shape[2] for x in parts)
    padded = [
      jnp.pad(
        x, [(0, longest - n if i == 2 else 0) for i, n in enumerate(x.shape)]
      )
      for x in parts
    ]
    return jnp.concatenate(padded, axis=1)[:, index]

  return jax.tree.map(join, *keys), jax.tree.map(join, *values)


jax.tree_util.register_dataclass(
  HistoryCache,
  data_fields=['keys', 'values', 'length'],
  meta_fields=[],
  drop_fields=['info'],
)
