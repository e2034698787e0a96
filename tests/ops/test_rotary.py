import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax.ops import rotary


class RotaryTest(parameterized.TestCase):
  @parameterized.parameters(0, 1_000, 100_000, 10_000_000)
  def test_scores_depend_on_distances_alone(self, first):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 1, 1, 32)).astype(np.float32)
    keys = rng.normal(size=(1, 50, 1, 32)).astype(np.float32)

    def scores(first):
      position = first + jnp.arange(51, dtype=jnp.int32)[None, :]
      a = rotary.rotary(query, position[:, 50:])
      b = rotary.rotary(keys, position[:, :50])
      return np.einsum('bqnh,blnh->bl', a, b)

    np.testing.assert_allclose(scores(first), scores(0), atol=1e-5)

  @parameterized.parameters(2, 6, 64)
  def test_angles(self, head_dim):
    position = np.array([[0, 1, 7, 500, 5_000]])
    half = head_dim // 2
    angle = position[..., None] * 10_000.0 ** (-np.arange(half) / half)
    sin, cos = rotary.sin_cos(jnp.asarray(position, jnp.int32), head_dim)
    np.testing.assert_allclose(sin, np.sin(angle), atol=5e-6)
    np.testing.assert_allclose(cos, np.cos(angle), atol=5e-6)


if __name__ == '__main__':
  absltest.main()
