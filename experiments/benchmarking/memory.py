"""What this process and all that it started take together."""

from __future__ import annotations

import os
import pathlib
import resource
import threading

_PROC = pathlib.Path('/proc')


class PeakMemory:
  """Watches while it is a context: `with PeakMemory() as peak: ...`.

  Attributes:
    bytes: the largest sum, over processes, of proportional set sizes: what
      several share counts once, and files that are mapped and in memory count.
      Of Linux; 0 elsewhere.
  """

  def __init__(self, every: float = 1.0):
    """Looks `every` so many seconds."""
    self.bytes = 0
    self._every, self._stop = every, threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> PeakMemory:
    self._thread.start()
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self._stop.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._stop.wait(self._every):
      self.bytes = max(self.bytes, tree_bytes(os.getpid()))


def tree_bytes(root: int) -> int:
  """Of a process and its descendants."""
  children: dict[int, list[int]] = {}
  for path in _PROC.glob('[0-9]*/stat'):
    try:
      fields = path.read_text().rpartition(')')[2].split()
    except OSError:
      continue  # It has ended.
    children.setdefault(int(fields[1]), []).append(int(path.parent.name))
  total, todo = 0, [root]
  while todo:
    process = todo.pop()
    todo += children.get(process, [])
    total += _proportional(process)
  return total


def cpu_seconds() -> float:
  """Of this process and of those that it started and that have ended."""
  found = 0.0
  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    used = resource.getrusage(who)
    found += used.ru_utime + used.ru_stime
  return found


def _proportional(process: int) -> int:
  try:
    text = (_PROC / str(process) / 'smaps_rollup').read_text()
  except OSError:
    return 0
  for line in text.splitlines():
    if line.startswith('Pss:'):
      return int(line.split()[1]) * 1024
  return 0
