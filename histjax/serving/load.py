"""Scores with the exported model beside this file; needs JAX and NumPy alone.

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
import itertools
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

_LIMIT = 2**24
"""Bytes of a manifest, and of the header of tensors."""
_MAX = 1e8
"""Of dense features, as `histjax.schema.MAX_DENSE`."""
_DTYPES = {'F32': np.float32, 'BF16': jnp.bfloat16, 'I32': np.int32}


class Cache(NamedTuple):
  """What is known of users; keys and values are `[layers, B, L, N, H]`."""

  keys: jax.Array
  values: jax.Array
  length: np.ndarray
  model: str


def load(folder: Any, sha256: str | None = None) -> Model:
  """The model, once every file has its checksum; ValueError names the file.

  Nothing is read later: the folder may be moved or overwritten.
  """
  return Model(folder, sha256)


class Model:
  """An exported model. What it is given is padded to the exported sizes."""

  def __init__(self, folder: Any, sha256: str | None = None):
    folder = pathlib.Path(os.path.realpath(folder))
    path = folder / 'manifest.json'
    text = bytes(_read(path, _LIMIT))
    digest = hashlib.sha256(text).hexdigest()
    sums = bytes(_read(folder / 'manifest.sha256', 80))
    if sums != f'{digest}  manifest.json\n'.encode():
      raise ValueError(f'{path} does not have its checksum, manifest.sha256')
    if sha256 not in (None, digest):
      raise ValueError(f'{path} has SHA-256 {digest}; expected {sha256}')
    self.manifest = json.loads(text)
    self._files = {}
    for name, (size, digest) in self.manifest['files'].items():
      if not re.fullmatch(r'\w[\w.-]*', name):
        raise ValueError(f'{path} names {name!r}, which is not beside it')
      data = _read(folder / name, size)
      if len(data) != size or hashlib.sha256(data.data).hexdigest() != digest:
        raise ValueError(f'{folder / name} does not have its checksum')
      self._files[name] = data
    if importlib.util.find_spec('flatbuffers') is None:  # For jax.export.
      sys.path.append(str(folder / 'flatbuffers.zip'))
    importlib.import_module('flatbuffers')  # The one that was checked.
    self._programs: dict[str, Any] = {}
    self._weights: Any = None
    self._lock = threading.Lock()

  def encode(self, history: Mapping[str, Any], length: Any) -> Cache:
    """Reads histories, oldest event first, `length[b]` events of each user."""
    length = _vector('length', length)
    sizes = self._fit('rows', len(length)), self._fit('events', _max(length))
    parts: Any = {'length': {'length': length}, 'history': history}
    keys, values, _ = self._run('encode', sizes, parts, length)
    return Cache(keys, values, length, self.manifest['model'])

  def extend(
    self, cache: Cache, events: Mapping[str, Any], count: Any
  ) -> Cache:
    """Appends `count[b]` new events to each user's history."""
    count = _vector('count', count)
    length = self._length(cache, len(count)) + count
    length.setflags(write=False)
    old = cache.keys.shape[2]
    capacity = max(old, self._fit('events', _max(length)))
    width = [(0, 0), (0, 0), (0, capacity - old), (0, 0), (0, 0)]
    cached = [jnp.pad(x, width) if capacity > old else x for x in cache[:2]]
    parts: Any = {'length': {'length': cache.length}, 'new': {'new': count}}
    parts |= {'history': events}
    new = self._fit('new_events', _max(count))
    sizes = cached[0].shape[1], capacity, new
    keys, values, _ = self._run('extend', sizes, parts, count, *cached)
    return Cache(keys, values, length, cache.model)

  def score(
    self,
    cache: Cache,
    candidates: Mapping[str, Any],
    context: Mapping[str, Any],
  ) -> dict[str, np.ndarray]:
    """Logits of candidates; row b belongs to user b of the cache."""
    rows, number = _shape('candidates', candidates)
    length = self._length(cache, rows)
    count = np.full(rows, number)
    parts: Any = {'length': {'length': length}, 'count': {'count': count}}
    parts |= {'candidates': candidates, 'context': context}
    sizes = *cache.keys.shape[1:3], self._fit('candidates', number)
    found = self._run('score', sizes, parts, count, *cache[:2])
    logits = np.asarray(found)[:, :rows, :number]
    if not np.isfinite(logits).all():
      raise ValueError('a logit is not finite: features are too large')
    return dict(zip(self.manifest['tasks'], logits, strict=True))

  def _length(self, cache: Cache, rows: int) -> np.ndarray:
    if not isinstance(cache, Cache):
      raise ValueError(f'cache is a {type(cache).__name__}, not of encode')
    if cache.model != self.manifest['model']:
      raise ValueError('cache is of another model; encode the history again')
    if rows != len(cache.length):
      raise ValueError(f'{rows} rows, and {len(cache.length)} in the cache')
    return cache.length

  def _fit(self, what: str, number: int) -> int:
    sizes = self.manifest['sizes'][what]
    for size in sizes:
      if size >= number:
        return size
    raise ValueError(
      f'{number} {what} are beyond the exported {sizes}; export more --{what}'
    )

  def _run(self, kind, sizes, parts, real, *cached):
    """Runs a program on what is real, `real[b]` in row b."""
    request = self._pack(kind, sizes, parts, real)
    with self._lock:
      if self._weights is None:
        self._check_device()
        arrays = _tensors(self._files, 'parameters.safetensors')
        self._weights = self._program('prepare')(arrays)
        del self._files['parameters.safetensors']  # Or it is held twice.
    name = f'{kind}-' + 'x'.join(map(str, sizes))
    return self._program(name)(self._weights, *cached, request)

  def _program(self, name: str):
    if name not in self._programs:
      exported = jax.export.deserialize(bytearray(self._files[f'{name}.jax']))
      self._programs[name] = jax.jit(exported.call)
    return self._programs[name]

  def _check_device(self) -> None:
    wanted = self.manifest['platform'], self.manifest['compute_capability']
    here = jax.export.default_export_platform()
    capability = str(getattr(jax.devices()[0], 'compute_capability', ''))
    if here != wanted[0] or wanted[1] not in ('', capability):
      raise ValueError(
        f'exported for {" ".join(wanted)}, and this is {here} {capability}'
      )
    if wanted[1]:  # Tells XLA where its kernels' runtime library is.
      importlib.import_module('jax.experimental.mosaic.gpu')

  def _pack(self, kind, sizes, parts, real) -> np.ndarray:
    """All features, checked and padded, one after another as int32."""
    packed = []
    for part, features in self.manifest['requests'][kind].items():
      given = _mapping(part, parts[part])
      if set(given) != set(features):
        names = sorted(map(str, given))
        raise ValueError(f'{part}: {names} are not {sorted(features)}')
      many = part in ('history', 'candidates')
      longest = _shape(part, given)[1:] if many else ()
      out = np.zeros((sizes[0], sizes[-1]) if many else sizes[0], np.int32)
      for name, size in features.items():
        x = _array(f'{part}[{name!r}]', given[name])
        floats = size is None
        if x.shape != (len(real), *longest) or x.dtype.kind not in (
          'f' if floats else 'iu'
        ):
          raise ValueError(
            f'{part}[{name!r}] is {x.dtype} {x.shape}; expected '
            f'{"floats" if floats else "integers"} {(len(real), *longest)}'
          )
        if many:
          if real.min(initial=0) < 0 or _max(real) > x.shape[1]:
            raise ValueError(f'{part}[{name!r}]: {x.shape} do not hold {real}')
          x = np.where(np.arange(x.shape[1]) < real[:, None], x, 0)
          x = x[:, : sizes[-1]]
        with np.errstate(over='ignore'):  # What overflows is not finite.
          x = x.astype(np.float32) if floats else x
        good = np.abs(x) <= _MAX if floats else (0 <= x) & (x < size)
        if not good.all():
          limit = (
            f'in [-{_MAX:g}, {_MAX:g}]' if floats else f'ids in [0, {size})'
          )
          raise ValueError(f'{part}[{name!r}]: {x[~good][0]} is not {limit}')
        padded = out.copy()
        here = tuple(map(slice, x.shape))
        padded[here] = np.ascontiguousarray(x).view(np.int32) if floats else x
        packed.append(padded.reshape(-1))
    return np.concatenate(packed)


def _vector(name: str, x: Any) -> np.ndarray:
  x = _array(name, x)
  if x.ndim != 1 or x.dtype.kind not in 'iu':
    raise ValueError(f'{name} is {x.dtype} {x.shape}; expected integers [B]')
  x = x.astype(np.int64)
  x.setflags(write=False)  # It becomes the cache's.
  return x


def _array(name: str, x: Any) -> np.ndarray:
  if np.ma.is_masked(x):
    raise ValueError(f'{name} has masked values; fill them in')
  try:
    return np.asarray(x)
  except ValueError as error:  # A ragged list.
    raise ValueError(f'{name} is no array: {error}') from error


def _mapping(part: str, given: Any) -> Mapping[str, Any]:
  if not isinstance(given, Mapping):
    raise ValueError(f'{part} is a {type(given).__name__}; expected a dict')
  return given


def _shape(part: str, given: Any) -> tuple[int, ...]:
  """Of the first feature, which all must have."""
  name, first = next(iter(_mapping(part, given).items()), ('', ()))
  shape = _array(f'{part}[{name!r}]', first).shape
  if len(shape) != 2:
    raise ValueError(f'{part}: arrays of {shape}; expected {{name: [B, ..]}}')
  return shape


def _max(x: np.ndarray) -> int:
  return int(x.max(initial=0))


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


def _tensors(files: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
  """Arrays of safetensors: 8 bytes of length, JSON, then what it describes."""
  data = files[name]
  start = 8 + int.from_bytes(bytes(data[:8]), 'little')
  if start > min(len(data), _LIMIT):
    raise ValueError(f'{name} has a header of {start} bytes')
  found = {}
  for key, x in json.loads(bytes(data[8:start])).items():
    begin, end = (start + i for i in x['data_offsets'])
    part = data[begin:end].view(_DTYPES[x['dtype']])
    found[key] = part.reshape(x['shape'])
  return found


def check(folder: Any, log: Callable[[str], None] = print) -> None:
  """Runs every program on the golden inputs; ValueError where it differs."""
  began = time.perf_counter()
  model = load(folder)
  took = time.perf_counter() - began
  files, sizes = model.manifest['files'], model.manifest['sizes']
  log(f'{len(files) + 1} files have their checksums ({took:.2f} s)')
  golden = _tensors(model._files, 'golden.safetensors')

  def part(name):
    start = f'{name}/'
    return {
      k.removeprefix(start): x for k, x in golden.items() if k.startswith(start)
    }

  for events, rows in itertools.product(sizes['events'], sizes['rows']):
    history, candidates, context, logits, count = (
      _repeated(part(f'{events}/{name}'), rows, 0)
      for name in ('history', 'candidates', 'context', 'logits', 'length')
    )
    length = count['length']
    cache = _timed(
      log, f'encode {rows} x {events}', model.encode, history, length
    )
    for number in sizes['candidates']:
      shown, wanted = (_repeated(x, number, 1) for x in (candidates, logits))
      what = f'score {rows} x {events} x {number}'
      found = _timed(log, what, model.score, cache, shown, context)
      _compare(log, model, found, wanted)
    for new in sizes['new_events']:  # The last ones, as if they came later.
      late = np.minimum(length, new)
      index = (length - late)[:, None] + np.arange(new)
      index = np.minimum(index, events - 1)
      tail = {k: np.take_along_axis(x, index, 1) for k, x in history.items()}
      early = model.encode(history, length - late)
      what = f'extend {rows} x {events} by {new}'
      cache = _timed(log, what, model.extend, early, tail, late)
      _compare(log, model, model.score(cache, shown, context), wanted)
  log(f'ok in {time.perf_counter() - began:.1f} s, JAX {jax.__version__}')


def _repeated(arrays, number: int, axis: int) -> dict[str, np.ndarray]:
  return {
    k: np.take(x, np.arange(number) % x.shape[axis], axis)
    for k, x in arrays.items()
  }


def _timed(log, what: str, call, *arguments):
  times = []
  for _ in range(4):
    began = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    times.append(time.perf_counter() - began)
  log(f'{what}: first {times[0]:.2f} s, then {1e3 * min(times[1:]):.2f} ms')
  return result


def _compare(log, model: Model, found, wanted) -> None:
  allowed = model.manifest['tolerance']
  for task, x in wanted.items():
    error = np.max(np.abs(found[task] - x) / (1 + np.abs(x)))
    if not error <= allowed:
      raise ValueError(f'logits of {task!r} are off by {error}, over {allowed}')
    log(f'  {task}: off by {error:.1e}, at most {allowed}')


if __name__ == '__main__':
  if sys.argv[1:] != ['--check']:
    sys.exit(__doc__)
  try:
    check(pathlib.Path(os.path.realpath(__file__)).parent)
  except ValueError as problem:
    sys.exit(f'{problem}')
