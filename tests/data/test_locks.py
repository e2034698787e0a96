"""One process at a time works in a folder."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest

from histjax.data import locks
from tests import children

ROOT = pathlib.Path(__file__).parents[2]
_HOLDER = """
import pathlib, sys, time
from histjax.data import locks
lock = locks.FolderLock(pathlib.Path(sys.argv[1]))
print('held', flush=True)
time.sleep(300)
"""


class FolderLockTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    root = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(root, 'out')

  def test_one_at_a_time(self):
    with locks.FolderLock(self.folder) as lock:
      self.assertEqual(lock.names(), set())
      (self.folder / 'part').write_text('mine')
      with self.assertRaisesRegex(
        ValueError, "output='.*/out': another process is at work there"
      ):
        locks.FolderLock(self.folder)
    self.assertEqual([x.name for x in self.folder.iterdir()], ['part'])
    with locks.FolderLock(self.folder) as lock:
      self.assertEqual(lock.names(), {'part'})

  def test_ends_with_its_process(self):
    process = children.start(
      [sys.executable, '-c', _HOLDER, str(self.folder)],
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    self.assertEqual(process.stdout.readline(), 'held\n')
    with self.assertRaisesRegex(ValueError, 'another process is at work'):
      locks.FolderLock(self.folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with locks.FolderLock(self.folder) as lock:  # Its file is still there.
      self.assertEqual(lock.names(), set())
    self.assertFalse(self.folder.exists())

  def test_what_it_leaves(self):
    """A folder that was empty before stays; one that it emptied does not."""
    self.folder.mkdir()
    with locks.FolderLock(self.folder) as lock:
      (self.folder / 'some').mkdir()
      lock.clear()
    self.assertEmpty(list(self.folder.iterdir()))
    (self.folder / 'some').mkdir()
    (self.folder / 'link').symlink_to('some')
    with locks.FolderLock(self.folder) as lock:
      lock.clear()
    self.assertFalse(self.folder.exists())

  def test_one_that_was_removed_meanwhile(self):
    """Who has opened the file of a lock that ends does not get that lock."""
    first, seen = locks.FolderLock(self.folder), []
    is_there = locks._is

    def end_first(path, file):
      seen.append(is_there(path, file))
      return seen[-1]

    opened = os.open

    def late(*args):
      file = opened(*args)
      first.release()
      return file

    with (
      mock.patch.object(os, 'open', late),
      mock.patch.object(locks, '_is', end_first),
    ):
      second = locks.FolderLock(self.folder)
    self.assertEqual(seen, [False, True])
    with self.assertRaisesRegex(ValueError, 'another process is at work'):
      locks.FolderLock(self.folder)
    second.release()

  def test_where_nothing_can_be_locked(self):
    for place in ('absent/out', 'plain'):
      (self.folder.parent / 'plain').touch()
      with self.assertRaisesRegex(OSError, 'cannot be locked .*on a disk that'):
        locks.FolderLock(self.folder.parent / place)


if __name__ == '__main__':
  absltest.main()
