"""The implementation is the target's, whatever this machine is."""

import subprocess
import sys
import textwrap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.nn import encoder
from histjax.ops import devices, dispatch, rotary
from histjax.ops.history_attention import cudnn, xla
from histjax.types import KeyRange

# The kernels for Hopper need a newer JAX than the oldest.
ON_HOPPER = 'cudnn' if jax.__version_info__ < (0, 11) else 'pallas_gpu'
TARGETS = (
  ('cpu', '', 'xla', None),
  ('tpu', '', 'pallas_tpu', 'tpu_custom_call'),
  ('cuda', '9.0', ON_HOPPER, 'cudnn|mosaic_gpu'),
  ('cuda', '8.0', 'cudnn', 'cudnn'),
  ('cuda', '7.5', 'xla', None),
  ('cuda', '', 'xla', None),
  ('rocm', '', 'xla', None),
)


def attend(query, key, value, stop):
  key_range = KeyRange(jnp.zeros_like(stop), stop, 'prefix')
  return ops.history_attention(query, key, value, key_range)


SHAPES = (
  *[jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)] * 3,
  jax.ShapeDtypeStruct((2, 128), jnp.int32),
)


class TargetTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # Where JAX has no CUDA it cannot ask cuDNN for its version.
    self.enter_context(
      mock.patch(
        'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version',
        return_value=91000,
      )
    )

  @parameterized.parameters(*TARGETS)
  def test_operations_pick_what_the_target_has(
    self, platform, capability, name, call
  ):
    del call
    with (
      ops.target_platform(platform, compute_capability=capability),
      dispatch.record() as used,
    ):
      jax.eval_shape(lambda *x: attend(*x), *SHAPES)
    self.assertEqual(used, {'history_attention': {name}})

  def test_one_function_is_exported_for_each_platform(self):
    """Its trace for one is not taken for another."""
    jitted = jax.jit(attend)
    for platform, capability, _, call in TARGETS:
      if platform == 'rocm':  # No lowering of some primitives is installed.
        continue
      with ops.target_platform(platform, compute_capability=capability):
        exported = jax.export.export(
          jitted,
          platforms=[platform],
          disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call('__cudnn$fmhaSoftmax'),
            jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2'),
          ],
        )(*SHAPES)
      program = exported.mlir_module()
      if call is None:
        self.assertNotIn('custom_call', program)
      else:
        self.assertRegex(program, f'custom_call @.*({call})')

  def test_what_is_not_dispatched_follows_the_target(self):
    position = np.zeros((1, 2), np.int32)

    def found():
      remainder = jax.make_jaxpr(lambda: rotary.sin_cos(position, 4))()
      return (
        encoder.layer_norm(jnp.float32).use_fast_variance,
        'rem' in str(remainder),
        xla.block_sizes(8, 1024, 1024).key < 1024,
      )

    with ops.target_platform('cpu'):
      self.assertEqual(found(), (True, True, True))
    with ops.target_platform('tpu'):
      self.assertEqual(found(), (False, False, False))

  def test_without_a_target_the_device_decides(self):
    self.assertEqual(
      dispatch.target_of(), devices.Target.of(jax.local_devices()[0])
    )
    with ops.target_platform('tpu'):
      self.assertEqual(dispatch.target_of(np.zeros(2)).platform, 'tpu')
      self.assertFalse(ops.has_cpu_kernel(jnp.float32))

  @parameterized.parameters(
    ('cpu', '', 'bfloat16', 'xla'),
    ('cpu', '', 'float32', 'xla'),
    ('cuda', '8.0', 'bfloat16', 'xla'),
    ('cuda', '9.0', 'bfloat16', 'xla' if ON_HOPPER == 'cudnn' else ON_HOPPER),
    ('tpu', '', 'bfloat16', 'pallas_tpu'),
  )
  def test_serialized_programs_call_what_jax_keeps(
    self, platform, capability, dtype, name
  ):
    shapes = [x.update(dtype=dtype) for x in SHAPES[:3]]
    with (
      ops.target_platform(
        platform, compute_capability=capability, serialized=True
      ),
      dispatch.record() as used,
    ):
      jax.export.export(jax.jit(lambda *x: attend(*x)), platforms=[platform])(
        *shapes, SHAPES[3]
      )  # It refuses what it does not keep.
      self.assertFalse(ops.has_cpu_kernel(jnp.float32))
    self.assertEqual(used, {'history_attention': {name}})

  def test_serialized_programs_refuse_the_others_by_name(self):
    for target, check in (
      (devices.Target('cuda', '9.0', serialized=True), cudnn.check_target),
      (devices.Target('cpu', serialized=True), devices.check_numba),
    ):
      with self.assertRaisesRegex(
        NotImplementedError, 'which jax.export does not guarantee to keep'
      ):
        check(target)
      check(target._replace(serialized=False))

  def test_cudnn_that_is_not_installed_is_not_picked(self):
    with (
      ops.target_platform('cuda', compute_capability='8.0'),
      mock.patch(
        'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version',
        side_effect=RuntimeError('cuDNN is not detected.'),
      ),
      dispatch.record() as used,
    ):
      jax.eval_shape(lambda *x: attend(*x), *SHAPES)
    self.assertEqual(used, {'history_attention': {'xla'}})

  def test_malformed(self):
    with self.assertRaisesRegex(ValueError, "'gpu' is unknown; use one of"):
      with ops.target_platform('gpu'):
        pass
    with self.assertRaisesRegex(ValueError, "'sm_90' must be a number"):
      with ops.target_platform('cuda', compute_capability='sm_90'):
        pass


MOVED = """
import sys

class Gone:
  def find_spec(self, name, path=None, target=None):
    if name.startswith(('jax.experimental.mosaic', 'jaxlib.mlir.dialects.llvm',
                        'jax.experimental.pallas.mosaic_gpu')):
      raise ModuleNotFoundError(f'No module named {name!r}')

sys.meta_path.insert(0, Gone())
import numpy as np
import histjax
from histjax import ops, testing
from histjax.ops import dispatch

schema = histjax.Schema(
  user='user', time='time', item=(histjax.Categorical('item', 9),),
  tasks=(histjax.Task('click'),),
)
encoder = histjax.EncoderConfig(
  num_layers=1, width=8, num_heads=2, candidate_tower='xla'
)
config = histjax.RankerConfig(schema, encoder=encoder)
batch = testing.random_batch(schema, 1, 4, 3)
import jax
variables = jax.jit(histjax.Ranker(config).init)(jax.random.key(0), batch)

scorer = histjax.Scorer(config, variables)
cache = scorer.encode(batch.history)
logits = scorer.score(cache, batch.candidates, batch.context)
assert np.isfinite(logits['click']).all()

query = jax.ShapeDtypeStruct((1, 8, 1, 64), 'bfloat16')
stop = jax.ShapeDtypeStruct((1, 8), 'int32')
with ops.target_platform('cuda', compute_capability='9.0'):
  call = (query, query, query, histjax.KeyRange(stop, stop, 'prefix'))
  print(ops.history_attention_backend(*call))
  try:
    ops.history_attention_backend(*call, implementation='pallas_gpu')
  except NotImplementedError as error:
    print(error)
"""


class MovedInternalsTest(absltest.TestCase):
  def test_only_the_kernel_is_lost(self):
    result = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(MOVED)],
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    picked, error = result.stdout.strip().splitlines()
    self.assertIn(picked, ('xla', 'cudnn'))  # If cuDNN is installed.
    self.assertRegex(error, 'pallas_gpu cannot be imported with JAX .*: No mod')


if __name__ == '__main__':
  absltest.main()
