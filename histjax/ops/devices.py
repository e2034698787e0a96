"""Which devices the kernels run on."""

from __future__ import annotations

import platform

import jax


def check_cuda(device: jax.Device, backend: str, capability: float) -> None:
  """Raises NotImplementedError unless `device` is an NVIDIA GPU, new enough.

  Args:
    device: to run on.
    backend: whose kernels, for the message.
    capability: the least compute capability.
  """
  if 'cuda' not in device.client.platform_version.lower():
    raise NotImplementedError(
      f'{backend} needs an NVIDIA GPU, not a device of platform '
      f'{device.platform!r}'
    )
  if float(device.compute_capability) < capability:
    raise NotImplementedError(
      f'{backend} needs an NVIDIA GPU of compute capability {capability} or '
      f'newer, and {device.device_kind} has {device.compute_capability}'
    )


def check_hopper(device: jax.Device) -> None:
  """Raises NotImplementedError unless 'pallas_gpu' runs on `device`."""
  check_cuda(device, 'pallas_gpu', 0)
  if device.compute_capability != '9.0':
    raise NotImplementedError(
      'pallas_gpu is written for NVIDIA Hopper, compute capability 9.0, and '
      f'{device.device_kind} has {device.compute_capability}'
    )


def check_tpu(device: jax.Device) -> None:
  """Raises NotImplementedError unless 'pallas_tpu' runs on `device`."""
  if device.platform != 'tpu':
    raise NotImplementedError(
      f'pallas_tpu needs a TPU, not a device of platform {device.platform!r}; '
      'to compile for one that is not attached, make it the default: '
      'jax.default_device(jax.experimental.topologies.get_topology_desc('
      "'v5e:2x2', platform='tpu').devices[0])"
    )


def check_numba(device: jax.Device) -> None:
  """Raises NotImplementedError unless 'numba_cpu' runs on `device`."""
  if device.platform != 'cpu':
    raise NotImplementedError(
      f'numba_cpu needs a CPU, not a device of platform {device.platform!r}'
    )
  if platform.system() == 'Windows':
    raise NotImplementedError('numba_cpu needs a POSIX system, not Windows')
  try:  # Numba refuses to be imported beside a NumPy that is newer than it.
    import numba  # noqa: F401
  except ImportError as error:
    raise NotImplementedError(
      f"numba_cpu needs Numba: pip install --upgrade 'histjax[cpu]' ({error})"
    ) from error
