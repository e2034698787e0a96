"""Shapes that few programs serve: buckets, padding, chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from histjax.types import Candidates


def bucket_size(n: int, smallest: int = 16) -> int:
  """The smallest of 16, 32, 64, 96, 128, 192, 256, .. that holds `n`.

  Powers of two and one step between them: at most a third is padding (half
  below 64).
  """
  size = smallest
  while size < n:
    if size >= 64 and size * 3 // 2 >= n:
      return size * 3 // 2
    size *= 2
  return size


def bucket(n: int, buckets: tuple[int, ...], what: str, smallest: int) -> int:
  """The smallest of `buckets` that holds `n`; `bucket_size` if there are none.

  Args:
    n: how many there are.
    buckets: ascending.
    what: they are, for the error.
    smallest: of `bucket_size`.

  Raises:
    ValueError: `n` is beyond the largest.
  """
  if not buckets:
    return bucket_size(n, smallest)
  for size in buckets:
    if size >= n:
      return size
  raise ValueError(
    f'{n} {what} do not fit the largest bucket, {buckets[-1]}; add a larger '
    'one to ScorerConfig, or cut them'
  )


def pad(tree, shape: tuple[int, ...], real=None):
  """Pads the leading axes with zeros, up to `shape`; zeros where not `real`."""

  def pad_one(x):
    xp = jnp if isinstance(x, jax.Array) else np
    if real is not None:
      x = xp.where(real, x, xp.zeros((), x.dtype))
    width = [(0, n - m) for n, m in zip(shape, x.shape, strict=False)]
    return xp.pad(x, width) if any(after for _, after in width) else x

  return jax.tree.map(pad_one, tree)


def in_chunks(
  score: Callable[[Candidates], Any], candidates: Candidates, size: int
) -> Any:
  """Maps `score` over chunks of `size` candidates of each row.

  Args:
    score: returns `[B, size]` arrays.
    candidates: `[B, C]`, C at most or a multiple of `size`.
    size: of a chunk.

  Returns:
    `[B, C]` arrays.
  """
  num_rows, count = candidates.shape
  if count <= size:
    return score(candidates)
  if count % size:
    raise ValueError(
      f'{count} candidates are not a multiple of microbatch={size}; pad them'
    )
  chunks = jax.tree.map(
    lambda x: jnp.asarray(x).reshape(num_rows, -1, size).swapaxes(0, 1),
    candidates,
  )
  logits = jax.lax.map(score, chunks)  # {task: [C / size, B, size]}
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(num_rows, count), logits
  )
