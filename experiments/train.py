"""Trains a ranker and tests it; run again to go on where it stopped.

  python experiments/train.py --config=experiments/configs/synthetic.py \
    --workdir=/tmp/synthetic [--config.num_epochs=1]
"""

import jax
from absl import app, flags, logging

import config_util
from histjax.data import datasets, synthetic
from histjax.training import sharding
from histjax.training import workdir as workdir_lib
from histjax.training.config import TrainConfig
from histjax.training.loop import train_and_evaluate

_CONFIG = config_util.Config(TrainConfig, 'The run.')
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder for checkpoints, scalars and metrics.json.',
  required=True,
)
_MULTI_HOST = flags.DEFINE_bool(
  'multi_host', False, 'Whether this is one process of several (one a host).'
)
_TABLE_AXIS = flags.DEFINE_integer(
  'table_axis', 1, 'Over how many devices the rows of the tables are split.'
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  if _MULTI_HOST.value:
    jax.distributed.initialize()
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    values = _CONFIG.values()
    workdir = workdir_lib.prepare(_WORKDIR.value)
    config, dataset = config_util.load(values)
    mesh = sharding.data_mesh(table=_TABLE_AXIS.value)
    result = train_and_evaluate(config, workdir, dataset=dataset, mesh=mesh)
  except (ValueError, OSError, ImportError, ArithmeticError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error
  if result['interrupted'] or jax.process_index():
    return
  if isinstance(config.data.source, datasets.Synthetic):
    best = synthetic.bayes_auc(dataset.splits['test'])
    for task, bayes in best.items():
      auc = result['test'][f'{task}/auc']
      print(
        f'{task}: test AUC {auc:.4f}; the best possible is {bayes:.4f}; '
        f'{(auc - 0.5) / (bayes - 0.5):.1%} of its margin over 0.5'
      )


if __name__ == '__main__':
  app.run(main, flags_parser=_CONFIG.parse)
