"""Turns a log of any size into shards of rows, within a bound of memory.

    prepare(config, '/tmp/shards', Options(memory=4 * 2**30), Local(2))

1. Each file is read a piece at a time; its events are checked, encoded and cut
   by the hash of their user into runs on disk (`runs`).
2. If a derived feature learns from training events, what it needs of each shard
   of users is collected, and merged.
3. The users of a shard are read from all runs and sorted, and their rows made
   and written.

A step is of one file or one shard (`prepare_stages`); what is there is not done
again. Rows are those of `datasets.load`, to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from histjax import config as config_lib
from histjax import features as features_lib
from histjax.data import (
  atomic,
  columns,
  datasets,
  files,
  grouping,
  prepare_stages,
  prepared,
)
from histjax.data.events import EventLog, columns_of
from histjax.data.parts import Columns
from histjax.data.prepare_engines import Local, Ray, Run
from histjax.data.prepare_stages import Job
from histjax.progress import Progress

__all__ = ['Local', 'Options', 'Ray', 'Summary', 'prepare']
MANIFEST = 'manifest.json'
_PROCESS = 0.35 * 2**30
"""Bytes of a process with the library imported."""
_EVENT = 300
"""Bytes of an event while a shard's rows are made, without its features."""
_FEATURE = 24
"""And for each feature and label."""
_FILL = 0.6
"""Of the memory that a shard is planned to take: users are not all alike."""
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


@dataclasses.dataclass(frozen=True)
class Summary:
  """What was done.

  Attributes:
    num_events: of the log.
    num_users: likewise.
    num_rows: `{split: rows}`.
    num_shards: of users.
    num_resumed: shards that had been written before.
    spill_bytes: of the log's events, cut by user; 0: nothing was left to do.
    seconds: of each stage, this time.
  """

  num_events: int
  num_users: int
  num_rows: dict[str, int]
  num_shards: int
  num_resumed: int
  spill_bytes: int = 0
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def prepare(
  config: datasets.DataConfig,
  output: str | os.PathLike[str],
  options: Options | None = None,
  engine: Local | Ray | None = None,
  *,
  progress: Progress | None = None,
) -> Summary:
  """Writes the rows of a log, by user, into shards.

  Args:
    config: of the data, as training has it; its source must be `Events`.
    output: a folder. One that was begun with the same config and log is gone
      on with.
    options: how the work is cut.
    engine: where it is done; None: `Local()`.
    progress: is told.

  Raises:
    ImportError: Ray is asked for and not installed.
    ValueError: an argument, a file or a value in it is bad, memory does not
      do, or the folder holds something else; the message says which.
  """
  options, engine = options or Options(), engine or Local()
  progress = progress or Progress()
  engine.check()
  folder = pathlib.Path(output).expanduser()
  paths = _check(config)
  job, entry = _open(folder, config, paths, options, engine)
  work = _Run(job, entry, engine, options, progress)
  num_resumed = job.num_shards
  if not (folder / prepared.DATASET).exists():
    num_resumed = len(_done(job))
    with engine.start() as run:
      work.all(run)
  values = json.loads((folder / prepared.DATASET).read_text())
  shards = values['shards']
  return Summary(
    sum(shard['events'] for shard in shards),
    sum(shard['users'] for shard in shards),
    {
      split: sum(
        told.get('rows', 0)
        for shard in shards
        for name, told in shard['files'].items()
        if name.startswith(f'{split}-')
      )
      for split in prepared.SPLITS
    },
    len(shards),
    num_resumed,
    work.spill_bytes,
    work.seconds,
  )


def _check(config: datasets.DataConfig) -> list[pathlib.Path]:
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
      piece = next(files.stream([str(path)], columns_of(schema), schema))
    except files.NoEvents:
      continue
    parts.append(piece.parts[0].slice(0, _HEAD))
    sources.append(str(path))
  if not parts:
    raise files.no_events(source.paths)
  head = EventLog.from_parts(
    Columns(tuple(parts), tuple(sources), schema), schema
  ).with_tasks(config.tasks)
  source.split.masks(head)
  for rows in (config.rows, config.eval_rows or config.rows):
    unlimited = dataclasses.replace(rows, on_overflow='truncate')
    grouping.group_candidates(head, np.arange(len(head)), unlimited)
  # Both kinds of labels, so that all that can be wrong is the config.
  labels = {
    name: (np.arange(len(head)) % 2).astype(np.float32) for name in head.labels
  }
  events = dataclasses.replace(head.events(), labels=labels)
  if len(head) > 1:
    features_lib.fit(config.features, events, np.ones(len(head), bool))
  reading = features_lib.FittedFeatures(config.features)
  datasets.model_schema(head.schema, reading, ())  # What is hidden is read.
  return paths


def _entries(paths: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
  found = []
  for path in paths:
    stat = path.stat()
    found.append(
      {'name': path.name, 'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}
    )
  return found


def _open(
  folder: pathlib.Path, config, paths, options: Options, engine
) -> tuple[Job, dict[str, Any]]:
  """Begins, or goes on with what was begun."""
  config_now, log_now = datasets.identity(config), _entries(paths)
  if folder.is_dir() and any(folder.iterdir()):
    manifest = _read_manifest(folder)
    _check_same(folder, manifest, config_now, log_now, paths, options)
    atomic.clean(folder)
  else:
    num_events = files.num_rows(paths)
    manifest = {
      'version': prepared.VERSION,
      'config': config_now,
      'log': log_now,
      **_plan(config, num_events, options, engine),
    }
    folder.mkdir(parents=True, exist_ok=True)
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


def _budget(options: Options, engine: Local | Ray) -> float:
  """Bytes for the events of a step."""
  local = isinstance(engine, Local) and engine.num_workers > 1
  processes = engine.num_workers + (1 if local else 0)
  found = (options.memory - processes * _PROCESS) / engine.num_workers
  if found < 2**24:
    raise ValueError(
      f'memory={options.memory / 2**30:.2f} GiB is too little for '
      f'{engine.num_workers} workers: give at least '
      f'{(processes * _PROCESS + engine.num_workers * 2**24) / 2**30:.2f}'
    )
  return found


def _event_bytes(config: datasets.DataConfig) -> int:
  assert isinstance(config.source, datasets.Events)
  schema = config.source.schema
  columns = len(schema.logged) + len(schema.tasks) + 4 * len(config.features)
  return _EVENT + _FEATURE * columns


def _plan(
  config: datasets.DataConfig, num_events: int, options: Options, engine
) -> dict[str, int]:
  budget = _budget(options, engine)
  size = num_events * _event_bytes(config)
  shards = options.num_shards
  if shards is None:
    shards = min(max(1, -int(-size // (_FILL * budget))), 99_999)
  return {
    'num_shards': shards,
    'num_ranges': max(1, -int(-size // budget)),
    'run_bytes': int(min(max(budget / 16, 2**22), 2**26)),
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


def _check_same(folder, manifest, config_now, log_now, paths, options) -> None:
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
      if was != now and not _same_file(folder, was, now, i, paths[i]):
        lines.append(f'{paths[i]} has changed since')
  if lines:
    raise ValueError(
      f'{folder} holds rows of another config or log; name another output, or '
      'take over what differs:\n' + '\n'.join(lines)
    )


def _same_file(folder, was, now, number: int, path: pathlib.Path) -> bool:
  """Whether a file that was written again holds what it held."""
  if was['size'] != now['size']:
    return False
  known = folder / '_work' / f'file-{number:06d}' / prepare_stages.DONE
  if (folder / prepared.DATASET).exists():
    known = folder / prepared.DATASET
    told = json.loads(known.read_text())['log'][number]
  elif known.exists():
    told = json.loads(known.read_text())['sha256']
  else:
    return True  # It has not been read yet.
  return prepare_stages.digest(str(path)) == told


def _done(job: Job) -> list[int]:
  """The shards that are written."""
  return [
    shard
    for shard in range(job.num_shards)
    if job.path('shard', shard, 'json').exists()
  ]


class _Run:
  """One call's work.

  Attributes:
    spill_bytes: see `Summary`.
    seconds: likewise.
  """

  def __init__(self, job: Job, manifest, engine, options, progress: Progress):
    self._job, self._manifest, self._engine = job, manifest, engine
    self._options, self._progress = options, progress
    self.spill_bytes = 0
    self.seconds: dict[str, float] = {}

  def all(self, run: Run) -> None:
    """Takes the steps that are missing."""
    self._run = run
    job = self._job
    job.work.mkdir(exist_ok=True)
    self._stage(
      'reading files',
      prepare_stages.spill,
      [e['size'] / 2**20 for e in self._manifest['log']],
      lambda file: (job.spill(file) / prepare_stages.DONE).exists(),
      'MiB',
    )
    told = [
      json.loads((job.spill(f) / prepare_stages.DONE).read_text())
      for f in range(len(job.files))
    ]
    counts = np.sum([t['counts'] for t in told], axis=0)
    self.spill_bytes = sum(
      path.stat().st_size for path in job.work.glob('file-*/*.arrow')
    )
    self._check_kinds(told)
    self._check_size(counts)
    self._job = job = dataclasses.replace(
      job,
      time_type=np.result_type(
        *(t['time_type'] for t in told if t['time_type'])
      ).str,
      is_timestamp=any(t['is_timestamp'] for t in told),
    )
    self._fit(counts.tolist())
    self._stage(
      'writing rows',
      prepare_stages.write_shard,
      counts.tolist(),
      lambda shard: job.path('shard', shard, 'json').exists(),
      'events',
    )
    self._finish(told)

  def _stage(
    self,
    what: str,
    step: Callable[[Job, int], None],
    sizes: Sequence[float],
    is_done: Callable[[int], bool],
    unit: str,
  ) -> None:
    missing = [i for i in range(len(sizes)) if not is_done(i)]
    start, total = time.monotonic(), sum(sizes)
    done = before = total - sum(sizes[i] for i in missing)
    self._progress.tell(what, done, total, unit, before)
    step_of = functools.partial(step, self._job)
    # The largest first, so that none is left at the end.
    for i in self._run(step_of, sorted(missing, key=lambda i: -sizes[i])):
      done += sizes[i]
      self._progress.tell(what, done, total, unit, before)
    self.seconds[what] = time.monotonic() - start

  def _check_kinds(self, told) -> None:
    """All files tell time alike."""
    kinds = {
      path: t['is_timestamp']
      for path, t in zip(self._job.files, told, strict=True)
      if t['is_timestamp'] is not None
    }
    columns.check_clocks(self._job.source.schema.time, kinds)

  def _check_size(self, counts: np.ndarray) -> None:
    """Raises a ValueError if a shard is larger than memory."""
    size = int(counts.max()) * _event_bytes(self._job.data)
    budget = _budget(self._options, self._engine)
    if size > budget:
      raise ValueError(
        f'a shard of {self._job.num_shards} has {int(counts.max())} events, '
        f'which take {size / 2**20:.0f} MiB while rows are made, more than '
        f'the {budget / 2**20:.0f} MiB of a worker; raise memory, or begin '
        'anew with a larger num_shards (unless it is one user)'
      )

  def _fit(self, counts: list[int]) -> None:
    job = self._job
    done = job.work / 'first_times.json'
    if done.exists():
      return
    configs, schema = job.data.features, job.source.schema
    if job.data.tasks:
      schema = schema.with_tasks(job.data.tasks)
    first_times: dict[str, Any] = {}
    parts: list[dict[str, np.ndarray]] = [{}]
    if job.needs_fit:
      self._stage(
        'learning features',
        prepare_stages.collect,
        counts,
        lambda shard: job.fitting(shard).exists(),
        'events',
      )
      parts, first_times = self._collected(counts)
    features_lib.merge(configs, parts, schema).save(job.work)
    start = time.monotonic()
    if job.needs_order and not job.before.exists():
      prepare_stages.count_before(
        job,
        lambda n, total: self._progress.tell('counting', n, total, 'ranges'),
      )
      self.seconds['counting'] = time.monotonic() - start
    atomic.write_json(done, first_times)

  def _collected(self, counts: Sequence[int]):
    """What each shard tells, and the first times of splits."""
    parts: list[dict[str, np.ndarray]] = []
    times: dict[str, Any] = {}
    for shard, count in enumerate(counts):
      if not count:
        continue
      with np.load(self._job.fitting(shard) / 'found.npz') as archive:
        found = {name: archive[name] for name in archive.files}
      for name in list(found):
        if name.startswith('first_time/'):
          split = name.removeprefix('first_time/')
          time = found.pop(name).item()
          times[split] = min(time, times.get(split, time))
      parts.append({n.removeprefix('state/'): x for n, x in found.items()})
    return parts, times

  def _finish(self, told) -> None:
    job = self._job
    data = job.data
    shards = [
      json.loads(job.path('shard', s, 'json').read_text())
      for s in range(job.num_shards)
    ]
    fitted = features_lib.load(job.work)
    fitted.save(job.folder)
    schema = job.source.schema
    if data.tasks:
      schema = schema.with_tasks(data.tasks)
    schema = datasets.model_schema(schema, fitted, data.without)
    eval_rows = config_lib.to_dict(data.eval_rows or data.rows)
    atomic.write_json(
      job.folder / prepared.DATASET,
      {
        'version': prepared.VERSION,
        'config': self._manifest['config'],
        'log': [t['sha256'] for t in told],
        'schema': config_lib.to_dict(schema),
        'rows': {
          'train': config_lib.to_dict(data.rows),
          'validation': eval_rows,
          'test': eval_rows,
        },
        'features': fitted.digest(),
        'shards': shards,
      },
    )
    shutil.rmtree(job.work)
