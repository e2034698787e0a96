"""Says what training at scale takes: the tables of docs/scaling.md.

  python experiments/scale.py
  python experiments/scale.py --items=100000000 --rows=16 --chips=v6e
  python experiments/scale.py --prepare=benchmarks/results/..-prepare-..json \
    --events=100000000000 --hours=6

Prints Markdown: of each chip, what a step sends, how long it takes and what
binds it; and with --prepare, of `benchmark.py --suite=prepare`, how many
workers make the shards of a log of --events.
"""

import dataclasses
import re
from typing import Any

from absl import app, flags

import flag_util
from benchmarking import scaling

_CHIPS = flags.DEFINE_list('chips', list(scaling.CHIPS), 'Kinds of chips.')
_JOB = scaling.Job.__doc__ or ''
_NUMBERS: dict[str, flags.FlagHolder[Any]] = {}
for _field in dataclasses.fields(scaling.Job):
  # Of its docstring, which Python 3.13 dedents.
  (_help,) = re.findall(rf'^ *{_field.name}: (.*)$', _JOB, re.MULTILINE)
  _default: Any = _field.default
  if _field.type == 'float':
    _NUMBERS[_field.name] = flags.DEFINE_float(_field.name, _default, _help)
  elif _field.type == 'int':
    _NUMBERS[_field.name] = flags.DEFINE_integer(_field.name, _default, _help)
_PREPARE = flags.DEFINE_string(
  'prepare', None, 'JSON of benchmark.py --suite=prepare.'
)
_EVENTS = flags.DEFINE_float('events', 1e11, 'Events of the log.')
_HOURS = flags.DEFINE_float('hours', 6, 'Hours to make shards in.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  for name in ('events', 'hours'):
    if flags.FLAGS[name].present and _PREPARE.value is None:
      raise app.UsageError(f'--{name} is of a log: give --prepare, too')
  try:
    numbers: dict[str, Any] = {k: flag.value for k, flag in _NUMBERS.items()}
    if not _CHIPS.value:
      raise ValueError(f'--chips names none; use some of {[*scaling.CHIPS]}')
    jobs = {c: scaling.Job(chip=c, **numbers) for c in _CHIPS.value}
    tables = [scaling.step_table(jobs)]
    report = flag_util.report(_PREPARE, 'prepare')
    if report is not None:
      events, hours = _EVENTS.value, _HOURS.value
      tables.append(scaling.prepare_table(report, events, hours))
    print('\n\n'.join(tables))
  except (ValueError, OSError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
