"""What the public function checks and computes without its kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.ops import dispatch
from histjax.ops.interaction_head import api
from histjax.ops.interaction_head.weights import HeadShape
from tests.ops.interaction_head import suite

SHAPE = HeadShape(
  user=3, features=5, readout=8, mlp=(6, 4), cross_layers=2, rank=2, tasks=2
)


@functools.cache
def weights():
  return suite.make_weights(np.random.default_rng(0), SHAPE, 'float32')


def arguments(of_candidates=(2, 4)):
  return suite.make_call(
    0, of_candidates, SHAPE, dtype='float32', ragged=True, weights=weights()
  )


class ApiTest(parameterized.TestCase):
  @parameterized.parameters(
    ('user', lambda x: x[:1], r'user is float32 \(1, 3\).*\[B, U\] = \(2, 3\)'),
    (
      'features',
      lambda x: x[:, :3],
      r'features is .*C, F\] = \(2, 4, 5\)',
    ),
    ('readout', lambda x: x[0], r'readout has shape .* make it \[B, C, D\]'),
    ('readout', lambda x: x[..., :4], r'readout is float32 \(2, 4, 4\)'),
    ('readout', lambda x: x.astype(jnp.bfloat16), 'must be float32'),
    ('count', lambda x: x.astype(jnp.float32), r'count is float32 .* int32'),
  )
  def test_arrays(self, name, change, message):
    fields = arguments()
    fields[name] = change(fields[name])
    with self.assertRaisesRegex(ValueError, message):
      ops.interaction_head(**fields)

  def test_unknown_implementation(self):
    with self.assertRaisesRegex(ValueError, "'xla' is unknown; use one of"):
      ops.interaction_head(**arguments(), implementation='xla')

  def test_a_named_one_is_never_replaced(self):
    with ops.target_platform('tpu'):
      with self.assertRaisesRegex(NotImplementedError, 'needs an NVIDIA GPU'):
        ops.interaction_head(**arguments(), implementation='pallas_gpu')
      with dispatch.record() as used:
        ops.interaction_head(**arguments())
      with self.assertRaisesRegex(
        NotImplementedError, 'none of pallas_gpu, numba_cpu computes this on'
      ):
        ops.interaction_head(**arguments(), kernels_only=True)
    self.assertEqual(used, {'interaction_head': {'reference'}})

  @parameterized.parameters(((0, 3),), ((2, 0),))
  def test_empty_axes(self, of_candidates):
    out = ops.interaction_head(**arguments(of_candidates))
    self.assertEqual((out.shape, out.dtype), ((*of_candidates, 2), jnp.float32))

  def test_vmap(self):
    """The kernel's rows are those of all that is mapped; weights have none."""
    call = arguments()
    packed, count = call.pop('weights'), call.pop('count')
    stacked = {k: jnp.stack([x, 2 * x]) for k, x in call.items()}
    counts = jnp.stack([count, count])
    seen = []

    def kernel(user, features, readout, weights, *, count):
      seen.append(count.shape)
      of_candidates = features.sum(axis=-1) * readout.sum(axis=-1)
      bias = weights.vectors[-1, : SHAPE.tasks]
      logits = (user.sum(axis=-1) * count)[:, None] + of_candidates
      return logits[:, :, None] + bias[None, None]

    found = jax.vmap(
      lambda arrays, count: api._over_rows(kernel)(
        **arrays, weights=packed, count=count
      )
    )(stacked, counts)
    self.assertIn((4,), seen)
    for i, out in enumerate(found):
      each = {k: x[i] for k, x in stacked.items()}
      expected = kernel(**each, weights=packed, count=count)
      np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


class KernelTest(parameterized.TestCase):
  """The kernel where its hardware is; elsewhere, that it says so."""

  @parameterized.product(
    shape=(
      HeadShape(33, 65, 64, (128, 64), 2, 64, 2),
      HeadShape(5, 7, 128, (208, 48, 16), 3, 80, 3),
      HeadShape(3, 70, 64, (32,), 1, 16, 1),
      HeadShape(3, 70, 64, (32, 16), 0, 1, 2),
    ),
    ragged=(False, True),
  )
  def test_equals_the_reference(self, shape, ragged):
    run = functools.partial(ops.interaction_head, implementation='pallas_gpu')
    try:
      api._BACKENDS['pallas_gpu'].check_target(dispatch.target_of())
    except NotImplementedError:
      with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu'):
        run(**arguments())
      return
    for of_candidates in ((1, 70), (130, 150), (300, 40)):
      call = suite.make_call(0, of_candidates, shape, ragged=ragged)
      found = run(**call)
      suite.assert_equals_reference(found, call)
      np.testing.assert_array_equal(found, run(**call))


if __name__ == '__main__':
  absltest.main()
