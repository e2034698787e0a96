"""What a scorer compiles: pure functions of a model, variables and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.models.ranker import Ranker
from histjax.types import Candidates, History, HistoryCache, RankingBatch


def score_microbatched(
  model: Ranker,
  variables: Mapping[str, Any],
  cache: HistoryCache,
  candidates: Candidates,
  count: Int[Array, 'B'] | None = None,
  *,
  microbatch: int,
) -> dict[str, Float[Array, 'B C']]:
  """Scores candidates `microbatch` at a time, so that memory stays bounded.

  The cache is read by every microbatch and made by none (M-FALCON; Zhai et
  al. 2024, arXiv 2402.17152). A pure function; jit it.

  Args:
    model: the ranker.
    variables: of `models.ranker.pack`, or its `{'params': ...}`.
    cache: of `model.encode`.
    candidates: `[B, C]`, C at most or a multiple of `microbatch`.
    count: as `Ranker.score`.
    microbatch: candidates per row and step.

  Returns:
    `{task: [B, C]}` float32.
  """

  def score(chunk: Candidates, first) -> dict[str, jax.Array]:
    here = count
    if count is not None:
      here = jnp.clip(count - first, 0, chunk.shape[1])
    logits: Any = model.apply(variables, cache, chunk, here, method='score')
    return logits

  return _in_chunks(score, candidates, microbatch)


def score_plain(
  model: Ranker,
  variables: Mapping[str, Any],
  batch: RankingBatch,
  *,
  microbatch: int,
) -> dict[str, Float[Array, 'B C']]:
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

  def score(chunk: Candidates, first) -> dict[str, jax.Array]:
    del first
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

  return _in_chunks(score, batch.candidates, microbatch)


def extend(
  model: Ranker,
  variables: Mapping[str, Any],
  cache: HistoryCache,
  events: History,
  *,
  capacity: int,
) -> HistoryCache:
  """`Ranker.extend` of a cache that is first padded to `capacity` events."""
  width = [(0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0), (0, 0)]
  cache = cache.replace(
    keys=jnp.pad(cache.keys, width), values=jnp.pad(cache.values, width)
  )
  longer: Any = model.apply(variables, cache, events, method='extend')
  return longer


def _in_chunks(
  score: Callable[[Candidates, Any], dict[str, jax.Array]],
  candidates: Candidates,
  size: int,
) -> dict[str, jax.Array]:
  """Maps `score` over chunks of `size` candidates of each row.

  Args:
    score: of a chunk and the number of its first candidate, `[B, size]`.
    candidates: `[B, C]`, C at most or a multiple of `size`.
    size: of a chunk.

  Returns:
    `[B, C]` arrays.
  """
  num_rows, count = candidates.shape
  if count <= size:
    return score(candidates, 0)
  if count % size:
    raise ValueError(
      f'{count} candidates are not a multiple of microbatch={size}; pad them'
    )
  chunks = jax.tree.map(
    lambda x: jnp.asarray(x).reshape(num_rows, -1, size).swapaxes(0, 1),
    candidates,
  )
  first = jnp.arange(0, count, size, dtype=jnp.int32)
  logits = jax.lax.map(lambda x: score(*x), (chunks, first))
  return {  # {task: [C / size, B, size]}
    k: x.swapaxes(0, 1).reshape(num_rows, count) for k, x in logits.items()
  }
