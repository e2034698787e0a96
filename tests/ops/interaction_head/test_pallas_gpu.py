"""The Hopper kernel without a GPU: interpreted on the CPU, and lowered."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from histjax.ops.candidate_tower import hopper
from histjax.ops.interaction_head import pallas_gpu
from histjax.ops.interaction_head.weights import HeadShape
from tests.ops import gpu_interpreter
from tests.ops.interaction_head import suite

SMALL = HeadShape(3, 9, 64, (32, 16), 2, 16, 2)


class InterpretedTest(gpu_interpreter.TestCase):
  module = pallas_gpu

  def setUp(self):
    super().setUp()
    self.enter_context(
      mock.patch.object(hopper, 'mosaic_gpu', lambda: self.plgpu)
    )

  def check(self, of_candidates, shape, ragged=False):
    call = suite.make_call(0, of_candidates, shape, ragged=ragged)
    found = pallas_gpu.interaction_head(**call)
    suite.assert_equals_reference(found, call)
    self.assertFalse(self.races_found())

  def set(self, **constants):
    for name, value in constants.items():
      self.enter_context(mock.patch.object(pallas_gpu, name, value))

  def test_rows_within_a_tile(self):
    self.check((5, 13), SMALL)

  def test_ring(self):
    self.set(SHARED_MEMORY=2 * 64 * 128 * 2 * 2 + 12_000 + 4 * pallas_gpu.SLOT)
    self.check((1, 70), HeadShape(3, 9, 64, (80, 16), 3, 80, 3))

  def test_two_tiles(self):
    self.set(
      MULTIPROCESSORS=0,
      SHARED_MEMORY=4 * 64 * 128 * 2 * 2 + 13_000 + 4 * pallas_gpu.SLOT,
    )
    self.check((2, 150), HeadShape(3, 9, 64, (80, 16), 2, 16, 3), ragged=True)

  def test_mlp_alone(self):
    self.check((1, 9), HeadShape(3, 70, 64, (32, 16), 0, 16, 2))


if __name__ == '__main__':
  absltest.main()
