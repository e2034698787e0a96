"""What training computes again changes no gradient, and less is kept."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax.nn import encoder as encoder_lib
from histjax.nn import fusion as fusion_lib
from tests import marks

# The same float32 operations, compiled into other loops.
TOLERANCE = {'rtol': 1e-5, 'atol': 1e-5}
ROWS, EVENTS, CANDIDATES, LAYERS = 32, 16, 16, 4
TRANSFORMERS = ('append_cross', 'append_isolated', 'append_self', 'concat')


@functools.cache
def make(fusion, policy):
  """A function of parameters to differentiate, and parameters."""
  config = encoder_lib.EncoderConfig(
    num_layers=LAYERS if fusion == 'append_cross' else 2,
    width=16,
    num_heads=2,
    dropout=0.2 if fusion == 'append_isolated' else 0.0,
    attention='reference',
    remat=policy,
  )
  module = fusion_lib.FUSIONS[fusion](config)
  rows, candidates = (ROWS, CANDIDATES) if fusion == 'append_cross' else (2, 3)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(rows, EVENTS + candidates, 16)).astype(np.float32)
  arguments = (
    tokens[:, :EVENTS],
    tokens[:, EVENTS:],
    np.full(rows, EVENTS, np.int32),
    None,
  )
  shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)
  params = jax.tree.map(
    lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype),
    shapes['params'],
  )

  def loss(params):
    fused = module.apply(
      {'params': params},
      *arguments,
      train=True,
      rngs={'dropout': jax.random.key(1)},
    )
    return jnp.mean(jnp.square(fused - arguments[1]))

  return loss, params


@functools.cache
def computed(fusion, policy):
  """The gradient, here."""
  loss, params = make(fusion, policy)
  return jax.device_get(jax.jit(jax.grad(loss))(params))


def kept(policy) -> int:
  """The bytes that the forward pass leaves to the backward pass.

  Not those of a compiled program: XLA for CPUs merges what is computed twice.
  """
  loss, params = make('append_cross', policy)
  backward = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


class RematTest(parameterized.TestCase):
  @marks.slow_unless(
    lambda fusion, policy: (
      (fusion, policy) == ('append_cross', 'nothing_saveable')
    )
  )
  @parameterized.product(fusion=TRANSFORMERS, policy=encoder_lib.REMAT_POLICIES)
  def test_gradients_are_equal(self, fusion, policy):
    wanted, found = computed(fusion, None), computed(fusion, policy)
    chex.assert_trees_all_close(found, wanted, **TOLERANCE)

  def test_less_is_kept(self):
    some, none = kept('dots_saveable'), kept('nothing_saveable')
    self.assertLess(none, 0.5 * some)
    self.assertLess(some, 0.9 * kept(None))


if __name__ == '__main__':
  absltest.main()
