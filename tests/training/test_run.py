"""A run as it is loaded to score: whose parameters, whose features."""

import dataclasses
import shutil

import chex
import numpy as np
import pytest

from histjax import Scorer
from histjax.data import datasets, requests
from histjax.data.rows import RowConfig
from histjax.features import Activity, FittedFeatures
from histjax.models import ranker
from histjax.scoring import ScorerConfig
from histjax.training import checkpoints, identity, run
from tests.training import runs, test_checkpoints

DATA = dataclasses.replace(
  runs.DATA,
  eval_rows=RowConfig('pointwise', history_length=2),
  features=(Activity((10,)),),
)
EVENTS = [
  {'time': t, 'request': t, 'item': t, 'category': 0, 'click': 1, 'like': 0}
  for t in range(3)
]
REQUEST = {
  'context': {'segment': 1},
  'history': EVENTS,
  'candidates': [{'time': 9, 'request': 9, 'item': 3, 'category': 1}],
}


def variables(config, step):
  return test_checkpoints.new_state(ranker.Ranker(config), seed=step).variables


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """As if step 1 of 2 was the best: `(workdir, config, features)`."""
  workdir = tmp_path_factory.mktemp('run')
  data = datasets.load(DATA)
  model = dataclasses.replace(runs.MODEL, schema=data.schema)
  config = dataclasses.replace(runs.CONFIG, data=DATA, model=model)
  data.features.save(workdir)
  meta = {
    'best_step': 1,
    'config': identity.saved(config),
    'features': data.features.digest(),
  }
  with checkpoints.Checkpoints(workdir) as manager:
    for step in (1, 2):
      state = test_checkpoints.new_state(ranker.Ranker(model), seed=step)
      manager.save(test_checkpoints.at(state, step), meta)
  return workdir, config, data.features


@pytest.mark.parametrize(
  'which, step', [((), 1), (('best',), 1), (('latest',), 2)]
)
def test_load(trained, which, step):
  workdir, config, features = trained
  found = run.load(str(workdir), *which)
  assert found.config == config
  assert found.features.digest() == features.digest()
  assert found.meta['best_step'] == 1
  chex.assert_trees_all_equal(found.variables, variables(config.model, step))


def test_of_remote_storage():
  with pytest.raises(ValueError, match="workdir='s3://bucket/run' is a URL"):
    run.load('s3://bucket/run')


def test_features_of_another_run(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  FittedFeatures().save(tmp_path / 'run')
  with pytest.raises(ValueError, match=r'features\.npz is of another run'):
    run.load(tmp_path / 'run')


def test_scorer(trained):
  workdir, config, features = trained
  scorer = Scorer.from_workdir(workdir, 'latest', ScorerConfig(microbatch=3))
  assert scorer.options.microbatch == 3
  latest = Scorer(config.model, variables(config.model, 2))
  assert scorer.fingerprint == latest.fingerprint
  for options, seen in (({}, 2), ({'visible': 1}, 1)):
    row = scorer.make_row(**REQUEST, **options)
    expected = requests.make_row(
      config.model.schema,
      **REQUEST,
      config=DATA.eval_rows,
      features=features,
      **options,
    )
    chex.assert_trees_all_equal(row.history, expected.history)
    chex.assert_trees_all_equal(row.candidates, expected.candidates)
    np.testing.assert_array_equal(row.visible, [seen])
  with pytest.raises(ValueError, match='made of parameters, and knows no col'):
    latest.make_row(**REQUEST)
