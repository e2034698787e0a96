"""What all steps of `prepare` know: where things are, and how they are cut."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib

import numpy as np

from histjax.data import datasets, prepared
from histjax.features import DerivedFeature

DONE = 'done.json'
"""Of what is read of a file; see `stages.spill`."""
WORK = '_work'
"""The folder of what is needed until all shards are written."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What every step needs; the folder has the rest.

  Attributes:
    folder: of the output.
    data: the config.
    files: of the log, in its order.
    num_shards: of users.
    num_ranges: that the order of training events is cut into.
    run_bytes: of a run, about; see `Runs`.
    time_type: of times; '' until all files are read.
    is_timestamp: whether times are timestamps.
  """

  folder: pathlib.Path
  data: datasets.DataConfig
  files: tuple[str, ...]
  num_shards: int
  num_ranges: int
  run_bytes: int
  time_type: str = ''
  is_timestamp: bool = False

  @property
  def source(self) -> datasets.Events:
    """Where the log is."""
    assert isinstance(self.data.source, datasets.Events)
    return self.data.source

  @property
  def work(self) -> pathlib.Path:
    """A folder for what is needed until all shards are written."""
    return self.folder / WORK

  def spill(self, file: int) -> pathlib.Path:
    """Of a file's events, by shard."""
    return self.work / f'file-{file:06d}'

  def fitting(self, shard: int) -> pathlib.Path:
    """Of what is learnt of a shard."""
    return self.work / f'fit-{shard:05d}'

  def ids(self, shard: int) -> pathlib.Path:
    """Of what is counted of a shard's ids."""
    return self.work / f'ids-{shard:05d}'

  def occupied(self, shard: int) -> pathlib.Path:
    """Of the rows that hashed ids of a shard have."""
    return self.work / f'occupied-{shard:05d}.npz'

  @property
  def vocabularies(self) -> pathlib.Path:
    """Of what all shards' ids tell; see `stages.read_log`."""
    return self.work / 'vocabularies'

  @property
  def before(self) -> pathlib.Path:
    """Of what comes before each training event, by shard."""
    return self.work / 'before'

  def path(self, what: str, shard: int, ending: str) -> pathlib.Path:
    """Of a file of the output."""
    return self.folder / prepared.name(what, shard, self.num_shards, ending)

  @property
  def needs_fit(self) -> bool:
    """Whether anything depends on more than one user's events."""
    every = [self.data.rows, self.data.eval_rows or self.data.rows]
    return any(r.snapshot_every is not None for r in every) or any(
      type(f).collect is not DerivedFeature.collect
      or type(f).counted is not DerivedFeature.counted
      for f in self.data.features
    )

  @property
  def needs_order(self) -> bool:
    """Whether training events are counted in an order."""
    return any(
      type(f).counted is not DerivedFeature.counted for f in self.data.features
    )


def digest(path: str) -> str:
  """SHA-256 of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@functools.lru_cache(maxsize=4)
def bounds(num_shards: int) -> np.ndarray:
  """uint64 `[shards]`, the first digest of each."""
  return np.array([2**64 * i // num_shards for i in range(num_shards)], 'u8')
