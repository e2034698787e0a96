"""Which programs requests up to some sizes need, to compile them ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from absl import logging

from histjax import buckets
from histjax.scoring.programs import Sizes


class WarmUp(NamedTuple):
  """What `Scorer.warm_up` did.

  Attributes:
    num_programs: that are ready.
    num_compilations: of them, those that were not ready before.
    seconds: it took.
  """

  num_programs: int
  num_compilations: int
  seconds: float


class Job(NamedTuple):
  """A program, and the cache's capacity that it is given (0: it has none)."""

  kind: Literal['encode', 'score', 'extend']
  sizes: Sizes
  capacity: int


def jobs(
  rows: Sequence[int],
  lengths: Sequence[int],
  columns: Sequence[int],
  num_new: int,
  visible: bool,
  requests: int = 1,
) -> Iterator[Job]:
  """The programs, those that make a cache before those that take it.

  Args:
    rows: buckets of rows.
    lengths: buckets of histories, ascending.
    columns: buckets of candidates.
    num_new: the most events that `extend` is given at once; 0: none. No more
      than a history may have.
    visible: whether candidates may say what they see.
    requests: the most that `score_many` is given of one bucket.
  """
  together = up_to(requests, buckets.of_requests)
  news = up_to(num_new, buckets.of_new_events)
  fewest = [1, *(size + 1 for size in news)]
  for number in rows:
    for i, length in enumerate(lengths):
      yield Job('encode', Sizes(number, length), 0)
      for count in columns:
        for seen in (False, True)[: 1 + visible]:
          for many in together:
            sizes = Sizes(number, length, count, seen, requests=many)
            yield Job('score', sizes, length)
      for new, least in zip(news, fewest, strict=False):
        if least <= length:
          for donate in (True, False):
            sizes = Sizes(number, new, capacity=length, donate=donate)
            yield Job('extend', sizes, length)
        # A cache of this capacity becomes one of a larger bucket if that needs
        # no more new events than these, and holds them.
        for before, longer in zip(lengths[i:], lengths[i + 1 :], strict=False):
          if before + 1 - length <= min(new, num_new) and least <= longer:
            yield Job('extend', Sizes(number, new, capacity=longer), length)


def run(todo: Sequence[Job], compile_one: Callable[[Job], None]) -> float:
  """Does all jobs and tells how far it is; returns the seconds it took."""
  start = said = time.perf_counter()
  logging.info('%d programs to compile', len(todo))
  for i, job in enumerate(todo, 1):
    compile_one(job)
    now = time.perf_counter()
    if now > said + 10 or i == len(todo):
      said = now
      left = (now - start) / i * (len(todo) - i)
      logging.info(
        '%d of %d programs, %.0f s, %.0f s left',
        i,
        len(todo),
        now - start,
        left,
      )
  return time.perf_counter() - start


def up_to(number: int, fit: Callable[[int], int]) -> list[int]:
  """All that `fit`, which pads, makes of 1 to `number`."""
  if number:
    fit(number)  # Its error names this number, and not a smaller one.
  found, n = [], 1
  while n <= number:
    found.append(fit(n))
    n = found[-1] + 1
  return found
