"""Any dataset: a schema, and rows to train, choose and test on."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from histjax import config as config_lib
from histjax import features as features_lib
from histjax import vocabulary
from histjax.data import prepared as prepared_lib
from histjax.data import splits as splits_lib
from histjax.data import synthetic
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, Rows, RowSource, make_rows
from histjax.features import DerivedFeature, FittedFeatures
from histjax.schema import Schema, categorical

Masks = dict[str, np.ndarray]
"""`{'train', 'validation', 'test'}: bool [n]`."""


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
  """Where a log comes from, and how it is split.

  Subclass it as a frozen dataclass to add a dataset; `DataConfig.source` takes
  it by its name in snake case, `{'type': 'synthetic', 'num_users': 100}`.
  """

  def check(self, rows: RowConfig) -> None:
    """Raises ValueError if the dataset is not for such rows."""
    del rows  # Most are for any.

  @abc.abstractmethod
  def load(self, tasks: tuple[str, ...]) -> tuple[EventLog, Masks]:
    """The log with these tasks (empty: those of its protocol), and its splits.

    Raises:
      ValueError: files or values in them are bad; the message says which.
    """


@dataclasses.dataclass(frozen=True)
class Synthetic(synthetic.SyntheticConfig, Source):
  """Planted preferences, see `data.synthetic`; no files."""

  def load(self, tasks: tuple[str, ...]) -> tuple[EventLog, Masks]:
    """See `Source.load`."""
    log = synthetic.generate(self)
    return log.with_tasks(tasks), synthetic.SPLIT.masks(log)


@dataclasses.dataclass(frozen=True)
class OfficialFiles(Source):
  """A public dataset, prepared once from the files that its authors offer.

  Attributes:
    data_dir: where prepared data is kept; TFDS's own default if empty.
    manual_dir: a folder with the official files; if empty, that of the
      environment's HISTJAX_DATA_DIR; if that is not set, they are downloaded.
  """

  data_dir: str = ''
  manual_dir: str = ''


@dataclasses.dataclass(frozen=True)
class Movielens(OfficialFiles):
  """MovieLens 1M, protocol `ml1m`."""

  def load(self, tasks: tuple[str, ...]) -> tuple[EventLog, Masks]:
    """See `Source.load`; without tasks, 'like'."""
    from histjax.data import movielens  # TFDS takes a second to import.

    log = movielens.load(data_dir=self.data_dir, manual_dir=self.manual_dir)
    return log.with_tasks(tasks or ('like',)), movielens.SPLIT.masks(log)


@dataclasses.dataclass(frozen=True)
class Kuairand(OfficialFiles):
  """KuaiRand-Pure, protocol `kuairand`."""

  def check(self, rows: RowConfig) -> None:
    """Raises ValueError unless ties are strict."""
    if rows.ties != 'strict':
      raise ValueError(
        'data: some impressions of kuairand occur twice, and with '
        f"rows.ties={rows.ties!r} one would see the other's outcome; set "
        "ties='strict'"
      )

  def load(self, tasks: tuple[str, ...]) -> tuple[EventLog, Masks]:
    """See `Source.load`; without tasks, 'click'."""
    from histjax.data import kuairand  # TFDS takes a second to import.

    log = kuairand.load(data_dir=self.data_dir, manual_dir=self.manual_dir)
    return log.with_tasks(tasks or ('click',)), kuairand.masks(log)


@dataclasses.dataclass(frozen=True)
class Events(Source):
  """A log of your own.

  Attributes:
    paths: Parquet and CSV files, or folders of them, in the log's order.
    schema: what their columns mean.
    split: how events are split.
    require_sorted: refuse a log that is not in order of time.
  """

  paths: tuple[str, ...]
  schema: Schema
  split: splits_lib.FractionSplit | splits_lib.TimeSplit = dataclasses.field(
    default_factory=splits_lib.FractionSplit
  )
  require_sorted: bool = False

  def __post_init__(self):
    config_lib.normalize(self)
    if not self.paths:
      raise ValueError('data.source.paths is empty; name the files of the log')
    if self.schema.derived:
      raise ValueError(
        f'data.source.schema.derived={self.schema.derived} must be empty; list '
        'derived features in data.features'
      )

  def load(self, tasks: tuple[str, ...]) -> tuple[EventLog, Masks]:
    """See `Source.load`."""
    log = EventLog.from_files(
      self.paths, self.schema, require_sorted=self.require_sorted
    )
    return log.with_tasks(tasks), self.split.masks(log)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which dataset, and how its rows are made.

  Attributes:
    source: where the log comes from.
    rows: the rows to train on.
    eval_rows: those of validation and test; None: as `rows`.
    tasks: what to predict, by the names of the schema's tasks; empty: all of
      them (of kuairand 'click', of movielens 'like').
    features: what is derived of the log, in order: a later one may read what
      an earlier one adds.
    without: features that the model does not get; `features` may read them
      all the same.
    prepared: a folder of rows that `prepare` made of this config; they are read
      from there, and the log is not. Empty: from `source`.
  """

  source: Source = dataclasses.field(default_factory=Synthetic)
  rows: RowConfig = dataclasses.field(default_factory=RowConfig)
  eval_rows: RowConfig | None = None
  tasks: tuple[str, ...] = ()
  features: tuple[DerivedFeature, ...] = ()
  without: tuple[str, ...] = ()
  prepared: str = ''

  def __post_init__(self):
    config_lib.normalize(self)
    for field, rows in (('rows', self.rows), ('eval_rows', self.eval_rows)):
      if rows is not None:
        self.source.check(rows)
        every = rows.snapshot_every
        last = field == 'eval_rows' or self.eval_rows is None
        if last and every is not None:
          raise ValueError(
            f'data: {field}.snapshot_every={every} would evaluate events more '
            'than once; set eval_rows with snapshot_every=None'
          )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Rows by split, and what their columns mean.

  Attributes:
    schema: the features and tasks.
    splits: `{'train', 'validation', 'test'}`.
    log: the events that all rows are of; None: they are not in memory.
    features: what is derived of them.
    fingerprint: of a prepared dataset; see `fingerprint.fingerprint`.
    ids: how many are unknown to vocabularies, and how many hashed ones share a
      row; of a prepared dataset the latter is an estimate.
  """

  schema: Schema
  splits: Mapping[str, RowSource]
  log: EventLog | None
  features: FittedFeatures = dataclasses.field(default_factory=FittedFeatures)
  fingerprint: str = ''
  ids: tuple[vocabulary.IdCounts, ...] = ()

  def in_memory(self, split: str) -> Rows:
    """The rows of a split.

    Raises:
      ValueError: they are read from shards.
    """
    rows = self.splits[split]
    if not isinstance(rows, Rows):
      raise ValueError(
        'this needs the log in memory; leave data.prepared empty'
      )
    return rows


def load(config: DataConfig) -> Dataset:
  """Loads a dataset, preparing it first if need be.

  Raises:
    ValueError: files or values in them are bad; the message says which.
  """
  if config.prepared:
    return _load_prepared(config)
  log, masks = config.source.load(config.tasks)
  train = masks['train']
  counted = vocabulary.count(log.schema, log.features, masks)
  vocabularies = vocabulary.fit(log.schema, counted)
  ids = vocabulary.id_counts(log.schema, counted, vocabularies)
  log = log.with_vocabularies(vocabularies)
  fitted = features_lib.fit(config.features, log.events(), train)
  fitted = dataclasses.replace(fitted, vocabularies=vocabularies)
  schema = model_schema(log.schema, fitted, config.without)
  log = dataclasses.replace(log, schema=schema)
  eval_rows = config.eval_rows or config.rows
  splits: dict[str, RowSource] = {}
  for split, mask in masks.items():
    if split == 'train':
      rows = make_rows(log, mask, config.rows, fitted, train=train)
    else:
      rows = make_rows(log, mask, eval_rows, fitted)
    splits[split] = rows
  return Dataset(schema, splits, log, fitted, ids=(*ids, *log.hashed))


def identity(config: DataConfig) -> dict[str, Any]:
  """`to_dict` of what rows depend on, wherever files lie."""
  values = config_lib.to_dict(config)
  for path in ('paths', 'data_dir', 'manual_dir'):
    values['source'].pop(path, None)
  values.pop('prepared')
  return values


def _load_prepared(config: DataConfig) -> Dataset:
  folder = pathlib.Path(config.prepared).expanduser()
  found = prepared_lib.load(folder)
  lines = config_lib.differences(
    found.config, identity(config), (folder.name, 'asked for')
  )
  if lines:
    raise ValueError(
      f'data.prepared={config.prepared!r} was made with another config; '
      'prepare the log again, or take over what differs:\n' + '\n'.join(lines)
    )
  return Dataset(
    found.schema,
    found.splits,
    None,
    found.features,
    found.fingerprint,
    found.ids,
  )


def model_schema(
  schema: Schema, fitted: FittedFeatures, without: tuple[str, ...]
) -> Schema:
  """A log's schema with what is derived, and without what a model does not get.

  Raises:
    ValueError: a name of `without` is no feature, or nothing reads a hidden
      one.
  """
  derived = fitted.derived
  features = (*schema.context, *schema.item, *derived, *schema.action)
  known = [f.name for f in features]
  for name in without:
    if name not in known:
      raise ValueError(f'data: without={name!r} must be one of {known}')
  for feature in schema.hidden:
    if feature.name not in fitted.reads:
      raise ValueError(
        f'schema: hidden has {feature.name!r}, which none of data.features '
        'reads; leave it out'
      )

  def kept(features):
    return tuple(f for f in features if f.name not in without)

  hidden = [
    f
    for f in categorical(schema.item)
    if f.name in without and f.name in fitted.reads
  ]
  return dataclasses.replace(
    schema,
    context=kept(schema.context),
    item=kept(schema.item),
    derived=kept(derived),
    hidden=(*schema.hidden, *hidden),
    action=kept(schema.action),
  )
