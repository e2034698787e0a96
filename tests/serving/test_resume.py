"""A ranking that is interrupted goes on, and ends as if it had not been."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest
from pyarrow import parquet

from histjax.serving import batch
from tests import children
from tests.serving import many_users

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def paths(tmp_path):
  return many_users.write(tmp_path)


def start(folder, mode):
  return children.start(
    [sys.executable, '-m', 'tests.serving.many_users', str(folder), mode],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )


def until_pause(process):
  for line in process.stdout:
    if line == 'pause\n':
      return
  raise AssertionError(f'ended with {process.wait()}')


@pytest.mark.slow
def test_killed_and_interrupted(tmp_path, paths):
  parts = tmp_path / 'resumed.csv.parts'
  for mode, written in (('half_a_pass', 0), ('half_a_part', 1)):
    process = start(tmp_path, mode)
    until_pause(process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert len(list(parts.glob('part-*.parquet'))) == written
    assert not (tmp_path / 'resumed.csv').exists()
  assert len(list(parts.glob('.part-*.tmp'))) == 1
  process = start(tmp_path, 'half_a_shard')
  until_pause(process)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate()
  assert f'signal {int(signal.SIGTERM)} resumed 1' in said
  assert process.returncode == 0
  said, _ = start(tmp_path, 'to_the_end').communicate()
  assert 'resumed 1 of 5' in said and 'resumed 0 of 5' in said
  found = (tmp_path / 'resumed.csv').read_bytes()
  assert found == (tmp_path / 'at_once.csv').read_bytes()
  assert found.count(b'\n') == 1 + 3 * many_users.NUM_USERS
  assert not parts.exists()


class Starting(batch.Local):
  """Replaces handlers of signals when it starts, as Ray; gets one later."""

  def start(self):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

  def run(self, job, progress, stop):
    os.kill(os.getpid(), signal.SIGTERM)
    stop()


class Unreachable(batch.Local):
  def start(self):
    raise ConnectionError('there is no cluster')


def test_an_engine_that_replaces_handlers_is_interrupted(tmp_path, paths):
  before = signal.getsignal(signal.SIGTERM)
  try:
    done = batch.rank_files(
      many_users.model, *paths, tmp_path / 'ranked', engine=Starting()
    )
  finally:
    signal.signal(signal.SIGTERM, before)
  assert done.signal == signal.SIGTERM
  assert (tmp_path / 'ranked' / '_work').exists()  # It goes on from there.


def test_an_engine_that_cannot_start_leaves_nothing(tmp_path, paths):
  with pytest.raises(ConnectionError, match='there is no cluster'):
    batch.rank_files(
      many_users.model, *paths, tmp_path / 'ranked', engine=Unreachable()
    )
  assert not (tmp_path / 'ranked').exists()


def test_parts_are_written_once(tmp_path, paths, monkeypatch):
  output = tmp_path / 'ranked'
  first = batch.rank_files(many_users.model, *paths, output, many_users.OPTIONS)
  assert (first.num_shards, first.num_resumed, first.num_rows) == (5, 0, 90)
  parts = sorted(output.glob('part-*.parquet'))
  assert [parquet.read_metadata(p).num_rows for p in parts] == [21] * 4 + [6]
  whole = parquet.read_table(output / 'part-000002.parquet')
  (output / 'part-000002.parquet').unlink()
  times = [p.stat().st_mtime_ns for p in parts if p.exists()]
  again = batch.rank_files(many_users.model, *paths, output, many_users.OPTIONS)
  assert (again.num_shards, again.num_resumed, again.num_rows) == (5, 4, 90)
  assert parquet.read_table(output / 'part-000002.parquet').equals(whole)
  kept = [p.stat().st_mtime_ns for p in parts if '000002' not in p.name]
  assert kept == times
  # Nothing is read or scored again.
  monkeypatch.setattr(batch.shards, 'prepare', None)
  done = batch.rank_files(many_users.model, *paths, output, many_users.OPTIONS)
  assert (done.num_resumed, done.num_rows) == (5, 90)
  # A folder of parts is one table, its manifest passed over.
  assert parquet.read_table(output).num_rows == 90


def test_other_inputs_models_and_options(tmp_path, paths):
  output = tmp_path / 'ranked'
  batch.rank_files(many_users.model, *paths, output, many_users.OPTIONS)
  before = {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()}
  model = many_users.model()
  other = _changed(model)
  events, candidates = paths
  log = parquet.read_table(events[0])
  changed = tmp_path / 'changed.parquet'
  parquet.write_table(
    log.set_column(4, 'price', [np.full(len(log), 0.5)]), changed
  )
  for call, message in (
    (
      (lambda: other, events, candidates, many_users.OPTIONS),
      'scores with other model',
    ),
    (
      (lambda: model, [str(changed)], candidates, many_users.OPTIONS),
      'scores with other log',
    ),
    (
      (lambda: model, events, [str(changed)], many_users.OPTIONS),
      'scores with other candidates',
    ),
    (
      (lambda: model, events, candidates, batch.Options(top_k=4)),
      'other options.*top_k=3 then, 4 now; users_per_batch=4 then, 32 now',
    ),
  ):
    load, log, shown, options = call
    with pytest.raises(ValueError, match=message):
      batch.rank_files(load, log, shown, output, options)
  assert before == {p.name: p.read_bytes() for p in output.iterdir()}


def _changed(model):
  variables = {**model.variables}
  first = sorted(variables)[0]
  variables[first] = _plus(variables[first])
  return batch.Model(model.config, variables, model.join)


def _plus(tree):
  if isinstance(tree, dict):
    return {name: _plus(x) for name, x in tree.items()}
  return tree + 1


def test_a_second_start_meanwhile(tmp_path, paths):
  """It is refused, before any work, and what the first has done is kept."""
  output = tmp_path / 'ranked'

  class Started(batch.Local):
    def run(self, job, *args):
      before = sorted(output.rglob('*'))
      with pytest.raises(ValueError, match="ranked': another process is at"):
        batch.rank_files(None, *paths, output, many_users.OPTIONS)
      assert sorted(output.rglob('*')) == before
      super().run(job, *args)

  done = batch.rank_files(
    many_users.model, *paths, output, many_users.OPTIONS, engine=Started()
  )
  assert done.num_rows == 90
  assert '_lock' not in {path.name for path in output.iterdir()}


def test_a_folder_of_something_else(tmp_path, paths):
  output = tmp_path / 'ranked'
  output.mkdir()
  (output / 'letter.txt').write_text('Dear')
  with pytest.raises(
    ValueError, match=r'holds files and no _manifest\.json of'
  ):
    batch.rank_files(many_users.model, *paths, output)
  assert (output / 'letter.txt').read_text() == 'Dear'


def test_a_part_of_something_else(tmp_path, paths):
  output = tmp_path / 'ranked'
  batch.rank_files(many_users.model, *paths, output, many_users.OPTIONS)
  part = output / 'part-000001.parquet'
  parquet.write_table(parquet.read_table(paths[0][0]), part)
  with pytest.raises(ValueError, match=r'000001\.parquet is none of the parts'):
    batch.rank_files(many_users.model, *paths, output, many_users.OPTIONS)
  part.write_bytes(b'PAR1')
  with pytest.raises(ValueError, match=r'000001\.parquet cannot be read'):
    batch.rank_files(many_users.model, *paths, output, many_users.OPTIONS)


if __name__ == '__main__':
  absltest.main()
