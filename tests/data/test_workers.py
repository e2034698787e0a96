"""Tasks in several processes, and what comes back of those that fail."""

import os
import signal
import subprocess
import sys
import time

import pytest
from absl.testing import absltest

from histjax.data import workers
from tests import children


class FeatureError(Exception):
  """Cannot be unpickled: its arguments are not those of `Exception`."""

  def __init__(self, feature, value):
    super().__init__(f'{feature} is {value}')


class FeatureValueError(FeatureError, ValueError):
  """Likewise; the caller is wrong."""


def task(number):
  """Of each number another fault."""
  if number == 1:
    raise FeatureError('age', -1)
  if number == 2:
    raise FeatureValueError('age', -1)
  if number == 3:
    raise FileNotFoundError(2, 'No such file', 'ages.csv')
  if number == 4:
    os.kill(os.getpid(), signal.SIGKILL)
  return -number


@pytest.mark.parametrize(
  ('number', 'kind', 'said'),
  [
    (1, RuntimeError, r"^FeatureError\('age is -1'\)$"),
    (2, ValueError, '^age is -1$'),
    (3, FileNotFoundError, "No such file: 'ages.csv'$"),
    (4, ChildProcessError, 'a worker ended; .* as when memory is short'),
  ],
)
def test_errors_come_back(number, kind, said):
  with workers.Pool(2) as pool:
    assert list(pool.each(task, [7])) == [(7, -7)]
    with pytest.raises(kind, match=said) as told:
      list(pool.each(task, [number]))
  assert type(told.value) is kind


def test_here_errors_are_what_they_were():
  with workers.Pool(1) as pool, pytest.raises(FeatureValueError):
    list(pool.each(task, [2]))


def sleep(number):
  print(f'sleeps {number}', flush=True)
  time.sleep(600)


def test_an_interrupt_is_told_once():
  """Ctrl-C is sent to all processes of a terminal."""
  code = """
import signal
from histjax.data import workers
from tests.data import test_workers
# A shell ignores it for what it starts in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
with workers.Pool(2) as pool:
  list(pool.each(test_workers.sleep, range(8)))
"""
  parent = children.start(
    [sys.executable, '-c', code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  for _ in range(2):
    assert parent.stdout.readline().startswith('sleeps')
  os.killpg(parent.pid, signal.SIGINT)
  _, said = parent.communicate()
  assert said.rstrip().endswith('KeyboardInterrupt')
  assert said.count('KeyboardInterrupt') == 1


if __name__ == '__main__':
  absltest.main()
