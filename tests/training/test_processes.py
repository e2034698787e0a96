"""Processes and devices share the work, and the result is that of one."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from histjax.training import checkpoints, loop, processes
from tests import children
from tests.training import members, runs, test_loop, test_sharding

pytestmark = pytest.mark.slow

CHANGES = {
  'num_steps': 50,
  'eval_every': 25,
  'checkpoint_every': 10,
  'log_every': 5,
}


def assert_close(result, workdir, expected, expected_workdir):
  """Gradients are summed in another order."""
  assert result['best_step'] == expected['best_step']
  for entry, other in zip(result['history'], expected['history'], strict=True):
    assert entry['step'] == other['step']
    if 'loss' in entry:
      np.testing.assert_allclose(entry['loss'], other['loss'], atol=1e-5)
  for split in ('validation', 'test'):
    for name, value in expected[split].items():
      np.testing.assert_allclose(result[split][name], value, atol=1e-5)
  for which in ('best', 'latest'):
    found, _ = checkpoints.load_variables(workdir, which)
    wanted, _ = checkpoints.load_variables(expected_workdir, which)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted
    )
  assert (
    checkpoints.load_meta(workdir)['data']
    == checkpoints.load_meta(expected_workdir)['data']
  )


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """One process of one device."""
  workdir = tmp_path_factory.mktemp('one')
  return runs.run(workdir, **CHANGES), workdir


def test_eight_devices(one, tmp_path):
  result = runs.run(tmp_path, num_devices=8, **CHANGES)
  assert_close(result, tmp_path, *one)


def test_two_processes_of_four_devices(one, tmp_path, monkeypatch):
  """Eight devices of one, of two; one is killed; two go on, or two devices."""
  work = tmp_path / 'work'
  with monkeypatch.context() as patch:
    test_loop.on_call(
      patch,
      loop.step_lib,
      'make_train_step',
      7,
      test_loop.send(signal.SIGTERM),
    )
    assert runs.run(work, num_devices=8, **CHANGES)['interrupted']
  assert checkpoints.load_meta(work)['progress']['evaluated_step'] == 0

  started = members.start(
    work, devices=4, faults={1: {'step': 33, 'what': 'kill'}}, **CHANGES
  )
  outputs = [process.communicate() for process in started]
  assert [p.returncode for p in started] == [
    processes.EXIT_CODE,
    -signal.SIGKILL,
  ], outputs
  assert 'Resuming at step 7 of 50' in outputs[0][0]
  assert (
    f'process 1 (host {members.HOST}, pid {started[1].pid}) is lost'
    in (outputs[0][1])
  )
  assert 'step' not in outputs[1][0]  # One of them reports.
  # The last whole one; that of step 30 may have been written, or not.
  state, meta = runs.saved(work)
  assert state.step in (25, 30) and meta['data']['epoch'] == state.step // 6

  other = tmp_path / 'other'
  # What a save left is being deleted in the background.
  shutil.copytree(work, other, ignore=shutil.ignore_patterns('*tmp*'))
  (result, stdout), (same, _) = members.run(work, devices=4, **CHANGES)
  assert f'Resuming at step {state.step} of 50' in stdout
  np.testing.assert_equal(result, same)
  assert_close(result, work, *one)
  # Fewer devices, and one process.
  assert_close(runs.run(other, num_devices=2, **CHANGES), other, *one)


def test_sigterm_stops_all_of_them(one, tmp_path):
  started = members.start(tmp_path, **CHANGES)
  for line in started[0].stdout:
    if line.startswith('step 5/50'):
      started[1].send_signal(signal.SIGTERM)
      break
  outputs = [process.communicate() for process in started]
  assert [p.returncode for p in started] == [0, 0], outputs
  for stdout, _ in outputs:
    assert '"interrupted": true' in stdout
  assert 'saved: the same command goes on' in outputs[0][0]
  (result, _), _ = members.run(tmp_path, **CHANGES)
  assert_close(result, tmp_path, *one)


@pytest.mark.parametrize('what', ['config', 'workdir'])
def test_what_is_not_the_same_is_named(tmp_path, what):
  changes = [{}, {'seed': 3}] if what == 'config' else [{}, {}]
  workdirs = ['a', 'a'] if what == 'config' else ['a', 'b']
  started = members.start_each(
    [tmp_path / name for name in workdirs], changes, devices=1
  )
  outputs = [process.communicate() for process in started]
  text = ''.join(stderr for _, stderr in outputs)
  assert all(process.returncode for process in started), text
  assert {
    'config': 'the config: that of process 1 (host',
    'workdir': 'name a folder that all hosts share',
  }[what] in text


SCORES = """
import json, sys
import numpy as np
from histjax import metrics
from histjax.training import watchdog

def scored(rows):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(50, 3)).astype(np.float32)
  labels = (rng.random((50, 3)) < 0.3).astype(np.float32)
  found = metrics.RankingMetrics(['y'])
  if len(rows):
    found.update({'y': logits[rows]}, {'y': labels[rows]}, None, rows % 7)
  return found

if len(sys.argv) > 1:
  address, index = sys.argv[1], int(sys.argv[2])
  with watchdog.joined(address, 3, index):
    # Of different numbers, one of none.
    rows = np.split(np.arange(50), [13, 13])[index]
    print('RESULT', json.dumps(scored(rows).gather().result()))
"""


def test_metrics_merge_exactly():
  address = members.free_address()
  started = [
    children.start(
      [sys.executable, '-c', SCORES, address, str(index)],
      env=members.environment(1),
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(3)
  ]
  outputs = [process.communicate()[0] for process in started]
  found: dict = {}
  exec(SCORES.replace('len(sys.argv) > 1', 'False'), found)
  expected = found['scored'](np.arange(50)).result()
  for output in outputs:
    assert json.loads(output.rpartition('RESULT ')[2]) == expected


TABLES = textwrap.dedent("""
  import sys
  import jax, numpy as np
  jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
  assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
  from histjax.training import checkpoints, sharding
  from tests.training import test_sharding as t
  on = sharding.data_mesh(table=4)
  own = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
  found = t.train(t.create(on), on, rows=own)
  item = found.tables['tables']['item']
  assert item.addressable_shards[0].data.shape == (10, 4)
  with checkpoints.Checkpoints(sys.argv[3]) as manager:
    manager.save(found, {'best_step': None, 'config': {}})
  local = sharding.local_mesh(on)
  assert dict(local.shape) == {'data': 1, 'table': 4}
  variables = sharding.put_variables(found.variables, local)
  mine = variables['tables']['tables']['item']
  np.testing.assert_array_equal(np.asarray(mine), sharding.to_host(item))
""")


def test_tables_split_in_each_of_two_processes(tmp_path):
  address = members.free_address()
  started = [
    children.start(
      [
        sys.executable,
        '-c',
        TABLES,
        address,
        str(index),
        str(tmp_path),
      ],
      cwd=members.ROOT,
      env=members.environment(devices=4),
    )
    for index in range(2)
  ]
  assert [p.wait() for p in started] == [0, 0]
  two = test_sharding.mesh(2, 2)
  with checkpoints.Checkpoints(tmp_path) as manager:
    found, _ = manager.restore(test_sharding.create(two))
  test_sharding.assert_close(
    test_sharding.everything(found), test_sharding.on_one()[0]
  )
