"""Shapes that rows of two sizes are padded to, with little padding."""

from __future__ import annotations

import numpy as np

from histjax import buckets

_LEVELS = 48  # Sizes of an axis that shapes are made of; more are thinned out.
_LEAST = 0.01  # Of the cost, what a shape must save: it is one to compile.


def shapes(
  length: np.ndarray, count: np.ndarray, limit: int
) -> list[tuple[int, int]]:
  """Up to `limit` shapes `(L, C)`, the largest of which holds every row.

  A row costs `L + C` of the cheapest shape that it fits. Shapes are taken one
  by one, each the one that saves most, which together save at least `1 - 1 / e`
  of what the best could (Nemhauser, Wolsey and Fisher 1978, An analysis of
  approximations for maximizing submodular set functions), and then exchanged
  one by one while that saves more. One that saves less than 1 % is not taken.

  Args:
    length: `[rows]`, events of each row, at least one row.
    count: `[rows]`, candidates.
    limit: how many shapes there may be.
  """
  wide, tall = _levels(length), _levels(count)
  kind = np.searchsorted(wide, length) * len(tall)
  kind, number = np.unique(
    kind + np.searchsorted(tall, count), return_counts=True
  )
  wide, tall = np.repeat(wide, len(tall)), np.tile(tall, len(wide))
  fits = (wide[kind] <= wide[:, None]) & (tall[kind] <= tall[:, None])
  # [shapes, kinds]
  cost = np.where(fits, (wide + tall)[:, None], np.iinfo(np.int64).max)

  def best(paid):
    """The shape that saves most, and what is paid with it."""
    saved = np.where(cost < paid, paid - cost, 0) @ number
    found = int(saved.argmax())
    return found, int(paid @ number - saved[found])

  chosen = [len(cost) - 1]
  total = int(cost[-1] @ number)
  while len(chosen) < limit:
    found, now = best(cost[chosen].min(axis=0))
    if total - now <= _LEAST * total:
      break
    chosen, total = [*chosen, found], now
  i = 0
  while 0 < i + 1 < len(chosen):  # Ends when no exchange saves anything.
    i += 1
    rest = chosen[:i] + chosen[i + 1 :]
    found, now = best(cost[rest].min(axis=0))
    if now < total:
      chosen, total, i = [*rest, found], now, 0
  used = [chosen[i] for i in np.unique(cost[chosen].argmin(axis=0))]
  return sorted((int(wide[i]), int(tall[i])) for i in used)


def smallest(
  length: np.ndarray, count: np.ndarray, into: list[tuple[int, int]]
) -> np.ndarray:
  """`[rows]`, the number of the cheapest shape that each row fits."""
  order = sorted(range(len(into)), key=lambda i: sum(into[i]))
  found = np.full(len(length), -1)
  for i in order:
    wide, tall = into[i]
    found[(found < 0) & (length <= wide) & (count <= tall)] = i
  return found


def _levels(sizes: np.ndarray) -> np.ndarray:
  """int64, ascending sizes that shapes may have; the last holds all."""
  found = np.unique([buckets.round_up(int(x)) for x in np.unique(sizes)])
  if len(found) > _LEVELS:  # Between two as many rows, or as many slots.
    ascending = np.sort(sizes)
    share = np.linspace(0, 1, _LEVELS // 2)
    place = [
      np.searchsorted(x, share * x[-1])
      for x in (np.arange(len(sizes)), np.cumsum(ascending, dtype=np.int64))
    ]
    some = ascending[np.unique(place)]
    found = np.unique([buckets.round_up(int(x)) for x in some])
  return found.astype(np.int64)
