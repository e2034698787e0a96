"""Writes a synthetic event log of any size, as Parquet files.

  python experiments/generate.py --output=/tmp/log --events=1000000 \
    --users=10000 --items=100000 --files=8 --workers=2

The log is the one that experiments/configs/events.py describes: users, times,
countries, items, prices and clicks; `event_log` says how they are drawn. It is
the same for the same flags, whatever the number of workers. Each file is
written whole or not at all: run again what was interrupted, and it goes on.
"""

import pathlib

from absl import app, flags

import event_log
from histjax.training import workdir

_OUTPUT = flags.DEFINE_string('output', None, 'Folder to fill.', required=True)
_EVENTS = flags.DEFINE_integer(
  'events', 1_000_000, 'Events of all files together.'
)
_USERS = flags.DEFINE_integer(
  'users', 10_000, 'Users among whom events are drawn.'
)
_ITEMS = flags.DEFINE_integer(
  'items', 100_000, 'Items among which events are drawn.'
)
_FILES = flags.DEFINE_integer('files', 8, 'Files to write.')
_ITEM = flags.DEFINE_float(
  'item_exponent', 1.0, "Exponent of items' Zipf distribution."
)
_USER = flags.DEFINE_float(
  'user_exponent', 0.5, "Exponent of users' Zipf distribution."
)
_DAYS = flags.DEFINE_integer('days', 30, 'Days that the log spans.')
_HIVE = flags.DEFINE_bool('hive', False, 'Files in folders day=<date>.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of everything drawn.')
_WORKERS = flags.DEFINE_integer('workers', 1, 'Processes that write.', 1)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  try:
    config = event_log.LogConfig(
      num_events=_EVENTS.value,
      num_users=_USERS.value,
      num_items=_ITEMS.value,
      num_files=_FILES.value,
      item_exponent=_ITEM.value,
      user_exponent=_USER.value,
      days=_DAYS.value,
      hive=_HIVE.value,
      seed=_SEED.value,
    )
    folder = pathlib.Path(workdir.prepare(_OUTPUT.value, '--output'))
    there = event_log.write(folder, config, num_workers=_WORKERS.value)
  except (ValueError, OSError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error
  except KeyboardInterrupt as error:
    raise SystemExit('interrupted; run the same again to go on') from error
  print(f'{folder}: {config.num_files} files, {there} of them from before')


if __name__ == '__main__':
  app.run(main)
