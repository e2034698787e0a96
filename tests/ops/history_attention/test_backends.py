"""What every backend must do; on a GPU, run this file there, with -m ''."""

import functools

import hypothesis
import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from jax.test_util import check_grads

from histjax import ops
from tests import marks
from tests.ops.history_attention import suite

# (B, Q, L, N, H)
SHAPES = (
  (1, 1, 1, 1, 8),
  (2, 1, 5, 2, 8),
  (3, 7, 1, 2, 8),
  (2, 13, 11, 3, 8),
  (1, 33, 70, 2, 16),
  (2, 300, 410, 2, 8),  # Several blocks.
  # A GPU's kernels divide the work by head dimension, keys and queries.
  (1, 270, 330, 1, 64),
  (1, 270, 330, 1, 128),
  (1, 70, 60, 1, 128),
  (1, 70, 100, 1, 128),
  (2, 130, 70, 33, 64),
  (2, 130, 70, 33, 128),
)
ODD_HEAD_DIM = (2, 9, 6, 1, 5)
SMALL = (3, 12, 9, 2, 8)
BIG = 1e30

every_backend = parameterized.parameters(*suite.IMPLEMENTATIONS)
every_call = parameterized.product(
  implementation=suite.IMPLEMENTATIONS,
  structure=suite.STRUCTURES,
  dtype=('float32', 'bfloat16'),
)


def dtype_for(implementation: str) -> str:
  """Some are 16-bit only; float32 shows the others' mistakes best."""
  narrow = implementation in ('cudnn', 'pallas_gpu')
  return 'bfloat16' if narrow else 'float32'


class OracleTest(suite.BackendTestCase):
  """Outputs and gradients against float64 loops over the visible keys."""

  def check(self, call, implementation, scale=None):
    if not self.runs(call, implementation):
      return
    dtype = str(call.query.dtype)
    out, gradients = suite.attend_with_gradients(call, implementation, scale)
    expected, expected_gradients = suite.oracle(call, scale)
    self.assert_close(out, expected, dtype)
    self.assert_close(gradients, expected_gradients, dtype, gradient=True)

  @marks.slow_unless(lambda implementation, structure, shape: shape[3] < 33)
  @parameterized.product(
    implementation=suite.IMPLEMENTATIONS,
    structure=suite.STRUCTURES,
    shape=(*SHAPES, ODD_HEAD_DIM),
  )
  def test_shapes(self, implementation, structure, shape):
    call = suite.make_call(1, shape, structure, dtype_for(implementation))
    self.check(call, implementation)

  @parameterized.product(
    implementation=suite.IMPLEMENTATIONS,
    structure=suite.STRUCTURES,
    dtype=tuple(suite.TOLERANCE),
  )
  def test_dtypes(self, implementation, structure, dtype):
    with suite.double_precision(dtype):
      call = suite.make_call(2, SMALL, structure, dtype)
      self.check(call, implementation)

  @every_backend
  def test_random_ranges(self, implementation):
    num_rows, num_queries, num_keys, _, _ = SMALL
    ranges = suite.ranges(num_rows, num_queries, num_keys)

    @hypothesis.given(start=ranges, stop=ranges, seed=st.integers(0, 1 << 20))
    def check(start, stop, seed):
      call = suite.make_call(seed, SMALL, dtype=dtype_for(implementation))
      self.check(call.replace(start=start, stop=stop), implementation)

    check()

  @parameterized.product(
    implementation=suite.IMPLEMENTATIONS, structure=('prefix', 'causal')
  )
  def test_random_lengths(self, implementation, structure):
    num_rows, num_queries, num_keys, _, _ = SMALL
    lengths = st.lists(
      st.integers(0, num_keys), min_size=num_rows, max_size=num_rows
    )

    @hypothesis.given(length=lengths, seed=st.integers(0, 1 << 20))
    def check(length, seed):
      start, stop = suite.structured(length, num_queries, num_keys, structure)
      call = suite.make_call(seed, SMALL, structure, dtype_for(implementation))
      self.check(call.replace(start=start, stop=stop), implementation)

    check()

  @every_backend
  def test_scale(self, implementation):
    call = suite.make_call(3, SMALL, 'causal', 'bfloat16')
    self.check(call, implementation, scale=0.7)

  @parameterized.parameters('reference', 'xla')
  def test_negative_scale(self, implementation):
    call = suite.make_call(3, SMALL, 'prefix')
    large = call.replace(query=20 * call.query)
    self.assert_close(
      suite.attend(large, implementation, scale=-1.0),
      suite.oracle(large, -1.0)[0],
      'float32',
    )

  @parameterized.parameters('reference', 'xla')
  def test_gradients_are_the_derivatives(self, implementation):
    with suite.double_precision('float64'):
      call = suite.make_call(4, (2, 5, 7, 1, 3), dtype='float64')
      attend = functools.partial(
        ops.history_attention,
        key_range=call.key_range,
        implementation=implementation,
      )
      check_grads(
        jax.jit(attend),
        (call.query, call.key, call.value),
        order=1,
        modes=('rev',),
        rtol=1e-6,
        atol=1e-6,
      )


class JaxTest(suite.BackendTestCase):
  """Against jax.nn, where it means the same: no range may be empty."""

  @every_backend
  def test_any(self, implementation):
    call = suite.make_call(5, SMALL, 'any', dtype_for(implementation))
    start = np.clip(call.start, 0, SMALL[2] - 1)
    call = call.replace(start=start, stop=np.maximum(call.stop, start + 1))
    index = np.arange(SMALL[2])[None, None, None, :]
    mask = (call.start[:, None, :, None] <= index) & (
      index < call.stop[:, None, :, None]
    )
    self.check(call, implementation, mask=mask)

  @parameterized.product(
    implementation=suite.IMPLEMENTATIONS,
    structure=('prefix', 'causal'),
    num_queries=(4, 9, 12),
  )
  def test_structures(self, implementation, structure, num_queries):
    num_keys = 9
    dtype = dtype_for(implementation)
    call = suite.make_call(6, (3, num_queries, num_keys, 2, 8), dtype=dtype)
    length = np.array([1, 9, 4], np.int32)
    start, stop = suite.structured(length, num_queries, num_keys, structure)
    self.check(
      call.replace(start=start, stop=stop, structure=structure),
      implementation,
      key_value_seq_lengths=length,
      is_causal=structure == 'causal',
    )

  def check(self, call, implementation, **kwargs):
    if not self.runs(call, implementation):
      return

    @jax.jit
    def attend(query, key, value, cotangent):
      out, pull = jax.vjp(
        lambda *x: jax.nn.dot_product_attention(*x, **kwargs),
        query,
        key,
        value,
      )
      return out, pull(cotangent)

    expected, expected_gradients = attend(
      call.query, call.key, call.value, call.cotangent
    )
    out, gradients = suite.attend_with_gradients(call, implementation)
    dtype = str(call.query.dtype)
    self.assert_close(out, expected, dtype)
    self.assert_close(gradients, expected_gradients, dtype, gradient=True)


class VisibilityTest(suite.BackendTestCase):
  """What a query does not see cannot matter."""

  @every_call
  def test_empty_ranges_give_exact_zeros(
    self, implementation, structure, dtype
  ):
    call = suite.make_call(7, SMALL, structure, dtype)
    empty = np.zeros_like(call.stop)
    if structure == 'any':  # Every way to be empty.
      start = np.full_like(empty, 4)
      start[:, 1], empty[:, 1] = 9, 9
      start[:, 2], empty[:, 2] = 12, 15
      start[:, 3], empty[:, 3] = -7, -5
      call = call.replace(start=start)
    call = call.replace(stop=empty)
    if not self.runs(call, implementation):
      return
    out, gradients = suite.attend_with_gradients(call, implementation)
    for x in (out, *gradients):
      np.testing.assert_array_equal(np.asarray(x, np.float32), 0)

  @every_call
  def test_an_empty_row_beside_full_ones(
    self, implementation, structure, dtype
  ):
    call = suite.make_call(8, SMALL, structure, dtype)

    def clear(stop):
      stop[1] = 0

    call = call.edit(stop=clear)
    if not self.runs(call, implementation):
      return
    out, gradients = suite.attend_with_gradients(call, implementation)
    for x in (out, *gradients):
      x = np.asarray(x, np.float32)
      np.testing.assert_array_equal(x[1], 0)
      self.assertTrue(np.isfinite(x).all())

  @every_call
  def test_ranges_are_cut_to_the_keys(self, implementation, structure, dtype):
    call = suite.make_call(9, SMALL, structure, dtype)
    num_keys = SMALL[2]

    def far(stop):
      if structure == 'causal':
        stop[:, num_keys:] += 100 * (stop[:, num_keys:] == num_keys)
      else:
        stop += 100 * (stop == num_keys)

    beyond = call.edit(stop=far)
    if structure == 'any':
      beyond = beyond.replace(start=call.start - 100 * (call.start <= 0))
    if not self.runs(call, implementation):
      return
    np.testing.assert_array_equal(
      suite.attend(beyond, implementation), suite.attend(call, implementation)
    )

  @every_call
  def test_rows_are_independent(self, implementation, structure, dtype):
    call = suite.make_call(10, SMALL, structure, dtype)
    other = suite.make_call(11, SMALL, structure, dtype)
    fields = {
      name: np.concatenate([getattr(call, name)[:1], getattr(other, name)[1:]])
      for name in ('query', 'key', 'value', 'cotangent', 'start', 'stop')
    }
    if not self.runs(call, implementation):
      return
    first, second = (
      jax.tree.map(
        lambda x: x[:1], suite.attend_with_gradients(c, implementation)
      )
      for c in (call, call.replace(**fields))
    )
    self.assert_same(first, second, implementation)

  @every_call
  def test_huge_padding_changes_nothing(self, implementation, structure, dtype):
    call, pad = self.padded_call(structure, dtype)
    huge = call.edit(
      key=lambda x: x.__setitem__(pad, BIG),
      value=lambda x: x.__setitem__(pad, -BIG),
    )
    self.check_same(call, huge, implementation)

  @parameterized.product(
    implementation=('reference', 'xla'),
    structure=suite.STRUCTURES,
    junk=(np.nan, np.inf),
  )
  def test_padding_may_be_nan(self, implementation, structure, junk):
    call, pad = self.padded_call(structure, 'float32')
    poisoned = call.edit(
      key=lambda x: x.__setitem__(pad, junk),
      value=lambda x: x.__setitem__(pad, junk),
    )
    self.check_same(call, poisoned, implementation)

  @parameterized.product(
    implementation=('reference', 'xla'), dtype=('float32', 'bfloat16')
  )
  def test_huge_values_that_only_others_see(self, implementation, dtype):
    call = suite.make_call(12, SMALL, dtype=dtype)
    start = np.zeros_like(call.start)
    stop = np.full_like(call.stop, 5)
    start[:, 0], stop[:, 0] = 5, 9
    call = call.replace(start=start, stop=stop)
    call = call.edit(cotangent=lambda x: x[:, 0].fill(0))
    huge = call.edit(value=lambda x: x[:, 5:].fill(3e38))
    before, (before_query, _, before_value) = suite.attend_with_gradients(
      call, implementation
    )
    after, (after_query, _, after_value) = suite.attend_with_gradients(
      huge, implementation
    )
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    np.testing.assert_array_equal(before_query[:, 1:], after_query[:, 1:])
    np.testing.assert_array_equal(before_value[:, :5], after_value[:, :5])

  def padded_call(self, structure, dtype):
    """A call that sees no key from the sixth on, and the index of those."""
    call = suite.make_call(13, SMALL, structure, dtype)
    call = call.replace(stop=np.minimum(call.stop, 5))
    return call, np.s_[:, 5:]

  def check_same(self, call, other, implementation):
    if not self.runs(call, implementation):
      return
    expected = suite.attend_with_gradients(call, implementation)
    actual = suite.attend_with_gradients(other, implementation)
    self.assert_same(actual, expected, implementation)
    for x in jax.tree.leaves(actual):
      self.assertTrue(np.isfinite(np.asarray(x, np.float32)).all())


class TransformationTest(suite.BackendTestCase):
  """jit is in every test above."""

  def call(self, seed=14, shape=SMALL):
    return suite.make_call(seed, shape, 'causal', 'bfloat16')

  @every_backend
  def test_without_jit(self, implementation):
    call = self.call()
    if not self.runs(call, implementation):
      return
    out = ops.history_attention(
      call.query,
      call.key,
      call.value,
      call.key_range,
      implementation=implementation,
    )
    self.assert_close(out, suite.attend(call, implementation), 'bfloat16')

  @every_backend
  def test_vmap(self, implementation):
    calls = [self.call(seed) for seed in (15, 16)]
    if not self.runs(calls[0], implementation):
      return
    stacked = suite.Call(
      *(
        np.stack([getattr(c, name) for c in calls])
        for name in ('query', 'key', 'value', 'cotangent', 'start', 'stop')
      ),
      calls[0].structure,
    )
    run = functools.partial(suite.gradients, implementation=implementation)
    mapped = jax.jit(jax.vmap(run))(
      stacked.query,
      stacked.key,
      stacked.value,
      stacked.cotangent,
      stacked.key_range,
    )
    for i, call in enumerate(calls):
      out, expected = suite.oracle(call)
      self.assert_close(mapped[0][i], out, 'bfloat16')
      self.assert_close(
        [x[i] for x in mapped[1]], expected, 'bfloat16', gradient=True
      )

  @every_backend
  def test_checkpoint(self, implementation):
    call = self.call(17)
    if not self.runs(call, implementation):
      return
    run = functools.partial(
      suite.gradients, implementation=implementation, wrap=jax.checkpoint
    )
    out, actual = jax.jit(run)(
      call.query, call.key, call.value, call.cotangent, call.key_range
    )
    expected_out, expected = suite.oracle(call)
    self.assert_close(out, expected_out, 'bfloat16')
    self.assert_close(actual, expected, 'bfloat16', gradient=True)

  @every_backend
  def test_rows_over_devices(self, implementation):
    num_devices = jax.device_count()
    call = self.call(18, (2 * num_devices, *SMALL[1:]))
    if not self.runs(call, implementation):
      return
    mesh = jax.make_mesh(
      (num_devices,), ('rows',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    rows = jax.NamedSharding(mesh, jax.P('rows'))
    arguments = jax.device_put(
      (call.query, call.key, call.value, call.cotangent, call.key_range), rows
    )
    run = jax.jit(
      functools.partial(suite.gradients, implementation=implementation)
    )
    program = run.lower(*arguments).compile()
    out, actual = program(*arguments)
    self.assertTrue(out.sharding.is_equivalent_to(rows, out.ndim))
    self.assertNotIn('all-gather', program.as_text())
    expected_out, expected = suite.oracle(call)
    self.assert_close(out, expected_out, 'bfloat16')
    self.assert_close(actual, expected, 'bfloat16', gradient=True)


if __name__ == '__main__':
  absltest.main()
