"""Scoring: one pass over a history, then any number of candidates.

    scorer = Scorer(config, params)
    cache = scorer.encode(context, history)       # one pass over the history
    logits = scorer.score(cache, candidates)      # {task: [B, C]}
    cache = scorer.extend(cache, new_events)      # the user did something
    logits = scorer.score_joint(batch)            # both, in a single pass
    logits = scorer.score_plain(batch)            # one row per candidate

The three ways to score give the same logits from the same parameters. Inputs
are padded to buckets, so that a program is compiled once per bucket (once more
for inputs that fill it) and not once per length; scores do not depend on the
padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from histjax import ops, padding, validation
from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn import fusion
from histjax.ops import dispatch
from histjax.types import Candidates, History, HistoryCache, RankingBatch

Logits: TypeAlias = Any
"""`{task: [B, C]}` float32."""


def score_microbatched(
  model: Ranker,
  variables: Mapping[str, Any],
  cache: HistoryCache,
  candidates: Candidates,
  *,
  microbatch: int,
  tower: ops.TowerWeights | None = None,
  implementation: str | None = None,
) -> Logits:
  """Scores candidates `microbatch` at a time, so that memory stays bounded.

  The cache is read by every microbatch and made by none (M-FALCON; Zhai et
  al. 2024, arXiv 2402.17152). A pure function; jit it.

  Args:
    model: the ranker.
    variables: its `{'params': ...}`.
    cache: of `model.encode`.
    candidates: `[B, C]`, C at most or a multiple of `microbatch`.
    microbatch: candidates per row and step.
    tower: as `Ranker.score`.
    implementation: likewise.

  Returns:
    `{task: [B, C]}` float32.
  """

  def score(chunk: Candidates) -> Logits:
    return model.apply(
      variables,
      cache,
      chunk,
      tower=tower,
      implementation=implementation,
      method='score',
    )

  return padding.in_chunks(score, candidates, microbatch)


def score_plain(
  model: Ranker,
  variables: Mapping[str, Any],
  batch: RankingBatch,
  *,
  microbatch: int,
) -> Logits:
  """Scores every candidate as a row of its own, with its own history pass.

  What a ranker costs without amortization, and the definition that the other
  ways must equal. A pure function; jit it.

  Args:
    model: the ranker, of any fusion.
    variables: its `{'params': ...}`.
    batch: `[B, C]` candidates, C at most or a multiple of `microbatch`.
    microbatch: candidates per row and step: `B * microbatch` passes at once.

  Returns:
    `{task: [B, C]}` float32.
  """
  num_rows = batch.history.length.shape[0]

  def score(chunk: Candidates) -> Logits:
    num_candidates = chunk.shape[1]
    # Or XLA would take the history's pass, the same for all chunks, out of
    # their loop.
    chunk, history = jax.lax.optimization_barrier((chunk, batch.history))

    def repeat(x):
      return jnp.repeat(jnp.asarray(x), num_candidates, axis=0)

    rows = RankingBatch(
      context=jax.tree.map(repeat, batch.context),
      history=jax.tree.map(repeat, history),
      candidates=jax.tree.map(lambda x: x.reshape(-1, 1), chunk),
      labels={},
      group=repeat(batch.group),
    )
    logits = model.apply(variables, rows)
    return jax.tree.map(lambda x: x.reshape(num_rows, num_candidates), logits)

  return padding.in_chunks(score, batch.candidates, microbatch)


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
  """How a `Scorer` pads and splits its work.

  Attributes:
    microbatch: candidates per row scored at once from a cache.
    plain_microbatch: the same for `score_plain`, where each is a whole pass.
    history_buckets: the lengths to pad histories to, ascending; a longer
      history is refused. Empty: `padding.bucket_size`, without a limit.
    candidate_buckets: the same for candidates, up to `microbatch`; beyond it
      they are padded to a multiple of `microbatch`.
    row_buckets: the same for rows. Empty: powers of two.
    candidate_tower: the implementation of `ops.candidate_tower`, which reads
      histories and scores with the fusion 'append_cross'; None picks the
      fastest that can. (`encoder.attention` names that of the attention alone,
      and then histories are read block by block.)
  """

  microbatch: int = 1024
  plain_microbatch: int = 64
  history_buckets: tuple[int, ...] = ()
  candidate_buckets: tuple[int, ...] = ()
  row_buckets: tuple[int, ...] = ()
  candidate_tower: str | None = None

  def __post_init__(self):
    for field in ('microbatch', 'plain_microbatch'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be at least 1')
    for field in ('history_buckets', 'candidate_buckets', 'row_buckets'):
      buckets = tuple(getattr(self, field))
      if list(buckets) != sorted(set(buckets)) or (buckets and buckets[0] < 1):
        raise ValueError(
          f'{field}={buckets} must be positive and strictly ascending'
        )
      object.__setattr__(self, field, buckets)


class Scorer:
  """Scores candidates with one parameter set in three equal ways.

  Inputs are NumPy or JAX arrays, ragged through `length` and `mask`; they are
  checked and padded on the host, once, and the logits have the caller's
  shape.
  """

  def __init__(
    self,
    config: RankerConfig,
    params: Mapping[str, Any],
    scorer_config: ScorerConfig | None = None,
  ):
    """Makes a scorer.

    Args:
      config: of the model that `params` belong to.
      params: as `Ranker.init(...)['params']`.
      scorer_config: padding and microbatches.

    Raises:
      ValueError: it names a `candidate_tower`, and the fusion has none.
    """
    self.config = config
    self.options = scorer_config or ScorerConfig()
    self._schema = config.schema
    self._variables = {'params': params}
    self._tower = None
    if config.fusion == 'append_cross':
      pack = jax.jit(fusion.pack_tower, static_argnames='dtype')
      self._tower = pack(params['fusion'], dtype=config.dtype)
    elif self.options.candidate_tower is not None:
      raise ValueError(
        f'candidate_tower={self.options.candidate_tower!r}, but only '
        f"fusion='append_cross' has one, not {config.fusion!r}; set "
        'candidate_tower=None'
      )
    self._logged: set[tuple[str, str]] = set()
    model = Ranker(config)
    microbatch = self.options.microbatch
    plain_microbatch = self.options.plain_microbatch

    def options(tower):
      # A named attention runs layer by layer.
      if tower is None or config.encoder.attention is not None:
        return {}
      return {
        'tower': tower,
        'implementation': self.options.candidate_tower,
      }

    def encode(variables, tower, context, history):
      return model.apply(
        variables, context, history, method='encode', **options(tower)
      )

    def joint(variables, tower, batch):
      return model.apply(variables, batch, **options(tower))

    def score(variables, tower, cache, candidates):
      return score_microbatched(
        model,
        variables,
        cache,
        candidates,
        microbatch=microbatch,
        tower=tower,
        implementation=self.options.candidate_tower,
      )

    def extend(variables, cache, events, *, capacity):
      grow = capacity - cache.capacity
      width = [(0, 0), (0, 0), (0, grow), (0, 0), (0, 0)]
      cache = cache.replace(
        keys=jnp.pad(cache.keys, width), values=jnp.pad(cache.values, width)
      )
      return model.apply(variables, cache, events, method='extend')

    def plain(variables, batch):
      return score_plain(model, variables, batch, microbatch=plain_microbatch)

    self._encode = jax.jit(encode)
    self._score = jax.jit(score)
    self._trace_score = score
    self._extend = jax.jit(extend, static_argnames='capacity')
    self._joint = jax.jit(joint)
    self._plain = jax.jit(plain)

  @property
  def num_compilations(self) -> int:
    """Programs compiled so far, over all methods."""
    functions: list[Any] = [
      self._encode,
      self._score,
      self._extend,
      self._joint,
      self._plain,
    ]
    return sum(f._cache_size() for f in functions)

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
    num_rows = validation.check_history(self._schema, history)
    context = validation.check_context(self._schema, context, num_rows)
    rows = padding.bucket(num_rows, self.options.row_buckets, 'rows', 1)
    return self._encode(
      self._variables,
      self._tower,
      padding.pad(context, (rows,)),
      self._pad_history(history, rows),
    )

  def score(self, cache: HistoryCache, candidates: Candidates) -> Logits:
    """Scores candidates from a cache; cost does not include the history's.

    Args:
      cache: of `encode` or `extend`.
      candidates: `[B, C]`; row b belongs to row b of the cache.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: more rows than the cache has, `visible` beyond the history,
        or another malformed input.
    """
    padded = self._check_candidates(cache, candidates)
    with dispatch.record() as used:
      logits = self._score(self._variables, self._tower, cache, padded)
    for line in dispatch.names(used).items():
      if line not in self._logged:
        self._logged.add(line)
        logging.info('%s runs as %r', *line)
    return _cropped(logits, candidates.shape)

  def backends(
    self, cache: HistoryCache, candidates: Candidates
  ) -> dict[str, str]:
    """What `score` would run: are the kernels used?

    Computes nothing. The first `score` logs the same. To learn why a kernel is
    not used, name it as `ScorerConfig.candidate_tower` and read the error.

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
    padded = self._check_candidates(cache, candidates)
    arguments = (self._variables, self._tower, cache, padded)
    with dispatch.record() as used:
      # A new function: of one that it knows, JAX may keep the trace.
      jax.eval_shape(lambda *args: self._trace_score(*args), *arguments)
    return dispatch.names(used)

  def extend(self, cache: HistoryCache, events: History) -> HistoryCache:
    """Appends each user's new events; equals `encode` of the longer history.

    Args:
      cache: of `encode` or `extend`.
      events: `[B, E]`, `length[b]` of them new for row b (0 for none).

    Returns:
      A new cache; its capacity grows by buckets when a history outgrows it.

    Raises:
      ValueError: the history is bidirectional or its positions are not
        relative, the rows do not match, or the input is malformed.
    """
    self.config.require_extendable()
    num_rows = validation.check_history(self._schema, events)
    if num_rows > cache.num_rows:
      raise ValueError(
        f'events have {num_rows} rows, the cache {cache.num_rows}; encode '
        'every user first'
      )
    length = np.asarray(cache.length)[:num_rows] + np.asarray(events.length)
    longest = int(length.max(initial=0))
    capacity = cache.capacity
    if longest > capacity:
      capacity = padding.bucket(
        longest, self.options.history_buckets, 'events in a history', 16
      )
    padded = self._pad_history(events, cache.num_rows, smallest=1)
    return self._extend(self._variables, cache, padded, capacity=capacity)

  def score_joint(self, batch: RankingBatch) -> Logits:
    """Scores in one pass whose queries are the history and the candidates.

    Args:
      batch: rows; labels and group are not read.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: an input is malformed.
    """
    joint = functools.partial(self._joint, self._variables, self._tower)
    return self._whole(joint, batch, self.options.microbatch)

  def score_plain(self, batch: RankingBatch) -> Logits:
    """Scores each candidate as a row of its own; any fusion.

    Args:
      batch: rows; labels and group are not read.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: an input is malformed.
    """
    plain = functools.partial(self._plain, self._variables)
    return self._whole(plain, batch, self.options.plain_microbatch)

  def _check_candidates(
    self, cache: HistoryCache, candidates: Candidates
  ) -> Candidates:
    """Checked and padded for `score`."""
    self.config.require_amortizable()
    num_rows, _ = validation.check_candidates(self._schema, candidates)
    if num_rows > cache.num_rows:
      raise ValueError(
        f'candidates have {num_rows} rows, the cache {cache.num_rows}; '
        'encode every user first'
      )
    if candidates.visible is not None:
      length = np.asarray(cache.length)[:num_rows]
      candidates = validation.check_visible(
        candidates, length, causal=self.config.encoder.causal
      )
    return self._pad_candidates(
      candidates, cache.num_rows, self.options.microbatch
    )

  def _whole(self, function: Callable, batch: RankingBatch, multiple: int):
    num_rows = validation.check_history(self._schema, batch.history)
    context = validation.check_context(self._schema, batch.context, num_rows)
    candidate_rows, num_candidates = validation.check_candidates(
      self._schema, batch.candidates
    )
    if candidate_rows != num_rows:
      raise ValueError(
        f'candidates have {candidate_rows} rows, history {num_rows}'
      )
    candidates = validation.check_visible(
      batch.candidates,
      np.asarray(batch.history.length),
      causal=self.config.encoder.causal,
    )
    rows = padding.bucket(num_rows, self.options.row_buckets, 'rows', 1)
    padded = RankingBatch(
      context=padding.pad(context, (rows,)),
      history=self._pad_history(batch.history, rows),
      candidates=self._pad_candidates(candidates, rows, multiple),
      labels={},
      group=np.zeros(rows, np.int32),
    )
    logits = function(padded)
    return _cropped(logits, (num_rows, num_candidates))

  def _pad_history(
    self, history: History, rows: int, smallest: int = 16
  ) -> History:
    # An event beyond every length is padding already, and may be cut.
    length = np.asarray(history.length, np.int32)
    num_events = padding.bucket(
      int(max(length, default=0)),
      self.options.history_buckets,
      'events in a history',
      smallest,
    )
    features = {
      f.name: history.features[f.name][:, :num_events]
      for f in self._schema.history_features
    }
    given = next(iter(features.values())).shape[1]
    real = np.arange(given)[None, :] < length[:, None]
    return History(
      features=padding.pad(features, (rows, num_events), real),
      length=padding.pad(length, (rows,)),
    )

  def _pad_candidates(
    self, candidates: Candidates, rows: int, multiple: int
  ) -> Candidates:
    count = candidates.shape[1]
    if count > multiple:
      padded = -(-count // multiple) * multiple
    else:
      padded = min(
        padding.bucket(count, self.options.candidate_buckets, 'candidates', 16),
        multiple,
      )
    features = {
      f.name: candidates.features[f.name] for f in self._schema.item_features
    }
    visible, mask = candidates.visible, candidates.mask
    real = np.ones(candidates.shape, bool) if mask is None else mask
    # Without a mask, a kernel need not look for what it need not compute.
    whole = candidates.shape == (rows, padded) and bool(real.all())
    return Candidates(
      features=padding.pad(features, (rows, padded), mask),
      visible=None if visible is None else padding.pad(visible, (rows, padded)),
      mask=None if whole else padding.pad(real, (rows, padded)),
    )


def _cropped(logits: Logits, shape: tuple[int, int]) -> Logits:
  """Without padding; each cut is a program of its own, so only if needed."""
  num_rows, num_candidates = shape
  return {
    k: v if v.shape == shape else v[:num_rows, :num_candidates]
    for k, v in logits.items()
  }
