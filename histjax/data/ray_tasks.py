"""Numbered tasks of Ray Data, whose errors come back as they were raised."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from histjax.data import workers

_TRIES = 3
_TOLD = ValueError, OSError, ImportError
"""What is told in a line; Ray raises others with what led to them."""


class _Tries:
  """How often each task was begun; in a process of its own."""

  def __init__(self) -> None:
    self._count: collections.Counter[int] = collections.Counter()

  def begin(self, number: int) -> int:
    self._count[number] += 1
    return self._count[number]


def count_tries() -> Any:
  """What `take` counts with: Ray Data begins lost tasks again for ever."""
  import ray

  return ray.remote(num_cpus=0, max_restarts=-1)(_Tries).remote()


def take(
  task: Callable[[int], None], batch: Mapping[str, np.ndarray], tries: Any
) -> dict[str, list[Any]]:
  """Does tasks in a process of Ray.

  Args:
    task: of a number.
    batch: `{'number': [n]}`.
    tries: of `count_tries`.

  Returns:
    Columns of rows for `finished`.
  """
  import ray

  numbers, errors = batch['number'].tolist(), []
  for number in numbers:
    try:
      if ray.get(tries.begin.remote(number)) > _TRIES:
        raise ChildProcessError(
          f'{_TRIES} workers were lost at part {number}: {workers.LOST}'
        )
      task(number)
      errors.append(b'')
    except _TOLD as error:
      errors.append(pickle.dumps(workers.portable(error)))
  return {'number': numbers, 'error': errors}


def finished(row: Mapping[str, Any]) -> int:
  """The number of a task that is done; raises the error of one that failed."""
  if row['error']:
    raise pickle.loads(row['error'])
  return int(row['number'])
