"""Tests for histjax.scoring.transport."""

import os
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest

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


if __name__ == '__main__':
  absltest.main()
