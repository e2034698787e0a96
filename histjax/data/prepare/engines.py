"""Where the steps of `prepare` are taken: here, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from histjax.data import ray_tasks, workers

Step = Callable[[int], None]
"""Of a file or a shard; can be pickled."""
Run = Callable[[Step, Sequence[int]], Iterator[int]]


@dataclasses.dataclass(frozen=True)
class Local:
  """Processes of this machine.

  Attributes:
    num_workers: how many; 1: this one.
  """

  num_workers: int = 1

  def __post_init__(self):
    if self.num_workers < 1:
      raise ValueError(f'workers={self.num_workers} must be >= 1')

  def check(self) -> None:
    """Nothing can be missing."""

  @contextlib.contextmanager
  def start(self) -> Iterator[Run]:
    """Gives what takes a step for each number, and yields those done."""
    with workers.Pool(self.num_workers) as pool:
      yield lambda step, numbers: (n for n, _ in pool.each(step, numbers))


@dataclasses.dataclass(frozen=True)
class Ray:
  """A Ray cluster, through Ray Data: files and shards are its rows.

  All nodes must see the log and the output by the same paths.

  Attributes:
    num_workers: tasks at once, at most.
    num_cpus: of each.
  """

  num_workers: int = 1
  num_cpus: float = 1

  def __post_init__(self):
    if self.num_workers < 1:
      raise ValueError(f'workers={self.num_workers} must be >= 1')

  def check(self) -> None:
    """Raises ImportError if Ray is not installed."""
    try:
      import ray.data  # noqa: F401
    except ImportError as error:
      raise ImportError(
        f"engine 'ray' needs Ray, which cannot be imported ({error}); install "
        "the extra: pip install 'histjax[ray]'"
      ) from error

  @contextlib.contextmanager
  def start(self) -> Iterator[Run]:
    """Gives what takes a step for each number, and yields those done."""
    yield self._run

  def _run(self, step: Step, numbers: Sequence[int]) -> Iterator[int]:
    import ray

    if not len(numbers):
      return
    found = (
      ray.data.from_items(
        [{'number': int(number)} for number in numbers],
        override_num_blocks=len(numbers),
      )
      .map_batches(
        functools.partial(_take, step, ray_tasks.count_tries()),  # type: ignore[arg-type]
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=self.num_workers),
        num_cpus=self.num_cpus,
      )
      .iter_rows()
    )
    for row in found:
      yield ray_tasks.finished(row)


def _take(step: Step, tries: Any, batch: dict[str, np.ndarray]):
  return ray_tasks.take(step, batch, tries)
