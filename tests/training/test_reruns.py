"""Runs that are started again: on other data, after failures, on rubbish."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from histjax.data import datasets, fingerprint
from histjax.training import checkpoints, evaluation, loop
from tests.training import runs

CONFIG = runs.CONFIG


class TestOtherData:
  """A run goes on, and a finished one is returned, for the same data alone."""

  def test_a_finished_run(self, straight):
    before = (straight[0] / 'metrics.json').read_text()
    with pytest.raises(ValueError, match='the data has changed since this run'):
      runs.run(straight[0], data_of=flipped())
    assert (straight[0] / 'metrics.json').read_text() == before

  def test_an_interrupted_run(self, straight, tmp_path):
    # As if stopped just before it was tested.
    shutil.copytree(straight[0] / 'checkpoints', tmp_path / 'checkpoints')
    with pytest.raises(ValueError, match='the data has changed since this run'):
      runs.run(tmp_path, data_of=flipped())
    np.testing.assert_equal(runs.run(tmp_path), straight[1])

  def test_the_data_is_not_to_be_had(self, straight, monkeypatch):
    def fail(config):
      raise FileNotFoundError('log.parquet does not exist')

    monkeypatch.setattr(datasets, 'load', fail)
    with pytest.raises(
      ValueError, match=r'finished, but .* cannot be checked: log\.parquet'
    ):
      loop.train_and_evaluate(CONFIG, straight[0])

  def test_it_is_kept_with_the_run(self, straight):
    digest = fingerprint.fingerprint(runs.dataset())
    assert checkpoints.load_meta(straight[0])['fingerprint'] == digest
    written = json.loads((straight[0] / 'metrics.json').read_text())
    assert written['fingerprint'] == digest


def flipped():
  """The data with other labels."""
  data = runs.dataset()
  labels = {k: 1 - v for k, v in data.log.labels.items()}
  log = dataclasses.replace(data.log, labels=labels)
  splits = {
    k: dataclasses.replace(rows, log=log) for k, rows in data.splits.items()
  }
  return dataclasses.replace(data, log=log, splits=splits)


class TestNothingIsLost:
  """An evaluation that fails costs no training."""

  @pytest.mark.parametrize('call, step', [(1, 5), (4, 12)])
  def test_to_an_evaluation_that_fails(
    self, straight, tmp_path, monkeypatch, call, step
  ):
    # The first validation, and the test after the third.
    original, calls = evaluation.predict, []

    def fail(*args, **kwargs):
      calls.append(1)
      if len(calls) == call:
        raise MemoryError('out of memory')
      return original(*args, **kwargs)

    with monkeypatch.context() as patch:
      patch.setattr(evaluation, 'predict', fail)
      with pytest.raises(MemoryError):
        runs.run(tmp_path)
    assert runs.saved(tmp_path)[0].step == step
    np.testing.assert_equal(runs.run(tmp_path), straight[1])
    runs.assert_same_run(tmp_path, straight[0])


class TestWrongKinds:
  def test_config_and_dataset(self, tmp_path):
    for config, dataset, message in (
      ({'seed': 1}, None, 'config is of type dict; it must be a TrainConfig'),
      ('config.py', None, 'config is of type str'),
      (CONFIG, 'log.csv', 'dataset is of type str; it must be a Dataset'),
      (CONFIG, [1], 'dataset is of type list'),
    ):
      with pytest.raises(ValueError, match=message):
        loop.train_and_evaluate(config, tmp_path / 'new', dataset=dataset)
    assert not (tmp_path / 'new').exists()

  @pytest.mark.parametrize(
    'text, message',
    [
      ('', r'metrics\.json is no JSON'),
      ('{"test": ', r'metrics\.json is no JSON'),
      ('[1, 2]', r'metrics\.json has no dict, but list'),
      ('\xff', r'metrics\.json is no JSON'),
      ('{"format": 1}', "was not written by this version of histjax.*'valid"),
      (
        '{"validation": {}, "test": {}, "history": [], "config": {}}',
        'was written by another version of histjax.*an earlier version',
      ),
    ],
  )
  def test_metrics_that_are_none(self, tmp_path, text, message):
    (tmp_path / 'metrics.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match=message):
      runs.run(tmp_path)
    assert os.listdir(tmp_path) == ['metrics.json']
