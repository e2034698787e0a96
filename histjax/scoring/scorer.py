"""The scorer.

    scorer = Scorer.from_workdir('/tmp/run')      # or Scorer(config, variables)
    batch = collate([scorer.make_row(context=.., history=.., candidates=..)])
    cache = scorer.encode(history)                # one pass over the history
    logits = scorer.score(cache, candidates, context)  # {task: [B, C]}
    cache = scorer.extend(cache, new_events)      # the user did something
    cache, logits = scorer.encode_and_score(history, candidates, context)
    cache, logits = scorer.extend_and_score(
      cache, new_events, candidates, context)     # two steps in one program
    logits = scorer.score_joint(batch)            # both, in a single pass
    logits = scorer.score_plain(batch)            # one row per candidate

The three ways to score give the same logits from the same parameters. Inputs
are padded to buckets, so that a program is compiled once per bucket and not
once per length; scores do not depend on the padding. (Candidates that say by
`visible` that they see less than the whole history take a program of their
own: when serving, none does.)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from absl import logging

from histjax import buckets
from histjax import cache as cache_lib
from histjax.cache import CacheInfo, HistoryCache
from histjax.models import ranker
from histjax.ops import devices, dispatch
from histjax.scoring import (
  ahead,
  compilations,
  cuda,
  flight,
  graphs,
  inputs,
  programs,
  transport,
  weights,
)
from histjax.scoring import fingerprint as fingerprint_lib
from histjax.scoring.config import ScorerConfig
from histjax.scoring.flight import Logits, Pending
from histjax.types import Candidates, History, RankingBatch

if TYPE_CHECKING:
  from histjax.data import requests, row_maker, rows
  from histjax.training import run as run_lib


class Scorer:
  """Scores candidates with one set of variables in three equal ways.

  Inputs are ragged through `length` and `mask`. They are checked and padded on
  the host (see `scoring.inputs`), and the logits, which have the caller's
  shape, come back to the host and are checked as well: a value that is large
  enough to overflow is a ValueError and never a NaN.

  Attributes:
    config: of the model.
    options: padding and microbatches.
    device: where it runs: where the parameters were put, else JAX's default
      device; None: on several.
  """

  def __init__(
    self,
    config: ranker.RankerConfig,
    variables: Mapping[str, Any],
    scorer_config: ScorerConfig | None = None,
  ):
    """Makes a scorer.

    Args:
      config: of the model that `variables` belong to.
      variables: as `Ranker.init` returns them, parameters and tables. It runs
        where they are, if they were put on a device, else on JAX's default
        device.
      scorer_config: padding and microbatches.

    Raises:
      ValueError: the variables are not of this config.
    """
    if scorer_config is None:
      scorer_config = ScorerConfig()
    inputs.check_type(config, ranker.RankerConfig, 'config')
    inputs.check_type(scorer_config, ScorerConfig, 'scorer_config')
    ranker.check_variables(config, variables)
    self.config = config
    self.options = scorer_config
    self._tasks = tuple(task.name for task in config.schema.tasks)
    self._run: run_lib.Run | None = None
    self._compilations = compilations.Counter()
    self._logged: set[tuple[str, str]] = set()
    self._told: set[programs.Program] = set()
    self._variables = jax.device_put(variables)
    leaf = jax.tree.leaves(self._variables)[0]
    device = dispatch.device_of(leaf if leaf.committed else None)
    several = len(leaf.sharding.device_set) > 1
    self.device = None if several else device
    self._devices = leaf.sharding.device_set if several else {device}
    if not several:
      # Committed to it, as what programs return then is: to XLA's callers a
      # program of arrays that are and one of arrays that are not are two.
      self._variables = jax.device_put(self._variables, device)
    self._weights, spec = weights.pack(config, self._variables)
    self._transport = transport.of_device(None if several else device)
    self._plan = programs.Plan(
      config,
      self.options.microbatch,
      self.options.plain_microbatch,
      spec,
      devices.Target.of(device),
      self._transport,
      self.options.cache_dtype,
    )
    # Programs that `warm_up` recorded, to be replayed.
    self._recordings: dict[programs.Program, graphs.Recording] = {}
    self._unrecorded: set[str] = set()  # Why others were not; said once.
    # `programs.program` keeps them; to find one there is to hash a config.
    self._programs: dict[tuple, programs.Program] = {}
    # Those of 'score', by what tells them apart.
    self._of_sizes: dict[tuple, programs.Program] = {}

  @classmethod
  def from_workdir(
    cls,
    workdir: str | os.PathLike[str],
    which: Literal['best', 'latest'] = 'best',
    scorer_config: ScorerConfig | None = None,
  ) -> Scorer:
    """The scorer of a trained run, which can `make_row`, too.

    Args:
      workdir: the folder that training filled.
      which: the parameters that are best on validation, or the latest.
      scorer_config: padding and microbatches.

    Raises:
      FileNotFoundError: there is no complete checkpoint, no best one yet, or
        no `features.npz`.
      ValueError: a file is damaged or of another run, or the run is of another
        version of histjax.
    """
    from histjax.training import run as run_lib  # Reads checkpoints.

    return cls.of_run(run_lib.load(workdir, which), scorer_config)

  @classmethod
  def of_run(
    cls, run: run_lib.Run, scorer_config: ScorerConfig | None = None
  ) -> Scorer:
    """As `from_workdir`, of what `training.run.load` returned."""
    scorer = cls(run.config.model, run.variables, scorer_config)
    scorer._run = run
    return scorer

  def make_row(
    self,
    *,
    context: Mapping[str, Any],
    history: requests.Events,
    candidates: requests.Events,
    **options: Any,
  ) -> rows.Row:
    """One request as a row, as the run's validation would make it.

    Plain values under the log's column names; see `histjax.make_row`.

    Args:
      context: one value a column.
      history: the user's events, oldest first; may be empty.
      candidates: the items to score; at least one.
      **options: `visible` and `as_of` of `histjax.make_row`.

    Raises:
      ValueError: a value is missing or bad, or the scorer is not of a workdir.
    """
    from histjax.data import requests  # Needs Arrow.

    maker = self.row_maker()
    return requests.make_row(
      self.config.schema,
      context=context,
      history=history,
      candidates=candidates,
      config=maker.config,
      features=maker.features,
      **options,
    )

  def row_maker(self) -> row_maker.RowMaker:
    """What makes such rows step by step, as `histjax.serving` does.

    Raises:
      ValueError: the scorer is not of a workdir.
    """
    from histjax.data import row_maker  # Needs Arrow.

    if self._run is None:
      raise ValueError(
        'this scorer was made of parameters, and knows no columns; use '
        'Scorer.from_workdir, or histjax.make_row'
      )
    data = self._run.config.data
    return row_maker.RowMaker(
      self.config.schema, data.eval_rows or data.rows, self._run.features
    )

  @property
  def variables(self) -> Mapping[str, Any]:
    """As they were given, on the device."""
    return self._variables

  @property
  def run(self) -> run_lib.Run | None:
    """What `from_workdir` loaded; None of a scorer made of parameters."""
    return self._run

  @property
  def is_replayed(self) -> bool:
    """Whether `warm_up` recorded programs; a recording is of its parameters."""
    return bool(self._recordings)

  @property
  def num_compilations(self) -> int:
    """Programs that XLA compiled in calls of this scorer, of any kind."""
    return self._compilations.number

  @functools.cached_property
  def fingerprint(self) -> str:
    """Of config and parameters; computed when first asked for, as by `encode`.

    A cache carries that of its maker, and another model refuses it.
    """
    return fingerprint_lib.fingerprint(self.config, self._variables)

  def encode(self, history: History) -> HistoryCache:
    """Reads each user's history once.

    Args:
      history: `[B, L]`, real events first; `length` at most L.

    Returns:
      The cache, `B` and `L` padded to buckets. Rows keep their order.

    Raises:
      ValueError: the fusion is not amortizable, or an input is malformed.
    """
    self.config.require_amortizable()
    length, _ = inputs.lengths(self.config.schema, history)
    program, slot = self._write_history(history, length)
    keys, values, done = self._call(program, slot)
    self._transport.release(program.layout, slot, done)
    return self._new_cache(keys, values, length)

  def encode_and_score(
    self,
    history: History,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> tuple[HistoryCache, Logits]:
    """`encode` and `score` in one program: a new user's request.

    Args:
      history: `[B, L]`, real events first; `length` at most L.
      candidates: `[B, C]`; row b belongs to row b of the history.
      context: `{name: [B]}`, as it is at the time of the request.

    Returns:
      The cache and the logits.

    Raises:
      ValueError: the fusion is not amortizable, an input is malformed, or a
        logit is not finite.
    """
    cache, pending = self.encode_and_score_async(history, candidates, context)
    return cache, pending.result()

  def encode_and_score_async(
    self,
    history: History,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> tuple[HistoryCache, Pending]:
    """As `encode_and_score`, but does not wait."""
    self.config.require_amortizable()
    length, _ = inputs.lengths(self.config.schema, history)
    request = self._check_candidates(candidates, context, length)
    inputs.check_rows(request.shape[0], len(length))
    program, slot = self._write_history(history, length, request)
    keys, values, logits = self._call(program, slot)
    cache = self._new_cache(keys, values, length)
    return cache, self._one_pending(program, slot, logits, request)

  def score(
    self,
    cache: HistoryCache,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> Logits:
    """Scores candidates from a cache; cost does not include the history's.

    Args:
      cache: of `encode`, `extend`, `take` or `stack`.
      candidates: `[B, C]`; row b belongs to user b of the cache.
      context: `{name: [B]}`, as it is at the time of the request.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: a cache of another model, more rows than it has users,
        `visible` beyond the history, another malformed input, or a logit that
        is not finite.
    """
    return self.score_async(cache, candidates, context).result()

  def score_async(
    self,
    cache: HistoryCache,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> Pending:
    """As `score`, but does not wait: several requests can be in flight.

        pending = [scorer.score_async(*request) for request in requests]
        logits = [x.result() for x in pending]

    Inputs are checked and copied before it returns.
    """
    request = self._check_request(cache, candidates, context)
    return self._fly([request], [cache], *self._write([request], [cache]))[0]

  def score_many(
    self,
    requests: Iterable[tuple[HistoryCache, Candidates, Mapping[str, Any]]],
  ) -> list[Logits]:
    """Scores several requests as one: what waits at a server.

    Requests whose caches have the same rows and capacity run in one program,
    for each power of two of their number one; so many cost little more than
    one.

    Args:
      requests: `(cache, candidates, context)` of each: what `score` takes.

    Returns:
      The logits of each.

    Raises:
      ValueError: one that `score` would refuse; then the logits of none are
        returned.
    """
    return [x.result() for x in self.score_many_async(requests)]

  def score_many_async(
    self,
    requests: Iterable[tuple[HistoryCache, Candidates, Mapping[str, Any]]],
  ) -> list[Pending]:
    """As `score_many`, but does not wait."""
    requests = list(requests)
    checked = [self._check_request(*request) for request in requests]
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (cache, _, _) in enumerate(requests):
      groups.setdefault((cache.num_rows, cache.capacity), []).append(i)
    parts = [
      ([checked[i] for i in group], [requests[i][0] for i in group])
      for group in groups.values()
    ]
    # Types and shapes of all are good, or none is scored.
    written = [self._write(*part) for part in parts]
    found: dict[int, Pending] = {}
    for group, part, ready in zip(groups.values(), parts, written, strict=True):
      found |= dict(zip(group, self._fly(*part, *ready), strict=True))
    return [found[i] for i in range(len(checked))]

  def backends(
    self,
    cache: HistoryCache,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> dict[str, str]:
    """What `score` would run: are the kernels used?

    Computes nothing. The first `score` logs the same. To learn why a kernel is
    not used, name it as `EncoderConfig.candidate_tower` and read the error.

    Args:
      cache: of `encode`, `extend`, `take` or `stack`.
      candidates: `[B, C]`; row b belongs to user b of the cache.
      context: `{name: [B]}`, as it is at the time of the request.

    Returns:
      `{operation: implementation}`. With `{'candidate_tower': 'pallas_tpu'}`
      one kernel computes all layers. With 'xla' as the candidate tower and
      'cudnn' as the history attention it goes layer by layer, with that kernel
      in each. `{}` is plain JAX alone, as the fusion 'append_isolated' scores.

    Raises:
      ValueError: a request that `score` would refuse.
      NotImplementedError: the named implementation cannot run here.
    """
    request = self._check_request(cache, candidates, context)
    program, slot = self._write([request], [cache])
    self._check_values(program, slot, [request])
    with dispatch.record() as used:
      # A new function: of one that it knows, JAX may keep the trace.
      jax.eval_shape(
        lambda *x: program.traced(*x),
        self._weights,
        cache.keys,
        cache.values,
        jax.ShapeDtypeStruct((program.layout.size,), np.int32),
      )
    self._carrier(slot).release(program.layout, slot)
    return dispatch.names(used)

  def extend(
    self, cache: HistoryCache, events: History, *, donate: bool = True
  ) -> HistoryCache:
    """Appends each user's new events; equals `encode` of the longer history.

    Args:
      cache: of `encode`, `extend`, `take` or `stack`.
      events: `[B, E]`, `length[b]` of them new for user b (0 for none).
      donate: the events are written into the memory of `cache`, which must not
        be used after; False: into a copy.

    Returns:
      A new cache; its capacity grows by buckets when a history outgrows it.

    Raises:
      ValueError: the history is bidirectional or its positions are not
        relative, the cache is another model's, there are more rows than it has
        users, or the input is malformed.
    """
    new, length = self._lengths_after(cache, events)
    program, slot = self._write_events(cache, events, new, length, donate)
    keys, values, done = self._call(program, slot, cache.keys, cache.values)
    self._transport.release(program.layout, slot, done)
    return self._new_cache(keys, values, length)

  def extend_and_score(
    self,
    cache: HistoryCache,
    events: History,
    candidates: Candidates,
    context: Mapping[str, Any],
    *,
    donate: bool = True,
  ) -> tuple[HistoryCache, Logits]:
    """`extend` and `score` in one program: a returning user's request.

    Args:
      cache: of `encode`, `extend`, `take` or `stack`.
      events: `[B, E]`, `length[b]` of them new for user b (0 for none).
      candidates: `[B, C]`; row b belongs to user b of the cache.
      context: `{name: [B]}`, as it is at the time of the request.
      donate: the events are written into the memory of `cache`, which must not
        be used after; False: into a copy.

    Returns:
      The new cache and the logits.

    Raises:
      ValueError: as `extend` and `score`. If a logit is not finite the events
        were written, and a donated cache is lost.
    """
    cache, pending = self.extend_and_score_async(
      cache, events, candidates, context, donate=donate
    )
    return cache, pending.result()

  def extend_and_score_async(
    self,
    cache: HistoryCache,
    events: History,
    candidates: Candidates,
    context: Mapping[str, Any],
    *,
    donate: bool = True,
  ) -> tuple[HistoryCache, Pending]:
    """As `extend_and_score`, but does not wait."""
    new, length = self._lengths_after(cache, events)
    request = self._check_candidates(candidates, context, length)
    self._check_cache(cache, request.shape[0], 'candidates')
    program, slot = self._write_events(
      cache, events, new, length, donate, request
    )
    keys, values, logits = self._call(program, slot, cache.keys, cache.values)
    return (
      self._new_cache(keys, values, length),
      self._one_pending(program, slot, logits, request),
    )

  def warm_up(
    self,
    *,
    rows: int,
    events: int,
    candidates: int,
    new_events: int = 0,
    requests: int = 1,
    visible: bool = False,
    calls: Collection[programs.Kind] = ('encode', 'score', 'extend'),
    cache_dir: str | os.PathLike[str] | None = None,
  ) -> ahead.WarmUp:
    """Compiles ahead of time what requests up to these sizes will need.

    After it none of `calls` compiles, whatever the sizes up to these. There is
    a program for each combination of buckets, so name few of them in
    `ScorerConfig`.

    Args:
      rows: users at once.
      events: of a history, new ones included.
      candidates: of a user.
      new_events: given to `extend` at once; 0: it is not used.
      requests: given to `score_many` at once.
      visible: whether candidates may say what they see.
      calls: that will be made: of 'encode', 'score' (which is `score_async` and
        `score_many`, too), 'extend', 'encode_and_score', 'extend_and_score';
        'encode', which makes the caches of the others, in any case.
      cache_dir: JAX's persistent compilation cache, from now on and for the
        whole process: the next process reads there what this one compiled.
        None: as JAX is configured.

    Returns:
      How many programs there are, and how long they took.

    Raises:
      ValueError: the fusion is not amortizable or not extendable, a size is
        not positive or beyond the largest bucket.
    """
    for name, size in (
      ('rows', rows),
      ('events', events),
      ('candidates', candidates),
      ('requests', requests),
    ):
      _check_size(name, size, 1)
    _check_size('new_events', new_events, 0)
    if isinstance(calls, str) or not set(calls) <= set(ahead.CALLS):
      raise ValueError(f'calls={calls!r} must be some of {ahead.CALLS}')
    self.config.require_amortizable()
    if new_events:
      self.config.require_extendable()
    if cache_dir is not None:
      ahead.keep_in(cache_dir)
    todo = list(
      ahead.jobs(
        calls,
        ahead.up_to(rows, self.options.rows),
        ahead.up_to(events, self.options.events),
        ahead.up_to(
          candidates,
          lambda n: self.options.candidates(n, self.options.microbatch),
        ),
        min(new_events, events),
        self.options.new_events,
        visible and self.config.encoder.causal,
        requests,
      )
    )
    before = self.num_compilations
    _ = self.fingerprint  # Reads all parameters, once.
    seconds = ahead.run(todo, self._compile)
    return ahead.WarmUp(
      len(todo),
      self.num_compilations - before,
      seconds,
      self._num_recorded(todo),
    )

  def score_joint(self, batch: RankingBatch) -> Logits:
    """Scores in one pass whose queries are the history and the candidates.

    Args:
      batch: rows; labels and group are not read.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: an input is malformed, or a logit is not finite.
    """
    return self._score_batch('joint', batch, self.options.microbatch)

  def score_plain(self, batch: RankingBatch) -> Logits:
    """Scores each candidate as a row of its own; any fusion.

    Args:
      batch: rows; labels and group are not read.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: an input is malformed, or a logit is not finite.
    """
    return self._score_batch('plain', batch, self.options.plain_microbatch)

  def _score_batch(
    self, kind: Literal['joint', 'plain'], batch: RankingBatch, multiple: int
  ) -> Logits:
    schema = self.config.schema
    inputs.check_type(batch, RankingBatch, 'batch')
    inputs.check_not_packed(batch)
    length, _ = inputs.lengths(schema, batch.history)
    shape = inputs.candidates_shape(schema, batch.candidates)
    inputs.check_rows(shape[0], len(length))
    real = inputs.real_candidates(batch.candidates)
    visible = inputs.visible(
      batch.candidates, length, real, self.config.encoder.causal
    )
    sizes = programs.Sizes(
      self.options.rows(shape[0]),
      self.options.events(int(length.max(initial=0))),
      self.options.candidates(shape[1], multiple),
      visible is not None,
    )
    program = self._program(kind, sizes)
    slot = self._transport.slot(program.layout)
    views = slot.views
    inputs.numbers(length, views['length'])
    inputs.context(schema, batch.context, shape[0], views['context'])
    inputs.history(schema, batch.history, length, views['history'])
    inputs.candidates(
      schema, batch.candidates, shape, real, views['candidates']
    )
    if visible is not None:
      inputs.numbers(visible, views['visible'])
    given = flight.Checked(
      length, batch.candidates, batch.context, shape, real, visible
    )
    self._check_values(program, slot, [given], batch.history, length)
    logits = self._call(program, slot)
    return self._one_pending(program, slot, logits, given).result()

  def _one_pending(
    self,
    program: programs.Program,
    slot: transport.Slot,
    logits: jax.Array,
    request: flight.Checked,
  ) -> Pending:
    at_work = self._flight(program, slot, logits)
    return Pending(at_work, 0, request.shape, request.real, self._tasks)

  def _check_request(
    self,
    cache: HistoryCache,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> flight.Checked:
    self.config.require_amortizable()
    request = self._check_candidates(
      candidates, context, cache_lib.info_of(cache).length
    )
    self._check_cache(cache, request.shape[0], 'candidates')
    return request

  def _check_candidates(
    self,
    candidates: Candidates,
    context: Mapping[str, Any],
    length: np.ndarray,
  ) -> flight.Checked:
    """Checks all but values; `length` is of at least their rows."""
    shape = inputs.candidates_shape(self.config.schema, candidates)
    length = length[: shape[0]]
    real = inputs.real_candidates(candidates)
    visible = None
    if candidates.visible is not None and len(length) == shape[0]:
      visible = inputs.visible(
        candidates, length, real, self.config.encoder.causal
      )
    return flight.Checked(length, candidates, context, shape, real, visible)

  def _lengths_after(
    self, cache: HistoryCache, events: History
  ) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of new events, and the users' lengths with them."""
    self.config.require_extendable()
    new, _ = inputs.lengths(self.config.schema, events)
    info = self._check_cache(cache, len(new), 'events')
    length = info.length.copy()
    length[: len(new)] += new
    length.setflags(write=False)
    return new, length

  def _new_cache(self, keys, values, length) -> HistoryCache:
    info = CacheInfo(length, self.fingerprint, self.options.row_buckets)
    return HistoryCache.of_users(keys, values, info)

  def _write_history(
    self,
    history: History,
    length: np.ndarray,
    request: flight.Checked | None = None,
  ) -> tuple[programs.Program, transport.Slot]:
    """What reads the histories, and then scores if there is a request."""
    rows = self.options.rows(len(length))
    events = self.options.events(int(length.max(initial=0)))
    sizes = programs.Sizes(rows, events)
    program, slot = self._slot('encode', sizes, request)
    schema = self.config.schema
    inputs.numbers(length, slot.views['length'])
    inputs.history(schema, history, length, slot.views['history'])
    given = [] if request is None else [request]
    self._check_values(program, slot, given, history, length)
    return program, slot

  def _write_events(
    self,
    cache: HistoryCache,
    events: History,
    new: np.ndarray,
    length: np.ndarray,
    donate: bool,
    request: flight.Checked | None = None,
  ) -> tuple[programs.Program, transport.Slot]:
    """What extends the cache, and then scores if there is a request."""
    longest = int(length.max(initial=0))
    capacity = cache.capacity
    if longest > capacity:
      capacity = self.options.events(longest)
    sizes = programs.Sizes(
      cache.num_rows,
      self.options.new_events(int(new.max(initial=0))),
      capacity=capacity,
      donate=donate and capacity == cache.capacity,
    )
    program, slot = self._slot('extend', sizes, request)
    inputs.numbers(cache.length, slot.views['length'])
    inputs.numbers(new, slot.views['new'])
    schema = self.config.schema
    inputs.history(schema, events, new, slot.views['history'])
    given = [] if request is None else [request]
    self._check_values(program, slot, given, events, new)
    return program, slot

  def _slot(
    self,
    kind: Literal['encode', 'extend'],
    sizes: programs.Sizes,
    request: flight.Checked | None,
  ) -> tuple[programs.Program, transport.Slot]:
    """A program of this kind, and its slot with the request, if any."""
    if request is None:
      program = self._program(kind, sizes)
      return program, self._transport.slot(program.layout)
    sizes = sizes._replace(
      candidates=self.options.candidates(
        request.shape[1], self.options.microbatch
      ),
      visible=request.visible is not None,
    )
    program = self._program(f'{kind}_and_score', sizes)
    slot = self._new_slot(program)
    request.write(self.config.schema, slot.views)
    return program, slot

  def _write(
    self,
    requests: Sequence[flight.Checked],
    caches: Sequence[HistoryCache],
  ) -> tuple[programs.Program, transport.Slot]:
    """The program of requests of one bucket, and what it is to read."""
    first = caches[0]
    key = (
      first.num_rows,
      first.capacity,
      self.options.candidates(
        max([x.shape[1] for x in requests]), self.options.microbatch
      ),
      not all([x.visible is None for x in requests]),
      len(requests),
    )
    program = self._of_sizes.get(key)
    if program is None:  # A `Sizes` takes longer to make than to look up.
      sizes = programs.Sizes(*key[:4], requests=buckets.of_requests(key[4]))
      program = self._of_sizes[key] = self._program('score', sizes)
    slot = self._new_slot(program)
    for views, request, cache in zip(
      slot.requests, requests, caches, strict=False
    ):
      inputs.numbers(cache.length, views['length'])
      request.write(self.config.schema, views)
    for views in slot.requests[len(requests) :]:  # Of nobody, and looked at.
      for view in views.values():
        view.clear()
    return program, slot

  def _check_values(
    self,
    program: programs.Program,
    slot: transport.Slot,
    requests: Iterable[flight.Checked],
    history: History | None = None,
    length: np.ndarray | None = None,
  ) -> None:
    """Raises ValueError if a value was written that must not be."""
    if program.layout.is_good(slot.buffer, slot.views):
      return
    if history is not None and length is not None:
      inputs.check_history(self.config.schema, history, length)
    for request in requests:
      request.check(self.config.schema)
    raise AssertionError('what is not of the request is not good')

  def _fly(
    self,
    requests: Sequence[flight.Checked],
    caches: Sequence[HistoryCache],
    program: programs.Program,
    slot: transport.Slot,
  ) -> list[Pending]:
    """Scores requests of one bucket, as they were written."""
    first = caches[0]
    keys: Any = first.keys
    values: Any = first.values
    if (more := len(slot.requests)) > 1:
      caches = [*caches, *[first] * (more - len(caches))]
      keys = tuple(x.keys for x in caches)
      values = tuple(x.values for x in caches)
    logits = self._checked_call(program, slot, (keys, values), requests)
    rows = first.num_rows
    parts = [(i * rows, x.shape, x.real) for i, x in enumerate(requests)]
    return self._pending(program, slot, logits, parts)

  def _compile(self, job: ahead.Job) -> None:
    """Runs a program on what is in its slot."""
    cached: list[Any] = []
    if job.capacity:  # A new one: the last may have been donated.
      sizes = programs.Sizes(job.sizes.rows, job.capacity)
      encode = self._program('encode', sizes)
      slot = self._transport.slot(encode.layout)
      *cached, done = self._call(encode, slot)
      self._transport.release(encode.layout, slot, done)
      if (more := job.sizes.requests) > 1:
        cached = [(x,) * more for x in cached]
    program = self._program(job.kind, job.sizes)
    if job.kind == 'score' and self._record(program, job, tuple(cached))[0]:
      return
    slot = self._transport.slot(program.layout)
    jax.block_until_ready(self._call(program, slot, *cached))
    self._transport.release(program.layout, slot)
    if 'score' in job.kind:
      self._log(program)

  def _record(
    self, program: programs.Program, job: ahead.Job, cached: Any, pages: int = 0
  ) -> tuple[bool, Any]:
    """Records a program, if it can be, to be replayed from now on.

    Args:
      program: of this scorer.
      job: what it is.
      cached: a cache's keys and values, or a pool, which may be donated.
      pages: of a pool; 0: there is none.

    Returns:
      Whether it is recorded, and what has the place of `cached`.
    """
    if program in self._recordings:
      return True, cached
    plan = graphs.marked(self._plan) if self.options.cuda_graphs else None
    if plan is None or self.device is None:
      return False, cached
    sizes = job.sizes
    marked = programs.program(plan, job.kind, sizes)
    recording = graphs.Recording(
      marked, self.device, self._weights, cached, sizes.donate, not pages
    )
    try:
      self._compilations.call(recording.record)
      recording.check(sizes.capacity or sizes.events, sizes.events, pages)
    except (graphs.CannotRecordError, cuda.Error) as error:
      if str(error) not in self._unrecorded:
        self._unrecorded.add(str(error))
        logging.warning('%s is not a CUDA graph: %s', job.kind, error)
      return False, recording.pool if pages else cached
    if pages:
      cached = recording.pool
    recording.pool = None
    self._recordings[program] = recording
    program.backends = marked.backends
    self._log(program)
    return True, cached

  def _num_recorded(self, jobs: Iterable[ahead.Job]) -> int:
    """How many of these programs are replayed."""
    return sum(
      self._program(job.kind, job.sizes) in self._recordings for job in jobs
    )

  def _new_slot(self, program: programs.Program) -> transport.Slot:
    """Room for a request to a program."""
    recording = self._recordings.get(program)
    if recording is not None:
      return recording.slot()
    return self._transport.slot(program.layout)

  def _carrier(
    self, slot: transport.Slot
  ) -> transport.Transport | graphs.Recording:
    """Whose slot it is."""
    return slot.recording if isinstance(slot, graphs.Slot) else self._transport

  def _program(self, kind: Any, sizes: programs.Sizes) -> programs.Program:
    key = (kind, sizes)
    if key not in self._programs:
      self._programs[key] = programs.program(self._plan, kind, sizes)
    return self._programs[key]

  def _call(
    self, program: programs.Program, slot: transport.Slot, *cached: Any
  ) -> Any:
    if isinstance(slot, graphs.Slot):
      return slot.recording.launch(slot, cached)
    with graphs.exclusive:
      return self._compilations.call(
        program.call, self._weights, *cached, slot.array
      )

  def _checked_call(
    self,
    program: programs.Program,
    slot: transport.Slot,
    cached: Any,
    requests: Iterable[flight.Checked],
    history: History | None = None,
    length: np.ndarray | None = None,
  ) -> Any:
    """`_check_values` and `_call`, while the device works if that may be.

    No program is compiled for a bad request, and none is given a cache or pool
    that it takes: a recorded one returns the pool that it was given, and what
    it wrote for a request that is then refused means nothing.
    """
    late = isinstance(slot, graphs.Slot) or (
      history is None and program in self._told
    )
    if not late:
      self._check_values(program, slot, requests, history, length)
    found = self._call(program, slot, *cached)
    if late:
      try:
        self._check_values(program, slot, requests, history, length)
      except ValueError:
        logits = found[-1] if isinstance(found, tuple) else found
        self._carrier(slot).release(program.layout, slot, logits)
        raise
    return found

  def _check_cache(
    self, cache: HistoryCache, num_rows: int, what: str
  ) -> CacheInfo:
    info = cache_lib.info_of(cache)
    if info.fingerprint != self.fingerprint:
      raise ValueError(
        f'cache was made by the model {info.fingerprint[:12]}, and this '
        f'scorer has {self.fingerprint[:12]}: another config or other '
        'parameters; encode the history again'
      )
    cache_lib.check_devices(
      cache, self._devices, 'cache is', 'the parameters of this scorer'
    )
    if num_rows > info.num_users:
      raise ValueError(
        f'{what} have {num_rows} rows, the cache {info.num_users}; '
        'encode every user first'
      )
    return info

  def _log(self, program: programs.Program) -> None:
    """Says what a program runs; each line once."""
    self._told.add(program)
    for line in program.backends.items():
      if line not in self._logged:
        self._logged.add(line)
        logging.info('%s runs as %r', *line)

  def _pending(
    self,
    program: programs.Program,
    slot: transport.Slot,
    logits: jax.Array,
    parts: Iterable[flight.Part],
  ) -> list[Pending]:
    """Those of each part of the logits."""
    at_work, tasks = self._flight(program, slot, logits), self._tasks
    return [Pending(at_work, *part, tasks) for part in parts]

  def _flight(
    self, program: programs.Program, slot: transport.Slot, logits: jax.Array
  ) -> flight.Flight:
    if program not in self._told:
      self._log(program)
    return flight.Flight(program, slot, logits, self._carrier(slot))


def _check_size(name: str, size: int, least: int) -> None:
  if not isinstance(size, (int, np.integer)) or size < least:
    raise ValueError(f'{name}={size!r} must be an integer >= {least}')
