"""Files and folders that are there whole or not at all, whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: NumPy's.


def write(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
  """Writes a file beside its place, then puts it there."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with named(path):
      write(temporary)
      sync(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, values: Any) -> None:
  """As `write`, of JSON."""
  write(path, lambda p: p.write_text(json.dumps(values, indent=1) + '\n'))


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to fill, which is put in its place at the end.

  One that is there by then stays: another process has filled it.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    with named(path):
      yield temporary
      for file in temporary.iterdir():
        sync(file)
    try:
      os.rename(temporary, path)
    except OSError:
      if not path.is_dir():
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


class FullDiskError(OSError):
  """What could not be written, and what to do."""


@contextlib.contextmanager
def named(path: pathlib.Path) -> Iterator[None]:
  """A full disk is a FullDiskError, with the path that libraries leave out."""
  try:
    yield
  except FullDiskError:
    raise
  except OSError as error:
    if error.filename is not None or error.errno not in _FULL:
      raise
    raise FullDiskError(
      f'{path} cannot be written ({error}); make room, and run the same again'
    ) from error


def clean(path: pathlib.Path) -> None:
  """Deletes what a killed process left of these."""
  for left in path.rglob('.*.tmp'):
    if left.is_dir():
      shutil.rmtree(left, ignore_errors=True)
    else:
      left.unlink(missing_ok=True)


def sync(path: pathlib.Path) -> None:
  """Has the system write a file to the disk."""
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)
