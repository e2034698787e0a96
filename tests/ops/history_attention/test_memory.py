"""Memory grows as `Q + L`, not as `Q L`; that of kernels: in their tests."""

from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from histjax.ops.history_attention import xla
from histjax.types import KeyRange
from tests.ops.history_attention import suite


def temporaries(implementation, length):
  """Bytes that a compiled call and its gradients need besides arguments."""
  array = jax.ShapeDtypeStruct
  x = array((1, length, 2, 32), jnp.float32)
  bound = array((1, length), jnp.int32)

  def function(query, key, value, cotangent, start, stop):
    return suite.gradients(
      query,
      key,
      value,
      cotangent,
      KeyRange(start, stop),
      implementation=implementation,
    )

  lowered = jax.jit(function).lower(x, x, x, x, bound, bound)
  return lowered.compile().memory_analysis().temp_size_in_bytes


class MemoryTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # Blocks as small as a CPU's, or these lengths would fit one elsewhere.
    self.enter_context(
      mock.patch.object(xla, '_ACCELERATOR_SCORES', xla._CPU_SCORES)
    )

  @parameterized.parameters(('xla', 1, 2.1), ('reference', 3.7, 4.1))
  def test_doubling_both_lengths(self, implementation, low, high):
    before, after = (temporaries(implementation, n) for n in (4096, 8192))
    self.assertBetween(after / before, low, high)


if __name__ == '__main__':
  absltest.main()
