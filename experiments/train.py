"""Trains a ranker and tests it; run again to go on where it stopped.

  python experiments/train.py --config=experiments/configs/synthetic.py \
    --workdir=/tmp/synthetic [--config.num_epochs=1]

With --multi_host this is one of several processes: on SLURM, Open MPI, Cloud
TPU and Kubernetes they find each other; elsewhere each is told where the first
one is, how many there are, and which one it is. See docs/training.md.
"""

import contextlib
import logging as std_logging

from histjax.training import host_memory

if __name__ == '__main__':
  host_memory.keep_freed()  # Before other imports start threads.

import jax
from absl import app, flags, logging

import config_util
from histjax.data import datasets, synthetic
from histjax.training import sharding, watchdog
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
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'host:port of the first process.'
)
_COUNT = flags.DEFINE_integer(
  'num_processes', None, 'How many processes there are.'
)
_ERRORS = (ValueError, OSError, ImportError, ArithmeticError)
_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0.'
)


def joined() -> contextlib.AbstractContextManager[None]:
  """Within, this is one process of several, if it is meant to be."""
  given = (_COORDINATOR.value, _COUNT.value, _ID.value)
  if _MULTI_HOST.value:
    return watchdog.joined(*given)
  if given != (None, None, None):
    raise ValueError(
      '--coordinator_address, --num_processes and --process_id are of '
      '--multi_host; add it, or leave them out'
    )
  return contextlib.nullcontext()


def run(values, workdir):
  try:
    config, dataset = config_util.load(values)
    mesh = sharding.data_mesh(table=_TABLE_AXIS.value)
    result = train_and_evaluate(config, workdir, dataset=dataset, mesh=mesh)
  except _ERRORS as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error
  if result['interrupted'] or jax.process_index():
    return
  if isinstance(config.data.source, datasets.Synthetic):
    best = synthetic.bayes_auc(dataset.in_memory('test'))
    for task, bayes in best.items():
      auc = result['test'][f'{task}/auc']
      said = f'{task}: test AUC {auc:.4f}; the best possible is {bayes:.4f}'
      if bayes != 0.5:  # As where nothing is planted.
        said += f'; {(auc - 0.5) / (bayes - 0.5):.1%} of its margin over 0.5'
      print(said)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  # Orbax tells of every file and, at length, of errors that are raised, too.
  logging.set_verbosity(logging.FATAL)
  std_logging.getLogger('histjax').setLevel(std_logging.WARNING)
  try:
    values = _CONFIG.values()
    with workdir_lib.prepared(_WORKDIR.value) as workdir, joined():
      run(values, workdir)
  except _ERRORS as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main, flags_parser=_CONFIG.parse)
