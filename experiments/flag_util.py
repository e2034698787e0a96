"""What flags of several programs have in common: what is refused, and why."""

import importlib
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags


def sizes(
  flag: flags.FlagHolder[Any], default: Sequence[int] = ()
) -> list[int]:
  """What a flag that is a list says, or `default` if it is not given.

  Raises:
    ValueError: one is no whole number above 0, or there are none.
  """
  if flag.value is None:
    return [*default]
  text = ','.join(flag.value)
  if not re.fullmatch(r'0*[1-9]\d*(,0*[1-9]\d*)*', text, re.ASCII):
    raise ValueError(
      f'--{flag.name}={text} must be whole numbers above 0, as 64,512'
    )
  return [int(size) for size in flag.value]


def finite(*found: flags.FlagHolder[Any]) -> None:
  """Raises a ValueError if one of these numbers is NaN or infinite."""
  for flag in found:
    if flag.value is not None and not math.isfinite(flag.value):
      raise ValueError(
        f'--{flag.name}={flag.value} must be finite; give a number, or leave '
        'it out'
      )


def report(flag: flags.FlagHolder[Any], suite: str) -> dict[str, Any] | None:
  """The JSON of a suite of benchmark.py that a flag names, if it names one.

  Raises:
    ValueError: it is none of that suite.
    OSError: it cannot be read.
  """
  if flag.value is None:
    return None
  found: Any = pathlib.Path(flag.value).read_bytes()
  try:
    found = json.loads(found)
  except ValueError:
    pass
  if not isinstance(found, dict) or found.get('suite') != suite:
    what = found.get('suite') if isinstance(found, dict) else None
    raise ValueError(
      f'--{flag.name}={flag.value} is of suite {what!r}; give the JSON of '
      f'benchmark.py --suite={suite}'
    )
  return found


def look_here() -> None:
  """Lets modules be imported from the working directory, after all others.

  Of `python experiments/train.py` Python looks in `experiments/` alone.
  """
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())


def import_modules(flag: flags.FlagHolder[Any]) -> None:
  """Imports the modules that a flag lists.

  Raises:
    ImportError: one is not there, or cannot be imported.
  """
  look_here()
  for name in flag.value:
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      if error.name is None or f'{name}.'.startswith(f'{error.name}.'):
        raise ModuleNotFoundError(
          f'--{flag.name}: there is no module {error.name!r}; run in the '
          'folder of its file, or name that in PYTHONPATH'
        ) from error
      raise


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
