"""One setting for the whole suite: fake devices, strict shapes, real data."""

import os
import platform

# Before JAX is imported. The sharding tests want several devices; the suite's
# time is spent compiling, which LLVM's optimizations double.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  '--xla_backend_optimization_level=0 ' + os.environ.get('XLA_FLAGS', '')
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis
import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
hypothesis.settings.register_profile(
  'histjax', deadline=None, derandomize=True, max_examples=15, database=None
)
hypothesis.settings.load_profile('histjax')

collect_ignore = []
if (platform.system(), platform.machine()) != ('Linux', 'x86_64'):
  collect_ignore.append('test_tpu_compile.py')  # There is no libtpu to install.
if 'HISTJAX_DATA_DIR' not in os.environ:
  # Not skipped but not there: without the files there is nothing to test.
  collect_ignore.append('real_data')


def pytest_configure(config):
  del config
  if os.environ.get('CI') and 'HISTJAX_DATA_DIR' not in os.environ:
    raise pytest.UsageError(
      'HISTJAX_DATA_DIR is not set: CI must run the tests on real data. Set '
      'it to a folder with ml-1m/ and KuaiRand-Pure/'
    )
