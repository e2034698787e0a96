"""Any dataset by name: a schema, and rows to train, choose and test on."""

from __future__ import annotations

import dataclasses
from typing import Literal

from histjax import schema as schema_lib
from histjax.data import activity as activity_lib
from histjax.data import rates as rates_lib
from histjax.data import synthetic as synthetic_lib
from histjax.data.events import EventLog, FractionSplit, TimeSplit
from histjax.data.rows import RowConfig, Rows
from histjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which dataset, and how its rows are made.

  Attributes:
    name: 'synthetic': planted preferences (no files). 'movielens': MovieLens
      1M, protocol `ml1m`. 'kuairand': KuaiRand-Pure, protocol `kuairand`.
      'events': a log of your own.
    rows: the rows to train on.
    eval_rows: those of validation and test; None: as `rows`.
    tasks: what to predict, by the names of the schema's tasks; empty: all of
      them (of kuairand 'click', of movielens 'like').
    time_gaps: whether events have the feature `time_gap`, where the dataset's
      schema has it.
    without: features that the model does not get; `rates` and `history_rates`
      may name them all the same.
    rates: log-odds of the first task by these features of items, over other
      users' training events, as further features of items; a server has to
      send them, too. See `rates.with_rates`.
    recent_rates: if positive, for each of `rates` also its sum over the user's
      so many last events, divided by that number: what was shown, whatever
      came of it.
    history_rates: see `Schema.history_rates`; in place of the schema's own.
    activity: numbers of the user's earlier events within these spans, in
      whole seconds, and the time since the last one, likewise. See
      `activity.with_activity`.
    recent_shares: such as 'tab@10': of the user's 10 last events before, the
      share with each usual value of the feature `tab`, likewise. See
      `activity.with_recent_shares`.
    data_dir: of movielens and kuairand, where prepared data is kept; TFDS's
      own default if empty.
    manual_dir: of movielens and kuairand, a folder with the official files;
      if empty, that of the environment's HISTJAX_DATA_DIR; if that is not
      set, they are downloaded.
    synthetic: what is planted.
    paths: of events, the Parquet and CSV files or folders of them.
    schema: of events, what their columns mean.
    split: of events, how they are split.
    require_sorted: of events, refuse a log that is not in order of time.
  """

  name: Literal['synthetic', 'movielens', 'kuairand', 'events'] = 'synthetic'
  rows: RowConfig = dataclasses.field(default_factory=RowConfig)
  eval_rows: RowConfig | None = None
  tasks: tuple[str, ...] = ()
  time_gaps: bool = True
  without: tuple[str, ...] = ()
  rates: tuple[str, ...] = ()
  recent_rates: int = 0
  history_rates: tuple[str, ...] = ()
  activity: tuple[int, ...] = ()
  recent_shares: tuple[str, ...] = ()
  data_dir: str = ''
  manual_dir: str = ''
  synthetic: synthetic_lib.SyntheticConfig = dataclasses.field(
    default_factory=synthetic_lib.SyntheticConfig
  )
  paths: tuple[str, ...] = ()
  schema: Schema | None = None
  split: FractionSplit | TimeSplit = dataclasses.field(
    default_factory=FractionSplit
  )
  require_sorted: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    object.__setattr__(self, 'paths', tuple(self.paths))
    object.__setattr__(self, 'without', tuple(self.without))
    object.__setattr__(self, 'rates', tuple(self.rates))
    object.__setattr__(self, 'history_rates', tuple(self.history_rates))
    object.__setattr__(self, 'activity', tuple(self.activity))
    object.__setattr__(self, 'recent_shares', tuple(self.recent_shares))
    if self.name not in _LOADERS:
      raise ValueError(
        f'data: name={self.name!r} must be one of {sorted(_LOADERS)}'
      )
    if (self.eval_rows or self.rows).snapshot_every is not None:
      field = 'rows' if self.eval_rows is None else 'eval_rows'
      raise ValueError(
        f'data: {field}.snapshot_every='
        f'{(self.eval_rows or self.rows).snapshot_every} would evaluate events '
        'more than once; set eval_rows with snapshot_every=None'
      )
    if self.name == 'events' and (not self.paths or self.schema is None):
      raise ValueError(
        "data: name='events' needs paths, the files of the log, and schema, "
        'the meaning of their columns'
      )
    if self.name != 'events' and (self.paths or self.schema is not None):
      raise ValueError(
        f"data: paths and schema are of name='events', not of {self.name!r}; "
        'set the name, or leave them out'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Rows by split, and what their columns mean.

  Attributes:
    schema: the features and tasks.
    splits: `{'train', 'validation', 'test'}`.
    log: the events that all rows are of.
  """

  schema: Schema
  splits: dict[str, Rows]
  log: EventLog


def load(config: DataConfig) -> Dataset:
  """Loads a dataset, preparing it first if need be.

  Raises:
    ValueError: files or values in them are bad; the message says which.
  """
  log, masks = _LOADERS[config.name](config)
  if not config.time_gaps:
    schema = dataclasses.replace(log.schema, time_gap_buckets=0)
    log = dataclasses.replace(log, schema=schema)
  if config.history_rates:
    schema = dataclasses.replace(log.schema, history_rates=config.history_rates)
    log = dataclasses.replace(log, schema=schema)
  ties = config.rows.ties
  log = rates_lib.with_rates(
    log, masks['train'], config.rates, recent=config.recent_rates, ties=ties
  )
  log = activity_lib.with_activity(log, config.activity, ties)
  log = activity_lib.with_recent_shares(
    log, masks['train'], config.recent_shares, ties
  )
  log = _without(log, config.without)
  eval_rows = config.eval_rows or config.rows
  splits = {
    split: log.rows(mask, config.rows if split == 'train' else eval_rows)
    for split, mask in masks.items()
  }
  return Dataset(log.schema, splits, log)


def _without(log: EventLog, names: tuple[str, ...]) -> EventLog:
  schema = log.schema
  known = [f.name for f in (*schema.context, *schema.item, *schema.action)]
  for name in names:
    if name not in known:
      raise ValueError(f'data: without={name!r} must be one of {known}')

  def kept(features):
    return tuple(f for f in features if f.name not in names)

  rated = [rate.feature for rate in schema.rates_of_history]
  hidden = [
    f
    for f in schema_lib.categorical(schema.item)
    if f.name in names and f.name in rated
  ]
  schema = dataclasses.replace(
    schema,
    context=kept(schema.context),
    item=kept(schema.item),
    hidden=(*schema.hidden, *hidden),
    action=kept(schema.action),
  )
  return dataclasses.replace(log, schema=schema)


def _synthetic(config: DataConfig):
  log = synthetic_lib.generate(config.synthetic)
  return log.with_tasks(config.tasks), synthetic_lib.SPLIT.masks(log)


def _movielens(config: DataConfig):
  from histjax.data import movielens  # TFDS takes a second to import.

  log = movielens.load(data_dir=config.data_dir, manual_dir=config.manual_dir)
  return log.with_tasks(config.tasks or ('like',)), movielens.SPLIT.masks(log)


def _kuairand(config: DataConfig):
  from histjax.data import kuairand  # TFDS takes a second to import.

  for rows in (config.rows, config.eval_rows or config.rows):
    if rows.ties != 'strict':
      raise ValueError(
        'data: some impressions of kuairand occur twice, and with '
        f"rows.ties={rows.ties!r} one would see the other's outcome; set "
        "ties='strict'"
      )
  log = kuairand.load(data_dir=config.data_dir, manual_dir=config.manual_dir)
  return log.with_tasks(config.tasks or ('click',)), kuairand.masks(log)


def _events(config: DataConfig):
  assert config.schema is not None  # DataConfig has checked it.
  log = EventLog.from_files(
    config.paths, config.schema, require_sorted=config.require_sorted
  )
  return log.with_tasks(config.tasks), config.split.masks(log)


_LOADERS = {
  'synthetic': _synthetic,
  'movielens': _movielens,
  'kuairand': _kuairand,
  'events': _events,
}
