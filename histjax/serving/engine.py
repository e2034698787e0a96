"""Answers requests: who was here before is not read again.

engine = Engine('/tmp/run')
engine.warm_up(candidates=512)
request = Request(user=7, candidates=[{'item': 3}], events=[..])
(result,) = engine.score([request])           # reads the history, keeps it
request = Request(user=7, candidates=[..], first=50, events=[one_more])
(result,) = engine.score([request])           # reads one event
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging

from histjax import buckets
from histjax import config as dicts
from histjax.data.row_maker import RowMaker
from histjax.scoring import ahead
from histjax.scoring.config import ScorerConfig
from histjax.scoring.flight import Pending
from histjax.scoring.paged import PagedScorer
from histjax.scoring.scorer import Scorer
from histjax.serving import batches
from histjax.serving.cache_store import (
  CacheStore,
  LostStateError,
  StoreConfig,
  Update,
)
from histjax.serving.columns import Columns
from histjax.serving.planning import Job, Model, Request, Source, UnknownHistory

__all__ = ['Engine', 'EngineConfig', 'Request', 'Result', 'UnknownHistory']

_SOURCES: tuple[Source, ...] = ('hit', 'extended', 'encoded')
"""In the order of their programs: those in the store first."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How an engine keeps and uses states.

  Attributes:
    store: how much is kept.
    headroom: how many events a state may grow beyond
      `RowConfig.history_length` before the last of them are read again. Scores
      are then those of a longer history than training saw; 0: never, and
      scores are those that evaluation has.
    max_events: of a state. None: the largest of `ScorerConfig.history_buckets`;
      without those twice what a row needs.
    max_new_events: that a state is extended by; if there are more, the events
      needed are read from the first on.
    max_rows: users in one program.
    pad_rows: whether users who do not fill a bucket of rows share a program
      that is padded. False: several programs, padded only where no bucket is
      so small; a CPU computes padded rows, too.
  """

  store: StoreConfig = dataclasses.field(default_factory=StoreConfig)
  headroom: int = 0
  max_events: int | None = None
  max_new_events: int = 64
  max_rows: int = 32
  pad_rows: bool = True

  def __post_init__(self):
    dicts.normalize(self)
    if self.headroom < 0:
      raise ValueError(f'headroom={self.headroom} must be at least 0')
    for field in ('max_events', 'max_new_events', 'max_rows'):
      value = getattr(self, field)
      if value is not None and value < 1:
        raise ValueError(f'{field}={value} must be at least 1')


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of one request.

  Attributes:
    logits: `{task: [candidates]}` float32, as `Scorer.score`.
    source: the user's state was used as it was, extended by the new events, or
      the history was read from the first event needed.
    num_events: of the user, now known.
    model: `Scorer.fingerprint` of the model that scored it.
    rows_s: seconds of the call, of all its requests, in which they were
      checked and rows were made of them.
  """

  logits: Mapping[str, np.ndarray]
  source: Source
  num_events: int
  model: str = ''
  rows_s: float = 0.0


class Engine:
  """Scores requests of users whose states it keeps. Thread-safe.

  Scores are those of `Scorer.score` on all events of the user; see `planning`
  for why. A lock is held while requests are checked and programs started, and
  not while results are waited for.
  """

  def __init__(
    self,
    scorer: Scorer | str | os.PathLike[str],
    options: EngineConfig | None = None,
    *,
    scorer_config: ScorerConfig | None = None,
    which: Literal['best', 'latest'] = 'best',
    maker: RowMaker | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Makes an engine.

    Args:
      scorer: of a workdir; or the workdir.
      options: what is kept.
      scorer_config: of the scorers of workdirs.
      which: parameters of a workdir to take.
      maker: of rows; None: that of the scorer's run.
      clock: in seconds, for `StoreConfig.ttl`.

    Raises:
      ValueError: the fusion is not amortizable, or options are at odds.
    """
    self.options = options or EngineConfig()
    self._scorer_config, self._which = scorer_config, which
    self._lock = threading.Lock()
    self._model = self._load(scorer, maker)
    self._roll_overs = 0
    # Of scorers that were served, and where that of now began to be.
    self._compiled, self._begun = 0, self._model.scorer.num_compilations
    self._warmed: dict[str, Any] | None = None
    scorer = self._model.scorer
    self._store = CacheStore(
      scorer.config,
      scorer.fingerprint,
      self.options.store,
      scorer.options,
      device=scorer.device,
      clock=clock,
    )

  @property
  def scorer(self) -> Scorer:
    """That of the model that is served now."""
    return self._model.scorer

  @property
  def store(self) -> CacheStore:
    """Where states are kept."""
    return self._store

  @property
  def fingerprint(self) -> str:
    """Of the model that is served now."""
    return self._model.scorer.fingerprint

  def metrics(self) -> Mapping[str, float]:
    """`cache_store.Counts` by name, and how full the store is."""
    store = self._store
    return {
      **dataclasses.asdict(store.counts),
      'users': len(store),
      'states': store.num_states,
      'pages': store.num_pages,
      'limit_bytes': store.options.device_bytes,
      'device_bytes': store.device_bytes,
      'used_bytes': store.used_bytes,
      'host_bytes': store.host_bytes,
      'roll_overs': self._roll_overs,
      'compilations': self._compiled
      + self._model.scorer.num_compilations
      - self._begun,
    }

  def score(self, requests: Sequence[Request]) -> list[Result | Exception]:
    """Scores requests, as few programs; several of one user in their order.

    Args:
      requests: any number.

    Returns:
      Of each its result; or the error that it alone has: a ValueError if it is
      bad, an `UnknownHistory` if the whole history must be sent, or what a
      derived feature of its row or the device raised.
    """
    found: dict[int, Result | Exception] = {}
    flights: list[tuple[dict[int, Job], Pending]] = []
    with self._lock:
      model, counts = self._model, self._store.counts
      before = counts.rows_seconds
      left = self._by_user(model, requests, found)
      while left:
        now = sorted([(rest.pop(), user) for user, rest in left.items()])
        left = {user: rest for user, rest in left.items() if rest}
        jobs: dict[int, Job] = {}
        begin = time.perf_counter()
        for i, user in now:
          try:
            jobs[i] = model.plan(user, self._store.find(user), requests[i])
          except Exception as error:  # A derived feature's own, too.
            found[i] = error
        counts.rows_seconds += time.perf_counter() - begin
        self._run(model, requests, jobs, found, flights)
      for x in found.values():  # Errors as yet.
        counts.unknown += isinstance(x, UnknownHistory)
      rows_s = counts.rows_seconds - before
    fingerprint = model.scorer.fingerprint
    for group, pending in flights:
      for (i, job), logits in zip(
        group.items(), _logits(group, pending), strict=True
      ):
        found[i] = (
          logits
          if isinstance(logits, Exception)
          else Result(logits, job.source, job.past.stop, fingerprint, rows_s)
        )
    return [found[i] for i in range(len(requests))]

  def warm_up(
    self,
    *,
    candidates: int,
    events: int | None = None,
    rows: int | None = None,
    new_events: int | None = None,
    visible: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
  ) -> ahead.WarmUp:
    """Compiles ahead of time what requests up to these sizes need.

    And measures what `CacheStore.cheaper` compares.

    Args:
      candidates: of a request.
      events: of a state; None: as many as there may be.
      rows: users at once; None: `EngineConfig.max_rows`.
      new_events: of a request; None: `EngineConfig.max_new_events`.
      visible: candidates may see less than the whole history, which takes
        events of their own time or request. None: if the model's rows have
        such, of `ties='strict'` or of a schema with requests.
      cache_dir: as `Scorer.warm_up`.

    Raises:
      ValueError: a size is not positive or beyond the largest bucket, or the
        store has no room for one state of so many events.
    """
    options = self.options
    asked = {
      'candidates': candidates,
      'events': events,
      'rows': options.max_rows if rows is None else rows,
      'new_events': options.max_new_events
      if new_events is None
      else new_events,
      'visible': visible,
    }
    for name, size in asked.items():
      if name != 'visible' and size is not None and size < 1:
        raise ValueError(f'{name}={size} must be at least 1')
    _make_a_row(self._model)
    with self._lock:
      sizes = _sizes(self._model, asked)
      self._store.check_room(self._model.scorer.options.events(sizes['events']))
      if cache_dir is not None:
        ahead.keep_in(cache_dir)
      done = self._warm_up(self._model, sizes)
      self._warmed = asked
      return done

  def roll_over(
    self,
    scorer: Scorer | str | os.PathLike[str],
    maker: RowMaker | None = None,
  ) -> None:
    """Serves another model from the next call of `score` on.

    Calls that run finish with the old one, whose states are dropped. Where the
    other one has the same schema, features and rows, what the host keeps of
    users' events stays, and their states are made of it. New parameters of one
    config compile nothing; another config's programs, after `warm_up`, are
    compiled here, while requests wait, and programs that were recorded are
    recorded of the new parameters.

    Whatever is raised, the old model stays, and what the host keeps of events;
    states are lost if it was found after theirs had made room for others.

    Args:
      scorer: of a workdir; or the workdir.
      maker: as in the constructor.

    Raises:
      ValueError: as the constructor, `CacheStore` and `warm_up`; then states
        stay, too.
      Exception: of the device: there is no memory, or a program fails.
    """
    model = self._load(scorer, maker)
    begun = model.scorer.num_compilations
    _ = model.scorer.fingerprint  # Reads all parameters: not under the lock.
    if self._warmed is not None:
      _make_a_row(model)
    with self._lock:
      old = self._model
      warm_up: Callable[[], object] | None = None
      if self._warmed is not None:
        sizes = _sizes(model, self._warmed)
        before = _programs(old, _sizes(old, self._warmed))
        # What is replayed is of the old parameters.
        if old.scorer.is_replayed or _programs(model, sizes) != before:
          warm_up = functools.partial(self._warm_up, model, sizes)
      self._store.roll_over(
        model.scorer.config,
        model.scorer.fingerprint,
        keep_events=_means_the_same(old.maker, model.maker),
        scorer_config=model.scorer.options,
        warm_up=warm_up,
      )
      self._compiled += old.scorer.num_compilations - self._begun
      self._model, self._begun = model, begun
      self._roll_overs += 1

  def _load(
    self, scorer: Scorer | str | os.PathLike[str], maker: RowMaker | None
  ) -> Model:
    if not isinstance(scorer, Scorer):
      scorer = Scorer.from_workdir(scorer, self._which, self._scorer_config)
    scorer.config.require_amortizable()
    maker = maker or scorer.row_maker()
    options = self.options
    scorer.options.rows(options.max_rows)  # Raises if there is no such bucket.
    model = Model(
      scorer,
      PagedScorer(scorer),
      maker,
      options.headroom,
      None,
      options.max_new_events,
    )
    return dataclasses.replace(model, max_events=_max_events(model, options))

  def _by_user(
    self,
    model: Model,
    requests: Sequence[Request],
    found: dict[int, Result | Exception],
  ) -> dict[str, list[int]]:
    """The requests of each user, the last one first."""
    users: dict[str, list[int]] = {}
    for i in reversed(range(len(requests))):
      try:
        users.setdefault(model.key(requests[i].user), []).append(i)
      except Exception as error:
        found[i] = error
    return users

  def _run(
    self,
    model: Model,
    requests: Sequence[Request],
    jobs: dict[int, Job],
    found: dict[int, Result | Exception],
    flights: list[tuple[dict[int, Job], Pending]],
  ) -> None:
    """Starts the programs of jobs, each of another user."""
    for source in _SOURCES:
      these = [i for i, job in jobs.items() if job.source == source]
      for part in _groups(model, jobs, these, self.options):
        group = {i: jobs[i] for i in part}
        while group:
          try:
            pending = self._start(model, source, [*group.values()])
          except LostStateError:
            self._replan(model, requests, jobs, group, found)
            continue
          except Exception as error:  # Of the device: it is nobody's own.
            found |= dict.fromkeys(group, error)
            break
          flights.append((group, pending))
          break

  def _replan(
    self,
    model: Model,
    requests: Sequence[Request],
    jobs: dict[int, Job],
    group: dict[int, Job],
    found: dict[int, Result | Exception],
  ) -> None:
    """Takes from a group those whose states are lost; they are encoded."""
    for i in self._lost(model, group):
      try:
        jobs[i] = model.plan_without_state(group.pop(i), requests[i])
      except Exception as error:
        found[i] = error
        del jobs[i]

  def _lost(self, model: Model, group: Mapping[int, Job]) -> list[int]:
    """Whose states others took the place of since they were planned."""
    states = self._store.states(
      [job.user for job in group.values()], model.scorer.fingerprint
    )
    return [
      i
      for (i, job), state in zip(group.items(), states, strict=True)
      if state != job.old
    ]

  def _start(
    self, model: Model, source: Source, jobs: Sequence[Job]
  ) -> Pending:
    """Starts one program, which leaves the states that come of it in place.

    Raises:
      LostStateError: others took the place of a state since it was planned.
    """
    counts, paged = self._store.counts, model.paged
    begin = time.perf_counter()
    request = batches.candidates(model, jobs), batches.context(model, jobs)
    history = None if source == 'hit' else batches.history(model, jobs)
    capacity = jobs[0].bucket[0]  # They share it.
    made, begin = begin, time.perf_counter()
    counts.rows_seconds += begin - made
    if history is None:
      pending = self._store.use(
        {job.user: job.state for job in jobs},
        capacity,
        lambda pool, place: paged.score(pool, place, *request),
      )
      counts.hits += len(jobs)
      counts.hit_seconds += time.perf_counter() - begin
      return pending
    program = paged.extend if source == 'extended' else paged.encode
    pending = self._store.update(
      [
        Update(
          job.user,
          model.trimmed(job.past),
          job.digest,
          job.state,
          job.old.length if job.old else 0,
        )
        for job in jobs
      ],
      capacity,
      lambda pool, place: program(pool, place, history, *request),
    )
    if source == 'extended':
      counts.extends += len(jobs)
      counts.extend_seconds += time.perf_counter() - begin
    else:
      counts.misses += len(jobs)
      counts.encode_seconds += time.perf_counter() - begin
    return pending

  def _warm_up(self, model: Model, sizes: Mapping[str, Any]) -> ahead.WarmUp:
    """Compiles, and measures what it takes to read a history and to copy it."""
    scorer = model.scorer
    done = self._store.warm_up_programs(
      lambda pool: model.paged.warm_up(pool, **sizes)
    )
    for capacity in ahead.up_to(sizes['events'], scorer.options.events):
      history = batches.zeros(model, min(capacity, sizes['events']))
      for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(scorer.encode(history).keys)
        seconds = time.perf_counter() - begin
        self._store.measured('encode', capacity, seconds)
        self._store.measure_copy(capacity)
    return done


def _max_events(model: Model, options: EngineConfig) -> int | None:
  """As `EngineConfig.max_events`."""
  largest = model.scorer.options.history_buckets[-1:]
  length = model.maker.config.history_length
  if options.max_events is not None:
    found = options.max_events
    if largest and found > largest[0]:
      raise ValueError(
        f'max_events={found} is beyond the largest of history_buckets='
        f'{model.scorer.options.history_buckets}; add a larger one'
      )
  elif largest:
    found = largest[0]
  elif model.reach is not None:
    found = buckets.bucket_size(2 * model.reach)
  elif length is not None:
    found = buckets.bucket_size(length + options.headroom)
  else:
    return None
  if model.reach is not None and found < model.reach:
    raise ValueError(
      f'max_events={found} does not hold the {model.reach} events that a score '
      'depends on (RankerConfig.receptive_field); raise it, and the largest of '
      'ScorerConfig.history_buckets'
    )
  return found


def _sizes(model: Model, asked: Mapping[str, Any]) -> dict[str, Any]:
  """What `Engine.warm_up` was asked for, of this model.

  Raises:
    ValueError: nothing bounds a state, or a size is beyond the largest bucket.
  """
  events = model.max_events if asked['events'] is None else asked['events']
  if events is None:
    raise ValueError(
      'events=None, and nothing bounds a state; name the longest history'
    )
  new_events = asked['new_events'] if model.is_extendable else 0
  visible = asked['visible']
  if visible is None:
    visible = model.maker.config.ties == 'strict' or bool(model.schema.request)
  options = model.scorer.options
  options.rows(asked['rows'])
  options.candidates(asked['candidates'], options.microbatch)
  options.new_events(min(new_events, options.events(events)))
  sizes = {'events': events, 'new_events': new_events, 'visible': visible}
  return {**asked, **sizes}


def _programs(model: Model, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
  """What tells apart which programs a warm-up compiles."""
  return model.scorer.config, model.scorer.options, sizes


def _make_a_row(model: Model) -> None:
  """Of a made-up request: what imports and sorts waits for the first one."""
  maker = model.maker
  parts = Columns.of_run(model.schema, maker.config, maker.features).example()
  request = Request(
    '0', [parts['candidates']], parts['context'], [parts['events']]
  )
  try:
    model.plan('0', None, request)
  except Exception as error:  # A feature may not take what is made up.
    logging.info('no row was made to warm up: %s', error)


def _means_the_same(one: RowMaker, other: RowMaker) -> bool:
  """Whether two models read events alike."""
  return (
    one.schema == other.schema
    and one.config == other.config
    and one.features.digest() == other.features.digest()
  )


def _groups(
  model: Model, jobs: Mapping[int, Job], these: list[int], config: EngineConfig
) -> list[list[int]]:
  """Jobs that share a program: of one bucket of events and of candidates."""
  if len(these) < 2:
    return [these] if these else []
  found: list[list[int]] = []
  groups: dict[tuple[int, int], list[int]] = {}
  for i in these:
    groups.setdefault(jobs[i].bucket, []).append(i)
  for group in groups.values():
    while group:
      number = part_size(len(group), config, model.scorer.options.rows)
      found.append(group[:number])
      group = group[number:]
  return found


def _logits(
  group: Mapping[int, Job], pending: Pending
) -> list[dict[str, np.ndarray] | Exception]:
  """Those of each request that shares a program, waited for, or its error."""
  try:
    whole = pending.result()
  except Exception:  # Of one request, or of the program.
    return [
      _of_row(pending, row, job) for row, job in enumerate(group.values())
    ]
  return [
    {task: x[row, : len(job.asked)] for task, x in whole.items()}
    for row, job in enumerate(group.values())
  ]


def _of_row(
  pending: Pending, row: int, job: Job
) -> dict[str, np.ndarray] | Exception:
  """Those of one request, which are checked alone, or its error."""
  try:
    found = pending.rows(row, 1, len(job.asked)).result()
  except Exception as error:
    return error
  return {task: x[0] for task, x in found.items()}


def part_size(
  number: int, config: EngineConfig, rows: Callable[[int], int]
) -> int:
  """How many of so many users the next program takes.

  Args:
    number: of users.
    config: as the engine's.
    rows: what so many are padded to.
  """
  number = min(number, config.max_rows)
  if config.pad_rows:
    return number
  return next((n for n in range(number, 0, -1) if rows(n) == n), number)
