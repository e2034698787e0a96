"""The binaries, as a user starts them."""

import csv
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import evaluate
import histjax
from fusion_study.config import StudyConfig
from histjax import Ranker, Scorer, features
from histjax import config as config_lib
from histjax.serving import load
from histjax.training import evaluation
from histjax.training import state as state_lib
from tests import children
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import config_util


def get_config():
  return config_util.config_dict({
    'data': {
      'source': {
      'type': 'events',
      'paths': ('LOG',),
      'schema': {
        'user': 'uid',
        'time': 'ts',
        'context': [
          {'type': 'categorical', 'name': 'country', 'column': 'land',
           'size': 16, 'ids': 'hash'},
        ],
        'item': [
          {'type': 'categorical', 'name': 'item', 'column': 'sku',
           'size': 64, 'ids': 'vocabulary'},
          {'type': 'dense', 'name': 'price', 'column': 'eur', 'log': True},
        ],
        'action': [{'type': 'categorical', 'name': 'bought', 'size': 2}],
        'tasks': [{'name': 'buy', 'column': 'bought'}],
      },
      },
      'features': [{'type': 'time_gap', 'buckets': 24}],
      'rows': {'kind': 'streaming'},
    },
    'model': {
      'encoder': {'num_layers': 1, 'width': 8, 'num_heads': 1},
      'embedding_dim': 4,
    },
    'pipeline': {'batch_events': 512, 'auto_buckets': 1, 'num_threads': 0},
    'task_weights': {'buy': 1.0},
    'num_epochs': 1,
    'tensorboard': False,
  })
"""


def slow(*values):
  """A process takes seconds to import everything."""
  return pytest.param(*values, marks=pytest.mark.slow)


def run(binary, *flags, expect=0, cwd=None, **variables):
  """Runs a binary; returns what it printed."""
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  environment |= variables
  done = subprocess.run(
    [sys.executable, ROOT / 'experiments' / f'{binary}.py', *flags],
    capture_output=True,
    text=True,
    check=False,
    env=environment,  # As a user runs it: one device.
    cwd=cwd,
  )
  assert 'Traceback' not in done.stderr, done.stderr
  assert (done.returncode == 0) == (expect == 0), done.stderr + done.stdout
  return done.stdout + done.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A log with column names of its own, and a ranker trained on it."""
  folder = tmp_path_factory.mktemp('run')
  rng = np.random.default_rng(0)
  size = 600
  columns = {
    'uid': [f'u{i}' for i in rng.integers(0, 20, size)],
    'ts': np.datetime64('2024-01-01T00:00:00', 'ms')
    + rng.integers(0, 10**10, size).astype('timedelta64[ms]'),
    'sku': [f'sku-{i}' for i in rng.integers(0, 30, size)],
    'eur': rng.gamma(2.0, 5.0, size),
    'bought': rng.integers(0, 2, size),
  }
  columns['land'] = [['DE', 'FR'][int(u[1:]) % 2] for u in columns['uid']]
  log = folder / 'log.parquet'
  parquet.write_table(pa.table(columns), log)
  config = folder / 'config.py'
  config.write_text(CONFIG.replace('LOG', log.name))
  # From its own folder, with paths relative to that.
  output = run(
    'train', '--config=config.py', '--workdir=~/work', cwd=folder, HOME=folder
  )
  return folder, output


def changed(folder):
  """The log with other labels."""
  table = parquet.read_table(folder / 'log.parquet')
  bought = pa.array(1 - table['bought'].to_numpy())
  index = table.column_names.index('bought')
  path = folder / 'changed.parquet'
  parquet.write_table(table.set_column(index, 'bought', bought), path)
  return path


class TestBinaries:
  def test_train(self, trained):
    folder, output = trained
    assert 'Test, with the parameters of step' in output
    assert 'Validation at step' in output
    assert 'item: a vocabulary of 30 of 30 training ids, in 64 rows' in output
    assert 'Events are from 2024-01-01T' in output
    assert 'country: 2 distinct ids hashed to 16 rows; 0 (0.00%)' in output
    metrics = json.loads((folder / 'work' / 'metrics.json').read_text())
    assert set(metrics['test']) == {
      f'buy/{m}' for m in ('auc', 'gauc', 'logloss', 'ne')
    }

  def test_a_finished_run_is_not_repeated(self, trained):
    folder, _ = trained
    output = run(
      'train', '--config=config.py', f'--workdir={folder}/work', cwd=folder
    )
    assert 'finished; its metrics are returned' in output
    # From elsewhere, with the log where it is.
    output = run(
      'train',
      f'--config={folder}/config.py',
      f'--workdir={folder}/work',
      f'--config.data.source.paths={folder}/log.parquet',
    )
    assert 'finished; its metrics are returned' in output
    output = run(
      'train',
      f'--config={folder}/config.py',
      f'--workdir={folder}/work',
      f'--config.data.source.paths={changed(folder)}',
      expect=1,
    )
    assert 'the data has changed since this run was trained' in output

  @pytest.mark.slow
  def test_another_config_is_refused_in_the_same_workdir(self, trained):
    folder, _ = trained
    output = run(
      'train',
      f'--config={folder}/config.py',
      f'--workdir={folder}/work',
      '--config.model.encoder.num_layers=2',
      '--config.optimizer.learning_rate=0.5',
      expect=1,
      cwd=folder,
    )
    assert 'model.encoder.num_layers: 1 (in workdir), 2 (asked for)' in output
    assert 'optimizer.learning_rate: 0.001 (in workdir), 0.5' in output

  @pytest.mark.parametrize(
    ('flag', 'message'),
    [
      (
        '--config.optimizer.learning_rat=1',
        "did you mean 'optimizer.learning_rate'?",
      ),
      slow(
        '--config.model.encoder.num_layers=two', "num_layers='two' must be int"
      ),
      slow(
        '--config.data.source.split.type=time_splt',
        "did you mean 'time_split'?",
      ),
      slow('--config.model.schema.user=u', 'model.schema.user cannot be set'),
      slow('--workdir=gs://bucket/run', "workdir='gs://bucket/run' is a URL"),
      slow('--workdir=', "workdir='' is empty"),
      slow('--config.model.fusion=late', "fusion='late' is unknown"),
      slow(
        '--config.model.encoder.causal=False',
        "streaming' with model.encoder.causal=False",
      ),
      slow(
        '--config.data.source.paths=("absent.csv",)',
        'absent.csv does not exist',
      ),
      slow('--epochs=3', 'epochs'),
      slow('--config=absent.py', "--config='absent.py' does not exist; name a"),
    ],
  )
  def test_bad_flag(self, trained, flag, message):
    folder, _ = trained
    output = run(
      'train',
      f'--config={folder}/config.py',
      f'--workdir={folder}/other',
      flag,
      expect=1,
      cwd=folder,
    )
    assert message in output

  @pytest.mark.slow
  def test_every_field_can_be_set(self, trained):
    folder, _ = trained
    run(
      'train',
      '--config=config.py',
      f'--workdir={folder}/fields',
      '--config.num_steps=2',
      '--config.model.encoder.window=None',
      '--config.data.source.split.type=time_split',
      '--config.data.source.split.validation_start=2024-03-01',
      '--config.data.source.split.test_start=2024-04-01',
      '--config.select.gauc=0.3',
      '--config.pipeline.history_buckets=64,128',
      cwd=folder,
    )
    metrics = json.loads((folder / 'fields' / 'metrics.json').read_text())
    config = metrics['config']
    assert (config['num_steps'], config['num_epochs']) == (2, None)
    assert config['data']['source']['split'] == {
      'type': 'time_split',
      'validation_start': '2024-03-01',
      'test_start': '2024-04-01',
    }
    assert config['select'] == {'auc': 1.0, 'gauc': 0.3}
    assert config['pipeline']['history_buckets'] == [64, 128]
    assert metrics['step'] == 2

  @pytest.mark.slow
  def test_a_feature_of_ones_own(self, trained):
    folder, _ = trained
    (folder / 'my_features.py').write_text(
      re.findall(
        r'```python\n(# my_features.py.*?)```',
        (ROOT / 'docs/extending/feature.md').read_text(),
        re.DOTALL,
      )[0]
    )
    text = (folder / 'config.py').read_text()
    text = text.replace("'time_gap', 'buckets': 24", "'weekday'")
    (folder / 'own.py').write_text('import my_features\n' + text)
    work = f'--workdir={folder}/own'
    run('train', '--config=own.py', work, cwd=folder)
    message = "type='weekday' must be one of .*; import the module of a class"
    assert re.search(message, run('evaluate', work, expect=1, cwd=folder))
    run('evaluate', work, '--modules=my_features', cwd=folder)

  def test_a_bad_config_file(self, trained):
    folder, _ = trained
    text = (folder / 'config.py').read_text().replace("'width'", "'widht'")
    (folder / 'bad.py').write_text(text)
    output = run(
      'train', '--config=bad.py', '--workdir=other', expect=1, cwd=folder
    )
    assert "did you mean 'model.encoder.width'?" in output
    output = run(
      *('train', '--config=config.py', '--workdir=other', '--num_epochs=1'),
      expect=1, cwd=folder,
    )  # fmt: skip
    assert '--num_epochs; did you mean --config.num_epochs?' in output

  def test_a_config_file_without_get_config(self, tmp_path):
    (tmp_path / 'bare.py').write_text("config = {'num_steps': 4}\n")
    output = run(
      'train', '--config=bare.py', '--workdir=w', expect=1, cwd=tmp_path
    )
    assert re.search(r'bare\.py has no get_config\(\); .*/events\.py', output)

  @pytest.mark.slow
  @pytest.mark.parametrize(
    'line, message',
    [
      (
        'config.pipelin.seed = 1',
        r'AttributeError: .*pipelin.*pipeline.*\(.*bad.py, line \d+\)',
      ),
      ('config.absent', r'AttributeError: .*absent.*\(.*bad.py, line \d+\)'),
      ('import absent', r'ModuleNotFoundError: .*\(.*bad.py, line \d+\)'),
      ('open("absent")', r"OSError: --config='.*bad.py': .*'absent'"),
      ('config = (', r'SyntaxError: .*bad.py, line \d+\)'),
    ],
  )
  def test_a_bad_line_of_a_config_file(self, tmp_path, line, message):
    (tmp_path / 'bad.py').write_text(
      'import config_util\n\n\ndef get_config():\n'
      "  config = config_util.config_dict({'num_steps': 4, 'data': "
      "{'source': {'type': 'synthetic'}}})\n"
      f'  {line}\n  return config\n'
    )
    output = run(
      'train', f'--config={tmp_path}/bad.py', f'--workdir={tmp_path}', expect=1
    )
    assert re.search(message, output, re.DOTALL), output

  @pytest.mark.slow
  def test_synthetic_data_in_which_nothing_is_planted(self, tmp_path):
    source = '--config.data.source'
    output = run(
      'train',
      f'--config={ROOT}/experiments/configs/synthetic.py',
      f'--workdir={tmp_path}/work',
      *(f'{source}.{name}=0' for name in ('quality_scale', 'segment_scale')),
      f'{source}.strength=0',
      f'{source}.num_users=40',
      *('--config.num_steps=1', '--config.eval_every=None'),
      '--config.optimizer.schedule=constant',
      '--noconfig.tensorboard',
    )
    assert re.search(r'click: test AUC .*possible is 0\.5000\n', output)

  @pytest.mark.slow
  @pytest.mark.parametrize(
    'given, message',
    [
      (['--num_processes=2'], 'are of --multi_host; add it'),
      (['--multi_host'], 'multi_host: no cluster was found'),
      (
        ['--multi_host', '--coordinator_address=localhost:1234'],
        'num_processes and process_id must be given, too',
      ),
    ],
  )
  def test_bad_flags_of_many_processes(self, trained, tmp_path, given, message):
    output = run(
      'train',
      f'--config={trained[0]}/config.py',
      f'--workdir={tmp_path}/work',
      *given,
      expect=1,
      cwd=trained[0],
    )
    assert message in output

  @pytest.mark.slow
  def test_a_run_that_was_not_validated(self, trained, tmp_path):
    """Every binary says which flag takes its parameters, and has it."""
    work = tmp_path / 'work'
    steps = ['--config.num_steps=99', '--config.checkpoint_every=1']
    started = children.start(
      [
        *(sys.executable, ROOT / 'experiments' / 'train.py'),
        *('--config=config.py', f'--workdir={work}', *steps),
        *('--config.eval_every=99', '--config.log_every=1'),
      ],
      cwd=trained[0],
      stdout=subprocess.PIPE,
      text=True,
    )
    for line in started.stdout:
      if line.startswith('step 3/'):
        started.terminate()
    started.communicate()
    log = trained[0] / 'log.parquet'
    table = parquet.read_table(log)
    later = pa.array(table['ts'].to_numpy() + np.timedelta64(3650, 'D'))
    table = table.set_column(table.column_names.index('ts'), 'ts', later)
    parquet.write_table(table, tmp_path / 'later.parquet')
    of_score = [f'--events={log}', f'--candidates={tmp_path}/later.parquet']
    of_export = ['--platform=cpu', '--rows=1', '--events=16', '--candidates=8']
    of_export += ['--new_events=1', f'--output={tmp_path}/model']
    for binary, flags in {
      'evaluate': [],
      'score': [*of_score, f'--output={tmp_path}/ranked.csv'],
      'export': of_export,
      'serve': ['--warm_up=16,8'],
    }.items():
      output = run(binary, f'--workdir={work}', *flags, expect=1)
      assert 'take the latest one: --latest, or which=' in output
      if binary != 'serve':
        run(binary, f'--workdir={work}', '--latest', *flags)

  @pytest.mark.slow
  def test_unwritable_workdir(self, trained):
    folder, _ = trained
    (folder / 'file').write_text('')
    output = run(
      'train',
      f'--config={folder}/config.py',
      f'--workdir={folder}/file/work',
      expect=1,
    )
    assert 'file/work' in output
    assert 'cannot be written to' in output

  def test_evaluate_agrees_with_training(self, trained):
    folder, _ = trained
    run('evaluate', f'--workdir={folder}/work', f'--output={folder}/test.json')
    found = json.loads((folder / 'test.json').read_text())
    trained_metrics = json.loads((folder / 'work/metrics.json').read_text())
    assert found.pop('ids') == trained_metrics['ids']
    assert found == pytest.approx(trained_metrics['test'], abs=1e-6)

  @pytest.mark.slow
  def test_evaluate_without_cold_items(self, trained):
    folder, _ = trained
    flags = [f'--workdir={folder}/work', f'--output={folder}/cold.json']
    output = run('evaluate', *flags, '--leave_out_cold_items=item')
    counts = json.loads((folder / 'cold.json').read_text())['left_out']
    assert counts['left_out'] == counts['cold_items']
    assert counts['cold_users'] is None
    assert (
      f'of {counts["candidates"]} candidates count; {counts["left_out"]} left'
    ) in output
    output = run('evaluate', *flags, '--leave_out_cold_items=sku', expect=1)
    assert "leave_out.cold_items='sku' must be one of" in output

  @pytest.mark.slow
  @pytest.mark.parametrize(
    ('dtype', 'error'), [('model', 1e-4), ('int8', 0.02)]
  )
  def test_evaluate_from_kept_keys_and_values(self, trained, dtype, error):
    folder, _ = trained
    output = folder / f'{dtype}.json'
    run(
      'evaluate',
      f'--workdir={folder}/work',
      f'--cache_dtype={dtype}',
      f'--output={output}',
    )
    trained_metrics = json.loads((folder / 'work/metrics.json').read_text())
    found = json.loads(output.read_text())
    del found['ids']
    assert found == pytest.approx(trained_metrics['test'], abs=error)

  @pytest.mark.slow
  def test_evaluate_when_the_log_has_moved(self, trained):
    folder, output = trained
    moved = folder / 'elsewhere' / 'moved.parquet'
    moved.parent.mkdir()
    shutil.copy(folder / 'log.parquet', moved)
    shutil.copytree(folder / 'work', folder / 'elsewhere' / 'work')
    output = run(
      'evaluate',
      '--workdir=work',
      '--paths=moved.parquet',
      cwd=folder / 'elsewhere',
    )
    assert 'buy/auc' in output
    output = run(
      'evaluate',
      f'--workdir={folder}/work',
      f'--paths={changed(folder)}',
      expect=1,
    )
    assert 'the data has changed since this run was trained' in output

  @pytest.mark.parametrize(
    'output, message',
    [('absent/test.json', 'cannot be written ('), ('', 'is a folder')],
  )
  def test_evaluate_checks_its_output_first(self, trained, output, message):
    folder, _ = trained
    printed = run(
      'evaluate',
      f'--workdir={folder}/absent',  # It does not come to that.
      f'--output={folder}/{output}',
      expect=1,
    )
    assert f"--output='{folder}" in printed and message in printed

  def test_score(self, trained):
    folder, _ = trained
    candidates = {
      'uid': ['u1'] * 12 + ['new'] * 5,
      'sku': [f'sku-{i}' for i in [*range(12), *range(5)]],
      'eur': np.linspace(1, 20, 17),
      'land': ['FR'] * 17,
      'ts': np.full(17, np.datetime64('2024-06-01T00:00', 'ms')),
    }
    parquet.write_table(pa.table(candidates), folder / 'candidates.parquet')
    output = run(
      'score',
      f'--workdir={folder}/work',
      f'--events={folder}/log.parquet',
      f'--candidates={folder}/candidates.parquet',
      f'--output={folder}/ranked.csv',
      '--top_k=8',
    )
    with open(folder / 'ranked.csv') as f:
      ranked = list(csv.DictReader(f))
    by_user = {u: [r for r in ranked if r['uid'] == u] for u in ('u1', 'new')}
    assert [len(r) for r in by_user.values()] == [8, 5]
    assert '1 of 2 users are in the log' in output
    assert '2/2 users' in output
    assert 'Traceback' not in output
    for user, rows in by_user.items():
      assert [int(r['rank']) for r in rows] == list(range(1, len(rows) + 1))
      scores = [float(r['score_buy']) for r in rows]
      assert scores == sorted(scores, reverse=True)
      assert all(0 < s < 1 for s in scores)
      own = [candidates['uid'][int(r['row'])] for r in rows]
      assert set(own) == {user}

  @pytest.mark.slow
  def test_score_without_a_column(self, trained):
    folder, _ = trained
    table = pa.table({'uid': ['u1'], 'skus': ['sku-1']})
    parquet.write_table(table, folder / 'bad.parquet')
    output = run(
      'score',
      f'--workdir={folder}/work',
      f'--events={folder}/log.parquet',
      f'--candidates={folder}/bad.parquet',
      f'--output={folder}/bad.csv',
      expect=1,
    )
    assert "column 'sku' is not in" in output
    assert "did you mean 'skus'?" in output
    assert not (folder / 'bad.csv').exists()

  @pytest.mark.parametrize(
    ('flags', 'message'),
    [
      (
        ['--candidates=nope.csv'],
        'nope.csv does not exist; check --candidates',
      ),
      slow(['--events=nope.csv'], 'nope.csv does not exist; check --events'),
      # Said before anything is read, the run included.
      (['--workdir=absent', '--output=absent/x.csv'], 'absent is no folder'),
      (['--task=sell'], '--task=sell is not a task of the run; it has'),
      ([], "none of the 1 users of the candidates, such as '1', is in the log"),
    ],
  )
  def test_score_is_refused(self, trained, flags, message):
    folder, _ = trained
    table = pa.table(
      {
        'uid': [1],
        'sku': ['sku-1'],
        'eur': [1.0],
        'land': ['FR'],
        'ts': ['2024-06-01'],
      }
    )
    parquet.write_table(table, folder / 'nobody.parquet')
    output = run(
      'score',
      f'--workdir={folder}/work',
      f'--events={folder}/log.parquet',
      f'--candidates={folder}/nobody.parquet',
      f'--output={folder}/nobody.csv',
      *flags,
      expect=1,
    )
    assert message in output
    assert 'Traceback' not in output
    assert not (folder / 'nobody.csv').exists()

  def test_size(self, trained):
    folder, _ = trained
    output = run('size', f'--workdir={folder}/work', '--lengths=16,64')
    assert [line[:18] for line in output.splitlines()] == [
      '| model | L | floa',
      '| --- | --- | --- ',
      *['| 1 layers, D 8 | '] * 2,
    ]

  def test_evaluate_on_rows_of_another_kind(self, trained):
    folder, _ = trained
    output = run(
      'evaluate', f'--workdir={folder}/work', '--prepared=rows', expect=1
    )
    assert '--prepared=rows is prepared rows, whose fingerprint' in output

  def test_export(self, trained):
    folder, _ = trained
    output = run(
      'export',
      f'--workdir={folder}/work',
      '--platform=cpu',
      f'--output={folder}/model',
      '--rows=1',
      '--events=16',
      '--candidates=8',
      '--new_events=1',
    )
    assert re.search(r'score-1x16x8: \d+ bytes', output)
    assert re.search(r'score 1 x 16 x 8: first .* s, then .* ms', output)
    assert re.search(r'buy: off by .*, at most 0.0001', output)
    assert f'13 files in {folder}/model' in output
    config = json.loads((folder / 'model' / 'config.json').read_text())
    assert config['rows']['kind'] == 'streaming'
    assert features.load(folder / 'model').configs == (
      features.TimeGap(buckets=24),
    )
    # What is asked of one is what is asked of the other.
    scorer = Scorer.from_workdir(folder / 'work')
    row = scorer.make_row(
      context={'land': 'FR'},
      history={
        'sku': ['sku-1', 'sku-2'],
        'eur': [1.0, 2.0],
        'bought': [0, 1],
        'ts': ['2024-06-01', '2024-06-02'],
      },
      candidates={
        'sku': ['sku-3', 'new'],
        'eur': [3.0, 4.0],
        'ts': ['2024-06-03'] * 2,
      },
    )
    batch = histjax.collate([row])
    wanted = scorer.score(
      scorer.encode(batch.history), batch.candidates, batch.context
    )
    model = load.load(folder / 'model')
    found = model.score(
      model.encode(batch.history.features, batch.history.length),
      batch.candidates.features,
      batch.context,
    )
    np.testing.assert_allclose(found['buy'], wanted['buy'], 1e-5, 1e-5)

  @pytest.mark.parametrize(
    ('flag', 'message'),
    [
      ('--output=', "output='' is empty"),
      slow('--rows=1,x', "--rows=['1', 'x'] must be whole numbers"),
      slow('--workdir=absent', 'absent'),
      slow('--compute_capability=9.0', "with platform='cpu'"),
      slow('--platform=gpu', 'value should be one of <cpu|cuda|tpu>'),
    ],
  )
  def test_export_is_refused(self, trained, flag, message):
    folder, _ = trained
    output = run(
      'export',
      f'--workdir={folder}/work',
      f'--output={folder}/refused',
      '--platform=cpu',
      flag,
      expect=1,
    )
    assert message in output
    assert not (folder / 'refused').exists()

  @pytest.mark.slow
  def test_export_that_is_ended_leaves_nothing(self, trained, tmp_path):
    folder, _ = trained
    export = children.start(
      [
        sys.executable,
        ROOT / 'experiments' / 'export.py',
        f'--workdir={folder}/work',
        '--platform=cpu',
        f'--output={tmp_path}/model',
      ],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    while not os.listdir(tmp_path):
      assert export.poll() is None
      time.sleep(0.01)
    export.terminate()
    assert export.communicate()[1] == b''
    assert export.returncode == 128 + signal.SIGTERM
    assert not os.listdir(tmp_path)

  @pytest.mark.slow
  def test_benchmark(self, trained):
    folder, _ = trained
    output = run(
      'benchmark',
      f'--workdir={folder}/work',
      '--lengths=8',
      '--candidates=4',
      '--seconds=0.01',
      f'--output={folder}/scoring',
    )
    assert 'plain/cached' in output
    report = json.loads((folder / 'scoring.json').read_text())
    assert report['results'][0]['cached']['max_difference_from_plain'] < 1e-5
    assert (folder / 'scoring.png').stat().st_size > 1000

  def test_benchmark_checks_its_flags_first(self, trained):
    folder, _ = trained
    (folder / 'plain').touch()
    output = run('benchmark', f'--output={folder}/plain/scoring', expect=1)
    assert "--output='" in output and 'cannot be written to' in output


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--suite=towers', 'flag --suite=towers: value should be one of'),
    ('--lengths=64,x', '--lengths=64,x must be whole numbers above 0'),
  ],
)
def test_a_message_names_the_flag(flag, message):
  assert message in run('benchmark', flag, expect=1)


def test_every_config_can_be_loaded(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'experiments')
  from ml_collections import config_flags  # Registers the file's loader.

  del config_flags
  import importlib.util

  for path in sorted((ROOT / 'experiments' / 'configs').glob('*.py')):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if path.stem.startswith('study'):
      config_lib.from_dict(StudyConfig, config.to_dict())
    else:
      known = ('synthetic', 'movielens', 'kuairand', 'events')
      assert config.data.source.type in known
    assert f'configs/{path.name}' in module.__doc__ or path.stem == 'events'


def test_evaluate_from_kept_keys_and_values_of_a_packed_run():
  """Users share rows in training; states are of one user each."""
  # Without a context, whose shape would tell.
  schema = dataclasses.replace(runs.MODEL.schema, context=())
  model = dataclasses.replace(runs.MODEL, schema=schema)
  pipeline = dataclasses.replace(
    runs.CONFIG.pipeline, pack=True, history_buckets=(40,), num_threads=0
  )
  config = dataclasses.replace(runs.CONFIG, model=model, pipeline=pipeline)
  rows = runs.dataset().splits['test']
  rows = dataclasses.replace(
    rows, log=dataclasses.replace(rows.log, schema=schema)
  )
  ranker = Ranker(model)
  variables = ranker.init(jax.random.key(0), state_lib.example_batch(schema))
  found = evaluate.evaluate_cached(config, variables, rows, None)
  mesh = runs.mesh()
  wanted = evaluation.evaluate(ranker, variables, rows, pipeline, mesh)
  # Float32 sums in another order.
  assert found == pytest.approx(wanted, abs=1e-4)
