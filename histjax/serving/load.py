"""Scores with the exported model beside this file; needs JAX and NumPy alone.

    python DIR/load.py --check     # all checksums, all programs on known rows

    import load
    model = load.load(DIR)
    cache = model.encode(history, length)             # {name: [B, L]}, [B]
    logits = model.score(cache, candidates, context)  # {name: [B, C]}, {name: [B]}
    cache = model.extend(cache, events, count)        # {name: [B, E]}, [B]

Ids are integers and dense features floats, encoded as `config.json` says.
Checksums find damage, not a forger, who would write them too: against one give
`load` the SHA-256 of `manifest.json` that the export has printed.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

_LIMIT = 2**24
"""Bytes of a manifest, and of a header of tensors."""
_DTYPES = {'F32': np.float32, 'BF16': jnp.bfloat16, 'I32': np.int32}


class Cache(NamedTuple):
  """What `score` needs of users: `keys` and `values` `[layers, B, L, N, H]`."""

  keys: jax.Array
  values: jax.Array
  length: np.ndarray
  model: str


def load(folder: Any, sha256: str | None = None) -> Model:
  """The model, once every file has its checksum; ValueError names the file."""
  return Model(pathlib.Path(folder), sha256)


class Model:
  """An exported model; sizes are padded to those that were exported."""

  def __init__(self, folder: pathlib.Path, sha256: str | None = None):
    manifest = folder / 'manifest.json'
    if sha256 is None:
      sums = _whole(folder / 'manifest.sha256', 1024)
      sha256 = bytes(sums[:64]).decode('ascii', 'replace')
    self.manifest = json.loads(bytes(_whole(manifest, _LIMIT, sha256)))
    self._files = {}
    for name, (size, digest) in self.manifest['files'].items():
      if pathlib.PurePath(name).name != name:
        raise ValueError(f'{manifest} names {name!r}, which is not beside it')
      self._files[name] = _whole(folder / name, size, digest, exact=True)
    if importlib.util.find_spec('flatbuffers') is None:  # What jax.export reads.
      sys.path.append(str(folder / 'flatbuffers.zip'))
    self._programs: dict[str, Any] = {}
    self._weights: Any = None

  def encode(self, history: Mapping[str, Any], length: Any) -> Cache:
    """Reads histories `{name: [B, L]}`, oldest event first, `length[b]` real."""
    length = np.asarray(length)
    rows = self._fit('rows', len(length))
    events = self._fit('events', int(length.max(initial=0)))
    parts = {'length': {'length': length}, 'history': history}
    keys, values, _ = self._run('encode', (rows, events), parts, length)
    return Cache(keys, values, length, self.manifest['model'])

  def extend(self, cache: Cache, events: Mapping[str, Any], count: Any) -> Cache:
    """Appends `count[b]` new events `{name: [B, E]}` to each user's history."""
    count = np.asarray(count)
    parts = {
      'length': {'length': cache.length}, 'count': {'count': count},
      'history': events,
    }  # fmt: skip
    self._check(cache, count)
    length = cache.length + count
    capacity = max(
      self._fit('events', int(length.max(initial=0))), cache.keys.shape[2]
    )
    width = [(0, 0)] * 5
    width[2] = (0, capacity - cache.keys.shape[2])
    cached = [jnp.pad(x, width) if width[2][1] else x for x in cache[:2]]
    new = self._fit('new_events', int(count.max(initial=0)))
    sizes = (cached[0].shape[1], capacity, new)
    keys, values, _ = self._run('extend', sizes, parts, count, cached)
    return Cache(keys, values, length, cache.model)

  def score(
    self, cache: Cache, candidates: Mapping[str, Any], context: Mapping[str, Any]
  ) -> dict[str, np.ndarray]:
    """Logits `{task: [B, C]}` of candidates, of row b for user b of the cache."""
    self._check(cache, cache.length)
    shape = np.shape(next(iter(candidates.values()), ()))
    if len(shape) != 2:
      raise ValueError(f'candidates have shape {shape}; expected [B, C]')
    size = self._fit('candidates', shape[1])
    count = np.full(len(cache.length), shape[1])
    parts = {
      'length': {'length': cache.length}, 'count': {'count': count},
      'candidates': candidates, 'context': context,
    }  # fmt: skip
    sizes = (*cache.keys.shape[1:3], size)
    logits = np.asarray(self._run('score', sizes, parts, count, cache[:2]))
    logits = logits[: shape[0], : shape[1]]
    if not np.isfinite(logits).all():
      raise ValueError('a logit is not finite: features are too large')
    return {t: logits[..., i] for i, t in enumerate(self.manifest['tasks'])}

  def _check(self, cache, count) -> None:
    if cache.model != self.manifest['model']:
      raise ValueError('cache is of another model; encode the history again')
    if count.shape != cache.length.shape:
      raise ValueError(f'{len(count)} rows for {len(cache.length)} in the cache')

  def _fit(self, what: str, number: int) -> int:
    sizes = self.manifest['sizes'][what]
    for size in sizes:
      if size >= number:
        return size
    raise ValueError(
      f'{number} {what} do not fit the largest exported, {sizes[-1:]}; give '
      f'fewer, or export with a larger --{what}'
    )

  def _run(self, kind, sizes, parts, real, cached=()):
    """Runs a program on `real[b]` events or candidates of each row."""
    request = self._pack(kind, sizes, parts, real)
    if self._weights is None:
      self._check_device()
      tensors = _tensors(self._files['parameters.safetensors'], 'parameters')
      self._weights = self._program('prepare')(tensors)
    name = f'{kind}-' + 'x'.join(map(str, sizes))
    return self._program(name)(self._weights, *cached, request)

  def _program(self, name: str):
    if name not in self._programs:
      file = bytearray(self._files[f'{name}.jax'])
      self._programs[name] = jax.jit(jax.export.deserialize(file).call)
    return self._programs[name]

  def _check_device(self) -> None:
    wanted = [self.manifest['platform'], self.manifest['compute_capability']]
    here = jax.export.default_export_platform()
    capability = str(getattr(jax.devices()[0], 'compute_capability', ''))
    if here != wanted[0] or wanted[1] not in ('', capability):
      raise ValueError(
        f'exported for {" ".join(wanted)}, and this is {here} {capability}'
      )

  def _pack(self, kind, sizes, parts, real) -> np.ndarray:
    """All parts, checked and padded, in one int32 array."""
    packed = []
    for part, features in self.manifest['requests'][kind].items():
      given = parts[part]
      if set(given) != set(features):
        raise ValueError(
          f'{part} has {sorted(given)}; expected {sorted(features)}'
        )
      several = part in ('history', 'candidates')
      longest = np.shape(next(iter(given.values())))[1:] if several else ()
      for name, size in features.items():  # A table's size; None: dense.
        x = np.asarray(given[name])
        kinds = 'f' if size is None else 'iu'
        if x.shape != (len(real), *longest) or x.dtype.kind not in kinds:
          raise ValueError(
            f'{part}[{name!r}] is {x.dtype} {x.shape}; expected '
            f'{"floats" if size is None else "integers"} '
            f'{(len(real), *longest)}'
          )
        shape = (sizes[0], sizes[-1]) if several else sizes[:1]
        if several:
          if not 0 <= real.min(initial=0) <= real.max(initial=0) <= x.shape[1]:
            raise ValueError(f'{part} has rows of {real}, arrays {x.shape}')
          x = np.where(np.arange(x.shape[1]) < real[:, None], x, 0)
          x = x[:, : shape[1]]
        if size is None:
          with np.errstate(over='ignore'):  # What overflows is not finite.
            x = x.astype(np.float32)
        bad = ~np.isfinite(x) if size is None else (x < 0) | (x >= size)
        if bad.any():
          limit = 'finite numbers' if size is None else f'ids in [0, {size})'
          raise ValueError(f'{part}[{name!r}] has {x[bad][0]}; expected {limit}')
        padded = np.zeros(shape, x.dtype if size is None else np.int32)
        padded[tuple(map(slice, x.shape))] = x
        packed.append(padded.reshape(-1).view(np.int32))
    return np.concatenate(packed)


def _whole(path, size: int, digest: str = '', exact: bool = False):
  """The bytes of a file of a size and checksum, mapped and not copied."""
  if not path.is_file():
    raise ValueError(f'{path} is missing; copy or export the directory again')
  found = path.stat().st_size
  if not found or found > size or (exact and found < size):
    raise ValueError(f'{path} has {found} bytes; expected {size}: it is damaged')
  data = np.memmap(path, np.uint8, 'r')
  if digest and hashlib.sha256(data).hexdigest() != digest:
    raise ValueError(f'{path} does not have its checksum; it is damaged')
  return data


def _tensors(data, name: str) -> dict[str, np.ndarray]:
  """Arrays of safetensors: 8 bytes of length, JSON, then what it describes."""
  start = 8 + int.from_bytes(bytes(data[:8]), 'little')
  if start > min(len(data), _LIMIT):
    raise ValueError(f'{name}.safetensors has no header')
  found = {}
  for key, x in json.loads(bytes(data[8:start])).items():
    begin, end = (start + i for i in x['data_offsets'])
    part = data[begin:end].view(_DTYPES[x['dtype']])
    found[key] = part.reshape(x['shape'])
  return found


def check(folder: Any) -> None:
  """Runs every program on the golden inputs; ValueError where it differs."""
  began = time.perf_counter()
  model = load(folder)
  took = time.perf_counter() - began
  print(f'{len(model._files) + 1} files have their checksums ({took:.2f} s)')
  golden = _tensors(model._files['golden.safetensors'], 'golden')
  sizes, allowed = model.manifest['sizes'], model.manifest['tolerance']
  for events in sizes['events']:
    for rows in sizes['rows']:
      history, candidates, context, logits = (
        _of(golden, events, part, rows)
        for part in ('history', 'candidates', 'context', 'logits')
      )
      length = _of(golden, events, 'length', rows)['length']
      for size in sizes['candidates']:
        cut = np.arange(size) % next(iter(candidates.values())).shape[1]
        shown = {k: x[:, cut] for k, x in candidates.items()}
        wanted = {k: x[:, cut] for k, x in logits.items()}

        def score(cache, shown=shown, context=context):
          return model.score(cache, shown, context)

        cache = _timed(f'encode {rows} x {events}', model.encode, history, length)
        found = _timed(f'score {rows} x {events} x {size}', score, cache)
        _compare(found, wanted, allowed)
      for new in sizes['new_events']:
        count = np.minimum(length, new)
        index = (length - count)[:, None] + np.arange(new)
        index = np.minimum(index, events - 1)
        late = {k: np.take_along_axis(x, index, 1) for k, x in history.items()}
        cache = model.encode(history, length - count)
        cache = _timed(
          f'extend {rows} x {events} by {new}', model.extend, cache, late, count
        )
        _compare(score(cache), wanted, allowed)
  print(f'ok in {time.perf_counter() - began:.1f} s, jax {jax.__version__}')


def _of(golden, events: int, part: str, rows: int) -> dict[str, np.ndarray]:
  """A part of the golden rows, repeated to as many as asked for."""
  start = f'{events}/{part}/'
  return {
    k.removeprefix(start): x[np.arange(rows) % len(x)]
    for k, x in golden.items()
    if k.startswith(start)
  }


def _timed(what: str, call, *arguments):
  times = []
  for _ in range(4):
    began = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    times.append(time.perf_counter() - began)
  print(f'{what}: {times[0]:.2f} s to compile, {1e3 * min(times[1:]):.2f} ms')
  return result


def _compare(found, wanted, allowed: float) -> None:
  for task, x in wanted.items():
    error = np.max(np.abs(found[task] - x) / (1 + np.abs(x)))
    if not error <= allowed:
      raise ValueError(f'logits of {task!r} differ by {error}, over {allowed}')
    print(f'  {task}: within {error:.1e} of the golden logits')


if __name__ == '__main__':
  if sys.argv[1:] != ['--check']:
    sys.exit(__doc__)
  try:
    check(pathlib.Path(__file__).parent)
  except ValueError as problem:
    sys.exit(f'{problem}')
