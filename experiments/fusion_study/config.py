"""What a study is: which runs it consists of, and what each of them trains."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from histjax import config as dicts
from histjax import metrics
from histjax.data import cold, datasets
from histjax.nn import fusion as fusion_lib
from histjax.nn.encoder import EncoderConfig
from histjax.schema import Schema
from histjax.training.config import TrainConfig

Changes = Mapping[str, Any]
"""Some fields of a `TrainConfig`, as nested dicts."""

_OWN = (
  ('seed',),
  ('pipeline', 'seed'),
  ('model', 'fusion'),
  ('model', 'encoder', 'window'),
  ('data', 'rows', 'history_length'),
  ('data', 'eval_rows', 'history_length'),
)
"""Fields that follow from the cell, so that no change may set them."""


@dataclasses.dataclass(frozen=True)
class StudyDataset:
  """A dataset and how every fusion is trained on it, tuning aside.

  Attributes:
    run: a `TrainConfig` without `model.schema`, as `config.from_dict` takes.
    windows: histories to compare with, in events; tuning uses the first.
    floors: `{name: terms}`, see `study.floors`.
  """

  run: Changes
  windows: tuple[int, ...]
  floors: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def leave_out(self) -> cold.LeaveOut:
    """Of `run`: which candidates no cell counts."""
    return dicts.from_dict(cold.LeaveOut, self.run.get('leave_out', {}))


@dataclasses.dataclass(frozen=True)
class Ablation:
  """A fusion with some fields changed, as it was tuned without them.

  Attributes:
    fusion: one of the study's.
    changes: the fields.
    window: of the history; None: the dataset's first.
    datasets: names; empty: all.
    baseline: the ablation that it is compared with; empty: its fusion as it
      was tuned.
  """

  fusion: str
  changes: Changes = dataclasses.field(default_factory=dict)
  window: int | None = None
  datasets: tuple[str, ...] = ()
  baseline: str = ''


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """A grid of runs: dataset x fusion x window x seed, and ablations.

  Every fusion gets the same trials on every dataset; the one that is best on
  validation gives the values that its seeds are trained with. If there is one
  trial alone, there is nothing to choose and it is not run.

  Attributes:
    datasets: by name.
    fusions: `{fusion: changes}`: what it needs to be trained at all, such as
      other rows.
    trials: `{name: changes}`, the values to choose from, the same for all.
    seeds: of the grid; a seed sets initialisation, dropout and data order.
    tuning_seed: of the trials.
    criterion: `{metric: weight}`, what is chosen by: the weighted sum of
      metrics of the first task on validation, at the run's best step.
    ablations: by name.
    ablation_seeds: their seeds.
    baseline: the fusion that the others are compared with.
    margin: the difference in AUC, and in GAUC, that does not matter.
    resamples: of users, in the bootstrap.
    keep_runs: keep checkpoints and scalars of finished cells.
  """

  datasets: Mapping[str, StudyDataset]
  fusions: Mapping[str, Changes]
  trials: Mapping[str, Changes]
  seeds: tuple[int, ...]
  tuning_seed: int = 0
  criterion: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {'auc': 1.0}
  )
  ablations: Mapping[str, Ablation] = dataclasses.field(default_factory=dict)
  ablation_seeds: tuple[int, ...] = ()
  baseline: str = 'concat'
  margin: float = 0.002
  resamples: int = 2000
  keep_runs: bool = False

  def __post_init__(self):
    for field in ('datasets', 'fusions', 'trials', 'seeds'):
      if not getattr(self, field):
        raise ValueError(f'study: {field} is empty; give at least one')
    for name, dataset in self.datasets.items():
      _check_in_memory(name, dataset.run)
      if not dataset.windows or min(dataset.windows) < 1:
        raise ValueError(
          f'study: {name!r} has windows={dataset.windows}; give at least one, '
          'each >= 1'
        )
    for name in self.fusions:
      if name not in fusion_lib.FUSIONS:
        raise ValueError(
          f'study: fusions has {name!r}; choose from '
          f'{sorted(fusion_lib.FUSIONS)}'
        )
    for name, changes in (*self.fusions.items(), *self.trials.items()):
      _check_changes(name, changes)
    for name, ablation in self.ablations.items():
      self._check_ablation(name, ablation)
    if self.baseline not in self.fusions:
      raise ValueError(
        f'study: baseline={self.baseline!r} must be one of its fusions, '
        f'{list(self.fusions)}'
      )
    weights = self.criterion.values()
    if (
      not any(weights)
      or not all(0 <= weight < math.inf for weight in weights)
      or not set(self.criterion) <= set(metrics.METRICS)
    ):
      raise ValueError(
        f'study: criterion={dict(self.criterion)} must weigh some of '
        f'{metrics.METRICS}, >= 0 and finite; where less is better the sign is '
        'changed anyway'
      )
    if not 0 < self.margin < math.inf or self.resamples < 1000:
      raise ValueError(
        f'study: margin={self.margin} must be positive and finite, and '
        f'resamples={self.resamples} at least 1000 for intervals to settle'
      )

  def _check_ablation(self, name: str, ablation: Ablation) -> None:
    if name in self.fusions:
      raise ValueError(f'study: ablation {name!r} has the name of a fusion')
    if ablation.fusion not in self.fusions:
      raise ValueError(
        f'study: ablation {name!r} is of fusion={ablation.fusion!r}, which is '
        f'not in the study; it has {list(self.fusions)}'
      )
    _check_changes(name, ablation.changes)
    if ablation.window is not None and ablation.window < 1:
      raise ValueError(
        f'study: ablation {name!r} has window={ablation.window}; make it >= 1, '
        "or None, for the dataset's first"
      )
    if ablation.baseline and (
      ablation.baseline == name or ablation.baseline not in self.ablations
    ):
      others = [other for other in self.ablations if other != name]
      raise ValueError(
        f'study: ablation {name!r} has baseline={ablation.baseline!r}, which '
        f'must be another ablation, of {others}, or empty'
      )
    for dataset in ablation.datasets:
      if dataset not in self.datasets:
        raise ValueError(
          f'study: ablation {name!r} is on {dataset!r}; there are '
          f'{list(self.datasets)}'
        )


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the study.

  Attributes:
    dataset: its name.
    kind: what it is there for.
    variant: the fusion, the ablation or the floor.
    window: events of history.
    seed: of the run.
    trial: of kind 'trial', its name.
  """

  dataset: str
  kind: Literal['floor', 'trial', 'grid', 'ablation']
  variant: str
  window: int
  seed: int = 0
  trial: str = ''

  @property
  def name(self) -> str:
    """Unique in the study; a relative path."""
    if self.kind == 'floor':
      return f'{self.dataset}/floor/{self.variant}'
    end = f'trial-{self.trial}' if self.trial else f'seed{self.seed}'
    return f'{self.dataset}/{self.variant}/window{self.window}-{end}'


def cells(study: StudyConfig) -> Iterator[Cell]:
  """The study's cells, in an order in which each needs earlier ones alone."""
  for name, dataset in study.datasets.items():
    first = dataset.windows[0]
    for floor in dataset.floors:
      yield Cell(name, 'floor', floor, first)
    for fusion in study.fusions:
      for trial in study.trials if len(study.trials) > 1 else ():
        yield Cell(name, 'trial', fusion, first, study.tuning_seed, trial)
      for window in dataset.windows:
        for seed in study.seeds:
          yield Cell(name, 'grid', fusion, window, seed)
    for variant, ablation in study.ablations.items():
      if not ablation.datasets or name in ablation.datasets:
        for seed in study.ablation_seeds:
          window = ablation.window or first
          yield Cell(name, 'ablation', variant, window, seed)


def fusion_of(study: StudyConfig, cell: Cell) -> str:
  """The fusion that a cell trains."""
  if cell.kind == 'ablation':
    return study.ablations[cell.variant].fusion
  return cell.variant


def run_config(
  study: StudyConfig, cell: Cell, trial: str
) -> tuple[TrainConfig, datasets.Dataset]:
  """What a cell trains, and on what.

  Later ones win: the dataset's run, the fusion's changes, the trial's, the
  ablation's. `history_length` of rows is the cell's window, and the encoder's
  `window` follows: None if each row's history is exactly that, in streaming
  rows the most for which all layers together reach no further.

  Args:
    study: the study.
    cell: of kind 'trial', 'grid' or 'ablation'.
    trial: whose values to take.

  Raises:
    ValueError: the config or the data is bad; the message says where.
  """
  data = _data_config(_run_values(study, cell, trial), cell)
  dataset = load_dataset(data)
  return train_config(study, cell, trial, dataset.schema), dataset


def floor_config(study: StudyConfig, cell: Cell, task: str) -> dict[str, Any]:
  """What the JSON of a floor says that it is; `task` is of its labels."""
  dataset = study.datasets[cell.dataset]
  terms = list(dataset.floors[cell.variant])
  found = {'terms': terms, 'task': task, 'window': cell.window}
  if dataset.leave_out:
    found['leave_out'] = dicts.to_dict(dataset.leave_out)
  return found


def train_config(
  study: StudyConfig, cell: Cell, trial: str, schema: Schema
) -> TrainConfig:
  """As `run_config`, of a schema that is known; reads no data."""
  values = _run_values(study, cell, trial)
  data = _data_config(values, cell)
  fusion = fusion_of(study, cell)
  model = {**values.get('model', {}), 'fusion': fusion}
  encoder = {**model.get('encoder', {}), 'window': None}
  if 'streaming' in {data.rows.kind, (data.eval_rows or data.rows).kind}:
    layers = encoder.get('num_layers', EncoderConfig.num_layers)
    hops = fusion_lib.FUSIONS[fusion].hops(layers)
    encoder['window'] = (cell.window - 1) // hops + 1
  model = {**model, 'encoder': encoder, 'schema': schema}
  return dicts.from_dict(TrainConfig, {**values, 'data': data, 'model': model})


def _run_values(study: StudyConfig, cell: Cell, trial: str) -> dict[str, Any]:
  fusion = fusion_of(study, cell)
  values = merge(
    study.datasets[cell.dataset].run,
    {'seed': cell.seed, 'pipeline': {'seed': cell.seed}},
  )
  values = merge(values, study.fusions[fusion])
  values = merge(values, study.trials[trial])
  if cell.kind == 'ablation':
    values = merge(values, study.ablations[cell.variant].changes)
  return values


def _data_config(values: Changes, cell: Cell) -> datasets.DataConfig:
  parts = dict(values.get('data', {}))
  for field in ('rows', 'eval_rows'):
    if field == 'rows' or parts.get(field) is not None:
      rows = parts.get(field, {})
      parts[field] = {**rows, 'history_length': cell.window}
  return dicts.from_dict(datasets.DataConfig, parts)


def _check_changes(name: str, changes: Changes) -> None:
  _check_in_memory(name, changes)
  if _at(changes, ('leave_out',)) is not None:
    raise ValueError(
      f'study: {name!r} changes leave_out, but all cells of a dataset are '
      "compared on the same candidates; set it in the dataset's run"
    )
  for path in _OWN:
    if _at(changes, path) is not None:
      raise ValueError(
        f'study: {name!r} changes {".".join(path)}, which follows from the '
        'fusion, the windows and the seeds of the study; leave it out'
      )


def _check_in_memory(name: str, values: Changes) -> None:
  if prepared := _at(values, ('data', 'prepared')):
    raise ValueError(
      f'study: {name!r} has data.prepared={prepared!r}, but scores are kept by '
      'event of a log in memory; leave it empty'
    )


def _at(values: Any, path: Sequence[str]) -> Any:
  """What a path of fields leads to; None: nothing."""
  for field in path:
    values = values.get(field) if isinstance(values, Mapping) else None
  return values


@functools.lru_cache(maxsize=4)
def load_dataset(data: datasets.DataConfig) -> datasets.Dataset:
  """`datasets.load`, once for cells that follow each other."""
  return datasets.load(data)


def merge(values: Changes, changes: Changes) -> dict[str, Any]:
  """`values` with those of `changes` in their place, dict by dict."""
  merged = dict(values)
  for name, value in changes.items():
    old = merged.get(name)
    if isinstance(old, Mapping) and isinstance(value, Mapping):
      merged[name] = merge(old, value)
    else:
      merged[name] = value
  return merged
