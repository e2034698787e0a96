"""The interaction head and its packed parameters."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.nn import interaction
from histjax.ops import dispatch
from histjax.ops.interaction_head import api, reference

CONFIGS = {
  'dcn_v2': interaction.InteractionConfig(cross_rank=5, mlp_widths=(9, 7)),
  'wide': interaction.InteractionConfig(
    cross_layers=3, cross_rank=70, mlp_widths=(66, 65, 3)
  ),
  'one_layer': interaction.InteractionConfig(
    cross_layers=1, cross_rank=2, mlp_widths=(4,)
  ),
  'mlp': interaction.InteractionConfig(kind='mlp', mlp_widths=(8, 4)),
}
ROWS, CANDIDATES, USER, FEATURES, READOUT, TASKS = 2, 5, 6, 61, 12, 3


def make(config, dtype):
  """A head, its parameters, none of them zero, and what it computes from."""
  rng = np.random.default_rng(0)
  head = interaction.InteractionHead(
    config, TASKS, USER, FEATURES + READOUT, dtype=dtype
  )
  args = [
    jnp.asarray(rng.normal(size=(*shape, width)), dtype)
    for shape, width in (
      ((ROWS,), USER),
      ((ROWS, CANDIDATES), FEATURES),
      ((ROWS, CANDIDATES), READOUT),
    )
  ]
  shapes = jax.eval_shape(
    lambda *args: head.init(jax.random.key(0), *args, method='score'), *args
  )['params']
  params = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) / np.sqrt(x.shape[0])).astype(x.dtype),
    shapes,
  )
  packed = head.pack(config, params, READOUT, dtype)
  return head, params, packed, args


class ConfigTest(absltest.TestCase):
  def test_widths_may_be_a_list(self):
    found = interaction.InteractionConfig(mlp_widths=[16, 8])
    expected = interaction.InteractionConfig(mlp_widths=(16, 8))
    self.assertEqual(hash(found), hash(expected))


class PackTest(parameterized.TestCase):
  @parameterized.parameters(*CONFIGS)
  def test_means_what_the_module_means(self, name):
    head, params, packed, args = make(CONFIGS[name], 'float32')
    with jax.default_matmul_precision('highest'):
      expected = head.apply({'params': params}, *args, method='score')
    found = reference.interaction_head(*args, packed['weights'])
    # Sums of 79 terms in another order, through four products.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  def test_user_half_is_part_of_it(self):
    head, params, _, (user, *of_candidates) = make(CONFIGS['dcn_v2'], 'float32')

    def by_halves(head):
      candidate = jnp.concatenate(of_candidates, axis=-1)
      return head(head.user_half(user), candidate)

    np.testing.assert_array_equal(
      head.apply({'params': params}, method=by_halves),
      head.apply({'params': params}, user, *of_candidates, method='score'),
    )

  def test_without_a_kernel_nothing_changes(self):
    head, params, packed, args = make(CONFIGS['dcn_v2'], 'bfloat16')
    with ops.target_platform('cpu'), dispatch.record() as used:
      found, expected = (
        head.apply({'params': params, **more}, *args, method='score')
        for more in ({'tower': packed}, {})
      )
    np.testing.assert_array_equal(found, expected)
    self.assertEqual(used, {})

  @parameterized.parameters(False, True)
  def test_where_there_is_one_it_scores(self, train):
    head, params, packed, args = make(CONFIGS['dcn_v2'], 'bfloat16')
    kernel = dispatch.Backend(reference.interaction_head, dispatch.any_target)
    with (
      mock.patch.dict(api._BACKENDS, {'pallas_gpu': kernel}),
      dispatch.record() as used,
    ):
      found = head.apply(
        {'params': params, 'tower': packed},
        *args,
        train=train,
        method='score',
      )
    self.assertEqual(
      used, {} if train else {'interaction_head': {'pallas_gpu'}}
    )
    expected = head.apply({'params': params}, *args, method='score')
    # The module rounds to 8 bits in a dozen places of order 1.
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)


if __name__ == '__main__':
  absltest.main()
