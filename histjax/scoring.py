"""Scoring: one pass over a history, then any number of candidates.

    scorer = Scorer(config, params)
    cache = scorer.encode(context, history)       # one pass over the history
    logits = scorer.score(cache, candidates)      # {task: [B, C]}
    cache = scorer.extend(cache, new_events)      # the user did something
    logits = scorer.score_joint(batch)            # both, in a single pass
    logits = scorer.score_plain(batch)            # one row per candidate

The three ways to score give the same logits from the same parameters. Inputs
are padded to buckets, so that a program is compiled once per bucket and not
once per length; scores do not depend on the padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from histjax.data import schema as schema_lib
from histjax.models.ranker import Ranker, RankerConfig
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

  Returns:
    `{task: [B, C]}` float32.
  """

  def score(chunk: Candidates) -> Logits:
    return model.apply(variables, cache, chunk, method='score')

  return _in_chunks(score, candidates, microbatch)


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

    def repeat(x):
      return jnp.repeat(jnp.asarray(x), num_candidates, axis=0)

    rows = RankingBatch(
      context=jax.tree.map(repeat, batch.context),
      history=jax.tree.map(repeat, batch.history),
      candidates=jax.tree.map(lambda x: x.reshape(-1, 1), chunk),
      labels={},
      group=repeat(batch.group),
    )
    logits = model.apply(variables, rows)
    return jax.tree.map(lambda x: x.reshape(num_rows, num_candidates), logits)

  return _in_chunks(score, batch.candidates, microbatch)


def bucket_size(n: int, smallest: int = 16) -> int:
  """The smallest of 16, 32, 64, 96, 128, 192, 256, .. that holds `n`.

  Powers of two and one step between them: at most a third is padding (half
  below 64).
  """
  size = smallest
  while size < n:
    if size >= 64 and size * 3 // 2 >= n:
      return size * 3 // 2
    size *= 2
  return size


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
  """How a `Scorer` pads and splits its work.

  Attributes:
    microbatch: candidates per row scored at once from a cache.
    plain_microbatch: the same for `score_plain`, where each is a whole pass.
    history_buckets: the lengths to pad histories to, ascending; a longer
      history is refused. Empty: `bucket_size`, without a limit.
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
  shape. Methods are thread-safe.
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
    """
    self.config = config
    self.options = scorer_config or ScorerConfig()
    self._variables = {'params': params}
    model = Ranker(config)
    microbatch = self.options.microbatch
    plain_microbatch = self.options.plain_microbatch

    def encode(variables, context, history):
      return model.apply(variables, context, history, method='encode')

    def score(variables, cache, candidates):
      return score_microbatched(
        model, variables, cache, candidates, microbatch=microbatch
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
    self._extend = jax.jit(extend, static_argnames='capacity')
    self._joint = jax.jit(model.apply)
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
    num_rows = self._check_history(history)
    context = self._check_context(context, num_rows)
    rows = _bucket(num_rows, self.options.row_buckets, 'rows', 1)
    return self._encode(
      self._variables,
      _pad(context, (rows,)),
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
    self.config.require_amortizable()
    num_rows, num_candidates = self._check_candidates(candidates)
    if num_rows > cache.num_rows:
      raise ValueError(
        f'candidates have {num_rows} rows, the cache {cache.num_rows}; '
        'encode every user first'
      )
    if candidates.visible is not None:
      length = np.asarray(cache.length)[:num_rows]
      candidates = self._check_visible(candidates, length)
    padded = self._pad_candidates(
      candidates, cache.num_rows, self.options.microbatch
    )
    logits = self._score(self._variables, cache, padded)
    return {k: v[:num_rows, :num_candidates] for k, v in logits.items()}

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
    num_rows = self._check_history(events)
    if num_rows > cache.num_rows:
      raise ValueError(
        f'events have {num_rows} rows, the cache {cache.num_rows}; encode '
        'every user first'
      )
    length = np.asarray(cache.length)[:num_rows] + np.asarray(events.length)
    longest = int(length.max(initial=0))
    capacity = cache.capacity
    if longest > capacity:
      capacity = _bucket(
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
    return self._whole(self._joint, batch, self.options.microbatch)

  def score_plain(self, batch: RankingBatch) -> Logits:
    """Scores each candidate as a row of its own; any fusion.

    Args:
      batch: rows; labels and group are not read.

    Returns:
      `{task: [B, C]}` float32; values at padding mean nothing.

    Raises:
      ValueError: an input is malformed.
    """
    return self._whole(self._plain, batch, self.options.plain_microbatch)

  def _whole(self, function: Callable, batch: RankingBatch, multiple: int):
    num_rows = self._check_history(batch.history)
    context = self._check_context(batch.context, num_rows)
    candidate_rows, num_candidates = self._check_candidates(batch.candidates)
    if candidate_rows != num_rows:
      raise ValueError(
        f'candidates have {candidate_rows} rows, history {num_rows}'
      )
    candidates = self._check_visible(
      batch.candidates, np.asarray(batch.history.length)
    )
    rows = _bucket(num_rows, self.options.row_buckets, 'rows', 1)
    padded = RankingBatch(
      context=_pad(context, (rows,)),
      history=self._pad_history(batch.history, rows),
      candidates=self._pad_candidates(candidates, rows, multiple),
      labels={},
      group=np.zeros(rows, np.int32),
    )
    logits = function(self._variables, padded)
    return {k: v[:num_rows, :num_candidates] for k, v in logits.items()}

  def _check_context(self, context, num_rows: int) -> dict[str, Any]:
    spec = self.config.schema.context
    _check_shapes('context', context, spec, (num_rows,))
    _check_values('context', context, spec)
    return {f.name: context[f.name] for f in spec}

  def _check_history(self, history: History) -> int:
    spec = self.config.schema.history_features
    shape = _check_shapes('history.features', history.features, spec)
    length = np.asarray(history.length)
    if len(shape) != 2 or length.shape != shape[:1]:
      raise ValueError(
        f'history: features have shape {shape} and length {length.shape}; '
        'they must be [B, L] and [B]'
      )
    if length.size and not 0 <= length.min() <= length.max() <= shape[1]:
      raise ValueError(
        f'history.length spans [{length.min()}, {length.max()}], outside '
        f'[0, L] with L={shape[1]}'
      )
    real = np.arange(shape[1])[None, :] < length[:, None]
    _check_values('history.features', history.features, spec, real)
    return shape[0]

  def _check_candidates(self, candidates: Candidates) -> tuple[int, int]:
    spec = self.config.schema.item_features
    shape = _check_shapes('candidates.features', candidates.features, spec)
    if len(shape) != 2:
      raise ValueError(
        f'candidates: features have shape {shape}; it must be [B, C]'
      )
    for field in ('visible', 'mask'):
      value = getattr(candidates, field)
      if value is not None and np.shape(value) != shape:
        raise ValueError(
          f'candidates.{field} has shape {np.shape(value)}; features have '
          f'{shape}'
        )
    mask = candidates.mask
    real = None if mask is None else np.asarray(mask, bool)
    _check_values('candidates.features', candidates.features, spec, real)
    return shape

  def _check_visible(
    self, candidates: Candidates, length: np.ndarray
  ) -> Candidates:
    """Checks `visible`; replaces it by None where it is all of the history."""
    if candidates.visible is None:
      return candidates
    visible = np.asarray(candidates.visible)
    limit = np.broadcast_to(length[:, None], visible.shape)
    if candidates.mask is not None:
      visible = np.where(np.asarray(candidates.mask), visible, limit)
    if np.array_equal(visible, limit):
      return candidates.replace(visible=None)
    bad = (visible < 0) | (visible > limit)
    if bad.any():
      row, column = np.argwhere(bad)[0]
      raise ValueError(
        f'candidates.visible[{row}, {column}]={visible[row, column]} is '
        f"outside [0, {length[row]}], the row's history.length"
      )
    if not self.config.encoder.causal:
      row, column = np.argwhere(visible != limit)[0]
      raise ValueError(
        f'candidates.visible[{row}, {column}]={visible[row, column]} differs '
        f'from history.length={length[row]}, but encoder.causal=False: in a '
        'bidirectional history every event has seen the later ones. Give '
        'such a candidate a row of its own, or use encoder.causal=True'
      )
    return candidates.replace(visible=visible.astype(np.int32))

  def _pad_history(
    self, history: History, rows: int, smallest: int = 16
  ) -> History:
    # An event beyond every length is padding already, and may be cut.
    length = np.asarray(history.length, np.int32)
    num_events = _bucket(
      int(length.max(initial=0)),
      self.options.history_buckets,
      'events in a history',
      smallest,
    )
    features = {
      f.name: history.features[f.name][:, :num_events]
      for f in self.config.schema.history_features
    }
    given = next(iter(features.values())).shape[1]
    real = np.arange(given)[None, :] < length[:, None]
    return History(
      features=_pad(features, (rows, num_events), real),
      length=_pad(length, (rows,)),
    )

  def _pad_candidates(
    self, candidates: Candidates, rows: int, multiple: int
  ) -> Candidates:
    count = candidates.shape[1]
    if count > multiple:
      padded = -(-count // multiple) * multiple
    else:
      padded = min(
        _bucket(count, self.options.candidate_buckets, 'candidates', 16),
        multiple,
      )
    features = {
      f.name: candidates.features[f.name]
      for f in self.config.schema.item_features
    }
    visible, mask = candidates.visible, candidates.mask
    return Candidates(
      features=_pad(features, (rows, padded), mask),
      visible=None if visible is None else _pad(visible, (rows, padded)),
    )


def _in_chunks(
  score: Callable[[Candidates], Logits], candidates: Candidates, size: int
) -> Logits:
  """Maps `score` over chunks of `size` candidates of each row."""
  num_rows, count = candidates.shape
  if count <= size:
    return score(candidates)
  if count % size:
    raise ValueError(
      f'{count} candidates are not a multiple of microbatch={size}; pad them'
    )
  chunks = jax.tree.map(
    lambda x: jnp.asarray(x).reshape(num_rows, -1, size).swapaxes(0, 1),
    candidates,
  )
  logits = jax.lax.map(score, chunks)  # {task: [C / size, B, size]}
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(num_rows, count), logits
  )


def _check_shapes(
  field: str,
  features: Mapping[str, Any],
  spec: Sequence[schema_lib.Feature],
  shape: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
  """Checks that the features are there, of one shape, which it returns."""
  for feature in spec:
    name = feature.name
    if name not in features:
      raise ValueError(
        f'{field}[{name!r}] is missing; given {sorted(features)}, the schema '
        f'asks for {[f.name for f in spec]}'
      )
    found = np.shape(features[name])
    if shape is None:
      shape = found
    if found != shape:
      raise ValueError(f'{field}[{name!r}] has shape {found}; expected {shape}')
  return shape or ()


def _check_values(
  field: str,
  features: Mapping[str, Any],
  spec: Sequence[schema_lib.Feature],
  real: np.ndarray | None = None,
) -> None:
  """Checks ids and numbers where `real`; device arrays only by dtype.

  Reading a device array back would stall the device. What slips through there
  is not lost: an id outside its table makes the score NaN.
  """
  for feature in spec:
    value = features[feature.name]
    is_id = isinstance(feature, schema_lib.Categorical)
    if is_id != np.issubdtype(value.dtype, np.integer):
      wanted = 'integer ids' if is_id else 'floating-point values'
      raise ValueError(
        f'{field}[{feature.name!r}] has dtype {value.dtype}; expected {wanted}'
      )
    if not isinstance(value, np.ndarray):
      continue
    if isinstance(feature, schema_lib.Categorical):
      bad = (value < 0) | (value >= feature.size)
      wanted = f'an id in [0, {feature.size})'
    else:
      bad = ~np.isfinite(value)
      wanted = 'a finite number'
    if real is not None:
      bad &= real
    if bad.any():
      where = tuple(int(i) for i in np.argwhere(bad)[0])
      raise ValueError(
        f'{field}[{feature.name!r}]{list(where)} is {value[where]}; expected '
        f'{wanted}'
      )


def _bucket(n: int, buckets: tuple[int, ...], what: str, smallest: int) -> int:
  if not buckets:
    return bucket_size(n, smallest)
  for size in buckets:
    if size >= n:
      return size
  raise ValueError(
    f'{n} {what} do not fit the largest bucket, {buckets[-1]}; add a larger '
    'one to ScorerConfig, or cut them'
  )


def _pad(tree, shape: tuple[int, ...], real=None):
  """Pads the leading axes with zeros, up to `shape`; zeros where not `real`."""

  def pad(x):
    xp = jnp if isinstance(x, jax.Array) else np
    if real is not None:
      x = xp.where(real, x, xp.zeros((), x.dtype))
    width = [(0, n - m) for n, m in zip(shape, x.shape, strict=False)]
    return xp.pad(x, width) if any(after for _, after in width) else x

  return jax.tree.map(pad, tree)
