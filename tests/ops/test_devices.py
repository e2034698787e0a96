"""Which devices the kernels run on."""

import sys
import types
from unittest import mock

from absl.testing import absltest

from histjax.ops import devices
from histjax.ops.history_attention import cudnn


def device(version, capability='', platform='gpu', kind='a GPU'):
  return devices.Target.of(
    types.SimpleNamespace(
      client=types.SimpleNamespace(platform_version=version),
      compute_capability=capability,
      device_kind=kind,
      platform=platform,
    )
  )


class DevicesTest(absltest.TestCase):
  def check(self, function, good, bad):
    for x in good:
      function(x)
    for x, message in bad:
      with self.assertRaisesRegex(NotImplementedError, message):
        function(x)

  def test_device_of_a_topology(self):
    """As `jax.experimental.topologies` describes a GPU that is not there."""
    for kind, expected in (
      ('NVIDIA H200', 'cuda'),
      ('AMD Instinct MI300X', 'rocm'),
      ('another', 'gpu'),
    ):
      found = device(f'PJRT C API\n{kind}', '9.0', kind=kind)
      self.assertEqual(found.platform, expected)

  def test_cudnn(self):
    self.check(
      cudnn.check_target,
      (device('cuda 13000', '9.0'), device('PJRT C API\ncuda 13000', '12.1')),
      (
        (device('cpu', '', 'cpu'), "not a device of platform 'cpu'"),
        (device('rocm 60000', '9.4'), 'cudnn needs an NVIDIA GPU'),
        (device('cuda 12080', '7.5'), '8.0 or newer, and a GPU has 7.5'),
        (devices.Target('cuda'), 'must know the compute capability'),
      ),
    )

  def test_hopper(self):
    self.check(
      devices.check_hopper,
      (device('cuda 13000', '9.0'),),
      (
        (device('cpu', '', 'cpu'), "not a device of platform 'cpu'"),
        (device('rocm 60000', '9.4'), 'pallas_gpu needs an NVIDIA GPU'),
        (device('cuda 13000', '10.0'), '9.0, and a GPU has 10.0'),
        (device('cuda 13000', '8.0'), '9.0, and a GPU has 8.0'),
      ),
    )

  def test_tpu(self):
    self.check(
      devices.check_tpu,
      (device('', platform='tpu'),),
      ((device('', platform='cpu'), "TPU, not a device of platform 'cpu'"),),
    )

  def test_numba(self):
    cpu = device('', platform='cpu')
    self.check(
      devices.check_numba,
      (cpu,),
      ((device('', platform='tpu'), "CPU, not a device of platform 'tpu'"),),
    )
    with (
      mock.patch.dict(sys.modules, numba=None),  # Its import fails.
      self.assertRaisesRegex(
        NotImplementedError, r"--upgrade 'histjax\[cpu\]' \(.*numba"
      ),
    ):
      devices.check_numba(cpu)


if __name__ == '__main__':
  absltest.main()
