"""Compares fusions: a grid of runs, tuned alike, tables and figures.

  python experiments/study.py --config=experiments/configs/study.py \
    --workdir=/tmp/study

Each cell (data set, fusion, window, seed) is one training run; its JSON, under
<workdir>/cells, says what was trained, what was tried on validation before,
and the metrics. Run again to go on where it stopped: finished cells are not
repeated. At the end, and with --report at any time, writes summary.json,
study.md and quality.png (and cost.png, with --cost) to the workdir. --report
of a folder with summary.json and no study.json draws them again. Processes that
share the workdir can share the work, --only=ml1m/concat,ml1m/none, and then
--report. --rerun=<cell>.json trains one cell again, in an empty workdir, and
compares the metrics.
"""

import pathlib

from histjax.training import host_memory

if __name__ == '__main__':
  host_memory.keep_freed()  # Before other imports start threads.

from absl import app, flags, logging

import config_util
import flag_util
from fusion_study import report, runner, summary
from fusion_study.config import StudyConfig
from histjax import config as config_lib
from histjax.training import workdir as workdir_lib

_CONFIG = config_util.Config(StudyConfig, 'The study.', required=False)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder for cells, runs and the report.', required=True
)
_REPORT = flags.DEFINE_bool('report', False, 'Report what is there; no runs.')
_RERUN = flags.DEFINE_string('rerun', None, 'JSON of a cell to train again.')
_ONLY = flags.DEFINE_list(
  'only', [], 'Run the cells that start so, as ml1m/concat; empty: all.'
)
_COST = flags.DEFINE_string(
  'cost', None, 'JSON of measured scoring costs by fusion, if any.'
)


def rerun(path):
  stored, new = runner.rerun(path, _WORKDIR.value)
  for split, values in stored.items():
    for name, value in values.items():
      print(f'{split} {name}: {value} then, {new[split][name]} now')
  print('the same' if stored == new else 'not the same')


def run():
  workdir = workdir_lib.resolve(_WORKDIR.value)
  if _RERUN.value:
    flag_util.refuse(('config', 'report', 'only', 'cost'), 'is not of --rerun')
  elif _REPORT.value:
    flag_util.refuse(('config', 'only'), 'is not of --report')
  elif _ONLY.value:
    flag_util.refuse(['cost'], 'is of a report, which --only makes none of')
  if _RERUN.value:
    return rerun(_RERUN.value)
  if not _REPORT.value:
    study = config_lib.from_dict(StudyConfig, _CONFIG.values())
    done = runner.run_study(study, workdir, only=_ONLY.value, progress=_print)
    if _ONLY.value or not done:
      return None
  found = summary.load(workdir, progress=_print)
  paths = report.write(found, workdir, _COST.value)
  print(pathlib.Path(paths[0]).read_text())
  print('wrote', *paths)
  return None


def _print(line):
  print(line, flush=True)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    run()
  except (ValueError, OSError, ImportError, ArithmeticError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main, flags_parser=_CONFIG.parse)
