"""Ranks candidates from files for each user, from the user's log.

  python experiments/score.py --workdir=/tmp/run --events=log.parquet \
    --candidates=candidates.parquet --top_k=10 --keep=item --output=ranked.csv

Both are Parquet or CSV with the columns that the run's schema names, files or
folders of them, and may be larger than memory. The log needs users, times,
items and actions, and labels if the run's `history_rates` count them;
candidates need users, items and context, and times if a derived feature or
strict ties need them. Users are joined as `histjax.schema` says: 7 and '7' are
one, '007' is another.

All of a user's events in the log are history, and a candidate that is earlier
than the last of them is refused; with --as_of each candidate sees what was
before it, as validation and test do (of a run with snapshots, what was before
the user's first candidate), which needs a run with rows.ties='strict'. Written,
best first: the user, the rank, the candidate's row in its files, the columns of
--keep, such as the item's id, and the score of each task, a probability.

Users are scored shard by shard. --output=ranked/ is a folder of Parquet files,
one a shard; of a .csv or .parquet the shards are in a folder beside it until
all are done; a file that is there already is refused. Run again what was
interrupted, and it goes on. --engine=ray
spreads the shards over a Ray cluster (the extra `ray`), whose nodes must see
the workdir, the inputs and the output by the same paths.
"""

import functools

from absl import app, flags, logging

import flag_util
from histjax.serving import batch

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the training run.', required=True
)
_EVENTS = flags.DEFINE_list(
  'events', None, 'Files of the log, in its order.', required=True
)
_CANDIDATES = flags.DEFINE_list(
  'candidates', None, 'Files of candidates.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'A .csv or .parquet to write, or a folder.', required=True
)
_TASK = flags.DEFINE_string(
  'task', None, 'Task to rank by; None: the first one.'
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 10, 'Candidates to write of each user, at most.', 1
)
_KEEP = flags.DEFINE_list(
  'keep',
  [],
  'Columns of the candidates to write, too: ids, as integers or texts.',
)
_USERS = flags.DEFINE_integer(
  'users_per_batch', 32, 'Users who are scored at once.', 1
)
_MEMORY = flags.DEFINE_float(
  'memory', 2.0, 'GiB for the rows of a shard, beside the model and batches.'
)
_SHARD = flags.DEFINE_integer(
  'users_per_shard',
  None,
  'Users of a shard, at most; None: as many as --memory holds.',
  1,
)
_ALLOW_NEW_USERS = flags.DEFINE_bool(
  'allow_new_users', False, 'Rank even if no user at all is in the log.'
)
_MODULES = flags.DEFINE_list(
  'modules', [], 'Modules to import first, of derived features of your own.'
)
_LATEST = flags.DEFINE_bool(
  'latest', False, 'The latest parameters, not the best on validation.'
)
_AS_OF = flags.DEFINE_bool(
  'as_of',
  False,
  'Candidates see the events before them, and no later ones; of a run that was '
  "trained with rows.ties='strict'.",
)
_ENGINE = flags.DEFINE_enum(
  'engine', 'local', ['local', 'ray'], 'Where shards are scored.'
)
_RAY_WORKERS = flags.DEFINE_integer(
  'ray_workers', 1, 'Processes that score, with --engine=ray.', 1
)
_RAY_GPUS = flags.DEFINE_float('ray_gpus', 0, 'GPUs of each of these.', 0)


def rank_files() -> None:
  """Reads, ranks, writes."""
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  flag_util.import_modules(_MODULES)
  engine: batch.Local | batch.Ray = batch.Local()
  if _ENGINE.value == 'ray':
    engine = batch.Ray(_RAY_WORKERS.value, num_gpus=_RAY_GPUS.value)
  else:
    flag_util.refuse(('ray_workers', 'ray_gpus'), 'is of --engine=ray')
  done = batch.rank_files(
    functools.partial(
      batch.Model.from_workdir,
      _WORKDIR.value,
      as_of=_AS_OF.value,
      keep=tuple(_KEEP.value),
      modules=tuple(_MODULES.value),
      which='latest' if _LATEST.value else 'best',
    ),
    _EVENTS.value,
    _CANDIDATES.value,
    _OUTPUT.value,
    batch.Options(
      task=_TASK.value,
      top_k=_TOP_K.value,
      allow_new_users=_ALLOW_NEW_USERS.value,
      users_per_batch=_USERS.value,
      memory=_MEMORY.value * 2**30,
      users_per_shard=_SHARD.value,
    ),
    engine=engine,
  )
  if done.signal is not None:
    print(f'interrupted; run the same again to go on with {_OUTPUT.value}')
    raise SystemExit(128 + done.signal)
  print(f'wrote {done.num_rows} rows to {_OUTPUT.value}')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  try:
    rank_files()
  except (ValueError, OSError, ImportError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
