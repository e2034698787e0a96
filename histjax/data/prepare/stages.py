"""The steps of `prepare`, each for one file or one shard of users.

A step writes its result whole or not at all, and is done if it is there. So any
process on any machine can take any step again, in any order within its stage.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordWriter

from histjax import features as features_lib
from histjax import vocabulary
from histjax.data import atomic, columns, datasets, files, prepared
from histjax.data import events as events_lib
from histjax.data import rows as rows_lib
from histjax.data.events import EventLog
from histjax.data.joins import Table
from histjax.data.parts import Columns
from histjax.data.prepare import order as order_lib
from histjax.data.prepare.job import DONE, Job, bounds, digest
from histjax.data.records import RecordFormat
from histjax.data.rows import Rows
from histjax.data.runs import Runs, Values, read_parts
from histjax.features import FittedFeatures
from histjax.schema import Schema, categorical

_MAX_ROWS = 2**17
"""Of a file, read at once."""
_WRITER = 'group_size:1,zstd:1'


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
    runs = Runs(folder, 'log', bounds(job.num_shards), job.run_bytes)
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


def count_ids(job: Job, shard: int) -> None:
  """Counts the ids of a shard's events, of features with a vocabulary."""
  log = _read_digests(job, shard)
  with atomic.folder(job.ids(shard)) as folder:
    found: vocabulary.Counted = {}
    if log is not None:
      masks = job.source.split.masks(log)
      found = vocabulary.count(log.schema, log.features, masks)
    np.savez(folder / 'found.npz', **found)  # type: ignore[arg-type]


def read_log(job: Job, shard: int) -> EventLog | None:
  """A shard's users' events, as `EventLog` has them; None: there are none.

  Raises:
    ValueError: times decrease, and `require_sorted` is set.
  """
  log = _read_digests(job, shard)
  if log is None or not vocabulary.of(log.schema):
    return log
  known = features_lib.load(job.vocabularies).vocabularies
  return log.with_vocabularies(known)


def _read_digests(job: Job, shard: int) -> EventLog | None:
  """As `read_log`, with digests of ids that have a vocabulary.

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
        order_lib.write(job, folder, events, masks['train'])
    np.savez(folder / 'found.npz', **found)  # type: ignore[arg-type]


def write_shard(job: Job, shard: int) -> None:
  """Makes the rows of a shard's users and writes them.

  Raises:
    ValueError: rows cannot be made as asked; the message says why.
  """
  log, fitted = read_log(job, shard), features_lib.load(job.work)
  first_times = json.loads((job.work / 'first_times.json').read_text())
  keys = np.zeros(0, np.int64)
  labels: dict[str, dict[str, list[int]]] = {}
  told: dict[str, dict[str, Any]] = {}
  if log is not None:
    keys = log.keys
    masks = job.source.split.masks(log)
    schema = datasets.model_schema(log.schema, fitted, job.data.without)
    log = dataclasses.replace(log, schema=schema)
  arrays, items = prepared.pack_keys(keys), _items(job, fitted)
  if log is not None:
    atomic.write(
      job.occupied(shard), functools.partial(_save, _occupied(job, log))
    )
  for split in prepared.SPLITS:
    rows = None
    if log is not None:
      rows = _rows(job, shard, log, masks, fitted, split, first_times)
    path = job.path(split, shard, 'array_record')
    _write_records(path, rows)
    arrays |= _index(split, rows, len(keys), items)
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
      'users': len(keys),
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
    before = order_lib.read(job, shard, int(train.sum()))
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
    records = () if rows is None else RecordFormat(rows.schema).encode(rows)
    try:
      writer = ArrayRecordWriter(str(temporary), _WRITER)
      for record in records:
        writer.write(record)
      writer.close()
    except RuntimeError as error:  # What it makes of the system's errors.
      raise OSError(str(error)) from error

  atomic.write(path, write)


def _occupied(job: Job, log: EventLog) -> dict[str, np.ndarray]:
  """Of each hashed feature the rows that some id of the log has."""
  found = {}
  for feature in categorical(job.source.schema.logged):
    if feature.ids == 'hash':
      # A prefix: NumPy's own arguments are named 'file' and 'allow_pickle'.
      found[f'ids/{feature.name}'] = np.unique(log.features[feature.name])
  return found


def _items(job: Job, fitted: FittedFeatures) -> list[str]:
  """The categorical features of items that rows have."""
  schema = datasets.model_schema(job.source.schema, fitted, job.data.without)
  return [f.name for f in categorical(schema.item)]


def _index(
  split: str, rows: Rows | None, num_users: int, items: list[str]
) -> dict[str, np.ndarray]:
  none = np.zeros(0, np.int32)
  users = np.zeros(num_users, bool) if rows is None else rows.seen_users()
  return {
    f'{split}/lengths': none if rows is None else rows.history_lengths,
    f'{split}/counts': none if rows is None else rows.candidate_counts,
    f'{split}/users': users,
    **{
      f'{split}/ids/{name}': none if rows is None else rows.seen_ids(name)
      for name in items
    },
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
