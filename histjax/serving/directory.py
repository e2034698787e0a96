"""A directory that is written whole or not at all, with checksums."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

from histjax.data import atomic
from histjax.training import workdir as workdir_lib


def check_output(output: str | os.PathLike[str]) -> pathlib.Path:
  """Its absolute path without links; raises unless it is empty or not there.

  Raises:
    ValueError: it cannot be made, or replaced, there.
    OSError: the folder that it is in cannot be written to.
  """
  found = workdir_lib.resolve(output, 'output')
  if found.is_dir():  # A directory is renamed onto it, which takes no link.
    found = pathlib.Path(os.path.realpath(found))
    if os.path.ismount(found):
      raise ValueError(
        f'output={str(found)!r} is a mount point, which cannot be replaced; '
        'name a directory in it'
      )
  is_empty = found.is_dir() and not any(found.iterdir())
  if not is_empty and (found.exists() or found.is_symlink()):
    raise ValueError(
      f'output={str(found)!r} is there and no empty directory; name another, '
      'nothing is overwritten'
    )
  if not found.parent.is_dir():
    raise ValueError(
      f'output={str(found)!r}: there is no directory {str(found.parent)!r}; '
      'make it first'
    )
  workdir_lib.prepare(found.parent, 'output')
  return found


def sha256(path: pathlib.Path) -> str:
  """Of a file, 64 hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def copy_flatbuffers(path: pathlib.Path) -> None:
  """What `jax.export` reads programs with, and JAX does not install."""
  found: Any = importlib.util.find_spec('flatbuffers')
  folder = pathlib.Path(found.submodule_search_locations[0])
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for source in sorted(folder.glob('*.py')):
      name = zipfile.ZipInfo(f'flatbuffers/{source.name}')  # Without a date.
      archive.writestr(name, source.read_bytes(), zipfile.ZIP_DEFLATED)


def write_whole(
  output: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Writes a directory beside its place, then puts it there."""
  import safetensors

  folder = None
  try:
    folder = pathlib.Path(
      tempfile.mkdtemp('.tmp', f'.{output.name}.', output.parent)
    )
    write(folder)
    for path in folder.iterdir():
      atomic.sync(path)
    folder.chmod(0o755)
    atomic.sync(folder)
    os.rename(folder, output)  # An empty directory is replaced.
    atomic.sync(output.parent)
  except (OSError, safetensors.SafetensorError) as error:
    number = getattr(error, 'errno', None)
    raise OSError(
      number,
      f'output={str(output)!r} cannot be written, nothing is left of '
      f'it ({error}); make room there, or name another directory',
    ) from error
  finally:
    if folder is not None:
      shutil.rmtree(folder, ignore_errors=True)
