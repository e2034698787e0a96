"""Every backend against the float64 oracle, and what a score depends on."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops
from histjax.ops import dispatch
from histjax.ops.candidate_tower import api, pallas_gpu
from histjax.ops.history_attention import xla as attention
from tests import marks, support
from tests.ops.candidate_tower import suite

SEEDS = st.integers(0, 2**32 - 1)
# B, C, L, N, H: odd sizes, one of everything, more keys than a block.
SHAPES = ((3, 7, 9, 2, 8), (1, 1, 1, 1, 2), (2, 13, 5, 4, 4))
IMPLEMENTATIONS = ('reference', 'xla')
KERNELS = {
  'pallas_gpu': 'bfloat16',
  'pallas_tpu': 'bfloat16',
  'numba_cpu': 'float32',
}
IN_FLOAT32 = IMPLEMENTATIONS
if jax.default_backend() == 'cpu':
  IN_FLOAT32 += ('numba_cpu',)


class BackendTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # GPUs and TPUs round float32 factors unless told not to.
    self.enter_context(jax.default_matmul_precision('highest'))

  @parameterized.product(
    implementation=IN_FLOAT32,
    shape=SHAPES,
    structure=('any', 'prefix'),
    ragged=(False, True),
  )
  @support.examples(4)
  @given(seed=SEEDS)
  def test_equals_the_oracle(
    self, implementation, shape, structure, ragged, seed
  ):
    call = suite.make_call(seed, shape, structure=structure, ragged=ragged)
    suite.assert_equals_oracle(lambda c: suite.run(c, implementation), call)

  @parameterized.product(
    implementation=IMPLEMENTATIONS, dtype=('float32', 'float16', 'bfloat16')
  )
  @support.examples(4)
  @given(seed=SEEDS)
  def test_types(self, implementation, dtype, seed):
    call = suite.make_call(
      seed, (2, 5, 12, 2, 16), dtype=dtype, num_layers=3, mlp_width=40
    )
    suite.assert_equals_oracle(lambda c: suite.run(c, implementation), call)

  @parameterized.product(implementation=IN_FLOAT32)
  def test_without_rotation(self, implementation):
    call = suite.make_call(0, (2, 3, 5, 2, 3), rotate=False)
    suite.assert_equals_oracle(lambda c: suite.run(c, implementation), call)

  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    dtype=('float32', 'bfloat16'),
    ragged=(False, True),
  )
  @support.examples(4)
  @given(seed=SEEDS)
  def test_residual_stream(self, implementation, dtype, ragged, seed):
    call = suite.make_call(
      seed, SHAPES[0], dtype=dtype, ragged=ragged, residual=True
    )
    suite.assert_equals_oracle(lambda c: suite.run(c, implementation), call)

  @parameterized.product(
    implementation=IN_FLOAT32, way=('sliced', 'alone', 'of all')
  )
  def test_layer_by_layer(self, implementation, way):
    dtype = 'float32' if implementation in KERNELS else 'bfloat16'
    call = suite.make_call(0, SHAPES[0], num_layers=3, dtype=dtype)
    found = suite.layer_by_layer(
      call, way, lambda c: suite.run(c, implementation)
    )
    suite.assert_same(found, suite.run(call, implementation), call)

  @parameterized.product(
    implementation=IN_FLOAT32,
    structure=('any', 'prefix'),
    layer=(None, 1),
  )
  def test_pages(self, implementation, structure, layer):
    call = suite.make_call(
      0, (3, 5, 21, 2, 8), structure=structure, ragged=True
    )
    found = suite.run(
      suite.paged(call, page=8).replace(layer=layer), implementation
    )
    wanted = suite.run(call.replace(layer=layer), implementation)
    suite.assert_same(found, wanted, call)  # L, that of all pages, is longer.

  @parameterized.product(implementation=IN_FLOAT32)
  def test_many_keys_in_blocks(self, implementation):
    call = suite.make_call(0, (1, 150, 700, 4, 4), num_layers=1)
    suite.assert_equals_oracle(lambda c: suite.run(c, implementation), call)

  @parameterized.product(
    implementation=IN_FLOAT32,
    structure=('any', 'prefix'),
    poison=(np.nan, np.inf),
  )
  @support.examples(5)
  @given(seed=SEEDS)
  def test_keys_that_nobody_sees_may_be_anything(
    self, implementation, structure, poison, seed
  ):
    call = suite.make_call(seed, SHAPES[0], structure=structure, ragged=True)
    np.testing.assert_array_equal(
      suite.run(suite.poisoned(call, poison), implementation),
      suite.run(call, implementation),
    )

  @parameterized.product(implementation=IN_FLOAT32)
  def test_no_keys_at_all(self, implementation):
    call = suite.make_call(0, (2, 3, 0, 2, 8))
    suite.assert_equals_oracle(lambda c: suite.run(c, implementation), call)

  @parameterized.product(implementation=IMPLEMENTATIONS)
  def test_runs_give_equal_bits(self, implementation):
    call = suite.make_call(0, (2, 13, 33, 2, 8), dtype='bfloat16')
    np.testing.assert_array_equal(
      suite.run(call, implementation), suite.run(call, implementation)
    )


class KernelTest(parameterized.TestCase):
  """The kernels where their hardware is; elsewhere, that they say so."""

  @marks.slow_unless(
    lambda ragged, rotate, residual, **fields: rotate and ragged != residual
  )
  @parameterized.product(
    implementation=tuple(KERNELS),
    # Odd sizes over several tiles of candidates and blocks of keys.
    shape=(
      (3, 203, 333, 4, 32),
      (2, 130, 77, 4, 64),
      (2, 70, 70, 2, 64),
      (1, 1, 1, 4, 32),
    ),
    structure=('any', 'prefix'),
    ragged=(False, True),
    rotate=(False, True),
    residual=(False, True),
  )
  def test_equals_the_oracle(self, implementation, shape, **fields):
    dtype = KERNELS[implementation]
    call = suite.make_call(0, shape, num_layers=3, dtype=dtype, **fields)
    call = suite.poisoned(call, np.nan)
    try:
      api._BACKENDS[implementation].check_target(dispatch.target_of())
    except NotImplementedError:
      with self.assertRaisesRegex(NotImplementedError, implementation):
        suite.run(call, implementation)
      return
    suite.assert_equals_oracle(lambda c: suite.run(c, implementation), call)
    np.testing.assert_array_equal(
      suite.run(call, implementation), suite.run(call, implementation)
    )

  @marks.slow_unless(
    lambda shape, rotate, residual, **fields: (
      shape[3] * shape[4] < 512 or (rotate and not residual)
    )
  )
  @parameterized.product(
    shape=(
      (3, 205, 331, 4, 64),
      (2, 131, 79, 8, 32),
      (1, 2, 1, 4, 64),
      (3, 205, 331, 8, 64),
      (2, 131, 79, 4, 128),
      (1, 2, 1, 12, 64),
    ),
    structure=('any', 'prefix'),
    ragged=(False, True),
    rotate=(False, True),
    residual=(False, True),
  )
  def test_in_layers(self, shape, **fields):
    """What 'pallas_gpu' does with many or wide candidates, here with few."""
    layers = shape[3] * shape[4] == 256
    self.check_config('layers' if layers else 'products', shape, **fields)

  @parameterized.product(
    shape=((3, 205, 331, 8, 64), (2, 131, 79, 4, 32)),
    way=('alone', 'of all'),
  )
  def test_layer_by_layer(self, shape, way):
    call = suite.make_call(
      0, shape, num_layers=3, dtype='bfloat16', ragged=True
    )
    try:
      api._BACKENDS['pallas_gpu'].check_target(dispatch.target_of())
    except NotImplementedError:
      with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu'):
        suite.run(call.replace(layer=1), 'pallas_gpu')
      return
    suite.assert_equals_oracle(
      lambda call: suite.layer_by_layer(
        call, way, lambda c: suite.run(c, 'pallas_gpu')
      ),
      call,
    )

  @parameterized.product(
    shape=((3, 205, 331, 8, 64), (2, 131, 79, 4, 128)),
    structure=('any', 'prefix'),
    page=(8, 16, 64),
  )
  def test_pages(self, shape, page, **fields):
    """'pallas_gpu' reads these where they are."""
    call = suite.make_call(
      0, shape, num_layers=2, dtype='bfloat16', ragged=True, **fields
    )
    call = suite.poisoned(call, np.nan)
    paged = suite.paged(call, page=page)
    try:
      api._BACKENDS['pallas_gpu'].check_target(dispatch.target_of())
    except NotImplementedError:
      with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu'):
        suite.run(paged, 'pallas_gpu')
      return
    np.testing.assert_array_equal(
      suite.run(paged, 'pallas_gpu'), suite.run(call, 'pallas_gpu')
    )

  @marks.slow_unless(
    lambda ragged, rotate, residual, **fields: rotate and ragged != residual
  )
  @parameterized.product(
    shape=((3, 203, 333, 4, 16), (2, 131, 79, 2, 32), (1, 2, 1, 4, 16)),
    structure=('any', 'prefix'),
    ragged=(False, True),
    rotate=(False, True),
    residual=(False, True),
    rows=(1, 20, 60, 300),  # Each is cut in another way.
  )
  def test_narrow(self, shape, rows, **fields):
    config = pallas_gpu.default_config(rows, 70, 64, 256, num_heads=shape[3])
    self.check_config(config, shape, **fields)

  def check_config(self, config, shape, **fields):
    """'pallas_gpu' cut in that way."""
    call = suite.make_call(0, shape, num_layers=3, dtype='bfloat16', **fields)
    call = suite.poisoned(call, np.nan)

    def run(call):
      out = pallas_gpu.candidate_tower(
        *jax.tree.map(jnp.asarray, call.positional),
        num_heads=call.num_heads,
        count=None if call.count is None else jnp.asarray(call.count),
        final_norm=call.final_norm,
        config=config,
      )
      return np.asarray(out)

    try:
      api._BACKENDS['pallas_gpu'].check_target(dispatch.target_of())
    except NotImplementedError:
      with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu'):
        suite.run(call, 'pallas_gpu')
      return
    suite.assert_equals_oracle(run, call)
    np.testing.assert_array_equal(run(call), run(call))


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters((4096, 128), (128, 4096), (2048, 2048))
  @mock.patch.object(attention, '_ACCELERATOR_SCORES', attention._CPU_SCORES)
  def test_xla_is_linear(self, num_candidates, num_keys):
    def temporary(factor):
      shape = (1, factor * num_candidates, factor * num_keys, 2, 8)
      call = jax.eval_shape(
        lambda: suite.make_call(0, shape, num_layers=1).positional
      )
      run = functools.partial(
        ops.candidate_tower, num_heads=2, implementation='xla'
      )
      program = jax.jit(run).lower(*call).compile()
      return program.memory_analysis().temp_size_in_bytes

    # A block of scores, which does not grow, makes it less than double.
    self.assertLess(temporary(2), 2.1 * temporary(1))


class InvarianceTest(parameterized.TestCase):
  """A candidate's result is a function of itself and its row's history."""

  def setUp(self):
    super().setUp()
    # As above: a product's algorithm, and so its rounding, depends on its size.
    self.enter_context(jax.default_matmul_precision('highest'))

  @parameterized.product(
    implementation=IMPLEMENTATIONS, dtype=('float32', 'bfloat16')
  )
  @support.examples(4)
  @given(seed=SEEDS)
  def test_number_order_and_neighbours(self, implementation, dtype, seed):
    call = suite.make_call(seed, (3, 7, 9, 2, 8), dtype=dtype)
    expected = suite.run(call, implementation)
    rng = np.random.default_rng(seed)
    order = rng.permutation(7)
    for index in (order, order[:1], np.concatenate([order, order])):
      found = suite.run(call.candidates_at(index), implementation)
      suite.assert_same(found, expected[:, index], call)
    order = rng.permutation(3)
    for index in (order, order[:1]):
      found = suite.run(call.rows_at(index), implementation)
      suite.assert_same(found, expected[index], call)

  @parameterized.product(implementation=IN_FLOAT32)
  @support.examples(4)
  @given(seed=SEEDS)
  def test_count_cuts(self, implementation, seed):
    call = suite.make_call(seed, SHAPES[0], ragged=True)
    whole = suite.run(call.replace(count=None), implementation)
    suite.assert_same(
      suite.run(call, implementation),
      np.where(call.counts[..., None], whole, 0),
      call,
    )

  @parameterized.product(implementation=IN_FLOAT32)
  def test_vmap(self, implementation):
    calls = [suite.make_call(seed, SHAPES[0]) for seed in range(2)]
    stacked = jax.tree.map(
      lambda *x: np.stack(x), *(c.positional for c in calls)
    )
    found = jax.vmap(
      lambda *args: ops.candidate_tower(
        *args, num_heads=2, implementation=implementation
      )
    )(*stacked)
    for call, out in zip(calls, found, strict=True):
      suite.assert_same(out, suite.run(call, implementation), call)


if __name__ == '__main__':
  absltest.main()
