"""The Hopper kernel without a GPU: interpreted on the CPU, and lowered.

The interpreter looks for races.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from histjax.ops.candidate_tower import hopper, pallas_gpu_products
from histjax.ops.keys_values import pallas_gpu
from tests.ops import gpu_interpreter
from tests.ops.keys_values import suite


class _Interpreted(gpu_interpreter.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(
      mock.patch.object(hopper, 'mosaic_gpu', lambda: self.plgpu)
    )

  def check(self, *args, start=None, count=None, **fields):
    call = suite.make_call(0, *args, **fields)
    for name, x in (('start', start), ('count', count)):
      if x is not None:
        call[name] = jnp.array(x, jnp.int32)
    self.check_call(call)

  def check_call(self, call):
    found = jax.block_until_ready(pallas_gpu.keys_values(**call))
    suite.assert_equals_reference(found, call)
    self.assertFalse(self.races_found())


class InterpretedTest(_Interpreted):
  module = pallas_gpu

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

  def test_more_than_a_history(self):
    call = suite.make_call(0, (2, 136), 64, 4, capacity=72, ragged=True)
    call.update(start=None, count=jnp.array([70, 3], jnp.int32))
    self.check_call(call)

  def test_new_events(self):
    """Some of them behind the end of the cache."""
    self.check((3, 10), 64, 2, capacity=21, start=(4, 0, 19), count=(10, 3, 5))

  @pytest.mark.slow
  def test_many(self):
    """All the pieces that fit are in one block."""
    self.enter_context(mock.patch.object(pallas_gpu, 'MULTIPROCESSORS', 1))
    self.check((2, 128), 256, 4, ragged=True, stream='bfloat16')
    self.check((2, 70), 128, 2, capacity=99, rotate=False)

  @parameterized.parameters('commit_smem', 'barrier_wait')
  def test_the_test(self, name):
    call = suite.make_call(0, (1, 8), 64, 4)
    with mock.patch.object(self.plgpu, name, lambda *n: None):
      jax.block_until_ready(pallas_gpu.keys_values(**call))
    self.assertTrue(self.races_found())


class InterpretedWideTest(_Interpreted):
  """From D 512 on, as a product of the candidate tower's."""

  module = pallas_gpu_products

  def test_history(self):
    self.check((2, 72), 512, 8, ragged=True)

  def test_more_than_a_history(self):
    call = suite.make_call(0, (2, 40), 512, 4, capacity=24, stream='bfloat16')
    call.update(start=None, rotate=False)
    self.check_call(call)

  @pytest.mark.slow
  def test_many(self):
    self.enter_context(
      mock.patch.object(pallas_gpu_products, 'MULTIPROCESSORS', 2)
    )
    self.check((3, 136), 768, 12, ragged=True)


class InterpretedHistoriesTest(_Interpreted):
  module = pallas_gpu_products

  def setUp(self):
    super().setUp()
    self.interpret_attention()

  def check_histories(self, *args, count=None, **fields):
    call = suite.make_histories(0, *args, dtype='bfloat16', **fields)
    if count is not None:
      call['count'] = count = jnp.array(count, jnp.int32)
      stop = jnp.minimum(call['key_range'].stop, count[:, None])
      call['key_range'] = call['key_range'].replace(stop=stop)
    found = jax.block_until_ready(pallas_gpu.read_histories(**call))
    suite.assert_equals_plain_layers(found, call)
    self.assertFalse(self.races_found())
    return found

  def test_pages(self):
    call = suite.make_histories(
      0, (3, 96, 8, 64), dtype='bfloat16', mlp_width=256, ragged=True
    )
    call = suite.paged(call)
    found = jax.block_until_ready(pallas_gpu.read_histories(**call))
    suite.assert_writes_its_pages(found, call)
    self.assertFalse(self.races_found())

  @pytest.mark.slow
  def test_tiles_without_meaning_are_zeros(self):
    found = self.check_histories(
      (3, 136, 4, 128), count=(136, 100, 0), mlp_width=512
    )
    for x in found:
      x = np.asarray(x.astype(jnp.float32)).reshape(2, -1, 512)
      np.testing.assert_array_equal(x[:, 256:], 0)
      self.assertTrue(x[:, :256].any(axis=2).all())


def lower(*args, **fields):
  """StableHLO for CUDA."""
  call = jax.eval_shape(lambda: suite.make_call(0, *args, **fields))
  call.update(layer=1, rotate=True)
  traced = jax.jit(
    pallas_gpu.keys_values, static_argnames=('layer', 'rotate')
  ).trace(**call)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


class LoweringTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 512), 128, 4, None),
    ((1, 2048), 256, 4, None),
    ((32, 512), 64, 4, None),
    ((1, 64), 128, 2, 512),
    ((300, 10), 192, 12, 100),
    ((8, 1024), 512, 8, None),
    ((3, 96), 1024, 8, None),
  )
  def test_writes_in_place(self, of_events, width, heads, capacity):
    text = lower(of_events, width, heads, capacity=capacity, ragged=True)
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)
    self.assertEqual(text.count('output_operand_alias<'), 2)
    # Or a slice as an operand would undo that.
    self.assertIn('stablehlo.optimization_barrier', text)

  def test_has_no_effects(self):
    """With any it could not be partitioned over devices."""
    call = jax.eval_shape(lambda: suite.make_call(0, (1, 64), 64, 4))
    call.update(layer=1, rotate=True)
    traced = jax.jit(
      pallas_gpu.keys_values, static_argnames=('layer', 'rotate')
    ).trace(**call)
    self.assertEmpty(traced.jaxpr.effects)


class KindTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 512, 128, 1),  # 8 tiles.
    (1, 512, 256, 1),
    (32, 512, 128, 2),
    (32, 512, 256, 2),  # Shared memory.
    (32, 512, 64, 1),  # There is but one.
    (70, 64, 256, 2),
    (20, 64, 256, 1),
  )
  def test_pieces_of_a_block(self, rows, events, width, pieces):
    kind = pallas_gpu._Kind(rows, events, events, width, 32, True, False, True)
    self.assertEqual(kind.per_block, pieces)
    self.assertEqual(kind.groups * pieces * pallas_gpu.PIECE, width)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (((1, 8), 32, 2), {}, 'D a multiple of 64 up to 256 .* not D=32'),
    (((1, 8), 512, 16), {}, 'H 64 or 128 from D 512 on, .* H=32'),
    (((1, 8), 640, 10), {}, 'D a multiple of 256 .* D=640'),
    (((1, 8), 512, 8), {'capacity': 16}, 'D=512 behind others'),
    (((1, 8), 320, 5), {}, 'not D=320 and H=64'),
    (((1, 8), 128, 1), {}, 'H=128'),
    (((1, 12), 64, 2), {}, 'L a multiple of 8 without start, not 12'),
    (((1, 12), 512, 8), {}, 'L a multiple of 8 without start, not 12'),
    (((1, 8), 64, 2), {'dtype': 'float32'}, 'takes bfloat16 weights'),
  )
  def test_sizes(self, args, fields, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      lower(*args, **fields)


if __name__ == '__main__':
  absltest.main()
