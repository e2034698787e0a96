"""Turns a log of any size into shards of rows to train on, out of core.

  python experiments/prepare.py --config=my_log.py --output=/tmp/shards \
    --config.data.source.paths='("/data/log/",)' --memory=4 --workers=2
  python experiments/train.py --config=my_log.py \
    --config.data.prepared=/tmp/shards --workdir=/tmp/run

The config is that of training, and so are the rows, to the bit: splits, kinds
of rows and derived features are those of `data`; all else is left to training,
which may change. Parquet and CSV, files or folders of them.

What takes more than --memory GiB in all is cut into more shards. A run that was
interrupted or killed goes on where it stopped, if the same is run again; with
another config or log it is refused. --engine=ray spreads the work over a Ray
cluster (the extra `ray`), whose nodes must see the log and the output by the
same paths; --memory is then of all workers together.
"""

from absl import app, flags

import config_util
from histjax import config as config_lib
from histjax.data import datasets, prepare, prepared
from histjax.training import workdir
from histjax.training.config import TrainConfig

_CONFIG = config_util.Config(TrainConfig, 'Of the training run.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to fill.', required=True)
_MEMORY = flags.DEFINE_float(
  'memory', 4.0, 'GiB that all processes together may take.'
)
_SHARDS = flags.DEFINE_integer(
  'shards',
  None,
  'Parts that users are cut into; None: as many as --memory asks for.',
)
_ENGINE = flags.DEFINE_enum(
  'engine', 'local', ['local', 'ray'], 'Where the work is done.'
)
_WORKERS = flags.DEFINE_integer('workers', 1, 'Processes, here or of Ray.', 1)


def run() -> prepare.Summary:
  values = _CONFIG.values()
  config_util.config_dict(values)  # The rest of it, too, before any work.
  data = config_lib.from_dict(datasets.DataConfig, values['data'])
  engine = prepare.Ray if _ENGINE.value == 'ray' else prepare.Local
  output = workdir.resolve(_OUTPUT.value, '--output')
  if not (output / prepared.DATASET).exists():
    workdir.prepare(output, '--output')
  return prepare.prepare(
    data,
    output,
    prepare.Options(_MEMORY.value * 2**30, _SHARDS.value),
    engine(_WORKERS.value),
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  try:
    done = run()
  except (ValueError, OSError, ImportError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error
  except KeyboardInterrupt as error:
    raise SystemExit('interrupted; run the same again to go on') from error
  rows = ', '.join(f'{n:,} to {split}' for split, n in done.num_rows.items())
  print(
    f'{_OUTPUT.value}: {done.num_events:,} events of {done.num_users:,} users; '
    f'rows: {rows}; {done.num_shards} shards, {done.num_resumed} of them from '
    'before'
  )


if __name__ == '__main__':
  app.run(main, flags_parser=_CONFIG.parse)
