"""Sequence packing: which short rows share a row of a batch.

Rows have two sizes, events and candidates, so this is vector bin packing. A
row of a batch is filled with the row whose sizes agree best with the room that
is left, their inner product with it being the largest (Panigrahy et al. 2011,
Heuristics for vector bin packing, "dot product"), the largest rows first. Rows
of equal sizes are told apart only when the bins are filled, so that the time
grows with the number of distinct sizes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from histjax import buckets as bucket_sizes

LEAST = 512
"""Events and candidates of a row of a batch, if nothing asks for more: many of
the rows of most logs, so that there is a choice of what fills it."""
_KINDS = 4096  # Distinct sizes that are told apart; more are rounded up.
_SAMPLE = 50_000  # Rows that shapes are tried on.
_SCALES = (1.0, 1.25, 1.5, 2.0)  # Of shapes that are tried.


@dataclasses.dataclass(frozen=True, eq=False)
class Bins:
  """Rows that share rows of a batch, of one shape.

  Attributes:
    num_events: L of the shape.
    num_candidates: C of the shape.
    rows: int64 `[n]`, the rows, bin by bin.
    offsets: int64 `[bins + 1]`; bin i has `rows[offsets[i]:offsets[i + 1]]`.
  """

  num_events: int
  num_candidates: int
  rows: np.ndarray
  offsets: np.ndarray


def shapes(
  length: np.ndarray, count: np.ndarray, *, most: int, limit: int
) -> list[tuple[int, int]]:
  """Shapes `(L, C)` to pack rows into, ascending; the last holds every row.

  L and C are in proportion to all events and candidates, so that both fill up,
  as far as that makes neither four times the largest row's, and of the size
  that leaves the least padding. Rows beyond `most` get shapes of their own,
  each half the next.

  Args:
    length: `[rows]`, events of each row, at least one row.
    count: `[rows]`, candidates.
    most: L + C of the smallest shape, if that holds most rows.
    limit: how many shapes there may be.
  """
  tried = [_shapes(length, count, most, limit, scale) for scale in _SCALES]
  rng = np.random.default_rng(0)
  if len(length) > _SAMPLE:
    sample = rng.choice(len(length), _SAMPLE, replace=False)
    length, count = length[sample], count[sample]

  def slots(into):
    return sum(
      (len(x.offsets) - 1) * (x.num_events + x.num_candidates)
      for x in pack(length, count, into, rng)
    )

  return min(tried, key=slots)


def pack(
  length: np.ndarray,
  count: np.ndarray,
  into: list[tuple[int, int]],
  rng: np.random.Generator,
) -> list[Bins]:
  """Packs rows, the largest first; small ones fill up what those leave.

  Args:
    length: `[rows]`, events of each row.
    count: `[rows]`, candidates.
    into: shapes `(L, C)`, ascending; the last holds every row.
    rng: which of the rows of equal sizes goes where.

  Returns:
    The bins of each shape that is needed, every row in exactly one.
  """
  sizes, kind = _kinds(length, count, into[-1])
  order = rng.permutation(len(length))
  order = order[np.argsort(kind[order], kind='stable')]
  left = np.bincount(kind, minlength=len(sizes))
  begin = np.cumsum(left) - left
  need = _smallest(sizes[:, 0], sizes[:, 1], into)
  found = []
  for number in range(len(into) - 1, -1, -1):
    rows: list[np.ndarray] = []
    pieces: list[np.ndarray] = []
    for times, pattern in _patterns(sizes, left, into[number], need == number):
      parts = []
      for k, n in pattern:
        part = order[begin[k] : begin[k] + times * n]
        parts.append(part.reshape(times, n))
        begin[k] += times * n
      bins = np.concatenate(parts, axis=1)
      rows.append(bins.reshape(-1))
      pieces.append(np.full(times, bins.shape[1]))
    if rows:
      offsets = np.append(0, np.cumsum(np.concatenate(pieces)))
      found.append(Bins(*into[number], np.concatenate(rows), offsets))
  return found[::-1]


def _shapes(length, count, most: int, limit: int, larger: float):
  """`shapes` that are `larger` times as large as they have to be."""
  events, candidates = max(1, int(length.max())), int(count.max())
  scale = larger * max(1.0, LEAST / (events + candidates))
  wide, tall = scale * events, scale * candidates
  ratio = max(1, int(length.sum())) / int(count.sum())
  if wide < ratio * tall:
    wide = min(ratio * tall, 4 * wide)
  else:
    tall = min(wide / ratio, 4 * tall)
  found = [_whole(wide, tall)]
  while len(found) < limit and sum(found[0]) > max(most, 2 * LEAST):
    wide, tall = wide / 2, tall / 2
    found.insert(0, _whole(wide, tall))
  place = _smallest(length, count, found)
  share = np.bincount(place, weights=length + count, minlength=len(found))
  # Each shape is a program to compile; a few rows may as well have more room.
  least = 0.02 * share.sum()
  kept = [s for s, part in zip(found, share, strict=True) if part >= least]
  return sorted({*kept, found[int(place.max())]})


def _kinds(length, count, largest) -> tuple[np.ndarray, np.ndarray]:
  """Distinct sizes `[K, 2]`, and which of them each row has."""
  exact = np.stack([length, count], axis=1).astype(np.int64)
  bits = np.frexp(exact)[1]  # Of each size.
  for precision in range(8, -1, -1):
    step = 2 ** np.maximum(bits - precision, 0)
    # The largest shape does hold them.
    sizes = np.minimum(-(-exact // step) * step, largest)
    sizes, kind = np.unique(sizes, axis=0, return_inverse=True)
    if len(sizes) <= _KINDS:
      break
  return sizes, kind.reshape(-1)


def _patterns(sizes, left, room, must):
  """Fillings of a bin, `(times, [(size, rows)])`, until no `must` size is left.

  Args:
    sizes: int64 `[K, 2]`.
    left: int64 `[K]`, rows of each size, from which what is used is taken.
    room: `(L, C)`.
    must: bool `[K]`, the sizes that have to be packed.
  """
  whole = np.array(room, np.int64)
  share = np.divide(sizes, whole)
  largest = np.where(must, share.max(axis=1), -1.0)
  while True:
    k = int(np.argmax(np.where(left > 0, largest, -1.0)))
    if not (must[k] and left[k]):
      return
    free, pattern = whole.copy(), []
    while True:
      fits = np.where(sizes[k] > 0, free // np.maximum(sizes[k], 1), left[k])
      n = int(min(left[k], fits.min()))
      pattern.append((k, n))
      left[k] -= n
      free -= n * sizes[k]
      able = (left > 0) & (sizes <= free).all(axis=1)
      if not able.any():
        break
      k = int(np.argmax(np.where(able, share @ np.divide(free, whole), -1.0)))
    more = min(left[k] // n for k, n in pattern)
    for k, n in pattern:
      left[k] -= more * n
    yield 1 + int(more), pattern


def _smallest(length, count, into) -> np.ndarray:
  """The first shape that holds each row; the last if none does."""
  place = np.full(len(length), len(into) - 1)
  for number in range(len(into) - 2, -1, -1):
    wide, tall = into[number]
    place[(length <= wide) & (count <= tall)] = number
  return place


def _whole(wide: float, tall: float) -> tuple[int, int]:
  def size(x):
    return bucket_sizes.round_up(max(1, int(np.ceil(x))))

  return size(wide), size(tall)
