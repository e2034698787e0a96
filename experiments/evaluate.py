"""The metrics of a trained ranker on a split of its dataset.

  python experiments/evaluate.py --workdir=/tmp/synthetic [--split=validation]

With --cache_dtype scores are what a server gives: histories are encoded, kept
as keys and values of that type, and candidates scored from these.
"""

import dataclasses
from typing import Any

from absl import app, flags, logging

import flag_util
from histjax import Ranker, Scorer, ScorerConfig, metrics, quantization
from histjax.data import cold, datasets, pipeline
from histjax.data.fingerprint import fingerprint
from histjax.training import checkpoints, identity, report, workdir
from histjax.training.evaluation import check_rows, evaluate

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
_PATHS = flags.DEFINE_list(
  'paths', None, 'Files of the log, if not where training had them.'
)
_PREPARED = flags.DEFINE_string(
  'prepared', None, 'Folder of prepared rows, if not where training had them.'
)
_MODULES = flags.DEFINE_list(
  'modules', [], 'Modules to import first, of derived features of your own.'
)
_CACHE_DTYPE = flags.DEFINE_enum(
  'cache_dtype',
  None,
  ['model', *quantization.KINDS],
  'Score from kept keys and values of this type; None: in one pass.',
)
_COLD_USERS = flags.DEFINE_bool(
  'leave_out_cold_users',
  None,
  'Whether candidates of users that training has not seen do not count; None: '
  "as the run's config has it.",
)
_COLD_ITEMS = flags.DEFINE_string(
  'leave_out_cold_items',
  None,
  'The feature by which items that training has not seen do not count; empty: '
  "all count; None: as the run's config has it.",
)
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write, if any.')


def evaluate_cached(config, variables, rows, known, kind=None):
  """As `evaluate`, in two steps, from states of the type `kind`."""
  scorer = Scorer(config.model, variables, ScorerConfig(cache_dtype=kind))
  found = metrics.RankingMetrics([t.name for t in rows.schema.tasks])
  # A cache has one user a row.
  options = dataclasses.replace(config.pipeline, pack=False)
  for batch in pipeline.eval_batches(rows, options):
    cache = scorer.encode(batch.history)
    logits = scorer.score(cache, batch.candidates, batch.context)
    mask = batch.candidates.mask if known is None else known.mask(batch)
    found.update(logits, batch.labels, mask, batch.group)
  return found.result()


def what_is_left_out(config):
  """Of the config, unless a flag says otherwise."""
  changes = {
    name: flag.value
    for name, flag in (('cold_users', _COLD_USERS), ('cold_items', _COLD_ITEMS))
    if flag.value is not None
  }
  found = dataclasses.replace(config.leave_out, **changes)
  found.check(config.model.schema)
  return found


def check_kind(prepared):
  """Refuses data of another kind than the run's.

  Args:
    prepared: the folder of prepared rows that the run was trained on, if any.
  """
  differ = 'whose fingerprint is of another kind and cannot be compared'
  if prepared and _PATHS.value is not None:
    raise ValueError(
      f'--paths={_PATHS.value} is a log, {differ}: this run was trained on '
      'prepared rows; give --prepared instead'
    )
  if not prepared and _PREPARED.value is not None:
    raise ValueError(
      f'--prepared={_PREPARED.value} is prepared rows, {differ}: this run was '
      'trained on a log in memory; give --paths instead'
    )


def run():
  if _PATHS.value is not None and _PREPARED.value is not None:
    raise ValueError(
      f'--paths={_PATHS.value} and --prepared={_PREPARED.value} are two kinds '
      'of data; give the one that the run was trained on'
    )
  flag_util.import_modules(_MODULES)
  output = None
  if _OUTPUT.value is not None:
    output = workdir.prepare_output(_OUTPUT.value, '--output')
  meta = checkpoints.load_meta(_WORKDIR.value)
  check_kind(meta['config']['data'].get('prepared'))
  values = identity.with_paths(
    meta['config'],
    paths=_PATHS.value,
    manual_dir=_MANUAL_DIR.value,
    prepared=_PREPARED.value,
  )
  config = identity.of_run(values, _WORKDIR.value)
  leave_out = what_is_left_out(config)
  variables, _ = checkpoints.load_variables(
    _WORKDIR.value, 'latest' if _LATEST.value else 'best'
  )
  dataset = datasets.load(config.data)
  identity.check_fingerprint(
    fingerprint(dataset), meta['fingerprint'], _WORKDIR.value, '--paths'
  )
  rows = dataset.splits[_SPLIT.value]
  check_rows(rows)
  known = counts = None
  if leave_out:
    known = cold.Known(leave_out, dataset.splits['train'])
    counts = known.counts(rows)
    if counts.left_out == counts.candidates:
      raise ValueError(f'{_SPLIT.value}: {counts}; leave less out')
  if _CACHE_DTYPE.value is None:
    model = Ranker(config.model)
    found = evaluate(model, variables, rows, config.pipeline, known=known)
  else:
    kind = None if _CACHE_DTYPE.value == 'model' else _CACHE_DTYPE.value
    found = evaluate_cached(config, variables, rows, known, kind)
  for ids in dataset.ids:
    print(ids)
  print(f'{_SPLIT.value}: {int(rows.candidate_counts.sum())} candidates')
  if counts is not None:
    print(f'{_SPLIT.value}: {counts}')
  for name, value in found.items():
    print(f'{name:>20} {value:.4f}')
  if output is not None:
    said: dict[str, Any] = {
      'ids': [dataclasses.asdict(ids) for ids in dataset.ids]
    }
    if counts is not None:
      said['left_out'] = dataclasses.asdict(counts)
    report.write_json(output, {**found, **said})


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    run()
  except (ValueError, OSError, ImportError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
