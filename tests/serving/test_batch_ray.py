"""Shards on a Ray cluster of this machine."""

import os
import pathlib
import re

import numpy as np
import pytest
import ray
from absl.testing import absltest
from pyarrow import parquet

from histjax.serving import batch
from tests.serving import many_users

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # A cluster takes half a minute to start.


@pytest.fixture(scope='module')
def cluster():
  keep = {n: v for n, v in os.environ.items() if n.startswith('JAX_')}
  path = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  ray.init(
    num_cpus=2,
    include_dashboard=False,
    log_to_driver=False,
    runtime_env={'env_vars': {**keep, 'PYTHONPATH': os.pathsep.join(path)}},
  )
  yield
  ray.shutdown()


@pytest.mark.filterwarnings('default')  # Ray's own.
def test_shards_are_those_of_one_process(cluster, tmp_path):
  paths = many_users.write(tmp_path)
  here, there = tmp_path / 'here', tmp_path / 'there'
  batch.rank_files(many_users.model, *paths, here, many_users.OPTIONS)
  # As if it had been interrupted: parts of both engines are one output.
  done = batch.rank_files(many_users.model, *paths, there, many_users.OPTIONS)
  for number in (1, 2, 4):
    (there / f'part-{number:06d}.parquet').unlink()
  done = batch.rank_files(
    many_users.model, *paths, there, many_users.OPTIONS, engine=batch.Ray()
  )
  assert (done.num_shards, done.num_resumed) == (5, 2)
  found, wanted = (parquet.read_table(path) for path in (there, here))
  for name in ('user', 'rank', 'row'):
    assert found[name].equals(wanted[name])
  # Another process compiles for itself: sums in another order.
  np.testing.assert_allclose(
    found['score_click'].to_numpy(), wanted['score_click'].to_numpy(), atol=1e-6
  )


@pytest.mark.filterwarnings('default')
def test_what_is_wrong_is_said_as_here(cluster, tmp_path):
  paths = many_users.write(tmp_path)
  # All shards fail; which one first is chance.
  with pytest.raises(ValueError, match='parquet') as told:
    batch.rank_files(
      many_users.broken,
      *paths,
      tmp_path / 'ranked',
      many_users.OPTIONS,
      engine=batch.Ray(),
    )
  found = re.search(
    r"user '(\d+)': .*shown\.parquet row (\d+): the", str(told.value)
  )
  user, row = map(int, found.groups())
  shown = parquet.read_table(paths[1][0])
  assert str(shown.column(many_users.SCHEMA.user)[row]) == str(user)
  assert not (tmp_path / 'ranked').exists()


if __name__ == '__main__':
  absltest.main()
