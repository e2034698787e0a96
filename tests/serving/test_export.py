"""Exported models: what is in them, and for which platforms."""

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from histjax import config as config_lib
from histjax import features as features_lib
from histjax.models import ranker
from histjax.serving import export
from histjax.serving import load as load_lib
from tests import support
from tests.serving import exports

ROOT = pathlib.Path(__file__).parents[2]


class ExportTest(parameterized.TestCase):
  def test_what_is_in_it(self):
    folder, manifest, lines = exports.exported()
    names = {
      'encode-3x8.jax', 'extend-3x8x2.jax', 'score-3x8x4.jax', 'prepare.jax',
      'parameters.safetensors', 'golden.safetensors', 'config.json',
      'features.npz', 'load.py', 'exported.py', 'flatbuffers.zip',
    }  # fmt: skip
    self.assertEqual(set(manifest['files']), names)
    names |= {'manifest.json', 'manifest.sha256'}
    self.assertEqual({x.name for x in folder.iterdir()}, names)
    self.assertEqual(
      json.loads((folder / 'manifest.json').read_text()), manifest
    )
    self.assertEqual(manifest['versions']['jax'], jax.__version__)
    self.assertIn('6 months later', manifest['stability'])
    self.assertEqual(manifest['model'], exports.scorer().fingerprint)
    # NumPy callbacks and FFI targets are not kept by JAX.
    self.assertEqual(set(map(tuple, manifest['custom_calls'].values())), {()})
    backends = manifest['implementations']['score-3x8x4']
    self.assertEqual(backends['candidate_tower'], 'xla')
    variables = safetensors_numpy.load_file(folder / 'parameters.safetensors')
    np.testing.assert_array_equal(
      variables['tables/tables/item'],
      support.init(support.config())[1]['tables']['tables']['item'],
    )
    config = json.loads((folder / 'config.json').read_text())
    self.assertEqual(
      config_lib.from_dict(ranker.RankerConfig, config['model']),
      support.config(),
    )
    self.assertEqual(features_lib.load(folder).configs, ())
    self.assertIn('golden outputs', lines)
    self.assertIn("extend runs {'history_attention': 'xla'}", lines)
    self.assertTrue(any(x.startswith('score 3 x 8 x 4') for x in lines))
    self.assertEqual(list(folder.parent.iterdir()), [folder])

  def test_it_tells_nothing_of_this_machine(self):
    folder, _, _ = exports.exported()
    for path in folder.iterdir():
      data = path.read_bytes()
      for place in (ROOT, jax.__file__, sys.prefix, tempfile.gettempdir()):
        self.assertNotIn(f'{pathlib.Path(place)}/'.encode(), data, path.name)


class PlatformTest(parameterized.TestCase):
  """From this machine, which has none of them."""

  def setUp(self):
    super().setUp()
    self.folder = exports.temporary(self)

  def export(self, platform, config, **options):
    _, variables = support.init(config)
    found = self.folder / platform
    options = {**exports.SIZES, **options}
    manifest = export.export_model(
      config, variables, found, export.ExportConfig(platform, **options)
    )
    return found, manifest

  @parameterized.parameters(
    ('tpu', 'pallas_tpu', 'tpu_custom_call'),
    ('cuda', 'pallas_gpu', 'mosaic_gpu_v2'),
  )
  def test_kernels_are_in_it(self, platform, name, call):
    config = support.config(
      dtype='bfloat16', encoder__width=128, encoder__num_heads=4
    )
    found, manifest = self.export(platform, config)
    if platform == 'cuda' and jax.__version_info__ < (0, 11):
      name, call = 'xla', None  # There are no kernels for Hopper.
    used = manifest['implementations']
    self.assertEqual(used['score-3x8x4']['candidate_tower'], name)
    for program in ('encode-3x8', 'score-3x8x4', 'extend-3x8x2'):
      data = bytearray((found / f'{program}.jax').read_bytes())
      read = jax.export.deserialize(data)
      self.assertEqual(read.platforms, (platform,))
      if call:
        self.assertIn(f'custom_call @{call}', read.mlir_module())
        self.assertIn(call, manifest['custom_calls'][program])
      else:
        self.assertEmpty(manifest['custom_calls'][program])
    hopper = '9.0' if call == 'mosaic_gpu_v2' else ''
    self.assertEqual(manifest['compute_capability'], hopper)
    history, _, _ = exports.requests()
    with self.assertRaisesRegex(
      ValueError, f'exported for {platform} {hopper}, and this is cpu'
    ):
      load_lib.load(found).encode(history, np.asarray([1, 2]))

  def test_a_named_implementation_that_cannot_be_kept(self):
    config = support.config(encoder__candidate_tower='numba_cpu')
    with self.assertRaisesRegex(NotImplementedError, 'numba_cpu.*repick=True'):
      self.export('cpu', config)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_bidirectional_history_is_not_extended(self):
    config = support.config(encoder__causal=False)
    found, manifest = self.export(
      'tpu', config, new_events=None, candidates=(4,)
    )
    self.assertFalse((found / 'extend-3x8x2.jax').exists())
    self.assertEqual(manifest['sizes']['new_events'], [])
    with self.assertRaisesRegex(ValueError, 'encoder.causal=False'):
      export.export_model(
        config, {}, self.folder / 'x', export.ExportConfig(new_events=(1,))
      )

  def test_a_fusion_that_cannot_be_cached(self):
    config = dataclasses.replace(support.config(), fusion='concat')
    with self.assertRaisesRegex(ValueError, "fusion='concat' cannot score"):
      export.export_model(config, {}, self.folder / 'x', export.ExportConfig())

  def test_repick(self):
    config = support.config(
      encoder__candidate_tower='numba_cpu', encoder__attention='reference'
    )
    picked = export._without_names(config)
    self.assertEqual(picked, support.config())


class OptionsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'platform': 'rocm'}, "platform='rocm' must be"),
    ({'rows': ()}, 'rows=\\(\\) must name at least one'),
    ({'events': (8, 4)}, 'events=\\(8, 4\\) must be positive and strictly'),
    ({'candidates': (0,)}, 'candidates=\\(0,\\) must be positive'),
    ({'events': (8,), 'new_events': (16,)}, 'must be at most the smallest'),
    ({'candidates': (1500,)}, '1500 is beyond microbatch=1024 and no multiple'),
    ({'microbatch': 0}, 'microbatch=0 must be at least 1'),
    ({'compute_capability': '9.0'}, "with platform='cpu'"),
    ({'platform': 'cuda', 'compute_capability': 'sm_90'}, "must be as '9.0'"),
  )
  def test_malformed(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      export.ExportConfig(**fields)

  def test_hopper_unless_told_otherwise(self):
    self.assertEqual(export.ExportConfig('cuda').compute_capability, '9.0')
    any_gpu = export.ExportConfig('cuda', compute_capability='')
    self.assertEqual(any_gpu.compute_capability, '')
    self.assertEqual(export.ExportConfig('tpu').compute_capability, '')


if __name__ == '__main__':
  absltest.main()
