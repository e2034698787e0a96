"""Exported models: what they give, where they run, and what is refused."""

import atexit
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import safetensors
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from histjax import config as config_lib
from histjax import features as features_lib
from histjax import scoring
from histjax.models import ranker
from histjax.serving import directory, export
from histjax.serving import load as load_lib
from histjax.types import Candidates, History
from tests import support

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {
  'rows': (3,),
  'events': (8,),
  'candidates': (4,),
  'new_events': (2,),
}
# XLA runs both, one in other sums than the other; logits are of order 1.
TOLERANCE = {'rtol': 1e-5, 'atol': 1e-5}
# What JAX itself installs.
JAX = ('jax', 'jaxlib', 'ml_dtypes', 'numpy', 'opt_einsum', 'scipy')
ISOLATED = """
import importlib.util, runpy, sys

sys.path.append(sys.argv[1])
for name in ('histjax', 'flax', 'absl', 'flatbuffers', 'safetensors'):
  assert importlib.util.find_spec(name) is None, name
sys.argv[1:] = ['--check']
runpy.run_path(sys.path[-1] + '/../model/load.py', run_name='__main__')
found = {name.split('.')[0] for name in sys.modules}
found = found - sys.stdlib_module_names - {'cython_runtime'}
print(*sorted(name for name in found if name[0] != '_'))
print(sys.modules['flatbuffers'].__file__)
"""


def small(**fields):
  return support.config(encoder__num_layers=1, **fields)


@functools.cache
def exported() -> tuple[pathlib.Path, dict, list[str]]:
  """One model in a directory, for all tests; what was logged."""
  folder = pathlib.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, folder)
  config = small()
  _, params = support.init(config)
  lines: list[str] = []
  options = export.ExportConfig('cpu', **SIZES)
  (folder / 'model').mkdir()  # Empty: it is replaced.
  manifest = export.export_model(
    config, params, folder / 'model', options, log=lines.append
  )
  return folder / 'model', manifest, lines


@functools.cache
def model():
  """Of the directory's own loader."""
  folder, _, _ = exported()
  spec = importlib.util.spec_from_file_location('load', folder / 'load.py')
  module = importlib.util.module_from_spec(spec)
  with mock.patch.dict(sys.modules, {'load': module}):
    spec.loader.exec_module(module)
  return module.load(folder)


@functools.cache
def scorer():
  config = small()
  return scoring.Scorer(config, support.init(config)[1])


def requests(num_rows=2, num_events=7, num_candidates=3, seed=0):
  rng = np.random.default_rng(seed)
  schema = support.SCHEMA
  return (
    support.features(rng, schema.history_features, (num_rows, num_events)),
    support.features(rng, schema.item_features, (num_rows, num_candidates)),
    support.features(rng, schema.context, (num_rows,)),
  )


def temporary(case):
  return pathlib.Path(case.enterContext(tempfile.TemporaryDirectory()))


def restamp(folder, name, data):
  """Writes a file with what a forger would write beside it."""
  (folder / name).write_bytes(data)
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  if name != path.name:
    digest = hashlib.sha256(data).hexdigest()
    manifest['files'][name] = [len(data), digest]
    path.write_text(json.dumps(manifest))
  text = f'{directory.sha256(path)}  manifest.json\n'
  (folder / 'manifest.sha256').write_text(text)


class ExportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = temporary(self)

  def copy(self, name='model'):
    return pathlib.Path(
      shutil.copytree(exported()[0], self.folder / name, dirs_exist_ok=True)
    )

  def test_scores_as_the_scorer(self):
    history, candidates, context = requests()
    length = np.asarray([5, 0])
    new = support.features(
      np.random.default_rng(1), support.SCHEMA.history_features, (2, 2)
    )
    count = np.asarray([2, 1])
    cache = model().encode(history, length)
    found = [model().score(cache, candidates, context)]
    longer = model().extend(cache, new, count)
    found.append(model().score(longer, candidates, context))
    found.append(model().score(cache, candidates, context))  # As it was.
    s = scorer()
    wanted = s.encode(History(history, length))
    logits = [s.score(wanted, Candidates(candidates), context)]
    wanted = s.extend(wanted, History(new, count))
    logits.append(s.score(wanted, Candidates(candidates), context))
    logits.append(logits[0])
    for a, b in zip(found, logits, strict=True):
      self.assertEqual(list(a), ['click', 'like'])
      for task in a:
        self.assertEqual(a[task].shape, (2, 3))
        np.testing.assert_allclose(a[task], b[task], **TOLERANCE)

  def test_padding_may_hold_anything(self):
    history, candidates, context = requests()
    length = np.asarray([5, 0])
    cache = model().encode(history, length)
    wanted = model().score(cache, candidates, context)
    wide = {k: np.pad(x, [(0, 0), (0, 9)]) for k, x in history.items()}
    for x in wide.values():
      x[0, 5:] = x[1] = -7 if x.dtype.kind == 'i' else np.nan
    found = model().score(model().encode(wide, length), candidates, context)
    np.testing.assert_array_equal(found['click'], wanted['click'])

  def test_with_jax_and_numpy_alone(self):
    """-I -S: no variables, no site-packages; JAX and what it requires of it."""
    site = self.folder / 'site'
    site.mkdir()
    self.copy()
    for name in JAX:
      found = importlib.util.find_spec(name).submodule_search_locations[0]
      place = pathlib.Path(found)
      (site / name).symlink_to(place)
      libraries = place.with_name(f'{name}.libs')
      if libraries.is_dir():
        (site / libraries.name).symlink_to(libraries)
    done = subprocess.run(
      [sys.executable, '-I', '-S', '-c', ISOLATED, site],
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    *lines, modules, flatbuffers = done.stdout.splitlines()
    number = len(exported()[1]['files']) + 1
    self.assertStartsWith(lines[0], f'{number} files have their checksums')
    self.assertIn('score 3 x 8 x 4: first ', done.stdout)
    self.assertStartsWith(lines[-1], 'ok in ')
    self.assertContainsSubset(modules.split(), {*JAX, 'flatbuffers'})
    self.assertIn('/model/flatbuffers.zip/', flatbuffers)

  def test_what_is_in_it(self):
    folder, manifest, lines = exported()
    names = {
      'encode-3x8.jax', 'extend-3x8x2.jax', 'score-3x8x4.jax', 'prepare.jax',
      'parameters.safetensors', 'golden.safetensors', 'config.json',
      'features.npz', 'load.py', 'flatbuffers.zip',
    }  # fmt: skip
    self.assertEqual(set(manifest['files']), names)
    names |= {'manifest.json', 'manifest.sha256'}
    self.assertEqual({x.name for x in folder.iterdir()}, names)
    self.assertEqual(
      json.loads((folder / 'manifest.json').read_text()), manifest
    )
    self.assertEqual(manifest['versions']['jax'], jax.__version__)
    self.assertIn('6 months later', manifest['stability'])
    self.assertEqual(manifest['model'], scorer().fingerprint)
    # NumPy callbacks and FFI targets are not kept by JAX.
    self.assertEqual(set(map(tuple, manifest['custom_calls'].values())), {()})
    backends = manifest['implementations']['score-3x8x4']
    self.assertEqual(backends['candidate_tower'], 'xla')
    params = safetensors_numpy.load_file(folder / 'parameters.safetensors')
    np.testing.assert_array_equal(
      params['tables/item'],
      support.init(small())[1]['tables']['item'],
    )
    config = json.loads((folder / 'config.json').read_text())
    self.assertEqual(
      config_lib.from_dict(ranker.RankerConfig, config['model']), small()
    )
    self.assertEqual(features_lib.load(folder).configs, ())
    self.assertIn('golden outputs', lines)
    self.assertIn("extend runs {'history_attention': 'xla'}", lines)
    self.assertTrue(any(x.startswith('score 3 x 8 x 4') for x in lines))
    self.assertEqual(list(folder.parent.iterdir()), [folder])

  def test_it_tells_nothing_of_this_machine(self):
    folder, _, _ = exported()
    for path in folder.iterdir():
      data = path.read_bytes()
      for place in (ROOT, jax.__file__, sys.prefix, tempfile.gettempdir()):
        self.assertNotIn(f'{pathlib.Path(place)}/'.encode(), data, path.name)

  def test_damage_is_refused(self):
    """A byte changed, a byte missing or all of the file, in each."""
    folder = self.copy()
    for path in sorted(folder.iterdir()):
      data = path.read_bytes()
      middle = len(data) // 2
      changed = bytearray(data)
      changed[middle] ^= 1
      for damage in (changed, data[:-1], data + b'\n', b'', None):
        with self.subTest(name=path.name, size=damage and len(damage)):
          path.unlink()
          if damage is not None:
            path.write_bytes(damage)
          with self.assertRaisesRegex(ValueError, path.name):
            load_lib.load(folder)
          path.write_bytes(data)
    load_lib.load(folder)

  def test_damage_is_told_without_a_traceback(self):
    folder = self.copy()
    (folder / 'golden.safetensors').unlink()
    done = subprocess.run(
      [sys.executable, folder / 'load.py', '--check'],
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 1)
    self.assertIn('golden.safetensors has 0 bytes, or is missing', done.stderr)
    self.assertNotIn('Traceback', done.stderr)

  def test_a_forged_directory_is_refused_by_its_digest(self):
    folder = self.copy()
    digest = directory.sha256(folder / 'manifest.json')
    load_lib.load(folder, digest)
    restamp(folder, 'load.py', b'# Mine.\n')
    load_lib.load(folder)
    with self.assertRaisesRegex(ValueError, 'manifest.json has SHA-256'):
      load_lib.load(folder, digest)

  def test_no_file_outside_is_opened(self):
    folder = self.copy()
    manifest = json.loads((folder / 'manifest.json').read_text())
    for name in ('../outside', '/etc/passwd', '..'):
      manifest['files'][name] = [1, '0' * 64]
      restamp(folder, 'manifest.json', json.dumps(manifest).encode())
      with self.assertRaisesRegex(ValueError, f'names {name!r}, which is not'):
        load_lib.load(folder)
      del manifest['files'][name]

  def test_sizes_are_bounded_before_memory_is_taken(self):
    folder = self.copy()
    with open(folder / 'manifest.json', 'ab') as file:
      file.truncate(2**40)  # A hole.
    with self.assertRaisesRegex(ValueError, 'manifest.json has 1099511627776'):
      load_lib.load(folder)
    for data in (
      (2**62).to_bytes(8, 'little') + b'{}',
      (2**24).to_bytes(8, 'little') + b'{}',
    ):
      files = {'x.safetensors': np.frombuffer(data, np.uint8)}
      with self.assertRaisesRegex(ValueError, 'x.safetensors has a header of'):
        load_lib._tensors(files, 'x.safetensors')

  def test_a_wrong_golden_output_is_found(self):
    folder = self.copy()
    golden = safetensors_numpy.load_file(folder / 'golden.safetensors')
    golden['8/logits/like'] += 0.01
    restamp(folder, 'golden.safetensors', safetensors_numpy.save(golden))
    with self.assertRaisesRegex(ValueError, "logits of 'like' are off by 0.0"):
      load_lib.check(folder, lambda line: None)

  @parameterized.parameters(
    ('history', 'item', lambda x: x + 40, 'is not ids in \\[0, 40\\)'),
    ('history', 'item', lambda x: x - 40, 'is not ids in \\[0, 40\\)'),
    ('history', 'item', lambda x: x * 1.0, 'is float64 .*expected integers'),
    ('history', 'item', lambda x: x[:1], 'expected integers \\(2, 7\\)'),
    ('history', 'duration', lambda x: x * np.nan, 'nan is not finite float32'),
    (
      'history',
      'duration',
      lambda x: x.astype(float) * 1e300,
      'inf is not finite float32',
    ),
    ('history', 'other', lambda x: 0, "'other'.* are not "),
    ('candidates', 'item', lambda x: x + 40, 'is not ids in \\[0, 40\\)'),
    ('candidates', 'tag_0', lambda x: x[:, :2], 'expected integers \\(2, 3\\)'),
    ('context', 'user', lambda x: x - 50, 'is not ids in \\[0, 50\\)'),
    ('context', 'age', lambda x: np.full(2, np.inf), 'not finite float32'),
    ('context', 'age', lambda x: np.full(3, 1.0), 'expected floats \\(2,\\)'),
    ('length', '', lambda x: x - 9, '-2 is not ids in'),
    ('length', '', lambda x: x + 1, 'do not hold'),
    ('length', '', lambda x: x + 2, '9 events are beyond the exported'),
    ('length', '', lambda x: x * 1.0, 'length is float64'),
    ('length', '', lambda x: x[:1], 'expected integers \\(1, 7\\)'),
    ('count', '', lambda x: x - 2, '-1 is not ids in'),
    ('count', '', lambda x: x + 2, '3 new_events are beyond the exported'),
    ('count', '', lambda x: x[:1], '1 rows, and 2 in the cache'),
  )
  def test_malformed(self, part, name, change, message):
    history, candidates, context = requests()
    given = {
      'history': history,
      'candidates': candidates,
      'context': context,
      'length': np.asarray([7, 4]),
      'count': np.asarray([1, 1]),
    }
    cache = model().encode(history, np.asarray([5, 0]))
    late = {k: x[:, :2] for k, x in history.items()}
    if name:
      given[part] = given[part] | {name: change(given[part].get(name))}
    else:
      given[part] = change(given[part])
    with self.assertRaisesRegex(ValueError, message):
      if part in ('history', 'length'):
        model().encode(given['history'], given['length'])
      elif part == 'count':
        model().extend(cache, late, given['count'])
      else:
        model().score(cache, given['candidates'], given['context'])

  def test_what_does_not_fit_is_refused(self):
    history, candidates, context = requests()
    cache = model().encode(history, np.asarray([7, 4]))
    late = {k: x[:, :2] for k, x in history.items()}
    with self.assertRaisesRegex(ValueError, '9 events are beyond .*--events'):
      model().extend(cache, late, np.asarray([2, 0]))
    with self.assertRaisesRegex(ValueError, '5 candidates are beyond'):
      model().score(cache, requests(2, 7, 5)[1], context)
    with self.assertRaisesRegex(ValueError, '4 rows are beyond'):
      model().encode(requests(4)[0], np.asarray([7, 4, 1, 1]))
    with self.assertRaisesRegex(ValueError, 'candidates are .*; expected'):
      model().score(cache, {}, context)
    with self.assertRaisesRegex(ValueError, 'is of another model'):
      model().score(cache._replace(model='0' * 64), candidates, context)
    with self.assertRaisesRegex(ValueError, '1 rows, and 2 in the cache'):
      model().score(cache, requests(1)[1], requests(1)[2])


class OutputTest(parameterized.TestCase):
  """What is left, where it cannot be written."""

  def setUp(self):
    super().setUp()
    self.folder = temporary(self)

  def test_what_is_there_is_kept(self):
    full = self.folder / 'full'
    full.mkdir()
    (full / 'mine').write_text('mine')
    (self.folder / 'link').symlink_to('nowhere')
    config = small()
    for name, message in (
      ('full', 'is there and no empty directory'),
      ('full/mine', 'is there and no empty directory'),
      ('link', 'is there and no empty directory'),
      ('absent/model', 'there is no directory'),
    ):
      with self.assertRaisesRegex(ValueError, message):  # Before any work.
        export.export_model(
          config, {}, self.folder / name, export.ExportConfig()
        )
      with self.assertRaisesRegex(ValueError, message):
        export.export_workdir(
          self.folder, self.folder / name, export.ExportConfig()
        )
    self.assertEqual((full / 'mine').read_text(), 'mine')

  @parameterized.parameters(
    OSError(errno.ENOSPC, 'No space left on device'),
    safetensors.SafetensorError('I/O error: No space left on device'),
  )
  def test_a_full_disk_leaves_nothing(self, error):
    output = self.folder / 'model'

    def write(folder):
      (folder / 'one').write_text('one')
      self.assertEqual(folder.parent, self.folder)
      raise error

    with self.assertRaisesRegex(
      OSError, "model' cannot be written, nothing is left.*No space left"
    ):
      directory.write_whole(output, write)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_full_disk_at_the_end_leaves_nothing(self):
    full = OSError(errno.ENOSPC, 'No space left on device')
    with (
      mock.patch.object(os, 'fsync', side_effect=full),
      self.assertRaisesRegex(OSError, 'No space left on device') as caught,
    ):
      directory.write_whole(
        self.folder / 'model', lambda folder: (folder / 'one').write_text('1')
      )
    self.assertEqual(caught.exception.errno, errno.ENOSPC)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_another_error_leaves_nothing(self):
    def write(folder):
      (folder / 'one').write_text('one')
      raise ValueError('logits are off')

    with self.assertRaisesRegex(ValueError, 'logits are off'):
      directory.write_whole(self.folder / 'model', write)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_directory_that_came_meanwhile_is_kept(self):
    output = self.folder / 'model'

    def write(folder):
      (folder / 'one').write_text('one')
      output.mkdir()
      (output / 'mine').write_text('mine')

    with self.assertRaisesRegex(OSError, 'cannot be written'):
      directory.write_whole(output, write)
    self.assertEqual(
      [x.name for x in self.folder.rglob('*')], ['model', 'mine']
    )


class PlatformTest(parameterized.TestCase):
  """From this machine, which has none of them."""

  def setUp(self):
    super().setUp()
    self.folder = temporary(self)

  def export(self, platform, config, **options):
    _, params = support.init(config)
    found = self.folder / platform
    options = {**SIZES, **options}
    manifest = export.export_model(
      config, params, found, export.ExportConfig(platform, **options)
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
    history, _, _ = requests()
    with self.assertRaisesRegex(
      ValueError, f'exported for {platform} {hopper}, and this is cpu'
    ):
      load_lib.load(found).encode(history, np.asarray([1, 2]))

  def test_a_named_implementation_that_cannot_be_kept(self):
    config = small(encoder__candidate_tower='numba_cpu')
    with self.assertRaisesRegex(NotImplementedError, 'numba_cpu.*repick=True'):
      self.export('cpu', config)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_bidirectional_history_is_not_extended(self):
    config = small(encoder__causal=False)
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
    config = dataclasses.replace(small(), fusion='concat')
    with self.assertRaisesRegex(ValueError, "fusion='concat' cannot score"):
      export.export_model(config, {}, self.folder / 'x', export.ExportConfig())

  def test_repick(self):
    config = small(
      encoder__candidate_tower='numba_cpu', encoder__attention='reference'
    )
    picked = export._without_names(config)
    self.assertEqual(picked, small())


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
