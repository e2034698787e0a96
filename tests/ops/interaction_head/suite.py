"""Random calls of the interaction head."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from histjax.ops.interaction_head import reference
from histjax.ops.interaction_head.weights import HeadShape, HeadWeights


def make_weights(rng, shape: HeadShape, dtype: str) -> HeadWeights:
  """Weights that keep activations of order 1; no bias is zero."""
  matrices = {
    name: rng.normal(size=(len(rows), len(columns))) / math.sqrt(len(rows))
    for name, (rows, columns, _) in shape.matrices().items()
  }
  vectors = {
    name: 0.1 * rng.normal(size=len(places))
    for name, places, _ in shape.vectors()
  }
  packed = HeadWeights.pack(shape, matrices, vectors, jnp.dtype(dtype))
  return jax.tree.map(jnp.asarray, packed)


def make_call(
  seed: int,
  of_candidates: tuple[int, int],
  shape: HeadShape,
  *,
  dtype: str = 'bfloat16',
  ragged: bool = False,
  weights: HeadWeights | None = None,
) -> dict:
  """The arguments of a random call; the first row of a ragged one is empty."""
  rng = np.random.default_rng(seed)
  num_rows, num_candidates = of_candidates

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  count = rng.integers(0, num_candidates + 1, num_rows, dtype=np.int32)
  count[:1] = 0
  return dict(
    user=normal(num_rows, shape.user),
    features=normal(num_rows, num_candidates, shape.features),
    readout=normal(num_rows, num_candidates, shape.readout),
    weights=weights or make_weights(rng, shape, dtype),
    count=jnp.asarray(count) if ragged else None,
  )


def assert_equals_reference(found, call: dict) -> None:
  """Compares the logits that count; all must be finite."""
  expected = np.asarray(reference.interaction_head(**call))
  found = np.asarray(found)
  np.testing.assert_equal(found.dtype, np.float32)
  np.testing.assert_equal(found.shape, expected.shape)
  np.testing.assert_array_equal(np.isfinite(found), True)
  index = np.arange(expected.shape[1])[None, :]
  if call['count'] is None:
    live = np.ones(expected.shape[:2], bool)
  else:
    live = index < np.asarray(call['count'])[:, None]
  # bfloat16 has 2^-9 of rounding, in half a dozen places, of values of order
  # 1 to 10, of which a logit averages dozens: on an H200 a standard deviation
  # of 0.014, and of 58,500 logits the worst at 0.06.
  found, expected = found[live], expected[live]
  np.testing.assert_allclose(found, expected, rtol=0, atol=0.1)
  if found.size:
    spread = np.sqrt(np.mean((found - expected) ** 2))
    np.testing.assert_array_less(spread, 0.03)
