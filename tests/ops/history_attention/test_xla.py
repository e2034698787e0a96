"""Blocks of the XLA backend: right, skipped where unseen, small in memory."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax.ops.history_attention import xla
from histjax.types import KeyRange
from tests.ops.history_attention import suite

SHAPE = (2, 37, 50, 2, 4)  # Odd: the last blocks are partly padding.


def windows(num_rows, num_queries, num_keys, window):
  """Causal ranges with a window."""
  stop = np.minimum(np.arange(1, num_queries + 1, dtype=np.int32), num_keys)
  stop = np.broadcast_to(stop, (num_rows, num_queries))
  return np.maximum(stop - window, 0), stop


class BlocksTest(suite.BackendTestCase):
  def run_blocks(self, call, blocks, wrap=lambda f: f, sharding=None):
    """The output and gradients with given blocks, compiled anew."""
    arguments = jax.device_put(
      (call.query, call.key, call.value, call.cotangent, call.key_range),
      sharding,
    )

    def function(*arguments):
      return suite.gradients(*arguments, implementation='xla')

    with mock.patch.object(xla, 'block_sizes', return_value=blocks):
      return jax.jit(wrap(function))(*arguments)

  @parameterized.product(
    structure=suite.STRUCTURES,
    blocks=(
      xla.Blocks(37, 50),
      xla.Blocks(8, 16),
      xla.Blocks(16, 50),
      xla.Blocks(37, 8),
    ),
  )
  def test_blocks_do_not_matter(self, structure, blocks):
    call = suite.make_call(1, SHAPE, structure)
    out, gradients = self.run_blocks(call, blocks)
    expected, expected_gradients = suite.oracle(call)
    self.assert_close(out, expected, 'float32')
    self.assert_close(gradients, expected_gradients, 'float32', gradient=True)

  @parameterized.parameters(*suite.STRUCTURES)
  def test_masked_keys_do_not_count_where_scores_are_low(self, structure):
    call = suite.make_call(6, SHAPE, structure)
    # Exact in float32; exp(score) is zero, were any masked score the largest.
    low = np.float32([-32, 1, 0, 0])
    query = np.broadcast_to(low, call.query.shape)
    key = np.abs(np.round(call.key))
    key[..., 0] = 32
    call = call.replace(query=query, key=key)
    for blocks in (xla.Blocks(37, 50), xla.Blocks(8, 16)):
      out, gradients = self.run_blocks(call, blocks)
      expected, expected_gradients = suite.oracle(call)
      self.assert_close(out, expected, 'float32')
      self.assert_close(
        gradients[2], expected_gradients[2], 'float32', gradient=True
      )

  def test_16_bit_blocks(self):
    call = suite.make_call(2, SHAPE, 'causal', 'bfloat16')
    out, gradients = self.run_blocks(call, xla.Blocks(8, 16))
    expected, expected_gradients = suite.oracle(call)
    self.assert_close(out, expected, 'bfloat16')
    self.assert_close(gradients, expected_gradients, 'bfloat16', gradient=True)

  def test_vmap_of_blocks(self):
    calls = [suite.make_call(seed, SHAPE) for seed in (3, 4)]
    stacked = suite.Call(
      *(
        np.stack([getattr(c, name) for c in calls])
        for name in ('query', 'key', 'value', 'cotangent', 'start', 'stop')
      ),
      'any',
    )
    out, gradients = self.run_blocks(stacked, xla.Blocks(16, 16), jax.vmap)
    for i, call in enumerate(calls):
      expected, expected_gradients = suite.oracle(call)
      self.assert_close(out[i], expected, 'float32')
      self.assert_close(
        [x[i] for x in gradients], expected_gradients, 'float32', gradient=True
      )

  @parameterized.parameters('auto', 'explicit', 'shard_map')
  def test_blocks_over_devices(self, how):
    num_devices = jax.device_count()
    call = suite.make_call(5, (2 * num_devices, *SHAPE[1:]))
    axis_types = {'explicit': jax.sharding.AxisType.Explicit}
    mesh = jax.make_mesh(
      (num_devices,),
      ('rows',),
      axis_types=(axis_types.get(how, jax.sharding.AxisType.Auto),),
    )
    rows = jax.P('rows')
    wrap = {
      'shard_map': functools.partial(
        jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows
      )
    }
    with jax.set_mesh(mesh):
      out, gradients = self.run_blocks(
        call,
        xla.Blocks(16, 16),
        wrap.get(how, lambda f: f),
        jax.NamedSharding(mesh, rows),
      )
    expected, expected_gradients = suite.oracle(call)
    self.assert_close(out, expected, 'float32')
    self.assert_close(gradients, expected_gradients, 'float32', gradient=True)

  def test_long_scores_are_split_evenly(self):
    sizes = functools.partial(xla.block_sizes, 4)
    self.assertEqual(sizes(100, 100), (100, 100))
    query, key = sizes(100_000, 100_001)
    self.assertBetween(query * key * 4, 2**16, 2**24)
    for size, block in ((100_000, query), (100_001, key)):
      padded = -(-size // block) * block
      self.assertLess(padded - size, 0.02 * size)


class SkipTest(suite.BackendTestCase):
  """Key blocks that no query of a query block sees are not read."""

  def bounds(self, start, stop, block_query, block_key, num_keys):
    start, stop = xla._clip(
      KeyRange(jnp.asarray(start), jnp.asarray(stop)), num_keys
    )
    lower, upper = xla.block_bounds(
      xla._split(start, block_query, num_keys),
      xla._split(stop, block_query, 0),
      block_key,
    )
    return list(zip(lower.tolist(), upper.tolist(), strict=True))

  def test_bounds_of_a_window(self):
    start, stop = windows(2, 12, 12, 3)
    self.assertEqual(
      self.bounds(start, stop, 4, 4, 12), [(0, 1), (0, 2), (1, 3)]
    )

  def test_bounds_are_of_all_rows(self):
    start = np.array([[0, 0], [9, 4]], np.int32)
    stop = np.array([[2, 2], [10, 5]], np.int32)
    self.assertEqual(self.bounds(start, stop, 1, 4, 12), [(0, 3), (0, 2)])

  def test_bounds_ignore_empty_ranges_and_padding(self):
    start = np.array([[11, 5, 7, 4, 0]], np.int32)
    stop = np.array([[0, 5, 8, 8, -3]], np.int32)
    bounds = self.bounds(start, stop, 2, 4, 12)
    self.assertEqual(bounds[1], (1, 2))
    for lower, upper in (bounds[0], bounds[2]):
      self.assertGreaterEqual(lower, upper)

  def test_a_window_costs_its_width(self):
    start, stop = windows(1, 4096, 4096, 64)
    bounds = self.bounds(start, stop, 128, 128, 4096)
    self.assertLessEqual(max(upper - lower for lower, upper in bounds), 2)

  def test_unseen_blocks_are_not_read(self):
    # NaN in the last key block, which only the last query block sees, would
    # reach all other queries as 0 NaN if the block were read.
    num_rows, block, num_tokens = 2, 8, 40
    call = suite.make_call(6, (num_rows, num_tokens, num_tokens, 2, 4))
    start, stop = windows(num_rows, num_tokens, num_tokens, 3)

    def last_only(x):
      x[:, -block:] = np.nan

    def no_nan(x):
      x[:, -block:] = 0

    call = call.replace(start=start, stop=stop).edit(cotangent=no_nan)
    poisoned = call.edit(key=last_only, value=last_only)

    def function(*arguments):
      return suite.gradients(*arguments, implementation='xla')

    with mock.patch.object(
      xla, 'block_sizes', return_value=xla.Blocks(block, block)
    ):
      out, (d_query, _, _) = jax.jit(function)(
        poisoned.query,
        poisoned.key,
        poisoned.value,
        poisoned.cotangent,
        poisoned.key_range,
      )
    expected, (expected_query, _, _) = suite.oracle(call)
    before = np.s_[:, :-block]
    self.assert_close(out[before], expected[before], 'float32')
    self.assert_close(
      d_query[before], expected_query[before], 'float32', gradient=True
    )
    self.assertTrue(np.isnan(out[:, -1]).all())


class MemoryTest(parameterized.TestCase):
  """Temporary memory grows as Q + L. Compiled, not run."""

  def temporary_bytes(self, num_queries, num_keys, gradients):
    query = jax.ShapeDtypeStruct((1, num_queries, 2, 16), jnp.float32)
    key = jax.ShapeDtypeStruct((1, num_keys, 2, 16), jnp.float32)
    bound = jax.ShapeDtypeStruct((1, num_queries), jnp.int32)
    run = functools.partial(suite.gradients, implementation='xla')
    if not gradients:

      def run(*x):
        return suite.gradients(*x, implementation='xla')[0]

    program = jax.jit(run).lower(
      query, key, key, query, KeyRange(bound, bound, 'any')
    )
    return program.compile().memory_analysis().temp_size_in_bytes

  @parameterized.product(
    gradients=(False, True),
    lengths=((1 << 16, 1 << 12), (1 << 12, 1 << 16), (1 << 16, 1 << 16)),
  )
  def test_linear(self, gradients, lengths):
    num_queries, num_keys = lengths
    blocks = xla.block_sizes(2, num_queries, num_keys)
    tokens = 4 * 2 * 16 * (num_queries + num_keys)  # float32 [1, Q + L, 2, 16]
    scores = 4 * 2 * blocks.query * blocks.key
    temporary = self.temporary_bytes(num_queries, num_keys, gradients)
    self.assertLess(temporary, (8 if gradients else 4) * tokens + 8 * scores)
    dense = 4 * 2 * num_queries * num_keys
    self.assertLess(temporary, dense / 4)


if __name__ == '__main__':
  absltest.main()
