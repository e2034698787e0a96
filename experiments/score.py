"""Ranks candidates from a file for each user, from the user's log.

  python experiments/score.py --workdir=/tmp/run --events=log.parquet \
    --candidates=candidates.parquet --top_k=10 --output=ranked.csv

Both are Parquet or CSV with the columns that the run's schema names. The log
needs users, times, items and actions, but no labels; candidates need users,
items and context, and times if the schema has `time_gap`. All of a user's
events in the log are history. Written, best first: the user, the rank, the
candidate's row in its file, and the score of each task, a probability.
"""

import os
import pathlib

import numpy as np
import pyarrow as pa
from absl import app, flags, logging
from pyarrow import csv, parquet

from histjax import Scorer
from histjax import config as config_lib
from histjax.data import columns as columns_lib
from histjax.data import files, requests, rows
from histjax.schema import Schema
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


class Table:
  """The columns of some files, by user; a user's rows by time, if it has it."""

  def __init__(self, paths: list[str], schema: Schema, names: list[str]):
    table = files.read(paths, list(dict.fromkeys(names)))
    codes, self.keys = columns_lib.encode_keys(table, schema.user)
    order = np.argsort(codes, kind='stable')
    if schema.time in names:
      time, _ = columns_lib.encode_time(table, schema.time)
      order = np.lexsort((time, codes))
    self.rows = order
    starts = np.searchsorted(codes[order], np.arange(len(self.keys) + 1))
    self.slices = {
      key: slice(*starts[i : i + 2]) for i, key in enumerate(self.keys)
    }
    self.columns = {
      name: table.array(name).to_numpy(zero_copy_only=False)[order]
      for name in dict.fromkeys(names)
    }

  def of(self, user) -> dict[str, np.ndarray]:
    """The user's values by column; empty if there are none."""
    own = self.slices.get(user, slice(0, 0))
    return {name: values[own] for name, values in self.columns.items()}


def rank(scorer: Scorer, config: TrainConfig, events, candidates, task):
  """Yields `{column: values}` of ranked candidates, some users at a time."""
  schema = config.model.schema
  users = candidates.keys
  for start in range(0, len(users), _USERS.value):
    some = users[start : start + _USERS.value]
    made = []
    for user in some:
      shown = candidates.of(user)
      made.append(
        requests.make_row(
          schema,
          context={f.column: shown[f.column][0] for f in schema.context},
          history=events.of(user),
          candidates=shown,
          config=config.data.rows,
        )
      )
    batch = rows.collate(
      made,
      num_rows=len(made),
      num_events=max(len(next(iter(r.history.values()))) for r in made) or 1,
      num_candidates=max(len(r.visible) for r in made),
    )
    cache = scorer.encode(batch.context, batch.history)
    logits = scorer.score(cache, batch.candidates)
    scores = {k: 1 / (1 + np.exp(-np.asarray(v))) for k, v in logits.items()}
    for b, user in enumerate(some):
      own = candidates.rows[candidates.slices[user]]
      best = np.argsort(-scores[task][b, : len(own)], kind='stable')
      best = best[: _TOP_K.value]
      yield {
        schema.user: np.repeat(user, len(best)),
        'rank': np.arange(1, len(best) + 1),
        'row': own[best],
        **{f'score_{k}': v[b, best] for k, v in scores.items()},
      }
    print(f'{start + len(some)}/{len(users)} users', flush=True)


def write(path: str, parts: list[dict]) -> None:
  """Writes the parts, one under the other, whole or not at all."""
  table = pa.table(
    {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
  )
  ending = pathlib.Path(path).suffix
  temporary = f'{path}.{os.getpid()}.tmp'
  (csv.write_csv if ending == '.csv' else parquet.write_table)(table, temporary)
  os.replace(temporary, path)


def run() -> None:
  """Reads, ranks, writes."""
  if pathlib.Path(_OUTPUT.value).suffix not in ('.csv', '.parquet'):
    raise ValueError(f'--output={_OUTPUT.value} must end in .csv or .parquet')
  params, values = checkpoints.load_params(_WORKDIR.value)
  config = config_lib.from_dict(TrainConfig, values)
  schema = config.model.schema
  tasks = [t.name for t in schema.tasks]
  task = _TASK.value or tasks[0]
  if task not in tasks:
    raise ValueError(f'--task={task} is not a task of the run; it has {tasks}')
  items = [f.column for f in (*schema.item, *schema.hidden)]
  items = [schema.user, *items]
  timed = schema.time_gap_buckets or config.data.rows.ties == 'strict'
  seen = [schema.time, *items, *(f.column for f in schema.action)]
  if schema.request:
    seen.append(schema.request)
  if schema.history_rates:
    seen += [t.column for t in schema.tasks]
  shown = [*items, *(f.column for f in schema.context)]
  events = Table(_EVENTS.value, schema, seen)
  candidates = Table(
    _CANDIDATES.value, schema, [*shown, schema.time] if timed else shown
  )
  scorer = Scorer(config.model, params)
  parts = list(rank(scorer, config, events, candidates, task))
  write(_OUTPUT.value, parts)
  print(f'wrote {sum(len(p["row"]) for p in parts)} rows to {_OUTPUT.value}')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    run()
  except (ValueError, OSError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
