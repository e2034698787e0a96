"""What is the tower's alone when XLA compiles it."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.ops import devices
from histjax.ops.candidate_tower import reference, xla


class NormTest(parameterized.TestCase):
  @parameterized.parameters(*devices.PLATFORMS)
  def test_means_the_same_everywhere(self, platform):
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 24)).astype(np.float32)
    x[0, 0] = 7  # No deviation.
    with ops.target_platform(platform):
      found = jax.jit(lambda x: xla._normalize(x))(x)
    # 2^-24 of the square of a mean, times the channels.
    np.testing.assert_allclose(found, reference.normalize(x), atol=1e-5)


if __name__ == '__main__':
  absltest.main()
