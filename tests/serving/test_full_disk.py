"""Nothing half-written is left where the system refuses to write more."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl.testing import absltest

from tests.serving import exports, full_disk, many_users

ROOT = pathlib.Path(__file__).parents[2]


def run(what, folder, *sizes):
  """What the program says, in lines."""
  found = subprocess.run(
    [sys.executable, '-m', 'tests.serving.full_disk', what, folder]
    + [str(size) for size in sizes],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    # Its files would be refused, too.
    | {'JAX_ENABLE_COMPILATION_CACHE': 'false'},
  )
  assert found.returncode == 0, found.stderr
  return found.stdout.splitlines()


class FullDiskTest(absltest.TestCase):
  def check(self, lines, number, refused, left):
    said = [x for x in lines if x.split()[0] in ('refused:', 'left:', 'done')]
    self.assertLen(said, 2 * number + 1)
    for line in said[:-1:2]:
      self.assertRegex(line, refused)
    self.assertEqual({*said[1:-1:2]}, {left})
    self.assertEqual(said[-1], 'done')  # What was refused is in no way now.

  @pytest.mark.slow
  def test_export(self):
    folder = exports.temporary(self)
    # Not even the first file; and the last of the large ones.
    lines = run('export', str(folder), 100, 20_000)
    self.check(
      lines,
      2,
      "^refused: .*model' cannot be written, nothing is left of it .*"
      f'{full_disk.REFUSED}.*make room',
      'left:',
    )
    self.assertTrue((folder / 'model/manifest.json').is_file())

  def test_rank(self):
    folder = exports.temporary(self)
    many_users.write(folder)
    # The manifest, what is read of the files, and the parts of scores.
    lines = run('rank', str(folder), 100, 2500, 'parts')
    self.check(
      lines,
      3,
      rf'^refused: /[^ ]* cannot be w.*{full_disk.REFUSED}.*make room',
      'left: log.parquet shown.parquet',
    )
    self.assertTrue((folder / 'ranked.csv').is_file())
    self.assertLen([*folder.iterdir()], 3)


if __name__ == '__main__':
  absltest.main()
