"""Flags that would do nothing, which are refused."""

from collections.abc import Iterable

from absl import flags


def refuse(names: Iterable[str], why: str) -> None:
  """Raises a ValueError if one of these flags is given.

  Args:
    names: of flags.
    why: goes on with "--name=value ..", as 'is of --engine=ray'.
  """
  for name in names:
    flag = flags.FLAGS[name]
    if flag.present:
      raise ValueError(f'--{name}={flag.value} {why}; leave it out')
