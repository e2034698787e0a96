"""What the public function checks and computes without its kernel."""

from unittest import mock

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


def arguments(of_candidates=(2, 4)):
  return suite.make_call(0, of_candidates, SHAPE, dtype='float32', ragged=True)


class ApiTest(parameterized.TestCase):
  @parameterized.parameters(
    ('user', lambda x: x[:1], r'user is float32 \(1, 3\).*\[B, U\] = \(2, 3\)'),
    ('features', lambda x: x[:, :3], r'features is .*\[B, C, F\] = \(2, 4, 5\)'),
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
    self.assertEqual(used, {'interaction_head': {'reference'}})

  @parameterized.parameters(((0, 3),), ((2, 0),))
  def test_empty_axes(self, of_candidates):
    out = ops.interaction_head(**arguments(of_candidates))
    self.assertEqual((out.shape, out.dtype), ((*of_candidates, 2), jnp.float32))

  def test_vmap(self):
    """The kernel's rows are those of all that is mapped; weights have none."""
    call = arguments()
    weights, count = call.pop('weights'), call.pop('count')
    stacked = {k: jnp.stack([x, 2 * x]) for k, x in call.items()}
    counts = jnp.stack([count, count])
    seen = []

    def kernel(user, features, readout, weights, *, count):
      seen.append(count.shape)
      of_candidates = features.sum(axis=-1) * readout.sum(axis=-1)
      bias = weights.vectors[-1, : SHAPE.tasks]
      logits = (user.sum(axis=-1) * count)[:, None] + of_candidates
      return logits[:, :, None] + bias[None, None]

    with mock.patch.object(api, '_kernel', kernel):
      found = jax.vmap(
        lambda arrays, count: api._over_rows(
          **arrays, weights=weights, count=count
        )
      )(stacked, counts)
    self.assertIn((4,), seen)
    for i, out in enumerate(found):
      each = {k: x[i] for k, x in stacked.items()}
      expected = kernel(**each, weights=weights, count=count)
      np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
