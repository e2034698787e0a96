"""Rows on disk, cut into shards: written in runs, read shard by shard."""

from __future__ import annotations

import bisect
import json
import pathlib

import numpy as np
import pyarrow as pa


class Runs:
  """Writes rows, sorted by shard, in runs of about `max_bytes`."""

  def __init__(
    self, folder: pathlib.Path, name: str, bounds: np.ndarray, max_bytes: int
  ):
    self._folder, self._name, self._bounds = folder, name, bounds
    self._max_bytes = max_bytes
    self._held: list[dict[str, np.ndarray]] = []
    self._number = self._bytes = 0

  def add(self, rows: dict[str, np.ndarray]) -> None:
    """Rows of `Table.encode`, and `user`, which the shards are cut by."""
    self._held.append(rows)
    self._bytes += sum(values.nbytes for values in rows.values())
    if self._bytes >= self._max_bytes:
      self._write()

  def close(self) -> None:
    """The first is written in any case: it tells the columns' types."""
    if self._held and (self._bytes or not self._number):
      self._write()

  def _write(self) -> None:
    rows = {
      name: np.concatenate([held[name] for held in self._held])
      for name in self._held[0]
    }
    self._held, self._bytes = [], 0
    shard = np.searchsorted(self._bounds, rows['user'], 'right') - 1
    order = np.argsort(shard, kind='stable')
    table = pa.table({name: values[order] for name, values in rows.items()})
    shards, starts = np.unique(shard[order], return_index=True)
    meta = {'shards': json.dumps(shards.tolist())}
    path = self._folder / f'{self._name}-{self._number:06d}.arrow'
    with pa.ipc.new_file(path, table.schema.with_metadata(meta)) as writer:
      stops = np.append(starts, len(order))[1:]
      for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        part = table.slice(start, stop - start).combine_chunks()
        writer.write_table(part, max_chunksize=max(len(order), 1))
    self._number += 1


def read_runs(folder: pathlib.Path, name: str, shard: int):
  """A shard's rows of all runs, in the order they were added."""
  found: list[dict[str, np.ndarray]] = []
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
      found.append({n: np.array(batch[n]) for n in reader.schema.names})
  return {n: np.concatenate([rows[n] for rows in found]) for n in found[0]}
