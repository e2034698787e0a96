"""What is left, where a directory cannot be written."""

import errno
import os
import pathlib
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors

from histjax.serving import directory, export
from tests import support
from tests.serving import exports, full_disk


class DirectoryTest(parameterized.TestCase):
  """What is left, where it cannot be written."""

  def setUp(self):
    super().setUp()
    self.folder = exports.temporary(self)

  def test_what_is_there_is_kept(self):
    full = self.folder / 'full'
    full.mkdir()
    (full / 'mine').write_text('mine')
    (self.folder / 'link').symlink_to('nowhere')
    config = support.config()
    for name, message in (
      ('full', 'is there and no empty directory'),
      ('full/mine', 'is there and no empty directory'),
      ('link', 'is there and no empty directory'),
      ('absent/model', 'there is no directory'),
    ):
      with self.assertRaisesRegex(ValueError, message):  # Before any work.
        export.export_model(
          config, {}, self.folder / name, export.ExportConfig()
        )
      with self.assertRaisesRegex(ValueError, message):
        export.export_workdir(
          self.folder, self.folder / name, export.ExportConfig()
        )
    self.assertEqual((full / 'mine').read_text(), 'mine')

  def test_a_link_to_an_empty_directory(self):
    real = self.folder / 'disk/real'
    real.mkdir(parents=True)
    (self.folder / 'link').symlink_to('disk/real')
    output = directory.check_output(self.folder / 'link')
    self.assertEqual(output, pathlib.Path(os.path.realpath(real)))
    directory.write_whole(output, lambda path: (path / 'x').write_text('x'))
    self.assertEqual((self.folder / 'link/x').read_text(), 'x')

  def test_where_nothing_can_be_put_in_the_end(self):
    folder = self.folder / 'mounted'
    folder.mkdir()
    with (
      mock.patch.object(os.path, 'ismount', lambda path: path == folder),
      self.assertRaisesRegex(ValueError, "mounted' is a mount point"),
    ):
      directory.check_output(folder)
    with (
      mock.patch.object(pathlib.Path, 'touch', side_effect=OSError(30, 'ro')),
      self.assertRaisesRegex(OSError, r'output=.* cannot be written to \(ro'),
    ):
      directory.check_output(folder / 'model')

  @parameterized.parameters(
    lambda path, x: path.write_bytes(x.tobytes()),
    lambda path, x: safetensors.save_file({'x': x}, path),
  )
  def test_a_full_disk_leaves_nothing(self, save):
    output = self.folder / 'model'

    def write(folder):
      (folder / 'one').write_text('one')
      self.assertEqual(folder.parent, self.folder)
      save(folder / 'two', np.zeros(4096))

    with (
      full_disk.files_of_at_most(4096),
      self.assertRaisesRegex(
        OSError,
        "model' cannot be written, nothing is left of it .*"
        f'{full_disk.REFUSED}',
      ),
    ):
      directory.write_whole(output, write)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_full_disk_at_the_end_leaves_nothing(self):
    full = OSError(errno.ENOSPC, 'No space left on device')
    with (
      mock.patch.object(os, 'fsync', side_effect=full),
      self.assertRaisesRegex(OSError, 'No space left on device') as caught,
    ):
      directory.write_whole(
        self.folder / 'model', lambda folder: (folder / 'one').write_text('1')
      )
    self.assertEqual(caught.exception.errno, errno.ENOSPC)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_another_error_leaves_nothing(self):
    def write(folder):
      (folder / 'one').write_text('one')
      raise ValueError('logits are off')

    with self.assertRaisesRegex(ValueError, 'logits are off'):
      directory.write_whole(self.folder / 'model', write)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_directory_that_came_meanwhile_is_kept(self):
    output = self.folder / 'model'

    def write(folder):
      (folder / 'one').write_text('one')
      output.mkdir()
      (output / 'mine').write_text('mine')

    with self.assertRaisesRegex(OSError, 'cannot be written'):
      directory.write_whole(output, write)
    self.assertEqual(
      [x.name for x in self.folder.rglob('*')], ['model', 'mine']
    )


if __name__ == '__main__':
  absltest.main()
