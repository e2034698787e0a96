"""Turns a log of any size into shards of rows, within a bound of memory.

    prepare(config, '/tmp/shards', Options(memory=4 * 2**30), Local(2))

1. Each file is read a piece at a time; its events are checked, encoded and cut
   by the hash of their user into runs on disk (`runs`).
2. If a derived feature learns from training events, what it needs of each shard
   of users is collected, and merged.
3. The users of a shard are read from all runs and sorted, and their rows made
   and written.

A step is of one file or one shard (`stages`); what is there is not done
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
from histjax import vocabulary
from histjax.data import atomic, columns, datasets, locks, prepared
from histjax.data.prepare import order, plan, stages
from histjax.data.prepare.engines import Local, Ray, Run
from histjax.data.prepare.job import DONE, WORK, Job
from histjax.data.prepare.plan import Options
from histjax.progress import Progress
from histjax.schema import categorical

_IDS = 'ids.json'


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
      do, another process is at work in the folder, or it holds something else;
      the message says which.
  """
  options, engine = options or Options(), engine or Local()
  progress = progress or Progress()
  engine.check()
  folder = pathlib.Path(output).expanduser()
  paths = plan.check(config)
  if engine != Local():
    plan.check_importable(config)
  finished = folder / prepared.DATASET
  spill_bytes, seconds, num_resumed = 0, {}, None
  if finished.exists() and not (folder / WORK).exists():
    # Nothing is to be written, and it may be that nothing can be.
    plan.check_same(folder, config, paths, options)
  else:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.FolderLock(folder) as lock:
      job, entry = plan.begin(lock, config, paths, options, engine)
      work = _Run(job, entry, engine, options, progress)
      num_resumed = len(_done(job))
      if finished.exists():  # It was killed at the very end.
        shutil.rmtree(job.work, ignore_errors=True)
      else:
        with engine.start() as run:
          work.all(run)
    spill_bytes, seconds = work.spill_bytes, work.seconds
  values = json.loads(finished.read_text())
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
    len(shards) if num_resumed is None else num_resumed,
    spill_bytes,
    seconds,
  )


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
      stages.spill,
      [e['size'] / 2**20 for e in self._manifest['log']],
      lambda file: (job.spill(file) / DONE).exists(),
      'MiB',
    )
    told = [
      json.loads((job.spill(f) / DONE).read_text())
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
    self._count_ids(counts.tolist())
    self._fit(counts.tolist())
    self._stage(
      'writing rows',
      stages.write_shard,
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
    size = int(counts.max()) * plan.event_bytes(self._job.data)
    budget = plan.budget(self._options, self._engine)
    if size > budget:
      raise ValueError(
        f'a shard of {self._job.num_shards} has {int(counts.max())} events, '
        f'which take {size / 2**20:.0f} MiB while rows are made, more than '
        f'the {budget / 2**20:.0f} MiB of a worker; raise memory, or begin '
        'anew with a larger num_shards (unless it is one user)'
      )

  def _count_ids(self, counts: list[int]) -> None:
    """Fits vocabularies, if features have any."""
    job, schema = self._job, self._job.source.schema
    if job.vocabularies.exists() or not vocabulary.of(schema):
      return
    self._stage(
      'counting ids',
      stages.count_ids,
      counts,
      lambda shard: job.ids(shard).exists(),
      'events',
    )
    parts = []
    for shard in range(job.num_shards):
      with np.load(job.ids(shard) / 'found.npz') as archive:
        parts.append({name: archive[name] for name in archive.files})
    counted = vocabulary.merge(schema, [part for part in parts if part])
    known = vocabulary.fit(schema, counted)
    with atomic.folder(job.vocabularies) as folder:
      features_lib.FittedFeatures(vocabularies=known).save(folder)
      ids = vocabulary.id_counts(schema, counted, known)
      atomic.write_json(folder / _IDS, [dataclasses.asdict(x) for x in ids])

  def _hashed(self) -> list[vocabulary.IdCounts]:
    """About how many hashed ids share a row: keys are in no shard."""
    job, found = self._job, []
    for feature in categorical(job.source.schema.logged):
      if feature.ids == 'hash':
        occupied = np.zeros(feature.size, bool)
        for path in sorted(job.work.glob('occupied-*.npz')):
          with np.load(path) as archive:
            occupied[archive[f'ids/{feature.name}']] = True
        found.append(vocabulary.of_rows(feature, int(occupied.sum())))
    return found

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
        stages.collect,
        counts,
        lambda shard: job.fitting(shard).exists(),
        'events',
      )
      parts, first_times = self._collected(counts)
    fitted = features_lib.merge(
      configs, parts, schema, is_timestamp=job.is_timestamp
    )
    if vocabulary.of(schema):
      known = features_lib.load(job.vocabularies).vocabularies
      fitted = dataclasses.replace(fitted, vocabularies=known)
    fitted.save(job.work)
    start = time.monotonic()
    if job.needs_order and not job.before.exists():
      order.count_before(
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
    ids = []
    if vocabulary.of(job.source.schema):
      ids = json.loads((job.vocabularies / _IDS).read_text())
    ids += [dataclasses.asdict(counts) for counts in self._hashed()]
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
        'ids': ids,
        'shards': shards,
      },
    )
    shutil.rmtree(job.work)
