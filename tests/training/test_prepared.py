"""Runs on prepared rows: those of a log in memory, resumed, and served."""

import dataclasses
import signal

import chex
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from histjax import Scorer
from histjax.data import datasets, prepare, synthetic
from histjax.data.prepare import Options
from histjax.features import Activity, Rates
from histjax.progress import Progress
from histjax.training import identity, loop
from tests.training import runs, test_loop, test_run


@pytest.fixture(scope='module')
def log(tmp_path_factory):
  """A folder with the synthetic log, in two files."""
  folder = tmp_path_factory.mktemp('prepared')
  columns = synthetic.draw(runs.DATA.source)
  table = pa.table({k: v for k, v in columns.items() if 'bayes' not in k})
  half = len(table) // 2
  (folder / 'log').mkdir()
  for number, part in enumerate((table.slice(0, half), table.slice(half))):
    parquet.write_table(part, folder / 'log' / f'{number}.parquet')
  return folder


def shards(folder, num_shards) -> datasets.DataConfig:
  """The config of the log, prepared as so many shards."""
  data = datasets.DataConfig(
    datasets.Events(
      (str(folder / 'log'),),
      synthetic.schema(runs.DATA.source),
      synthetic.SPLIT,
    ),
    features=(Rates(('item',)), Activity((3600,))),
  )
  out = folder / f'{num_shards}'
  prepare.prepare(
    data,
    out,
    Options(num_shards=num_shards),
    progress=Progress(say=lambda line: None),
  )
  return dataclasses.replace(data, prepared=str(out))


def run(workdir, data, **changes):
  dataset = datasets.load(data)
  model = dataclasses.replace(runs.MODEL, schema=dataset.schema)
  config = dataclasses.replace(runs.CONFIG, data=data, model=model, **changes)
  return loop.train_and_evaluate(config, workdir, mesh=runs.mesh()), config


def test_trains_as_in_memory(log, tmp_path):
  data = shards(log, 1)  # Users in the same order.
  found, _ = run(tmp_path / 'prepared', data)
  wanted, config = run(
    tmp_path / 'memory', dataclasses.replace(data, prepared='')
  )
  np.testing.assert_equal(found, wanted)
  # The folder is recorded, by its whole path; it may have moved since.
  meta = test_run.run.load(tmp_path / 'prepared').meta
  assert meta['config']['data']['prepared'] == data.prepared
  assert identity.run_differences(meta['config'], config, ('a', 'b')) == []


def test_resumes_and_serves(log, tmp_path, monkeypatch):
  data = shards(log, 3)
  straight, _ = run(tmp_path / 'straight', data)
  with monkeypatch.context() as patch:
    test_loop.on_call(
      patch, loop.step_lib, 'make_train_step', 7, test_loop.send(signal.SIGTERM)
    )
    stopped, _ = run(tmp_path / 'resumed', data)
  assert stopped['interrupted'] and stopped['step'] == 7
  resumed, _ = run(tmp_path / 'resumed', data)
  np.testing.assert_equal(resumed, straight)
  again, _ = run(tmp_path / 'resumed', data)  # Finished.
  np.testing.assert_equal(again, straight)
  with pytest.raises(ValueError, match='data has changed since'):
    run(tmp_path / 'resumed', shards(log, 2))
  scorer = Scorer.from_workdir(tmp_path / 'straight')
  request = {**test_run.REQUEST, 'context': {'segment': 1, 'user': 3}}
  row = scorer.make_row(**request)
  memory = datasets.load(dataclasses.replace(data, prepared=''))
  wanted = datasets.load(data).features
  assert wanted.digest() == memory.features.digest()
  assert set(row.candidates) >= {'rate_item', 'activity_3600'}
  chex.assert_tree_all_finite(row.candidates)
