"""Rows on disk, cut into shards: written in runs, read shard by shard."""

from __future__ import annotations

import bisect
import json
import pathlib
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from histjax.data import atomic

Values: TypeAlias = np.ndarray | pa.Array
_SHARD = '/shard'


class Runs:
  """Writes rows, sorted by shard, in runs of about `max_bytes`."""

  def __init__(
    self, folder: pathlib.Path, name: str, bounds: np.ndarray, max_bytes: int
  ):
    self._folder, self._name, self._bounds = folder, name, bounds
    self._max_bytes = max_bytes
    self._held: list[dict[str, Any]] = []
    self._number = self._bytes = 0

  def add(
    self, rows: dict[str, Values], place: np.ndarray | None = None
  ) -> np.ndarray:
    """Adds rows.

    Args:
      rows: `{name: [n]}`.
      place: `[n]`, what the shards are cut by; None: the rows' 'user'.

    Returns:
      Int `[n]`, the shard of each.
    """
    place = rows['user'] if place is None else place
    shard = np.searchsorted(self._bounds, place, 'right') - 1
    # Numbers of 16 bits are sorted by radix, eight times as fast.
    shard = shard.astype(
      np.uint16 if len(self._bounds) < 2**16 else np.int32, copy=False
    )
    self._held.append({**rows, _SHARD: shard})
    self._bytes += sum(values.nbytes for values in rows.values())
    if self._bytes >= self._max_bytes:
      self._write()
    return shard

  def close(self) -> None:
    """The first is written in any case: it tells the columns' types."""
    if self._held and (self._bytes or not self._number):
      self._write()

  def _write(self) -> None:
    names = list(self._held[0])
    rows = {
      name: _joined([held[name] for held in self._held]) for name in names
    }
    self._held, self._bytes = [], 0
    shard = rows.pop(_SHARD)
    order = np.argsort(shard, kind='stable')
    table = pa.table(
      {
        name: values.take(pa.array(order))
        if isinstance(values, pa.Array)
        else values[order]
        for name, values in rows.items()
      }
    )
    del rows
    shards, starts = np.unique(shard[order], return_index=True)
    meta = {'shards': json.dumps(shards.tolist())}
    path = self._folder / f'{self._name}-{self._number:06d}.arrow'
    schema = table.schema.with_metadata(meta)
    with atomic.named(path), pa.ipc.new_file(path, schema) as writer:
      stops = np.append(starts, len(order))[1:]
      for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        part = table.slice(start, stop - start).combine_chunks()
        writer.write_table(part, max_chunksize=max(len(order), 1))
    self._number += 1


def read_parts(
  folder: pathlib.Path, name: str, shard: int
) -> list[dict[str, Values]]:
  """A shard's rows of each run, in the order they were added.

  Texts are Arrow's, all else is NumPy's. A run without such rows is left out,
  but for the first one, which tells the columns' types.
  """
  found: list[dict[str, Values]] = []
  for path in sorted(folder.glob(f'{name}-*.arrow')):
    with pa.memory_map(str(path)) as source:
      reader = pa.ipc.open_file(source)
      shards = json.loads(reader.schema.metadata[b'shards'])
      place = bisect.bisect_left(shards, shard)
      if place < len(shards) and shards[place] == shard:
        batch = reader.get_batch(place)
      elif found:
        continue
      else:
        batch = reader.schema.empty_table()
      found.append({n: _read(batch[n]) for n in reader.schema.names})
  return found


def read_runs(
  folder: pathlib.Path, name: str, shard: int
) -> dict[str, np.ndarray]:
  """As `read_parts`, joined."""
  found = read_parts(folder, name, shard)
  return {n: _joined([rows[n] for rows in found]) for n in found[0]}


def _read(values: pa.Array | pa.ChunkedArray) -> Values:
  if pa.types.is_large_string(values.type):
    # A copy: the file will be closed.
    array = pa.concat_arrays(getattr(values, 'chunks', [values]) or [values])
    return array.take(pa.array(np.arange(len(array))))
  return np.array(values)


def _joined(parts: list[Values]) -> Any:
  kinds = [
    'text' if isinstance(part, pa.Array) else part.dtype.kind for part in parts
  ]
  signed = [
    part for part, kind in zip(parts, kinds, strict=True) if kind == 'i'
  ]
  if 'u' in kinds and signed and 'text' not in kinds:
    # NumPy would make floats of both, which do not hold 64 bits.
    negative = any(len(part) and part.min() < 0 for part in signed)
    if not negative:
      return np.concatenate([part.astype(np.uint64) for part in parts])
    kinds.append('text')
  if 'text' in kinds:
    return pa.concat_arrays([_texts(part) for part in parts])
  return np.concatenate(parts)


def _texts(values: Values) -> pa.Array:
  array = values if isinstance(values, pa.Array) else pa.array(values)
  return array.cast(pa.large_string())
