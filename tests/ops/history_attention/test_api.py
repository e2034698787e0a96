"""What the public function checks, and which backend it picks."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.ops import devices, dispatch
from histjax.ops.history_attention import api
from histjax.types import KeyRange
from tests.ops.history_attention import suite

SHAPE = (2, 3, 5, 2, 8)


def arguments(dtype='float32', structure='any', shape=SHAPE):
  call = suite.make_call(0, shape, structure, dtype)
  return {
    'query': jnp.asarray(call.query),
    'key': jnp.asarray(call.key),
    'value': jnp.asarray(call.value),
    'key_range': call.key_range,
  }


class ValidationTest(parameterized.TestCase):
  @parameterized.parameters(
    ('query', lambda x: x[0], r'query has shape \(3, 2, 8\); make it \[B, Q'),
    ('key', lambda x: x[0], r'key has shape \(5, 2, 8\); make it \[B, L'),
    ('key', lambda x: x[:1], r'key has shape .* must be .*\(2, 5, 2, 8\)'),
    ('key', lambda x: x[:, :, :1], r'key has shape'),
    ('key', lambda x: x[..., :4], r'key has shape'),
    ('value', lambda x: x[:, :4], r'value has shape \(2, 4, 2, 8\)'),
    ('value', lambda x: x.astype(jnp.bfloat16), r'value is bfloat16 .* cast'),
    ('query', lambda x: x.astype(jnp.int32), r'query is int32 .* float'),
  )
  def test_arrays(self, name, change, message):
    fields = arguments()
    fields[name] = change(fields[name])
    with self.assertRaisesRegex(ValueError, message):
      ops.history_attention(**fields)

  @parameterized.parameters(
    ({'start': np.zeros((2, 4), np.int32)}, r'start .*\(2, 4\).* \(2, 3\)'),
    ({'stop': np.zeros(2, np.int32)}, r'key_range.stop is int32 \(2,\)'),
    ({'stop': np.zeros((2, 3), np.int64)}, r'key_range.stop is int64'),
    ({'stop': np.zeros((2, 3), np.float32)}, r'must be int32 \[B, Q\]'),
    ({'structure': 'windowed'}, r"structure='windowed' is unknown"),
  )
  def test_key_range(self, change, message):
    fields = arguments()
    fields['key_range'] = fields['key_range'].replace(**change)
    with self.assertRaisesRegex(ValueError, message):
      ops.history_attention(**fields)

  def test_head_dim_of_zero(self):
    fields = arguments(shape=(2, 3, 5, 2, 0))
    with self.assertRaisesRegex(ValueError, 'H must be at least 1'):
      ops.history_attention(**fields)

  @parameterized.parameters(float('nan'), float('inf'))
  def test_scale(self, scale):
    with self.assertRaisesRegex(ValueError, 'finite Python number'):
      ops.history_attention(**arguments(), scale=scale)

  def test_traced_scale(self):
    fields = arguments()
    attend = jax.jit(lambda s: ops.history_attention(**fields, scale=s))
    with self.assertRaisesRegex(ValueError, 'multiply query by it'):
      attend(0.5)

  def test_unknown_implementation(self):
    with self.assertRaisesRegex(
      ValueError, "'pallas' is unknown; use one of .*'xla', 'reference'"
    ):
      ops.history_attention(**arguments(), implementation='pallas')

  @parameterized.product(
    implementation=(None, 'reference', 'xla'),
    shape=((0, 3, 5, 2, 8), (2, 0, 5, 2, 8), (2, 3, 0, 2, 8), (2, 3, 5, 0, 8)),
  )
  def test_empty_axes(self, implementation, shape):
    num_rows, num_queries, num_keys, num_heads, head_dim = shape
    query = jnp.ones((num_rows, num_queries, num_heads, head_dim))
    key = jnp.ones((num_rows, num_keys, num_heads, head_dim))
    bound = jnp.zeros((num_rows, num_queries), jnp.int32)
    cotangent = jnp.ones_like(query)
    out, gradients = suite.gradients(
      query,
      key,
      key,
      cotangent,
      KeyRange(bound, bound),
      implementation=implementation,
    )
    np.testing.assert_array_equal(out, np.zeros(query.shape))
    for x, y in zip(gradients, (query, key, key), strict=True):
      np.testing.assert_array_equal(x, np.zeros(y.shape))

  def test_numpy_arguments(self):
    call = suite.make_call(0, SHAPE)
    out = ops.history_attention(
      call.query, call.key, call.value, KeyRange(call.start, call.stop)
    )
    np.testing.assert_allclose(out, suite.oracle(call)[0], atol=5e-3)


class DispatchTest(parameterized.TestCase):
  def backends(self, **attend):
    """Replaces all backends by these functions."""
    fakes = {
      name: dispatch.Backend(function, lambda device: None)
      for name, function in attend.items()
    }
    return mock.patch.dict(api._BACKENDS, fakes, clear=True)

  def raises(self, error):
    def attend(*args, **kwargs):
      del args, kwargs
      raise error

    return attend

  def gives(self, number):
    return lambda query, *args, **kwargs: jnp.full_like(query, number)

  def test_takes_the_first_that_can(self):
    with self.backends(
      a=self.raises(NotImplementedError('no')), b=self.gives(2), c=self.gives(3)
    ):
      out = ops.history_attention(**arguments())
      self.assertEqual(ops.history_attention_backend(**arguments()), 'b')
    np.testing.assert_array_equal(out, 2)

  def test_takes_the_named_one(self):
    with self.backends(a=self.gives(1), b=self.gives(2)):
      out = ops.history_attention(**arguments(), implementation='b')
    np.testing.assert_array_equal(out, 2)

  def test_a_named_one_is_never_replaced(self):
    with self.backends(
      a=self.raises(NotImplementedError('no such thing')), b=self.gives(2)
    ):
      for function in (ops.history_attention, ops.history_attention_backend):
        with self.assertRaisesRegex(NotImplementedError, 'no such thing'):
          function(**arguments(), implementation='a')

  @parameterized.parameters(ValueError, RuntimeError, TypeError)
  def test_hides_no_mistake(self, error):
    with self.backends(a=self.raises(error('broken')), b=self.gives(2)):
      with self.assertRaisesRegex(error, 'broken'):
        ops.history_attention(**arguments())

  def test_asks_for_the_device_of_the_query(self):
    seen = []
    backend = dispatch.Backend(self.gives(1), seen.append)
    device = jax.devices()[-1]
    fields = jax.device_put(arguments(), device)
    with mock.patch.dict(api._BACKENDS, {'a': backend}, clear=True):
      ops.history_attention(**fields)
      with jax.default_device(device):
        jax.eval_shape(lambda: ops.history_attention(**arguments()))
    self.assertEqual(seen, [devices.Target.of(device)] * 2)

  @parameterized.product(
    dtype=('float32', 'bfloat16'), structure=suite.STRUCTURES
  )
  def test_backend(self, dtype, structure):
    fields = arguments(dtype, structure)
    expected = 'xla'
    if dtype == 'bfloat16':
      try:
        devices.check_hopper(dispatch.target_of())
        expected = 'pallas_gpu'
      except NotImplementedError:
        pass
    self.assertEqual(ops.history_attention_backend(**fields), expected)
    shapes = jax.eval_shape(lambda: fields)
    self.assertEqual(ops.history_attention_backend(**shapes), expected)
    self.assertEqual(
      ops.history_attention_backend(**fields, implementation='reference'),
      'reference',
    )

  @parameterized.parameters(0, 1, 2, 3)
  def test_backend_without_rows_queries_or_keys(self, axis):
    fields = arguments(
      shape=[0 if i == axis else n for i, n in enumerate(SHAPE)]
    )
    self.assertEqual(ops.history_attention_backend(**fields), 'xla')
    self.assertEqual(
      ops.history_attention_backend(**fields, implementation='reference'),
      'reference',
    )

  def test_backend_checks_its_arguments(self):
    fields = arguments()
    fields['key'] = fields['key'][0]
    with self.assertRaisesRegex(ValueError, 'key has shape'):
      ops.history_attention_backend(**fields)


if __name__ == '__main__':
  absltest.main()
