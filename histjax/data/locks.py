"""A folder that one process works in at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil

NAME = '_lock'
"""Readers of folders pass over what begins with '_'."""


class FolderLock:
  """Exclusive use of a folder, until it is released or the process ends.

  Use as a context manager. What is in the folder is another's until then.

  Attributes:
    folder: it; made if it is absent, and removed again if nothing is in it.
  """

  def __init__(self, folder: pathlib.Path, field: str = 'output'):
    """Takes it, without waiting.

    Args:
      folder: to work in; the one that it is in must be there.
      field: what to call it in errors.

    Raises:
      ValueError: another process is at work there.
      OSError: it cannot be made or written to, or its disk knows no locks.
    """
    self.folder = folder
    self._path = folder / NAME
    self._was_empty = folder.is_dir() and not any(folder.iterdir())
    try:
      self._file = _locked(self._path)
    except BlockingIOError as error:
      raise ValueError(
        f'{field}={str(folder)!r}: another process is at work there; let it '
        'end, or name another folder'
      ) from error
    except OSError as error:
      raise type(error)(
        error.errno,
        f'{field}={str(folder)!r} cannot be locked ({error.strerror}); name a '
        'folder that you may write to, on a disk that knows locks',
      ) from error

  def __enter__(self) -> FolderLock:
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self.release()

  def names(self) -> set[str]:
    """Of the files and folders that are there, but for the lock's own."""
    return {path.name for path in self.folder.iterdir()} - {NAME}

  def clear(self) -> None:
    """Deletes all that is there, but for the lock's own."""
    for name in self.names():
      path = self.folder / name
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink()

  def release(self) -> None:
    """Lets others in; no error if it has been done."""
    if self._file < 0:
      return
    # Before it is unlocked: who waits for this file sees that it is gone.
    with contextlib.suppress(OSError):
      self._path.unlink()
      if not self._was_empty:
        self.folder.rmdir()  # Only if it is empty.
    os.close(self._file)
    self._file = -1


def _locked(path: pathlib.Path) -> int:
  """An open, locked file; BlockingIOError if another has it."""
  import fcntl  # Windows has none.

  while True:
    path.parent.mkdir(exist_ok=True)
    try:
      file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # Removed with its folder by who releases it.
      if not path.parent.parent.is_dir():
        raise
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _is(path, file):
        return file
    except OSError as error:
      os.close(file)
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        raise BlockingIOError(error.errno, error.strerror) from error
      raise
    os.close(file)


def _is(path: pathlib.Path, file: int) -> bool:
  """Whether that path is still the open file's."""
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.stat(path), os.fstat(file))
  return False
