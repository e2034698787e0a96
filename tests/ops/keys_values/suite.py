"""Random calls of the keys and values."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from histjax.ops.keys_values import reference
from histjax.ops.keys_values.reference import KeyValueWeights


def make_call(
  seed: int,
  of_events: tuple[int, int],
  width: int,
  num_heads: int,
  *,
  capacity: int | None = None,
  dtype: str = 'bfloat16',
  stream: str = 'float32',
  ragged: bool = False,
  rotate: bool = True,
  layers: int = 3,
) -> dict:
  """The arguments of a random call of the layer before the last.

  With a capacity events go behind those that are there. The first row of a
  ragged call is empty.
  """
  rng = np.random.default_rng(seed)
  num_rows, num_events = of_events
  placed = capacity is not None
  cached = (
    layers,
    num_rows,
    capacity if placed else num_events,
    num_heads,
    width // num_heads,
  )

  def normal(*shape, dtype=dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)

  def integers(below):
    return rng.integers(0, below, num_rows, dtype=np.int32)

  count = integers(num_events + 1)
  count[:1] = 0
  matrix = rng.normal(size=(layers, width, 2 * width)) / math.sqrt(width)
  return dict(
    events=3 * normal(num_rows, num_events, width, dtype=stream) + 1,
    keys=normal(*cached),
    values=normal(*cached),
    weights=KeyValueWeights(
      matrix=jnp.asarray(matrix, dtype),
      bias=normal(layers, 2 * width, dtype='float32'),
    ),
    layer=layers - 2,
    rotate=rotate,
    start=jnp.asarray(integers(capacity)) if placed else None,
    count=jnp.asarray(count) if ragged else None,
  )


def assert_equals_reference(found, call: dict) -> None:
  """Compares what means something; all else must be finite."""
  expected = reference.keys_values(**call)
  meaning = np.ones(call['keys'].shape[:3], bool)
  if call['start'] is None and call['count'] is not None:
    index = np.arange(call['keys'].shape[2])[None]
    meaning[call['layer']] = index < np.asarray(call['count'])[:, None]
  for name, x, y in zip(('keys', 'values'), found, expected, strict=True):
    np.testing.assert_equal((x.dtype, x.shape), (y.dtype, y.shape))
    x, y = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
    np.testing.assert_array_equal(np.isfinite(x), True, name)
    # Of a result of order 1 to 4, 2^-9 from its rounding and a tenth of the
    # norm's, of which it averages dozens.
    np.testing.assert_allclose(
      x[meaning], y[meaning], rtol=2**-8, atol=0.02, err_msg=name
    )
    others = np.delete(np.arange(len(x)), call['layer'])
    np.testing.assert_array_equal(
      x[others], np.asarray(call[name].astype(jnp.float32))[others], name
    )
