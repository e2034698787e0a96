"""The scorer.

    scorer = Scorer.from_workdir('/tmp/run')      # or Scorer(config, params)
    batch = collate([scorer.make_row(context=.., history=.., candidates=..)])
    cache = scorer.encode(context, history)       # one pass over the history
    logits = scorer.score(cache, candidates)      # {task: [B, C]}
    cache = scorer.extend(cache, new_events)      # the user did something
    logits = scorer.score_joint(batch)            # both, in a single pass
    logits = scorer.score_plain(batch)            # one row per candidate

The three ways to score give the same logits from the same parameters. Inputs
are padded to buckets, so that a program is compiled once per bucket (twice with
`visible` and without) and not once per length; scores do not depend on the
padding.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from histjax import buckets
from histjax.models import ranker
from histjax.ops import devices, dispatch
from histjax.scoring import compilations, inputs, programs
from histjax.scoring import fingerprint as fingerprint_lib
from histjax.types import (
  CacheInfo,
  Candidates,
  History,
  HistoryCache,
  RankingBatch,
)

if TYPE_CHECKING:
  from histjax.data import requests, rows
  from histjax.training import run as run_lib

Logits: TypeAlias = dict[str, Float[np.ndarray, 'B C']]
"""`{task: [B, C]}`, float32 in host memory; at padding they mean nothing."""

_SMALLEST_HISTORY = 16
_SMALLEST_CANDIDATES = 16


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
  """How a `Scorer` pads and splits its work.

  Attributes:
    microbatch: candidates per row scored at once from a cache.
    plain_microbatch: the same for `score_plain`, where each is a whole pass.
    history_buckets: the lengths to pad histories to, ascending; a longer
      history is refused. Empty: `buckets.bucket_size`, without a limit.
      (The new events of `extend` are padded to 1, 2, 4, .. in any case.)
    candidate_buckets: the same for candidates, up to `microbatch`; beyond it
      they are padded to a multiple of `microbatch`.
    row_buckets: the same for rows. Empty: powers of two.
  """

  microbatch: int = 1024
  plain_microbatch: int = 64
  history_buckets: tuple[int, ...] = ()
  candidate_buckets: tuple[int, ...] = ()
  row_buckets: tuple[int, ...] = ()

  def __post_init__(self):
    for field in ('microbatch', 'plain_microbatch'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be at least 1')
    for field in ('history_buckets', 'candidate_buckets', 'row_buckets'):
      sizes = buckets.check(field, getattr(self, field))
      object.__setattr__(self, field, sizes)


class Scorer:
  """Scores candidates with one parameter set in three equal ways.

  Inputs are ragged through `length` and `mask`. They are checked and padded on
  the host (see `scoring.inputs`), and the logits, which have the caller's
  shape, come back to the host and are checked as well: a value that is large
  enough to overflow, or an id outside its table in a device array, is a
  ValueError and never a NaN.
  """

  def __init__(
    self,
    config: ranker.RankerConfig,
    params: Mapping[str, Any],
    scorer_config: ScorerConfig | None = None,
  ):
    """Makes a scorer.

    Args:
      config: of the model that `params` belong to.
      params: as `Ranker.init(...)['params']`. It runs where they are, if they
        were put on a device, else on JAX's default device.
      scorer_config: padding and microbatches.
    """
    self.config = config
    self.options = scorer_config or ScorerConfig()
    self._run: run_lib.Run | None = None
    self._compilations = compilations.Counter()
    self._logged: set[tuple[str, str]] = set()
    params = jax.device_put(params)
    leaf = jax.tree.leaves(params)[0]
    target = devices.Target.of(
      dispatch.device_of(leaf if leaf.committed else None)
    )
    pack = jax.jit(functools.partial(ranker.pack, config))
    self._params = {'params': params}
    self._variables = {'params': params, **pack(params)}
    model = ranker.Ranker(config)

    def on_target(function: Callable, **options: Any) -> Callable:
      """Of the model; traced for the device that will run it."""

      def traced(variables, *args, **kwargs):
        with dispatch.on(target):
          return function(model, variables, *args, **options, **kwargs)

      traced.__name__ = function.__name__  # In profiles and logs.
      return traced

    self._trace_score = on_target(
      programs.score_microbatched, microbatch=self.options.microbatch
    )
    self._score = jax.jit(self._trace_score)
    self._encode = jax.jit(on_target(_encode))
    self._extend = jax.jit(
      on_target(programs.extend), static_argnames='capacity'
    )
    self._joint = jax.jit(on_target(_joint))
    self._plain = jax.jit(
      on_target(programs.score_plain, microbatch=self.options.plain_microbatch)
    )

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

    run = run_lib.load(workdir, which)
    scorer = cls(run.config.model, run.params, scorer_config)
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

    if self._run is None:
      raise ValueError(
        'this scorer was made of parameters, and knows no columns; use '
        'Scorer.from_workdir, or histjax.make_row'
      )
    data = self._run.config.data
    return requests.make_row(
      self.config.schema,
      context=context,
      history=history,
      candidates=candidates,
      config=data.eval_rows or data.rows,
      features=self._run.features,
      **options,
    )

  @property
  def num_compilations(self) -> int:
    """Programs that XLA compiled in calls of this scorer, of any kind."""
    return self._compilations.number

  @functools.cached_property
  def fingerprint(self) -> str:
    """Of config and parameters; computed when first asked for, as by `encode`.

    A cache carries that of its maker, and another model refuses it.
    """
    return fingerprint_lib.fingerprint(self.config, self._params['params'])

  def encode(
    self, context: Mapping[str, Any], history: History
  ) -> HistoryCache:
    """Reads each user's history once.

    Args:
      context: `{name: [B]}`.
      history: `[B, L]`, real events first; `length` at most L.

    Returns:
      The cache, `B` and `L` padded to buckets. Rows keep their order.

    Raises:
      ValueError: the fusion is not amortizable, or an input is malformed.
    """
    self.config.require_amortizable()
    length = inputs.lengths(self.config.schema, history)
    rows = self._rows(len(length))
    padded_context = inputs.context(
      self.config.schema, context, len(length), rows
    )
    padded = self._pad_history(history, length, rows)
    with self._compilations.counting():
      cache = self._encode(self._variables, padded_context, padded)
    return cache.replace(info=CacheInfo(length, self.fingerprint))

  def score(self, cache: HistoryCache, candidates: Candidates) -> Logits:
    """Scores candidates from a cache; cost does not include the history's.

    Args:
      cache: of `encode` or `extend`.
      candidates: `[B, C]`; row b belongs to user b of the cache.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: a cache of another model, more rows than it has users,
        `visible` beyond the history, another malformed input, or a logit that
        is not finite.
    """
    shape, *arguments = self._score_arguments(cache, candidates)
    with self._compilations.counting(), dispatch.record() as used:
      logits = self._score(self._variables, *arguments)
    if used:
      self._log(dispatch.names(used))
    return _to_host(logits, shape, candidates)

  def backends(
    self, cache: HistoryCache, candidates: Candidates
  ) -> dict[str, str]:
    """What `score` would run: are the kernels used?

    Computes nothing. The first `score` logs the same. To learn why a kernel is
    not used, name it as `EncoderConfig.candidate_tower` and read the error.

    Args:
      cache: as `score`.
      candidates: likewise.

    Returns:
      `{operation: implementation}`: `{'candidate_tower': 'pallas_tpu'}` is one
      kernel for all layers; `{'candidate_tower': 'xla', 'history_attention':
      'cudnn'}` is layer by layer, with that kernel in each; `{}` is plain JAX
      alone, as the fusion 'append_isolated' scores.

    Raises:
      ValueError: as `score`.
      NotImplementedError: the named implementation cannot run here.
    """
    _, *arguments = self._score_arguments(cache, candidates)
    with dispatch.record() as used:
      # A new function: of one that it knows, JAX may keep the trace.
      jax.eval_shape(
        lambda *x: self._trace_score(*x), self._variables, *arguments
      )
    return dispatch.names(used)

  def extend(self, cache: HistoryCache, events: History) -> HistoryCache:
    """Appends each user's new events; equals `encode` of the longer history.

    Args:
      cache: of `encode` or `extend`.
      events: `[B, E]`, `length[b]` of them new for user b (0 for none).

    Returns:
      A new cache; its capacity grows by buckets when a history outgrows it.

    Raises:
      ValueError: the history is bidirectional or its positions are not
        relative, the cache is another model's, there are more rows than it has
        users, or the input is malformed.
    """
    self.config.require_extendable()
    new = inputs.lengths(self.config.schema, events)
    length = self._check_cache(cache, len(new), 'events').length.copy()
    length[: len(new)] += new
    length.setflags(write=False)
    longest = int(length.max(initial=0))
    capacity = cache.capacity
    if longest > capacity:
      capacity = self._history_bucket(longest)
    # New events are few: buckets of their own, not the histories'.
    num_events = buckets.bucket_size(int(new.max(initial=0)), 1)
    padded = inputs.history(
      self.config.schema, events, new, (cache.num_rows, num_events)
    )
    with self._compilations.counting():
      longer = self._extend(self._params, cache, padded, capacity=capacity)
    return longer.replace(info=CacheInfo(length, self.fingerprint))

  def score_joint(self, batch: RankingBatch) -> Logits:
    """Scores in one pass whose queries are the history and the candidates.

    Args:
      batch: rows; labels and group are not read.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: an input is malformed, or a logit is not finite.
    """
    shape, padded = self._pad_batch(batch, self.options.microbatch)
    with self._compilations.counting():
      logits = self._joint(self._variables, padded)
    return _to_host(logits, shape, batch.candidates)

  def score_plain(self, batch: RankingBatch) -> Logits:
    """Scores each candidate as a row of its own; any fusion.

    Args:
      batch: rows; labels and group are not read.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: an input is malformed, or a logit is not finite.
    """
    shape, padded = self._pad_batch(batch, self.options.plain_microbatch)
    with self._compilations.counting():
      logits = self._plain(self._params, padded)
    return _to_host(logits, shape, batch.candidates)

  def _score_arguments(self, cache: HistoryCache, candidates: Candidates):
    """`(B, C)`, and what the program of `score` takes after the variables."""
    self.config.require_amortizable()
    schema = self.config.schema
    shape = inputs.candidates_shape(schema, candidates)
    info = self._check_cache(cache, shape[0], 'candidates')
    columns = self._columns(shape[1], self.options.microbatch)
    padded = inputs.candidates(
      schema,
      candidates,
      info.length[: shape[0]],
      (cache.num_rows, columns),
      self.config.encoder.causal,
    )
    count = inputs.count(candidates, shape, cache.num_rows)
    return shape, cache, padded, count

  def _check_cache(
    self, cache: HistoryCache, num_rows: int, what: str
  ) -> CacheInfo:
    if not isinstance(cache, HistoryCache) or cache.info is None:
      raise ValueError(
        f'cache is a {type(cache).__name__} that no Scorer made, or what a '
        'transformation of JAX made of one; take it as encode or extend '
        'returned it'
      )
    if cache.info.fingerprint != self.fingerprint:
      raise ValueError(
        f'cache was made by the model {cache.info.fingerprint[:12]}, and this '
        f'scorer has {self.fingerprint[:12]}: another config or other '
        'parameters; encode the history again'
      )
    if num_rows > cache.info.num_users:
      raise ValueError(
        f'{what} have {num_rows} rows, the cache {cache.info.num_users}; '
        'encode every user first'
      )
    return cache.info

  def _pad_batch(self, batch: RankingBatch, multiple: int):
    """`(B, C)` and the batch, checked and padded."""
    schema = self.config.schema
    inputs.check_type(batch, RankingBatch, 'batch')
    length = inputs.lengths(schema, batch.history)
    shape = inputs.candidates_shape(schema, batch.candidates)
    inputs.check_rows(shape[0], len(length))
    rows = self._rows(shape[0])
    padded = RankingBatch(
      context=inputs.context(schema, batch.context, shape[0], rows),
      history=self._pad_history(batch.history, length, rows),
      candidates=inputs.candidates(
        schema,
        batch.candidates,
        length,
        (rows, self._columns(shape[1], multiple)),
        self.config.encoder.causal,
      ),
      labels={},
      group=np.zeros(rows, np.int32),
    )
    return shape, padded

  def _pad_history(
    self, history: History, length: np.ndarray, rows: int
  ) -> History:
    num_events = self._history_bucket(int(length.max(initial=0)))
    return inputs.history(
      self.config.schema, history, length, (rows, num_events)
    )

  def _rows(self, number: int) -> int:
    return buckets.fit(number, self.options.row_buckets, 'rows', 1)

  def _history_bucket(self, number: int) -> int:
    return buckets.fit(
      number,
      self.options.history_buckets,
      'events in a history',
      _SMALLEST_HISTORY,
    )

  def _columns(self, number: int, multiple: int) -> int:
    if number > multiple:
      return -(-number // multiple) * multiple
    sizes = self.options.candidate_buckets
    return min(
      buckets.fit(number, sizes, 'candidates', _SMALLEST_CANDIDATES), multiple
    )

  def _log(self, backends: dict[str, str]) -> None:
    """Says what a program that was just traced runs, once."""
    for line in backends.items():
      if line not in self._logged:
        self._logged.add(line)
        logging.info('%s runs as %r', *line)


def _encode(model, variables, context, history):
  return model.apply(variables, context, history, method='encode')


def _joint(model, variables, batch):
  return model.apply(variables, batch)


def _to_host(
  logits: Mapping[str, jax.Array],
  shape: tuple[int, int],
  candidates: Candidates,
) -> Logits:
  """Logits without padding; cut here, so that no size is a program."""
  found = {}
  for task, padded in jax.device_get(logits).items():
    value = padded[: shape[0], : shape[1]]
    bad = ~np.isfinite(value)
    if bad.any():
      real = inputs.real_candidates(candidates)
      bad = bad if real is None else bad & real
    if bad.any():
      row, column = np.argwhere(bad)[0]
      raise ValueError(
        f'the logit {task!r} of row {row}, candidate {column} is '
        f'{value[row, column]}: a dense value is too large for the network, an '
        'id in a device array is outside its table, or a parameter is not '
        'finite; check these'
      )
    found[task] = value
  return found
