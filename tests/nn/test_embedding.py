"""Tokens as one product."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.nn import embedding

HOPPER = {'platform': 'cuda', 'compute_capability': '9.0'}


def make(width=24, action=True):
  """A module, its parameters, those packed, and item and action features."""
  rng = np.random.default_rng(0)
  tokens = embedding.EventTokens(width, jnp.bfloat16)
  item, of_action = (
    jnp.asarray(rng.normal(size=(2, 5, n)), jnp.bfloat16) for n in (7, 3)
  )
  of_action = of_action if action else None

  def both(tokens):
    return tokens.events(item, of_action), tokens.candidates(item)

  shapes = jax.eval_shape(
    lambda: tokens.init(jax.random.key(0), method=both)['params']
  )
  params = jax.tree.map(
    lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype), shapes
  )
  return tokens, params, both


class EventTokensTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_packed(self, action):
    tokens, params, both = make(action=action)
    packed = embedding.EventTokens.pack(params, 'bfloat16')
    variables = {'params': params, 'tower': packed}
    with ops.target_platform(**HOPPER):
      found = tokens.apply(variables, method=both)
    expected = tokens.apply({'params': params}, method=both)
    for x, y in zip(found, expected, strict=True):
      self.assertEqual((x.dtype, x.shape), (y.dtype, y.shape))
      # The module rounds to 8 bits two or three times, values of order 1.
      np.testing.assert_allclose(
        x.astype(np.float32), y.astype(np.float32), rtol=0.01, atol=0.02
      )
    self.assertFalse(np.array_equal(found[0], found[1]))

  def test_elsewhere_nothing_changes(self):
    tokens, params, both = make()
    packed = embedding.EventTokens.pack(params, 'bfloat16')
    with ops.target_platform('cpu'):
      found = tokens.apply({'params': params, 'tower': packed}, method=both)
      expected = tokens.apply({'params': params}, method=both)
    for x, y in zip(found, expected, strict=True):
      np.testing.assert_array_equal(x, y)


if __name__ == '__main__':
  absltest.main()
