"""A tiny study, end to end."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from fusion_study import report, runner, store, summary
from fusion_study.config import (
  StudyConfig,
  cells,
  fusion_of,
  load_dataset,
  merge,
  train_config,
)
from histjax import config as dicts
from histjax import metrics
from histjax.data import synthetic
from histjax.data.datasets import DataConfig
from histjax.training import report as report_lib
from histjax.training import sharding
from histjax.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[3]
VALUES = {
  'datasets': {
    'planted': {
      'run': {
        'data': {
          'tasks': ('click',),
          'source': {
            'type': 'synthetic',
            'num_users': 40,
            'requests_per_user': 10,
            'candidates_per_request': 2,
            'num_items': 20,
          },
        },
        'model': {
          'encoder': {'num_layers': 1, 'width': 8, 'num_heads': 2},
          'interaction': {'kind': 'mlp', 'mlp_widths': (8,)},
          'embedding_dim': 4,
        },
        'pipeline': {
          'batch_events': 512,
          'history_buckets': (24,),
          'candidate_buckets': (16,),
          'num_threads': 0,
        },
        'num_steps': 6,
        'eval_every': 3,
        'checkpoint_every': 2,
        'tensorboard': False,
      },
      'windows': (8,),
      'floors': {'user + item': ('user', 'item'), 'running': ('history',)},
    }
  },
  'fusions': {
    'append_cross': {},
    'concat': {'pipeline': {'batch_events': 1024}},
  },
  'trials': {
    'slow': {'optimizer': {'learning_rate': 0.001}},
    'fast': {'optimizer': {'learning_rate': 0.01}},
  },
  'seeds': (1, 2),
  'ablations': {
    'short': {'fusion': 'append_cross', 'changes': {'num_steps': 3}}
  },
  'ablation_seeds': (1,),
  'resamples': 1000,
}
SCHEMA = synthetic.schema(synthetic.SyntheticConfig()).with_tasks(('click',))
STUDY = dicts.from_dict(StudyConfig, VALUES)
LEAVE_OUT = {'leave_out': {'cold_items': 'item'}}
PREPARED = {'data': {'prepared': 'rows'}}
CELL = 'planted/append_cross/window8-seed2'


def run(workdir, study=STUDY, only=()):
  """Whether it finished, and its progress lines."""
  lines = []
  mesh = sharding.data_mesh(jax.devices()[:1])
  done = runner.run_study(
    study, workdir, only=only, progress=lines.append, mesh=mesh
  )
  return done, lines


def changed(**changes):
  return dicts.from_dict(StudyConfig, {**VALUES, **changes})


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('study')
  done, lines = run(workdir)
  assert done
  return workdir, lines


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy to change."""
  return shutil.copytree(finished[0], tmp_path / 'study')


def interrupt_in_step(monkeypatch, number):
  """Sends SIGINT in the `number`-th training step from now."""
  make, count = step_lib.make_train_step, []

  def wrapped(*args, **kwargs):
    function = make(*args, **kwargs)

    def step(*state_and_batch):
      count.append(1)
      if len(count) == number:
        os.kill(os.getpid(), signal.SIGINT)
      return function(*state_and_batch)

    return step

  monkeypatch.setattr(step_lib, 'make_train_step', wrapped)


@pytest.mark.slow
class TestStudy:
  def test_every_cell_is_there(self, finished):
    workdir, lines = finished
    wanted = [c.name for c in cells(STUDY)]
    assert len(wanted) == 2 + 2 * (2 + 2) + 1
    found = sorted((workdir / 'cells').rglob('*.json'))
    assert sorted(wanted) == [
      str(p.relative_to(workdir / 'cells').with_suffix('')) for p in found
    ]
    assert len(lines) == len(wanted)
    assert lines[-1].startswith('[11/11] planted/short/window8-seed1: ')
    assert 'test click/auc 0.' in lines[-1]
    assert lines[-1].endswith('ETA 0:00:00')
    assert not (workdir / 'runs' / CELL).exists()
    assert not list(workdir.rglob('*.tmp'))

  def test_what_a_cell_says(self, finished):
    workdir, _ = finished
    cell = store.read_cell(workdir, CELL)
    assert cell['config']['seed'] == cell['config']['pipeline']['seed'] == 2
    assert cell['config']['model']['encoder']['window'] == 8
    assert cell['steps'] == 6
    assert cell['best_step'] in (3, 6)
    assert cell['seconds'] > 0
    assert cell['num_parameters'] > 100
    assert 'jax' in cell['environment']
    assert len([h for h in cell['history'] if 'validation' in h]) == 2

  def test_trials_are_chosen_on_validation(self, finished):
    workdir, _ = finished
    tuning = store.read_cell(workdir, CELL)['tuning']
    assert set(tuning['trials']) == {'slow', 'fast'}
    auc = {k: v['validation']['click/auc'] for k, v in tuning['trials'].items()}
    assert tuning['chosen'] == max(auc, key=auc.get)
    for trial in tuning['trials']:
      name = f'planted/append_cross/window8-trial-{trial}'
      stored = store.read_cell(workdir, name)
      assert stored['test'] is None
      assert stored['validation']['click/auc'] == auc[trial]
    chosen = VALUES['trials'][tuning['chosen']]['optimizer']['learning_rate']
    config = store.read_cell(workdir, CELL)['config']
    assert config['optimizer']['learning_rate'] == chosen

  def test_scores_have_the_metrics_of_the_cell(self, finished):
    workdir, _ = finished
    events = None
    for cell in cells(STUDY):
      if cell.kind == 'trial':
        continue
      scores = store.read_scores(workdir, cell.name)
      test = store.read_cell(workdir, cell.name)['test']
      args = scores['logit'], scores['label']
      assert metrics.auc(*args) == test['click/auc']
      assert metrics.gauc(*args, scores['user']) == test['click/gauc']
      events = scores['event'] if events is None else events
      np.testing.assert_array_equal(scores['event'], events)

  def test_a_deleted_cell_is_trained_again_to_the_bit(self, finished, workdir):
    store.json_path(workdir, CELL).unlink()
    done, lines = run(workdir)
    assert done
    assert sum('finished before' in line for line in lines) == 10
    again, before = (store.read_cell(w, CELL) for w in (workdir, finished[0]))
    for name in ('test', 'validation', 'history', 'config', 'tuning'):
      assert again[name] == before[name]
    chex.assert_trees_all_equal(
      store.read_scores(workdir, CELL), store.read_scores(finished[0], CELL)
    )

  def test_rerun_from_json(self, finished, tmp_path):
    stored, new = runner.rerun(
      store.json_path(finished[0], CELL),
      tmp_path,
      mesh=sharding.data_mesh(jax.devices()[:1]),
    )
    assert stored == new
    assert set(stored) == {'validation', 'test'}

  def test_interrupted(self, finished, workdir, monkeypatch):
    store.json_path(workdir, CELL).unlink()
    with monkeypatch.context() as patch:
      interrupt_in_step(patch, 4)
      done, lines = run(workdir)
    assert not done
    assert f'interrupted in {CELL}' in lines[-1]
    assert not store.json_path(workdir, CELL).exists()
    assert (workdir / 'runs' / CELL / 'checkpoints' / '4').exists()
    done, _ = run(workdir)
    assert done
    again, before = (store.read_cell(w, CELL) for w in (workdir, finished[0]))
    assert again['test'] == before['test']

  def test_a_changed_config_is_refused(self, workdir):
    values = {**VALUES['fusions'], 'concat': {'model': {'embedding_dim': 8}}}
    with pytest.raises(ValueError, match='concat/window8-trial-slow') as error:
      run(workdir, changed(fusions=values))
    message = str(error.value)
    assert 'model.embedding_dim: 4 (in the cell), 8 (asked for)' in message
    assert 'Delete' in message

  def test_changed_floor_is_refused(self, workdir):
    planted = {
      **VALUES['datasets']['planted'],
      'floors': {'running': ('item',)},
    }
    with pytest.raises(ValueError, match='planted/floor/running is of another'):
      run(workdir, changed(datasets={'planted': planted}))

  def test_changed_data_is_refused(self, workdir, monkeypatch):
    monkeypatch.setattr(runner, 'fingerprint', lambda dataset: 'other')
    with pytest.raises(
      ValueError, match=r'of other data\. Delete .*\n?.*\ndata: .*, other'
    ):
      run(workdir)
    path = store.json_path(workdir, CELL)
    with pytest.raises(ValueError, match='the data has changed'):
      runner.rerun(path, workdir / 'again')

  def test_a_cell_that_is_no_json(self, workdir):
    path = store.json_path(workdir, CELL)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r'\.json is no JSON'):
      run(workdir)

  def test_only_some(self, tmp_path):
    done, lines = run(tmp_path, only=['planted/floor/run'])
    assert done
    assert [line.split(': ')[0] for line in lines] == [
      '[1/1] planted/floor/running'
    ]
    with pytest.raises(ValueError, match='seed1 needs the trial planted/con'):
      run(tmp_path, only=['planted/concat/window8-seed'])
    with pytest.raises(ValueError, match='fits no cell'):
      run(tmp_path, only=['ml1m'])

  def test_one_more_trial(self, workdir):
    trials = {**VALUES['trials'], 'slow again': VALUES['trials']['slow']}
    before = store.read_cell(workdir, CELL)
    done, lines = run(workdir, changed(trials=trials))
    assert done
    assert sum('finished before' in line for line in lines) == 11
    after = store.read_cell(workdir, CELL)
    assert set(after['tuning']['trials']) == {*trials}
    assert after['test'] == before['test']


@pytest.mark.slow
class TestReport:
  def test_summary(self, finished):
    workdir, _ = finished
    found = summary.load(workdir, progress=lambda line: None)
    rows = {row['variant']: row for row in found['datasets']['planted']}
    assert list(rows) == [
      *('running', 'user + item', 'append_cross', 'concat', 'short')
    ]
    ours, baseline = rows['append_cross'], rows['concat']
    assert ours['seeds'] == [1, 2]
    assert ours['amortizable'] and not baseline['amortizable']
    assert baseline['compared'] is None
    aucs = [
      [
        store.read_cell(workdir, f'planted/{fusion}/window8-seed{s}')['test'][
          'click/auc'
        ]
        for s in (1, 2)
      ]
      for fusion in ('append_cross', 'concat')
    ]
    assert ours['auc']['mean'] == pytest.approx(np.mean(aucs[0]))
    assert ours['auc']['low'] < ours['auc']['mean'] < ours['auc']['high']
    compared = ours['compared']
    assert compared['to'] == 'concat'
    assert compared['auc']['difference'] == pytest.approx(
      np.mean(aucs[0]) - np.mean(aucs[1])
    )
    assert rows['short']['compared']['to'] == 'append_cross'
    assert rows['running']['compared']['to'] == 'concat'

  def test_from_the_summary_alone(self, finished, tmp_path):
    workdir, _ = finished
    found = summary.load(workdir, progress=lambda line: None)
    shutil.copy(workdir / 'summary.json', tmp_path)
    (tmp_path / 'cells').mkdir()  # Of a study that is kept without scores.
    assert summary.load(tmp_path) == found
    cost = tmp_path / 'cost.json'
    costs = {'append_cross': 1.0, 'concat': 50.0}
    cost.write_text(json.dumps({'unit': 'ms', 'fusions': costs}))
    paths = report.write(summary.load(tmp_path), tmp_path, cost)
    assert [pathlib.Path(p).name for p in paths] == [
      *('study.md', 'quality.png', 'cost.png')
    ]
    for path in paths[1:]:
      assert pathlib.Path(path).stat().st_size > 5000
    table = (tmp_path / 'study.md').read_text()
    (line,) = (
      x for x in table.splitlines() if x.startswith('| append_cross |')
    )
    auc = found['datasets']['planted'][2]['auc']
    assert f'{auc["mean"]:.4f} +- {auc["deviation"]:.4f}' in line

  def test_missing_scores(self, workdir):
    store.json_path(workdir, CELL).with_suffix('.npz').unlink()
    with pytest.raises(FileNotFoundError, match=r'seed2\.npz is missing'):
      summary.load(workdir, progress=lambda line: None)

  def test_no_study(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'neither study\.json nor'):
      summary.load(tmp_path)

  def test_binary(self, workdir, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
      'import ml_collections\n'
      f'def get_config():\n  return ml_collections.ConfigDict({VALUES!r})\n'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    done = subprocess.run(
      [
        *(sys.executable, ROOT / 'experiments' / 'study.py'),
        *(f'--config={config}', f'--workdir={workdir}'),
      ],
      capture_output=True,
      text=True,
      check=True,
      env=environment,
    )
    assert done.stdout.count('finished before') == 11
    assert '| append_cross | 8 | 2 |' in done.stdout
    assert (workdir / 'quality.png').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'seeds': ()}, 'seeds is empty'),
    ({'fusions': {'late': {}}}, "fusions has 'late'; choose from"),
    ({'baseline': 'none'}, "baseline='none' must be one of its fusions"),
    ({'criterion': {'accuracy': 1.0}}, 'accuracy'),
    ({'criterion': {'auc': 0.0}}, "criterion={'auc': 0.0} must weigh"),
    ({'criterion': {'auc': float('nan')}}, "{'auc': nan} must weigh"),
    ({'criterion': {'ne': -1.0}}, "{'ne': -1.0} must weigh.*sign is changed"),
    ({'margin': float('inf')}, 'margin=inf must be positive and finite'),
    (
      {'ablations': {'b': {'fusion': 'concat', 'window': 0}}},
      "'b' has window=0; make it >= 1",
    ),
    (
      {'datasets': {'planted': {'run': {}, 'windows': ()}}},
      r"'planted' has windows=\(\); give at least one",
    ),
    ({'resamples': 10}, 'resamples=10 at least 1000'),
    (
      {'trials': {'a': {'model': {'encoder': {'window': 3}}}}},
      "'a' changes model.encoder.window, which follows from",
    ),
    (
      {'ablations': {'b': {'fusion': 'mean'}}},
      "ablation 'b' is of fusion='mean'",
    ),
    (
      {'ablations': {'b': {'fusion': 'concat', 'datasets': ('c',)}}},
      "ablation 'b' is on 'c'",
    ),
    (
      {'ablations': {'b': {'fusion': 'concat', 'changes': LEAVE_OUT}}},
      "'b' changes leave_out, but all cells",
    ),
    (
      {'datasets': {'planted': {'run': PREPARED, 'windows': (8,)}}},
      "'planted' has data.prepared='rows', but scores are kept by event",
    ),
    (
      {'trials': {'a': PREPARED}},
      "'a' has data.prepared='rows', but scores are kept by event",
    ),
    ({'ablations': {'concat': {'fusion': 'concat'}}}, 'the name of a fusion'),
    (
      {'ablations': {'b': {'fusion': 'concat', 'baseline': 'c'}}},
      "ablation 'b' has baseline='c', which must be another ablation",
    ),
    (
      {'ablations': {'b': {'fusion': 'concat', 'baseline': 'b'}}},
      "baseline='b', which must be another ablation",
    ),
  ],
)
def test_bad_study(changes, message):
  with pytest.raises(ValueError, match=message):
    changed(**changes)


def scored_cell(workdir, study, cell, logits, users=None):
  """Writes a finished cell with the metrics and scores that a run leaves."""
  users = np.repeat(np.arange(20), 10) if users is None else users
  labels = np.tile([True, False], 100)
  auc = metrics.auc(logits, labels)
  store.write_cell(
    workdir,
    cell.name,
    {
      'cell': dataclasses.asdict(cell),
      'fusion': fusion_of(study, cell),
      # Of the second task there are no scores.
      'test': {
        'click/auc': auc,
        'click/gauc': metrics.gauc(logits, labels, users),
        'click/logloss': 0.5,
        'click/ne': 1.0,
        'like/auc': 0.0,
      },
      'num_parameters': 1,
      'seconds': 1.0,
      'tuning': {'chosen': 'only'},
      'config': dicts.to_dict(train_config(study, cell, 'only', SCHEMA)),
      'environment': {'device': 'cpu'},
    },
    {
      'event': np.arange(200),
      'user': users,
      'label': labels,
      'logit': logits.astype(np.float32),
    },
  )


def test_an_ablation_is_compared_with_the_one_it_names(tmp_path):
  study = changed(
    trials={'only': {}},
    ablations={
      'long': {'fusion': 'append_cross', 'window': 16},
      'long concat': {'fusion': 'concat', 'window': 16, 'baseline': 'long'},
    },
  )
  report_lib.write_json(tmp_path / store.STUDY_FILE, dicts.to_dict(study))
  rng = np.random.default_rng(0)
  for cell in cells(study):
    if cell.kind == 'ablation':
      scored_cell(tmp_path, study, cell, rng.normal(size=200))
  rows = {
    row['variant']: row
    for row in summary.load(tmp_path, progress=lambda _: None)['datasets'][
      'planted'
    ]
  }
  compared = rows['long concat']['compared']
  assert (compared['to'], compared['window']) == ('long', 16)
  difference = rows['long concat']['auc']['mean'] - rows['long']['auc']['mean']
  assert compared['auc']['difference'] == pytest.approx(difference)
  # The fusion of the other as it was tuned is not there.
  assert rows['long']['compared'] is None


def test_a_metric_that_no_user_has_is_not_compared(tmp_path):
  """As where each user has one impression to be tested on."""
  study = changed(trials={'only': {}}, ablations={})
  report_lib.write_json(tmp_path / store.STUDY_FILE, dicts.to_dict(study))
  rng, lines = np.random.default_rng(0), []
  for cell in cells(study):
    if cell.kind == 'grid':
      logits = rng.normal(size=200)
      scored_cell(tmp_path, study, cell, logits, users=np.arange(200))
  found = summary.load(tmp_path, progress=lines.append)
  ours, baseline = found['datasets']['planted']
  assert (ours['gauc']['mean'], baseline['compared']) == (None, None)
  assert set(ours['compared']) == {'to', 'window', 'auc', 'auc_seeds'}
  assert 'planted: gauc of append_cross, 8 is not compared' in lines[-1]
  paths = report.write(found, tmp_path)
  assert '| append_cross | 8 | 2 |' in pathlib.Path(paths[0]).read_text()


def test_a_criterion_without_a_value_is_refused_before_trials(tmp_path):
  # A user has one event of validation, and so no AUC.
  data = {'source': {'requests_per_user': 10, 'candidates_per_request': 1}}
  planted = VALUES['datasets']['planted']
  run_values = merge(planted['run'], {'data': data})
  study = changed(
    datasets={'planted': {**planted, 'run': run_values}},
    criterion={'gauc': 1.0},
  )
  with pytest.raises(
    ValueError, match=r"study: criterion.*'click/gauc' is und"
  ):
    run(tmp_path, study, only=['planted/append_cross/window8-trial-slow'])
  assert not (tmp_path / 'runs').exists()


def test_cells_of_another_study_are_left_out(tmp_path):
  """Of other seeds and of another config, in one workdir."""
  study = changed(trials={'only': {}}, ablations={}, seeds=(1, 2))
  report_lib.write_json(tmp_path / store.STUDY_FILE, dicts.to_dict(study))
  earlier = changed(trials={'only': {'num_steps': 9}}, seeds=(2, 3))
  rng = np.random.default_rng(0)
  for of in (study, earlier):
    for cell in cells(of):
      if cell.kind == 'grid':
        scored_cell(tmp_path, of, cell, rng.normal(size=200))
  lines = []
  found = summary.load(tmp_path, progress=lines.append)['datasets']['planted']
  assert [row['seeds'] for row in found] == [[1], [1]]
  assert all(row['auc']['low'] < row['auc']['mean'] for row in found)
  left = [line for line in lines if line.startswith('left out')]
  assert len(left) == 3
  name = 'planted/append_cross/window8-seed'
  assert f'of another config: {name}2, num_steps: 9 (in the cell), 6' in left[0]
  assert f'not of this study: {name}3, planted/concat' in left[2]


def test_scores_that_are_not_those_of_the_metrics(tmp_path):
  study = changed(trials={'only': {}}, ablations={})
  report_lib.write_json(tmp_path / store.STUDY_FILE, dicts.to_dict(study))
  cell = next(c for c in cells(study) if c.kind == 'grid')
  scored_cell(tmp_path, study, cell, np.arange(200.0))
  values, scores = store.read_cell(tmp_path, cell.name), np.arange(200.0)[::-1]
  stored = store.read_scores(tmp_path, cell.name)
  store.write_cell(tmp_path, cell.name, values, {**stored, 'logit': scores})
  with pytest.raises(ValueError, match=r'seed1 have AUC .*, its metrics 0\.49'):
    summary.load(tmp_path, progress=lambda _: None)


def test_trials_of_another_study_choose_nothing(tmp_path):
  earlier = changed(trials={**VALUES['trials'], 'fast': {'num_steps': 9}})
  for cell in cells(earlier):
    if cell.kind == 'trial':
      config = train_config(earlier, cell, cell.trial, SCHEMA)
      values = {
        'validation': {'click/auc': 0.5},
        'best_step': 3,
        'seconds': 1.0,
        'config': dicts.to_dict(config),
      }
      store.write_cell(tmp_path, cell.name, values, None)
  with pytest.raises(
    ValueError, match=r'concat/window8-trial-fast(.|\n)*num_steps: 9 '
  ):
    run(tmp_path, only=['planted/concat/window8-seed1'])


def test_a_refused_study_is_not_that_of_the_workdir(tmp_path):
  done, _ = run(tmp_path, only=['planted/floor/running'])
  assert done
  text = (tmp_path / store.STUDY_FILE).read_text()
  planted = {**VALUES['datasets']['planted'], 'floors': {'running': ('item',)}}
  with pytest.raises(ValueError, match='planted/floor/running is of another'):
    run(tmp_path, changed(datasets={'planted': planted}))
  with pytest.raises(ValueError, match='fits no cell'):
    run(tmp_path, changed(seeds=(7,)), only=['ml1m'])
  assert (tmp_path / store.STUDY_FILE).read_text() == text


def test_what_is_left_out_is_in_no_scores(tmp_path):
  """Of a trained cell and of a floor; metrics and scores agree."""
  planted = VALUES['datasets']['planted']
  run_values = merge(
    planted['run'],
    {**LEAVE_OUT, 'num_steps': 1, 'data': {'source': {'num_items': 300}}},
  )
  study = changed(
    datasets={'planted': {**planted, 'run': run_values}},
    trials={'only': {}},
  )
  names = ['planted/floor/running', 'planted/concat/window8-seed1']
  done, _ = run(tmp_path, study, only=names)
  assert done
  scores = [store.read_scores(tmp_path, name) for name in names]
  for name, found in zip(names, scores, strict=True):
    auc = metrics.auc(found['logit'], found['label'])
    test = store.read_cell(tmp_path, name)['test']
    assert auc == test['click/auc']
  np.testing.assert_array_equal(scores[0]['event'], scores[1]['event'])
  dataset = load_dataset(dicts.from_dict(DataConfig, run_values['data']))
  seen, rows = (dataset.in_memory(split) for split in ('train', 'test'))
  item = rows.features['item'][rows.events]
  wanted = rows.events[np.isin(item, seen.seen_ids('item'))]
  assert 0 < len(wanted) < len(item)
  np.testing.assert_array_equal(scores[0]['event'], np.sort(wanted))


def test_one_trial_is_not_run():
  kinds = {cell.kind for cell in cells(changed(trials={'only': {}}))}
  assert kinds == {'floor', 'grid', 'ablation'}


@pytest.mark.slow
def test_one_trial_gives_the_values(tmp_path):
  study = changed(trials={'only': VALUES['trials']['fast']})
  done, _ = run(tmp_path, study, only=['planted/append_cross/window8-seed1'])
  assert done
  (name,) = store.finished_names(tmp_path)
  cell = store.read_cell(tmp_path, name)
  assert cell['tuning']['chosen'] == 'only'
  assert cell['config']['optimizer']['learning_rate'] == 0.01
