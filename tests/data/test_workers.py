"""Tasks in several processes, and what comes back of those that fail."""

import os
import signal

import pytest
from absl.testing import absltest

from histjax.data import workers


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


if __name__ == '__main__':
  absltest.main()
