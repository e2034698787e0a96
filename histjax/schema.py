"""How a dataset describes itself: its features, shared tables and tasks.

A `Schema` names the columns of an event log and says what the model may do
with them. Every row of a log is one *event*: user, time, the item shown, and
what the user did. The same columns serve twice: an event in a history has all
of them, a candidate has only those known when it is shown.

* `context`: known about the user or request; one value a row.
* `item`: known at the impression; read for history events and candidates,
  through the same tables.
* `action`: known only after the impression; read for history events alone.
* `tasks`: what to predict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Categorical:
  """An integer id (or anything hashable to one) that is embedded.

  Attributes:
    name: the feature's name in batches.
    size: the number of ids; ids are in `[0, size)`.
    column: the log's column; `name` if empty.
    table: the embedding table; features that name the same table share it.
      `name` if empty.
    ids: 'index' takes ids as they are and refuses one outside `[0, size)`;
      'hash' maps any integer or string to `[0, size)` by a fixed hash.
  """

  name: str
  size: int
  column: str = ''
  table: str = ''
  ids: Literal['index', 'hash'] = 'index'

  def __post_init__(self):
    _check_name(self)
    if self.size < 1:
      raise ValueError(
        f'feature {self.name!r}: size={self.size} must be at least 1'
      )
    if self.ids not in ('index', 'hash'):
      raise ValueError(
        f"feature {self.name!r}: ids={self.ids!r} must be 'index' or 'hash'"
      )
    object.__setattr__(self, 'column', self.column or self.name)
    object.__setattr__(self, 'table', self.table or self.name)


@dataclasses.dataclass(frozen=True)
class Dense:
  """A real number, read as `(value - offset) / scale`.

  Attributes:
    name: the feature's name in batches.
    column: the log's column; `name` if empty.
    offset: subtracted first, in the column's units (after `log`).
    scale: divided by, in the column's units (after `log`).
    log: read `log(1 + value)` in place of the value, which must be >= 0.
  """

  name: str
  column: str = ''
  offset: float = 0.0
  scale: float = 1.0
  log: bool = False

  def __post_init__(self):
    _check_name(self)
    if not self.scale > 0:
      raise ValueError(
        f'feature {self.name!r}: scale={self.scale} must be positive'
      )
    object.__setattr__(self, 'column', self.column or self.name)


Feature = Categorical | Dense


@dataclasses.dataclass(frozen=True)
class Task:
  """A binary label, one logit of the model.

  Attributes:
    name: the task's name in batches, metrics and scores.
    column: the log's column; `name` if empty.
    threshold: the label is `column >= threshold`; if None the column itself
      must hold 0 or 1.
  """

  name: str
  column: str = ''
  threshold: float | None = None

  def __post_init__(self):
    _check_name(self)
    object.__setattr__(self, 'column', self.column or self.name)


@dataclasses.dataclass(frozen=True)
class Schema:
  """The columns of an event log and their roles; see the module's docstring.

  Attributes:
    user: the column that says whose event it is (integer or string).
    time: the column that orders a user's events: a number >= 0 or a
      timestamp (ISO 8601 in a CSV file). Ties keep the log's order.
    item: features known at the impression.
    action: features known only afterwards.
    context: features of the user or request.
    tasks: what to predict; at least one.
    request: a column whose equal values (within a user) make one request, for
      request rows; empty if the log has none.
    hidden: columns of items that are no input, for derived features to read.
    derived: what derived features add to items (`DataConfig.features`); filled
      in when a dataset is loaded.
    time_unit: seconds per unit of a numeric time column (0.001: milliseconds);
      a timestamp column knows its own. Derived features and snapshots are in
      seconds.
  """

  user: str
  time: str
  item: tuple[Feature, ...]
  tasks: tuple[Task, ...]
  action: tuple[Feature, ...] = ()
  context: tuple[Feature, ...] = ()
  request: str = ''
  hidden: tuple[Categorical, ...] = ()
  derived: tuple[Feature, ...] = ()
  time_unit: float = 1.0

  def __post_init__(self):
    for field in ('item', 'tasks', 'action', 'context', 'hidden', 'derived'):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    if not self.item and not self.derived:
      raise ValueError('schema: item is empty; a candidate needs a feature')
    if not self.tasks:
      raise ValueError('schema: tasks is empty; name at least one label')
    if not self.time_unit > 0:
      raise ValueError(f'schema: time_unit={self.time_unit} must be positive')
    for group in (self.features + self.hidden, self.tasks):
      names = [f.name for f in group]
      for name in names:
        if names.count(name) > 1:
          raise ValueError(
            f'schema: {name!r} is named {names.count(name)} times; names '
            'must differ (share a table through `table=` instead)'
          )
    _ = self.tables  # Conflicting sizes are found here.

  @property
  def item_features(self) -> tuple[Feature, ...]:
    """`item` and `derived`: the features of a candidate."""
    return self.item + self.derived

  @property
  def history_features(self) -> tuple[Feature, ...]:
    """The features of a history event."""
    return self.item_features + self.action

  @property
  def features(self) -> tuple[Feature, ...]:
    """Every feature: context, item, action."""
    return self.context + self.history_features

  @property
  def logged(self) -> tuple[Feature, ...]:
    """Every feature that is a column of the log, `hidden` ones included."""
    return (*self.context, *self.item, *self.hidden, *self.action)

  def with_tasks(self, names: Sequence[str]) -> Schema:
    """This schema with the tasks `names` alone, in that order.

    Raises:
      ValueError: a name is none of its tasks.
    """
    tasks = {t.name: t for t in self.tasks}
    for name in names:
      if name not in tasks:
        raise ValueError(f'task {name!r} is none of {sorted(tasks)}')
    return dataclasses.replace(self, tasks=tuple(tasks[n] for n in names))

  @property
  def tables(self) -> dict[str, int]:
    """`{table: number of rows}` of the embedding tables.

    Raises:
      ValueError: two features share a table and disagree on its size.
    """
    sizes: dict[str, int] = {}
    for feature in self.features:
      if isinstance(feature, Categorical):
        size = sizes.setdefault(feature.table, feature.size)
        if size != feature.size:
          raise ValueError(
            f'schema: features of table {feature.table!r} disagree on its '
            f'size: {size} and {feature.size}; make them equal'
          )
    return sizes


def categorical(features: tuple[Feature, ...]) -> tuple[Categorical, ...]:
  """The categorical ones among `features`, in order."""
  return tuple(f for f in features if isinstance(f, Categorical))


def dense(features: tuple[Feature, ...]) -> tuple[Dense, ...]:
  """The dense ones among `features`, in order."""
  return tuple(f for f in features if isinstance(f, Dense))


def _check_name(feature) -> None:
  if not feature.name.isidentifier():
    raise ValueError(
      f'{type(feature).__name__}: name={feature.name!r} must be a Python '
      "identifier (it names a parameter); set `column` to the log's own name"
    )
