"""Ranks candidates of many users from files, larger than memory, resumably.

    load = functools.partial(Model.from_workdir, '/tmp/run')
    rank_files(load, ['log.parquet'], ['candidates.parquet'], 'ranked/')

The log and the candidates are cut by user into shards on disk (`data.shards`).
Each shard is read, made into rows, scored and written as one Parquet file,
whole or not at all; a run that was interrupted goes on after the last one, and
its output is that of a run which was not.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

from histjax import config as config_lib
from histjax.data import files, locks, shards
from histjax.progress import Progress
from histjax.scoring.scorer import Scorer
from histjax.serving import ranked_files
from histjax.serving.batch_engines import Job, Local, Ray
from histjax.serving.batch_worker import Load, Model, Options, Worker
from histjax.training.interrupt import Interrupt

__all__ = [
  'Local',
  'Model',
  'Options',
  'Ray',
  'Summary',
  'Worker',
  'rank_files',
]
_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Summary:
  """What was done.

  Attributes:
    num_rows: of the output.
    num_shards: of them.
    num_resumed: shards that had been written before.
    signal: what interrupted it, to be gone on with; None: it is complete.
  """

  num_rows: int
  num_shards: int
  num_resumed: int
  signal: int | None = None


def rank_files(
  load: Load,
  events: Sequence[str],
  candidates: Sequence[str],
  output: str | os.PathLike[str],
  options: Options | None = None,
  *,
  engine: Local | Ray | None = None,
) -> Summary:
  """Scores candidates and writes the best ones of each user.

  Of each user the output has the best `top_k`, best first: the user, the rank
  from 1, the candidate's row in the files of candidates, the columns of
  `Join.keep`, and the score of each task, a probability. Users are in order.
  They are ranked by logits, which differ where probabilities are all 1; of
  equal ones the earlier row is the better one.

  Args:
    load: makes the model.
    events: files of the log, see `files.read`; all of a user's are history.
    candidates: files of candidates.
    output: a .csv or .parquet to write, beside which a folder of the name with
      '.parts' is kept until then; or a folder, to be filled with Parquet files.
    options: how to rank.
    engine: where shards are scored; None: `Local()`.

  Returns:
    What was done. SIGTERM and SIGINT end it early; the same call goes on.

  Raises:
    ImportError: Ray is asked for and not installed.
    ValueError: an argument, a file or a value in it is bad, what was written
      before is of other inputs, options or another model, another process is
      writing it, or a score is not finite.
  """
  options = options or Options()
  engine = engine or Local()
  engine.check()
  target = ranked_files.Target.of(output, [*events, *candidates])
  with locks.FolderLock(target.folder, '--output') as lock:
    model = load()
    ranked_files.check_columns(model.join.schema, model.join.keep)
    options.task_of(model.join.schema)
    model.config.require_amortizable()
    shards.check(model.join, events, candidates)
    progress = Progress()
    identity = _identity(model, events, candidates, options, progress)
    parts = ranked_files.Parts.open(lock, identity)
    try:
      if not parts.complete:
        engine.start()
      with Interrupt() as interrupt:
        stop = functools.partial(_stop, interrupt)
        try:
          if not parts.complete:
            data = _prepare(
              parts, model, events, candidates, options, progress, stop
            )
            engine.run(Job(parts, data, options, model, load), progress, stop)
        except _StoppedError:
          signal = int(interrupt.signal or 0)
          return Summary(0, parts.num_shards, parts.num_resumed, signal)
    except BaseException:
      parts.discard(lock)
      raise
    num_shards, num_resumed = parts.num_shards, parts.num_resumed
    return Summary(target.finish(parts, lock), num_shards, num_resumed)


class _StoppedError(Exception):
  """A signal came."""


def _identity(
  model: Model, events, candidates, options: Options, progress: Progress
) -> dict[str, Any]:
  """All that scores depend on."""

  def digest(what: str, paths: Sequence[str]) -> str:
    tell = functools.partial(progress.bytes, f'digest of the {what}')
    columns = [*model.join.schema.columns, *model.join.keep]
    return files.digest(paths, columns, tell=tell)

  return {
    'version': _VERSION,
    'model': Scorer(model.config, model.variables).fingerprint,
    'features': model.join.features.digest(),
    'rows': config_lib.to_dict(model.join.config),
    'as_of': model.join.as_of,
    'keep': list(model.join.keep),
    'log': digest('log', events),
    'candidates': digest('candidates', candidates),
    'options': config_lib.to_dict(options),
  }


def _stop(interrupt: Interrupt) -> None:
  if interrupt.received():
    raise _StoppedError


def _prepare(
  parts, model: Model, events, candidates, options: Options, progress, stop
) -> shards.Shards:
  """Shards of the inputs; those that were made before, if they were."""

  def tell(what: str, done: int, total: int) -> None:
    stop()
    progress.bytes(f'reading {what}', done, total)

  try:
    data = shards.Shards.load(parts.work)
  except FileNotFoundError:
    data = shards.prepare(
      parts.work,
      model.join,
      events,
      candidates,
      options.limits,
      allow_new_users=options.allow_new_users,
      tell=tell,
    )
  print(f'{data.num_known} of {len(data.keys)} users are in the log')
  parts.plan(len(data))
  return data
