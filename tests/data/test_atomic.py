"""What is written whole or not at all, and what a full disk says."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from histjax.data import atomic, runs
from tests.serving.full_disk import files_of_at_most

LARGE = np.zeros(1000)


def to_file(path):
  LARGE.tofile(path)


def save(path):
  with open(path, 'wb') as file:
    np.save(file, LARGE)


def as_text(path):
  path.write_text('x' * 8000)


class AtomicTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.place = pathlib.Path(folder.name) / 'rows'

  @parameterized.parameters(to_file, save, as_text)
  def test_full_disk(self, write):
    """NumPy's own error has no path, and of `tofile` no errno either."""
    message = f'^{self.place} cannot be written .*; make room, and run'
    with (
      self.assertRaisesRegex(OSError, message),
      files_of_at_most(1000),
    ):
      atomic.write(self.place, write)
    with (
      self.assertRaisesRegex(OSError, message),
      files_of_at_most(1000),
      atomic.folder(self.place) as temporary,
    ):
      write(temporary / 'file')
    self.assertEmpty([*self.place.parent.iterdir()])

  def test_it_is_told_once(self):
    with (
      self.assertRaisesRegex(
        OSError, r'^/[^ ]*/run-000000\.arrow cannot [^;]*; make room[^;]*$'
      ),
      files_of_at_most(1000),
      atomic.folder(self.place) as temporary,
    ):
      rows = runs.Runs(temporary, 'run', np.array([0]), 1)
      rows.add({'user': np.arange(1000)})

  def test_other_errors_are_as_they_were(self):
    with self.assertRaises(FileNotFoundError), atomic.folder(self.place):
      pathlib.Path('absent').read_text()
    self.assertEmpty([*self.place.parent.iterdir()])


if __name__ == '__main__':
  absltest.main()
