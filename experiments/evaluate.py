"""The metrics of a trained ranker on a split of its dataset.

python experiments/evaluate.py --workdir=/tmp/synthetic [--split=validation]
"""

import json

from absl import app, flags, logging

from histjax import Ranker
from histjax import config as config_lib
from histjax.data import datasets
from histjax.training import checkpoints
from histjax.training.config import TrainConfig
from histjax.training.evaluation import evaluate

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the training run.', required=True
)
_SPLIT = flags.DEFINE_enum(
  'split', 'test', ['train', 'validation', 'test'], 'What to evaluate on.'
)
_LATEST = flags.DEFINE_bool(
  'latest', False, 'The latest parameters, not the best on validation.'
)
_MANUAL_DIR = flags.DEFINE_string(
  'manual_dir', None, 'Official files, if not where training had them.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write, if any.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    params, values = checkpoints.load_params(
      _WORKDIR.value, 'latest' if _LATEST.value else 'best'
    )
    if _MANUAL_DIR.value is not None:
      values['data']['manual_dir'] = _MANUAL_DIR.value
    config = config_lib.from_dict(TrainConfig, values)
    rows = datasets.load(config.data).splits[_SPLIT.value]
    metrics = evaluate(Ranker(config.model), params, rows, config.pipeline)
  except (ValueError, OSError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error
  print(f'{_SPLIT.value}: {int(rows.candidate_counts.sum())} candidates')
  for name, value in metrics.items():
    print(f'{name:>20} {value:.4f}')
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w') as f:
      json.dump(metrics, f, indent=2)


if __name__ == '__main__':
  app.run(main)
