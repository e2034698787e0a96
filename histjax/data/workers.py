"""Independent tasks in several processes of this machine."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import process
from multiprocessing import connection
from typing import TypeVar

T = TypeVar('T')
R = TypeVar('R')


class Pool:
  """Processes that take tasks; use as a context manager."""

  def __init__(self, num_workers: int):
    """Starts none yet.

    Args:
      num_workers: processes; 1: this one, task after task.
    """
    self._pool: futures.ProcessPoolExecutor | None = None
    if num_workers > 1:
      # Not forked: a process of JAX has threads.
      self._pool = futures.ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context('spawn'),
        initializer=_begin,
      )

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *unused_exception: object) -> None:
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)

  def each(
    self, function: Callable[[T], R], tasks: Iterable[T]
  ) -> Iterator[tuple[T, R]]:
    """`(task, function(task))` of each task, as they are done.

    Args:
      function: can be pickled, if there are several processes.
      tasks: likewise; begun in this order.

    Raises:
      ChildProcessError: a process is lost, as one that is killed.
      Exception: that of the first task that fails, see `portable`.
    """
    if self._pool is None:
      for task in tasks:
        yield task, function(task)
      return
    taken = functools.partial(_take, function)
    try:
      before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
      try:  # Processes that begin now inherit that.
        running = {self._pool.submit(taken, task): task for task in tasks}
      finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
      for done in futures.as_completed(running):
        yield running[done], done.result()
    except process.BrokenProcessPool as error:
      raise ChildProcessError(LOST) from error


_INTERRUPTS = {signal.SIGINT}
LOST = (
  'a worker ended; if nothing above says why, it was killed, as when memory is '
  'short: give it more, or take fewer workers, and run the same again to go on'
)


def is_importable(module: str) -> bool:
  """Whether another process can import it by its name; not a file's code."""
  top = module.partition('.')[0]
  return top == '__main__' or any(
    finder.find_spec(top, None) for finder in sys.meta_path
  )


def _take(function: Callable[[T], R], task: T) -> R:
  try:
    return function(task)
  except BaseException as error:
    sent = portable(error)
    if sent is error:
      raise
    raise sent from error


def portable(error: BaseException) -> BaseException:
  """An error, or one like it if pickle cannot bring it to another process."""
  try:
    if type(pickle.loads(pickle.dumps(error))) is type(error):
      return error
  except Exception:  # Of a class of others' code.
    pass
  kinds = ValueError, OSError, ImportError, RuntimeError
  kind = next((k for k in kinds if isinstance(error, k)), None)
  return RuntimeError(repr(error)) if kind is None else kind(str(error))


def _begin() -> None:
  """Ends this process with the one that started it, and by Ctrl-C silently."""
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # As of nohup.
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # The other one tells of it.
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
  parent = multiprocessing.parent_process()
  assert parent is not None
  # It would wait for a next task for ever.
  threading.Thread(
    target=lambda: (connection.wait([parent.sentinel]), os._exit(1)),
    daemon=True,
  ).start()
