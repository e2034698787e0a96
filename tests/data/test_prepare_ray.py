"""`prepare` on a Ray cluster of this machine."""

import os
import pathlib
import signal

import numpy as np
import pytest
import ray
from absl.testing import absltest

from histjax.data import prepare
from tests.data import test_prepare

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
def test_the_same_bytes(cluster, tmp_path):
  columns = test_prepare.some_columns(300)
  config = test_prepare.config(
    test_prepare.write(tmp_path, columns, (0.3, 0.6))
  )
  here, there = tmp_path / 'here', tmp_path / 'there'
  test_prepare.run(config, here, num_shards=3)
  done = test_prepare.run(config, there, num_shards=3, engine=prepare.Ray(2))
  assert done.num_events == 300
  found = test_prepare.contents(there)
  assert found == test_prepare.contents(here)


@pytest.mark.filterwarnings('default')
def test_what_is_wrong_is_said_as_here(cluster, tmp_path):
  stars = np.ones(300)
  stars[280] = np.nan
  columns = {**test_prepare.some_columns(300), 'stars': stars}
  config = test_prepare.config(test_prepare.write(tmp_path, columns, (0.3,)))
  with pytest.raises(ValueError, match=r'day=1/part-0\.parquet row 190 holds'):
    test_prepare.run(config, tmp_path / 'out', engine=prepare.Ray())


def absent(number):
  del number
  raise FileNotFoundError(2, 'No such file', 'ages.csv')


def killed(number):
  if number == 1:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings('default')
def test_an_error_keeps_its_kind(cluster):
  with (
    prepare.Ray().start() as run,
    pytest.raises(FileNotFoundError, match=r'ages\.csv'),
  ):
    list(run(absent, [0]))


@pytest.mark.filterwarnings('default')
def test_a_step_that_kills_its_process_is_not_tried_for_ever(cluster):
  with (
    prepare.Ray().start() as run,
    pytest.raises(ChildProcessError, match='3 workers were lost at part 1'),
  ):
    list(run(killed, [0, 1]))


if __name__ == '__main__':
  absltest.main()
