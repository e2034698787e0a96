"""What is proof that a checkpoint is not complete, and what is not."""

import pathlib
import shutil

import chex
import orbax.checkpoint as ocp
import pytest

from histjax.training import checkpoints, integrity
from tests.training import test_checkpoints as helpers


class TestMissing:
  def test_all_there(self, tmp_path):
    self.write(tmp_path)
    assert integrity.missing(tmp_path) is None
    (tmp_path / 'more').touch()  # Nothing is missing.
    (tmp_path / 'mark').write_text('Orbax changes those of the top level.')
    assert integrity.missing(tmp_path) is None

  def test_proofs(self, tmp_path):
    self.write(tmp_path)
    for text in ('12', '1234'):
      (tmp_path / 'a' / 'b' / 'c').write_text(text)
      wanted = f'a/b/c has {len(text)} of 3 bytes'
      assert integrity.missing(tmp_path) == wanted
    (tmp_path / 'a' / 'b' / 'c').unlink()
    assert integrity.missing(tmp_path) == 'a/b/c is missing'
    shutil.rmtree(tmp_path / 'a')
    assert integrity.missing(tmp_path) == 'a/b/c is missing'
    self.write(tmp_path)
    (tmp_path / 'mark').unlink()
    assert integrity.missing(tmp_path) == 'mark is missing'
    (tmp_path / 'files.json').write_text('{"a/b/c": ')
    assert integrity.missing(tmp_path) == 'files.json was cut off'
    (tmp_path / 'files.json').unlink()
    assert integrity.missing(tmp_path) == 'files.json is missing'
    (tmp_path / 'files.json').mkdir()
    with pytest.raises(IsADirectoryError):
      integrity.missing(tmp_path)

  def write(self, folder):
    (folder / 'a' / 'b').mkdir(parents=True)
    (folder / 'a' / 'b' / 'c').write_text('123')
    (folder / 'mark').write_text('')
    integrity.write_listing(folder)


def test_arrays_that_cannot_be_listed(tmp_path):
  # Before Orbax starts to read many of them at once.
  for name in ('absent', 'empty', 'folder/manifest.ocdbt'):
    if name != 'absent':
      (tmp_path / name).mkdir(parents=True)
    with pytest.raises(OSError, match='lists no arrays'):
      integrity.check_opens(tmp_path / name.partition('/')[0])


class TestTransientErrors:
  """What cannot be read now is no proof that anything is missing."""

  def check(self, workdir, match):
    """Reading fails, names the step and moves nothing."""
    before = helpers.files_in(workdir)
    with (
      checkpoints.Checkpoints(workdir) as manager,
      pytest.raises(OSError, match=match),
    ):
      manager.restore(helpers.new_state())
    assert helpers.files_in(workdir) == before
    with pytest.raises(OSError, match=match):
      checkpoints.load_variables(workdir, 'latest')
    assert helpers.files_in(workdir) == before

  @pytest.mark.parametrize(
    'owner, name',
    [
      (ocp.CheckpointManager, 'restore'),
      (ocp.CheckpointManager, 'item_metadata'),
      (pathlib.Path, 'read_text'),
      (pathlib.Path, 'stat'),
    ],
  )
  @pytest.mark.parametrize('error', [OSError, ValueError])
  def test_an_error_once(self, tmp_path, monkeypatch, owner, name, error):
    last = helpers.save_some(tmp_path, [1, 2])
    original = getattr(owner, name)

    def fail(self, *args, **kwargs):
      if owner is pathlib.Path and 'checkpoints/2/' not in str(self):
        return original(self, *args, **kwargs)
      raise error('stale handle')

    with monkeypatch.context() as patch:
      patch.setattr(owner, name, fail)
      self.check(
        tmp_path, rf'of step 2, cannot be read \({error.__name__}: stale handle'
      )
    with checkpoints.Checkpoints(tmp_path) as manager:
      found, _ = manager.restore(helpers.new_state())
    chex.assert_trees_all_equal(helpers.as_numpy(found), helpers.as_numpy(last))

  @pytest.mark.parametrize(
    'name', ['variables/manifest.ocdbt', 'meta/metadata']
  )
  def test_a_file_that_cannot_be_read(self, tmp_path, name):
    # For root, too, which may read all files: a folder in its place.
    helpers.save_some(tmp_path, [1, 2])
    path = tmp_path / 'checkpoints' / '2' / name
    path.rename(path.with_name('kept'))
    path.mkdir()
    self.check(tmp_path, 'of step 2, cannot be read')

  @pytest.mark.parametrize('name', ['variables/**/d/*', 'meta/metadata'])
  def test_all_the_bytes_are_there_but_wrong(self, tmp_path, name):
    helpers.save_some(tmp_path, [1, 2])
    for path in (tmp_path / 'checkpoints' / '2').glob(name):
      path.write_bytes(bytes(path.stat().st_size))
    self.check(tmp_path, 'of step 2, cannot be read')

  def test_a_replaced_one_is_kept_until_the_new_one_can_be_read(
    self, tmp_path, monkeypatch
  ):
    helpers.save_some(tmp_path, [1, 2])
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '2', folder / 'replaced-2')
    before = helpers.files_in(tmp_path)

    def fail(folder):
      raise OSError(f'{folder}: stale handle')

    with monkeypatch.context() as patch:
      patch.setattr(integrity, 'missing', fail)
      with pytest.raises(OSError, match='of step 2, cannot be read'):
        checkpoints.Checkpoints(tmp_path)
    assert helpers.files_in(tmp_path) == before


class TestOtherVersions:
  @pytest.mark.parametrize('found', [None, 1, 3, '2'])
  def test_one_format_is_known(self, found):
    with pytest.raises(ValueError, match='written by another version of hist'):
      integrity.check_format(pathlib.Path('run'), found)
    integrity.check_format(pathlib.Path('run'), integrity.FORMAT)

  @pytest.mark.parametrize('found', [None, 1])
  def test_are_refused_and_left_alone(self, tmp_path, monkeypatch, found):
    with monkeypatch.context() as patch:
      patch.setattr(integrity, 'FORMAT', found)
      helpers.save_some(tmp_path, [1, 2])
    if found is None:  # The first ones had no list either.
      for path in tmp_path.rglob('files.json'):
        path.unlink()
    before = helpers.files_in(tmp_path)
    message = 'written by another version of histjax.*train again in another'
    with checkpoints.Checkpoints(tmp_path) as manager:
      with pytest.raises(ValueError, match=message):
        manager.latest_meta()
      with pytest.raises(ValueError, match=message):
        manager.restore(helpers.new_state())
    for load in (checkpoints.load_variables, checkpoints.load_meta):
      with pytest.raises(ValueError, match=message):
        load(tmp_path)
    assert helpers.files_in(tmp_path) == before
