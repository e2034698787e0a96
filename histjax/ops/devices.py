"""What programs are made for, and which kernels run there."""

from __future__ import annotations

import platform
from typing import NamedTuple

import jax

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
"""Platforms with a choice of their own, by their names in `jax.export`."""

_MAKERS = {'cuda': 'cuda', 'rocm': 'rocm', 'nvidia': 'cuda', 'amd': 'rocm'}


class Target(NamedTuple):
  """What a program will run on, attached to this machine or not.

  Attributes:
    platform: one of `PLATFORMS`, or what JAX calls another.
    compute_capability: of an NVIDIA GPU, as '9.0'; '' if it is not known.
    kind: for messages.
    serialized: the program is for other processes and other versions of JAX,
      so it may call only what `jax.export` guarantees to keep.
  """

  platform: str
  compute_capability: str = ''
  kind: str = ''
  serialized: bool = False

  @classmethod
  def of(cls, device: jax.Device) -> Target:
    """That of a device, of a topology's as well."""
    name = device.platform
    if name == 'gpu':
      # A topology's client does not say what made it, its devices do.
      said = f'{device.client.platform_version}\n{device.device_kind}'.lower()
      name = next((p for word, p in _MAKERS.items() if word in said), name)
    capability = getattr(device, 'compute_capability', '')
    return cls(name, str(capability), device.device_kind)

  def __str__(self):
    return self.kind or self.platform


def check_not_serialized(target: Target, backend: str, calls: str) -> None:
  """Raises NotImplementedError if the program must outlive this process.

  Args:
    target: to run on.
    backend: that cannot be kept.
    calls: what it calls, for the message.
  """
  if target.serialized:
    raise NotImplementedError(
      f'{backend} calls {calls}, which jax.export does not guarantee to keep; '
      'export with another implementation'
    )


def check_cuda(target: Target, backend: str, capability: float) -> None:
  """Raises NotImplementedError unless it is an NVIDIA GPU, new enough.

  Args:
    target: to run on.
    backend: whose kernels, for the message.
    capability: the least compute capability.
  """
  if target.platform != 'cuda':
    raise NotImplementedError(
      f'{backend} needs an NVIDIA GPU, not a device of platform '
      f'{target.platform!r}'
    )
  if not target.compute_capability:
    raise NotImplementedError(
      f'{backend} must know the compute capability of the GPU: '
      "target_platform('cuda', compute_capability='9.0')"
    )
  if float(target.compute_capability) < capability:
    raise NotImplementedError(
      f'{backend} needs an NVIDIA GPU of compute capability {capability} or '
      f'newer, and {target} has {target.compute_capability}'
    )


def check_hopper(target: Target) -> None:
  """Raises NotImplementedError unless 'pallas_gpu' runs there."""
  check_cuda(target, 'pallas_gpu', 0)
  if target.compute_capability != '9.0':
    raise NotImplementedError(
      'pallas_gpu is written for NVIDIA Hopper, compute capability 9.0, and '
      f'{target} has {target.compute_capability}'
    )


def check_tpu(target: Target) -> None:
  """Raises NotImplementedError unless 'pallas_tpu' runs there."""
  if target.platform != 'tpu':
    raise NotImplementedError(
      f'pallas_tpu needs a TPU, not a device of platform {target.platform!r}; '
      'to compile for one that is not attached, trace in '
      "histjax.ops.target_platform('tpu')"
    )


def check_numba(target: Target) -> None:
  """Raises NotImplementedError unless 'numba_cpu' runs there."""
  if target.platform != 'cpu':
    raise NotImplementedError(
      f'numba_cpu needs a CPU, not a device of platform {target.platform!r}'
    )
  check_not_serialized(target, 'numba_cpu', 'a function of this process')
  if platform.system() == 'Windows':
    raise NotImplementedError('numba_cpu needs a POSIX system, not Windows')
  try:  # Numba refuses to be imported beside a NumPy that is newer than it.
    import numba  # noqa: F401
  except ImportError as error:
    raise NotImplementedError(
      f"numba_cpu needs Numba: pip install --upgrade 'histjax[cpu]' ({error})"
    ) from error
