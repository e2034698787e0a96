"""Which programs requests up to some sizes need, to compile them ahead."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from histjax import buckets
from histjax.scoring.programs import Kind, Sizes

CALLS: tuple[Kind, ...] = (
  'encode',
  'score',
  'extend',
  'encode_and_score',
  'extend_and_score',
)
"""What can be compiled ahead; `score_many` is 'score'."""


class WarmUp(NamedTuple):
  """What `Scorer.warm_up` did.

  Attributes:
    num_programs: that are ready.
    num_compilations: of them, those that were not ready before.
    seconds: it took.
    num_recorded: of them, those that are replayed as CUDA graphs.
  """

  num_programs: int
  num_compilations: int
  seconds: float
  num_recorded: int = 0


class Job(NamedTuple):
  """A program, and the cache's capacity that it is given (0: it has none)."""

  kind: Kind
  sizes: Sizes
  capacity: int


def jobs(
  calls: Collection[Kind],
  rows: Sequence[int],
  lengths: Sequence[int],
  columns: Sequence[int],
  num_new: int,
  fit_new: Callable[[int], int],
  visible: bool,
  requests: int = 1,
) -> Iterator[Job]:
  """The programs, those that make a cache before those that take it.

  Args:
    calls: of `CALLS`. Whatever takes a cache needs 'encode' as well, to be
      called with one.
    rows: buckets of rows.
    lengths: buckets of histories, ascending.
    columns: buckets of candidates.
    num_new: the most events that `extend` is given at once; 0: none. No more
      than a history may have.
    fit_new: what so many are padded to.
    visible: whether candidates may say what they see.
    requests: the most that `score_many` is given of one bucket.
  """
  together = up_to(requests, buckets.of_requests)
  scored = [(n, seen) for n in columns for seen in (False, True)[: 1 + visible]]
  for number in rows:
    for i, length in enumerate(lengths):
      encode = Sizes(number, length)
      extend = list(_extensions(number, lengths[i:], num_new, fit_new))
      yield Job('encode', encode, 0)
      if 'extend' in calls:
        yield from (Job('extend', sizes, length) for sizes in extend)
      for count, seen in scored:
        request: dict[str, Any] = {'candidates': count, 'visible': seen}
        if 'score' in calls:
          for many in together:
            sizes = encode._replace(**request, requests=many)
            yield Job('score', sizes, length)
        if 'encode_and_score' in calls:
          yield Job('encode_and_score', encode._replace(**request), 0)
        if 'extend_and_score' in calls:
          for sizes in extend:
            yield Job('extend_and_score', sizes._replace(**request), length)


def _extensions(
  number: int,
  lengths: Sequence[int],
  num_new: int,
  fit_new: Callable[[int], int],
) -> Iterator[Sizes]:
  """Of `extend`, given caches whose capacity is the first length."""
  news = up_to(num_new, fit_new)
  fewest = [1, *(size + 1 for size in news)]
  capacity = lengths[0]
  for new, least in zip(news, fewest, strict=False):
    if least <= capacity:
      for donate in (True, False):
        yield Sizes(number, new, capacity=capacity, donate=donate)
    # A cache of this capacity becomes one of a larger bucket if that needs no
    # more new events than these, and holds them.
    for before, longer in itertools.pairwise(lengths):
      if before + 1 - capacity <= min(new, num_new) and least <= longer:
        yield Sizes(number, new, capacity=longer)


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


def keep_in(folder: str | os.PathLike[str]) -> None:
  """JAX's persistent compilation cache, from now on and for the process."""
  jax.config.update('jax_compilation_cache_dir', os.fspath(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  compilation_cache.reset_cache()  # Or JAX keeps to the folder it opened.


def up_to(number: int, fit: Callable[[int], int]) -> list[int]:
  """All that `fit`, which pads, makes of 1 to `number`."""
  if number:
    fit(number)  # Its error names this number, and not a smaller one.
  found, n = [], 1
  while n <= number:
    found.append(fit(n))
    n = found[-1] + 1
  return found
