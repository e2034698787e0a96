"""What the machine is and what it can do, measured in the same run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking.timing import measure

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'numpy',
  'tokamax',
  'torch',
  'triton',
  'nvidia-cudnn-cu13',
  'libtpu',
)
_CLOCKS = (
  'driver_version',
  'clocks.sm',
  'clocks.max.sm',
  'clocks.mem',
  'power.draw',
  'power.limit',
  'temperature.gpu',
)
_EXPONENTIALS = 32  # Of each element, in one pass over memory.


def environment() -> dict[str, Any]:
  """Date, device and versions, to stand beside every measurement."""
  device = jax.devices()[0]
  found = {
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'device': _cpu() if device.platform == 'cpu' else device.device_kind,
    'platform': jax.default_backend(),
    'cpu_count': os.cpu_count(),
    'python': platform.python_version(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def clocks() -> dict[str, str]:
  """Driver, clocks and power of the first NVIDIA GPU; empty without one."""
  query = f'--query-gpu={",".join(_CLOCKS)}'
  output = nvidia_smi(query, '--format=csv,noheader')
  if not output:
    return {}
  return dict(zip(_CLOCKS, output.strip().split(', '), strict=False))


def nvidia_smi(*arguments: str) -> str:
  """What it says of the first NVIDIA GPU; nothing without one."""
  try:
    return subprocess.run(
      ['nvidia-smi', *arguments, '-i', '0'],
      capture_output=True,
      text=True,
      check=True,
      timeout=20,
    ).stdout
  except (OSError, subprocess.SubprocessError):
    return ''


def ceilings(dtype: str) -> dict[str, float]:
  """The rates that bound any program, measured here and now.

  Returns:
    `flops` of a large matrix product of `dtype`, `bytes` read and written by
    a large copy, and `exponentials`, float32, in registers; all a second.
  """
  small = jax.default_backend() == 'cpu'
  x = jnp.ones((2**24 if small else 2**29,), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copied = measure(lambda: copy(x), seconds=0.2)
  y = jnp.linspace(0, 1, 2**20 if small else 2**26, dtype=jnp.float32)

  @jax.jit
  def exponentials(y):
    for _ in range(_EXPONENTIALS):
      y = jnp.exp(-y)
    return y

  raised = measure(lambda: exponentials(y), seconds=0.2)
  return {
    'flops': matmul_ceiling(dtype),
    'bytes': 2 * x.nbytes / copied.low,
    'exponentials': _EXPONENTIALS * y.size / raised.low,
  }


def matmul_ceiling(dtype: str, size: int | None = None) -> float:
  """FLOP/s of a large square matrix product here and now, the 10th percentile.

  Args:
    dtype: of the operands.
    size: of their sides; None: large for the device.
  """
  if size is None:
    size = 1024 if jax.default_backend() == 'cpu' else 8192
  rng = np.random.default_rng(0)  # Random: zeros draw less power on a GPU.
  x = jnp.asarray(rng.normal(size=(size, size)), dtype)
  product = jax.jit(jnp.matmul)
  timing = measure(lambda: product(x, x), seconds=0.2)
  return 2 * size**3 / timing.low


def _cpu() -> str:
  """The processor's name, where the system tells."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor() or 'cpu'
  names = [x.split(':')[1].strip() for x in lines if x.startswith('model name')]
  return f'cpu: {names[0]}' if names else 'cpu'
