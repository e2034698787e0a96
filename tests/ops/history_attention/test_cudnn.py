"""How ranges become cuDNN's masks. What cuDNN computes: test_backends.py."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax.ops.history_attention import cudnn
from tests.ops.history_attention import suite

SHAPE = (3, 12, 9, 2, 8)


def lower(call) -> str:
  """StableHLO for CUDA of a call and its gradients, from any machine."""

  def function(query, key, value, cotangent, key_range):
    out, pull = jax.vjp(
      lambda *x: cudnn.history_attention(*x, key_range, scale=0.5),
      query,
      key,
      value,
    )
    return out, pull(cotangent)

  # Where JAX has no CUDA it cannot ask cuDNN for its version.
  version = mock.patch(
    'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version',
    return_value=91000,
  )
  with version:
    traced = jax.jit(function).trace(
      call.query, call.key, call.value, call.cotangent, call.key_range
    )
    return traced.lower(lowering_platforms=('cuda',)).as_text()


class LoweringTest(parameterized.TestCase):
  @parameterized.product(
    structure_and_mask=(('prefix', 'PADDING'), ('causal', 'PADDING_CAUSAL')),
    dtype=('float16', 'bfloat16'),
    num_queries=(5, 9, 12),
  )
  def test_calls_cudnn(self, structure_and_mask, dtype, num_queries):
    structure, mask = structure_and_mask
    shape = (3, num_queries, *SHAPE[2:])
    text = lower(suite.make_call(0, shape, structure, dtype))
    self.assertIn('@__cudnn$fmhaSoftmax(', text)
    self.assertIn('@__cudnn$fmhaSoftmaxBackward(', text)
    self.assertEqual(text.count(f'mask_type\\22: \\22{mask}\\22'), 2)
    self.assertEqual(text.count('fmha_scale\\22: 0.5'), 2)


class MappingTest(suite.BackendTestCase):
  """The same calls of jax.nn, computed by its XLA implementation."""

  @parameterized.product(
    structure=('prefix', 'causal'), num_queries=(1, 5, 9, 12)
  )
  def test_means_the_ranges(self, structure, num_queries):
    _, _, num_keys, num_heads, head_dim = SHAPE
    shape = (4, num_queries, num_keys, num_heads, head_dim)
    call = suite.make_call(1, shape, structure, 'bfloat16')
    length = np.array([0, 1, 7, num_keys], np.int32)
    start, stop = suite.structured(length, num_queries, num_keys, structure)
    call = call.replace(start=start, stop=stop)
    attend = jax.nn.dot_product_attention

    def xla(*args, implementation, **kwargs):
      self.assertEqual(implementation, 'cudnn')
      return attend(*args, implementation='xla', **kwargs)

    @jax.jit
    def run(query, key, value, cotangent):
      out, pull = jax.vjp(
        lambda *x: cudnn.history_attention(
          *x, call.key_range, scale=head_dim**-0.5
        ),
        query,
        key,
        value,
      )
      return out, pull(cotangent)

    with mock.patch('jax.nn.dot_product_attention', xla):
      out, gradients = run(call.query, call.key, call.value, call.cotangent)
    expected, expected_gradients = suite.oracle(call)
    self.assert_close(out, expected, 'bfloat16')
    self.assert_close(gradients, expected_gradients, 'bfloat16', gradient=True)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ('any', 'bfloat16', 8, "structure='any': it masks by 'prefix' or 'causal'"),
    ('prefix', 'float32', 8, '16 bits, and query is float32'),
    ('causal', 'bfloat16', 12, 'multiple of 8, not H=12'),
  )
  def test_call(self, structure, dtype, head_dim, message):
    call = suite.make_call(2, (*SHAPE[:4], head_dim), structure, dtype)
    with self.assertRaisesRegex(NotImplementedError, message):
      cudnn.history_attention(
        *map(jnp.asarray, (call.query, call.key, call.value)),
        call.key_range,
        scale=1.0,
      )


if __name__ == '__main__':
  absltest.main()
