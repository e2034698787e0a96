"""What the tests of whole runs share."""

import pytest

from tests.training import runs


@pytest.fixture(scope='session')
def straight(tmp_path_factory):
  """A run without interruption: `(workdir, result)`; leave it as it is."""
  workdir = tmp_path_factory.mktemp('straight')
  return workdir, runs.run(workdir)
