"""Which tests `make test` leaves to `make test-all`."""

from collections.abc import Callable, Mapping

import pytest


def slow_unless(fast: Callable[..., bool]):
  """Goes above absl's `parameterized`; marks the cases that are not `fast`.

  `fast` is called with a case's parameters. Some case must be fast: every test
  has a representative in `make test`.
  """

  def is_fast(case):
    if isinstance(case, Mapping):
      return fast(**case)
    return fast(*case) if isinstance(case, tuple) else fast(case)

  def mark(tests):
    marked = [
      (is_fast(case), test)
      for test, case in zip(tests, tests.testcases, strict=True)
    ]
    if not any(quick for quick, _ in marked):
      raise ValueError('no case is fast: mark the test itself slow')
    return [test if quick else pytest.mark.slow(test) for quick, test in marked]

  return mark
