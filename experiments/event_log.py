"""A synthetic event log of any size, as Parquet files: what `generate` writes.

    item ~ Zipf(item_exponent), user ~ Zipf(user_exponent)

both cut off at their number, drawn by inversion of the continuous density. An
event is a click with the probability

    sigmoid(bias + quality_item + taste [kind_item = taste_user])

of 16 kinds of items and tastes of users, so that histories tell something.
File i is drawn from the seed and i alone, in order of time, and comes before
file i + 1: a user's events are spread over all files.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import pathlib

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from histjax import config as config_lib
from histjax import mixing
from histjax.data import workers
from histjax.progress import Progress

_KEY = b'histjax.event_log'
_START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_KINDS = 16
_COUNTRIES = 50


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """The size of a log.

  Attributes:
    num_events: of all files.
    num_users: users who may have events.
    num_items: items that may be shown.
    num_files: each with as many events, but for one more or less.
    item_exponent: of the items' Zipf distribution, >= 0.
    user_exponent: of the users', >= 0; 0.5 is heavy-tailed: of n users the
      most active has 1 / (2 sqrt(n)) of all events.
    days: that the log spans.
    hive: whether files lie in folders `day=<date>`.
    seed: of everything drawn.
  """

  num_events: int
  num_users: int
  num_items: int
  num_files: int = 1
  item_exponent: float = 1.0
  user_exponent: float = 0.5
  days: int = 30
  hive: bool = False
  seed: int = 0

  def __post_init__(self):
    for field in ('num_events', 'num_users', 'num_items', 'num_files', 'days'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be >= 1')
    if max(self.num_users, self.num_items) >= 2**32:
      raise ValueError(
        f'num_users={self.num_users} and num_items={self.num_items} must be '
        'below 2**32'
      )
    if self.num_files > self.num_events:
      raise ValueError(
        f'num_files={self.num_files} must be at most num_events='
        f'{self.num_events}: a file has an event'
      )
    for field in ('item_exponent', 'user_exponent', 'seed'):
      if not 0 <= getattr(self, field) < math.inf:
        raise ValueError(
          f'{field}={getattr(self, field)} must be >= 0 and finite'
        )

  @property
  def digest(self) -> str:
    """Of all fields."""
    text = json.dumps(config_lib.to_dict(self), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def bounds(self, file: int) -> tuple[int, int]:
    """The numbers of a file's first event and of the one after its last."""
    n, files = self.num_events, self.num_files
    return n * file // files, n * (file + 1) // files


def draw(config: LogConfig, file: int) -> pa.Table:
  """One file: user, time, country, item, price, clicked."""
  begin, end = config.bounds(file)
  rng = np.random.default_rng((config.seed, file))
  size = end - begin
  user = _zipf(rng, config.num_users, config.user_exponent, size)
  item = _zipf(rng, config.num_items, config.item_exponent, size)
  # What is known of each does not depend on how often it comes.
  of_user, of_item = (_mixed(x, config.seed) for x in (user, item))
  logit = 2 * _unit(of_item) - 2.0
  logit += 1.5 * (of_item % _KINDS == of_user % _KINDS)
  span = config.days * 86_400_000
  first, last = (span * x // config.num_events for x in (begin, end))
  time = np.sort(rng.integers(first, max(last, first + 1), size))
  time += int(_START.timestamp() * 1000)
  return pa.table(
    {
      'user': _identity(user),
      'time': pa.array(time).cast(pa.timestamp('ms', 'UTC')),
      'country': (of_user // _KINDS % _COUNTRIES).astype(np.int64),
      'item': _identity(item),
      'price': np.round(np.exp(4 * _unit(of_item // _KINDS)), 2),
      'clicked': (rng.random(size) < 1 / (1 + np.exp(-logit))).astype(np.int8),
    }
  )


def write(
  folder: pathlib.Path,
  config: LogConfig,
  *,
  num_workers: int = 1,
  progress: Progress | None = None,
) -> int:
  """Writes the files that are missing, each whole or not at all.

  Args:
    folder: of the log; may be absent.
    config: of it.
    num_workers: processes.
    progress: is told.

  Returns:
    How many files were there.

  Raises:
    ValueError: a file there is of another config, or none of this log's.
  """
  progress = progress or Progress()
  paths = [_path(folder, config, file) for file in range(config.num_files)]
  there = [file for file, path in enumerate(paths) if _is_done(path, config)]
  others = set(folder.rglob('*.parquet')) - set(paths)
  if others:
    raise ValueError(
      f'{min(others)} is no file of this log; name another folder'
    )
  done = before = sum(np.diff(config.bounds(file))[0] for file in there)
  missing = sorted(set(range(config.num_files)) - set(there))
  task = functools.partial(_write, folder, config)
  with workers.Pool(num_workers) as pool:
    for file, _ in pool.each(task, missing):
      done += np.diff(config.bounds(file))[0]
      progress.tell(
        'writing', int(done), config.num_events, 'events', int(before)
      )
  return len(there)


def _write(folder: pathlib.Path, config: LogConfig, file: int) -> None:
  path = _path(folder, config, file)
  path.parent.mkdir(parents=True, exist_ok=True)
  table = draw(config, file)
  table = table.replace_schema_metadata({_KEY: config.digest})
  temporary = path.with_name(f'.{path.name}.tmp')
  parquet.write_table(table, temporary, compression='zstd')
  os.replace(temporary, path)


def _path(folder: pathlib.Path, config: LogConfig, file: int) -> pathlib.Path:
  name = f'events-{file:06d}.parquet'
  if not config.hive:
    return folder / name
  share = config.bounds(file)[0] / config.num_events
  day = _START.date() + datetime.timedelta(days=int(share * config.days))
  return folder / f'day={day}' / name


def _is_done(path: pathlib.Path, config: LogConfig) -> bool:
  if not path.exists():
    return False
  found = (parquet.read_schema(path).metadata or {}).get(_KEY)
  if found != config.digest.encode():
    raise ValueError(
      f'{path} is of a log with another config; name another folder, or '
      'delete it'
    )
  return True


def _zipf(rng, count: int, exponent: float, size: int) -> np.ndarray:
  """Ranks from 0, uint64 `[size]`, p(rank) ~ (rank + 1) ** -exponent."""
  u = rng.random(size)
  if exponent == 1:
    x = np.power(count + 1.0, u)
  else:
    power = 1 - exponent
    x = (1 + u * ((count + 1.0) ** power - 1)) ** (1 / power)
  return np.clip(x.astype(np.int64) - 1, 0, count - 1).astype(np.uint64)


def _identity(rank: np.ndarray) -> np.ndarray:
  """An id of each rank, below 2**32, in no order of ranks."""
  return (rank * np.uint64(2654435761) % np.uint64(2**32)).astype(np.int64)


def _mixed(rank: np.ndarray, seed: int) -> np.ndarray:
  return mixing.mix(rank ^ mixing.mix(np.array([seed + 1], np.uint64)))


def _unit(mixed: np.ndarray) -> np.ndarray:
  """In [0, 1)."""
  return (mixed >> np.uint64(11)) * 2.0**-53
