"""Whole runs, on the synthetic data with the real ranker."""

import dataclasses
import errno
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from unittest import mock

import chex
import jax
import numpy as np
import pytest

from histjax import config as config_lib
from histjax import metrics
from histjax.data import cold, datasets, locks
from histjax.data import rows as rows_lib
from histjax.data.rows import make_rows
from histjax.models import ranker
from histjax.training import checkpoints, evaluation, loop, workdir
from histjax.training import config as train_config
from histjax.training import optimizer as optimizer_lib
from histjax.training import report as report_lib
from tests import children
from tests.training import runs

CONFIG = runs.CONFIG
SLOW = pytest.mark.slow


def on_call(monkeypatch, module, name, number, action):
  """Calls `action` before the `number`-th call of what `module.name` makes."""
  make = getattr(module, name)
  calls = []

  def make_wrapped(*args, **kwargs):
    function = make(*args, **kwargs)

    def wrapped(*args):
      calls.append(1)
      if len(calls) == number:
        changed = action(*args)
        args = args if changed is None else changed
      return function(*args)

    return wrapped

  monkeypatch.setattr(module, name, make_wrapped)


def send(number):
  def action(*unused_args):
    os.kill(os.getpid(), number)

  return action


class TestRun:
  def test_result(self, straight):
    workdir, result = straight
    assert not result['interrupted'] and result['step'] == 12
    assert [e['step'] for e in result['history'] if 'loss' in e] == [
      3,
      6,
      9,
      12,
    ]
    validations = {
      e['step']: e['validation'] for e in result['history'] if 'validation' in e
    }
    assert sorted(validations) == [5, 10, 12]
    best = max(validations, key=lambda s: validations[s]['click/auc'])
    assert result['best_step'] == best
    np.testing.assert_equal(result['validation'], validations[best])
    variables, config = checkpoints.load_variables(workdir)
    assert config_lib.from_dict(train_config.TrainConfig, config) == CONFIG
    np.testing.assert_equal(
      evaluation.evaluate(
        ranker.Ranker(CONFIG.model),
        variables,
        runs.dataset().splits['test'],
        CONFIG.pipeline,
        runs.mesh(),
      ),
      result['test'],
    )
    written = json.loads((workdir / 'metrics.json').read_text())
    assert written['test']['click/auc'] == result['test']['click/auc']

  def test_a_finished_run_is_not_repeated(self, straight, capsys):
    workdir, result = straight
    np.testing.assert_equal(runs.run(workdir, keep_checkpoints=5), result)
    assert 'holds this run, finished' in capsys.readouterr().out

  def test_another_config_is_refused(self, straight, tmp_path):
    workdir, _ = straight
    message = (
      r'seed: 0 \(in workdir\), 1 \(asked for\)\n'
      r'task_weights.like|optimizer.learning_rate: 0.001 \(in workdir\), 0.5'
    )
    changes = {
      'seed': 1,
      'optimizer': optimizer_lib.OptimizerConfig(learning_rate=0.5),
    }
    with pytest.raises(ValueError, match=message):
      runs.run(workdir, **changes)
    # Before it is finished, too.
    (tmp_path / 'checkpoints').symlink_to(workdir / 'checkpoints')
    with pytest.raises(ValueError, match=message):
      runs.run(tmp_path, **changes)

  def test_progress_lines(self, tmp_path, capsys):
    runs.run(tmp_path, num_steps=3, eval_every=None, log_every=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('Starting at step 0 of 3: 40 rows, ')
    assert lines[1] == (
      'Compiling shape 1 of 1: 7 rows of 20 events and 16 candidates'
    )
    assert lines[2].startswith('step 1/3 (33%)  loss 0.')
    assert re.search(r' candidates/s  .*ETA \d+:\d\d:\d\d', lines[2])
    assert '  1 shapes  ' in lines[2]
    assert re.fullmatch(
      r'Validation at step 3 \(best so far\): by click/auc 0\.\d{4}; '
      r'click/logloss 0\.\d{4}',
      lines[-4],
    )
    assert lines[-3] == 'Test, with the parameters of step 3:'
    assert lines[-2].startswith('  click  auc 0.')
    assert lines[-1].startswith('  like   auc 0.')

  def test_the_device_always_has_a_step_to_do(self, tmp_path, monkeypatch):
    calls = []
    make, to_host = loop.step_lib.make_train_step, loop.sharding.to_host

    def make_counted(*args, **kwargs):
      function = make(*args, **kwargs)

      def counted(*args):
        calls.append('step')
        return function(*args)

      return counted

    def fetched(tree):
      calls.append('fetch')
      return to_host(tree)

    def validated(*unused_args, **unused_kwargs):
      calls.append('validate')
      return evaluate(*unused_args, **unused_kwargs)

    evaluate = evaluation.predict
    monkeypatch.setattr(loop.step_lib, 'make_train_step', make_counted)
    monkeypatch.setattr(loop.evaluation, 'predict', validated)
    monkeypatch.setattr(loop.sharding, 'to_host', fetched)
    options = {'num_steps': 9, 'eval_every': 9, 'checkpoint_every': None}
    result = runs.run(tmp_path, log_every=3, **options)
    assert [e['step'] for e in result['history'] if 'loss' in e] == [3, 6, 9]
    before = calls[: calls.index('validate')]
    steps = [
      before[:i].count('step') for i, x in enumerate(before) if x != 'step'
    ]
    # A report comes when the step after it is on its way; then all are made.
    assert steps[:2] == [4, 7] and set(steps[2:]) == {9}

  def test_compiling_is_no_training(self, tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(report_lib.time, 'monotonic', lambda: now[0])
    make = loop.step_lib.make_train_step

    def make_slow(*args, **kwargs):
      function, calls = make(*args, **kwargs), []

      def slow(*args):
        calls.append(1)
        now[0] += 1.0 if len(calls) > 1 else 1000.0
        return function(*args)

      return slow

    monkeypatch.setattr(loop.step_lib, 'make_train_step', make_slow)
    runs.run(tmp_path, num_steps=4, eval_every=None, log_every=2)
    first = re.search(r'\nstep 2/4 .*', capsys.readouterr().out)
    # The steps that were made when it was known, without the first.
    assert '  1 steps/s  ' in first[0] and 'ETA 0:00:02' in first[0]

  def test_stops_early(self, tmp_path, capsys):
    result = runs.run(tmp_path, num_steps=30, eval_every=1, patience=2)
    values = [
      e['validation']['click/auc']
      for e in result['history']
      if 'validation' in e
    ]
    better = [v > max(values[:i], default=0) for i, v in enumerate(values)]
    assert better[-3:] == [True, False, False]
    assert (False, False) not in itertools.pairwise(better[:-1])
    assert result['step'] == len(values) < 30
    assert result['best_step'] == result['step'] - 2
    output = capsys.readouterr().out
    assert 'click/auc has not improved for 2' in output
    best = result['best_step']
    marks = re.findall(r'^Validation at step (\d+) \((.*?)\)', output, re.M)
    assert marks[-3:] == [
      (str(best), 'best so far'),
      (str(best + 1), f'not better than step {best}'),
      (str(best + 2), f'not better than step {best}'),
    ]
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == result['history']
    assert runs.saved(tmp_path)[1]['progress']['stopped']

  def test_epochs(self, tmp_path):
    result = runs.run(
      tmp_path, num_steps=None, num_epochs=2, eval_every=None, log_every=100
    )
    per_epoch = result['step'] // 2
    assert [e['step'] for e in result['history'] if 'validation' in e] == [
      per_epoch,
      2 * per_epoch,
    ]
    rows = len(runs.dataset().splits['train'])
    assert per_epoch == math.ceil(rows / (256 // 36))

  def test_selects_by_a_weighted_sum(self, tmp_path):
    result = runs.run(
      tmp_path,
      select={'like/logloss': 1.0, 'gauc': 0.3},
      eval_every=2,
    )
    values = {
      e['step']: 0.3 * e['validation']['click/gauc']
      - e['validation']['like/logloss']
      for e in result['history']
      if 'validation' in e
    }
    assert result['best_step'] == max(values, key=values.get)


class TestResume:
  @pytest.mark.parametrize(
    'number, call',
    [(signal.SIGTERM, 5), pytest.param(signal.SIGINT, 8, marks=SLOW)],
  )
  def test_signal_between_steps(
    self, straight, tmp_path, monkeypatch, number, call
  ):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
      on_call(patch, loop.step_lib, 'make_train_step', call, send(number))
      result = runs.run(tmp_path)
    assert result['interrupted'] and result['step'] == call
    assert result['test'] is None
    assert not (tmp_path / 'metrics.json').exists()
    assert handlers == [
      signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)
    ]
    result = runs.run(tmp_path)
    np.testing.assert_equal(result, straight[1])
    runs.assert_same_run(tmp_path, straight[0])

  @pytest.mark.parametrize(
    'call', [2, pytest.param(5, marks=SLOW), pytest.param(8, marks=SLOW)]
  )
  def test_signal_during_evaluation(
    self, straight, tmp_path, monkeypatch, call
  ):
    # Of 4 batches each: the validations of step 5 and 10, and that of the end.
    with monkeypatch.context() as patch:
      on_call(
        patch, evaluation.step, 'make_eval_step', call, send(signal.SIGTERM)
      )
      result = runs.run(tmp_path)
    assert result['interrupted']
    np.testing.assert_equal(runs.run(tmp_path), straight[1])
    runs.assert_same_run(tmp_path, straight[0])

  @pytest.mark.parametrize('call', [8, pytest.param(12, marks=SLOW)])
  def test_crash(self, straight, tmp_path, monkeypatch, call):
    class PowerCutError(Exception):
      pass

    def crash(*unused_args):
      raise PowerCutError

    with monkeypatch.context() as patch:
      on_call(patch, loop.step_lib, 'make_train_step', call, crash)
      with pytest.raises(PowerCutError):
        runs.run(tmp_path)
    # Threads, prefetch and how many checkpoints are kept may change.
    other = dataclasses.replace(CONFIG.pipeline, num_threads=0, prefetch=1)
    result = runs.run(tmp_path, pipeline=other, keep_checkpoints=1)
    np.testing.assert_equal(result, straight[1])
    chex.assert_trees_all_equal(
      runs.saved(tmp_path)[0], runs.saved(straight[0])[0]
    )

  @SLOW
  def test_eight_devices(self, tmp_path, monkeypatch):
    changes = {'num_devices': 8, 'num_steps': 6, 'eval_every': 6}
    straight = runs.run(tmp_path / 'straight', **changes)
    with monkeypatch.context() as patch:
      on_call(patch, loop.step_lib, 'make_train_step', 2, send(signal.SIGTERM))
      assert runs.run(tmp_path / 'stopped', **changes)['interrupted']
    np.testing.assert_equal(runs.run(tmp_path / 'stopped', **changes), straight)
    runs.assert_same_run(tmp_path / 'straight', tmp_path / 'stopped')

  @SLOW
  def test_a_process_that_gets_sigterm_exits_with_0(self, straight, tmp_path):
    code = textwrap.dedent(f"""
      import sys
      sys.path.insert(0, {str(pathlib.Path.cwd())!r})
      from tests import conftest  # The same flags give the same bits.
      from tests.training import runs
      print(runs.run({str(tmp_path)!r})['interrupted'])
    """)
    process = children.start(
      [sys.executable, '-c', code],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
    )
    with process:
      for line in process.stdout:
        if line.startswith('step 3/12'):
          process.send_signal(signal.SIGTERM)
          break
      rest = process.stdout.read()
    assert process.returncode == 0
    assert 'by SIGTERM; saved' in rest and rest.endswith('True\n')
    np.testing.assert_equal(runs.run(tmp_path), straight[1])
    runs.assert_same_run(tmp_path, straight[0])


class TestAverage:
  @SLOW
  def test_it_is_what_is_evaluated_and_resumes(
    self, straight, tmp_path, monkeypatch
  ):
    result = runs.run(tmp_path / 'straight', average=0.8)
    with monkeypatch.context() as patch:
      on_call(patch, loop.step_lib, 'make_train_step', 7, send(signal.SIGTERM))
      assert runs.run(tmp_path / 'stopped', average=0.8)['interrupted']
    again = runs.run(tmp_path / 'stopped', average=0.8)
    np.testing.assert_equal(again, result)
    runs.assert_same_run(
      tmp_path / 'straight', tmp_path / 'stopped', average=0.8
    )
    state, _ = runs.saved(tmp_path / 'stopped', average=0.8)
    # Averaging changes no update; another program may round in another order.
    chex.assert_trees_all_close(
      state.variables,
      runs.saved(straight[0])[0].variables,
      rtol=1e-5,
      atol=1e-7,
    )
    latest, _ = checkpoints.load_variables(tmp_path / 'stopped', 'latest')
    averaged = jax.device_get(state.scoring_variables)
    chex.assert_trees_all_equal(jax.device_get(latest), averaged)
    last = result['history'][-1]
    assert last['step'] == result['step'] == state.step
    for variables, same in ((averaged, True), (state.variables, False)):
      found = evaluation.evaluate(
        ranker.Ranker(CONFIG.model),
        variables,
        runs.dataset().splits['validation'],
        CONFIG.pipeline,
        runs.mesh(),
      )
      assert (found == last['validation']) == same
    best, _ = checkpoints.load_variables(tmp_path / 'straight')
    found = evaluation.evaluate(
      ranker.Ranker(CONFIG.model),
      best,
      runs.dataset().splits['test'],
      CONFIG.pipeline,
      runs.mesh(),
    )
    assert found == result['test']


class TestFailures:
  @pytest.mark.parametrize(
    'call, kept', [(1, 'There is no checkpoint yet'), (7, 'that of step 5')]
  )
  def test_nan_stops_and_keeps_the_last_good_checkpoint(
    self, tmp_path, monkeypatch, call, kept
  ):
    def spoil(state, batch):
      params = jax.tree.map(lambda x: x * np.float32(np.nan), state.params)
      return dataclasses.replace(state, params=params), batch

    with monkeypatch.context() as patch:
      on_call(patch, loop.step_lib, 'make_train_step', call, spoil)
      with pytest.raises(
        FloatingPointError,
        match=rf'not finite in step {call}\. Lower optimizer\.learning_rate='
        rf'0\.001.*{kept}',
      ):
        runs.run(tmp_path)
    if call > 5:
      variables, _ = checkpoints.load_variables(tmp_path, 'latest')
      chex.assert_tree_all_finite(variables)
    assert not runs.run(tmp_path)['interrupted']

  def test_another_process_trains_there(self, tmp_path, monkeypatch, caplog):
    with locks.FolderLock(tmp_path, 'workdir'):
      with pytest.raises(
        ValueError, match=f'workdir={str(tmp_path)!r}: another process is at w'
      ):
        runs.run(tmp_path)
    assert not list(tmp_path.iterdir())
    # A disk may know no locks.
    unknown = OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(locks, '_locked', mock.Mock(side_effect=unknown))
    with workdir.alone(tmp_path):
      assert 'No locks available' in caplog.text

  def test_what_is_there_is_kept_if_no_checkpoint_is_whole(
    self, straight, tmp_path
  ):
    workdir = shutil.copytree(straight[0], tmp_path / 'copy')
    (workdir / 'metrics.json').unlink()
    for listing in workdir.glob('checkpoints/*/files.json'):
      listing.unlink()
    (workdir / 'features.npz').write_bytes(b'of that run')
    with pytest.raises(FileNotFoundError, match='none of the checkpoints'):
      runs.run(workdir, seed=1)
    assert (workdir / 'features.npz').read_bytes() == b'of that run'

  def test_more_distinct_ids_than_said(self, tmp_path):
    message = (
      "max_unique_ids has 'item': 3, but the batch of step 1 has "
      '(1[0-9]|20) distinct ids of that table'
    )
    pipeline = dataclasses.replace(CONFIG.pipeline, pack=True)
    with pytest.raises(ValueError, match=message):
      runs.run(tmp_path, pipeline=pipeline, max_unique_ids={'item': 3})

  def test_more_distinct_ids_before_a_new_shape(self, tmp_path):
    # What the first step did is found out while the second one is compiled.
    rows = dataclasses.replace(CONFIG.data.rows, kind='pointwise')
    data = dataclasses.replace(CONFIG.data, rows=rows)
    pipeline = dataclasses.replace(
      CONFIG.pipeline,
      batch_events=30,
      history_buckets=(2, 20),
      candidate_buckets=(1,),
      seed=48,
    )
    with pytest.raises(ValueError, match='step 1 has 15 distinct ids'):
      runs.run(
        tmp_path,
        data=data,
        data_of=datasets.load(data),
        pipeline=pipeline,
        log_every=1,
        max_unique_ids={'item': 10},
      )

  def test_other_schema_than_the_dataset(self, tmp_path):
    schema = dataclasses.replace(
      CONFIG.model.schema, tasks=CONFIG.model.schema.tasks[:1]
    )
    model = dataclasses.replace(CONFIG.model, schema=schema)
    with pytest.raises(
      ValueError, match=r"tasks\.1\.name: 'absent' \(model.schema\), 'like'"
    ):
      runs.run(tmp_path, model=model)

  def test_a_split_without_rows(self, tmp_path):
    data = runs.dataset()
    nobody = np.zeros(len(data.log), bool)
    empty = rows_lib.make_rows(data.log, nobody, CONFIG.data.rows)
    data = dataclasses.replace(data, splits={**data.splits, 'test': empty})
    with pytest.raises(
      ValueError, match=r"its split 'test'.*Events are from time 4227 to"
    ):
      loop.train_and_evaluate(CONFIG, tmp_path, dataset=data)

  def test_an_undefined_selection_metric(self, tmp_path):
    data = runs.dataset()
    log = data.log
    labels = {t: np.ones_like(y) for t, y in log.labels.items()}
    constant = dataclasses.replace(log, labels=labels)
    validation = dataclasses.replace(data.splits['validation'], log=constant)
    data = dataclasses.replace(
      data, splits={**data.splits, 'validation': validation}
    )
    with pytest.raises(
      ValueError,
      match=r"select: 'click/auc' is undefined on the validation split: all "
      r'80 labels .* are 1\. Select another metric, as .*click/logloss',
    ):
      loop.train_and_evaluate(CONFIG, tmp_path, dataset=data, mesh=runs.mesh())
    assert not any((tmp_path / 'checkpoints').glob('*'))  # Before step 1.

  def test_a_foreign_metrics_file(self, tmp_path):
    (tmp_path / 'metrics.json').write_text('{"auc": 1}')
    with pytest.raises(ValueError, match=r'metrics\.json was not written by'):
      runs.run(tmp_path)

  def test_workdir_is_a_file(self, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(FileExistsError, match=r"workdir='.*file' cannot be"):
      runs.run(tmp_path / 'file')


class TestEvaluation:
  def test_does_not_depend_on_buckets_or_devices(self, straight):
    variables, _ = checkpoints.load_variables(straight[0])
    model = ranker.Ranker(CONFIG.model)
    rows = runs.dataset().splits['validation']
    a = evaluation.predict(model, variables, rows, CONFIG.pipeline, runs.mesh())
    other = dataclasses.replace(
      CONFIG.pipeline, batch_events=500, history_buckets=(24,), num_threads=0
    )
    b = evaluation.predict(model, variables, rows, other, runs.mesh(8))
    assert len(a.predictions().group) == rows.candidate_counts.sum()
    np.testing.assert_array_equal(a.predictions().group, b.predictions().group)
    for task, logits in a.predictions().logits.items():
      np.testing.assert_allclose(
        logits, b.predictions().logits[task], rtol=1e-5, atol=1e-6
      )
    expected = metrics.auc(
      a.predictions().logits['click'], rows.log.labels['click'][rows.events]
    )
    assert a.result()['click/auc'] == expected

  def test_candidates_of_several_snapshots_are_refused(self):
    rows = dataclasses.replace(
      runs.dataset().splits['train'],
      config=rows_lib.RowConfig('snapshot', snapshot_every=9.0),
    )
    with pytest.raises(ValueError, match=r'snapshot_every=9\.0: a candidate'):
      evaluation.predict(ranker.Ranker(CONFIG.model), {}, rows, CONFIG.pipeline)

  def test_what_training_has_not_seen_is_scored_and_does_not_count(
    self, straight
  ):
    variables, _ = checkpoints.load_variables(straight[0])
    model = ranker.Ranker(CONFIG.model)
    rows = runs.dataset().splits['validation']
    train = dataclasses.replace(  # Of some users, and so of few items.
      runs.dataset().splits['train'],
      events=runs.dataset().splits['train'].events[:4],
    )
    known = cold.Known(cold.LeaveOut(True, 'item'), train)
    every, some = (
      evaluation.predict(
        model, variables, rows, CONFIG.pipeline, runs.mesh(), known=known
      ).predictions()
      for known in (None, known)
    )
    log = rows.log
    seen = [
      np.unique(x[train.events]) for x in (log.user, log.features['item'])
    ]
    keep = np.isin(log.user[rows.events], seen[0])
    keep &= np.isin(log.features['item'][rows.events], seen[1])
    counts = known.counts(rows)
    assert 0 < keep.sum() == counts.candidates - counts.left_out < len(keep)
    np.testing.assert_array_equal(some.group, every.group[keep])
    for task in every.logits:
      np.testing.assert_array_equal(some.logits[task], every.logits[task][keep])

  def test_a_run_says_what_it_leaves_out(self, tmp_path, capsys):
    data = runs.dataset()
    log = data.log
    events = data.splits['train'].events
    train = make_rows(
      log,
      np.isin(np.arange(len(log)), events[log.user[events] < 25]),
      data.splits['train'].config,
    )
    data = dataclasses.replace(data, splits={**data.splits, 'train': train})
    changes = {'data_of': data, 'num_steps': 2, 'eval_every': None}
    with pytest.raises(ValueError, match=r"cold_items='itm' must be one of"):
      runs.run(tmp_path / 'a', leave_out=cold.LeaveOut(False, 'itm'), **changes)
    result = runs.run(
      tmp_path / 'b', leave_out=cold.LeaveOut(cold_users=True), **changes
    )
    users = log.user[data.splits['test'].events]
    wanted = {
      'candidates': len(users),
      'cold_users': int((users >= 25).sum()),
      'cold_items': None,
      'left_out': int((users >= 25).sum()),
    }
    assert result['left_out']['test'] == wanted
    written = json.loads((tmp_path / 'b' / 'metrics.json').read_text())
    assert written['left_out'] == result['left_out']
    said = f'{wanted["left_out"]} left out ({wanted["cold_users"]} of cold'
    assert (
      f'of {len(users)} candidates count; {said}' in capsys.readouterr().out
    )
