"""Loads the exported model beside this file; needs JAX and NumPy alone.

    python DIR/load.py --check     # all checksums, all programs on known rows

    import load
    model = load.load(DIR)
    cache = model.encode(history, length)       # {name: [B, L]}, [B]
    logits = model.score(cache, candidates, context)  # {task: [B, C]}
    cache = model.extend(cache, events, count)  # {name: [B, E]}, [B]

Candidates are `{name: [B, C]}`, context is `{name: [B]}`: ids are integers,
dense features floats, encoded as `config.json` says. Checksums find damage, not
a forger, who would write them, too: against one give `load` the SHA-256 of
`manifest.json` that the export has printed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def load(folder: Any, sha256: str | None = None) -> Any:
  """The `Model` of `exported.py`; ValueError names a file without its checksum.

  Nothing is read later: the folder may be moved or overwritten.
  """
  folder = pathlib.Path(os.path.realpath(folder))
  path = folder / 'manifest.json'
  text = bytes(_read(path, 2**24))
  digest = hashlib.sha256(text).hexdigest()
  sums = bytes(_read(folder / 'manifest.sha256', 80))
  if sums != f'{digest}  manifest.json\n'.encode():
    raise ValueError(f'{path} does not have its checksum, manifest.sha256')
  if sha256 not in (None, digest):
    raise ValueError(f'{path} has SHA-256 {digest}; expected {sha256}')
  manifest, files = json.loads(text), {}
  for name, (size, digest) in manifest['files'].items():
    if not re.fullmatch(r'\w[\w.-]*', name):
      raise ValueError(f'{path} names {name!r}, which is not beside it')
    files[name] = _read(folder / name, size)
    found = hashlib.sha256(files[name].data).hexdigest()
    if len(files[name]) != size or found != digest:
      raise ValueError(f'{folder / name} does not have its checksum')
  if 'exported.py' not in files:
    raise ValueError(f'{path} names no exported.py; use its own load.py')
  if importlib.util.find_spec('flatbuffers') is None:  # For jax.export.
    sys.path.append(str(folder / 'flatbuffers.zip'))
  importlib.import_module('flatbuffers')  # The one that was checked.
  return _module(files['exported.py']).Model(manifest, files)


def check(folder: Any, log: Callable[[str], None] = print) -> None:
  """Runs every program on the golden inputs; ValueError where it differs."""
  began = time.perf_counter()
  model = load(folder)
  number, took = len(model.manifest['files']) + 1, time.perf_counter() - began
  log(f'{number} files have their checksums ({took:.2f} s)')
  model.check(log)
  log(f'ok in {time.perf_counter() - began:.1f} s, JAX {jax.__version__}')


def _read(path: pathlib.Path, limit: int) -> np.ndarray:
  """The bytes of a file, at most so many.

  Not mapped: whoever writes to the file would change what has been checked.
  """
  size = path.stat().st_size if path.is_file() else 0
  if not 0 < size <= limit:
    raise ValueError(
      f'{path} has {size} bytes, or is missing; expected 1 to {limit}'
    )
  return np.fromfile(path, np.uint8, size)


def _module(source: np.ndarray) -> types.ModuleType:
  """What was checked, run once."""
  name = f'_exported_{hashlib.sha256(source.data).hexdigest()}'
  if name in sys.modules:
    return sys.modules[name]
  module = types.ModuleType(name)
  exec(compile(bytes(source), 'exported.py', 'exec'), module.__dict__)
  return sys.modules.setdefault(name, module)


if __name__ == '__main__':
  if sys.argv[1:] != ['--check']:
    sys.exit(__doc__)
  try:
    check(pathlib.Path(os.path.realpath(__file__)).parent)
  except ValueError as problem:
    sys.exit(f'{problem}')
