"""What `load.py` returns: an exported model, its programs and its parameters.

A copy is in each exported directory; it needs JAX and NumPy alone, and is run
as its checksum found it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

_LIMIT = 2**24
"""Bytes of the header of tensors."""
_MAX = 1e8
"""Of dense features, as `histjax.schema.MAX_DENSE`."""
_DTYPES = {'F32': np.float32, 'BF16': jnp.bfloat16, 'I32': np.int32}


class Cache(NamedTuple):
  """What is known of users; keys and values are `[layers, B, L, N, H]`."""

  keys: jax.Array
  values: jax.Array
  length: np.ndarray
  model: str


class Model:
  """An exported model. What it is given is padded to the exported sizes.

  Attributes:
    manifest: of the directory.
  """

  def __init__(
    self, manifest: Mapping[str, Any], files: Mapping[str, np.ndarray]
  ):
    """Of the bytes of all files, uint8, which nobody changes any more."""
    self.manifest, self._files = manifest, dict(files)
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

  def check(self, log: Callable[[str], None] = print) -> None:
    """Runs all programs on the golden inputs; ValueError where one differs."""
    sizes = self.manifest['sizes']
    golden = _tensors(self._files, 'golden.safetensors')

    def part(name):
      start = f'{name}/'
      return {
        k.removeprefix(start): x
        for k, x in golden.items()
        if k.startswith(start)
      }

    for events, rows in itertools.product(sizes['events'], sizes['rows']):
      history, candidates, context, logits, count = (
        _repeated(part(f'{events}/{name}'), rows, 0)
        for name in ('history', 'candidates', 'context', 'logits', 'length')
      )
      length = count['length']
      cache = _timed(
        log, f'encode {rows} x {events}', self.encode, history, length
      )
      for number in sizes['candidates']:
        shown, wanted = (_repeated(x, number, 1) for x in (candidates, logits))
        what = f'score {rows} x {events} x {number}'
        found = _timed(log, what, self.score, cache, shown, context)
        self._compare(log, found, wanted)
      for new in sizes['new_events']:  # The last ones, as if they came later.
        late = np.minimum(length, new)
        index = (length - late)[:, None] + np.arange(new)
        index = np.minimum(index, events - 1)
        tail = {k: np.take_along_axis(x, index, 1) for k, x in history.items()}
        early = self.encode(history, length - late)
        what = f'extend {rows} x {events} by {new}'
        cache = _timed(log, what, self.extend, early, tail, late)
        found = self.score(cache, shown, context)
        self._compare(log, found, wanted)

  def _compare(self, log, found, wanted) -> None:
    allowed = self.manifest['tolerance']
    for task, x in wanted.items():
      error = np.max(np.abs(found[task] - x) / (1 + np.abs(x)))
      if not error <= allowed:
        raise ValueError(
          f'logits of {task!r} are off by {error}, over {allowed}'
        )
      log(f'  {task}: off by {error:.1e}, at most {allowed}')


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
