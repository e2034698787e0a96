"""Independent tasks in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from multiprocessing import connection
from typing import TypeVar

T = TypeVar('T')
R = TypeVar('R')


def each(
  function: Callable[[T], R], tasks: Iterable[T], num_workers: int
) -> Iterator[tuple[T, R]]:
  """`(task, function(task))` of each task, as they are done.

  Args:
    function: can be pickled, if there are several workers.
    tasks: likewise.
    num_workers: processes; 1: this one, task after task.

  Raises:
    Exception: that of the first task that fails; others that run are done
      before it is raised.
  """
  tasks = list(tasks)
  if num_workers == 1 or len(tasks) < 2:
    for task in tasks:
      yield task, function(task)
    return
  # Not forked: a process of JAX has threads.
  with futures.ProcessPoolExecutor(
    min(num_workers, len(tasks)),
    mp_context=multiprocessing.get_context('spawn'),
    initializer=_end_with_parent,
  ) as pool:
    running = {pool.submit(function, task): task for task in tasks}
    try:
      for done in futures.as_completed(running):
        yield running[done], done.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _end_with_parent() -> None:
  """Ends this process when the one that started it is killed."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  # It would wait for a next task for ever.
  threading.Thread(
    target=lambda: (connection.wait([parent.sentinel]), os._exit(1)),
    daemon=True,
  ).start()
