"""Kills at any moment, full disks: a run goes on as if nothing had been."""

import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests import children
from tests.serving import full_disk
from tests.training import members, runs


def start_victim(workdir, number):
  return children.start(
    [
      *(sys.executable, '-m', 'tests.training.victim'),
      *(str(workdir), str(number)),
    ],
    cwd=members.ROOT,
    env=members.environment(8),
    stdout=subprocess.PIPE,
    text=True,
  )


def assert_goes_on(workdir, straight):
  result = runs.run(workdir)
  np.testing.assert_equal(result, straight[1])
  runs.assert_same_run(workdir, straight[0])
  left = os.listdir(workdir / 'checkpoints')
  assert all(name.isdecimal() for name in left), left


class TestKilled:
  @pytest.mark.parametrize(
    'seed', [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 3))]
  )
  def test_at_random_moments_of_writing(self, straight, tmp_path, seed):
    """Of a start, saves, replaced ones, deleted ones, metrics.json."""
    rng = random.Random(seed)
    for _ in range(1 if seed == 0 else 3):
      victim = start_victim(tmp_path, rng.randint(1, 200))
      stdout, _ = victim.communicate(timeout=300)
      if victim.returncode == 0:  # It was nearly through before.
        break
      assert victim.returncode == -signal.SIGKILL
      assert 'killed before' in stdout, stdout
    assert_goes_on(tmp_path, straight)

  @pytest.mark.slow
  @pytest.mark.parametrize('seed', range(2))
  def test_at_random_times(self, straight, tmp_path, seed):
    """Within the C++ that writes arrays, too."""
    rng = random.Random(seed)
    victim = start_victim(tmp_path, 0)
    for line in victim.stdout:
      if re.match('(step|Validation)', line) and rng.random() < 0.3:
        break
    try:
      victim.wait(timeout=rng.random() / 2)
    except subprocess.TimeoutExpired:
      victim.kill()
    victim.communicate()
    assert_goes_on(tmp_path, straight)


@pytest.mark.slow
def test_full_disk(straight, tmp_path):
  """As the system's refusal to let files grow."""
  cases = {
    # Updates made: what a file may have, and which checkpoints may be good;
    # they are written while training goes on.
    1: (900, r'There is none yet'),
    6: (900, r'The last good one is that of step [45]'),
    7: (0, r'The last good one is that of step [45]'),
    9: (2000, r'The last good one is that of step [58]'),
  }
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'tests.training.full_disk', str(tmp_path)),
      *(str(x) for step, (size, _) in cases.items() for x in (step, size)),
    ],
    cwd=members.ROOT,
    env=members.environment(8),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  for step, (_, kept) in cases.items():
    message = (
      rf'refused {step}: the checkpoint of step \d+ could not be written to '
      rf'.*{step}/checkpoints \(.*{full_disk.REFUSED}.*\). {kept}: make room, '
      'and run the same again to go on'
    )
    assert re.search(message, done.stdout), done.stdout
    assert_goes_on(tmp_path / str(step), straight)
