"""Scores every row of a split and computes its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from histjax import metrics
from histjax.data import cold
from histjax.data import pipeline as pipeline_lib
from histjax.data.rows import RowSource
from histjax.training import sharding, step


def check_rows(rows: RowSource) -> None:
  """Raises ValueError if candidates may be in several rows."""
  every = rows.config.snapshot_every
  if every is not None:
    raise ValueError(
      f'rows.snapshot_every={every}: a candidate comes with several snapshots, '
      'and would count as often; evaluate rows without, as those of validation'
    )


def evaluate(
  model: nn.Module,
  variables: Any,
  rows: RowSource,
  pipeline: pipeline_lib.PipelineConfig,
  mesh: Mesh | None = None,
  *,
  known: cold.Known | None = None,
) -> dict[str, float]:
  """The metrics of `variables` on `rows`, `{'task/metric': value}`.

  See `predict`, which also gives the single scores.
  """
  found = predict(model, variables, rows, pipeline, mesh, known=known)
  assert found is not None  # Nothing asked it to stop.
  return found.result()


def predict(
  model: nn.Module,
  variables: Any,
  rows: RowSource,
  pipeline: pipeline_lib.PipelineConfig,
  mesh: Mesh | None = None,
  *,
  rules: sharding.Rules | None = None,
  should_stop: Callable[[], bool] | None = None,
  known: cold.Known | None = None,
) -> metrics.RankingMetrics | None:
  """Scores every candidate of `rows` once, each host its share of them.

  Args:
    model: a `Ranker`, or any module with its call signature.
    variables: its parameters and tables, on the host or anywhere on the mesh.
    rows: what to score.
    pipeline: how rows become batches; the metrics do not depend on it.
    mesh: of `sharding.data_mesh`; None: over all devices.
    rules: how variables are split over it, see `sharding.specs`.
    should_stop: asked before each batch.
    known: what training has seen; other candidates do not count. None: all do.

  Returns:
    The scores of all hosts, with `result()` and `predictions()`; None if
    stopped.

  Raises:
    ValueError: a score is not finite, or see `check_rows`.
  """
  check_rows(rows)
  mesh = sharding.data_mesh() if mesh is None else mesh
  # No host waits for another in a batch, since rows are scored one by one.
  local = sharding.local_mesh(mesh)
  variables = sharding.put_variables(variables, local, rules)
  eval_step = step.make_eval_step(
    model, schema=rows.schema, mesh=local, rules=rules
  )
  batches = pipeline_lib.eval_batches(
    rows,
    pipeline,
    row_multiple=mesh.size,
    shard_index=jax.process_index(),
    shard_count=jax.process_count(),
  )
  found = metrics.RankingMetrics([t.name for t in rows.schema.tasks])
  try:
    for batch in batches:
      if should_stop is not None and should_stop():
        return None
      logits = eval_step(variables, sharding.put_batch(batch, local))
      found.update(
        sharding.to_host(logits),
        batch.labels,
        batch.candidates.mask if known is None else known.mask(batch),
        batch.group,
      )
  finally:
    batches.close()
  return found.gather()
