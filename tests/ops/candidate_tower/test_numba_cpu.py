"""The kernel for CPUs: what is its own, beside the shared suite."""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops
from histjax.ops import cpu, numba_kernels
from tests import support
from tests.ops.candidate_tower import suite

SEEDS = st.integers(0, 2**32 - 1)


def backend(shape, implementation=None, **fields):
  call = suite.make_call(0, shape, **fields)
  return ops.candidate_tower_backend(
    *call.positional, num_heads=call.num_heads, implementation=implementation
  )


class ResultTest(parameterized.TestCase):
  @support.examples(15)
  @given(
    seed=SEEDS,
    rows=st.integers(1, 3),
    candidates=st.integers(1, 70),
    keys=st.integers(1, 300),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 10),
    hidden=st.integers(1, 300),
    structure=st.sampled_from(['any', 'prefix']),
    ragged=st.booleans(),
  )
  def test_any_shape(
    self,
    seed,
    rows,
    candidates,
    keys,
    heads,
    head_dim,
    hidden,
    structure,
    ragged,
  ):
    call = suite.make_call(
      seed,
      (rows, candidates, keys, heads, head_dim),
      structure=structure,
      ragged=ragged,
      mlp_width=hidden,
      rotate=head_dim % 2 == 0,
    )
    suite.assert_equals_oracle(lambda c: suite.run(c, 'numba_cpu'), call)

  def test_causal_events(self):
    call = suite.make_call(0, (2, 100, 100, 2, 16), residual=True)
    stop = np.tile(np.arange(1, 101, dtype=np.int32), (2, 1))
    stop[1] = np.minimum(stop[1], 37)
    call = call.replace(
      start=np.zeros_like(stop), stop=stop, structure='causal'
    )
    suite.assert_equals_oracle(lambda c: suite.run(c, 'numba_cpu'), call)

  @parameterized.parameters(
    ((1, 1000, 300, 2, 8), 'any'),  # Groups of as many tiles as there can be.
    ((1, 777, 150, 1, 6), 'prefix'),
    ((5, 300, 40, 2, 8), 'any'),
  )
  def test_groups_of_tiles(self, shape, structure):
    call = suite.make_call(
      0, shape, structure=structure, ragged=True, mlp_width=150
    )
    suite.assert_equals_oracle(lambda c: suite.run(c, 'numba_cpu'), call)

  def test_tiles_that_see_apart(self):
    # Tiles of a group, between whose keys nobody sees any.
    call = suite.make_call(0, (1, 640, 900, 1, 8), num_layers=1)
    tile = np.arange(640, dtype=np.int32)[None] // numba_kernels.LANES
    start = np.where(tile % 3 == 0, 700, tile % 3 * 17).astype(np.int32)
    stop = np.where(tile % 3 == 2, start, start + 150 + tile)
    call = call.replace(start=start, stop=stop.astype(np.int32))
    suite.assert_equals_oracle(lambda c: suite.run(c, 'numba_cpu'), call)

  def test_extreme_scores(self):
    call = suite.make_call(0, (1, 40, 200, 2, 8), num_layers=1)
    call = call.replace(keys=call.keys * 1e3)
    # Weights of 1 or 0: a difference of float32 scores may be 1e-3 of weight.
    expected = suite.oracle(call)
    found = suite.run(call, 'numba_cpu')
    self.assertLess(np.abs(found - expected).max(), 1e-2)

  @parameterized.parameters('keys', 'values')
  def test_hides_no_nan(self, name):
    call = suite.make_call(0, (1, 40, 200, 2, 8), structure='prefix')
    array = getattr(call, name).copy()
    array[1, 0, 150, 1, 3] = np.nan
    found = suite.run(call.replace(**{name: array}), 'numba_cpu')
    self.assertTrue(np.isnan(found).all())

  def test_calls_at_once(self):
    calls = [
      suite.make_call(seed, (2, 150, 60, 2, 16), ragged=True)
      for seed in range(8)
    ]
    expected = [suite.run(call, 'numba_cpu') for call in calls]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      for _ in range(5):
        found = pool.map(lambda c: suite.run(c, 'numba_cpu'), calls)
        for x, y in zip(found, expected, strict=True):
          np.testing.assert_array_equal(x, y)

  def test_each_device_computes_its_rows(self):
    call = suite.make_call(0, (8, 40, 30, 2, 8), ragged=True)
    mesh = jax.make_mesh((8,), ('rows',))

    def put(x, axis):
      spec = jax.P(*(None,) * axis, 'rows') if axis is not None else jax.P()
      return jax.device_put(x, jax.NamedSharding(mesh, spec))

    axes = (0, 0, 1, 1, 0, None)
    arrays = [
      jax.tree.map(lambda x, axis=axis: put(x, axis), x)
      for x, axis in zip(call.positional, axes, strict=True)
    ]
    run = jax.jit(
      lambda count, *arrays: ops.candidate_tower(
        *arrays, num_heads=2, count=count, implementation='numba_cpu'
      )
    )
    count = put(call.count, 0)
    program = run.lower(count, *arrays).compile()
    self.assertNotIn('all-gather', program.as_text())
    np.testing.assert_array_equal(
      program(count, *arrays), suite.run(call, 'numba_cpu')
    )

  @pytest.mark.slow  # It compiles all of it again.
  def test_with_few_registers(self):
    """The vectors of processors without AVX-512, in a process of its own."""
    name = 'x86-64-v3' if os.uname().machine == 'x86_64' else 'generic'
    program = """
import numpy as np
from histjax.ops import numba_kernels
from histjax import ops
from tests.ops.candidate_tower import suite
from tests.ops.interaction_head import suite as heads, test_numba_cpu
assert (numba_kernels.LANES, numba_kernels.ROWS) == (16, 6)
for shape in ((2, 37, 150, 2, 8), (1, 16, 5, 1, 6)):
  call = suite.make_call(0, shape, ragged=True)
  suite.assert_equals_oracle(lambda c: suite.run(c, 'numba_cpu'), call)
shape = ops.HeadShape(40, 30, 64, (128, 64), 2, 64, 2)
call = heads.make_call(0, (2, 77), shape, dtype='float32', ragged=True)
test_numba_cpu.NumbaTest().assert_equals_oracle(call)
"""
    environment = {
      **os.environ,
      'NUMBA_CPU_NAME': name,
      'NUMBA_CPU_FEATURES': '',
      'PYTHONPATH': os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, '-c', program], env=environment, check=True)


class KeptOnDiskTest(absltest.TestCase):
  @pytest.mark.slow  # It compiles all of it again.
  def test_by_processes_of_one_kernel_each(self):
    """Whose symbols must not be those of another's function."""
    environment = {
      **os.environ,
      'NUMBA_CACHE_DIR': self.enter_context(tempfile.TemporaryDirectory()),
      'PYTHONPATH': os.pathsep.join(sys.path),
    }
    compile_one = """
from histjax.ops import numba_kernels
numba_kernels.handler('{}')
"""
    run_both = """
from histjax.ops.interaction_head.weights import HeadShape
from tests.ops.candidate_tower import suite
from tests.ops.interaction_head import suite as heads, test_numba_cpu
call = suite.make_call(0, (2, 37, 150, 2, 8), ragged=True)
suite.assert_equals_oracle(lambda c: suite.run(c, 'numba_cpu'), call)
shape = HeadShape(40, 30, 64, (128, 64), 2, 64, 2)
call = heads.make_call(0, (2, 77), shape, dtype='float32', ragged=True)
test_numba_cpu.NumbaTest().assert_equals_oracle(call)
"""
    for program in (
      compile_one.format('candidate_tower'),
      compile_one.format('interaction_head'),
      run_both,
    ):
      subprocess.run(
        [sys.executable, '-c', program], env=environment, check=True
      )


class MemoryTest(parameterized.TestCase):
  def test_work_does_not_grow(self):
    # All memory but arguments and result: XLA's, and what each thread takes.
    def work(num_candidates, num_keys):
      job = types.SimpleNamespace(
        num_candidates=num_candidates, num_keys=num_keys, width=128, heads=4,
        rows=1,
      )  # fmt: skip
      numba_kernels._divide.py_func(job, 2)
      a_tile = numba_kernels._tile_bytes.py_func
      with mock.patch.object(numba_kernels, '_tile_bytes', a_tile):
        return numba_kernels._work_bytes.py_func(job)

    self.assertEqual(work(2048, 512), work(100_000, 100_000))
    self.assertLess(work(2048, 512), 2**20)

    def temporary(num_candidates, num_keys):
      shape = (1, num_candidates, num_keys, 2, 8)
      call = jax.eval_shape(
        lambda: suite.make_call(0, shape, num_layers=1).positional
      )
      run = jax.jit(
        lambda *x: ops.candidate_tower(
          *x, num_heads=2, implementation='numba_cpu'
        )
      )
      memory = run.lower(*call).compile().memory_analysis()
      return memory.temp_size_in_bytes

    # The sines and cosines of each candidate.
    self.assertLessEqual(temporary(2048, 4096), 2048 * 2 * 4 * 4 + 4096)


class GroupsTest(absltest.TestCase):
  @given(
    rows=st.integers(1, 300),
    candidates=st.integers(1, 5000),
    threads=st.integers(1, 130),
  )
  def test_divide(self, rows, candidates, threads):
    job: Any = types.SimpleNamespace(rows=rows, num_candidates=candidates)
    numba_kernels._divide.py_func(job, threads)
    tiles = -(-candidates // numba_kernels.LANES)
    ends = [tiles * i // job.groups for i in range(job.groups + 1)]
    sizes = np.diff(ends)
    self.assertEqual(job.units, rows * job.groups)
    self.assertGreaterEqual(sizes.min(), 1)
    self.assertEqual(sizes.max(), job.group)
    self.assertLessEqual(job.group, numba_kernels._TILES)
    # No thread is without work that a smaller group would give it.
    self.assertGreaterEqual(job.units, min(rows * tiles, 2 * threads))


class DispatchTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 1, 9, 2, 8), 'numba_cpu'),
    ((64, 9, 9, 2, 8), 'numba_cpu'),
    # Nearly all lanes would be empty.
    ((64, 1, 9, 2, 8), 'xla'),
  )
  def test_picks_by_shape(self, shape, name):
    self.assertEqual(backend(shape), name)
    self.assertEqual(backend(shape, 'numba_cpu'), 'numba_cpu')

  def test_float32_alone(self):
    shape = (1, 9, 9, 2, 8)
    self.assertTrue(ops.has_cpu_kernel(jnp.float32))
    self.assertFalse(ops.has_cpu_kernel(jnp.bfloat16))
    self.assertEqual(backend(shape, dtype='bfloat16'), 'xla')
    with self.assertRaisesRegex(NotImplementedError, 'are bfloat16'):
      backend(shape, 'numba_cpu', dtype='bfloat16')

  def test_without_numba(self):
    shape = (1, 9, 9, 2, 8)
    with mock.patch.dict(sys.modules, numba=None):  # Its import fails.
      self.assertFalse(ops.has_cpu_kernel(jnp.float32))
      self.assertEqual(backend(shape), 'xla')
      with self.assertRaisesRegex(NotImplementedError, r'histjax\[cpu\]'):
        backend(shape, 'numba_cpu')

  def test_an_interface_that_jax_refuses(self):
    shape = (1, 9, 9, 2, 8)
    error = jax.errors.JaxRuntimeError('API version is incompatible')
    cpu.register.cache_clear()
    with mock.patch.object(jax.ffi, 'register_ffi_target', side_effect=error):
      self.assertEqual(backend(shape), 'xla')
      with self.assertRaisesRegex(NotImplementedError, 'is incompatible'):
        backend(shape, 'numba_cpu')
    self.assertEqual(backend(shape), 'numba_cpu')

  def test_not_on_windows(self):
    with mock.patch('platform.system', return_value='Windows'):
      with self.assertRaisesRegex(NotImplementedError, 'POSIX'):
        backend((1, 9, 9, 2, 8), 'numba_cpu')


class InterfaceTest(parameterized.TestCase):
  """The structures are those of the headers of the JAX that is installed."""

  def setUp(self):
    super().setUp()
    header = pathlib.Path(jax.ffi.include_dir()) / 'xla/ffi/api/c_api.h'
    self.header = header.read_text()

  def test_version(self):
    found = re.search(r'define XLA_FFI_API_MAJOR (\d+)', self.header)
    self.assertEqual(int(found[1]), numba_kernels.MAJOR)

  @parameterized.parameters(*numba_kernels.STRUCTURES)
  def test_structure(self, name):
    """Names, order and sizes; with C's alignment they give the offsets."""
    body = re.search(rf'struct XLA_FFI_{name} {{(.*?)\n}};?', self.header, re.S)
    code = re.sub(r'//.*', '', body[1])
    code = re.sub(r'_XLA_FFI_API\w+\(XLA_FFI_(\w+)\)', r'void* \1', code)
    declared = re.findall(r'([\w ]+\**) +(\w+);', code)
    ours = numba_kernels.STRUCTURES[name]
    if name != 'Api':  # It grows at its end.
      self.assertLen(declared, len(ours.names))
    for field, (kind, theirs) in zip(ours.names, declared, strict=False):
      if not field.startswith('_'):
        self.assertEqual(field, theirs)
      self.assertEqual(ours[field].itemsize, self.size(kind.strip()), field)

  def size(self, kind):
    nested = numba_kernels.STRUCTURES.get(kind.removeprefix('XLA_FFI_'))
    if nested is not None and '*' not in kind:
      return nested.itemsize
    if '*' in kind or kind in ('size_t', 'int64_t', 'XLA_FFI_TypeId'):
      return 8
    self.assertIn(
      kind,
      (
        'int',
        'XLA_FFI_DataType',
        'XLA_FFI_ExecutionStage',
        'XLA_FFI_Handler_Traits',
      ),
    )
    return 4


if __name__ == '__main__':
  absltest.main()
