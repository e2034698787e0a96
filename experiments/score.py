"""Ranks candidates from a file for each user, from the user's log.

  python experiments/score.py --workdir=/tmp/run --events=log.parquet \
    --candidates=candidates.parquet --top_k=10 --output=ranked.csv

Both are Parquet or CSV with the columns that the run's schema names. The log
needs users, times, items and actions, and labels if the run's `history_rates`
count them; candidates need users, items and context, and times if a derived
feature or strict ties need them. Users are joined as `histjax.schema` says: 7
and '7' are one, '007' is another.

All of a user's events in the log are history, and a candidate that is earlier
than the last of them is refused; with --as_of each candidate sees what was
before it, as validation and test do (of a run with snapshots, what was before
the user's first candidate). Written, best first: the user, the rank, the
candidate's row in its file, and the score of each task, a probability.
"""

import importlib
import pathlib

from absl import app, flags, logging

import ranking
from histjax import Scorer
from histjax.training import run as run_lib

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
  'output', None, 'A .csv or .parquet to write.', required=True
)
_TASK = flags.DEFINE_string('task', None, 'Rank by it; None: the first one.')
_TOP_K = flags.DEFINE_integer('top_k', 10, 'Candidates a user.', 1)
_USERS = flags.DEFINE_integer('users_per_batch', 64, 'Scored at once.', 1)
_ALLOW_NEW_USERS = flags.DEFINE_bool(
  'allow_new_users', False, 'Rank even if no user at all is in the log.'
)
_MODULES = flags.DEFINE_list(
  'modules', [], 'Modules to import first, of derived features of your own.'
)
_AS_OF = flags.DEFINE_bool(
  'as_of', False, 'Candidates see the events before them, and no later ones.'
)


def rank_file() -> None:
  """Reads, ranks, writes."""
  for name in _MODULES.value:
    importlib.import_module(name)
  output = pathlib.Path(_OUTPUT.value)
  ranking.check_path(output, [*_EVENTS.value, *_CANDIDATES.value])
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  run = run_lib.load(_WORKDIR.value)
  logging.set_verbosity(logging.WARNING)
  config = run.config
  schema = config.model.schema
  tasks = [t.name for t in schema.tasks]
  task = tasks[0] if _TASK.value is None else _TASK.value
  if task not in tasks:
    raise ValueError(f'--task={task} is not a task of the run; it has {tasks}')
  ranking.check_output(schema)
  join = ranking.Join(
    schema,
    config.data.eval_rows or config.data.rows,
    run.features,
    as_of=_AS_OF.value,
  )
  log, shown = ranking.read(join, _EVENTS.value, _CANDIDATES.value)
  if not _ALLOW_NEW_USERS.value:
    known = ranking.check_known(log, shown)
    print(f'{known} of {len(shown.keys)} users are in the log')
  scores = ranking.score(
    Scorer(config.model, run.params),
    join,
    log,
    shown,
    rows_per_batch=_USERS.value,
  )
  best = ranking.ranked(schema, shown, scores, task, _TOP_K.value)
  ranking.write(output, best)
  print(f'wrote {len(best["row"])} rows to {output}')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  try:
    rank_file()
  except (ValueError, OSError, ImportError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
