"""The notebooks' first cell, with which Colab keeps its accelerator."""

import glob
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

REPOSITORY = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / 'colab').glob('*.ipynb'))
ADDRESS = 'git+https://github.com/histjax/histjax'

# What Colab had in August 2026, as googlecolab/backend-info lists it: the first
# with Python 3.13.
COLAB = (
  'jax==0.7.2',
  'jaxlib==0.7.2',
  'flax==0.11.2',
  'numpy==2.1.3',
  'pandas==2.2.3',
  'ipykernel==6.17.1',
  'ipython==7.34.0',
  'requests==2.32.4',
  'setuptools==75.2.0',  # IPython 7 imports it.
)
TPU = ('libtpu==0.0.21.1', 'numba==0.67.0')
NVIDIA = (
  'jax-cuda12-plugin==0.7.2',
  'jax-cuda12-pjrt==0.7.2',
  'numba==0.61.2',
)
CPU = ('numba==0.61.2',)

# What Colab sets. COLAB_TPU_1VM and COLAB_GPU are there, and empty, without.
ON_TPU = {
  'COLAB_GPU': '',
  'COLAB_TPU_1VM': '1',
  'TPU_ACCELERATOR_TYPE': 'v5e-1',
  'TPU_SKIP_MDS_QUERY': '1',
}
ON_NVIDIA = {'COLAB_GPU': '1', 'COLAB_TPU_1VM': ''}
ON_CPU = {'COLAB_GPU': '', 'COLAB_TPU_1VM': ''}


def install_cell(path=NOTEBOOKS[0]):
  cells = nbformat.read(path, as_version=4).cells
  return next(c.source for c in cells if c.cell_type == 'code')


def test_notebooks_share_the_cell():
  assert len({install_cell(path) for path in NOTEBOOKS}) == 1
  assert '%pip install' in install_cell()


# The cell in this process: what it finds, asks pip for and says.


@pytest.fixture
def run(monkeypatch):
  """Runs the cell on a made-up machine; returns what it asked pip for."""

  def run(variables=None, files=(), importable=False):
    for name in list(os.environ):
      if name.startswith(('COLAB_', 'TPU_', 'HISTJAX_SOURCE', 'JAX_PLATF')):
        monkeypatch.delenv(name)
    for name, value in (variables or {}).items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(
      glob, 'glob', lambda p: [f for f in files if pathlib.Path(f).match(p)]
    )
    monkeypatch.setattr(os.path, 'exists', lambda p: p in files)
    if not importable:
      monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    asked = []

    class Shell:
      def run_line_magic(self, name, line):
        asked.append((name, line.format(**cell)))

    cell = {'get_ipython': Shell}
    code = TransformerManager().transform_cell(install_cell())
    try:
      exec(code, cell)
    except (AssertionError, RuntimeError) as error:
      return asked, str(error)
    return asked, None

  return run


def install(extra, source=ADDRESS):
  return [('pip', f'install --quiet "histjax[notebooks,{extra}] @ {source}"')]


@pytest.mark.parametrize(
  ('variables', 'files'),
  [
    (ON_TPU, ()),
    ({'TPU_ACCELERATOR_TYPE': 'v5litepod-8'}, ()),
    ({}, ('/dev/accel0',)),
    ({}, ('/dev/vfio/vfio', '/dev/vfio/0')),
  ],
)
def test_tpu(run, variables, files):
  asked, error = run(variables, files)
  assert asked == install('tpu')
  assert 'has a TPU' in error
  assert f'JAX {jax.__version__} runs on the CPU. Restart' in error


@pytest.mark.parametrize(
  ('variables', 'files'),
  [
    (ON_NVIDIA, ()),
    ({}, ('/dev/nvidiactl', '/dev/nvidia0')),
  ],
)
def test_nvidia(run, variables, files):
  asked, error = run(variables, files)
  assert asked == install('cuda12')
  assert 'has a GPU' in error
  assert 'runs on the CPU. Restart' in error


@pytest.mark.parametrize(
  ('variables', 'files'),
  [
    (ON_CPU, ()),
    # Images for NVIDIA set these also where there is none.
    ({'NVIDIA_VISIBLE_DEVICES': 'all', 'COLAB_GPU': '0'}, ()),
    # The control file of VFIO; an accelerator of another make.
    ({}, ('/dev/vfio/vfio', '/dev/accel/accel0')),
  ],
)
def test_cpu(run, variables, files):
  assert run(variables, files) == (install('cpu'), None)


def test_installs_nothing_where_histjax_is(run):
  assert run(ON_CPU, importable=True) == ([], None)


def test_another_source(run):
  source = {'HISTJAX_SOURCE': 'file:///a/clone'}
  assert run(source) == (install('cpu', 'file:///a/clone'), None)


def test_cpu_on_request(run):
  assert run({**ON_TPU, 'JAX_PLATFORMS': 'cpu'}) == (install('tpu'), None)


@pytest.mark.parametrize('importable', [False, True])
def test_asks_for_a_restart(run, monkeypatch, importable):
  monkeypatch.setattr(jax, '__version__', '0.7.2')
  _, error = run(ON_CPU, importable=importable)  # True: the cell, once more.
  assert error.startswith('jax had been imported before being replaced: resta')


# The cell in Colab's environment.


def interpreter():
  """Colab's Python if this machine has it, else the one of the tests."""
  pyenv = os.environ.get('PYENV_ROOT', pathlib.Path.home() / '.pyenv')
  found = [
    sys.executable if sys.version_info[:2] == (3, 13) else None,
    shutil.which('python3.13'),
    *pathlib.Path(pyenv).glob('versions/3.13.*/bin/python'),
  ]
  for python in filter(None, found):
    command = [python, '-c', 'import ensurepip, sys; print(sys.version)']
    result = subprocess.run(command, capture_output=True, text=True)
    if result.stdout.startswith('3.13'):
      return python
  return sys.executable


@pytest.fixture
def wheel(tmp_path):
  """The checkout, as pip would build it."""
  folder = tmp_path / 'checkout'
  folder.mkdir()
  for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(REPOSITORY / name, folder / name)
  shutil.copytree(REPOSITORY / 'histjax', folder / 'histjax')
  arguments = ['wheel', '--quiet', '--no-deps', f'--wheel-dir={folder}', folder]
  subprocess.run(
    [sys.executable, '-m', 'pip', *arguments], check=True, capture_output=True
  )
  (path,) = folder.glob('*.whl')
  return path


@pytest.fixture
def colab(tmp_path, wheel):
  folder = tmp_path / 'colab'
  yield Colab(folder, wheel)
  shutil.rmtree(folder)  # More than a gigabyte.


def environment(**variables):
  """This process's variables, without those that are about its Python."""
  mine = ('COLAB_', 'JAX_', 'PYTHON', 'TPU_', 'XLA_')
  kept = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
  return {**kept, **variables}


class Colab:
  """An environment with Colab's versions, on a machine that is said to be."""

  def __init__(self, folder, wheel):
    subprocess.run([interpreter(), '-m', 'venv', folder], check=True)
    self.folder = folder
    self._python = folder / 'bin' / 'python'
    self._variables = environment(HISTJAX_SOURCE=wheel.as_uri(), NO_COLOR='1')
    self.pip('install', *COLAB)
    version = self.python(
      '-c', 'import platform as p; print(p.python_version())'
    )
    self._full_version = version.stdout.strip()

  def pip(self, *arguments):
    self.python('-m', 'pip', *arguments)

  def python(self, *arguments, check=True, **variables):
    result = subprocess.run(
      [self._python, *arguments],
      cwd=self.folder,
      env={**self._variables, **variables},
      capture_output=True,
      text=True,
    )
    if check and result.returncode:
      raise AssertionError(result.stdout + result.stderr)
    return result

  def run_cell(self, first='', **variables):
    """Runs the cell in a new kernel; returns the error that ended it."""
    code = (
      f'{first}\nimport sys\n'
      'from IPython.core.interactiveshell import InteractiveShell\n'
      'result = InteractiveShell.instance().run_cell(sys.argv[1])\n'
      'sys.exit(repr(result.error_in_exec or result.error_before_exec))'
    )
    result = self.python('-c', code, install_cell(), check=False, **variables)
    return result.stderr.strip().splitlines()[-1]

  def packages(self):
    """{name: (version, requirements)} of what is installed."""
    code = (
      'import json\nfrom importlib import metadata\n'
      'print(json.dumps({d.name: (d.version, d.requires or [])'
      ' for d in metadata.distributions()}))'
    )
    return json.loads(self.python('-c', code).stdout)

  def assert_fit(self, packages, *roots):
    python_version = '.'.join(self._full_version.split('.')[:2])
    assert_fit(
      packages,
      *roots,
      python_full_version=self._full_version,
      python_version=python_version,
    )

  def resolved(self, **variables):
    """The same, as the cell would leave it: nothing is installed."""
    report = self.folder / 'report.json'
    report.unlink(missing_ok=True)
    dry = {
      'PIP_DRY_RUN': '1',
      'PIP_REPORT': str(report),
      # The pip that installs what builds a package would take these, too. 0
      # is what pip wants to hear for "no isolation".
      'PIP_NO_BUILD_ISOLATION': '0',
    }
    self.run_cell(**dry, **variables)
    found = self.packages()
    for item in json.loads(report.read_text())['install']:
      item = item['metadata']
      found[item['name']] = (item['version'], item.get('requires_dist', []))
    return found


def assert_fit(packages, *roots, **environment):
  """Asserts that what `roots` require is there, in versions that they allow."""
  versions = {name.lower().replace('_', '-'): x for name, x in packages.items()}
  todo = [Requirement(root) for root in roots]
  seen = set()
  while todo:
    requirement = todo.pop()
    name = requirement.name.lower().replace('_', '-')
    assert name in versions, f'{requirement} is missing'
    version, requires = versions[name]
    assert requirement.specifier.contains(version, prereleases=True), (
      f'{requirement} is required, and {version} is there'
    )
    if str(requirement) not in seen:
      seen.add(str(requirement))
      for text in requires:
        inner = Requirement(text)
        extras = requirement.extras or {''}
        if inner.marker is None or any(
          inner.marker.evaluate({**environment, 'extra': extra})
          for extra in extras
        ):
          todo.append(inner)


def test_assert_fit():
  packages = {
    'jax': ('2', ['jaxlib>=2', 'libtpu==5.*; extra == "tpu"']),
    'jaxlib': ('2', []),
    'libtpu': ('5.1', []),
  }
  assert_fit(packages, 'jax[tpu]')
  packages['libtpu'] = ('4.1', [])
  assert_fit(packages, 'jax')
  with pytest.raises(AssertionError, match=r'libtpu.* 4.1 is there'):
    assert_fit(packages, 'jax[tpu]')
  del packages['jaxlib']
  with pytest.raises(AssertionError, match=r'jaxlib.* is missing'):
    assert_fit(packages, 'jax')


@pytest.mark.slow
def test_colab(colab):
  """One environment, as each of the runtimes in turn."""
  colab.pip('install', *CPU)
  after = colab.resolved(**ON_CPU)
  assert after['jax'][0] != '0.7.2'
  assert not [name for name in after if 'libtpu' in name or 'cuda' in name]
  # Numba, which scores on CPUs, refuses a NumPy that is newer than it.
  colab.assert_fit(after, 'histjax[notebooks,cpu]', 'jax', 'flax', 'numba')
  assert after['pandas'][0] == '2.2.3'

  # Resolved, not installed: CUDA's libraries are gigabytes.
  colab.pip('install', *NVIDIA)
  after = colab.resolved(**ON_NVIDIA)
  assert after['jax'][0] != '0.7.2'
  assert not [name for name in after if 'libtpu' in name or 'cuda13' in name]
  assert after['jax-cuda12-pjrt'][0] == after['jax'][0]
  colab.assert_fit(after, 'histjax[notebooks,cuda12]', 'jax[cuda12]', 'flax')

  # Installed, over a JAX that the kernel had imported.
  colab.pip('uninstall', '--yes', 'jax-cuda12-plugin', 'jax-cuda12-pjrt')
  colab.pip('install', *TPU)
  error = colab.run_cell(first='import jax, numpy', **ON_TPU)
  assert error.startswith("RuntimeError('numpy, jax, jaxlib had been imported")
  after = colab.packages()
  assert after['jax'][0] != '0.7.2'
  assert after['libtpu'][0] != '0.0.21.1'
  assert not [name for name in after if 'cuda' in name]
  colab.assert_fit(after, 'histjax[notebooks,tpu]', 'jax[tpu]', 'flax', 'numba')
  colab.pip('check')

  # Restarted. libtpu is tried; a machine without a TPU is told so.
  error = colab.run_cell(**ON_TPU)
  assert error == 'None' or 'this runtime has a TPU, but JAX' in error
  assert colab.run_cell(**ON_TPU, JAX_PLATFORMS='cpu') == 'None'
  assert colab.packages() == after
