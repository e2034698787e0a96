"""The TPU kernel, interpreted on the CPU and compiled for real TPUs."""

import functools
import re
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from histjax import ops, scoring
from histjax.models import ranker
from histjax.ops import dispatch
from histjax.ops.candidate_tower import api, pallas_tpu
from tests import marks, support
from tests.ops.candidate_tower import suite
from tests.tpu import TOPOLOGIES, devices

# (B, C, L, N, H): two tiles of candidates and three blocks of keys of 128; the
# last of each is partly outside the arrays, where the interpreter reads NaN.
BLOCKS = (2, 150, 300, 4, 32)
SMALL = (3, 5, 9, 4, 32)


class InterpretTest(parameterized.TestCase):
  """Runs 'pallas_tpu' on the CPU in blocks of 128; fails at a race."""

  def setUp(self):
    super().setUp()
    self.enter_context(jax.default_matmul_precision('highest'))
    backend = api._BACKENDS['pallas_tpu']
    everywhere = backend._replace(check_target=dispatch.any_target)
    self.enter_context(
      mock.patch.dict(api._BACKENDS, {'pallas_tpu': everywhere})
    )
    self.enter_context(mock.patch.object(pallas_tpu, '_MAX_BLOCK', 128))
    # Two cores share the parallel axes of the grid, in a random order.
    params = pltpu.InterpretParams(
      detect_races=True, num_cores_or_threads=2, random_seed=0
    )
    self.enter_context(pltpu.force_tpu_interpret_mode(params))
    self.addCleanup(pltpu.reset_tpu_interpret_mode_state)

  def run_call(self, call):
    found = suite.run(call, 'pallas_tpu')
    self.assertFalse(interpret_pallas_call.races.races_found)
    return found

  def check(self, call):
    suite.assert_equals_oracle(self.run_call, call)

  def blocks(self, seed=0, **fields):
    return suite.make_call(seed, BLOCKS, mlp_width=256, **fields)

  def test_blocks_of_any_ranges(self):
    self.check(self.blocks(ragged=True))

  def test_blocks_that_few_see(self):
    call = self.blocks(1, ragged=True)
    start = np.where(np.arange(150) < 128, 130, 270)
    call = call.replace(
      start=np.stack([start, start]).astype(np.int32),
      stop=np.stack([start + 20, start]).astype(np.int32),
      count=np.array([150, 128], np.int32),
    )
    self.check(suite.poisoned(call, np.nan))

  @marks.slow_unless(lambda **fields: fields.get('dtype') == 'bfloat16')
  @parameterized.parameters(
    {'dtype': 'bfloat16', 'ragged': True},
    {'structure': 'prefix', 'rotate': False},
    {'num_layers': 1, 'ragged': True},
    {'num_layers': 1, 'dtype': 'bfloat16', 'residual': True},
    {'ragged': True, 'residual': True},
  )
  def test_small(self, **fields):
    self.check(suite.make_call(2, SMALL, mlp_width=128, **fields))

  @marks.slow_unless(lambda num_heads, head_dim: head_dim == 128)
  @parameterized.parameters((8, 16), (2, 64), (2, 128))
  def test_heads(self, num_heads, head_dim):
    shape = (1, 5, 9, num_heads, head_dim)
    self.check(suite.make_call(3, shape, mlp_width=256, num_layers=1))

  @marks.slow_unless(lambda shape, **fields: shape[1] == 150)
  @parameterized.parameters(
    {'shape': (2, 150, 300, 4, 16), 'ragged': True, 'dtype': 'bfloat16'},
    {'shape': (2, 5, 9, 2, 32), 'ragged': True, 'residual': True},
    {'shape': (2, 5, 9, 2, 32), 'structure': 'causal', 'dtype': 'bfloat16'},
    {'shape': (2, 5, 9, 4, 16), 'structure': 'prefix', 'rotate': False},
    {'shape': (1, 5, 9, 3, 64), 'num_layers': 1},  # One head is left.
    {'shape': (2, 5, 9, 4, 8), 'mlp_width': 40},
    {'shape': (2, 5, 9, 4, 4), 'dtype': 'bfloat16', 'mlp_width': 600},
  )
  def test_widths_that_do_not_fill_registers(self, shape, **fields):
    self.check(suite.make_call(7, shape, **fields))

  @marks.slow_unless(lambda num_heads, dtype: num_heads == 8)
  @parameterized.parameters((8, 'bfloat16'), (4, 'float32'))
  def test_width_512(self, num_heads, dtype):
    shape = (1, 5, 9, num_heads, 512 // num_heads)
    call = suite.make_call(8, shape, num_layers=1, dtype=dtype, ragged=True)
    self.check(call)

  def test_no_keys_at_all(self):
    self.check(suite.make_call(4, (2, 5, 0, 4, 32), mlp_width=128))

  @pytest.mark.slow
  def test_a_result_depends_on_its_candidate_and_its_history_alone(self):
    call = suite.make_call(5, SMALL, mlp_width=128, num_layers=1)
    expected = self.run_call(call)
    order = np.array([3, 0, 4, 1, 2])
    for index in (order, order[:1]):
      found = self.run_call(call.candidates_at(index))
      suite.assert_same(found, expected[:, index], call)
    rows = np.array([2, 0])
    suite.assert_same(self.run_call(call.rows_at(rows)), expected[rows], call)
    np.testing.assert_array_equal(
      self.run_call(suite.poisoned(call, np.nan)), expected
    )

  def test_what_it_refuses_another_computes(self):
    call = suite.make_call(0, (1, 3, 5, 2, 12))
    with self.assertRaisesRegex(NotImplementedError, 'D=24, H=12'):
      suite.run(call, 'pallas_tpu')
    suite.assert_equals_oracle(lambda c: suite.run(c, None), call)

  @pytest.mark.slow
  def test_vmap_and_sharded_rows(self):
    call = suite.make_call(6, (4, 5, 9, 4, 32), mlp_width=128, num_layers=1)
    expected = self.run_call(call)
    run = functools.partial(
      ops.candidate_tower, num_heads=4, implementation='pallas_tpu'
    )
    mesh = jax.make_mesh((2,), ('data',), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
      found = jax.jit(run)(*call.positional)
    self.assertLen(found.sharding.device_set, 2)
    suite.assert_same(found, expected, call)
    stacked = jax.tree.map(lambda x: x[None], call.positional)
    suite.assert_same(jax.jit(jax.vmap(run))(*stacked)[0], expected, call)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 3, 5, 8, 48), {}, 'D=384, H=48'),  # The third is in two registers.
    ((1, 3, 5, 1, 192), {}, 'H=192'),
    ((1, 3, 5, 8, 2), {}, 'D=16, H=2'),
    ((1, 3, 5, 4, 32), {'dtype': 'float16'}, 'keys is float16'),
    ((1, 3, 5, 8, 256), {'num_layers': 1}, 'MiB of vector memory'),
    ((70_000, 1, 1, 8, 16), {'num_layers': 1}, 'split the rows'),
  )
  def test_calls(self, shape, fields, message):
    shapes = jax.eval_shape(
      lambda: suite.make_call(0, shape, **fields).positional
    )
    with self.assertRaisesRegex(NotImplementedError, message):
      jax.eval_shape(
        functools.partial(pallas_tpu.candidate_tower, num_heads=shape[3]),
        *shapes,
      )

  def test_devices(self):
    if jax.default_backend() != 'tpu':
      call = suite.make_call(0, SMALL)
      with self.assertRaisesRegex(
        NotImplementedError, 'pallas_tpu needs a TPU'
      ):
        suite.run(call, 'pallas_tpu')


def shapes(tree, device):
  where = jax.sharding.SingleDeviceSharding(device)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
  )


def _on_some(*cases):
  """(topology, case): all on the first, on the others every second one."""
  first, *others = TOPOLOGIES
  return [
    *((first, case) for case in cases),
    *(
      (topology, case)
      for i, topology in enumerate(others)
      for case in cases[i::2]
    ),
  ]


class CompileTest(parameterized.TestCase):
  """libtpu refuses what a TPU lacks, and what does not fit its memory."""

  def compile(self, device, function, *arguments):
    """Compiles for a device that is not there; one kernel must be in it."""
    with jax.default_device(device):
      program = jax.jit(function).lower(*shapes(arguments, device)).compile()
    calls = re.findall(
      r'%candidate_tower[.\d]* = .*tpu_custom_call', program.as_text()
    )
    self.assertLen(calls, 1)
    memory = program.memory_analysis()
    print(
      f'{self.id()} {device.device_kind}: arguments '
      f'{memory.argument_size_in_bytes}, temporary '
      f'{memory.temp_size_in_bytes} bytes of HBM'
    )
    return memory.temp_size_in_bytes

  def compile_tower(self, topology, shape, dtype, residual=False):
    def arguments():
      call = suite.make_call(
        0,
        shape,
        num_layers=4,
        dtype=dtype,
        ragged=residual,
        residual=residual,
      )
      return call.count, *call.positional

    def run(count, *arrays):
      # By itself, the operation takes the kernel for this device.
      return ops.candidate_tower(
        *arrays, num_heads=shape[3], count=count, final_norm=not residual
      )

    return self.compile(devices(topology)[0], run, *jax.eval_shape(arguments))

  @marks.slow_unless(
    lambda topology, shape_dtype: (
      topology == 'v5e:2x2' and shape_dtype[0] == (2, 512, 512, 4, 32)
    )
  )
  @parameterized.parameters(
    *_on_some(
      ((2, 512, 512, 4, 32), 'bfloat16'),
      ((2, 512, 1024, 4, 64), 'bfloat16'),
      ((3, 300, 1000, 1, 128), 'float32'),
      ((2, 13, 700, 8, 64), 'float32'),
    )
  )
  def test_compiles(self, topology, shape_dtype):
    self.compile_tower(topology, *shape_dtype)

  @marks.slow_unless(
    lambda topology, case: (
      topology == 'v5e:2x2' and case[1] == 'bfloat16' and case[2]
    )
  )
  @parameterized.parameters(
    *_on_some(  # (N, H), the type, whether the residual stream is the result.
      ((4, 16), 'bfloat16', True),
      ((4, 16), 'float32', False),
      ((2, 32), 'bfloat16', False),
      ((2, 32), 'float32', True),
      ((4, 8), 'float32', False),
      ((4, 4), 'bfloat16', False),
      ((8, 64), 'bfloat16', True),
      ((8, 64), 'float32', False),
      ((4, 128), 'bfloat16', False),
      ((4, 128), 'float32', True),
    )
  )
  def test_compiles_at_widths_in_use(self, topology, case):
    heads, dtype, residual = case
    self.compile_tower(topology, (2, 512, 512, *heads), dtype, residual)

  @marks.slow_unless(lambda num_candidates, num_keys: num_keys == 1 << 14)
  @parameterized.parameters((1 << 14, 1 << 7), (1 << 7, 1 << 14))
  def test_memory_is_linear(self, num_candidates, num_keys):
    shape = (1, num_candidates, num_keys, 4, 32)
    small = self.compile_tower('v5e:2x2', shape, 'bfloat16')
    shape = (1, 2 * num_candidates, 2 * num_keys, 4, 32)
    self.assertLess(self.compile_tower('v5e:2x2', shape, 'bfloat16'), 3 * small)

  @pytest.mark.slow
  def test_cached_scoring(self):
    config = support.config(
      encoder__width=128, encoder__num_heads=4, dtype='bfloat16'
    )
    model, variables = support.init(config)
    batch = support.batch(np.random.default_rng(0), 4, 300, 200)
    cache = jax.eval_shape(
      lambda: model.apply(variables, batch.history, method='encode')
    )

    def score(variables, cache, candidates, context):
      variables = {**variables, **ranker.pack(config, variables)}
      return scoring.score_microbatched(
        model, variables, cache, candidates, context, microbatch=256
      )

    device = devices('v5e:2x2')[0]
    self.compile(
      device, score, variables, cache, batch.candidates, batch.context
    )


if __name__ == '__main__':
  absltest.main()
