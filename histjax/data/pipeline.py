"""Batches of rows on Grain: shuffled, bucketed, padded, sharded, resumable.

A batch has the shape of a bucket, so a program is compiled once per bucket.
Every row comes once an epoch; what is missing in a bucket's last batch are
empty rows. All hosts walk through the same batches, and each takes its own
rows of every one: shapes agree at every step, and nothing is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from histjax import buckets as bucket_sizes
from histjax.data.rows import RowSource
from histjax.types import RankingBatch

_ENDLESS = 1_000_000
"""Epochs of training batches without end."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """How rows become batches.

  Attributes:
    batch_events: events and candidates, padding included, of a batch over all
      hosts; a batch has as many rows as fit, and at least one a device.
    history_buckets: the lengths L that histories are padded to, increasing.
      Empty: up to `auto_buckets` of them from the data.
    candidate_buckets: likewise, the numbers C of candidates. Empty: for each
      history bucket, the most candidates that a row of it has.
    auto_buckets: at most this many history buckets are made up.
    seed: of the order of rows and batches.
    num_threads: threads that make batches ahead; 0: none, in the caller's.
    prefetch: batches made ahead.
  """

  batch_events: int = 32_768
  history_buckets: tuple[int, ...] = ()
  candidate_buckets: tuple[int, ...] = ()
  auto_buckets: int = 4
  seed: int = 0
  num_threads: int = 2
  prefetch: int = 8

  def __post_init__(self):
    for field in ('history_buckets', 'candidate_buckets'):
      sizes = bucket_sizes.check(f'pipeline: {field}', getattr(self, field))
      object.__setattr__(self, field, sizes)
    for field, least in (
      ('batch_events', 1),
      ('auto_buckets', 1),
      ('seed', 0),
      ('num_threads', 0),
      ('prefetch', 0),
    ):
      if getattr(self, field) < least:
        raise ValueError(
          f'pipeline: {field}={getattr(self, field)} must be >= {least}'
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
  """Rows of one shape.

  Attributes:
    num_events: L.
    num_candidates: C.
    num_rows: rows of a batch over all hosts.
    rows: int64 `[n]`, the rows in the bucket.
  """

  num_events: int
  num_candidates: int
  num_rows: int
  rows: np.ndarray

  @property
  def num_batches(self) -> int:
    """Batches an epoch."""
    return -(-len(self.rows) // self.num_rows)


def make_buckets(
  rows: RowSource,
  config: PipelineConfig,
  *,
  row_multiple: int = 1,
  shard_count: int = 1,
) -> list[Bucket]:
  """The buckets that hold a row, each row in the smallest that it fits.

  Raises:
    ValueError: a row is larger than the largest bucket, or there is no row.
  """
  if not len(rows):
    raise ValueError('there are no rows; the split has no events')
  length, count = rows.history_lengths, rows.candidate_counts
  made_up = bucket_sizes.of_data(length, config.auto_buckets)
  wide = np.array(config.history_buckets or made_up, np.int64)
  row_l = _fit(rows, length, wide, 'history_buckets', 'events of history')
  if config.candidate_buckets:
    tall = np.array(config.candidate_buckets, np.int64)
    row_c = _fit(rows, count, tall, 'candidate_buckets', 'candidates')
  else:
    most = np.zeros(len(rows), np.int64)
    for size in np.unique(row_l):
      longest = int(count[row_l == size].max())
      most[row_l == size] = bucket_sizes.round_up(longest)
    row_c = most
  multiple = math.lcm(row_multiple, shard_count)
  buckets = []
  for num_events, num_candidates in np.unique(
    np.stack([row_l, row_c], 1), axis=0
  ).tolist():
    fits = config.batch_events // (num_events + num_candidates)
    buckets.append(
      Bucket(
        num_events,
        num_candidates,
        max(multiple, fits // multiple * multiple),
        np.flatnonzero((row_l == num_events) & (row_c == num_candidates)),
      )
    )
  return buckets


class BatchIterator(Iterator[RankingBatch]):
  """Batches of one host, with a position that can be saved.

  Attributes:
    buckets: the shapes that batches have.
    batches_per_epoch: batches, of this and of every other host.
  """

  def __init__(
    self,
    dataset: grain.MapDataset,
    rows: RowSource,
    buckets: list[Bucket],
    config: PipelineConfig,
  ):
    self.buckets = buckets
    self.batches_per_epoch = sum(b.num_batches for b in buckets)
    self._order = _order(rows, buckets, config)
    options = grain.ReadOptions(
      num_threads=config.num_threads,
      prefetch_buffer_size=config.prefetch if config.num_threads else 0,
    )
    self._iterator = iter(dataset.to_iter_dataset(options))

  def __next__(self) -> RankingBatch:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """The position, to be kept as JSON: that after the last batch given."""
    return {**self._iterator.get_state(), 'order': self._order}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position, such that the next batch is the one after it.

    Raises:
      ValueError: the state is of other rows, buckets, batch sizes or seed.
    """
    state = dict(state)
    if state.pop('order', None) != self._order:
      raise ValueError(
        'the saved position in the data is of another order of batches: the '
        'rows, the seed, batch_events, the buckets or the number of devices '
        'have changed; restore them, or start a new run'
      )
    self._iterator.set_state(state)

  def close(self) -> None:
    """Ends the threads. The iterator cannot be used any more."""
    self._iterator.close()


def train_batches(
  rows: RowSource,
  config: PipelineConfig,
  *,
  row_multiple: int = 1,
  shard_index: int = 0,
  shard_count: int = 1,
  num_epochs: int | None = None,
) -> BatchIterator:
  """Batches in an order of their own each epoch.

  Args:
    rows: what to train on.
    config: how they become batches.
    row_multiple: rows of a batch over all hosts are a multiple of it: the
      number of devices.
    shard_index: this host.
    shard_count: hosts; each yields the same number of batches, of the same
      shapes, with `1 / shard_count` of the rows of each.
    num_epochs: None: without end.

  Returns:
    An iterator over `RankingBatch` of NumPy arrays.

  Raises:
    ValueError: a row does not fit the buckets, or an argument is bad.
  """
  _check_shard(shard_index, shard_count, row_multiple)
  buckets = make_buckets(
    rows, config, row_multiple=row_multiple, shard_count=shard_count
  )
  batches = _Batches(tuple(buckets), config.seed, num_epochs or _ENDLESS)
  dataset = grain.MapDataset.source(batches)
  load = _Load(rows, tuple(buckets), shard_index, shard_count)
  return BatchIterator(dataset.map(load), rows, buckets, config)


def eval_batches(
  rows: RowSource,
  config: PipelineConfig,
  *,
  row_multiple: int = 1,
  shard_index: int = 0,
  shard_count: int = 1,
) -> BatchIterator:
  """Every row once, in order, bucket by bucket; see `train_batches`."""
  _check_shard(shard_index, shard_count, row_multiple)
  buckets = make_buckets(
    rows, config, row_multiple=row_multiple, shard_count=shard_count
  )
  dataset = grain.MapDataset.source(_Batches(tuple(buckets), None, 1))
  load = _Load(rows, tuple(buckets), shard_index, shard_count)
  return BatchIterator(dataset.map(load), rows, buckets, config)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
  """The bucket and row numbers of batches, by position; a source for Grain.

  Batches, not rows, are its elements: Grain spends microseconds on each, and
  an epoch of pointwise rows has a million.

  Attributes:
    buckets: of the rows.
    seed: of the order of rows and batches; None: as they come.
    num_epochs: how often to go through them.
  """

  buckets: tuple[Bucket, ...]
  seed: int | None
  num_epochs: int

  def __len__(self) -> int:
    return self.num_epochs * sum(b.num_batches for b in self.buckets)

  def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
    epoch, place = divmod(index, len(self) // self.num_epochs)
    order, rows = _shuffled(self, epoch)
    number, batch = order[place]
    start = batch * self.buckets[number].num_rows
    return number, rows[number][start : start + self.buckets[number].num_rows]


@functools.lru_cache(maxsize=4)  # Threads work on the end and the next start.
def _shuffled(batches: _Batches, epoch: int):
  """`[(bucket, batch)]` and each bucket's rows, in the order of an epoch."""
  buckets, seed = batches.buckets, batches.seed
  order = [(n, i) for n, b in enumerate(buckets) for i in range(b.num_batches)]
  rows = [bucket.rows for bucket in buckets]
  if seed is None:
    return order, rows
  rng = np.random.default_rng((seed, epoch))
  rows = [rng.permutation(r) for r in rows]
  return [order[i] for i in rng.permutation(len(order))], rows


@dataclasses.dataclass(frozen=True, eq=False)
class _Load:
  """Makes this host's part of a batch from its bucket and row numbers."""

  rows: RowSource
  buckets: tuple[Bucket, ...]
  shard_index: int
  shard_count: int

  def __call__(self, batch: tuple[int, np.ndarray]) -> RankingBatch:
    number, indices = batch
    bucket = self.buckets[number]
    share = bucket.num_rows // self.shard_count
    start = self.shard_index * share
    return self.rows.batch(
      indices[start : start + share],
      num_rows=share,
      num_events=bucket.num_events,
      num_candidates=bucket.num_candidates,
    )


def _order(
  rows: RowSource, buckets: list[Bucket], config: PipelineConfig
) -> str:
  """Identifies the order of batches that a position counts in."""
  shapes = [(b.num_events, b.num_candidates, b.num_rows) for b in buckets]
  digest = hashlib.sha256(json.dumps([2, config.seed, shapes]).encode())
  for array in (*rows.order(), *(b.rows for b in buckets)):
    digest.update(np.ascontiguousarray(array, '<i8').tobytes())
  return digest.hexdigest()[:16]


def _fit(rows, sizes, buckets, field: str, what: str) -> np.ndarray:
  place = np.searchsorted(buckets, sizes)
  if place.max() == len(buckets):
    row = int(np.argmax(sizes))
    raise ValueError(
      f'pipeline: a row of user {rows.key(row)!r} has {sizes[row]} {what}, '
      f'more than the largest of {field}={tuple(buckets.tolist())}; add a '
      'larger bucket, or make shorter rows (RowConfig.history_length, '
      'max_candidates)'
    )
  return buckets[place]


def _check_shard(index: int, count: int, row_multiple: int) -> None:
  if not 0 <= index < count:
    raise ValueError(f'shard_index={index} must be in [0, shard_count={count})')
  if row_multiple < 1:
    raise ValueError(f'row_multiple={row_multiple} must be >= 1')
