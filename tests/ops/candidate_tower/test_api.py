"""What the public function checks, and which backend it picks."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.ops import devices, dispatch
from histjax.ops.candidate_tower import api
from tests.ops.candidate_tower import suite

SHAPE = (2, 3, 5, 2, 8)


def arguments(shape=SHAPE):
  call = suite.make_call(0, shape, ragged=True)
  names = ('candidates', 'position', 'keys', 'values', 'key_range', 'weights')
  fields = dict(zip(names, call.positional, strict=True))
  fields |= {'num_heads': call.num_heads, 'count': call.count}
  return {**fields, 'layer': call.layer}


class ValidationTest(parameterized.TestCase):
  @parameterized.parameters(
    ('candidates', lambda x: x[0], r'candidates has .* make it \[B, C, D\]'),
    ('candidates', lambda x: x.astype(np.int32), r'is int32; cast it to'),
    ('candidates', lambda x: x[:, :2], r'key_range.start is int32 \(2, 3\)'),
    ('candidates', lambda x: x[..., :4], r'keys is .* = \(2, 2, 5, 2, 2\)'),
    ('keys', lambda x: x[0], r'keys is float32 .* \[layers, B, L, N, H\]'),
    ('keys', lambda x: x[:1], r'keys is float32 \(1, 2, 5, 2, 8\)'),
    ('keys', lambda x: x.astype(jnp.bfloat16), r'keys is bfloat16 .* float32'),
    ('values', lambda x: x[:, :, :4], r'values is float32 \(2, 2, 4, 2, 8\)'),
    ('position', lambda x: x[:1], r'position is int32 \(1, 3\).*\(2, 3\)'),
    ('position', lambda x: x.astype(np.float32), r'position is float32'),
    ('count', lambda x: x[:1], r'count is int32 \(1,\).*\[B\] = \(2,\)'),
    ('layer', lambda x: 2, r'layer=2 must be in \[0, 2\)'),
    ('layer', lambda x: -1, r'layer=-1 must be in \[0, 2\)'),
    ('num_heads', lambda x: 3, r'num_heads=3 must .* divide D=16'),
    ('num_heads', lambda x: 0, r'num_heads=0 must be at least 1'),
    ('num_heads', lambda x: 4, r'keys is .* = \(2, 2, 5, 4, 4\)'),
  )
  def test_arrays(self, name, change, message):
    fields = arguments()
    fields[name] = change(fields[name])
    with self.assertRaisesRegex(ValueError, message):
      ops.candidate_tower(**fields)
    with self.assertRaisesRegex(ValueError, message):
      ops.candidate_tower_backend(**fields)

  @parameterized.parameters(
    ('query', lambda x: x[..., :8], r'weights.query is .*\[layers, D, D\]'),
    ('output', lambda x: x[:1], r'weights.output is float32 \(1, 16, 16\)'),
    ('mlp_in', lambda x: x[0], r'weights.mlp_in is .*\[layers, D, F\]'),
    ('mlp_in', lambda x: x.astype(jnp.bfloat16), r'mlp_in is bfloat16'),
    ('mlp_out', lambda x: x[:, :8], r'weights.mlp_out is .* \(2, 64, 16\)'),
    ('bias', lambda x: x[:, 1:], r'bias is float32 \(2, 111\).* \(2, 112\)'),
    ('bias', lambda x: x.astype(jnp.bfloat16), r'bias is bfloat16'),
    ('final_scale', lambda x: x[1:], r'weights.final_scale is .* = \(16,\)'),
  )
  def test_weights(self, name, change, message):
    fields = arguments()
    weights = fields['weights']
    fields['weights'] = weights.replace(
      **{name: change(getattr(weights, name))}
    )
    with self.assertRaisesRegex(ValueError, message):
      ops.candidate_tower(**fields)

  @parameterized.parameters(
    ({'start': np.zeros((2, 4), np.int32)}, r'start is int32 \(2, 4\)'),
    ({'stop': np.zeros((2, 3), np.int64)}, r'key_range.stop is int64'),
    ({'structure': 'all'}, r"structure='all' is unknown; use one of"),
  )
  def test_key_range(self, change, message):
    fields = arguments()
    fields['key_range'] = fields['key_range'].replace(**change)
    with self.assertRaisesRegex(ValueError, message):
      ops.candidate_tower_backend(**fields)

  def test_odd_head_dim_cannot_turn(self):
    with self.assertRaisesRegex(ValueError, 'H=3 is odd'):
      ops.candidate_tower(**arguments((2, 3, 5, 2, 3)))

  def test_unknown_implementation(self):
    with self.assertRaisesRegex(ValueError, "'cudnn' is unknown; use one of"):
      ops.candidate_tower(**arguments(), implementation='cudnn')

  @parameterized.product(
    implementation=(None, 'reference', 'xla'),
    shape=((0, 3, 5, 2, 8), (2, 0, 5, 2, 8)),
  )
  def test_empty_axes(self, implementation, shape):
    out = ops.candidate_tower(**arguments(shape), implementation=implementation)
    self.assertEqual(out.shape, (*shape[:2], 16))


class DispatchTest(parameterized.TestCase):
  def backends(self, **functions):
    """Replaces all backends by these functions."""
    fakes = {
      name: dispatch.Backend(function, dispatch.any_target)
      for name, function in functions.items()
    }
    return mock.patch.dict(api._BACKENDS, fakes, clear=True)

  def raises(self, error):
    def call(*args, **kwargs):
      del args, kwargs
      raise error

    return call

  def gives(self, number):
    return lambda x, *args, **kwargs: jnp.full_like(x, number)

  def test_takes_the_first_that_can(self):
    with self.backends(
      a=self.raises(NotImplementedError('no')), b=self.gives(2), c=self.gives(3)
    ):
      out = ops.candidate_tower(**arguments())
      self.assertEqual(ops.candidate_tower_backend(**arguments()), 'b')
    np.testing.assert_array_equal(out, 2)

  def test_a_named_one_is_never_replaced(self):
    with self.backends(
      a=self.raises(NotImplementedError('no such thing')), b=self.gives(2)
    ):
      out = ops.candidate_tower(**arguments(), implementation='b')
      np.testing.assert_array_equal(out, 2)
      for function in (ops.candidate_tower, ops.candidate_tower_backend):
        with self.assertRaisesRegex(NotImplementedError, 'no such thing'):
          function(**arguments(), implementation='a')

  def test_hides_no_mistake(self):
    with self.backends(a=self.raises(TypeError('broken')), b=self.gives(2)):
      with self.assertRaisesRegex(TypeError, 'broken'):
        ops.candidate_tower(**arguments())

  def test_asks_for_the_device_of_the_candidates(self):
    seen = []
    backend = dispatch.Backend(self.gives(1), seen.append)
    device = jax.devices()[-1]
    fields = arguments()
    fields['candidates'] = jax.device_put(fields['candidates'], device)
    with mock.patch.dict(api._BACKENDS, {'a': backend}, clear=True):
      ops.candidate_tower_backend(**fields)
      with jax.default_device(device):
        ops.candidate_tower_backend(**arguments())
    self.assertEqual(seen, [devices.Target.of(device)] * 2)

  def test_backend_needs_shapes_alone(self):
    call = suite.make_call(0, SHAPE)
    shapes = jax.eval_shape(lambda: call.positional)
    for name in ('xla', 'reference'):
      self.assertEqual(
        ops.candidate_tower_backend(*shapes, num_heads=2, implementation=name),
        name,
      )

  def test_record(self):
    with dispatch.record() as used:
      ops.candidate_tower_backend(**arguments(), implementation='reference')
      with dispatch.record() as inner:
        pass
    self.assertEqual(used, {'candidate_tower': {'reference'}})
    self.assertEqual(inner, {})


if __name__ == '__main__':
  absltest.main()
