"""The ranking model: tables, history encoder, interaction, task logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from histjax import config as dicts
from histjax import key_range as ranges
from histjax import ops, testing
from histjax import schema as schema_lib
from histjax.cache import HistoryCache
from histjax.nn import embedding, fusion, interaction
from histjax.nn import encoder as encoder_lib
from histjax.types import (
  Array,
  Candidates,
  History,
  Paged,
  RankingBatch,
)


@dataclasses.dataclass(frozen=True)
class RankerConfig:
  """A deep ranking model with a Transformer over the user's history.

  Attributes:
    schema: the features, shared tables and tasks.
    fusion: how candidate and history meet, a name of `nn.fusion.FUSIONS`.
    encoder: the Transformer.
    interaction: the network on top.
    embedding_dim: width of every embedding table.
    table_row_multiple: tables get rows that no id has, up to a multiple of
      this; a mesh splits a table only if its devices divide the rows.
    embedding_dropout: probability, on the features given to `interaction`.
    dtype: of the computation; parameters and logits are always float32.
  """

  schema: schema_lib.Schema
  fusion: str = 'append_cross'
  encoder: encoder_lib.EncoderConfig = dataclasses.field(
    default_factory=encoder_lib.EncoderConfig
  )
  interaction: interaction.InteractionConfig = dataclasses.field(
    default_factory=interaction.InteractionConfig
  )
  embedding_dim: int = 32
  table_row_multiple: int = 1
  embedding_dropout: float = 0.0
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def __post_init__(self):
    dicts.normalize(self)
    if self.fusion not in fusion.FUSIONS:
      raise ValueError(
        f'fusion={self.fusion!r} is unknown; choose from '
        f'{sorted(fusion.FUSIONS)}'
      )
    fusion.FUSIONS[self.fusion].check(self.encoder)
    if self.encoder.candidate_tower is not None and not self.has_tower:
      raise ValueError(
        f'encoder.candidate_tower={self.encoder.candidate_tower!r}, but '
        f'fusion={self.fusion!r} has no tower; set '
        'encoder.candidate_tower=None'
      )
    for field in ('embedding_dim', 'table_row_multiple'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be >= 1')
    if not 0 <= self.embedding_dropout < 1:
      raise ValueError(
        f'embedding_dropout={self.embedding_dropout} must be in [0, 1)'
      )

  @property
  def hops(self) -> int:
    """Windows between a score and the oldest event that it can depend on."""
    return fusion.FUSIONS[self.fusion].hops(self.encoder.num_layers)

  @property
  def receptive_field(self) -> int | None:
    """How many events back a score can depend on; None: all of them.

    Layer by layer a window reaches further: the candidate sees W events, and
    the first of those has itself seen W - 1 more, `hops` times over.
    """
    window = self.encoder.window
    return None if window is None else self.hops * (window - 1) + 1

  @property
  def amortizable(self) -> bool:
    """Whether one pass over the history can serve every candidate."""
    return fusion.FUSIONS[self.fusion].amortizable

  @property
  def has_tower(self) -> bool:
    """Whether `ops.candidate_tower` computes the fusion."""
    return fusion.FUSIONS[self.fusion].has_tower

  def require_amortizable(self) -> None:
    """Raises ValueError, with what to use instead, if it is not."""
    if not self.amortizable:
      raise ValueError(
        f'fusion={self.fusion!r} cannot score from a cached history: '
        f'{fusion.FUSIONS[self.fusion].obstacle}. Use score_plain or '
        'score_joint, or train with a fusion that can: '
        f'{list(fusion.amortizable())}'
      )

  def require_packable(self) -> None:
    """Raises ValueError, with what to use instead, if rows cannot be packed.

    Then what one user's events become would depend on who shares the row.
    """
    if not fusion.FUSIONS[self.fusion].packable:
      raise ValueError(
        f'fusion={self.fusion!r} cannot take packed rows: it makes a sequence '
        'of the whole row for each candidate, its neighbours included. Set '
        'pipeline.pack=False, or use a fusion that can: '
        f'{list(fusion.packable())}'
      )
    if not self.encoder.causal:
      raise ValueError(
        'encoder.causal=False cannot take packed rows: a bidirectional event '
        'would see the users after its own. Set pipeline.pack=False, or train '
        'with encoder.causal=True'
      )
    if self.encoder.positions == 'recency':
      raise ValueError(
        "encoder.positions='recency' cannot take packed rows: it counts from "
        'the end of the row, not of the user. Set pipeline.pack=False, or '
        "train with encoder.positions='rotary'"
      )

  def require_extendable(self) -> None:
    """Raises ValueError if new events change what is cached of old ones."""
    self.require_amortizable()
    if not self.encoder.causal:
      raise ValueError(
        'encoder.causal=False: in a bidirectional history a new event changes '
        'every earlier one; call encode on the longer history, or train with '
        'encoder.causal=True'
      )
    if self.encoder.positions == 'recency':
      raise ValueError(
        "encoder.positions='recency' counts from the end, so a new event "
        'moves every earlier one; call encode on the longer history, or train '
        "with encoder.positions='rotary'"
      )


class Ranker(nn.Module):
  """Scores candidates given a user's history.

      tokens    = W_item item (+ W_action action)            events, candidates
      readout   = fusion(tokens)                             [B, C, D]
      logits    = head([context] ; [item features, readout])  {task: [B, C]}

  Its variables are the network's parameters, `params`, and the embedding
  tables, `tables`, as `init` returns them.

  `__call__` is the joint pass. `encode`, `score` and `extend` are its
  amortized halves and share its parameters: use them through
  `model.apply(variables, ..., method='encode')`, or `histjax.Scorer`.
  With what `pack` makes they run in kernels. The readout is sown as the
  intermediate `readout`.
  """

  config: RankerConfig

  def setup(self):
    config, schema = self.config, self.config.schema
    dtype = jnp.dtype(config.dtype)
    self.tables = embedding.EmbeddingTables(
      schema.tables, config.embedding_dim, dtype, config.table_row_multiple
    )
    self.tokens = embedding.EventTokens(config.encoder.width, dtype)
    self.fusion = fusion.FUSIONS[config.fusion](config.encoder, dtype)
    self.head = interaction.InteractionHead(
      config.interaction,
      num_tasks=len(schema.tasks),
      user_width=max(1, _width(schema.context, config)),
      candidate_width=_width(schema.item_features, config)
      + config.encoder.width,
      dtype=dtype,
    )
    self.feature_dropout = nn.Dropout(config.embedding_dropout)

  def __call__(
    self,
    batch: RankingBatch,
    *,
    train: bool = False,
  ) -> dict[str, Float[Array, 'B C']]:
    """Logits of every candidate in one pass over each row's history.

    Args:
      batch: rows; labels are not read.
      train: whether dropout is on (needs the rng `dropout`).

    Returns:
      `{task: [B, C]}` float32. Values at padding mean nothing.

    Raises:
      ValueError: a feature of the schema is missing, rows are packed that may
        not be, or `visible` varies in a row whose history is bidirectional
        (checked only outside of jit).
    """
    options = {}
    if batch.segments is not None:
      self.config.require_packable()
      options['segments'] = batch.segments
    self._check_visible(batch.candidates, batch.history.length)
    features, tokens = self._candidate_inputs(batch.candidates, train=train)
    readout = self.fusion(
      self._event_tokens(batch.history, train=train),
      tokens,
      batch.history.length,
      batch.candidates.visible,
      **options,
      train=train,
    )
    user = self._user(batch.context, batch.history.length.shape[0])
    user = self.feature_dropout(user, deterministic=not train)
    features = self.feature_dropout(features, deterministic=not train)
    logits = self._logits(user, features, readout, train=train)
    return self._by_task(logits)

  def encode(self, history: History) -> HistoryCache:
    """One pass over each history; see `histjax.Scorer.encode`.

    Args:
      history: `[B, L]`.
    """
    self.config.require_amortizable()
    keys, values = self.fusion.encode(
      self._event_tokens(history), history.length
    )
    return HistoryCache(keys, values, history.length)

  def score(
    self,
    cache: HistoryCache,
    candidates: Candidates,
    context: Mapping[str, Array],
    count: Int[Array, 'B'] | None = None,
  ) -> dict[str, Float[Array, 'B C']]:
    """Logits from a cached history; see `histjax.Scorer.score`.

    Args:
      cache: of `encode` or `extend`.
      candidates: `[B, C]`; the mask is not read.
      context: `{name: [B]}`, the request's.
      count: int32 `[B]`; logits of candidates from there on mean nothing, and
        need not be computed. None: all C count.
    """
    return self._by_task(self.score_tasks(cache, candidates, context, count))

  def score_tasks(
    self,
    cache: HistoryCache,
    candidates: Candidates,
    context: Mapping[str, Array],
    count: Int[Array, 'B'] | None = None,
  ) -> Float[Array, 'B C T']:
    """As `score`, of all tasks in one array, as the head computes it."""
    self.config.require_amortizable()
    self._check_visible(candidates, cache.length)
    features, tokens = self._candidate_inputs(candidates)
    readout = self.fusion.score(
      cache.keys,
      cache.values,
      cache.length,
      tokens,
      candidates.visible,
      count=count,
    )
    user = self._user(context, cache.num_rows)
    return self._logits(user, features, readout, count=count)

  def extend(self, cache: HistoryCache, events: History) -> HistoryCache:
    """Appends new events to a cache; see `histjax.Scorer.extend`."""
    self.config.require_extendable()
    keys, values = self.fusion.extend(
      cache.keys,
      cache.values,
      cache.length,
      self._event_tokens(events),
      events.length,
    )
    return HistoryCache(keys, values, cache.length + events.length)

  def encode_and_score(
    self,
    history: History,
    candidates: Candidates,
    context: Mapping[str, Array],
    count: Int[Array, 'B'] | None = None,
    into: tuple[Paged, Paged] | None = None,
  ) -> tuple[HistoryCache, Float[Array, 'B C T']]:
    """`encode`, and `score_tasks` from that cache; in one pass if it pays.

    Args:
      history: `[B, L]`.
      candidates: `[B, C]`; the mask is not read.
      context: as `score`.
      count: as `score`.
      into: pages to write keys and values into, if a kernel does that; else
        the cache is of arrays.

    Returns:
      The cache, and the logits of all tasks.
    """
    self.config.require_amortizable()
    self._check_visible(candidates, history.length)
    features, tokens = self._candidate_inputs(candidates)
    keys, values, readout = self.fusion.encode_and_score(
      self._event_tokens(history),
      history.length,
      tokens,
      candidates.visible,
      count=count,
      into=into,
    )
    cache = HistoryCache(keys, values, history.length)
    user = self._user(context, cache.num_rows)
    return cache, self._logits(user, features, readout, count=count)

  def extend_and_score(
    self,
    cache: HistoryCache,
    events: History,
    candidates: Candidates,
    context: Mapping[str, Array],
    count: Int[Array, 'B'] | None = None,
  ) -> tuple[HistoryCache, Float[Array, 'B C T']]:
    """`extend`, and `score_tasks` from that cache; in one pass if it pays.

    Args:
      cache: of `encode` or `extend`, with room for the events.
      events: `[B, E]`, those behind the cached ones.
      candidates: `[B, C]`; `visible` counts old and new events.
      context: as `score`.
      count: as `score`.

    Returns:
      The longer cache, and the logits of all tasks.
    """
    self.config.require_extendable()
    features, tokens = self._candidate_inputs(candidates)
    given: Any = cache  # None of codes.
    keys, values, readout = self.fusion.extend_and_score(
      given.keys,
      given.values,
      given.length,
      self._event_tokens(events),
      events.length,
      tokens,
      candidates.visible,
      count=count,
    )
    longer = HistoryCache(keys, values, cache.length + events.length)
    user = self._user(context, cache.num_rows)
    return longer, self._logits(user, features, readout, count=count)

  def _event_tokens(self, history: History, *, train: bool = False):
    schema = self.config.schema
    item = self.tables(history.features, schema.item_features)
    action = None
    if schema.action:
      action = self.tables(history.features, schema.action)
    return self.tokens.events(item, action, train=train)

  def _candidate_inputs(self, candidates: Candidates, *, train: bool = False):
    features = self.tables(
      candidates.features, self.config.schema.item_features
    )
    return features, self.tokens.candidates(features, train=train)

  def _user(self, context: Mapping[str, Array], num_rows: int):
    if not self.config.schema.context:  # The head wants at least a channel.
      return jnp.zeros((num_rows, 1), self.config.dtype)
    return self.tables(context, self.config.schema.context)

  def _logits(self, user, features, readout, *, count=None, train=False):
    self.sow('intermediates', 'readout', readout)
    return self.head.score(user, features, readout, count=count, train=train)

  def _by_task(self, logits):
    return {
      task.name: logits[..., i]
      for i, task in enumerate(self.config.schema.tasks)
    }

  def _check_visible(self, candidates: Candidates, length) -> None:
    visible, mask = candidates.visible, candidates.mask
    if visible is None or self.config.encoder.causal:
      return
    if any(isinstance(x, jax.core.Tracer) for x in (visible, mask, length)):
      return
    # NumPy: in a jitted function even constants would be traced by JAX.
    ranges.check_bidirectional(
      np.asarray(visible),
      np.asarray(length),
      None if mask is None else np.asarray(mask),
    )


def check_variables(config: RankerConfig, variables: Any) -> None:
  """Raises ValueError unless these are what `Ranker.init` of `config` makes.

  Flax reads those that it finds: with more layers or tasks than the config has
  another model's logits would come out.

  Args:
    config: of the model.
    variables: arrays of any floating type.
  """
  plain = dataclasses.replace(
    config.encoder, attention='reference', candidate_tower=None
  )
  wanted = _shapes(dataclasses.replace(config, encoder=plain))
  leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
  found = {jax.tree_util.keystr(path): x for path, x in leaves}
  for name in sorted(wanted.keys() | found.keys()):
    if name not in found:
      problem = 'is missing'
    elif name not in wanted:
      problem = 'is not of this config'
    elif np.shape(found[name]) != wanted[name]:
      problem = f'has shape {np.shape(found[name])}, not {wanted[name]}'
    elif not jnp.issubdtype(jnp.result_type(found[name]), jnp.floating):
      problem = f'is {jnp.result_type(found[name])}, no floating type'
    else:
      continue
    raise ValueError(
      f'variables{name} {problem}; give what Ranker(config).init returns, or '
      'training made of it, with the config that it was made with'
    )


@functools.lru_cache(maxsize=16)
def _shapes(config: RankerConfig) -> dict[str, tuple[int, ...]]:
  """Of the variables, by their paths; nothing is computed."""
  batch = testing.random_batch(config.schema, 1, 1, 1)
  shapes = jax.eval_shape(Ranker(config).init, jax.random.key(0), batch)
  leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
  return {jax.tree_util.keystr(path): x.shape for path, x in leaves}


def pack(config: RankerConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
  """What to score with besides the variables: parameters packed for kernels.

  With the collection `tower` a fusion that has one runs in
  `ops.candidate_tower` in `__call__`, `encode`, `score` and `extend`, and the
  head in `ops.interaction_head` where there is a kernel or one is named. In
  bfloat16 keys and values come from `ops.keys_values`, if there is one, and a
  token is one product. Without it all run layer by layer, as in training.

      model.apply({**variables, **pack(config, variables)}, batch)

  Args:
    config: of the model; no argument of a jitted function.
    variables: as `Ranker.init` returns them; `params` is read.

  Returns:
    `{'tower': ..}`, or `{}`.
  """
  packed, params = {}, variables['params']
  if config.has_tower:
    pack_fusion = fusion.FUSIONS[config.fusion].pack
    packed['fusion'] = pack_fusion(params['fusion'], config.dtype)
  if config.dtype == 'bfloat16':
    packed['tokens'] = embedding.EventTokens.pack(
      params['tokens'], config.dtype
    )
  head = config.interaction.implementation
  if head is None:
    by_kernel = config.dtype == 'bfloat16' or ops.has_cpu_kernel(config.dtype)
  else:  # Wherever it is named: `ops.interaction_head` says why it cannot.
    by_kernel = head != 'xla'
  if by_kernel:
    packed['head'] = interaction.InteractionHead.pack(
      config.interaction, params['head'], config.encoder.width, config.dtype
    )
  return {'tower': packed} if packed else {}


def _width(features: tuple[schema_lib.Feature, ...], config: RankerConfig):
  """Channels of `EmbeddingTables.__call__` for these features."""
  num_categorical = len(schema_lib.categorical(features))
  num_dense = len(schema_lib.dense(features))
  return config.embedding_dim * num_categorical + num_dense
