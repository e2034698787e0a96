"""Counts of training events in one order of all users; see `features.Rates`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np

from histjax import features as features_lib
from histjax.data import atomic
from histjax.data.prepare.job import Job, bounds
from histjax.data.runs import Runs, read_parts
from histjax.features import Counts, base


def write(
  job: Job, folder: pathlib.Path, events: base.Events, train: np.ndarray
) -> None:
  """Writes a shard's training events by their rank in the one order of all.

  Args:
    job: what is done.
    folder: to write to.
    events: of the shard.
    train: bool `[n]`.
  """
  rank = base.ranks(events)[train]
  label = events.labels[events.schema.tasks[0].name][train]
  ranges = bounds(job.num_ranges)
  counted = features_lib.counted(job.data.features, events)
  for k, values in enumerate(counted.values()):
    runs = Runs(folder, f'order{k}', ranges, 2**62)
    runs.add(
      {
        'rank': rank,
        'value': values[train],
        'label': label,
        'number': np.arange(len(rank)),
      },
      rank,
    )
    runs.close()


def count_before(job: Job, tell: Callable[[int, int], None]) -> None:
  """Counts, for each training event, those of all users that come before it.

  Ranges of ranks are gone through in order, so that what is in memory is one
  range and a number for each value, whatever value is how frequent.

  Args:
    job: whose shards have been through `collect`.
    tell: is told how many ranges are done, and of how many.
  """
  shards = range(job.num_shards)
  names = _counted_names(job)
  done, total = 0, len(names) * job.num_ranges
  with atomic.folder(job.before) as folder:
    for k in range(len(names)):
      known, sums = np.zeros(0, np.int64), np.zeros((2, 0))
      for r in range(job.num_ranges):
        parts = [
          (shard, rows)
          for shard in shards
          for rows in read_parts(job.fitting(shard), f'order{k}', r)
          if len(rows['rank'])
        ]
        done += 1
        if parts:
          known, sums = _count_range(
            folder, f'before{k}-{r:06d}', job, parts, known, sums
          )
        tell(done, total)


def read(job: Job, shard: int, size: int) -> dict[str, Counts]:
  """What comes before each of a shard's `size` training events."""
  found = {}
  for k, name in enumerate(_counted_names(job)):
    counts = Counts(np.zeros(size), np.zeros(size))
    for rows in read_parts(job.before, f'before{k}', shard):
      counts.events[rows['number']] = rows['events']
      counts.positive[rows['number']] = rows['positive']
    found[name] = counts
  return found


def _count_range(folder, name, job: Job, parts, known, sums):
  """Counts within a range of ranks, after what is known of those before."""

  def joined(what: str) -> np.ndarray:
    return np.concatenate([rows[what] for _, rows in parts])

  value, label = joined('value'), joined('label').astype(np.float64)
  counts = base.count_before(value, joined('rank'), label)
  merged = np.union1d(known, value)
  wider = np.zeros((2, len(merged)))
  wider[:, np.searchsorted(merged, known)] = sums
  place = np.searchsorted(merged, value)
  shard = np.repeat([s for s, _ in parts], [len(r['rank']) for _, r in parts])
  runs = Runs(folder, name, np.arange(job.num_shards), 2**62)
  runs.add(
    {
      'number': joined('number'),
      'events': wider[0][place] + counts.events,
      'positive': wider[1][place] + counts.positive,
    },
    shard,
  )
  runs.close()
  wider[0] += np.bincount(place, minlength=len(merged))
  wider[1] += np.bincount(place, label, len(merged))
  return merged, wider


def _counted_names(job: Job) -> list[str]:
  schema, none = job.source.schema, np.zeros(0, np.int64)
  events = base.Events(
    schema=schema,
    user=none.astype(np.uint64),
    begin=none,
    visible=none,
    time=none,
    is_timestamp=job.is_timestamp,
    features={f.name: none.astype(np.int32) for f in schema.logged},
    labels={t.name: none.astype(np.float32) for t in schema.tasks},
  )
  return list(features_lib.counted(job.data.features, events))
