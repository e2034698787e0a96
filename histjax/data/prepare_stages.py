"""The steps of `prepare`, each for one file or one shard of users.

A step writes its result whole or not at all, and is done if it is there. So any
process on any machine can take any step again, in any order within its stage.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordWriter

from histjax import features as features_lib
from histjax.data import atomic, columns, datasets, files, prepared
from histjax.data import events as events_lib
from histjax.data import rows as rows_lib
from histjax.data.events import EventLog
from histjax.data.joins import Table
from histjax.data.parts import Columns
from histjax.data.records import RecordFormat
from histjax.data.rows import Rows
from histjax.data.runs import Runs, Values, read_parts
from histjax.features import Counts, base
from histjax.schema import Schema

DONE = 'done.json'
_MAX_ROWS = 2**17
"""Of a file, read at once."""
_WRITER = 'group_size:1,zstd:1'


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
    return self.folder / '_work'

  def spill(self, file: int) -> pathlib.Path:
    """Of a file's events, by shard."""
    return self.work / f'file-{file:06d}'

  def fitting(self, shard: int) -> pathlib.Path:
    """Of what is learnt of a shard."""
    return self.work / f'fit-{shard:05d}'

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
      type(f).collect is not base.DerivedFeature.collect
      or type(f).counted is not base.DerivedFeature.counted
      for f in self.data.features
    )

  @property
  def needs_order(self) -> bool:
    """Whether training events are counted in an order."""
    return any(
      type(f).counted is not base.DerivedFeature.counted
      for f in self.data.features
    )


def table(schema: Schema) -> Table:
  """What is read of a log."""
  return Table(
    schema, schema.logged, time=True, request=bool(schema.request), labels=True
  )


def spill(job: Job, file: int) -> None:
  """Checks and encodes a file's events, and cuts them by user.

  Raises:
    ValueError: a value is missing or bad; the message says where.
  """
  schema, path = job.source.schema, job.files[file]
  sha256 = digest(path)
  counts = np.zeros(job.num_shards, np.int64)
  kinds: dict[str, bool] = {}
  types: list[np.dtype] = []
  with atomic.folder(job.spill(file)) as folder:
    runs = Runs(folder, 'log', _bounds(job.num_shards), job.run_bytes)
    try:
      for some in files.stream(
        [path], table(schema).columns, schema, max_rows=_MAX_ROWS
      ):
        keys, place = columns.digest_keys(some, schema.user)
        arrays, is_timestamp = table(schema).encode(some)
        kinds[some.where(0)] = is_timestamp
        columns.check_clocks(schema.time, kinds)
        types.append(arrays['time'].dtype)
        rows: dict[str, Values] = {'key': keys, **arrays}
        if job.source.require_sorted:
          rows['row'] = some.first[0] + np.arange(len(some))
        shard = runs.add(rows, place)
        counts += np.bincount(shard, minlength=job.num_shards)
    except files.NoEvents:
      pass
    runs.close()
    atomic.write_json(
      folder / DONE,
      {
        'sha256': sha256,
        'counts': counts.tolist(),
        'time_type': np.result_type(*types).str if types else '',
        'is_timestamp': next(iter(kinds.values()), None),
      },
    )


def digest(path: str) -> str:
  """SHA-256 of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@functools.lru_cache(maxsize=4)
def _bounds(num_shards: int) -> np.ndarray:
  """uint64 `[shards]`, the first digest of each."""
  return np.array([2**64 * i // num_shards for i in range(num_shards)], 'u8')


def read_log(job: Job, shard: int) -> EventLog | None:
  """A shard's users' events, as `EventLog` has them; None: there are none.

  Raises:
    ValueError: times decrease, and `require_sorted` is set.
  """
  schema = job.source.schema
  parts: list[dict[str, Any]] = []
  sources = []
  for file in range(len(job.files)):
    for rows in read_parts(job.spill(file), 'log', shard):
      if len(rows['key']):
        parts.append(rows)
        sources.append(job.files[file])
  if not parts:
    return None
  keys_of = Columns(
    tuple(pa.table({schema.user: rows.pop('key')}) for rows in parts),
    tuple(sources),
    dataclasses.replace(schema, null_values=(), column_types=()),
  )
  user, keys = columns.encode_keys(keys_of, schema.user)

  def joined(name: str) -> np.ndarray:
    return np.concatenate([rows.pop(name) for rows in parts])

  time = joined('time').astype(job.time_type, copy=False)
  order = np.lexsort((time, user))
  if job.source.require_sorted:
    _check_sorted(schema, parts, sources, user, keys, time)
  kinds = {'feature': schema.logged, 'label': schema.tasks}
  found = {
    kind: {f.name: joined(f'{kind}/{f.name}')[order] for f in group}
    for kind, group in kinds.items()
  }
  log = EventLog(
    schema=schema,
    keys=keys,
    user=user[order].astype(np.int32),
    time=time[order],
    is_timestamp=job.is_timestamp,
    features=found['feature'],
    labels=found['label'],
    request=joined('request')[order] if schema.request else None,
    extra={},
  )
  return log.with_tasks(job.data.tasks)


def _check_sorted(schema, parts, sources, user, keys, time) -> None:
  rows = [p.pop('row') for p in parts]
  part = np.repeat(np.arange(len(rows)), [len(r) for r in rows])

  def fail(event: int, problem: str):
    Columns(
      (pa.table({schema.time: [0]}),),
      (sources[part[event]],),
      schema,
      (int(np.concatenate(rows)[event]),),
    ).fail(schema.time, 0, time[event].item(), problem)

  events_lib.check_sorted(user, keys, time, fail)


def collect(job: Job, shard: int) -> None:
  """Notes what a shard's training events tell of other users' rows."""
  log = read_log(job, shard)
  with atomic.folder(job.fitting(shard)) as folder:
    found: dict[str, np.ndarray] = {}
    if log is not None:
      masks = job.source.split.masks(log)
      events = log.events()
      found = features_lib.collect(job.data.features, events, masks['train'])
      found = {f'state/{name}': values for name, values in found.items()}
      for split, mask in masks.items():
        if mask.any():
          found[f'first_time/{split}'] = log.time[mask].min()
      if job.needs_order:
        _write_order(job, folder, events, masks['train'])
    np.savez(folder / 'found.npz', **found)  # type: ignore[arg-type]


def _write_order(job: Job, folder, events: base.Events, train) -> None:
  """The training events by their rank in the one order of all."""
  rank = base.ranks(events)[train]
  label = events.labels[events.schema.tasks[0].name][train]
  bounds = _bounds(job.num_ranges)
  counted = features_lib.counted(job.data.features, events)
  for k, values in enumerate(counted.values()):
    runs = Runs(folder, f'order{k}', bounds, 2**62)
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


def count_before(job: Job, tell) -> None:
  """Counts, for each training event, those of all users that come before it.

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


def _read_before(job: Job, shard: int, size: int) -> dict[str, Counts]:
  found = {}
  for k, name in enumerate(_counted_names(job)):
    counts = Counts(np.zeros(size), np.zeros(size))
    for rows in read_parts(job.before, f'before{k}', shard):
      counts.events[rows['number']] = rows['events']
      counts.positive[rows['number']] = rows['positive']
    found[name] = counts
  return found


def write_shard(job: Job, shard: int) -> None:
  """Makes the rows of a shard's users and writes them.

  Raises:
    ValueError: rows cannot be made as asked; the message says why.
  """
  log, fitted = read_log(job, shard), features_lib.load(job.work)
  first_times = json.loads((job.work / 'first_times.json').read_text())
  arrays: dict[str, np.ndarray] = {'keys': np.zeros(0, np.int64)}
  labels: dict[str, dict[str, list[int]]] = {}
  told: dict[str, dict[str, Any]] = {}
  if log is not None:
    keys = log.keys
    arrays['keys'] = keys if keys.dtype.kind in 'iu' else keys.astype(str)
    masks = job.source.split.masks(log)
    schema = datasets.model_schema(log.schema, fitted, job.data.without)
    log = dataclasses.replace(log, schema=schema)
  for split in prepared.SPLITS:
    rows = None
    if log is not None:
      rows = _rows(job, shard, log, masks, fitted, split, first_times)
    path = job.path(split, shard, 'array_record')
    _write_records(path, rows)
    arrays |= _index(split, rows)
    labels[split] = _labels(job, rows)
    told[path.name] = {'rows': 0 if rows is None else len(rows)}
  index = job.path('index', shard, 'npz')
  atomic.write(index, functools.partial(_save, arrays))
  told[index.name] = {}
  for name, values in told.items():
    path = job.folder / name
    values |= {'size': path.stat().st_size, 'sha256': digest(str(path))}
  atomic.write_json(
    job.path('shard', shard, 'json'),
    {
      'files': told,
      'labels': labels,
      'users': len(arrays['keys']),
      'events': 0 if log is None else len(log),
    },
  )


def _rows(job, shard, log, masks, fitted, split, first_times) -> Rows:
  data, train = job.data, masks['train']
  config = data.rows if split == 'train' else data.eval_rows or data.rows
  first_time = first_times.get(split)
  if split != 'train':
    return rows_lib.make_rows(
      log, masks[split], config, fitted, first_time=first_time
    )
  before = None
  if job.needs_order:
    before = _read_before(job, shard, int(train.sum()))
  return rows_lib.make_rows(
    log,
    masks[split],
    config,
    fitted,
    train=train,
    before=before,
    first_time=first_time,
  )


def _write_records(path: pathlib.Path, rows: Rows | None) -> None:
  def write(temporary: pathlib.Path) -> None:
    writer = ArrayRecordWriter(str(temporary), _WRITER)
    if rows is not None:
      for record in RecordFormat(rows.schema).encode(rows):
        writer.write(record)
    writer.close()

  atomic.write(path, write)


def _index(split: str, rows: Rows | None) -> dict[str, np.ndarray]:
  none = np.zeros(0, np.int32)
  return {
    f'{split}/lengths': none if rows is None else rows.history_lengths,
    f'{split}/counts': none if rows is None else rows.candidate_counts,
  }


def _labels(job: Job, rows: Rows | None) -> dict[str, list[int]]:
  schema = job.source.schema
  if job.data.tasks:
    schema = schema.with_tasks(job.data.tasks)
  return {
    t.name: [0, 0, 0] if rows is None else list(rows.label_summary(t.name))
    for t in schema.tasks
  }


def _save(arrays: dict[str, np.ndarray], path: pathlib.Path) -> None:
  with open(path, 'wb') as file:
    np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
