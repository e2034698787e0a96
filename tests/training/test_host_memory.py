"""Freed memory stays with the process."""

import platform
import subprocess
import sys

from absl.testing import absltest

# The least pages that are new in a call, whose product of 64 MB is more than
# glibc keeps by itself. Where it lies varies, so not all find the last one's.
_PROGRAM = """
import resource
import sys

from histjax.training import host_memory

print(sys.argv[1] == 'keep' and host_memory.keep_freed())

import jax
import jax.numpy as jnp


@jax.jit
def step(x):
  y = x @ x.T
  return jnp.sum(y * jnp.sum(y, axis=0))


def pages():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(jnp.ones((4096, 16))).block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


print(min(pages() for _ in range(16)))
"""


def _run(how):
  out = subprocess.run(
    [sys.executable, '-c', _PROGRAM, how],
    check=True,
    capture_output=True,
    text=True,
  ).stdout.split()
  return out[0] == 'True', int(out[1])


class HostMemoryTest(absltest.TestCase):
  def test_next_step_finds_the_pages_of_the_last(self):
    kept, pages = _run('keep')
    self.assertEqual(kept, platform.libc_ver()[0] == 'glibc')
    _, without = _run('default')
    if kept:
      self.assertLess(pages, without / 4)  # Few where pages are huge.
    else:
      self.assertGreater(without, 0)


if __name__ == '__main__':
  absltest.main()
