"""Folders that a run reads and writes: named once, checked before any work."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from absl import logging

from histjax.data import locks

_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')
"""Of a URL; `pathlib` makes `gs:/bucket` of `gs://bucket`."""


def resolve(
  path: str | os.PathLike[str], field: str = 'workdir'
) -> pathlib.Path:
  """The absolute path; `~` is the home folder.

  Args:
    path: of a local folder or file; it need not be there.
    field: what to call it in errors.

  Raises:
    ValueError: it is empty, a URL, or no path at all.
  """
  try:
    text = os.fspath(path)
  except TypeError:
    text = None
  if not isinstance(text, str):
    raise ValueError(
      f'{field}={path!r} is of type {type(path).__name__}; it must be a path, '
      "as '/tmp/run'"
    )
  if not text.strip():
    raise ValueError(f"{field}={text!r} is empty; name one, as '/tmp/run'")
  if _SCHEME.match(text):
    raise ValueError(
      f'{field}={text!r} is a URL; name a folder of this machine, to which '
      'remote storage may be mounted'
    )
  if '\0' in text:
    raise ValueError(f'{field}={text!r} has a null character; remove it')
  try:
    expanded = pathlib.Path(text).expanduser()
  except RuntimeError as e:
    raise ValueError(
      f'{field}={text!r} has no home folder to expand ({e}); write it in full'
    ) from e
  return pathlib.Path(os.path.abspath(expanded))


def prepare(
  path: str | os.PathLike[str], field: str = 'workdir'
) -> pathlib.Path:
  """Creates the folder, and checks that it can be written to.

  Args:
    path: see `resolve`.
    field: what to call it in errors.

  Returns:
    Its absolute path.

  Raises:
    ValueError: see `resolve`.
    OSError: it cannot; PermissionError, NotADirectoryError, ... as the system
      says. The message names the folder.
  """
  found = resolve(path, field)
  try:
    found.mkdir(parents=True, exist_ok=True)
    _probe(found)
  except OSError as e:
    raise type(e)(
      e.errno,
      f'{field}={str(found)!r} cannot be written to ({e.strerror}); name a '
      'folder on a disk that you may write to',
    ) from e
  return found


@contextlib.contextmanager
def prepared(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """`prepare`; after an error a new folder without a file in it is removed.

  Args:
    path: see `resolve`.
  """
  is_new = not resolve(path).exists()
  folder = prepare(path)
  try:
    yield folder
  except BaseException:
    inside = [*os.walk(folder, topdown=False)] if is_new else []
    if not any(files for _, _, files in inside):  # As another run's lock.
      with contextlib.suppress(OSError):  # Another run begins there.
        for inner, _, _ in inside:
          os.rmdir(inner)
    raise


def alone(folder: pathlib.Path) -> contextlib.AbstractContextManager[object]:
  """Exclusive use of a folder while a run writes to it.

  Without, where neither the system nor the disk knows locks, which is logged.

  Args:
    folder: of `prepare`.

  Raises:
    ValueError: another process is at work there.
  """
  try:
    return locks.FolderLock(folder, 'workdir')
  except (ImportError, OSError) as e:
    logging.warning('%s; see that no other process trains there', e)
    return contextlib.nullcontext()


def prepare_output(
  path: str | os.PathLike[str], field: str = 'output'
) -> pathlib.Path:
  """Checks that a file can be written there; its folder must be there.

  Args:
    path: of the file, see `resolve`.
    field: what to call it in errors.

  Returns:
    Its absolute path.

  Raises:
    ValueError: see `resolve`, or it is a folder.
    OSError: it cannot be written; the message says why.
  """
  found = resolve(path, field)
  if found.is_dir():
    raise ValueError(f'{field}={str(found)!r} is a folder; name a file in it')
  try:
    _probe(found.parent)
  except OSError as e:
    raise type(e)(
      e.errno,
      f'{field}={str(found)!r} cannot be written ({e.strerror}); its folder '
      'must be there, and you must be allowed to write to it',
    ) from e
  return found


def _probe(folder: pathlib.Path) -> None:
  probe = folder / f'.probe-{os.getpid()}'
  probe.touch()
  probe.unlink()
