"""What makes two runs the same, and what may differ."""

import dataclasses
import os

import pytest

from histjax import config as dicts
from histjax.data import datasets
from histjax.training import identity
from tests.training import runs


def stored(**changes):
  return identity.saved(dataclasses.replace(runs.CONFIG, **changes))


def with_data(values, **fields):
  return {**values, 'data': {**values['data'], **fields}}


class TestPaths:
  def test_are_kept_absolute(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))

    def source(**fields):
      data = dataclasses.replace(runs.DATA, source=datasets.Movielens(**fields))
      return stored(data=data)['data']['source']

    values = source(data_dir='prepared', manual_dir='~/official')
    assert values['data_dir'] == str(tmp_path / 'prepared')
    assert values['manual_dir'] == str(tmp_path / 'home' / 'official')
    assert source()['data_dir'] == ''  # The default stays one.

  def test_lists_at_any_depth(self):
    values = {'data': {'source': {'type': 'events', 'paths': ['a', 'b']}}}
    moved = identity.with_paths(values, paths=['c'], manual_dir=None)
    assert moved['data']['source']['paths'] == ['c']
    assert values['data']['source']['paths'] == ['a', 'b']
    with pytest.raises(ValueError, match=r"manual_dir='x': .* has \['paths'\]"):
      identity.with_paths(values, manual_dir='x')

  def test_are_no_other_config(self):
    data = dataclasses.replace(runs.DATA, source=datasets.Movielens())
    config = dataclasses.replace(runs.CONFIG, data=data)
    old = identity.with_paths(identity.saved(config), data_dir='/elsewhere')
    identity.check_same_run(config, old, '/tmp/run')


class TestSameRun:
  @pytest.mark.parametrize(
    'field', ['keep_checkpoints', 'tensorboard', 'pipeline.prefetch']
  )
  def test_what_changes_no_result(self, field):
    values = stored()
    *parents, name = field.split('.')
    at = values
    for parent in parents:
      at = at[parent]
    at[name] = 7
    identity.check_same_run(runs.CONFIG, values, '/tmp/run')

  def test_what_does(self):
    with pytest.raises(ValueError, match=r'seed: 3 \(in workdir\), 0'):
      identity.check_same_run(runs.CONFIG, stored(seed=3), '/tmp/run')
    with pytest.raises(ValueError, match=r'data\.source\.type: '):
      identity.check_same_run(
        runs.CONFIG,
        with_data(stored(), source={'type': 'kuairand'}),
        '/tmp/run',
      )

  @pytest.mark.parametrize('old', [{}, {'data': None}, {'pipeline': 3}])
  def test_a_config_of_other_fields(self, old):
    with pytest.raises(ValueError, match='holds a run of another config'):
      identity.check_same_run(runs.CONFIG, old, '/tmp/run')

  def test_of_run(self):
    assert identity.of_run(stored(), '/tmp/run') == dicts.from_dict(
      type(runs.CONFIG), stored()
    )
    with pytest.raises(
      ValueError,
      match=r'not one of this version.*momentum.*--modules.*train again',
    ):
      identity.of_run({**stored(), 'momentum': 1}, '/tmp/run')


def test_fingerprints():
  identity.check_fingerprint('a' * 64, 'a' * 64, os.curdir)
  with pytest.raises(ValueError, match=r'is aaaaaaaaaaaa, that of the run bbb'):
    identity.check_fingerprint('a' * 64, 'b' * 64, os.curdir)
  with pytest.raises(ValueError, match=r'\(--config\.data\.source\.paths\)'):
    identity.check_fingerprint('a' * 64, 'b' * 64, os.curdir)
