"""Every fusion against its equation, and what all of them promise."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops
from histjax.nn import encoder as encoder_lib
from histjax.nn import fusion as fusion_lib
from histjax.types import Paged, dense
from tests import oracle, support

# Float32 against float64 through two layers; most results are normalized.
TOLERANCE = {'rtol': 2e-5, 'atol': 2e-5}
ROWS, EVENTS, CANDIDATES, WIDTH = 3, 6, 4, 8
ENCODERS = {
  'causal': {},
  'window': {'window': 2},
  'bidirectional': {'causal': False},
  'recency': {'causal': False, 'positions': 'recency', 'num_recency': 4},
}
TRANSFORMERS = (
  'append_cross',
  'append_isolated',
  'append_self',
  'concat',
  'cross_only',
)
# The other fusions have no positions and no order.
CASES = tuple(
  (fusion, encoder)
  for fusion in fusion_lib.FUSIONS
  for encoder in (ENCODERS if fusion in TRANSFORMERS else ('causal', 'window'))
)
SEEDS = st.integers(0, 2**32 - 1)


@functools.cache
def make(fusion, encoder='causal'):
  """A fusion, parameters without a zero, and its compiled call."""
  fields = {'num_layers': 2, 'width': WIDTH, 'num_heads': 2}
  config = encoder_lib.EncoderConfig(**fields, **ENCODERS[encoder])
  module = fusion_lib.FUSIONS[fusion](config)
  example = inputs(np.random.default_rng(0))
  # Compiling `init` for the shapes alone would take longer than the tests.
  shapes = jax.eval_shape(module.init, jax.random.key(0), *example)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype),
    shapes.get('params', {}),
  )
  return module, params, jax.jit(module.apply)


def inputs(rng, *, shared=False):
  """Random ragged rows, one of them empty, one full."""
  length = rng.permutation([0, rng.integers(1, EVENTS), EVENTS])
  length = length.astype(np.int32)
  shape = (ROWS, CANDIDATES)
  visible = np.broadcast_to(length[:, None], shape)
  if not shared:
    visible = rng.integers(0, length[:, None] + 1, shape, dtype=np.int32)
  return (
    rng.normal(size=(ROWS, EVENTS, WIDTH)).astype(np.float32),
    rng.normal(size=(*shape, WIDTH)).astype(np.float32),
    length,
    visible,
  )


class KernelsTest(parameterized.TestCase):
  """Histories read as on a GPU, by what the kernels mean."""

  @parameterized.parameters(
    ('append_cross', 'causal', False),
    ('append_cross', 'causal', True),
    ('append_cross', 'window', True),
    ('append_cross', 'bidirectional', False),
    ('cross_only', 'causal', False),
    ('cross_only', 'causal', True),
    ('cross_only', 'window', False),
  )
  def test_encode_and_score(self, fusion, encoder, paged):
    module, params, _ = make(fusion, encoder)
    rng = np.random.default_rng(0)
    *tokens, length, visible = inputs(rng, shared=encoder == 'bidirectional')
    history, candidates = tokens
    used = []

    def as_kernels(name):
      meaning = getattr(ops, name)

      def call(*args, implementation, **options):
        assert implementation == 'pallas_gpu'
        used.append(name)
        return meaning(*args, implementation='reference', **options)

      return mock.patch.object(ops, name, call)

    into = None
    if paged:  # A page is of two events.
      index = rng.permutation(20)[: ROWS * EVENTS // 2].astype(np.int32)
      pool = jnp.full((2, 20, 2, 2, WIDTH // 2), -7.0)
      into = (Paged(pool, index.reshape(ROWS, -1)),) * 2

    def run(variables, **options):
      if not paged:
        of_all = history, length, candidates, visible
        return module.apply(variables, *of_all, method='encode_and_score')
      cache = module.apply(
        variables, history, length, **options, method='encode'
      )
      return *cache, module.apply(
        variables, *cache, length, candidates, visible, method='score'
      )

    packed = {'tower': module.pack(params, jnp.float32)}
    with (
      as_kernels('read_histories'),
      as_kernels('keys_values'),
      ops.target_platform('cuda', compute_capability='9.0'),
    ):
      *found, fused = jax.jit(run)({'params': params, **packed}, into=into)
    *wanted, expected = jax.jit(run)({'params': params})
    self.assertNotEmpty(used)
    np.testing.assert_allclose(fused, expected, **TOLERANCE)
    real = np.arange(EVENTS)[None] < length[:, None]
    for x, y in zip(found, wanted, strict=True):
      # Where events do not attend no kernel writes pages.
      self.assertEqual(isinstance(x, Paged), paged and fusion != 'cross_only')
      x, y = np.asarray(dense(x)), np.asarray(y)
      np.testing.assert_allclose(x[:, real], y[:, real], **TOLERANCE)


class FusionTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  @support.examples(5)
  @given(seed=SEEDS)
  def test_equals_the_float64_oracle(self, fusion, encoder, seed):
    module, params, apply = make(fusion, encoder)
    history, candidates, length, visible = inputs(
      np.random.default_rng(seed), shared=not module.config.causal
    )
    found = jax.device_get(
      apply({'params': params}, history, candidates, length, visible)
    )
    for b in range(ROWS):
      tokens = list(history[b, : length[b]].astype(np.float64))
      for c in range(CANDIDATES):
        expected = oracle.readout(
          params,
          fusion,
          module.config,
          tokens,
          candidates[b, c].astype(np.float64),
          int(visible[b, c]),
        )
        np.testing.assert_allclose(found[b, c], expected, **TOLERANCE)

  @parameterized.parameters(*fusion_lib.FUSIONS)
  def test_visible_none_is_the_whole_history(self, fusion):
    _, params, apply = make(fusion)
    *arrays, visible = inputs(np.random.default_rng(1), shared=True)
    np.testing.assert_allclose(
      apply({'params': params}, *arrays, None),
      apply({'params': params}, *arrays, visible),
      **TOLERANCE,
    )

  @parameterized.parameters(*fusion_lib.FUSIONS)
  def test_streaming_gradients_are_the_sum_of_pointwise_ones(self, fusion):
    module, params, _ = make(fusion, 'window')
    history, candidates, length, visible = inputs(np.random.default_rng(2))
    weight = np.random.default_rng(3).normal(size=candidates.shape)
    weight = weight.astype(np.float32)

    def loss(params, arrays, weight):
      return (weight * module.apply({'params': params}, *arrays)).sum()

    def alone(x):
      return x.reshape(ROWS * CANDIDATES, 1, *x.shape[2:])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))
    found, by_token = gradient(
      params, (history, candidates, length, visible), weight
    )
    expected, expected_by_token = gradient(
      params,
      (
        history.repeat(CANDIDATES, axis=0),
        alone(candidates),
        visible.reshape(-1),  # Cut to what the candidate sees.
        None,
      ),
      alone(weight),
    )
    # Sums of a dozen rows' gradients in another order.
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(
      by_token[0],
      expected_by_token[0].reshape(ROWS, CANDIDATES, EVENTS, WIDTH).sum(1),
      rtol=1e-4,
      atol=5e-5,
    )
    if params:
      self.assertGreater(support.norm(expected), 0.1)

  @parameterized.parameters(*fusion_lib.FUSIONS)
  def test_padding_may_hold_anything(self, fusion):
    _, params, apply = make(fusion)
    history, candidates, length, visible = inputs(np.random.default_rng(4))
    junk = np.where(
      (np.arange(EVENTS)[None] < length[:, None])[..., None], history, np.nan
    )
    np.testing.assert_allclose(
      apply({'params': params}, junk, candidates, length, visible),
      apply({'params': params}, history, candidates, length, visible),
      **TOLERANCE,
    )

  @parameterized.parameters(*TRANSFORMERS, 'target_attention')
  def test_candidates_do_not_see_each_other(self, fusion):
    _, params, apply = make(fusion)
    history, candidates, *rest = inputs(np.random.default_rng(5), shared=True)
    before = apply({'params': params}, history, candidates, *rest)
    # A copy: what is computed may still read the array that it was given.
    turned = candidates.copy()
    turned[:, 1] *= -1
    after = apply({'params': params}, history, turned, *rest)
    changed = np.abs(after - before).max(axis=(0, 2))
    self.assertGreater(changed[1], 1e-2)
    np.testing.assert_array_equal(np.delete(changed, 1), 0)

  @parameterized.parameters('append_isolated', 'target_attention', 'mean_pool')
  def test_bfloat16_of_what_is_not_in_the_operations(self, fusion):
    module, params, apply = make(fusion)
    half = fusion_lib.FUSIONS[fusion](module.config, jnp.bfloat16)
    history, candidates, *rest = inputs(np.random.default_rng(6))
    found = jax.jit(half.apply)(
      {'params': params},
      history.astype(jnp.bfloat16),
      candidates.astype(jnp.bfloat16),
      *rest,
    )
    self.assertEqual(found.dtype, jnp.bfloat16)
    # 8 bits of mantissa, about 20 roundings deep.
    np.testing.assert_allclose(
      found.astype(np.float32),
      apply({'params': params}, history, candidates, *rest),
      rtol=0.1,
      atol=0.1,
    )

  def test_only_a_shared_history_is_amortizable(self):
    self.assertEqual(
      fusion_lib.amortizable(),
      ('append_cross', 'append_isolated', 'cross_only'),
    )
    for fusion in fusion_lib.FUSIONS.values():
      self.assertEqual(fusion.amortizable, hasattr(fusion, 'encode'))
      self.assertEqual(fusion.amortizable, not fusion.obstacle)
