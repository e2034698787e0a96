"""The Hopper kernels without a GPU: interpreted on the CPU, and lowered.

The interpreter looks for races. On a Hopper GPU test_backends.py runs them.
"""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from histjax.ops import dispatch, partition
from histjax.ops.history_attention import api, pallas_gpu
from histjax.types import KeyRange
from tests import marks
from tests.ops import gpu_interpreter
from tests.ops.history_attention import suite

Config, Backward = pallas_gpu.Config, pallas_gpu.Backward


class InterpretedTest(gpu_interpreter.TestCase, suite.BackendTestCase):
  """Runs 'pallas_gpu' on the CPU; fails at a race."""

  module = pallas_gpu

  def setUp(self):
    super().setUp()
    backend = api._BACKENDS['pallas_gpu']
    everywhere = backend._replace(check_target=dispatch.any_target)
    self.enter_context(
      mock.patch.dict(api._BACKENDS, {'pallas_gpu': everywhere})
    )
    for module, name, value in (
      (pallas_gpu, 'plgpu', self.plgpu),
      (pallas_gpu, '_jitted', pallas_gpu._attend),
      # It can only begin at zero.
      (pallas_gpu, '_begin_at', lambda x, acc: gpu_interpreter.Begun(acc, x)),
      # The interpreter's callbacks are not for custom_partitioning.
      (partition, 'by_rows', lambda function, *axes: function),
    ):
      self.enter_context(mock.patch.object(module, name, value))

  def run_call(self, call, scale=None):
    run = functools.partial(
      suite.gradients, implementation='pallas_gpu', scale=scale
    )
    found = jax.jit(run)(
      call.query, call.key, call.value, call.cotangent, call.key_range
    )
    jax.block_until_ready(found)
    self.assertFalse(self.races_found())
    return found

  def check(self, call, scale=None):
    dtype = str(call.query.dtype)
    out, gradients = self.run_call(call, scale)
    expected, expected_gradients = suite.oracle(call, scale)
    self.assert_close(out, expected, dtype)
    self.assert_close(gradients, expected_gradients, dtype, gradient=True)

  @marks.slow_unless(lambda structure, shape, dtype: shape[-1] == 16)
  @parameterized.parameters(
    ('any', (1, 70, 150, 1, 32), 'bfloat16'),
    ('prefix', (2, 70, 150, 1, 64), 'float16'),
    ('causal', (2, 150, 70, 1, 128), 'bfloat16'),
    ('any', (2, 1, 3, 2, 8), 'bfloat16'),
    ('any', (2, 35, 70, 4, 8), 'bfloat16'),  # Four heads side by side.
    ('prefix', (2, 3, 9, 4, 16), 'float16'),  # Two.
    ('causal', (1, 9, 5, 2, 24), 'bfloat16'),
  )
  def test_shapes(self, structure, shape, dtype):
    self.check(suite.make_call(1, shape, structure, dtype))

  @parameterized.parameters(
    ('any', Config(2, 64, 3, 1, Backward(2, 64, 3, True), Backward(2, 64, 3))),
    ('any', Config(1, 64, 2, 1, Backward(1, 64), Backward(2, 64, 2, True))),
    ('causal', Config(3, 128, 2, 2, Backward(1, 64), Backward(3, 64, 3, True))),
  )
  @pytest.mark.slow
  def test_divisions_of_the_work(self, structure, config):
    call = suite.make_call(2, (1, 150, 260, 1, 32), structure, 'bfloat16')
    with mock.patch.object(pallas_gpu, 'config', lambda *args: config):
      self.check(call)

  def test_negative_scale(self):
    call = suite.make_call(3, (1, 9, 70, 1, 32), 'prefix', 'float16')
    self.check(call, scale=-0.3)

  @pytest.mark.slow
  def test_unseen_blocks_are_not_read(self):
    call = suite.make_call(4, (1, 130, 260, 1, 32), 'any', 'bfloat16')
    call = call.replace(
      start=np.minimum(call.start, 50), stop=np.minimum(call.stop, 60)
    )
    call.start[0, 3:70], call.stop[0, 3:70] = 9, 9  # Empty.

    def spoil(x):
      x[:, 64:] = np.nan

    expected = self.run_call(call)
    actual = self.run_call(call.edit(key=spoil, value=spoil))
    self.assert_same(actual, expected, 'pallas_gpu')
    np.testing.assert_array_equal(np.asarray(actual[0], np.float32)[0, 3:70], 0)
    for x in jax.tree.leaves(actual):
      self.assertTrue(np.isfinite(np.asarray(x, np.float32)).all())


def lower(shape, structure, dtype=jnp.bfloat16, gradients=True):
  """StableHLO for CUDA, with the kernels lowered to Mosaic GPU's MLIR."""
  num_rows, num_queries, num_keys, num_heads, head_dim = shape
  array = jax.ShapeDtypeStruct
  query = array((num_rows, num_queries, num_heads, head_dim), dtype)
  key = array((num_rows, num_keys, num_heads, head_dim), dtype)
  bound = array((num_rows, num_queries), jnp.int32)

  def function(query, key, value, start, stop, cotangent):
    attend = functools.partial(
      pallas_gpu.history_attention,
      key_range=KeyRange(start, stop, structure),
      scale=0.5,
    )
    if not gradients:
      return attend(query, key, value)
    out, pull = jax.vjp(attend, query, key, value)
    return out, pull(cotangent)

  traced = jax.jit(function).trace(query, key, key, bound, bound, query)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


class LoweringTest(parameterized.TestCase):
  @parameterized.product(
    structure=suite.STRUCTURES,
    shape=(
      (32, 512, 512, 4, 32),
      (1, 2048, 1024, 4, 64),
      (32, 1001, 999, 4, 64),
      (16, 1024, 1024, 4, 128),
    ),
  )
  def test_kernels(self, structure, shape):
    text = lower(shape, structure)
    self.assertEqual(text.count('@mosaic_gpu_v2('), 3)

  @parameterized.parameters(*suite.STRUCTURES)
  def test_forward_alone_is_one_kernel(self, structure):
    shape = (1, 512, 512, 4, 128)
    text = lower(shape, structure, jnp.float16, gradients=False)
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)

  @parameterized.parameters(('any', 8), ('prefix', 16))
  def test_narrow_heads_are_not_padded(self, structure, head_dim):
    text = lower((2, 16, 24, 4, head_dim), structure, gradients=False)
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)
    self.assertNotIn('stablehlo.pad', text)

  @parameterized.product(structure=suite.STRUCTURES, axis=(1, 2))
  def test_memory_grows_linearly(self, structure, axis):
    shape = [1, 1024, 1024, 2, 32]
    sizes = []
    for _ in range(2):
      arrays = re.findall(r'tensor<((?:\d+x)+)', lower(shape, structure))
      sizes.append(max(np.prod([*map(int, x[:-1].split('x'))]) for x in arrays))
      shape[axis] *= 2
    self.assertLessEqual(sizes[1], 2 * sizes[0])


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ('float32', (1, 2, 3, 1, 32), '16 bits, and query is float32'),
    ('bfloat16', (1, 2, 3, 1, 136), 'up to 128, not H=136'),
    ('bfloat16', (65536, 1, 1, 1, 1), '65535 rows .* B=65536, N=1'),
  )
  def test_call(self, dtype, shape, message):
    call = suite.make_call(5, shape, 'prefix', dtype)
    with self.assertRaisesRegex(NotImplementedError, message):
      pallas_gpu.history_attention(
        *map(jnp.asarray, (call.query, call.key, call.value)),
        call.key_range,
        scale=1.0,
      )


if __name__ == '__main__':
  absltest.main()
