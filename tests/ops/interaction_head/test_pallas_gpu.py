"""The Hopper kernel without a GPU: interpreted on the CPU, and lowered.

The interpreter looks for races.
"""

import dataclasses
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

SMALL = HeadShape(
  user=3, features=9, readout=64, mlp=(32, 16), cross_layers=2, rank=16, tasks=2
)
# Of each matrix several tiles.
WIDE = HeadShape(
  user=3, features=9, readout=64, mlp=(80, 16), cross_layers=3, rank=80, tasks=3
)
ALONE = HeadShape(
  user=3, features=70, readout=64, mlp=(32, 16), cross_layers=0, rank=1, tasks=1
)


class InterpretedTest(gpu_interpreter.TestCase):
  module = pallas_gpu

  def setUp(self):
    super().setUp()
    self.enter_context(
      mock.patch.object(hopper, 'mosaic_gpu', lambda: self.plgpu)
    )

  def run_kernel(self, of_candidates, shape, slots=99, many=False, **fields):
    """In memory for so many slots of a ring; `many`: two tiles in a block."""
    call = suite.make_call(0, of_candidates, shape, **fields)
    kind = pallas_gpu._Kind(shape, 64, 64, False)
    room = kind.num_slots(1 + many) - slots
    constants = {'MULTIPROCESSORS': 0 if many else 132}
    if room > 0:
      constants['SHARED_MEMORY'] = (
        pallas_gpu.SHARED_MEMORY - room * pallas_gpu.SLOT
      )
    with mock.patch.multiple(pallas_gpu, **constants):
      return call, jax.block_until_ready(pallas_gpu.interaction_head(**call))

  def check(self, *args, **fields):
    call, found = self.run_kernel(*args, **fields)
    suite.assert_equals_reference(found, call)
    self.assertFalse(self.races_found())

  def slow(self, *warpgroups):
    slow = dict.fromkeys(warpgroups, 2e-3)
    self.enter_context(mock.patch.dict(gpu_interpreter.SLOW, slow))

  def test_users_share_a_tile(self):
    self.check((5, 13), SMALL, ragged=True)

  def test_tiles_share_a_ring(self):
    self.slow(2, 3)
    self.check((2, 150), SMALL, slots=4, many=True, ragged=True)

  def test_tiles_without_real_candidates_are_zeros(self):
    call = suite.make_call(0, (2, 100), SMALL)
    call['count'] = jnp.array([5, 90], jnp.int32)
    found = np.asarray(pallas_gpu.interaction_head(**call)).reshape(200, -1)
    self.assertTrue(found[:64].all())
    np.testing.assert_array_equal(found[192:], 0)  # From candidate 92 on.
    suite.assert_equals_reference(found.reshape(2, 100, -1), call)
    call['count'] = jnp.array([5, 20], jnp.int32)
    found = np.asarray(pallas_gpu.interaction_head(**call)).reshape(200, -1)
    np.testing.assert_array_equal(found[128:], 0)

  @pytest.mark.slow
  def test_wide(self):
    self.check((1, 70), WIDE, slots=4)

  @pytest.mark.slow
  def test_the_first_tile_drifts(self):
    self.slow(0, 1)
    shape = dataclasses.replace(WIDE, rank=16)
    self.check((1, 130), shape, slots=4, many=True)

  @pytest.mark.slow
  def test_mlp_alone(self):
    self.check((1, 9), ALONE)
    self.check((1, 130), ALONE, slots=2, many=True)

  @pytest.mark.slow
  def test_one_cross_layer(self):
    self.check((3, 77), dataclasses.replace(SMALL, cross_layers=1), ragged=True)

  @parameterized.parameters('commit_smem', 'wgmma_wait')
  def test_the_test(self, name):
    with mock.patch.object(self.plgpu, name, lambda *n: None):
      self.run_kernel((1, 9), SMALL, slots=4)
    self.assertTrue(self.races_found())


def lower(of_candidates, shape, ragged=False):
  """StableHLO for CUDA."""
  call = jax.eval_shape(
    lambda: suite.make_call(0, of_candidates, shape, ragged=ragged)
  )
  traced = jax.jit(pallas_gpu.interaction_head).trace(**call)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


class LoweringTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 512), 128, True),
    ((1, 2048), 256, False),
    ((32, 512), 128, True),
    ((8, 1024), 512, False),
    ((1, 1), 64, False),
  )
  def test_kernels(self, of_candidates, readout, ragged):
    shape = HeadShape(33, 65, readout, (128, 64), 2, 64, 2)
    text = lower(of_candidates, shape, ragged)
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)


class KindTest(parameterized.TestCase):
  @parameterized.parameters(
    (512, 128, 64, 1, (7, 12)),  # Of 10 and 16 tiles of weights.
    (16384, 128, 64, 2, (4, 7)),
    (16384, 128, 80, 1, (5, 14)),  # Registers.
    (16384, 512, 64, 1, (2, 4)),  # Shared memory.
    (16384, 64, 64, 2, (6, 9)),
  )
  def test_tiles_and_slots(self, rows, readout, rank, tiles, slots):
    shape = HeadShape(33, 65, readout, (128, 64), 2, rank, 2)
    kind = pallas_gpu._Kind(shape, rows, rows, False)
    self.assertEqual((kind.tiles, kind.slots), (tiles, slots))


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'readout': 72}, 'D a multiple of 64, .* not D=72'),
    ({'mlp': (8, 272)}, r'at most 256 channels, .*\(8, 272\)'),
    ({'rank': 129}, 'ranks of at most 128'),
    ({'tasks': 17}, 'at most 16 tasks'),
    ({'readout': 1024}, 'no room in shared memory'),
  )
  def test_shape(self, change, message):
    shape = dataclasses.replace(SMALL, **change)
    with self.assertRaisesRegex(NotImplementedError, message):
      lower((1, 8), shape)

  def test_dtype(self):
    call = suite.make_call(0, (1, 8), SMALL, dtype='float32')
    with self.assertRaisesRegex(NotImplementedError, 'takes bfloat16'):
      pallas_gpu.interaction_head(**call)


if __name__ == '__main__':
  absltest.main()
