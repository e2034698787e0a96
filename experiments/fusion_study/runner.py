"""Runs the cells of a study, one after the other, and goes on where it was."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarking import machine
from fusion_study import config as config_lib
from fusion_study import floors, store
from fusion_study.config import Cell, StudyConfig
from histjax import config as dicts
from histjax import metrics
from histjax.data import cold, datasets, pipeline
from histjax.data.fingerprint import fingerprint
from histjax.data.rows import Rows
from histjax.models.ranker import Ranker
from histjax.schema import Schema
from histjax.training import checkpoints, evaluation, identity, sharding
from histjax.training import config as training_config
from histjax.training import report as report_lib
from histjax.training import workdir as workdir_lib
from histjax.training.config import TrainConfig
from histjax.training.loop import train_and_evaluate

Values = dict[str, Any]


def run_study(
  study: StudyConfig,
  workdir: str | os.PathLike[str],
  *,
  only: Sequence[str] = (),
  progress: Callable[[str], None] = print,
  mesh: Mesh | None = None,
) -> bool:
  """Trains and tests every cell that is not finished.

  Ctrl-C and SIGTERM end it after the running cell has saved a checkpoint; the
  same call goes on from there.

  Args:
    study: the study.
    workdir: a folder for cells and runs. Several processes may share it if
      `only` gives them different cells.
    only: run the cells whose names start with one of these; empty: all.
    progress: called with a line per cell.
    mesh: of `sharding.data_mesh`; None: over all devices.

  Returns:
    Whether all cells are finished; False: it was interrupted.

  Raises:
    ValueError: a finished cell is of another config (the message names the
      cell, the fields and what to do), `only` fits no cell or leaves out
      trials that a cell needs, or the config or the data is bad.
    NotImplementedError: there are several processes.
  """
  if jax.process_count() > 1:
    raise NotImplementedError(
      'a study runs in one process: the scores of a cell are kept by one host'
    )
  workdir = workdir_lib.prepare(workdir)
  mesh = sharding.data_mesh() if mesh is None else mesh
  todo = list(config_lib.cells(study))
  if only:
    todo = [c for c in todo if c.name.startswith(tuple(only))]
    if not todo:
      raise ValueError(
        f'only={list(only)} fits no cell; their names are as '
        f'{[c.name for c in config_lib.cells(study)][-1]!r}'
      )
  finished = {c.name: store.read_cell(workdir, c.name) for c in todo}
  for cell in todo:
    _check_config(study, cell, workdir, finished[cell.name])
  # What a refused study is must not be that of the cells that are there.
  report_lib.write_json(workdir / store.STUDY_FILE, dicts.to_dict(study))
  left = [c for c in todo if finished[c.name] is None]
  left = [c for c in left if c.kind != 'floor']  # They take no time.
  spent, trained = 0.0, 0
  for number, cell in enumerate(todo, 1):
    begin = time.monotonic()
    old = store.read_cell(workdir, cell.name)
    found = _cell(study, cell, workdir, mesh, old)
    if found is None:
      progress(
        f'[{number - 1}/{len(todo)}] interrupted in {cell.name}; the same '
        'command goes on from there'
      )
      return False
    if cell in left:
      spent, trained = spent + time.monotonic() - begin, trained + 1
    eta = (len(left) - trained) * spent / max(trained, 1)
    progress(
      f'[{number}/{len(todo)}] {cell.name}: {_line(found)}'
      f'{"" if old is None else "  (finished before)"}  '
      f'ETA {report_lib.clock(eta)}'
    )
  return True


def rerun(
  path: str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  *,
  mesh: Mesh | None = None,
) -> tuple[Values, Values]:
  """Trains a finished cell again, from its JSON alone.

  On CPUs the metrics are the same to the bit.

  Args:
    path: of the cell's JSON.
    workdir: a folder for the new run.
    mesh: of `sharding.data_mesh`; None: over all devices.

  Returns:
    `(stored, new)`, each `{'validation': metrics, 'test': metrics}`.

  Raises:
    ValueError: it is a floor, its data has changed, or it was interrupted.
  """
  stored = report_lib.read_json(pathlib.Path(path))
  if stored['cell']['kind'] == 'floor':
    raise ValueError(f'{path} is a floor, which is not trained')
  config = dicts.from_dict(TrainConfig, stored['config'])
  dataset = datasets.load(config.data)
  if trained := stored.get('fingerprint'):
    identity.check_fingerprint(fingerprint(dataset), trained, path)
  result = train_and_evaluate(config, workdir, dataset=dataset, mesh=mesh)
  if result['interrupted']:
    raise ValueError('interrupted; the same command goes on from there')
  splits = [k for k in ('validation', 'test') if stored[k] is not None]
  return {k: stored[k] for k in splits}, {k: result[k] for k in splits}


def _check_config(study, cell: Cell, workdir, old: Values | None) -> None:
  """Refuses a finished cell of another config, as far as that alone tells."""
  if old is None:
    return
  names, config = ('in the cell', 'asked for'), old['config']
  lines: list[str] = []
  if cell.kind == 'floor':
    wanted = config_lib.floor_config(study, cell, config.get('task', ''))
    lines = dicts.differences(config, wanted, names)
  elif (trial := cell.trial or old['tuning']['chosen']) in study.trials:
    # Of a trial that is no more, another one may have the values.
    schema = dicts.from_dict(Schema, config['model']['schema'])
    run = config_lib.train_config(study, cell, trial, schema)
    lines = identity.run_differences(config, run, names)
  _fail_if(lines, cell, workdir)


def _cell(study, cell: Cell, workdir, mesh, old) -> Values | None:
  """The finished cell's values; None if interrupted."""
  if cell.kind == 'floor':
    return _floor(study, cell, workdir, old)
  tuning = None
  trial = cell.trial
  if cell.kind != 'trial':
    tuning = _tuning(study, cell, workdir)
    trial = tuning['chosen']
  config, dataset = config_lib.run_config(study, cell, trial)
  digest = fingerprint(dataset)
  if old is not None:
    lines = identity.run_differences(
      old['config'], config, ('in the cell', 'asked for')
    )
    _fail_if(lines + _data_changed(old, digest), cell, workdir)
    if old['tuning'] != tuning:  # More trials, of which the same is the best.
      old = {**old, 'tuning': tuning}
      store.write_cell(workdir, cell.name, old, None)
    return old
  if cell.kind == 'trial':
    _check_criterion(study, config, dataset)
  run = workdir / 'runs' / cell.name
  result, seconds = _train(config, run, dataset, mesh)
  if result['interrupted']:
    return None
  variables, _ = checkpoints.load_variables(run)
  scores = None
  if cell.kind != 'trial':
    scores = _scores(config, variables, dataset, mesh)
  values = {
    'cell': dataclasses.asdict(cell),
    'fusion': config.model.fusion,
    'validation': result['validation'],
    'test': None if scores is None else result['test'],
    'num_parameters': sum(x.size for x in jax.tree.leaves(variables)),
    'seconds': seconds,
    'steps': result['step'],
    'best_step': result['best_step'],
    'history': result['history'],
    'tuning': tuning,
    'environment': machine.environment(),
    'config': dicts.to_dict(config),
    'fingerprint': digest,
  }
  store.write_cell(workdir, cell.name, values, scores)
  if not study.keep_runs:
    shutil.rmtree(run)
  return values


def _train(config, run: pathlib.Path, dataset, mesh) -> tuple[Values, float]:
  """The result, and the seconds of all attempts that ended in order."""
  clock = workdir_lib.prepare(run) / 'seconds.json'
  before = report_lib.read_json(clock)['seconds'] if clock.exists() else 0.0
  begin = time.monotonic()
  result = train_and_evaluate(config, run, dataset=dataset, mesh=mesh)
  seconds = before + time.monotonic() - begin
  report_lib.write_json(clock, {'seconds': seconds})
  return result, seconds


def _scores(config, variables, dataset: datasets.Dataset, mesh):
  """Of the test split's candidates that count, by event."""
  rows, task = dataset.in_memory('test'), config.model.schema.tasks[0].name
  known, counts = _known(config.leave_out, dataset, rows)
  found = evaluation.predict(
    Ranker(config.model), variables, rows, config.pipeline, mesh, known=known
  )
  assert found is not None  # Nothing asked it to stop.
  predictions = found.predictions()
  # Evaluation goes bucket by bucket; see `pipeline.eval_batches`.
  buckets = pipeline.make_buckets(rows, config.pipeline)
  place = np.concatenate(
    [
      np.arange(rows.offsets[r], rows.offsets[r + 1])
      for bucket in buckets
      for r in bucket.rows
    ]
  )
  event = rows.events[place[counts[place]]]
  order = np.argsort(event, kind='stable')
  label = predictions.labels[task][order]
  if not np.array_equal(label, rows.log.labels[task][event[order]]):
    raise AssertionError('scores and events are not in the same order')
  return {
    'event': event[order].astype(np.int32),
    'user': predictions.group[order],
    'label': label.astype(bool),
    'logit': predictions.logits[task][order],
  }


def _known(
  leave_out: cold.LeaveOut, dataset: datasets.Dataset, rows: Rows
) -> tuple[cold.Known | None, np.ndarray]:
  """What training has seen, and which of `rows.events` count."""
  if not leave_out:
    return None, np.ones(len(rows.events), bool)
  known = cold.Known(leave_out, dataset.splits['train'])
  return known, known.candidates(rows)


def _floor(study, cell: Cell, workdir, old) -> Values:
  dataset_config = study.datasets[cell.dataset]
  # Pointwise rows: of every event alone, with what it may see.
  run = dataset_config.run
  kind = {**run['data'].get('rows', {}), 'kind': 'pointwise'}
  data = {**run['data'], 'rows': kind, 'eval_rows': None}
  dataset = config_lib.load_dataset(dicts.from_dict(datasets.DataConfig, data))
  task = dataset.schema.tasks[0].name
  digest = fingerprint(dataset)
  config = config_lib.floor_config(study, cell, task)
  if old is not None:
    lines = dicts.differences(
      old['config'], config, ('in the cell', 'asked for')
    )
    _fail_if(lines + _data_changed(old, digest), cell, workdir)
    return old
  train = dataset.in_memory('train')
  found: Values = {}
  for split in ('validation', 'test'):  # The scores kept are of the last.
    rows = dataset.in_memory(split)
    logits = floors.floor_logits(
      rows, train, config['terms'], task, cell.window
    )
    _, counts = _known(dataset_config.leave_out, dataset, rows)
    events = rows.events[counts]
    scores = {
      'event': events.astype(np.int32),
      'user': rows.log.user[events],
      'label': rows.log.labels[task][events] == 1,
      'logit': logits[counts].astype(np.float32),
    }
    found[split] = {
      f'{task}/{name}': value for name, value in _metrics(scores).items()
    }
  values = {
    'cell': dataclasses.asdict(cell),
    'fusion': None,
    **found,
    'num_parameters': 0,
    'config': config,
    'fingerprint': digest,
  }
  store.write_cell(workdir, cell.name, values, scores)
  return values


def _metrics(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
  logit, label = scores['logit'], scores['label']
  return {
    'auc': metrics.auc(logit, label),
    'gauc': metrics.gauc(logit, label, scores['user']),
    'logloss': metrics.logloss(logit, label),
    'ne': metrics.normalized_entropy(logit, label),
  }


def _tuning(study: StudyConfig, cell: Cell, workdir) -> Values:
  """What was tried for the cell's fusion, and which trial is the best."""
  fusion = config_lib.fusion_of(study, cell)
  trials: dict[str, Values] = {}
  for other in config_lib.cells(study):
    if other.kind == 'trial' and (other.dataset, other.variant) == (
      cell.dataset,
      fusion,
    ):
      stored = store.read_cell(workdir, other.name)
      if stored is None:
        raise ValueError(
          f'{cell.name} needs the trial {other.name}, which is not finished; '
          'run that first'
        )
      # It may be of an earlier study, and not among those that run now.
      schema = dicts.from_dict(Schema, stored['config']['model']['schema'])
      config = config_lib.train_config(study, other, other.trial, schema)
      lines = identity.run_differences(
        stored['config'], config, ('in the cell', 'asked for')
      )
      _fail_if(lines, other, workdir)
      trials[other.trial] = {
        'changes': dict(study.trials[other.trial]),
        'validation': stored['validation'],
        'best_step': stored['best_step'],
        'seconds': stored['seconds'],
        'criterion': _criterion(study, stored),
      }
  chosen = next(iter(study.trials))  # If it is the only one, it was not run.
  if trials:
    chosen = max(trials, key=lambda name: trials[name]['criterion'])
  return {
    'criterion': dict(study.criterion),
    'seed': study.tuning_seed,
    'chosen': chosen,
    'trials': trials,
  }


def _check_criterion(study: StudyConfig, config: TrainConfig, dataset) -> None:
  """Refuses a trial that the study could not choose by."""
  rows = dataset.splits['validation']
  if not len(rows):
    return  # Which training refuses.
  known, _ = _known(config.leave_out, dataset, rows)
  select = dataclasses.replace(config, select=dict(study.criterion))
  try:
    training_config.check_defined(select, 'validation', rows, known)
  except ValueError as error:
    raise ValueError(f'study: criterion, as {error}') from error


def _criterion(study: StudyConfig, trial: Values) -> float:
  """What the study chooses by, of a finished trial."""
  task = trial['config']['model']['schema']['tasks'][0]['name']
  return metrics.criterion(
    trial['validation'],
    {f'{task}/{name}': weight for name, weight in study.criterion.items()},
  )


def _data_changed(old: Values, digest: str) -> list[str]:
  found = old.get('fingerprint')  # Cells of earlier versions have none.
  return [] if found == digest else [f'data: {found} (in the cell), {digest}']


def _fail_if(lines: list[str], cell: Cell, workdir) -> None:
  if lines:
    path = store.json_path(workdir, cell.name)
    raise ValueError(
      f'the finished cell {cell.name} is of another config, or of other data. '
      f'Delete {path} to have it trained again, name another workdir, or take '
      'over these fields:\n' + '\n'.join(lines)
    )


def _line(values: Values) -> str:
  split = 'validation' if values['test'] is None else 'test'
  shown = {
    k: v
    for k, v in values[split].items()
    if v is not None and k.endswith(('/auc', '/gauc'))
  }
  text = f'{split} {report_lib.format_metrics(shown)}'
  if 'seconds' in values:
    text += f'  ({values["seconds"]:.0f} s, best of step {values["best_step"]})'
  return text
