"""A model and files of many users; as a program, ranks and stops on the way."""

import pathlib
import signal
import sys
import time
from unittest import mock

import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from histjax.data import joins
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig
from histjax.features import HistoryRates, TimeGap
from histjax.schema import Categorical, Dense, Schema, Task
from histjax.serving import batch, ranked_files
from tests import support
from tests.data import logs

SCHEMA = Schema(
  'user',
  'time',
  context=(Categorical('land', 3),),
  item=(Categorical('item', 50), Dense('price')),
  action=(Categorical('clicked', 2),),
  tasks=(Task('click', column='clicked'),),
)
NUM_USERS = 30
OPTIONS = batch.Options(top_k=3, users_per_batch=4, users_per_shard=7)


def columns(rng, user):
  n = len(user)
  return {
    'user': user,
    'time': rng.integers(0, 1000, n),
    'land': user % 3,
    'item': rng.integers(0, 50, n),
    'price': rng.normal(size=n),
    'clicked': rng.integers(0, 2, n),
  }


def write(folder, *, num_users=NUM_USERS, events=20, candidates=10):
  """The files of the log and of the candidates."""
  rng = np.random.default_rng(0)
  log = columns(rng, rng.integers(0, num_users, num_users * events))
  shown = columns(rng, np.repeat(np.arange(num_users), candidates))
  shown['time'] += 1000
  paths = []
  for name, data in (('log', log), ('shown', shown)):
    path = pathlib.Path(folder) / f'{name}.parquet'
    parquet.write_table(pa.table(data), path, row_group_size=2000)
    paths.append([str(path)])
  return paths


def model():
  """The same each time, in every process."""
  rng = np.random.default_rng(1)
  log = EventLog.from_columns(columns(rng, np.arange(9) % 3), SCHEMA)
  log, fitted = logs.derive(log, TimeGap(8), HistoryRates(by=('*',)))
  config = support.config(schema=log.schema)
  _, variables = support.init(config)
  rows = RowConfig('streaming', history_length=16)
  return batch.Model(config, variables, joins.Join(log.schema, rows, fitted))


def broken():
  """As `model`, with parameters that are not finite."""
  found = model()
  variables = jax.tree.map(lambda x: np.full_like(x, np.nan), found.variables)
  return batch.Model(found.config, variables, found.join)


def pause():
  print('pause', flush=True)
  time.sleep(300)


def half_a_part(number, write_table):
  """Stops in the middle of writing a part."""

  def write(table, path):
    if f'part-{number:06d}' in str(path):
      path.write_bytes(b'PAR1')
      pause()
    write_table(table, path)

  return mock.patch.object(ranked_files.parquet, 'write_table', write)


def half_a_pass(encode):
  """Stops in the middle of reading the candidates."""

  def stopping(self, columns):
    if not self.labels:
      pause()
    return encode(self, columns)

  return mock.patch.object(joins.Table, 'encode', stopping)


def half_a_shard(score):
  """Waits for SIGTERM in the middle of scoring, and goes on."""

  def stopping(self, *args):
    print('pause', flush=True)
    while not signal.getsignal(signal.SIGTERM).__self__.received():
      time.sleep(0.05)
    return score(self, *args)

  return mock.patch.object(batch.Worker, '_score', stopping)


def main(folder, mode):
  folder = pathlib.Path(folder)
  paths = [str(folder / 'log.parquet')], [str(folder / 'shown.parquet')]
  if mode == 'to_the_end':
    for output in ('resumed.csv', 'at_once.csv'):
      done = batch.rank_files(model, *paths, folder / output, OPTIONS)
      print('resumed', done.num_resumed, 'of', done.num_shards)
    return
  patch = {
    'half_a_pass': lambda: half_a_pass(joins.Table.encode),
    'half_a_part': lambda: half_a_part(1, parquet.write_table),
    'half_a_shard': lambda: half_a_shard(batch.Worker._score),
  }[mode]()
  with patch:
    done = batch.rank_files(model, *paths, folder / 'resumed.csv', OPTIONS)
  print('signal', done.signal, 'resumed', done.num_resumed)


if __name__ == '__main__':
  main(*sys.argv[1:])
