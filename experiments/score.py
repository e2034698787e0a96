"""Ranks candidates from a file for each user, from the user's log.

  python experiments/score.py --workdir=/tmp/run --events=log.parquet \
    --candidates=candidates.parquet --top_k=10 --output=ranked.csv

Both are Parquet or CSV with the columns that the run's schema names. The log
needs users, times, items and actions, but no labels; candidates need users,
items and context, and times if the schema has `time_gap`. Users are joined as
`histjax.schema` says: 7 and '7' are one, '007' is another. All of a user's
events in the log are history. Written, best first: the user, the rank, the
candidate's row in its file, and the score of each task, a probability.
"""

import pathlib

from absl import app, flags, logging

import ranking
from histjax import Scorer
from histjax import config as config_lib
from histjax.training import checkpoints
from histjax.training.config import TrainConfig

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


def run() -> None:
  """Reads, ranks, writes."""
  output = pathlib.Path(_OUTPUT.value)
  ranking.check_path(output, [*_EVENTS.value, *_CANDIDATES.value])
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  params, values = checkpoints.load_params(_WORKDIR.value)
  logging.set_verbosity(logging.WARNING)
  config = config_lib.from_dict(TrainConfig, values)
  schema = config.model.schema
  tasks = [t.name for t in schema.tasks]
  task = tasks[0] if _TASK.value is None else _TASK.value
  if task not in tasks:
    raise ValueError(f'--task={task} is not a task of the run; it has {tasks}')
  ranking.check_output(schema)
  log, shown = ranking.read(
    schema, config.data.rows, _EVENTS.value, _CANDIDATES.value
  )
  if not _ALLOW_NEW_USERS.value:
    known = ranking.check_known(log, shown)
    print(f'{known} of {len(shown.keys)} users are in the log')
  scores = ranking.score(
    Scorer(config.model, params),
    config,
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
    run()
  except (ValueError, OSError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
