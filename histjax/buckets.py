"""Sizes that arrays are padded to, so that few programs serve all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def check(field: str, sizes: Sequence[int]) -> None:
  """Raises ValueError unless 1 <= s_1 < s_2 < .."""
  if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
    raise ValueError(f'{field}={sizes} must be positive and strictly ascending')


def bucket_size(n: int, smallest: int = 16) -> int:
  """The smallest of 16, 32, 64, 96, 128, 192, 256, .. that holds `n`.

  For sizes that are not known before: powers of two and one step between them,
  so that at most a third is padding (half below 64).
  """
  size = smallest
  while size < n:
    if size >= 64 and size * 3 // 2 >= n:
      return size * 3 // 2
    size *= 2
  return size


def fit(n: int, sizes: tuple[int, ...], what: str, smallest: int) -> int:
  """The smallest of `sizes` that holds `n`; `bucket_size` if there are none.

  Args:
    n: how many there are.
    sizes: ascending.
    what: they are, for the error.
    smallest: of `bucket_size`.

  Raises:
    ValueError: `n` is beyond the largest.
  """
  if not sizes:
    return bucket_size(n, smallest)
  for size in sizes:
    if size >= n:
      return size
  raise ValueError(
    f'{n} {what} do not fit the largest bucket, {sizes[-1]}; add a larger '
    'one to ScorerConfig, or cut them'
  )


def of_requests(n: int) -> int:
  """What requests that are scored at once are padded to in number."""
  return bucket_size(n, 1)


def of_data(sizes: np.ndarray, limit: int) -> tuple[int, ...]:
  """Up to `limit` buckets for sizes that are all known, the last the longest's.

  Each is half the next. One that would hold less than 2 % of the data is left
  out: each is a program to compile and a last batch to pad.
  """
  found = [round_up(int(sizes.max()))]
  while len(found) < limit and found[-1] > 16:
    found.append(round_up(found[-1] // 2))
  found = found[::-1]
  place = np.searchsorted(found, sizes)
  share = np.bincount(place, minlength=len(found)) / len(sizes)
  kept = [s for s, part in zip(found, share, strict=True) if part >= 0.02]
  return tuple(sorted({*kept, found[-1]}))


def round_up(size: int) -> int:
  """To a multiple of 8, which vector units like, unless it is tiny."""
  return 1 if size <= 1 else -(-size // 8) * 8
