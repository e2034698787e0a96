"""Tests for histjax.scoring.transport."""

import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest

from histjax.scoring import layout as layout_lib
from histjax.scoring import transport


class TransportTest(absltest.TestCase):
  def test_pinned_memory_is_not_used_where_it_is_ready_too_early(self):
    gpu = SimpleNamespace(
      platform='gpu',
      addressable_memories=lambda: [SimpleNamespace(kind='pinned_host')],
    )
    with mock.patch.dict(os.environ, PJRT_GPU_ENABLE_ASYNC_DISPATCH='1'):
      self.assertIsNone(transport.of_device.__wrapped__(gpu).output)
    with (
      mock.patch.dict(os.environ, PJRT_GPU_ENABLE_ASYNC_DISPATCH='0'),
      mock.patch.object(transport.jax.sharding, 'SingleDeviceSharding') as made,
    ):
      self.assertIs(
        transport.of_device.__wrapped__(gpu).output, made.return_value
      )

  def test_what_is_not_jitted_is_done(self):
    """Under jax.disable_jit results may be NumPy's."""
    layout = layout_lib.Layout((layout_lib.numbers('length', (2,)),))
    carrier = transport.Transport()
    slot = carrier.slot(layout)
    carrier.release(layout, slot, np.zeros(1, np.int32))
    self.assertIs(carrier.slot(layout), slot)


if __name__ == '__main__':
  absltest.main()
