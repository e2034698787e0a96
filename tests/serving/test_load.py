"""The loader of exported models: what it gives, and what it refuses."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from histjax.serving import directory, exported
from histjax.serving import load as load_lib
from histjax.types import Candidates, History
from tests.serving import exports

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
# Loads by a relative path, and deserializes when the folder is gone.
MOVED = """
import os, runpy, shutil, sys

sys.path.append(sys.argv[1])
model = runpy.run_path('model/load.py')['load']('model')
shutil.rmtree('model')
os.chdir('/')
names = [x for x in model._files if x.endswith('.jax')]
print('programs', sum(bool(model._program(x[:-4])) for x in names))
"""


def flat(given):
  return {k: x[:, 0] for k, x in given.items()}


class LoadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = exports.temporary(self)

  def copy(self, name='model'):
    return pathlib.Path(
      shutil.copytree(
        exports.exported()[0], self.folder / name, dirs_exist_ok=True
      )
    )

  @hypothesis.given(
    length=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    new=st.integers(0, 2),
    num_candidates=st.integers(1, 4),
    seed=st.integers(0, 9),
  )
  def test_scores_as_the_scorer(self, length, new, num_candidates, seed):
    """Of the history, of the longer one, and again of the first."""
    rows = len(length)
    length = np.asarray(length)
    count = np.minimum(new, np.arange(rows) + new % 2)
    history, candidates, context = exports.requests(
      rows, 6, num_candidates, seed
    )
    late, _, _ = exports.requests(rows, 2, 1, seed + 1)
    s, model = exports.scorer(), exports.model()
    cache = model.encode(history, length)
    longer = model.extend(cache, late, count)
    wanted = s.encode(History(history, length))
    extended = s.extend(wanted, History(late, count), donate=False)
    for mine, its in ((cache, wanted), (longer, extended), (cache, wanted)):
      found = model.score(mine, candidates, context)
      logits = s.score(its, Candidates(candidates), context)
      self.assertEqual(list(found), ['click', 'like'])
      for task, x in found.items():
        self.assertEqual(x.shape, (rows, num_candidates))
        np.testing.assert_allclose(x, logits[task], **TOLERANCE)

  def test_padding_may_hold_anything(self):
    history, candidates, context = exports.requests()
    length = np.asarray([5, 0])
    cache = exports.model().encode(history, length)
    wanted = exports.model().score(cache, candidates, context)
    wide = {k: np.pad(x, [(0, 0), (0, 9)]) for k, x in history.items()}
    for x in wide.values():
      x[0, 5:] = x[1] = -7 if x.dtype.kind == 'i' else np.nan
    found = exports.model().score(
      exports.model().encode(wide, length), candidates, context
    )
    np.testing.assert_array_equal(found['click'], wanted['click'])

  def alone(self, script):
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
      [sys.executable, '-I', '-S', '-c', script, site],
      capture_output=True,
      text=True,
      check=False,
      cwd=self.folder,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    return done.stdout

  def test_with_jax_and_numpy_alone(self):
    said = self.alone(ISOLATED)
    *lines, modules, flatbuffers = said.splitlines()
    number = len(exports.exported()[1]['files']) + 1
    self.assertStartsWith(lines[0], f'{number} files have their checksums')
    self.assertIn('score 3 x 8 x 4: first ', said)
    self.assertStartsWith(lines[-1], 'ok in ')
    self.assertContainsSubset(modules.split(), {*JAX, 'flatbuffers'})
    self.assertIn('/model/flatbuffers.zip/', flatbuffers)

  def test_a_folder_is_not_needed_once_it_is_loaded(self):
    self.assertIn('programs 4', self.alone(MOVED))
    self.assertFalse((self.folder / 'model').exists())

  def test_a_directory_that_is_overwritten_while_it_serves(self):
    folder = self.copy()
    model = load_lib.load(folder)
    wanted = {name: bytes(data) for name, data in model._files.items()}
    for path in folder.iterdir():
      path.write_bytes(bytes(path.stat().st_size))
    for name, data in model._files.items():
      self.assertEqual(bytes(data), wanted[name])

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
    link = folder.with_name('check')
    link.symlink_to(folder / 'load.py')  # It is of where the file is.
    done = subprocess.run(
      [sys.executable, link, '--check'],
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
    exports.restamp(folder, 'load.py', b'# Mine.\n')
    load_lib.load(folder)
    with self.assertRaisesRegex(ValueError, 'manifest.json has SHA-256'):
      load_lib.load(folder, digest)

  def test_an_older_directory(self):
    folder = self.copy()
    manifest = json.loads((folder / 'manifest.json').read_text())
    del manifest['files']['exported.py']
    exports.restamp(folder, 'manifest.json', json.dumps(manifest).encode())
    with self.assertRaisesRegex(
      ValueError, 'names no exported.py; use its own'
    ):
      load_lib.load(folder)

  def test_models_share_what_they_run(self):
    """So that a cache of one is a cache of the other."""
    other = load_lib.load(self.copy())
    history, candidates, context = exports.requests()
    cache = exports.model().encode(history, np.asarray([5, 0]))
    found = other.score(cache, candidates, context)
    wanted = exports.model().score(cache, candidates, context)
    np.testing.assert_array_equal(found['click'], wanted['click'])

  def test_no_file_outside_is_opened(self):
    folder = self.copy()
    manifest = json.loads((folder / 'manifest.json').read_text())
    for name in ('../outside', '/etc/passwd', '..'):
      manifest['files'][name] = [1, '0' * 64]
      exports.restamp(folder, 'manifest.json', json.dumps(manifest).encode())
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
        exported._tensors(files, 'x.safetensors')

  def test_a_wrong_golden_output_is_found(self):
    folder = self.copy()
    golden = safetensors_numpy.load_file(folder / 'golden.safetensors')
    golden['8/logits/like'] += 0.01
    exports.restamp(
      folder, 'golden.safetensors', safetensors_numpy.save(golden)
    )
    with self.assertRaisesRegex(ValueError, "logits of 'like' are off by 0.0"):
      load_lib.check(folder, lambda line: None)

  @parameterized.parameters(
    ('history', 'item', lambda x: x + 40, 'is not ids in \\[0, 40\\)'),
    ('history', 'item', lambda x: x - 40, 'is not ids in \\[0, 40\\)'),
    ('history', 'item', lambda x: x * 1.0, 'is float64 .*expected integers'),
    ('history', 'item', lambda x: x[:1], 'expected integers \\(2, 7\\)'),
    (
      'history',
      'duration',
      lambda x: x * np.nan,
      r'nan is not in \[-1e\+08, 1e\+08\]',
    ),
    (
      'history',
      'duration',
      lambda x: x.astype(float) * 1e300,
      r'inf is not in \[-1e\+08',
    ),
    ('history', 'other', lambda x: 0, "'other'.* are not "),
    ('history', '', lambda x: None, 'history is a NoneType; expected a dict'),
    ('history', '', flat, r'arrays of \(2,\); expected'),
    ('history', 'tag_0', lambda x: x[:, 0], r'is int32 \(2,\); expected'),
    (
      'history',
      'tag_0',
      lambda x: x[..., None],
      r'int32 \(2, 7, 1\)',
    ),
    ('history', 'item', lambda x: [[1], [1, 2]], r"\['item'\] is no array"),
    (
      'history',
      'item',
      lambda x: np.ma.masked_less(x, 40),
      'has masked values',
    ),
    ('candidates', '', lambda x: None, 'candidates is a NoneType'),
    ('candidates', '', flat, r'arrays of \(2,\); expected'),
    ('context', '', lambda x: None, 'context is a NoneType; expected a dict'),
    ('candidates', 'item', lambda x: x + 40, 'is not ids in \\[0, 40\\)'),
    ('candidates', 'duration', lambda x: 0 * x + 1.1e8, 'is not in .-1e.08,'),
    ('candidates', 'tag_0', lambda x: x[:, :2], 'expected integers \\(2, 3\\)'),
    ('context', 'user', lambda x: x - 50, 'is not ids in \\[0, 50\\)'),
    ('context', 'age', lambda x: np.full(2, np.inf), 'inf is not in '),
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
    history, candidates, context = exports.requests()
    given = {
      'history': history,
      'candidates': candidates,
      'context': context,
      'length': np.asarray([7, 4]),
      'count': np.asarray([1, 1]),
    }
    cache = exports.model().encode(history, np.asarray([5, 0]))
    late = {k: x[:, :2] for k, x in history.items()}
    if name:
      given[part] = given[part] | {name: change(given[part].get(name))}
    else:
      given[part] = change(given[part])
    with self.assertRaisesRegex(ValueError, message):
      if part in ('history', 'length'):
        exports.model().encode(given['history'], given['length'])
      elif part == 'count':
        exports.model().extend(cache, late, given['count'])
      else:
        exports.model().score(cache, given['candidates'], given['context'])

  def test_what_does_not_fit_is_refused(self):
    history, candidates, context = exports.requests()
    cache = exports.model().encode(history, np.asarray([7, 4]))
    late = {k: x[:, :2] for k, x in history.items()}
    with self.assertRaisesRegex(ValueError, '9 events are beyond .*--events'):
      exports.model().extend(cache, late, np.asarray([2, 0]))
    with self.assertRaisesRegex(ValueError, '5 candidates are beyond'):
      exports.model().score(cache, exports.requests(2, 7, 5)[1], context)
    with self.assertRaisesRegex(ValueError, '4 rows are beyond'):
      exports.model().encode(exports.requests(4)[0], np.asarray([7, 4, 1, 1]))
    with self.assertRaisesRegex(ValueError, r'arrays of \(0,\); expected'):
      exports.model().score(cache, {}, context)
    with self.assertRaisesRegex(ValueError, 'cache is a tuple, not of encode'):
      exports.model().score(tuple(cache), candidates, context)
    with self.assertRaisesRegex(ValueError, 'read-only'):
      cache.length[0] = 0
    with self.assertRaisesRegex(ValueError, 'is of another model'):
      exports.model().score(cache._replace(model='0' * 64), candidates, context)
    with self.assertRaisesRegex(ValueError, '1 rows, and 2 in the cache'):
      exports.model().score(
        cache, exports.requests(1)[1], exports.requests(1)[2]
      )


if __name__ == '__main__':
  absltest.main()
