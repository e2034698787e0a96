"""Example batches, for tests, notebooks and benchmarks."""

from __future__ import annotations

import numpy as np

from histjax.schema import Categorical, Schema
from histjax.types import Candidates, History, RankingBatch


def random_batch(
  schema: Schema,
  num_rows: int,
  num_events: int,
  num_candidates: int,
  seed: int = 0,
) -> RankingBatch:
  """Rows of random features, `num_events` real events in each."""
  rng = np.random.default_rng(seed)

  def values(spec, *shape):
    return {
      f.name: rng.integers(0, f.size, shape, dtype=np.int32)
      if isinstance(f, Categorical)
      else rng.normal(size=shape).astype(np.float32)
      for f in spec
    }

  return RankingBatch(
    context=values(schema.context, num_rows),
    history=History(
      values(schema.history_features, num_rows, num_events),
      np.full(num_rows, num_events, np.int32),
    ),
    candidates=Candidates(
      values(schema.item_features, num_rows, num_candidates)
    ),
    labels={},
    group=np.zeros(num_rows, np.int32),
  )
