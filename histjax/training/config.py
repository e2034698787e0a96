"""What a training run is, and the checks that need more than one part of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from histjax import config as dicts
from histjax import metrics
from histjax.data import cold
from histjax.data.datasets import DataConfig, Dataset
from histjax.data.pipeline import PipelineConfig
from histjax.data.rows import RowConfig, RowSource
from histjax.models.ranker import RankerConfig
from histjax.training.losses import RankLossConfig
from histjax.training.optimizer import OptimizerConfig

SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run; `histjax.config.from_dict` makes one of a dict.

  Attributes:
    model: the ranker. Its schema must be the dataset's.
    data: where rows come from.
    pipeline: how they become batches.
    optimizer: how parameters are updated.
    num_epochs: how often to go through the training rows; or set
    num_steps: how many batches to train on.
    eval_every: steps from one validation to the next; None: an epoch.
    checkpoint_every: steps from one checkpoint to the next; None: after each
      validation and when interrupted only, where there is one in any case.
    keep_checkpoints: how many of the latest are kept, besides the best.
    log_every: steps from one report of the training loss to the next.
    patience: stop after this many validations in a row that were no better
      than the best; None: never.
    select: `{metric: weight}`, what says which parameters are the best: the
      largest `metrics.criterion` on validation. A metric is as 'like/auc', or
      as 'auc', of the first task.
    leave_out: the candidates that validation and test do not count: those of
      users, or items, that training has not seen.
    task_weights: `{task: weight}` in the loss; tasks left out weigh 1.
    rank_loss: the loss of pairs in a row, beside the log loss.
    max_unique_ids: `{table: number}`, how many distinct rows of a table a batch
      touches at most; see `step.make_train_step`. For tables left out nothing
      need be known.
    average: decay of the moving average of the parameters, see
      `step.averaged`; validation, test, checkpoints and scoring then use the
      average. None: the parameters themselves.
    seed: of initialisation and dropout, below 2**31. `pipeline.seed` orders the
      data.
    tensorboard: write scalars to `<workdir>/tensorboard`.
  """

  model: RankerConfig
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  pipeline: PipelineConfig = dataclasses.field(default_factory=PipelineConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  num_epochs: int | None = dataclasses.field(
    default=None, metadata={'instead_of': 'num_steps'}
  )
  num_steps: int | None = dataclasses.field(
    default=None, metadata={'instead_of': 'num_epochs'}
  )
  eval_every: int | None = None
  checkpoint_every: int | None = None
  keep_checkpoints: int = 2
  log_every: int = 100
  patience: int | None = None
  select: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {'auc': 1.0}
  )
  leave_out: cold.LeaveOut = dataclasses.field(default_factory=cold.LeaveOut)
  task_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  rank_loss: RankLossConfig = dataclasses.field(default_factory=RankLossConfig)
  max_unique_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
  average: float | None = None
  seed: int = 0
  tensorboard: bool = True

  def __post_init__(self):
    dicts.normalize(self)
    if (self.num_epochs is None) == (self.num_steps is None):
      raise ValueError(
        f'num_epochs={self.num_epochs} and num_steps={self.num_steps}: set one '
        'of them, and leave the other None'
      )
    for field, least in (
      ('num_epochs', 1),
      ('num_steps', 1),
      ('eval_every', 1),
      ('checkpoint_every', 1),
      ('keep_checkpoints', 1),
      ('log_every', 1),
      ('patience', 1),
      ('seed', 0),
    ):
      value = getattr(self, field)
      if value is not None and value < least:
        raise ValueError(f'{field}={value} must be at least {least}')
    if self.seed >= 2**31:
      raise ValueError(
        f'seed={self.seed} must be below 2**31, as JAX has 32-bit integers'
      )
    if self.average is not None and not 0 <= self.average < 1:
      raise ValueError(
        f'average={self.average} must be in [0, 1), as 0.99, or None'
      )
    if self.rank_loss.weight and self.data.rows.kind == 'pointwise':
      raise ValueError(
        f'rank_loss.weight={self.rank_loss.weight} with data.rows.kind='
        "'pointwise': such a row has one candidate, and so no pairs. Set "
        "data.rows.kind='streaming', 'snapshot' or 'request', or "
        'rank_loss.weight=0'
      )
    if self.pipeline.pack:
      self.model.require_packable()
    for table, value in self.max_unique_ids.items():
      if table not in self.model.schema.tables or value < 1:
        raise ValueError(
          f'max_unique_ids has {table!r}: {value}; it must be at least 1, of '
          f'one of the tables {sorted(self.model.schema.tables)}'
        )
    self._check_tasks()
    self.check_rows('data.rows', self.data.rows)
    if self.data.eval_rows is not None:
      self.check_rows('data.eval_rows', self.data.eval_rows)

  @property
  def criterion(self) -> dict[str, float]:
    """`select` as `metrics.criterion` takes it, without weights of 0."""
    first = self.model.schema.tasks[0].name
    weights: dict[str, float] = {}
    for name, weight in self.select.items():
      full = name if '/' in name else f'{first}/{name}'
      weights[full] = weights.get(full, 0.0) + weight
    return {name: weight for name, weight in weights.items() if weight}

  def check_rows(self, field: str, rows: RowConfig) -> None:
    """Raises ValueError if the encoder would get wrong scores of such rows.

    In a streaming row candidates share one history and see different parts of
    it, so what the encoder makes of an event must not depend on later events,
    nor on where the row was cut.

    Args:
      field: what to call the rows.
      rows: the way they are made.
    """
    encoder = self.model.encoder
    if rows.kind != 'streaming':
      return
    if not encoder.causal:
      raise ValueError(
        f"{field}.kind='streaming' with model.encoder.causal=False: in a "
        'bidirectional history events that a candidate sees have seen later '
        'ones, its own outcome included. Set model.encoder.causal=True, or '
        f"{field}.kind='pointwise' or 'request'"
      )
    if encoder.positions == 'recency':
      raise ValueError(
        f"{field}.kind='streaming' with model.encoder.positions='recency': "
        'positions count from the end of the row, which candidates do not '
        "share. Set model.encoder.positions='rotary', or "
        f"{field}.kind='pointwise' or 'request'"
      )
    if rows.history_length is None or rows.on_overflow == 'error':
      return
    field_of_view = self.model.receptive_field
    if field_of_view is None or field_of_view > rows.history_length:
      reach = 'the whole history' if field_of_view is None else field_of_view
      window = (rows.history_length - 1) // self.model.hops + 1
      smaller = f'model.encoder.window to {window} or less, or '
      raise ValueError(
        f"{field}.kind='streaming' cuts histories to {field}.history_length="
        f'{rows.history_length} events before the first candidate, but with '
        f'model.encoder.window={encoder.window}, model.encoder.num_layers='
        f'{encoder.num_layers} and model.fusion={self.model.fusion!r} a score '
        f'reads {reach}: it would depend on how '
        f'users are cut into rows. Set {smaller if window > 0 else ""}'
        f'{field}.history_length=None'
      )

  def _check_tasks(self) -> None:
    tasks = [t.name for t in self.model.schema.tasks]
    known = [f'{t}/{m}' for t in tasks for m in metrics.METRICS]
    for name, weight in self.select.items():
      if name not in known and name not in metrics.METRICS:
        raise ValueError(
          f'select has {name!r}, which is not a metric; choose from '
          f'{[*metrics.METRICS, *known]}'
        )
      if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(
          f'select[{name!r}]={weight} must be >= 0 and finite; where less is '
          'better the sign is changed anyway'
        )
    if not self.criterion:
      raise ValueError(
        f'select={dict(self.select)}: nothing to choose the best parameters '
        "by; give a metric a positive weight, as {'auc': 1.0}"
      )
    for task, weight in self.task_weights.items():
      if task not in tasks:
        raise ValueError(
          f'task_weights has {task!r}, which is not a task of the schema; it '
          f'has {tasks}'
        )
      if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(
          f'task_weights[{task!r}]={weight} must be >= 0 and finite'
        )
    if not any(self.task_weights.get(task, 1.0) for task in tasks):
      raise ValueError(
        f'task_weights={dict(self.task_weights)}: all tasks weigh 0, so there '
        'is nothing to train; make one of them positive'
      )


def check_kinds(config: object, dataset: object) -> None:
  """Raises ValueError unless they are a `TrainConfig` and a `Dataset`."""
  if not isinstance(config, TrainConfig):
    raise ValueError(
      f'config is of type {type(config).__name__}; it must be a TrainConfig, '
      'which histjax.config.from_dict makes of a dict'
    )
  if dataset is not None and not isinstance(dataset, Dataset):
    raise ValueError(
      f'dataset is of type {type(dataset).__name__}; it must be a Dataset, as '
      'histjax.data.datasets.load returns it, or None'
    )


def check_dataset(config: TrainConfig, dataset: Dataset) -> None:
  """Raises ValueError if the run cannot be of this dataset."""
  lines = dicts.differences(
    dicts.to_dict(config.model.schema),
    dicts.to_dict(dataset.schema),
    ('model.schema', 'dataset'),
  )
  if lines:
    raise ValueError(
      'model.schema is not that of the dataset; set model.schema to its '
      '`schema`. They differ in:\n' + '\n'.join(lines)
    )
  for split in SPLITS:
    if split not in dataset.splits or not len(dataset.splits[split]):
      times = '' if dataset.log is None else f'. {dataset.log.period}'
      raise ValueError(
        f'the dataset has no rows in its split {split!r}; training needs '
        f'{SPLITS}: change how the data is split{times}'
      )
    config.check_rows(f'{split} rows', dataset.splits[split].config)
  known = None
  config.leave_out.check(dataset.schema)
  if config.leave_out:
    known = cold.Known(config.leave_out, dataset.splits['train'])
  for split in ('validation', 'test'):
    check_defined(config, split, dataset.splits[split], known)


def check_defined(
  config: TrainConfig,
  split: str,
  rows: RowSource,
  known: cold.Known | None = None,
) -> None:
  """Raises ValueError if a metric to select by has no value on a split.

  Args:
    config: of the run.
    split: its name.
    rows: of the split.
    known: as `evaluation.predict`.
  """
  for name in config.criterion:
    task, metric = name.rsplit('/', 1)
    if known is None:
      labels = rows.label_summary(task)
    else:
      labels = known.label_summary(rows, task)
    if not labels.total:
      raise ValueError(
        f'leave_out={config.leave_out} leaves no candidate of the {split} '
        'split to count; leave less out, or change how the data is split'
      )
    if metric == 'logloss':
      continue
    if not (
      labels.users if metric == 'gauc' else 0 < labels.positive < labels.total
    ):
      what = (
        f'no user has both labels of task {task!r} there'
        if metric == 'gauc'
        else f'all {labels.total} labels of task {task!r} there are '
        f'{int(labels.positive > 0)}'
      )
      raise ValueError(
        f'select: {name!r} is undefined on the {split} split: {what}. Select '
        f"another metric, as {{'{task}/logloss': 1.0}}, or change how the "
        'data is split'
      )
