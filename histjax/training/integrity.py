"""Whether a checkpoint is all there, by the list of files it brings along."""

from __future__ import annotations

import contextlib
import json
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

import tensorstore as ts

LISTING = 'files.json'
META = 'metadata'
"""The file of the item `meta`."""
FORMAT = 2
"""Of checkpoints and metrics.json; raised when older ones cannot be read."""


def write_listing(folder: pathlib.Path) -> None:
  """Writes to its `files.json` which files `folder` has, and their sizes."""
  sizes: dict[str, int | None] = {
    path.relative_to(folder).as_posix(): path.stat().st_size
    for path in sorted(folder.glob('*/**/*'))
    if path.is_file()
  }
  # Orbax writes the time into those of the top level when it is through.
  sizes |= {p.name: None for p in folder.iterdir() if p.is_file()}
  (folder / LISTING).write_text(json.dumps(sizes, indent=0) + '\n')


def missing(folder: pathlib.Path) -> str | None:
  """What is proven to be missing in `folder`; None: nothing is.

  A file counts as missing if the system says that there is none, or that it
  has another size than it was written with (a copy that was cut off).

  Raises:
    OSError: it cannot be told, since something cannot be read.
  """
  try:
    text = (folder / LISTING).read_text()
  except FileNotFoundError:
    return f'{LISTING} is missing'
  try:
    sizes = dict(json.loads(text))
  except ValueError:
    return f'{LISTING} was cut off'
  for name, size in sizes.items():
    try:
      found = (folder / name).stat()
    except FileNotFoundError:
      return f'{name} is missing'
    if size is None or not stat.S_ISREG(found.st_mode):
      continue
    if found.st_size != size:
      return f'{name} has {found.st_size} of {size} bytes'
  return None


def check_opens(folder: pathlib.Path) -> None:
  """Raises an error if the arrays in `folder` cannot be listed.

  Orbax would find out as well, but while reading many of them at once, and
  each of the others then complains on stderr that its event loop is closed.
  """
  base = {'driver': 'file', 'path': f'{folder}/'}
  store = ts.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
  if not store.list().result():  # So it is, too, where the list is a folder.
    raise OSError(f'{folder} lists no arrays')


def check_format(path: pathlib.Path, found: Any) -> None:
  """Raises ValueError if `path` is not of the format that this version has."""
  if found != FORMAT:
    was = 'an earlier version' if found is None else f'format {found!r}'
    raise ValueError(
      f'{path} was written by another version of histjax ({was}; this one has '
      f'format {FORMAT}) and cannot be read: train again in another workdir, '
      'or use the version that wrote it'
    )


def read_meta(folder: pathlib.Path) -> dict[str, Any] | None:
  """The item `meta`; None if it is missing, or not all of it is there."""
  try:
    text = (folder / 'meta' / META).read_text()
  except FileNotFoundError:
    return None
  try:
    return dict(json.loads(text))
  except ValueError:
    if missing(folder) is not None:
      return None
    raise


@contextlib.contextmanager
def naming(folder: pathlib.Path) -> Iterator[None]:
  """Names the checkpoint in whatever goes wrong while it is read."""
  try:
    yield
  except Exception as e:  # Orbax raises errors of many kinds.
    raise OSError(
      f'the checkpoint {folder}, of step {folder.name}, cannot be read '
      f'({type(e).__name__}: {e}). Nothing was changed; try again and, if it '
      'stays so, move this folder away to go on from the one before'
    ) from e
