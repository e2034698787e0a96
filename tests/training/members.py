"""Starts several processes that train together; see `member`."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax

from tests import children

HOST = socket.gethostname()
ROOT = pathlib.Path(__file__).parents[2]


def free_address():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return f'localhost:{s.getsockname()[1]}'


def environment(devices):
  """With which programs are compiled as in this process, and once."""
  flags = os.environ['XLA_FLAGS']
  flags = flags.replace('device_count=8', f'device_count={devices}')
  if jax.__version__.startswith('0.10.'):  # As conftest.py.
    flags += ' --xla_cpu_use_fusion_emitters=false'
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flags,
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
    'PYTHONPATH': str(ROOT),
  }


def start_each(workdirs, changes, *, devices=1, faults=None):
  """Starts a process for each workdir and changes of the config.

  Args:
    workdirs: one a process.
    changes: likewise.
    devices: of each.
    faults: of some, by their number; see `member`.
  """
  address = free_address()
  return [
    children.start(
      [
        *(sys.executable, '-m', 'tests.training.member', address),
        *(str(len(workdirs)), str(index), str(devices), str(workdir)),
        json.dumps(changed),
        json.dumps((faults or {}).get(index, {})),
      ],
      cwd=ROOT,
      env=environment(devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, (workdir, changed) in enumerate(
      zip(workdirs, changes, strict=True)
    )
  ]


def start(workdir, *, count=2, devices=1, faults=None, **changes):
  """Starts processes of one run."""
  return start_each(
    [workdir] * count, [changes] * count, devices=devices, faults=faults
  )


def run(workdir, **kwargs):
  """Runs to the end: `[(result, stdout)]` of each process."""
  processes = start(workdir, **kwargs)
  outputs = [p.communicate() for p in processes]
  for process, (_, stderr) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, stderr
  return [
    (json.loads(stdout.rpartition('RESULT ')[2]), stdout)
    for stdout, _ in outputs
  ]
