"""What the cells of a study say together: means, intervals, verdicts."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fusion_study import config as config_lib
from fusion_study import statistics, store
from fusion_study.config import Cell, StudyConfig
from histjax import config as dicts
from histjax.nn import fusion as fusion_lib
from histjax.training import identity
from histjax.training import report as report_lib
from histjax.training import workdir as workdir_lib
from histjax.training.config import TrainConfig

SUMMARY_FILE = 'summary.json'
RESAMPLED = ('auc', 'gauc')
"""Metrics with intervals; logloss and NE have means alone."""

Values = dict[str, Any]
Key = tuple[str, int]  # The variant and its window.


def load(
  workdir: str | os.PathLike[str], progress: Callable[[str], None] = print
) -> Values:
  """The summary of a study's finished cells, written to summary.json.

  Without study.json (of a study that is kept, whose scores are not), the
  summary.json that is there is read: it is all that tables and figures need.

  Args:
    workdir: of the study.
    progress: called with a line per variant, and with those of the cells that
      are left out: they are not of the study that study.json describes.

  Returns:
    `{'baseline', 'margin', 'resamples', 'datasets': {name: [row, ..]}}`.
    A row has `variant`, `kind`, `fusion`, `amortizable`, `window`, `seeds`,
    for each metric `{'mean', 'deviation', 'values'}` (and, of `RESAMPLED`, the
    95 % interval of the mean, `low` and `high`), `num_parameters`, `seconds`,
    `chosen`, and `compared`: `{'to', metric: Comparison}`, also `metric +
    '_seeds'`, in which seeds are drawn, too; without metrics that are undefined
    on some resamples.

  Raises:
    FileNotFoundError: the workdir has neither.
    ValueError: cells were tested on different events.
  """
  workdir = workdir_lib.resolve(workdir)
  if not (workdir / store.STUDY_FILE).exists():
    if (workdir / SUMMARY_FILE).exists():
      return report_lib.read_json(workdir / SUMMARY_FILE)
    raise FileNotFoundError(
      f'workdir={str(workdir)!r} has neither {store.STUDY_FILE} nor '
      f'{SUMMARY_FILE}: name the workdir of a study, or run one first'
    )
  study = dicts.from_dict(
    StudyConfig, report_lib.read_json(workdir / store.STUDY_FILE)
  )
  groups: dict[str, dict[Key, list[Values]]] = collections.defaultdict(
    lambda: collections.defaultdict(list)
  )
  for cell, values in _finished(study, workdir, progress):
    groups[cell.dataset][cell.variant, cell.window].append(values)
  summary: Values = {
    'baseline': study.baseline,
    'margin': study.margin,
    'resamples': study.resamples,
    'datasets': {
      name: _Dataset(study, workdir, name, groups[name], progress).rows()
      for name in study.datasets
      if name in groups
    },
  }
  report_lib.write_json(workdir / SUMMARY_FILE, summary)
  return report_lib.read_json(workdir / SUMMARY_FILE)  # Without NaN.


def _finished(
  study: StudyConfig, workdir: pathlib.Path, progress: Callable[[str], None]
) -> Iterator[tuple[Cell, Values]]:
  """The study's cells that are finished, trials aside; names all others."""
  found = store.finished_names(workdir)
  for cell in config_lib.cells(study):
    if cell.name not in found:
      continue
    found.remove(cell.name)
    values = store.read_cell(workdir, cell.name)
    if cell.kind == 'trial' or values is None:
      continue
    lines = _differences(study, cell, values)
    if lines:
      progress(f'left out, of another config: {cell.name}, {"; ".join(lines)}')
    else:
      yield cell, values
  if found:
    progress(f'left out, not of this study: {", ".join(found)}')


def _differences(study: StudyConfig, cell: Cell, values: Values) -> list[str]:
  """What of a finished cell is not as the study has it."""
  names = ('in the cell', 'in the study')
  old = values['config']
  if cell.kind == 'floor':
    wanted = config_lib.floor_config(study, cell, old['task'])
    return dicts.differences(old, wanted, names)
  chosen = values['tuning']['chosen']
  if chosen not in study.trials:
    return [
      f'trial: {chosen!r} (in the cell), {list(study.trials)} (to choose)'
    ]
  try:
    trained = dicts.from_dict(TrainConfig, old)  # With fields that are new.
  except ValueError as error:
    return [f'of another version of histjax: {error}']
  schema = trained.model.schema
  config = config_lib.train_config(study, cell, chosen, schema)
  return identity.run_differences(dicts.to_dict(trained), config, names)


def _task(values: Values) -> str:
  """The task that a finished cell's scores are of."""
  config = values['config']
  if 'task' in config:
    return config['task']
  return config['model']['schema']['tasks'][0]['name']


class _Dataset:
  """The cells of one data set, all on the same resamples of its users."""

  def __init__(
    self,
    study: StudyConfig,
    workdir: pathlib.Path,
    name: str,
    groups: dict[Key, list[Values]],
    progress: Callable[[str], None],
  ):
    self.study, self.workdir, self.name = study, workdir, name
    self.groups, self.progress = groups, progress
    self.weights: np.ndarray | None = None
    self.events = self.users = np.zeros(0, np.int64)
    # Metrics `[seeds, 1 + R]`; the first column is of the split as it is.
    self.resampled: dict[Key, dict[str, np.ndarray]] = {}

  def rows(self) -> list[Values]:
    """One for each variant and window, in the study's order."""
    kinds = ('floor', 'grid', 'ablation')
    known = [*self.study.fusions, *self.study.ablations]
    place = {name: i for i, name in enumerate(known)}
    keys = sorted(
      self.groups,
      key=lambda k: (
        kinds.index(self.groups[k][0]['cell']['kind']),
        place.get(k[0], 0),
        k,
      ),
    )
    for key in keys:
      self.progress(f'{self.name}: resampling users for {key[0]}, {key[1]}')
      self.resampled[key] = self._resample(self.groups[key])
    return [self._row(key) for key in keys]

  def _resample(self, cells: list[Values]) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in RESAMPLED}
    functions = (statistics.weighted_auc, statistics.weighted_gauc)
    for values in cells:
      name = Cell(**values['cell']).name
      scores = store.read_scores(self.workdir, name)
      if self.weights is None:
        _, users = np.unique(scores['user'], return_inverse=True)
        self.events, self.users = scores['event'], users
        self.weights = statistics.resample_users(
          int(users.max()) + 1, self.study.resamples
        )
      if not np.array_equal(scores['event'], self.events):
        raise ValueError(
          f'the cell {name} was tested on other events than the others of '
          f'{self.name}; delete it to have it trained again'
        )
      weights = np.concatenate([np.ones_like(self.weights[:1]), self.weights])
      for metric, function in zip(RESAMPLED, functions, strict=True):
        found[metric].append(
          function(scores['logit'], scores['label'], self.users, weights)
        )
      told = values['test'][f'{_task(values)}/auc']
      if told is not None and abs(found['auc'][-1][0] - told) > 1e-6:
        raise ValueError(
          f'the scores of the cell {name} have AUC {found["auc"][-1][0]:.6f}, '
          f'its metrics {told:.6f}: they are of an earlier version, which kept '
          'what leave_out leaves out, or of another run; delete the cell to '
          'have it trained again'
        )
    return {name: np.stack(values) for name, values in found.items()}

  def _row(self, key: Key) -> Values:
    cells = self.groups[key]
    first = cells[0]
    fusion = first['fusion']
    row = {
      'variant': key[0],
      'kind': first['cell']['kind'],
      'fusion': fusion,
      'amortizable': (
        fusion is not None and fusion_lib.FUSIONS[fusion].amortizable
      ),
      'window': key[1],
      'seeds': [c['cell']['seed'] for c in cells],
      'num_parameters': first['num_parameters'],
    }
    if fusion is not None:
      row['seconds'] = float(np.mean([c['seconds'] for c in cells]))
      row['chosen'] = first['tuning']['chosen']
      row['device'] = first['environment']['device']
    for name in first['test']:
      task, metric = name.split('/')
      if task != _task(first):  # Scores are of the first alone.
        continue
      values = [c['test'][name] for c in cells]
      values = [np.nan if v is None else v for v in values]
      mean, deviation = statistics.mean_and_deviation(values)
      row[metric] = {'mean': mean, 'deviation': deviation, 'values': values}
    for metric, drawn in self.resampled[key].items():
      low, high = np.quantile(drawn[:, 1:].mean(axis=0), [0.025, 0.975])
      row[metric] |= {'low': float(low), 'high': float(high)}
    row['compared'] = self._compared(key, first)
    return row

  def _compared(self, key: Key, cell: Values) -> Values | None:
    """To the baseline of the same window; an ablation to its own."""
    to, window = self.study.baseline, key[1]
    if cell['cell']['kind'] == 'ablation':
      ablations = self.study.ablations
      to = ablations[key[0]].baseline or cell['fusion']
      window = self.study.datasets[self.name].windows[0]
      if to in ablations:
        window = ablations[to].window or window
    other = (to, window)
    if other == key or other not in self.resampled:
      return None
    found: Values = {'to': to, 'window': window}
    for metric in RESAMPLED:
      ours, baseline = (
        self.resampled[key][metric],
        self.resampled[other][metric],
      )
      if not (np.isfinite(ours).all() and np.isfinite(baseline).all()):
        self.progress(
          f'{self.name}: {metric} of {key[0]}, {key[1]} is not compared: on '
          'some resamples it is undefined, as too few users have both classes'
        )
        continue
      point, *drawn = statistics.mean_difference(ours, baseline)
      for name, values in (
        (metric, np.array(drawn)),
        (
          f'{metric}_seeds',
          statistics.mean_difference(
            ours[:, 1:], baseline[:, 1:], resample_seeds=0
          ),
        ),
      ):
        found[name] = dataclasses.asdict(
          statistics.compare(point, values, self.study.margin)
        )
    return found
