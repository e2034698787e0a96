"""The Hopper kernel without a GPU: interpreted on the CPU, and lowered.

The interpreter looks for races. On a Hopper GPU test_backends.py runs it.
"""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.ops.candidate_tower import (
  api,
  hopper,
  pallas_gpu,
  pallas_gpu_layers,
  pallas_gpu_products,
)
from histjax.types import Paged
from tests import marks
from tests.ops import gpu_interpreter
from tests.ops.candidate_tower import suite

Config = pallas_gpu.Config
# As the defaults, but with as little of the MLP as makes its buffers wrap.
LOADER = Config(slot=4096, park='shared')
WIDE_HEADS = Config(park='shared')
LOADERLESS = Config(buffers=1, park='device', loader=False)
CLUSTER = Config(tiles=1, workers=1, buffers=1)
TWO_BLOCKS = dataclasses.replace(CLUSTER, workers=2, blocks=2)
FOUR_BLOCKS = dataclasses.replace(CLUSTER, blocks=4, slot=4096)
TWO_TILES = dataclasses.replace(CLUSTER, tiles=2, blocks=2)


def narrow(rows, heads):
  """The default of D 64 for so many rows of some candidates."""
  return pallas_gpu.default_config(rows, 70, 64, 256, heads[0])


def tower(call, config=None):
  return pallas_gpu.candidate_tower(
    *jax.tree.map(jnp.asarray, call.positional),
    num_heads=call.num_heads,
    count=None if call.count is None else jnp.asarray(call.count),
    layer=call.layer,
    final_norm=call.final_norm,
    config=config,
  )


class _Interpreted(gpu_interpreter.TestCase):
  """Runs kernels on the CPU; fails at a race."""

  def setUp(self):
    super().setUp()
    for module, name, value in (
      (hopper, 'mosaic_gpu', lambda: self.plgpu),
      (pallas_gpu, 'cluster', gpu_interpreter.CLUSTER),
    ):
      self.enter_context(mock.patch.object(module, name, value))

  def check(
    self, shape, config, *, causal=False, ascending=False, page=None, **fields
  ):
    fields = {'num_layers': 3, 'mlp_width': 256, **fields}
    call = suite.make_call(0, shape, dtype='bfloat16', **fields)
    if causal:  # As a history is read.
      seen = np.arange(1, shape[1] + 1, dtype=np.int32)[None]
      call = call.replace(stop=np.minimum(call.stop, seen), structure='causal')
    if ascending:  # As new events are; some beyond the end of the keys.
      call = call.replace(
        start=np.zeros_like(call.start),
        stop=np.sort(call.stop, axis=1),
        structure='ascending',
      )
    form = functools.partial(suite.paged, page=page) if page else lambda x: x
    suite.assert_equals_oracle(
      lambda call: np.asarray(tower(form(call), config)),
      suite.poisoned(call, np.nan),
    )
    self.assertFalse(self.races_found())

  def slow(self, *warpgroups):
    slow = dict.fromkeys(warpgroups, 2e-3)
    self.enter_context(mock.patch.dict(gpu_interpreter.SLOW, slow))


class InterpretedTest(_Interpreted):
  module = pallas_gpu

  @pytest.mark.slow
  def test_first_tile_drifts(self):
    self.slow(0, 1)
    self.check((1, 130, 150, 4, 32), LOADER, ragged=True)

  @pytest.mark.slow
  def test_last_tile_drifts(self):
    self.slow(2, 3)
    self.check((1, 70, 150, 4, 32), LOADER, num_layers=4)

  @pytest.mark.slow
  def test_residual_stream(self):
    self.check(
      (2, 70, 70, 4, 32), LOADER, num_layers=1, residual=True, ragged=True
    )

  @pytest.mark.slow
  def test_ascending(self):
    self.check(
      (2, 150, 90, 4, 32),
      LOADER,
      ascending=True,
      num_layers=1,
      residual=True,
      ragged=True,
    )

  @pytest.mark.slow
  def test_heads_as_wide_as_a_worker(self):
    self.check((1, 70, 70, 2, 64), WIDE_HEADS, structure='prefix')

  @pytest.mark.slow
  def test_last_tile_fills_the_rings(self):
    self.slow(0, 1)
    self.check((1, 70, 70, 4, 64), LOADERLESS, structure='prefix')

  @pytest.mark.slow
  def test_residual_stream_without_loader(self):
    self.check((1, 70, 70, 4, 64), LOADERLESS, num_layers=1, residual=True)

  @parameterized.parameters((4, 16), (2, 32))
  @pytest.mark.slow
  def test_narrow(self, *heads):
    self.slow(0, 1)
    config = dataclasses.replace(narrow(300, heads), group=2, buffers=2)
    self.check((1, 130, 150, *heads), config, ragged=True, rotate=False)

  @parameterized.parameters((4, 16), (2, 32))
  @pytest.mark.slow
  def test_narrow_residual_stream(self, *heads):
    self.check(
      (2, 70, 70, *heads),
      narrow(300, heads),
      causal=True,
      structure='prefix',
      num_layers=1,
      residual=True,
    )

  @marks.slow_unless(lambda rows, num_heads, head_dim: num_heads == 2)
  @parameterized.parameters((1, 2, 32), (1, 4, 16), (20, 4, 16))
  def test_narrow_in_a_cluster(self, rows, *heads):
    config = narrow(rows, heads)
    self.assertEqual(config.workers * config.blocks, heads[0])
    self.check((1, 70, 140, *heads), config, num_layers=2, ragged=True)

  @pytest.mark.slow
  def test_narrow_with_one_tile_to_a_block(self):
    config = narrow(60, (4, 16))
    self.slow(1)
    self.check((1, 70, 140, 4, 16), config, num_layers=2)

  def test_cluster_of_two(self):
    self.check((1, 9, 70, 4, 64), TWO_BLOCKS, mlp_width=512, rotate=False)

  @pytest.mark.slow
  def test_groups_in_a_cluster(self):
    config = dataclasses.replace(TWO_BLOCKS, group=2, late=600)
    self.check((1, 9, 200, 4, 64), config, num_layers=2, mlp_width=1024)

  @pytest.mark.slow
  def test_residual_stream_in_a_cluster(self):
    self.check((1, 70, 70, 4, 32), FOUR_BLOCKS, num_layers=2, residual=True)

  @pytest.mark.slow
  def test_new_events_of_many_users(self):
    """Clusters of two where those of four would not all run at once."""
    config = pallas_gpu.default_config(32, 64, 128, 512, num_heads=4)
    self.check(
      (2, 70, 140, 4, 32),
      config,
      ascending=True,
      num_layers=1,
      mlp_width=512,
      residual=True,
      ragged=True,
    )

  @pytest.mark.slow
  def test_two_tiles_in_a_cluster(self):
    self.slow(1)
    self.check((1, 130, 70, 2, 64), TWO_TILES, ragged=True)

  @parameterized.parameters(32, 64)
  @pytest.mark.slow
  def test_cluster_of_four(self, head_dim):
    config = dataclasses.replace(FOUR_BLOCKS, slot=128 * head_dim)
    self.check((1, 70, 70, 4, head_dim), config, ragged=True)

  @parameterized.parameters('sync', 'wgmma_wait')
  def test_the_test(self, name):
    owner = pallas_gpu._Worker if name == 'sync' else self.plgpu
    call = suite.make_call(
      0, (1, 70, 9, 4, 32), num_layers=1, dtype='bfloat16', mlp_width=256
    )
    with mock.patch.object(owner, name, lambda x: None):
      jax.block_until_ready(tower(call, LOADER))
    self.assertTrue(self.races_found())

  @pytest.mark.slow
  def test_the_test_of_clusters(self):
    call = suite.make_call(
      0, (1, 9, 9, 4, 64), num_layers=1, dtype='bfloat16', mlp_width=512
    )
    cluster = gpu_interpreter.CLUSTER
    with mock.patch.object(cluster, 'receive', lambda *args, **sizes: None):
      jax.block_until_ready(tower(call, TWO_BLOCKS))
    self.assertTrue(self.races_found())


class _InterpretedInLayers(_Interpreted):
  """Kernels with the attention between them."""

  def setUp(self):
    super().setUp()
    self.interpret_attention()


class InterpretedLayersTest(_InterpretedInLayers):
  module = pallas_gpu_layers

  @parameterized.parameters(0, 1)
  @pytest.mark.slow
  def test_one_warpgroup_drifts(self, warpgroup):
    self.slow(warpgroup)
    self.check((1, 150, 70, 4, 64), 'layers', structure='prefix')

  @pytest.mark.slow
  def test_several_tiles_in_a_block(self):
    self.enter_context(
      mock.patch.object(pallas_gpu_layers, 'MULTIPROCESSORS', 1)
    )
    self.check((2, 130, 150, 4, 64), 'layers', num_layers=2)

  @pytest.mark.slow
  def test_counts(self):
    self.check((3, 150, 70, 4, 64), 'layers', num_layers=2, ragged=True)

  def test_narrow_heads(self):
    self.check((1, 9, 70, 8, 32), 'layers', rotate=False, mlp_width=512)

  @pytest.mark.slow
  def test_history(self):
    self.check(
      (2, 130, 130, 4, 64),
      'layers',
      causal=True,
      num_layers=1,
      residual=True,
      structure='prefix',
    )

  @parameterized.parameters('commit_smem', 'wgmma_wait')
  def test_the_test(self, name):
    call = suite.make_call(
      0, (1, 70, 9, 4, 64), num_layers=1, dtype='bfloat16', mlp_width=256
    )
    with mock.patch.object(self.plgpu, name, lambda *n: None):
      jax.block_until_ready(tower(call, 'layers'))
    self.assertTrue(self.races_found())


class InterpretedProductsTest(_InterpretedInLayers):
  module = pallas_gpu_products

  def test_one_layer(self):
    self.check((1, 9, 9, 8, 64), 'products', num_layers=1)

  @parameterized.parameters(0, 1)
  @pytest.mark.slow
  def test_one_warpgroup_drifts(self, warpgroup):
    self.slow(warpgroup)
    self.check((1, 150, 70, 4, 128), 'products', num_layers=1, rotate=False)

  def test_whole_tiles(self):
    """Their last norm is a kernel, too."""
    self.check((2, 64, 24, 8, 64), 'products', num_layers=1, ragged=True)

  @pytest.mark.slow
  def test_counts(self):
    # The last tile of 256 has no live candidate.
    self.check((3, 150, 70, 4, 128), 'products', num_layers=1, ragged=True)

  @pytest.mark.slow
  def test_history_by_several_tiles_of_a_block(self):
    self.enter_context(
      mock.patch.object(pallas_gpu_products, 'MULTIPROCESSORS', 2)
    )
    self.check(
      (3, 130, 40, 8, 64),
      'products',
      causal=True,
      num_layers=1,
      mlp_width=512,
      residual=True,
      structure='prefix',
    )

  @pytest.mark.slow
  def test_wide(self):
    self.check((1, 9, 9, 12, 64), 'products', num_layers=1)

  @marks.slow_unless(lambda page: page == 16)
  @parameterized.parameters(8, 16, 64)
  def test_pages(self, page):
    self.check((2, 9, 150, 8, 64), 'products', num_layers=2, page=page)

  @pytest.mark.slow
  def test_layer_by_layer(self):
    call = suite.make_call(
      0, (2, 9, 24, 8, 64), num_layers=2, dtype='bfloat16', mlp_width=512
    )
    suite.assert_equals_oracle(
      lambda call: suite.layer_by_layer(
        call, 'of all', lambda c: np.asarray(tower(c, 'products'))
      ),
      call,
    )
    self.assertFalse(self.races_found())

  def test_mean_that_drowns_the_deviations(self):
    """A norm does not see what a row's channels have in common."""
    call = suite.make_call(
      0, (2, 5, 9, 8, 64), num_layers=1, dtype='bfloat16', mlp_width=256
    )
    shift = np.array([100.0, -1000.0], np.float32)[:, None, None]
    call = call.replace(candidates=call.candidates.astype(np.float32))
    found = tower(call.replace(candidates=call.candidates + shift), 'products')
    suite.assert_same(found, suite.oracle(call), call)

  @parameterized.parameters('commit_smem', 'wgmma_wait')
  @pytest.mark.slow
  def test_the_test(self, name):
    call = suite.make_call(
      0, (1, 70, 9, 8, 64), num_layers=1, dtype='bfloat16', mlp_width=256
    )
    with mock.patch.object(self.plgpu, name, lambda *n: None):
      jax.block_until_ready(tower(call, 'products'))
    self.assertTrue(self.races_found())


def lower(
  shape, structure, *, mlp_width=None, config=None, pages=None, **fields
):
  """StableHLO for CUDA; raises if a block's shared memory does not suffice.

  With `pages`, how many a pool has, keys and values are there.
  """

  # A small call's arrays, stretched: numbers cost time.
  sizes = dict(zip((3, 5, 7), shape[:3], strict=True))

  def stretch(x):
    return jax.ShapeDtypeStruct([sizes.get(n, n) for n in x.shape], x.dtype)

  small = (*sizes, *shape[3:])
  call = suite.make_call(
    0, small, structure=structure, dtype='bfloat16', mlp_width=mlp_width
  )
  args = list(jax.tree.map(stretch, call.positional))
  if not fields['rotate']:
    args[1] = None
  if pages is not None:
    pool = jax.ShapeDtypeStruct((2, pages, 16, *shape[3:]), jnp.bfloat16)
    index = (shape[0], -(-shape[2] // 16))
    index = jax.ShapeDtypeStruct(index, jnp.int32)
    args[2:4] = [Paged(pool, index)] * 2
  count = jax.ShapeDtypeStruct(shape[:1], jnp.int32)

  def function(args, count):
    run = functools.partial(pallas_gpu.candidate_tower, config=config)
    if config is None:
      run = functools.partial(
        api._BACKENDS['pallas_gpu'].call,
        final_norm=fields.get('final_norm', True),
      )
    return run(
      *args,
      num_heads=shape[3],
      count=count if fields['ragged'] else None,
    )

  traced = jax.jit(function).trace(args, count)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


class LoweringTest(parameterized.TestCase):
  @parameterized.product(
    heads=((2, 64), (4, 32), (4, 64), (8, 32)), few=(True, False)
  )
  def test_kernels(self, heads, few):
    shape = (1 if few else 32, 999, 333, *heads)
    odd = heads[0] == 4
    ragged = few == (heads[1] == 32)
    text = lower(
      shape, 'any' if odd == few else 'prefix', ragged=ragged, rotate=odd
    )
    # In layers the queries, the attention and the two layers' ends.
    in_layers = not few and heads[0] * heads[1] == 256
    self.assertEqual(text.count('@mosaic_gpu_v2('), 4 if in_layers else 1)

  @parameterized.product(heads=((4, 16), (2, 32)), few=(True, False))
  def test_narrow(self, heads, few):
    text = lower(
      (1 if few else 32, 999, 333, *heads),
      'prefix' if few else 'any',
      ragged=few,
      rotate=not few,
    )
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)

  @parameterized.parameters((4, 16), (2, 32), (4, 32), (4, 64))
  def test_residual(self, *heads):
    text = lower(
      (1, 999, 333, *heads),
      'ascending',
      ragged=True,
      rotate=True,
      final_norm=False,
    )
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)

  @parameterized.parameters(((32, 4, 32), 768), ((1, 4, 64), 256))
  def test_mlp_that_fills_shared_memory(self, sizes, mlp_width):
    num_rows, *heads = sizes
    text = lower(
      (num_rows, 1000, 333, *heads),
      'prefix',
      mlp_width=mlp_width,
      ragged=False,
      rotate=True,
    )
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)

  @parameterized.parameters(((8, 64), 'any'), ((6, 128), 'prefix'))
  def test_products(self, heads, structure):
    text = lower((3, 999, 333, *heads), structure, ragged=True, rotate=True)
    # The attention, the first moments, the tiles that count and four products.
    self.assertEqual(text.count('@mosaic_gpu_v2('), 7)

  @parameterized.parameters(1, 100, 3000, 9000)
  def test_pages(self, events):
    shape = (3, 128, events, 8, 64)
    text = lower(shape, 'prefix', pages=2000, ragged=True, rotate=True)
    # As above, and the tiles that count and the last norm.
    self.assertEqual(text.count('@mosaic_gpu_v2('), 8)
    self.assertNotIn('stablehlo.gather', text)
    # Or a slice of a request, which may lie anywhere, would be an operand.
    self.assertIn('stablehlo.optimization_barrier', text)

  @parameterized.parameters(256, 7168)
  def test_mlp_in_layers(self, mlp_width):
    shape = (32, 999, 333, 4, 64)
    fields = {'ragged': False, 'rotate': True}
    text = lower(shape, 'prefix', mlp_width=mlp_width, **fields)
    self.assertEqual(text.count('@mosaic_gpu_v2('), 4)
    with self.assertRaisesRegex(NotImplementedError, 'no plan for .* F=7680'):
      lower(shape, 'prefix', mlp_width=7680, **fields)

  @parameterized.parameters(
    ('any', 1, False),
    ('any', 2, True),
    ('prefix', 1, True),
    ('prefix', 2, False),
  )
  def test_memory_grows_linearly(self, structure, axis, in_layers):
    shape = [1024, 4096, 4096, 4, 64 if in_layers else 32]
    sizes = []
    for _ in range(2):
      config = 'layers' if in_layers else None
      text = lower(shape, structure, config=config, ragged=True, rotate=True)
      arrays = re.findall(r'tensor<((?:\d+x)+)', text)
      sizes.append(max(np.prod([*map(int, x[:-1].split('x'))]) for x in arrays))
      shape[axis] *= 2
    self.assertLessEqual(sizes[1], 2 * sizes[0])

  def test_row_with_one_candidate(self):
    text = lower((1, 1, 1, 4, 64), 'prefix', ragged=False, rotate=True)
    self.assertEqual(text.count('@mosaic_gpu_v2('), 1)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 512, 128, 512), (1, 1, 4)),
    ((1, 2048, 128, 512), (2, 1, 4)),  # 32 clusters of four would not run.
    ((28, 64, 128, 512), (1, 1, 4)),
    ((40, 64, 128, 512), (1, 2, 2)),  # Two tiles would be half empty.
    ((1, 2048, 128, 4096), (1, 2, 2)),  # No room for two tiles.
    ((32, 512, 128, 512), (2, 2, 1)),
    ((1, 1024, 256, 1024), (1, 1, 4)),
    ((1, 2048, 256, 1024), (1, 2, 2)),
    ((1, 1024, 256, 256), (1, 1, 4)),
  )
  def test_default(self, call, expected):
    config = pallas_gpu.default_config(*call, num_heads=4)
    self.assertEqual((config.tiles, config.workers, config.blocks), expected)
    self.assertTrue(pallas_gpu._Plan(config, 4, *call[2:], 4).fits())

  @parameterized.product(
    call=(
      ((1, 512), (1, 1, 4), (1, 2, 1)),
      ((8, 512), (1, 2, 2), (1, 2, 1)),
      ((16, 512), (1, 2, 1), (1, 2, 1)),
      ((512, 64), (1, 2, 1), (1, 2, 1)),  # Two tiles would be half empty.
      ((32, 512), (2, 2, 1), (2, 2, 1)),
    ),
    heads=(4, 2),
    hidden=(64, 192, 256, 512, 2048),
  )
  def test_narrow(self, call, heads, hidden):
    sizes, of_four, of_two = call
    config = pallas_gpu.default_config(*sizes, 64, hidden, heads)
    self.assertTrue(pallas_gpu._Plan(config, 4, 64, hidden, heads).fits())
    expected = of_four if heads == 4 else of_two
    self.assertEqual((config.tiles, config.workers, config.blocks), expected)

  def test_narrow_with_many_hidden_channels(self):
    config = pallas_gpu.default_config(1, 64, 64, 4096, 4)
    self.assertEqual((config.tiles, config.workers), (2, 2))
    self.assertTrue(pallas_gpu._Plan(config, 4, 64, 4096, 4).fits())

  @parameterized.parameters(
    ((32, 1024, 256, 1024), True),
    ((67, 1, 256, 1024), True),
    ((66, 1, 256, 1024), False),
    ((32, 1024, 128, 512), False),
    ((32, 1024, 256, 7680), False),
    ((65536, 1, 256, 1024), False),
  )
  def test_in_layers(self, call, expected):
    config = pallas_gpu.default_config(*call, num_heads=4)
    self.assertEqual(config == 'layers', expected)

  @parameterized.parameters((4, 16), (4, 32), (4, 64), (8, 64), (4, 128))
  def test_is_picked_at_each_width(self, num_heads, head_dim):
    call = suite.make_call(
      0, (2, 3, 4, num_heads, head_dim), num_layers=1, dtype='bfloat16'
    )
    shapes = jax.eval_shape(lambda: call.positional)
    with ops.target_platform('cuda', compute_capability='9.0'):
      found = ops.candidate_tower_backend(*shapes, num_heads=num_heads)
    self.assertEqual(found, 'pallas_gpu')

  @parameterized.parameters((64, 1024), (80, 256), (8, 256), (1000, 1024))
  def test_columns_of_a_tile(self, tiles, expected):
    kind = pallas_gpu_products._Kind(
      'hidden', 128 * tiles, 512, 512, 2048, 64, 0, 512
    )
    self.assertEqual(kind.span, expected)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'shape': (1, 2, 3, 1, 64)}, 'takes D 64 with H 16 .* D=64, N=1, H=64'),
    ({'shape': (1, 2, 3, 8, 16)}, 'H 32 or 64, and F .* not D=128, N=8, H=16'),
    ({'shape': (1, 2, 3, 2, 16)}, 'not D=32, N=2, H=16'),
    ({'shape': (1, 2, 3, 4, 16), 'mlp_width': 96}, 'of D, .* F=96'),
    ({'shape': (1, 2, 3, 4, 16), 'mlp_width': 8064}, 'no plan for .* F=8064'),
    ({'shape': (1, 2, 3, 1, 128)}, 'not D=128, N=1, H=128'),
    ({'shape': (1, 2, 3, 16, 32)}, 'D >= 512, not D=512, N=16, H=32'),
    ({'shape': (1, 2, 3, 10, 64)}, 'D and F multiples of 256, .* D=640'),
    ({'mlp_width': 192}, 'F a multiple of D, .* F=192'),
    ({'mlp_width': 128, 'shape': (1, 2, 3, 2, 64)}, 'no plan for .* F=128'),
    ({'dtype': 'float32'}, 'takes bfloat16 keys, .* not float32'),
  )
  def test_call(self, fields, message):
    fields = {'shape': (1, 2, 3, 4, 32), 'dtype': 'bfloat16', **fields}
    call = suite.make_call(0, fields.pop('shape'), **fields)
    with self.assertRaisesRegex(NotImplementedError, message):
      tower(call)

  @parameterized.parameters(
    ({'shape': (1, 2, 3, 4, 32)}, 'in layers for B=1, D=128, N=4, F=512'),
    ({'shape': (1, 2, 3, 4, 64), 'mlp_width': 7680}, 'F=7680'),
  )
  def test_layers(self, fields, message):
    call = suite.make_call(0, fields.pop('shape'), dtype='bfloat16', **fields)
    with self.assertRaisesRegex(NotImplementedError, message):
      tower(call, 'layers')

  def test_products(self):
    call = suite.make_call(0, (1, 2, 3, 4, 64), dtype='bfloat16')
    with self.assertRaisesRegex(NotImplementedError, 'in products .* D=256'):
      tower(call, 'products')


if __name__ == '__main__':
  absltest.main()
