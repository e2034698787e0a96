"""The Hopper kernel without a GPU: interpreted on the CPU, and lowered.

The interpreter looks for races.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from histjax.ops.candidate_tower import hopper
from histjax.ops.keys_values import pallas_gpu
from tests.ops import gpu_interpreter
from tests.ops.keys_values import suite


class InterpretedTest(gpu_interpreter.TestCase):
  module = pallas_gpu

  def setUp(self):
    super().setUp()
    self.enter_context(
      mock.patch.object(hopper, 'mosaic_gpu', lambda: self.plgpu)
    )

  def check(self, *args, many=False, start=None, count=None, **fields):
    """`many`: all the pieces that fit are in one block."""
    call = suite.make_call(0, *args, **fields)
    for name, x in (('start', start), ('count', count)):
      if x is not None:
        call[name] = jnp.array(x, jnp.int32)
    with mock.patch.object(pallas_gpu, 'MULTIPROCESSORS', 1 if many else 132):
      found = jax.block_until_ready(pallas_gpu.keys_values(**call))
    suite.assert_equals_reference(found, call)
    self.assertFalse(self.races_found())

  def test_history(self):
    self.check((2, 72), 128, 4)

  def test_events_without_meaning_are_zeros(self):
    call = suite.make_call(0, (2, 136), 64, 4, ragged=True)
    call['count'] = jnp.array([3, 70], jnp.int32)
    found = pallas_gpu.keys_values(**call)
    suite.assert_equals_reference(found, call)
    for x in found:
      x = np.asarray(x.astype(jnp.float32))[call['layer']]
      self.assertTrue(x[0, :64].all())
      np.testing.assert_array_equal(x[0, 64:], 0)
      np.testing.assert_array_equal(x[1, 128:], 0)

  def test_new_events(self):
    """Some of them behind the end of the cache."""
    self.check((3, 10), 64, 2, capacity=21, start=(4, 0, 19), count=(10, 3, 5))

  @pytest.mark.slow
  def test_many(self):
    self.check((2, 128), 256, 4, ragged=True, many=True, stream='bfloat16')
    self.check((2, 70), 128, 2, capacity=99, many=True, rotate=False)

  @parameterized.parameters('commit_smem', 'barrier_wait')
  def test_the_test(self, name):
    call = suite.make_call(0, (1, 8), 64, 4)
    with mock.patch.object(self.plgpu, name, lambda *n: None):
      jax.block_until_ready(pallas_gpu.keys_values(**call))
    self.assertTrue(self.races_found())


if __name__ == '__main__':
  absltest.main()
