"""Where a candidate looks: the last layer's attention, to show to people."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from histjax import quantization
from histjax.cache import HistoryCache
from histjax.models import ranker
from histjax.types import Array, Candidates


def last_attention(
  config: ranker.RankerConfig,
  variables: Mapping[str, Any],
  cache: HistoryCache,
  candidates: Candidates,
  context: Mapping[str, Array],
) -> Float[Array, 'B N C L']:
  """The last layer's attention weights of candidates over the history.

      weights = softmax(q_c K^T / sqrt(H)) of the last layer, each head

  Layer by layer in plain JAX, whatever kernels score; one program for each
  shape.

  Args:
    config: of the model.
    variables: its parameters and tables.
    cache: of `Scorer.encode` or `extend`.
    candidates: `[B, C]`, all rows of the cache.
    context: `{name: [B]}`.

  Returns:
    float32; 0 at events that a candidate does not see, and where it sees none.

  Raises:
    ValueError: the fusion is not amortizable.
    NotImplementedError: its candidates do not attend to the history alone.
  """
  config.require_amortizable()
  if not config.has_tower:
    raise NotImplementedError(
      f'fusion={config.fusion!r}: candidates do not attend to the history '
      "alone, as those of 'append_cross' and 'cross_only' do"
    )
  arrays = HistoryCache(cache.keys, cache.values, cache.length)  # No `info`.
  return _last_attention(config, variables, arrays, candidates, context)


@functools.partial(jax.jit, static_argnames='config')
def _last_attention(config, variables, cache, candidates, context):
  cache = cache.replace(
    keys=quantization.widen(cache.keys, config.dtype),
    values=quantization.widen(cache.values, config.dtype),
  )
  _, sown = ranker.Ranker(config).apply(
    variables,
    cache,
    candidates,
    context,
    method='score',
    mutable=['attention_weights'],
  )
  layers = sown['attention_weights']['fusion']
  (weights,) = layers[f'blocks_{config.encoder.num_layers - 1}']['weights']
  return weights
