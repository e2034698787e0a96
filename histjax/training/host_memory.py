"""Memory of the host that a process keeps from one training step to the next.

XLA on CPUs allocates what a step needs besides its arguments, often 100 MB and
more, anew for every step. glibc gives pieces of more than 32 MB back to the
system at once, and the next step waits until each of their pages is there,
zeroed, once more: a third of a step's time, see ops/NOTES.md.
"""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MOST = 2**31 - 1


def keep_freed() -> bool:
  """Makes glibc keep memory that is freed, up to 2 GiB of it at once.

  For a whole process, which then holds the most that it ever needed. To be
  called first, before imports that start threads, as PyArrow's does, and before
  JAX makes its devices: a thread that has a heap of its own, of at most 64 MB,
  may share it with XLA's, whose memory then comes from the system.

  Returns:
    Whether the process uses glibc; if not, nothing is done.
  """
  if platform.libc_ver()[0] != 'glibc':
    return False
  libc = ctypes.CDLL(None)
  options = (
    (_ARENA_MAX, 1),  # For large pieces threads' own heaps ask the system.
    (_MMAP_THRESHOLD, _MOST),
    (_TRIM_THRESHOLD, _MOST),
  )
  return all([libc.mallopt(*option) for option in options])
