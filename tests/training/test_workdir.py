"""Folders are what they seem, or are refused before any work."""

import os
import pathlib

import pytest

from histjax.training import checkpoints, loop, workdir
from tests.training import runs


class TestResolve:
  def test_paths(self, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path, expected in (
      ('run', tmp_path / 'run'),
      ('~/run', tmp_path / 'run'),
      (pathlib.Path('~') / 'run', tmp_path / 'run'),
      ('./a/../run', tmp_path / 'run'),
      ('/tmp/a:b', pathlib.Path('/tmp/a:b')),
      ('a b', tmp_path / 'a b'),
    ):
      assert workdir.resolve(path) == expected

  @pytest.mark.parametrize(
    'path, message',
    [
      ('', "dir='' is empty"),
      (' ', "dir=' ' is empty"),
      ('gs://bucket/run', 'is a URL'),
      (pathlib.Path('gs://bucket/run'), 'is a URL'),
      ('s3://bucket/run', 'is a URL'),
      ('file:///tmp/run', 'is a URL'),
      ('HDFS://a/b', 'is a URL'),
      ('~nobody-of-this-name/run', 'no home folder'),
      ('a\0b', 'null character'),
      (None, 'of type NoneType; it must be a path'),
      (7, 'of type int; it must be a path'),
      (b'/tmp/run', 'of type bytes; it must be a path'),
      (['/tmp/run'], 'of type list; it must be a path'),
    ],
  )
  def test_refused(self, tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    for take in (
      workdir.resolve,
      workdir.prepare,
      lambda path: workdir.prepare_output(path, 'dir'),
      checkpoints.Checkpoints,
      checkpoints.load_variables,
      checkpoints.load_meta,
      lambda path: loop.train_and_evaluate(runs.CONFIG, path),
    ):
      with pytest.raises(ValueError, match=message):
        take(path)
    assert not os.listdir(tmp_path)


class TestPrepare:
  def test_creates_and_leaves_nothing_behind(self, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert workdir.prepare('~/a/b') == tmp_path / 'a' / 'b'
    assert workdir.prepare('~/a/b') == tmp_path / 'a' / 'b'
    assert not os.listdir(tmp_path / 'a' / 'b')

  def test_a_new_one_goes_again_if_nothing_came_of_it(self, tmp_path):
    def fail(path, *files):
      with pytest.raises(ValueError, match='bad'):
        with workdir.prepared(path) as folder:
          for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith('/'):
              (folder / name).mkdir()
            else:
              (folder / name).touch()
          raise ValueError('bad')

    fail(tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    fail(tmp_path / 'folders', 'empty/', 'checkpoints/empty/')
    assert not (tmp_path / 'folders').exists()
    fail(tmp_path / 'begun', 'empty/', 'checkpoints/file')
    assert (tmp_path / 'begun/empty').is_dir()
    assert (tmp_path / 'begun/checkpoints/file').exists()
    (tmp_path / 'old').mkdir()
    fail(tmp_path / 'old')
    assert (tmp_path / 'old').is_dir()

  @pytest.mark.parametrize(
    'parent, error', [('file', NotADirectoryError), ('/proc', OSError)]
  )
  def test_cannot_be_written(self, tmp_path, parent, error):
    (tmp_path / 'file').touch()
    path = tmp_path / parent / 'run'
    for take in (workdir.prepare, checkpoints.Checkpoints):
      with pytest.raises(error, match=r"workdir='.*/run' cannot be written"):
        take(path)


class TestPrepareOutput:
  def test_a_file(self, tmp_path):
    (tmp_path / 'old').write_text('old')
    for name in ('old', 'new'):
      assert workdir.prepare_output(tmp_path / name) == tmp_path / name
    assert os.listdir(tmp_path) == ['old']

  def test_refused(self, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='is a folder; name a file in it'):
      workdir.prepare_output(tmp_path)
    for name, error in (
      ('absent/out', FileNotFoundError),
      ('file/out', NotADirectoryError),
    ):
      with pytest.raises(error, match=r"--output='.*' cannot be written \("):
        workdir.prepare_output(tmp_path / name, '--output')
