"""One process of a batch job: a model, and the shards that it scores."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from histjax import buckets
from histjax.data import joins, shards
from histjax.data.rows import Rows
from histjax.models import ranker
from histjax.schema import Schema
from histjax.scoring.config import ScorerConfig
from histjax.scoring.scorer import Scorer
from histjax.serving import ranked_files
from histjax.training import run as run_lib

_IN_FLIGHT = 2
"""Batches that are scored while the next one is made."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """What scores.

  Attributes:
    config: of the ranker.
    variables: of it.
    join: how candidates are joined to a log.
  """

  config: ranker.RankerConfig
  variables: Any
  join: joins.Join

  @classmethod
  def from_workdir(
    cls,
    workdir: str | os.PathLike[str],
    *,
    as_of: bool = False,
    keep: tuple[str, ...] = (),
    modules: Sequence[str] = (),
    which: Literal['best', 'latest'] = 'best',
  ) -> Model:
    """The model of a trained run; rows are as its validation makes them.

    Args:
      workdir: of the run.
      as_of: see `joins.Join`.
      keep: likewise.
      modules: to import first, of derived features of your own.
      which: the parameters that are best on validation, or the latest.

    Raises:
      FileNotFoundError: there is no complete checkpoint of the run.
      ValueError: a file is damaged or of another run or version.
    """
    for name in modules:
      importlib.import_module(name)
    run = run_lib.load(workdir, which)
    config = run.config
    rows = config.data.eval_rows or config.data.rows
    join = joins.Join(config.model.schema, rows, run.features, as_of, keep)
    return cls(config.model, run.variables, join)


Load = Callable[[], Model]
"""Makes the model, in this process or, pickled, in a worker of Ray."""


@dataclasses.dataclass(frozen=True)
class Options:
  """How to rank.

  Attributes:
    task: to rank by; None: the first one.
    top_k: candidates of a user to keep.
    allow_new_users: rank even if no user at all is in the log.
    users_per_batch: scored at once, at most.
    memory: bytes that a shard's rows may take; see `shards.Limits`.
    users_per_shard: at most; None: as many as `memory` allows.
  """

  task: str | None = None
  top_k: int = 10
  allow_new_users: bool = False
  users_per_batch: int = 32
  memory: float = 2.0**31
  users_per_shard: int | None = None

  def __post_init__(self):
    for field in ('top_k', 'users_per_batch'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be >= 1')
    _ = self.limits

  def task_of(self, schema: Schema) -> str:
    """The task to rank by; raises ValueError if the schema has none such."""
    tasks = [t.name for t in schema.tasks]
    task = tasks[0] if self.task is None else self.task
    if task not in tasks:
      raise ValueError(
        f'--task={task} is not a task of the run; it has {tasks}'
      )
    return task

  @property
  def limits(self) -> shards.Limits:
    """Of a shard."""
    return shards.Limits(self.memory, self.users_per_shard)


class Worker:
  """Scores shards with one model."""

  def __init__(
    self,
    model: Model,
    parts: ranked_files.Parts,
    data: shards.Shards,
    options: Options,
  ):
    self._join, self._parts, self._data = model.join, parts, data
    self._options = options
    self._scorer = Scorer(
      model.config, model.variables, _scorer_config(model.join, data, options)
    )

  def score(
    self, shard: int, tell: Callable[[int], None] = lambda users: None
  ) -> None:
    """Scores a shard and writes its part.

    Args:
      shard: its number.
      tell: is told, again and again, how many of its users are done.

    Raises:
      ValueError: a score is not finite.
    """
    data, schema = self._data.read(shard), self._join.schema
    rows, order = joins.make_rows(
      self._join,
      data.keys,
      data.events,
      data.shown,
      is_timestamp=data.is_timestamp,
    )
    user, row = data.shown['user'][order], data.shown['row'][order]
    logits = self._logits(rows, row, tell)
    kept = {
      name: pa.array(data.shown[f'{joins.KEEP}{name}']).cast(kind).take(order)
      for name, kind in self._data.kept.items()
    }
    scores = {
      name: np.exp(-np.logaddexp(0, -logit)) for name, logit in logits.items()
    }
    # Probabilities in float32 tie from logits of 17 on.
    by = logits[self._options.task_of(schema)]
    self._parts.write(
      shard,
      ranked_files.ranked(
        schema.user,
        data.keys,
        user,
        row,
        scores,
        by,
        self._options.top_k,
        kept=kept,
      ),
    )

  def _logits(self, rows: Rows, row, tell) -> dict[str, np.ndarray]:
    """`{task: float32 [c]}` of the candidates of the rows."""
    found = {
      t.name: np.empty(len(row), np.float32) for t in self._join.schema.tasks
    }
    flying: collections.deque = collections.deque()
    done, num_users = 0, len(np.unique(rows.log.user[rows.events]))

    def land() -> None:
      nonlocal done
      some, pending = flying.popleft()
      try:
        logits = pending.result()
      except ValueError:
        self._blame(rows, some, row)
        raise
      counts = rows.candidate_counts[some]
      real = np.arange(next(iter(logits.values())).shape[1]) < counts[:, None]
      place = rows.offsets[some][:, None] + np.cumsum(real, 1) - 1
      for name, values in logits.items():
        found[name][place[real]] = values[: len(some)][real]
      done += len(some)
      tell(done * num_users // len(rows))

    for some, shape in self._batches(rows):
      flying.append((some, self._score(rows, some, *shape)))
      if len(flying) > _IN_FLIGHT:
        land()
    while flying:
      land()
    return found

  def _batches(self, rows: Rows) -> Iterator[tuple[np.ndarray, tuple]]:
    """Rows of one shape at a time, as many as one program takes."""
    options = self._scorer.options
    length = _rounded(rows.history_lengths, options.events)
    count = _rounded(
      rows.candidate_counts,
      lambda n: options.candidates(n, options.microbatch),
    )
    size = options.row_buckets[-1]
    order = np.lexsort((count, length))
    new = np.diff(length[order]).astype(bool) | np.diff(count[order]).astype(
      bool
    )
    for group in np.split(order, np.flatnonzero(new) + 1):
      shape = size, int(length[group[0]]), int(count[group[0]])
      for start in range(0, len(group), size):
        yield np.sort(group[start : start + size]), shape

  def _score(self, rows: Rows, some, num_rows, num_events, num_candidates):
    batch = rows.batch(
      some,
      num_rows=num_rows,
      num_events=num_events,
      num_candidates=num_candidates,
    )
    cache = self._scorer.encode(batch.history)
    return self._scorer.score_async(cache, batch.candidates, batch.context)

  def _blame(self, rows: Rows, some: np.ndarray, row: np.ndarray) -> None:
    """Raises the ValueError that names the candidate without a score."""
    for r in some:
      for c in range(rows.offsets[r], rows.offsets[r + 1]):
        one = dataclasses.replace(
          rows,
          events=rows.events[c : c + 1],
          offsets=np.array([0, 1]),
          start=rows.start[r : r + 1],
          stop=rows.stop[r : r + 1],
          visible=rows.visible[c : c + 1],
          derived={n: x[c : c + 1] for n, x in rows.derived.items()},
        )
        (_, shape), *_ = self._batches(one)
        try:
          self._score(one, [0], *shape).result()
        except ValueError as error:
          user = str(rows.keys[rows.log.user[rows.events[c]]])
          raise ValueError(
            f'user {user!r}: {self._data.where(int(row[c]))}: {error}. Look '
            "for values far from training's in that row and in the user's "
            'events, or for parameters that are not finite'
          ) from error


def _rounded(sizes: np.ndarray, bucket: Callable[[int], int]) -> np.ndarray:
  values, place = np.unique(sizes, return_inverse=True)
  return np.array([bucket(n) for n in values.tolist()], np.int64)[place]


def _scorer_config(
  join: joins.Join, data: shards.Shards, options: Options
) -> ScorerConfig:
  """Few shapes that all shards' rows fit, so that few programs are compiled."""
  config = ScorerConfig()
  length = data.lengths
  if join.config.history_length is not None:
    length = np.minimum(length, join.config.history_length)
  events = buckets.of_data(length, 4)
  # Candidates that see later events than others of their row lengthen it.
  more = buckets.of_data(data.lengths, 4)
  events += tuple(size for size in more if size > events[-1])
  # A user with several contexts has rows of fewer candidates.
  count = min(int(data.counts.max()), config.microbatch)
  candidates = {buckets.round_up(count)}
  while count > 8:
    count = -(-count // 2)
    candidates.add(buckets.round_up(count))
  rows = min(options.users_per_batch, data.num_candidates)
  return dataclasses.replace(
    config,
    history_buckets=events,
    candidate_buckets=tuple(sorted(candidates)),
    row_buckets=(rows,),
  )
