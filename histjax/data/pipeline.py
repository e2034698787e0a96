"""Batches of rows on Grain: shuffled, bucketed, padded, sharded, resumable.

A batch has the shape of a bucket, so a program is compiled once per bucket.
Every row comes once an epoch; what is missing in a bucket's last batch are
empty rows. Which rows are in a batch, and which batch comes next, is a function
of the rows and the config alone. All hosts walk through the same batches,
padded with empty rows to a multiple of the devices, and each takes its own part
of every one: shapes agree at every step, nothing is dropped, and a position
counts rows, so that other hosts and devices can go on from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from histjax import buckets as bucket_sizes
from histjax import config as dicts
from histjax.data import bucketing, packing
from histjax.data.rows import RowSource
from histjax.types import RankingBatch

_ENDLESS = 1_000_000
"""Epochs of training batches without end."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """How rows become batches.

  Attributes:
    pack: put several rows into one where they fit, each as if it were alone;
      the model has to be one that `RankerConfig.require_packable` accepts.
      False: every row is padded by itself.
    batch_events: events and candidates, padding included, of a batch over all
      hosts; a batch has as many rows as fit, and at least `row_multiple`.
    row_multiple: rows of a batch are a multiple of it. On n devices batches are
      padded with empty rows to a multiple of n; to have none, set it to n, or
      to the most devices that the run may go on with.
    history_buckets: the lengths L that histories are padded to, increasing.
      Empty: up to `auto_buckets` of them from the data.
    candidate_buckets: the numbers C that candidates are padded to. Empty: for
      each history bucket, the most candidates that a row of it has. With `pack`
      the shapes are their pairs, as many of one as of the other. If both are
      empty, shapes of both sizes are chosen for the least padding.
    auto_buckets: at most this many shapes, or history buckets for candidate
      buckets that are given, are made up.
    seed: of the order of rows and batches.
    num_threads: threads that make batches ahead; 0: none, in the caller's.
    prefetch: batches made ahead.
  """

  pack: bool = False
  batch_events: int = 32_768
  row_multiple: int = 1
  history_buckets: tuple[int, ...] = ()
  candidate_buckets: tuple[int, ...] = ()
  auto_buckets: int = 4
  seed: int = 0
  num_threads: int = 2
  prefetch: int = 8

  def __post_init__(self):
    dicts.normalize(self)
    for field in ('history_buckets', 'candidate_buckets'):
      bucket_sizes.check(f'pipeline: {field}', getattr(self, field))
    wide, tall = len(self.history_buckets), len(self.candidate_buckets)
    if self.pack and wide != tall:
      raise ValueError(
        f'pipeline: history_buckets={self.history_buckets} and '
        f'candidate_buckets={self.candidate_buckets} must be as many with '
        'pack=True, which takes their pairs as shapes; or leave both empty'
      )
    for field, least in (
      ('batch_events', 1),
      ('row_multiple', 1),
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
    num_rows: rows of a batch over all hosts, without the padding to devices.
    rows: int64 `[n]`, the rows in the bucket.
    bins: of packed rows, int64 `[bins + 1]`: `rows[bins[i]:bins[i + 1]]` share
      a row of a batch. None: each row has one.
  """

  num_events: int
  num_candidates: int
  num_rows: int
  rows: np.ndarray
  bins: np.ndarray | None = None

  @property
  def units(self) -> np.ndarray:
    """What a batch has `num_rows` of: rows, or the numbers of bins."""
    return self.rows if self.bins is None else np.arange(len(self.bins) - 1)

  @property
  def num_batches(self) -> int:
    """Batches an epoch."""
    return -(-len(self.units) // self.num_rows)

  def batch(
    self, rows: RowSource, units: np.ndarray, num_rows: int
  ) -> RankingBatch:
    """A batch of some units, padded to `num_rows`."""
    pieces = None
    if self.bins is not None:
      first, pieces = self.bins[units], np.diff(self.bins)[units]
      place = np.cumsum(pieces) - pieces
      index = np.arange(pieces.sum()) + np.repeat(first - place, pieces)
      units = self.rows[index]
    return rows.batch(
      units,
      num_rows=num_rows,
      num_events=self.num_events,
      num_candidates=self.num_candidates,
      pieces=pieces,
    )


def make_buckets(rows: RowSource, config: PipelineConfig) -> list[Bucket]:
  """The buckets that hold a row, each row in the smallest that it fits.

  Raises:
    ValueError: a row is larger than the largest bucket, or there is no row.
  """
  if not len(rows):
    raise ValueError('there are no rows; the split has no events')
  multiple = config.row_multiple
  length, count = rows.history_lengths, rows.candidate_counts
  if config.pack:
    return _packed(rows, length, count, config, multiple)
  if not config.history_buckets and not config.candidate_buckets:
    return _of_shapes(length, count, config, multiple)
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
  return [
    _bucket(wide, tall, (row_l == wide) & (row_c == tall), config, multiple)
    for wide, tall in np.unique(np.stack([row_l, row_c], 1), axis=0).tolist()
  ]


def _of_shapes(length, count, config, multiple: int) -> list[Bucket]:
  """The buckets of shapes that are made up."""
  into = bucketing.shapes(length, count, config.auto_buckets)
  place = bucketing.smallest(length, count, into)
  return [
    _bucket(*shape, place == i, config, multiple)
    for i, shape in enumerate(into)
  ]


def _bucket(
  num_events: int, num_candidates: int, held: np.ndarray, config, multiple: int
) -> Bucket:
  """The bucket of one shape, of the rows that it holds."""
  fits = config.batch_events // (num_events + num_candidates) // multiple
  num_rows = max(1, fits) * multiple
  return Bucket(num_events, num_candidates, num_rows, np.flatnonzero(held))


def _packed(
  rows: RowSource, length, count, config, multiple: int
) -> list[Bucket]:
  """The buckets of packed rows."""
  into = list(
    zip(config.history_buckets, config.candidate_buckets, strict=True)
  )
  if into:
    for sizes, field, what in (
      (length, 'history_buckets', 'events of history'),
      (count, 'candidate_buckets', 'candidates'),
    ):
      _fit(rows, sizes, np.array(getattr(config, field)), field, what)
  else:
    # Smaller ones than a batch holds 8 of for each of `row_multiple`.
    most = config.batch_events // (8 * multiple)
    into = packing.shapes(length, count, most=most, limit=config.auto_buckets)
  buckets = []
  for part in packing.pack(
    length, count, into, np.random.default_rng(config.seed)
  ):
    number = len(part.offsets) - 1
    fits = config.batch_events // (part.num_events + part.num_candidates)
    fits = max(1, fits // multiple)
    # Batches of about one size, rather than a last one that is padding.
    share = -(-number // multiple)
    share = -(-share // -(-share // fits))
    buckets.append(
      Bucket(
        part.num_events,
        part.num_candidates,
        share * multiple,
        part.rows,
        part.offsets,
      )
    )
  return buckets


class BatchIterator(Iterator[RankingBatch]):
  """Batches of one host, with a position that can be saved.

  Attributes:
    buckets: the shapes that batches have.
    batches_per_epoch: batches, of this and of every other host.
    padding: the share of a batch's rows that are there for the number of
      devices, in the bucket where it is largest.
  """

  def __init__(
    self,
    batches: _Batches,
    rows: RowSource,
    config: PipelineConfig,
    *,
    row_multiple: int,
    shard_index: int,
    shard_count: int,
  ):
    if not 0 <= shard_index < shard_count:
      raise ValueError(
        f'shard_index={shard_index} must be in [0, shard_count={shard_count})'
      )
    if row_multiple < 1:
      raise ValueError(f'row_multiple={row_multiple} must be >= 1')
    multiple = math.lcm(row_multiple, shard_count)
    self.buckets = list(batches.buckets)
    self.batches_per_epoch = batches.batches_per_epoch
    self.padding = max(
      1 - b.num_rows / _round_up(b.num_rows, multiple) for b in self.buckets
    )
    self._batches, self._next = batches, 0
    self._order = _order(rows, self.buckets, config)
    load = _Load(rows, batches.buckets, multiple, shard_index, shard_count)
    self._load = load
    self._dataset = grain.MapDataset.source(batches).map(load)
    self._options = grain.ReadOptions(
      num_threads=config.num_threads,
      prefetch_buffer_size=config.prefetch if config.num_threads else 0,
    )
    self._iterator = self._start()

  def __next__(self) -> RankingBatch:
    batch = next(self._iterator)
    self._next += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position, to be kept as JSON: that after the last batch given.

    Returns:
      `epoch`; `rows`, how many of it were given, by all hosts together; and
      `order`, which says of what order of batches that is.
    """
    epoch, place = divmod(self._next, self.batches_per_epoch)
    rows = int(self._batches.rows_before(epoch)[place])
    return {'epoch': epoch, 'rows': rows, 'order': self._order}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a position, such that the next batch is the one after it.

    Args:
      state: of `get_state`, of any number of hosts and devices.

    Raises:
      ValueError: the state is of other rows, buckets, batch sizes or seed.
    """
    if state.get('order') != self._order:
      raise ValueError(
        'the saved position in the data is of another order of batches: the '
        'rows, the seed, batch_events, row_multiple or the buckets have '
        'changed, or it is of an earlier version of histjax; restore them, or '
        'start a new run'
      )
    epoch, rows = state['epoch'], state['rows']
    before = self._batches.rows_before(epoch)[:-1]
    place = int(np.searchsorted(before, rows))
    if place == len(before) or before[place] != rows:
      raise ValueError(
        f'the saved position in the data, after {rows} rows of epoch {epoch}, '
        'is between two batches; it was changed: restore the checkpoint'
      )
    self._iterator.close()
    self._next = epoch * self.batches_per_epoch + place
    self._iterator = self._start()

  def whole(self, number: int) -> RankingBatch:
    """A batch, made again, with the rows of all hosts.

    Args:
      number: which one, from 0 on, of all epochs, wherever the position is.
    """
    load = dataclasses.replace(self._load, shard_index=0, shard_count=1)
    return load(self._batches[number])

  def close(self) -> None:
    """Ends the threads. The iterator cannot be used any more."""
    self._iterator.close()

  def _start(self) -> Any:
    rest = self._dataset.slice(slice(self._next, None))
    return iter(rest.to_iter_dataset(self._options))


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
    row_multiple: rows of a batch over all hosts are padded to a multiple of
      it, the number of devices.
    shard_index: this host.
    shard_count: hosts; each yields the same number of batches, of the same
      shapes, with `1 / shard_count` of the rows of each.
    num_epochs: None: without end.

  Returns:
    An iterator over `RankingBatch` of NumPy arrays.

  Raises:
    ValueError: a row does not fit the buckets, or an argument is bad.
  """
  if num_epochs is not None and num_epochs < 1:
    raise ValueError(f'num_epochs={num_epochs} must be >= 1, or None')
  buckets = tuple(make_buckets(rows, config))
  return BatchIterator(
    _Batches(buckets, config.seed, num_epochs or _ENDLESS),
    rows,
    config,
    row_multiple=row_multiple,
    shard_index=shard_index,
    shard_count=shard_count,
  )


def eval_batches(
  rows: RowSource,
  config: PipelineConfig,
  *,
  row_multiple: int = 1,
  shard_index: int = 0,
  shard_count: int = 1,
) -> BatchIterator:
  """Every row once, in order, bucket by bucket.

  Args:
    rows: of a split.
    config: as of training; batches have its sizes.
    row_multiple: the rows of a batch are padded to a multiple of it.
    shard_index: which part of each batch is returned.
    shard_count: how many parts there are.

  Raises:
    ValueError: there are no rows, or one is larger than the largest bucket.
  """
  return BatchIterator(
    _Batches(tuple(make_buckets(rows, config)), None, 1),
    rows,
    config,
    row_multiple=row_multiple,
    shard_index=shard_index,
    shard_count=shard_count,
  )


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

  @functools.cached_property
  def batches_per_epoch(self) -> int:
    """The same in every epoch."""
    return sum(b.num_batches for b in self.buckets)

  def rows_before(self, epoch: int) -> np.ndarray:
    """int64 `[batches + 1]`: rows of an epoch before each batch, and all."""
    order, _ = _shuffled(self, epoch)
    counts = [
      min(b.num_rows, len(b.units) - i * b.num_rows)
      for b, i in ((self.buckets[number], i) for number, i in order)
    ]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

  def __len__(self) -> int:
    return self.num_epochs * self.batches_per_epoch

  def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
    epoch, place = divmod(index, self.batches_per_epoch)
    order, rows = _shuffled(self, epoch)
    number, batch = order[place]
    start = batch * self.buckets[number].num_rows
    return number, rows[number][start : start + self.buckets[number].num_rows]


@functools.lru_cache(maxsize=4)  # Threads work on the end and the next start.
def _shuffled(batches: _Batches, epoch: int):
  """`[(bucket, batch)]` and each bucket's rows, in the order of an epoch."""
  buckets, seed = batches.buckets, batches.seed
  order = [(n, i) for n, b in enumerate(buckets) for i in range(b.num_batches)]
  rows = [bucket.units for bucket in buckets]
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
  multiple: int
  shard_index: int
  shard_count: int

  def __call__(self, batch: tuple[int, np.ndarray]) -> RankingBatch:
    number, indices = batch
    bucket = self.buckets[number]
    share = _round_up(bucket.num_rows, self.multiple) // self.shard_count
    start = self.shard_index * share
    return bucket.batch(self.rows, indices[start : start + share], share)


def _order(
  rows: RowSource, buckets: list[Bucket], config: PipelineConfig
) -> str:
  """Identifies the order of batches that a position counts in."""
  shapes = [(b.num_events, b.num_candidates, b.num_rows) for b in buckets]
  digest = hashlib.sha256(json.dumps([3, config.seed, shapes]).encode())
  packed = [b.bins for b in buckets if b.bins is not None]
  for array in (*rows.order(), *(b.rows for b in buckets), *packed):
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


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
