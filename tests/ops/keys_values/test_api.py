"""What the public function checks and computes without its kernel."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.ops import dispatch
from histjax.ops.keys_values import api, reference
from tests.ops.keys_values import suite


def arguments(**fields):
  fields = {'capacity': 9, 'ragged': True, 'dtype': 'float32', **fields}
  return suite.make_call(0, (2, 4), 8, 2, **fields)


class ApiTest(parameterized.TestCase):
  @parameterized.parameters(
    ('events', lambda x: x[0], r'events has shape .* make it \[B, E, D\]'),
    ('events', lambda x: x.astype(jnp.bfloat16), 'cast it to float32'),
    ('events', lambda x: x[..., :6], 'N H must be D=6'),
    ('keys', lambda x: x[0], r'keys has shape .* make it \[layers, B, L, N, H'),
    ('keys', lambda x: x[:, :1], r'keys is .* = \(3, 2, 9, 2, 4\)'),
    ('values', lambda x: x[:, :, :8], r'values is .* = \(3, 2, 9, 2, 4\)'),
    (
      'weights',
      lambda x: x.replace(matrix=x.matrix[..., :8]),
      r'weights.matrix is .* = \(3, 8, 16\)',
    ),
    (
      'weights',
      lambda x: x.replace(bias=x.bias[:2]),
      r'weights.bias is .* = \(3, 16\)',
    ),
    ('start', lambda x: x[:1], r'start is .*int32 \[B\] = \(2,\)'),
    ('count', lambda x: x.astype(jnp.float32), r'count is float32 .* int32'),
    ('layer', lambda x: 3, 'layer=3 must be one of the 3 of keys'),
    ('layer', lambda x: -1, 'layer=-1 must be one of'),
    ('start', lambda x: None, 'E=4 and keys L=9; make E at least L, or'),
  )
  def test_arguments(self, name, change, message):
    call = arguments()
    call[name] = change(call[name])
    with self.assertRaisesRegex(ValueError, message):
      ops.keys_values(**call)

  def test_odd_heads_cannot_turn(self):
    call = suite.make_call(0, (2, 4), 6, 2, dtype='float32', rotate=True)
    with self.assertRaisesRegex(ValueError, 'H=3 is odd'):
      ops.keys_values(**call)

  def test_unknown_implementation(self):
    with self.assertRaisesRegex(ValueError, "'xla' is unknown; use one of"):
      ops.keys_values(**arguments(), implementation='xla')

  def test_a_named_one_is_never_replaced(self):
    with ops.target_platform('tpu'):
      with self.assertRaisesRegex(NotImplementedError, 'needs an NVIDIA GPU'):
        ops.keys_values(**arguments(), implementation='pallas_gpu')
      with dispatch.record() as used:
        ops.keys_values(**arguments())
    self.assertEqual(used, {'keys_values': {'reference'}})

  def test_no_events(self):
    call = arguments()
    call['events'] = call['events'][:, :0]
    keys, values = ops.keys_values(**call)
    np.testing.assert_array_equal(keys, call['keys'])
    np.testing.assert_array_equal(values, call['values'])

  def test_where_events_go(self):
    """Behind those of their row; none of those that do not count."""
    call = arguments(rotate=False)
    call.update(start=jnp.array([7, 2]), count=jnp.array([4, 1]))
    call['weights'] = call['weights'].replace(
      matrix=jnp.zeros_like(call['weights'].matrix),
      bias=jnp.full_like(call['weights'].bias, 100.0),
    )
    for name, found in zip(
      ('keys', 'values'), ops.keys_values(**call), strict=True
    ):
      changed = np.zeros(found.shape[:3], bool)
      changed[1, 0, 7:] = changed[1, 1, 2] = True
      np.testing.assert_array_equal((found == 100).all(axis=(3, 4)), changed)
      np.testing.assert_array_equal(
        np.asarray(found)[~changed], np.asarray(call[name])[~changed]
      )

  def test_vmap(self):
    """The kernel's rows are those of all that is mapped; weights have none."""
    call = arguments()
    mapped = {k: call.pop(k) for k in ('events', 'keys', 'values', 'start')}
    stacked = {
      k: jnp.stack([x, x + 1 if k == 'start' else 2 * x])
      for k, x in mapped.items()
    }
    seen = []

    def kernel(*args, start, **kwargs):
      seen.append(start.shape)
      return reference.keys_values(*args, start=start, **kwargs)

    with mock.patch.object(api, '_kernel', kernel):
      found = jax.vmap(lambda arrays: api._over_rows(**arrays, **call))(stacked)
    self.assertIn((4,), seen)
    for i in range(2):
      each = {k: x[i] for k, x in stacked.items()}
      expected = reference.keys_values(**each, **call)
      for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-5)


class KernelTest(parameterized.TestCase):
  """The kernel where its hardware is; elsewhere, that it says so."""

  @parameterized.product(
    sizes=((64, 4), (64, 2), (128, 4), (128, 2), (192, 12), (256, 4)),
    placed=(False, True),
  )
  def test_equals_the_reference(self, sizes, placed):
    self.check(sizes, placed)

  @parameterized.parameters((512, 8), (512, 4), (768, 12), (1024, 8))
  def test_wide(self, *sizes):
    self.check(sizes, placed=False)

  def check(self, sizes, placed):
    run = functools.partial(
      jax.jit(
        ops.keys_values, static_argnames=('layer', 'rotate', 'implementation')
      ),
      implementation='pallas_gpu',
    )
    try:
      api._BACKENDS['pallas_gpu'].check_target(dispatch.target_of())
    except NotImplementedError:
      with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu'):
        run(**arguments())
      return
    for of_events in ((1, 72), (3, 200), (70, 136)):
      for fields in ({'ragged': True}, {'rotate': False, 'stream': 'bfloat16'}):
        call = suite.make_call(
          0, of_events, *sizes, capacity=333 if placed else None, **fields
        )
        found = run(**call)
        suite.assert_equals_reference(found, call)
        for x, y in zip(found, run(**call), strict=True):
          np.testing.assert_array_equal(x, y)


if __name__ == '__main__':
  absltest.main()
