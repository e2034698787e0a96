"""The TPU kernels, interpreted on the CPU with its races looked for.

That they compile for real TPUs: tests/test_tpu_compile.py.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from histjax.ops import dispatch
from histjax.ops.history_attention import api, pallas_tpu
from tests import marks
from tests.ops.history_attention import suite

# (B, Q, L, N, H): two query tiles and three key blocks of 128; the last of each
# is partly outside the arrays, where the interpreter reads NaN.
BLOCKS = (2, 150, 300, 2, 8)
SMALL = (2, 13, 9, 2, 8)


class InterpretedTestCase(suite.BackendTestCase):
  """Runs 'pallas_tpu' on the CPU in blocks of 128; fails at a race."""

  def setUp(self):
    super().setUp()
    backend = api._BACKENDS['pallas_tpu']
    everywhere = backend._replace(check_target=dispatch.any_target)
    self.enter_context(
      mock.patch.dict(api._BACKENDS, {'pallas_tpu': everywhere})
    )
    self.enter_context(mock.patch.object(pallas_tpu, '_MAX_BLOCK', 128))
    self.enter_context(self.interpreter())
    self.addCleanup(pltpu.reset_tpu_interpret_mode_state)

  def interpreter(self, num_cores=1):
    """A context; the parallel axes of the grid go in a random order."""
    return pltpu.force_tpu_interpret_mode(
      pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=num_cores, random_seed=0
      )
    )

  def run_call(self, call):
    found = suite.attend_with_gradients(call, 'pallas_tpu')
    jax.block_until_ready(found)
    self.assertFalse(interpret_pallas_call.races.races_found)
    return found

  def check(self, call):
    dtype = str(call.query.dtype)
    out, gradients = self.run_call(call)
    expected, expected_gradients = suite.oracle(call)
    self.assert_close(out, expected, dtype)
    self.assert_close(gradients, expected_gradients, dtype, gradient=True)


def joint_ranges(num_events: int, num_candidates: int, window: int):
  """Windowed causal events of rows of any length, then their candidates."""
  length = np.array([num_events, num_events // 3], np.int32)[:, None]
  stop = np.minimum(np.arange(1, num_events + 1, dtype=np.int32), length)
  stop = np.concatenate([stop, np.repeat(length, num_candidates, 1)], axis=1)
  return np.maximum(stop - window, 0), stop


class BlocksTest(InterpretedTestCase):
  """One shape, compiled once for all of these."""

  def call(self, seed=0):
    return suite.make_call(seed, BLOCKS)

  def test_any_ranges(self):
    self.check(self.call())

  def test_windows(self):
    # 140 events and 10 candidates, who see at most 40 keys each: every tile
    # and block skips something.
    start, stop = joint_ranges(140, 10, 40)
    self.check(self.call(1).replace(start=start, stop=stop))

  def test_empty_tiles_blocks_and_rows(self):
    def clear(stop):
      stop[0, :128] = 0  # A whole tile.
      stop[1] = 0  # A whole row.

    def late(start):
      start[0] = np.maximum(start[0], 130)  # Nobody sees the first block.

    call = self.call(2).edit(stop=clear, start=late)
    self.check(call)
    out, (d_query, d_key, d_value) = self.run_call(call)
    for x in (out[0, :128], d_query[0, :128], d_key[0, :130], d_value[0, :130]):
      np.testing.assert_array_equal(x, 0)
    for x in (out[1], d_query[1], d_key[1], d_value[1]):
      np.testing.assert_array_equal(x, 0)

  def test_nothing_is_seen(self):
    call = self.call(3)
    out, gradients = self.run_call(call.replace(stop=call.start))
    for x in (out, *gradients):
      np.testing.assert_array_equal(x, 0)

  def test_ranges_are_cut_to_the_keys(self):
    call = self.call(4)
    beyond = call.edit(
      start=lambda x: np.subtract(x, 999, out=x, where=x <= 0),
      stop=lambda x: np.add(x, 999, out=x, where=x >= BLOCKS[2]),
    )
    self.assert_same(self.run_call(beyond), self.run_call(call), 'pallas_tpu')

  @parameterized.parameters(np.nan, np.inf)
  def test_unseen_keys_may_be_anything(self, junk):
    first, last = 40, 270
    call = self.call(5)
    call = call.replace(
      start=np.maximum(call.start, first), stop=np.minimum(call.stop, last)
    )

    def poison(x):
      x[:, :first] = x[:, last:] = junk

    poisoned = call.edit(key=poison, value=poison)
    actual = self.run_call(poisoned)
    self.assert_same(actual, self.run_call(call), 'pallas_tpu')
    for x in jax.tree.leaves(actual):
      self.assertTrue(np.isfinite(x).all())

  def test_huge_values_that_only_others_see(self):
    call = self.call(6)
    start, stop = np.zeros_like(call.start), np.full_like(call.stop, 100)
    start[:, 0], stop[:, 0] = 100, 300
    call = call.replace(start=start, stop=stop)
    call = call.edit(cotangent=lambda x: x[:, 0].fill(0))
    huge = call.edit(value=lambda x: x[:, 100:].fill(3e38))
    before, (before_query, _, before_value) = self.run_call(call)
    after, (after_query, _, after_value) = self.run_call(huge)
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    np.testing.assert_array_equal(before_query[:, 1:], after_query[:, 1:])
    np.testing.assert_array_equal(before_value[:, :100], after_value[:, :100])

  def test_same_from_run_to_run_whatever_the_other_rows(self):
    call, other = self.call(7), self.call(8)
    fields = {
      name: np.concatenate([getattr(call, name)[:1], getattr(other, name)[1:]])
      for name in ('query', 'key', 'value', 'cotangent', 'start', 'stop')
    }
    first, second = (
      jax.tree.map(lambda x: x[:1], self.run_call(c))
      for c in (call, call.replace(**fields))
    )
    self.assert_same(first, second, 'pallas_tpu')


class ShapesTest(InterpretedTestCase):
  @marks.slow_unless(lambda shape, dtype: shape[-1] in (5, 32))
  @parameterized.parameters(
    ((2, 13, 9, 4, 32), 'bfloat16'),  # Four heads in a block.
    ((1, 30, 20, 2, 64), 'bfloat16'),
    ((1, 5, 140, 2, 128), 'bfloat16'),  # A head per block, two key blocks.
    ((2, 9, 6, 3, 5), 'float32'),  # Padded heads.
  )
  def test_head_dims(self, shape, dtype):
    self.check(suite.make_call(9, shape, 'causal', dtype))

  @pytest.mark.slow
  def test_two_cores_share_the_grid(self):
    with self.interpreter(num_cores=2):
      self.check(suite.make_call(14, (2, 150, 200, 1, 8)))

  def test_vmap(self):
    calls = [suite.make_call(seed, SMALL) for seed in (10, 11)]
    stacked = [
      np.stack([getattr(c, name) for c in calls])
      for name in ('query', 'key', 'value', 'cotangent')
    ]
    key_ranges = jax.tree.map(
      lambda *x: jnp.stack(x), *(c.key_range for c in calls)
    )
    run = functools.partial(suite.gradients, implementation='pallas_tpu')
    out, gradients = jax.jit(jax.vmap(run))(*stacked, key_ranges)
    for i, call in enumerate(calls):
      expected, expected_gradients = suite.oracle(call)
      self.assert_close(out[i], expected, 'float32')
      self.assert_close(
        [x[i] for x in gradients], expected_gradients, 'float32', gradient=True
      )

  def test_rows_over_devices(self):
    call = suite.make_call(12, (4, *SMALL[1:]))
    mesh = jax.make_mesh(
      (2,),
      ('rows',),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:2],
    )
    rows = jax.NamedSharding(mesh, jax.P('rows'))
    arguments = jax.device_put(
      (call.query, call.key, call.value, call.cotangent, call.key_range), rows
    )
    run = functools.partial(suite.gradients, implementation='pallas_tpu')
    with jax.set_mesh(mesh):
      out, gradients = jax.jit(run)(*arguments)
    self.assertTrue(out.sharding.is_equivalent_to(rows, out.ndim))
    expected, expected_gradients = suite.oracle(call)
    self.assert_close(out, expected, 'float32')
    self.assert_close(gradients, expected_gradients, 'float32', gradient=True)


def plan(query_shape=(2, 1024, 4, 32), num_keys=2048, dtype=jnp.bfloat16):
  return pallas_tpu.make_plan(query_shape, num_keys, dtype, 1.0)


class PlanTest(parameterized.TestCase):
  @parameterized.parameters(
    # (N, H, dtype), (H padded, G)
    ((4, 32, 'bfloat16'), (32, 4)),
    ((8, 32, 'bfloat16'), (32, 4)),
    ((8, 64, 'float32'), (64, 2)),
    ((8, 128, 'bfloat16'), (128, 1)),
    ((8, 130, 'bfloat16'), (256, 1)),
    ((4, 48, 'float32'), (64, 2)),
    ((2, 5, 'float32'), (8, 2)),
    ((2, 5, 'bfloat16'), (16, 2)),
    ((6, 32, 'bfloat16'), (32, 6)),  # No part of 6 heads fills registers.
  )
  def test_heads(self, call, expected):
    num_heads, head_dim, dtype = call
    found = plan((1, 7, num_heads, head_dim), dtype=jnp.dtype(dtype))
    self.assertEqual((found.head_dim, found.group), expected)

  @parameterized.parameters(
    (1, 128), (129, 256), (512, 512), (513, 384), (1100, 384), (100_000, 512)
  )
  def test_blocks_split_evenly(self, size, block):
    found = plan((1, size, 4, 32), size)
    self.assertEqual((found.block_q, found.block_k), (block, block))

  def test_wide_groups_have_smaller_blocks(self):
    found = plan((1, 9999, 31, 32), 9999, jnp.dtype('float32'))
    self.assertEqual((found.width, found.block_q), (992, 128))


class SkipTest(parameterized.TestCase):
  """Which blocks a kernel fetches and computes."""

  def setUp(self):
    super().setUp()
    # Tiles and blocks of 512: 2 tiles of queries, 4 blocks of keys.
    self.plan = plan()
    # Rows: one tile in the middle, one without any range; a window.
    self.first = np.array([600, 2048, 0, 500], np.int32)
    self.last = np.array([1300, 0, 512, 1100], np.int32)

  def test_bounds_of_tiles(self):
    start = np.full((1, 1024), 2048, np.int32)
    stop = np.zeros((1, 1024), np.int32)
    start[0, 3], stop[0, 3] = 700, 900
    start[0, 4], stop[0, 4] = 600, 610
    first, last = pallas_tpu.tile_bounds(start, stop, self.plan)
    np.testing.assert_array_equal(first, [600, 2048])
    np.testing.assert_array_equal(last, [900, 0])

  def test_tiles_of_blocks(self):
    lower, upper = pallas_tpu.key_block_bounds(self.first, self.last, self.plan)
    # Blocks 1 and 2 of row 0 are seen by tile 0; blocks 0 to 2 of row 1 by
    # tile 1, and block 0 by tile 0 as well.
    np.testing.assert_array_equal(lower, [0, 0, 0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(upper, [0, 1, 1, 0, 2, 2, 2, 0])

  def test_steps_over_keys_stay_within_bounds(self):
    self.assertEqual(pallas_tpu._key_steps(self.first, self.last, self.plan), 3)
    index = pallas_tpu._specs_over_keys(self.plan).key.index_map
    fetched = [
      [int(index(b, 0, i, s, self.first, self.last)[1]) for s in range(3)]
      for b in range(2)
      for i in range(2)
    ]
    # Past its last block a tile stays there: the same block is not fetched
    # twice.
    self.assertEqual(fetched, [[1, 2, 2], [0, 0, 0], [0, 0, 0], [0, 1, 2]])

  def test_steps_over_queries_fetch_what_sees_the_block(self):
    # Tiles 0 and 2 see block 0, tile 1 sees nothing.
    three = plan((1, 1536, 4, 32), 512)
    bounds = (np.array([0, 512, 7], np.int32), np.array([9, 0, 99], np.int32))
    tiles = pallas_tpu.key_block_bounds(*bounds, three)
    np.testing.assert_array_equal(tiles, [[0], [3]])
    index = pallas_tpu._specs_over_queries(three).query.index_map
    fetched = [int(index(0, 0, 0, s, *bounds, *tiles)[1]) for s in range(4)]
    self.assertEqual(fetched, [0, 0, 2, 0])


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters('float16', 'float64')
  def test_dtype(self, dtype):
    with suite.double_precision(dtype):
      call = suite.make_call(13, SMALL, dtype=dtype)
      with self.assertRaisesRegex(
        NotImplementedError, f'bfloat16 or float32.* query is {dtype}'
      ):
        pallas_tpu.history_attention(
          *map(jnp.asarray, (call.query, call.key, call.value)),
          call.key_range,
          scale=1.0,
        )

  def test_more_rows_than_scalar_memory_holds(self):
    array = jax.ShapeDtypeStruct((1 << 16, 1, 1, 8), jnp.float32)
    bound = jax.ShapeDtypeStruct((1 << 16, 1), jnp.int32)
    with self.assertRaisesRegex(NotImplementedError, 'split the rows'):
      jax.eval_shape(
        functools.partial(pallas_tpu.history_attention, scale=1.0),
        array,
        array,
        array,
        pallas_tpu.KeyRange(bound, bound),
      )


if __name__ == '__main__':
  absltest.main()
