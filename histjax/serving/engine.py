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
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from histjax import buckets
from histjax.data.row_maker import RowMaker
from histjax.schema import Categorical
from histjax.scoring import ahead, programs
from histjax.scoring.config import ScorerConfig
from histjax.scoring.flight import Pending
from histjax.scoring.scorer import Scorer
from histjax.serving.cache_store import CacheStore, StoreConfig
from histjax.serving.planning import Job, Model, Request, Source, UnknownHistory
from histjax.types import Candidates, History

__all__ = ['Engine', 'EngineConfig', 'Request', 'Result', 'UnknownHistory']


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
  """

  store: StoreConfig = dataclasses.field(default_factory=StoreConfig)
  headroom: int = 0
  max_events: int | None = None
  max_new_events: int = 64
  max_rows: int = 32

  def __post_init__(self):
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
  """

  logits: Mapping[str, np.ndarray]
  source: Source
  num_events: int


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
    maker: RowMaker | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Makes an engine.

    Args:
      scorer: of a workdir; or the workdir.
      options: what is kept.
      scorer_config: of the scorers of workdirs.
      maker: of rows; None: that of the scorer's run.
      clock: in seconds, for `StoreConfig.ttl`.

    Raises:
      ValueError: the fusion is not amortizable, or options are at odds.
    """
    self.options = options or EngineConfig()
    self._scorer_config = scorer_config
    self._lock = threading.Lock()
    self._model = self._load(scorer, maker)
    self._roll_overs = 0
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
      'device_bytes': store.device_bytes,
      'used_bytes': store.used_bytes,
      'host_bytes': store.host_bytes,
      'roll_overs': self._roll_overs,
      'compilations': self._model.scorer.num_compilations,
    }

  def score(self, requests: Sequence[Request]) -> list[Result | Exception]:
    """Scores requests, as few programs; several of one user in their order.

    Args:
      requests: any number.

    Returns:
      Of each its result; or the error that it alone has: a ValueError if it is
      bad, an `UnknownHistory` if the whole history must be sent.
    """
    found: dict[int, Result | Exception] = {}
    flights: list[tuple[int, Job, Pending]] = []
    with self._lock:
      model = self._model
      left = self._by_user(model, requests, found)
      while left:
        now = {i: user for user, (i, *_) in left.items()}
        left = {u: rest for u, (_, *rest) in left.items() if rest}
        jobs: dict[int, Job] = {}
        for i, user in sorted(now.items()):
          try:
            jobs[i] = model.plan(user, self._store.find(user), requests[i])
          except (ValueError, UnknownHistory) as error:
            found[i] = error
        self._run(model, jobs, found, flights)
      self._store.counts.unknown += sum(
        isinstance(x, UnknownHistory) for x in found.values()
      )
    for i, job, pending in flights:
      try:
        logits = {k: x[0] for k, x in pending.result().items()}
        found[i] = Result(logits, job.source, job.past.stop)
      except Exception as error:  # Of this request, or of its program.
        found[i] = error
    return [found[i] for i in range(len(requests))]

  def warm_up(
    self,
    *,
    candidates: int,
    events: int | None = None,
    rows: int | None = None,
    new_events: int | None = None,
    visible: bool = False,
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
        events of their own time or request.
      cache_dir: as `Scorer.warm_up`.

    Raises:
      ValueError: a size is not positive or beyond the largest bucket.
    """
    model = self._model
    events = events or model.max_events
    if events is None:
      raise ValueError(
        'events=None, and nothing bounds a state; name the longest history'
      )
    sizes = {
      'candidates': candidates,
      'events': events,
      'rows': rows or self.options.max_rows,
      'new_events': (new_events or self.options.max_new_events)
      if model.is_extendable
      else 0,
      'visible': visible,
    }
    done = self._warm_up(model, sizes, cache_dir)
    with self._lock:
      self._warmed = sizes
      self._warm_up_store(model, sizes)
    return done

  def roll_over(
    self,
    scorer: Scorer | str | os.PathLike[str],
    maker: RowMaker | None = None,
  ) -> None:
    """Serves another model from the next call of `score` on.

    Calls that run finish with the old one, whose states are dropped. Where the
    other one has the same schema, features and rows, what the host keeps of
    users' events stays, and their states are made of it.

    Args:
      scorer: of a workdir; or the workdir.
      maker: as in the constructor.

    Raises:
      ValueError: as the constructor; then the old model stays.
    """
    model = self._load(scorer, maker)
    _ = model.scorer.fingerprint  # Reads all parameters: not under the lock.
    if self._warmed is not None:
      self._warm_up(model, self._warmed, None)
    with self._lock:
      keep = _means_the_same(self._model.maker, model.maker)
      self._store.roll_over(
        model.scorer.config,
        model.scorer.fingerprint,
        keep_events=keep,
      )
      self._model = model
      self._roll_overs += 1
      if self._warmed is not None:
        self._warm_up_store(model, self._warmed)

  def _load(
    self, scorer: Scorer | str | os.PathLike[str], maker: RowMaker | None
  ) -> Model:
    if not isinstance(scorer, Scorer):
      scorer = Scorer.from_workdir(scorer, scorer_config=self._scorer_config)
    scorer.config.require_amortizable()
    maker = maker or scorer.row_maker()
    options = self.options
    scorer.options.rows(options.max_rows)  # Raises if there is no such bucket.
    model = Model(scorer, maker, options.headroom, None, options.max_new_events)
    return dataclasses.replace(model, max_events=_max_events(model, options))

  def _by_user(
    self,
    model: Model,
    requests: Sequence[Request],
    found: dict[int, Result | Exception],
  ) -> dict[str, list[int]]:
    """The requests of each user, in their order."""
    users: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      try:
        users.setdefault(model.key(request.user), []).append(i)
      except ValueError as error:
        found[i] = error
    return users

  def _run(
    self,
    model: Model,
    jobs: dict[int, Job],
    found: dict[int, Result | Exception],
    flights: list[tuple[int, Job, Pending]],
  ) -> None:
    """Starts the programs of jobs, each of another user."""
    for source in ('hit', 'extended', 'encoded'):  # Those in the store first.
      for part in _groups(model, jobs, source, self.options.max_rows):
        group = {i: jobs[i] for i in part}
        try:
          if source != 'encoded':
            cache, lost = self._stored(model, group)
            for i in lost:  # Others took its place meanwhile.
              del group[i]
              try:
                jobs[i] = model.encoded(jobs[i])
              except (ValueError, UnknownHistory) as error:
                found[i] = error
                del jobs[i]
            if not group:
              continue
            pending = self._start(model, source, group, cache)
          else:
            pending = self._start(model, source, group, None)
        except Exception as error:  # Of the device: it is nobody's own.
          for i, job in group.items():
            found[i] = error
            self._store.drop(job.user)
          continue
        for row, (i, job) in enumerate(group.items()):
          flights.append((i, job, pending.row(row, len(job.asked))))

  def _stored(self, model: Model, group: dict[int, Job]):
    """The states of a group, and who has none any more."""
    capacity = model.scorer.options.events(
      max(job.state.length for job in group.values())
    )
    here, cache = self._store.get(
      [job.user for job in group.values()], model.scorer.fingerprint, capacity
    )
    return cache, [i for n, i in enumerate(group) if n not in set(here)]

  def _start(self, model: Model, source: Source, group, cache) -> Pending:
    """Starts one program and keeps the states that come of it."""
    jobs, scorer, counts = [*group.values()], model.scorer, self._store.counts
    request = _candidates(model, jobs), _context(model, jobs)
    begin = time.perf_counter()
    if source == 'hit':
      pending = scorer.score_async(cache, *request)
      counts.hits += len(jobs)
      return pending
    history = _history(model, jobs)
    if source == 'extended':
      cache, pending = scorer.extend_and_score_async(cache, history, *request)
      counts.extends += len(jobs)
      counts.extend_seconds += time.perf_counter() - begin
    else:
      cache, pending = scorer.encode_and_score_async(history, *request)
      counts.misses += len(jobs)
      counts.encode_seconds += time.perf_counter() - begin
    for job in jobs:
      self._store.keep(job.user, model.trimmed(job.past), job.digest)
    self._store.put(
      [job.user for job in jobs],
      cache,
      [job.state.start for job in jobs],
      [job.old.length if job.old else 0 for job in jobs],
    )
    return pending

  def _warm_up(self, model: Model, sizes, cache_dir) -> ahead.WarmUp:
    """Compiles the scorer's programs, and measures reading a history."""
    calls: list[programs.Kind] = ['encode', 'score', 'encode_and_score']
    if sizes['new_events']:
      calls.append('extend_and_score')
    return model.scorer.warm_up(**sizes, calls=calls, cache_dir=cache_dir)

  def _warm_up_store(self, model: Model, sizes: Mapping[str, Any]) -> None:
    scorer = model.scorer
    rows = ahead.up_to(sizes['rows'], scorer.options.rows)
    capacities = ahead.up_to(sizes['events'], scorer.options.events)
    self._store.warm_up(rows, capacities)
    for capacity in capacities:
      history = _zeros(model, min(capacity, sizes['events']))
      for _ in range(3):
        begin = time.perf_counter()
        scorer.encode(history).keys.block_until_ready()
        seconds = time.perf_counter() - begin
        self._store.measured('encode', capacity, seconds)
        self._store.measure_copy(capacity)


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


def _means_the_same(one: RowMaker, other: RowMaker) -> bool:
  """Whether two models read events alike."""
  return (
    one.schema == other.schema
    and one.config == other.config
    and one.features.digest() == other.features.digest()
  )


def _groups(
  model: Model, jobs: Mapping[int, Job], source: Source, max_rows: int
) -> list[list[int]]:
  """Jobs that share a program: of one bucket of events and of candidates."""
  options = model.scorer.options
  groups: dict[tuple[int, int], list[int]] = {}
  for i, job in jobs.items():
    if job.source == source:
      key = (
        options.events(job.state.length),
        options.candidates(len(job.asked), options.microbatch),
      )
      groups.setdefault(key, []).append(i)
  return [
    group[first : first + max_rows]
    for group in groups.values()
    for first in range(0, len(group), max_rows)
  ]


def _stacked(
  parts: Sequence[Mapping[str, np.ndarray]], names: Sequence[str], width: int
) -> dict[str, np.ndarray]:
  """`{name: [B, width]}`, zeros behind each part's `[n]`."""
  found = {}
  for name in names:
    dtype = parts[0][name].dtype
    found[name] = np.zeros((len(parts), width), dtype)
    for row, part in enumerate(parts):
      found[name][row, : len(part[name])] = part[name]
  return found


def _history(model: Model, jobs: Sequence[Job]) -> History:
  """The events to read."""
  parts = [job.events() for job in jobs]
  names = [f.name for f in model.schema.history_features]
  length = np.array([len(part[names[0]]) for part in parts], np.int32)
  return History(_stacked(parts, names, max(1, length.max())), length)


def _zeros(model: Model, length: int) -> History:
  """A history of one user, to measure."""
  return History(
    {
      f.name: np.zeros(
        (1, length), np.int32 if isinstance(f, Categorical) else np.float32
      )
      for f in model.schema.history_features
    },
    np.array([length], np.int32),
  )


def _candidates(model: Model, jobs: Sequence[Job]) -> Candidates:
  counts = np.array([len(job.asked) for job in jobs])
  names = [f.name for f in model.schema.item_features]
  parts = [dict(job.candidates) for job in jobs]
  width = int(counts.max())
  visible = None
  if any(job.visible is not None for job in jobs):
    seen = [
      {'': np.full(len(job.asked), job.state.length)}
      if job.visible is None
      else {'': job.visible}
      for job in jobs
    ]
    visible = _stacked(seen, [''], width)[''].astype(np.int32)
  mask = None
  if counts.min() < width:
    mask = np.arange(width)[None] < counts[:, None]
  return Candidates(_stacked(parts, names, width), visible, mask)


def _context(model: Model, jobs: Sequence[Job]) -> dict[str, np.ndarray]:
  return {
    f.name: np.stack([job.asked.context[f.name] for job in jobs])
    for f in model.schema.context
  }
