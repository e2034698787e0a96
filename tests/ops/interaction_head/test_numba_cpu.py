"""The kernel for CPUs, against NumPy in float64."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops
from histjax.ops import dispatch
from histjax.ops.interaction_head.weights import HeadShape
from tests import support
from tests.ops.interaction_head import suite

WIDTHS = st.integers(1, 150)
SHAPES = st.builds(
  HeadShape,
  user=st.integers(0, 150),
  features=st.integers(0, 150),
  readout=WIDTHS,
  mlp=st.lists(WIDTHS, min_size=1, max_size=3).map(tuple),
  cross_layers=st.integers(0, 3),
  rank=st.integers(1, 80),
  tasks=st.integers(1, 3),
)


def oracle(call):
  weights = jax.tree.map(np.asarray, call['weights'])
  shape, (matrices, vectors) = weights.shape, weights.unpack()
  w = {k: np.asarray(x, np.float64) for k, x in matrices.items()}
  b = {k: np.asarray(x, np.float64) for k, x in vectors.items()}
  features, readout = (
    np.asarray(call[k], np.float64) for k in ('features', 'readout')
  )
  user = np.asarray(call['user'], np.float64)[:, None]
  user = np.broadcast_to(user, (*features.shape[:2], shape.user))
  x0 = x = np.concatenate([user, features, readout], axis=-1)
  hidden = x0
  for i in range(len(shape.mlp)):
    hidden = np.maximum(hidden @ w[f'mlp_{i}'] + b[f'mlp_{i}'], 0)
  for i in range(shape.cross_layers):
    x = x0 * (x @ w[f'down_{i}'] @ w[f'up_{i}'] + b[f'up_{i}']) + x
  logits = [hidden @ b[f'logits_mlp_{t}'] for t in range(shape.tasks)]
  if shape.cross_layers:
    crossed = [x @ b[f'logits_x_{t}'] for t in range(shape.tasks)]
    logits = [a + c for a, c in zip(logits, crossed, strict=True)]
  return np.stack(logits, axis=-1) + b['logits_bias']


class NumbaTest(parameterized.TestCase):
  def assert_equals_oracle(self, call):
    found = np.asarray(ops.interaction_head(**call, implementation='numba_cpu'))
    expected = oracle(call)
    self.assertEqual((found.dtype, found.shape), (np.float32, expected.shape))
    if call['count'] is not None:
      index = np.arange(found.shape[1])[None, :]
      live = index < np.asarray(call['count'])[:, None]
      np.testing.assert_array_equal(found[~live], 0)
      found, expected = found[live], expected[live]
    # Sums of up to 450 float32 products: 2^-24 of each of some 20 roundings.
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)

  @support.examples(30)
  @given(
    seed=st.integers(0, 2**32 - 1),
    shape=SHAPES,
    rows=st.integers(1, 4),
    candidates=st.integers(1, 150),
    ragged=st.booleans(),
  )
  def test_any_shape(self, seed, shape, rows, candidates, ragged):
    self.assert_equals_oracle(
      suite.make_call(
        seed, (rows, candidates), shape, dtype='float32', ragged=ragged
      )
    )

  def test_groups_of_tiles(self):
    shape = HeadShape(40, 30, 64, (128, 64), 2, 64, 2)
    self.assert_equals_oracle(
      suite.make_call(0, (2, 777), shape, dtype='float32', ragged=True)
    )

  def test_hides_no_nan(self):
    shape = HeadShape(2, 3, 4, (5,), 1, 2, 1)
    call = suite.make_call(0, (1, 3), shape, dtype='float32')
    for name in ('user', 'features', 'readout'):
      bad = {**call, name: call[name].at[..., 0].set(np.nan)}
      found = ops.interaction_head(**bad, implementation='numba_cpu')
      self.assertTrue(np.isnan(found).all())

  @parameterized.parameters(
    ((1, 1), 'float32', 'numba_cpu'),
    ((64, 9), 'float32', 'numba_cpu'),
    # Nearly all lanes would be empty.
    ((64, 1), 'float32', 'reference'),
    ((1, 9), 'bfloat16', 'reference'),
  )
  def test_picks(self, of_candidates, dtype, name):
    shape = HeadShape(2, 3, 64, (5,), 0, 1, 1)
    call = suite.make_call(0, of_candidates, shape, dtype=dtype)
    with dispatch.record() as used:
      ops.interaction_head(**call)
    self.assertEqual(used, {'interaction_head': {name}})


if __name__ == '__main__':
  absltest.main()
