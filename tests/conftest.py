"""One setting for the whole suite: fake devices, strict shapes, real data.

`HISTJAX_TEST_XLA=default` compiles as JAX does for a user, which takes two
to three times as long; see `make test-all`.
"""

import os
import pathlib
import platform
import random
import shutil

from jaxlib import version

# Before JAX is imported. The sharding tests want several devices; the suite's
# time is spent compiling, which LLVM's optimizations double, as do XLA's
# emitters of fusions, which the newest JAX cannot be told to leave out.
_XLA = os.environ.get('HISTJAX_TEST_XLA', 'fast')
_PLATFORM = os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  + {
    'fast': '--xla_backend_optimization_level=0 '
    + '--xla_cpu_use_fusion_emitters=false '
    * (version.__version__.startswith('0.10.') and _PLATFORM == 'cpu'),
    'default': '',
  }[_XLA]
  + os.environ.get('XLA_FLAGS', '')
)

import hypothesis
import jax
import pytest

from tests import children

jax.devices()  # Reads the flags, once. libtpu ends a process at CPUs' flags.
os.environ['XLA_FLAGS'] = ' '.join(
  f for f in os.environ['XLA_FLAGS'].split() if not f.startswith('--xla_cpu_')
)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# However busy the machine is.
_COMMON = {
  'deadline': None,
  'suppress_health_check': [hypothesis.HealthCheck.too_slow],
  'database': None,
}
# The same examples in every run.
hypothesis.settings.register_profile(
  'histjax', derandomize=True, max_examples=15, **_COMMON
)
# Others in every run; its seed is printed.
hypothesis.settings.register_profile(
  'random',
  max_examples=12 if _XLA == 'fast' else 10,
  print_blob=True,
  **_COMMON,
)
hypothesis.settings.load_profile('histjax')

collect_ignore = []
if (platform.system(), platform.machine()) != ('Linux', 'x86_64'):
  collect_ignore.append('test_tpu_compile.py')  # There is no libtpu to install.
if shutil.which('chromium') is None:
  collect_ignore.append('serving/test_page.py')  # There is nothing to show it.
if 'HISTJAX_DATA_DIR' not in os.environ:
  # Not skipped but not there: without the files there is nothing to test.
  collect_ignore.append('real_data')


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
  if os.environ.get('CI') and 'HISTJAX_DATA_DIR' not in os.environ:
    raise pytest.UsageError(
      'HISTJAX_DATA_DIR is not set: CI must run the tests on real data. Set '
      'it to a folder with ml-1m/ and KuaiRand-Pure/'
    )
  if os.environ.get('CI') and shutil.which('chromium') is None:
    raise pytest.UsageError(
      'chromium is not installed: CI must run the tests of the page'
    )
  _share_compilations(config)
  options = config.option
  if options.hypothesis_profile == 'random' and options.hypothesis_seed is None:
    # Here, so that all workers of pytest-xdist have the same.
    options.hypothesis_seed = random.SystemRandom().randrange(1 << 32)


def _share_compilations(config):
  """What one test compiled, no other test, process or run compiles again."""
  folder = pathlib.Path(config.rootpath) / '.pytest_cache' / 'jax'
  folder = os.environ.get('JAX_COMPILATION_CACHE_DIR', str(folder))
  for name, value in {
    'jax_compilation_cache_dir': folder,
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': 0,
  }.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # Of processes that tests start.


def pytest_terminal_summary(terminalreporter, config):
  seed = config.option.hypothesis_seed
  if seed is not None:
    terminalreporter.write_line(
      f'Random examples: --hypothesis-profile=random --hypothesis-seed={seed} '
      'gives the same.'
    )


@pytest.fixture(autouse=True)
def _end_processes():
  """Of a test that failed; they would be warnings in another one."""
  yield
  children.end()


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
  """A worker would keep gigabytes of compiled programs that nobody calls."""
  yield
  jax.clear_caches()
