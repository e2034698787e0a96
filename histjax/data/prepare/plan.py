"""Checks a job before any work, cuts it, and knows it again."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from histjax import config as config_lib
from histjax import features as features_lib
from histjax import vocabulary
from histjax.data import (
  atomic,
  datasets,
  files,
  grouping,
  locks,
  prepared,
  workers,
)
from histjax.data.events import EventLog, columns_of
from histjax.data.parts import Columns
from histjax.data.prepare.engines import Local, Ray
from histjax.data.prepare.job import DONE, WORK, Job, digest
from histjax.schema import Schema

MANIFEST = 'manifest.json'
_LEFT = re.compile(r'\.(?:manifest\.json\.[0-9]+\.tmp|probe-[0-9]+)')
"""What a process begins with."""
_PROCESS = 0.35 * 2**30
"""Bytes of a process with the library imported."""
_EVENT = 300
"""Bytes of an event while a shard's rows are made, without its features."""
_FEATURE = 24
"""And for each feature and label."""
_FILL = 0.6
"""Of the memory that a shard is planned to take: users are not all alike."""
_FOLDERS = 'columns_of_folders'
_HEAD = 64
"""Rows of each file that are looked at before any work."""


@dataclasses.dataclass(frozen=True)
class Options:
  """How the work is cut.

  Attributes:
    memory: bytes that all processes together may take.
    num_shards: of users; None: as many as memory asks for.
  """

  memory: float = 4 * 2.0**30
  num_shards: int | None = None

  def __post_init__(self):
    if not self.memory > 0:
      raise ValueError(f'memory={self.memory} must be > 0')
    if self.num_shards is not None and not 1 <= self.num_shards < 100_000:
      raise ValueError(
        f'num_shards={self.num_shards} must be from 1 to 99999, or None'
      )


def check(config: datasets.DataConfig) -> list[pathlib.Path]:
  """The files; raises a ValueError for what can be found wrong at once."""
  source = config.source
  if not isinstance(source, datasets.Events):
    raise ValueError(
      f'data.source is of type {type(source).__name__}, which is made in '
      "memory; prepare takes 'events', the files of a log"
    )
  if config.prepared:
    raise ValueError(
      f'data.prepared={config.prepared!r} is where rows are read from; leave '
      'it empty, and name the folder to write as the output'
    )
  features_lib.check_mergeable(config.features)
  schema = source.schema
  paths = files.with_header(source.paths)
  parts, sources = [], []
  for path in paths:  # A head of each: names and types of columns.
    try:
      piece = next(
        files.stream([str(path)], columns_of(schema), schema, max_rows=_HEAD)
      )
    except files.NoEvents:
      continue
    parts.append(piece.parts[0])
    sources.append(str(path))
  if not parts:
    raise files.no_events(source.paths)
  head = EventLog.from_parts(
    Columns(tuple(parts), tuple(sources), schema), schema
  ).with_tasks(config.tasks)
  masks = source.split.masks(head)
  every = {split: np.ones(len(head), bool) for split in masks}
  head = head.with_vocabularies(
    vocabulary.fit(schema, vocabulary.count(schema, head.features, every))
  )
  for rows in (config.rows, config.eval_rows or config.rows):
    unlimited = dataclasses.replace(rows, on_overflow='truncate')
    grouping.group_candidates(head, np.arange(len(head)), unlimited)
  # Both kinds of labels, so that all that can be wrong is the config.
  labels = {
    name: (np.arange(len(head)) % 2).astype(np.float32) for name in head.labels
  }
  events = dataclasses.replace(head.events(), labels=labels)
  without: tuple[str, ...] = ()
  fitted = features_lib.FittedFeatures(config.features)
  if len(head) > 1:
    fitted = features_lib.fit(config.features, events, np.ones(len(head), bool))
    without = config.without  # Of one event nothing is learnt to leave out.
  datasets.model_schema(head.schema, fitted, without)  # Hidden ones are read.
  return paths


def check_importable(config: datasets.DataConfig) -> None:
  """Raises a ValueError if other processes cannot import what is derived."""
  for i, feature in enumerate(config.features):
    module = type(feature).__module__
    if not workers.is_importable(module):
      raise ValueError(
        f'data.features.{i}: {type(feature).__name__} is defined in {module!r}'
        ', which other processes cannot import; move it from the config file '
        'into a module that the config imports, or take one worker'
      )


def _entries(
  paths: Sequence[pathlib.Path], schema: Schema
) -> list[dict[str, Any]]:
  found = []
  for path in paths:
    stat = path.stat()
    entry: dict[str, Any] = {
      'name': path.name,
      'size': stat.st_size,
      'mtime_ns': stat.st_mtime_ns,
    }
    values = files.partition(path, columns_of(schema))
    if values:
      entry[_FOLDERS] = values
    found.append(entry)
  return found


def begin(
  lock: locks.FolderLock, config, paths, options: Options, engine
) -> tuple[Job, dict[str, Any]]:
  """Begins, or goes on with what was begun.

  Args:
    lock: of the output's folder.
    config: of the data.
    paths: of `check`.
    options: how the work is cut.
    engine: where it is done.

  Returns:
    The job, and what manifest.json says of it.

  Raises:
    ValueError: it was begun with another config or log; the message says what
      differs.
  """
  folder = lock.folder
  if not _is_empty(lock):
    manifest = check_same(folder, config, paths, options)
    atomic.clean(folder)
  else:
    num_events = files.num_rows(paths)
    manifest = {
      'version': prepared.VERSION,
      'config': datasets.identity(config),
      'log': _entries(paths, config.source.schema),
      **_plan(config, num_events, options, engine),
    }
    atomic.write_json(folder / MANIFEST, manifest)
  job = Job(
    folder=folder,
    data=config,
    files=tuple(map(str, paths)),
    num_shards=manifest['num_shards'],
    num_ranges=manifest['num_ranges'],
    run_bytes=manifest['run_bytes'],
  )
  return job, manifest


def _is_empty(lock: locks.FolderLock) -> bool:
  """Whether nothing is there; deletes what a killed process began with."""
  left = [lock.folder / name for name in lock.names()]
  if not all(_LEFT.fullmatch(path.name) and path.is_file() for path in left):
    return False
  for path in left:
    path.unlink(missing_ok=True)
  return True


def budget(options: Options, engine: Local | Ray) -> float:
  """Bytes for the events of a step."""
  local = isinstance(engine, Local) and engine.num_workers > 1
  processes = engine.num_workers + (1 if local else 0)
  each = (options.memory - processes * _PROCESS) / engine.num_workers
  if each < 2**24:
    raise ValueError(
      f'memory={options.memory / 2**30:.3g} GiB (--memory) is too little for '
      f'{engine.num_workers} workers: give at least '
      f'{(processes * _PROCESS + engine.num_workers * 2**24) / 2**30:.2f}'
    )
  return each


def event_bytes(config: datasets.DataConfig) -> int:
  """Of an event while rows are made, as it is estimated."""
  assert isinstance(config.source, datasets.Events)
  schema = config.source.schema
  columns = len(schema.logged) + len(schema.tasks) + 4 * len(config.features)
  return _EVENT + _FEATURE * columns


def _plan(
  config: datasets.DataConfig, num_events: int, options: Options, engine
) -> dict[str, int]:
  part = budget(options, engine)
  size = num_events * event_bytes(config)
  shards = options.num_shards
  if shards is None:
    shards = min(max(1, -int(-size // (_FILL * part))), 99_999)
  return {
    'num_shards': shards,
    'num_ranges': max(1, -int(-size // part)),
    'run_bytes': int(min(max(part / 16, 2**22), 2**26)),
  }


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads((folder / MANIFEST).read_text())
  except (FileNotFoundError, ValueError) as error:
    raise ValueError(
      f'{folder} holds files and no {MANIFEST} of prepared rows ({error}); '
      'name another output, or empty it'
    ) from error
  if found.get('version') != prepared.VERSION:
    raise ValueError(
      f'{folder} is of version {found.get("version")}, this library writes '
      f'{prepared.VERSION}; name another output'
    )
  return found


def check_same(folder, config, paths, options: Options) -> dict[str, Any]:
  """What manifest.json says, if a folder is of this config and log.

  Args:
    folder: of the output.
    config: of the data.
    paths: of `check`.
    options: how the work is cut.

  Raises:
    ValueError: it is not; the message says what differs.
  """
  manifest = _read_manifest(folder)
  config_now = datasets.identity(config)
  log_now = _entries(paths, config.source.schema)
  names = ('there', 'asked for')
  lines = config_lib.differences(manifest['config'], config_now, names)
  if options.num_shards not in (None, manifest['num_shards']):
    lines.append(
      f'num_shards: {manifest["num_shards"]} there, {options.num_shards} '
      'asked for'
    )
  old, new = ([f['name'] for f in log] for log in (manifest['log'], log_now))
  if old != new:
    lost, more = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    lines.append(
      f'files of the log: {len(old)} there, {len(new)} asked for'
      + (f'; without {lost[0]}' if lost else '')
      + (f'; with {more[0]}' if more else '')
    )
  else:
    for i, (was, now) in enumerate(zip(manifest['log'], log_now, strict=True)):
      values = [entry.get(_FOLDERS, {}) for entry in (was, now)]
      if values[0] != values[1]:
        lines.append(
          f'{paths[i]}: its folders say {values[1]}, they said {values[0]}'
        )
      elif was != now and not _same_file(folder, was, now, i, paths[i]):
        lines.append(f'{paths[i]} has changed since')
  if lines:
    raise ValueError(
      f'{folder} holds rows of another config or log; name another output, or '
      'take over what differs:\n' + '\n'.join(lines)
    )
  return manifest


def _same_file(folder, was, now, number: int, path: pathlib.Path) -> bool:
  """Whether a file that was written again holds what it held."""
  if was['size'] != now['size']:
    return False
  known = folder / WORK / f'file-{number:06d}' / DONE
  if (folder / prepared.DATASET).exists():
    known = folder / prepared.DATASET
    told = json.loads(known.read_text())['log'][number]
  elif known.exists():
    told = json.loads(known.read_text())['sha256']
  else:
    return True  # It has not been read yet.
  return digest(str(path)) == told
