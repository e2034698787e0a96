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

What a column is read as follows from what it is used for, in every kind of
file and in requests alike:

* *Keys*, which are the user, the request and ids with `ids='hash'` or
  'vocabulary', are integers of 64 bits or texts. A text is taken as it is
  written: '007', '07' and '7' are three users, and 'NA' is one more. A text
  that is the canonical decimal form of an integer is that integer: '7' and 7
  are one key. Floats and booleans are none, since a CSV file would write 7.0,
  another key than 7; declare such a column 'integer' in `Schema.column_types`.
* *Numbers*, which are ids with `ids='index'`, dense features and labels, may be
  written as text: '007' is 7, '1e3' is 1000. Booleans count as 0 and 1 (so do
  'true' and 'false', if the whole column is of them), and whole floats as ids.
* *Times* are numbers >= 0 in the column's unit, or timestamps of any unit and
  time zone or ISO 8601 texts (without a zone: UTC). A text of digits alone is a
  number. A log and what is joined to it must be of one of the two.
* *Missing* is a null, and a text of `Schema.null_values`. It is an error
  wherever it is: fill it in, or drop the event.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

from histjax import config as dicts

MAX_RAW = 1e30  # Beyond are marks such as float32's largest, no quantities.
MAX_DENSE = 1e8  # Scaled; products of four of them are finite in float32.
MAX_SIZE = 2**31 - 1  # Ids are int32.
MAX_SECONDS = 2**63 / 1e9  # 292 years: beyond is a time of another unit.

ColumnType = Literal['text', 'integer', 'number', 'timestamp']


@dataclasses.dataclass(frozen=True)
class Categorical:
  """An integer id (or anything hashable to one) that is embedded.

  Attributes:
    name: the feature's name in batches.
    size: the number of ids, below 2**31; ids are in `[0, size)`.
    column: the log's column; `name` if empty.
    table: the embedding table; features that name the same table share it.
      `name` if empty. It has no '/'.
    ids: 'index' takes ids as they are and refuses one outside `[0, size)`;
      'hash' maps any integer or text to `[0, size)` by a fixed hash; '7' and 7
      are the same, '007' is another. Keys may share a row, see
      `data.hashing.collision_rate`. 'vocabulary' takes the same keys, and gives
      those that training events have often a row each, the most frequent
      `size - 1`; all others, in a log and in requests, get the last row,
      `size - 1`. What has which row is saved with the run; see `vocabulary`.
    min_count: with 'vocabulary', how many training events must have an id; 1
      leaves nothing to learn the last row from, unless there are too many ids.
    out_of_vocabulary: with 'index', the table's last row, `size - 1`, is of all
      ids outside `[0, size - 1)`, in a log and in requests, which else are
      refused. It learns only from ids that training meets there.
  """

  name: str
  size: int
  column: str = ''
  table: str = ''
  ids: Literal['index', 'hash', 'vocabulary'] = 'index'
  out_of_vocabulary: bool = False
  min_count: int = 2

  def __post_init__(self):
    dicts.normalize(self)
    _check_name(self)
    if not 1 <= self.size <= MAX_SIZE:
      raise ValueError(
        f'feature {self.name!r}: size={self.size} must be between 1 and '
        f'{MAX_SIZE}, the largest int32'
      )
    if self.ids == 'vocabulary' and self.size < 2:
      raise ValueError(
        f"feature {self.name!r}: size={self.size} with ids='vocabulary', whose "
        'last row is of all other ids; make it at least 2'
      )
    if self.min_count < 1 or (self.min_count != 2 and self.ids != 'vocabulary'):
      raise ValueError(
        f'feature {self.name!r}: min_count={self.min_count} with '
        f"ids={self.ids!r}; it must be at least 1, and is of ids='vocabulary'"
      )
    if self.out_of_vocabulary and (self.ids != 'index' or self.size < 2):
      raise ValueError(
        f'feature {self.name!r}: out_of_vocabulary with ids={self.ids!r} and '
        f"size={self.size}; it needs ids='index' and a row beside the last"
      )
    if '/' in self.table:
      raise ValueError(
        f"feature {self.name!r}: table={self.table!r} has a '/', which parts "
        'the paths of parameters; name it without'
      )
    object.__setattr__(self, 'column', self.column or self.name)
    object.__setattr__(self, 'table', self.table or self.name)

  @property
  def has_unknown(self) -> bool:
    """Whether the table's last row is of all ids that are not known."""
    return self.out_of_vocabulary or self.ids == 'vocabulary'


@dataclasses.dataclass(frozen=True)
class Dense:
  """A real number, read as `(value - offset) / scale`.

  It should then be around 1; beyond `MAX_DENSE` it is refused, since the model
  multiplies features with one another in float32, and so are values beyond
  `MAX_RAW` before that.

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
    dicts.normalize(self)
    _check_name(self)
    if not 0 < self.scale < math.inf or not math.isfinite(self.offset):
      raise ValueError(
        f'feature {self.name!r}: scale={self.scale} must be positive and '
        f'offset={self.offset} finite'
      )
    object.__setattr__(self, 'column', self.column or self.name)


Feature = Categorical | Dense


@dataclasses.dataclass(frozen=True)
class Task:
  """A binary label, one logit of the model.

  Attributes:
    name: the task's name in batches, metrics and scores.
    column: the log's column; `name` if empty.
    threshold: the label is `column >= threshold`, rounded to the column's type
      if that is of 16 or 32 bits, which hold no 4.1; if None the column itself
      must hold 0 or 1. Numbers of JSON and CSV have 64 bits: write a float32
      as 4.1 there, not as 4.099999904632568.
  """

  name: str
  column: str = ''
  threshold: float | None = None

  def __post_init__(self):
    dicts.normalize(self)
    _check_name(self)
    if self.threshold is not None and not math.isfinite(self.threshold):
      raise ValueError(
        f'task {self.name!r}: threshold={self.threshold} must be finite'
      )
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
      a timestamp column knows its own. Times beyond 292 years are refused: they
      are of another unit. Derived features and snapshots are in
      seconds.
    null_values: the texts that say that a value is missing, in any kind of
      file; see the module's docstring. `('', 'NULL', 'NA')` refuses these as
      missing, `()` takes the empty text for a value.
    column_types: `{column: type}`, or pairs of them, for a column whose use
      leaves a choice. A key may be declared 'integer': '007' is then 7, and
      whole floats and booleans are keys. A time may be declared a 'timestamp',
      'integer' or 'number'; any other type is refused by its row.
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
  null_values: tuple[str, ...] = ('',)
  column_types: tuple[tuple[str, ColumnType], ...] = ()

  def __post_init__(self):
    dicts.normalize(self)
    if not self.item and not self.derived:
      raise ValueError('schema: item is empty; a candidate needs a feature')
    if not self.tasks:
      raise ValueError('schema: tasks is empty; name at least one label')
    if not 0 < self.time_unit < math.inf:
      raise ValueError(
        f'schema: time_unit={self.time_unit} must be positive and finite'
      )
    self._check_keys()
    self._check_types()
    for group in (self.features + self.hidden, self.tasks):
      names = [f.name for f in group]
      for name in names:
        if names.count(name) > 1:
          raise ValueError(
            f'schema: {name!r} is named {names.count(name)} times; names '
            'must differ (share a table through `table=` instead)'
          )
    _ = self.tables  # Conflicting sizes are found here.
    self._check_vocabularies()
    self._check_roles()

  def _check_keys(self) -> None:
    for field in ('user', 'time'):
      if not getattr(self, field):
        raise ValueError(f'schema: {field} is empty; name its column')
    for field in ('time', 'request'):
      if getattr(self, field) == self.user:
        raise ValueError(
          f'schema: user and {field} are one column, {self.user!r}, so that a '
          'user would have no past; name two'
        )

  def _check_types(self) -> None:
    if len(self.types) != len(self.column_types):
      raise ValueError(
        f'schema: column_types={self.column_types} declares a column twice; '
        'leave one'
      )
    uses = [(f.column, _choices(f), f'feature {f.name!r}') for f in self.logged]
    uses += [(t.column, _NUMBERS, f'task {t.name!r}') for t in self.tasks]
    uses += [(self.user, _KEYS, 'user'), (self.request, _KEYS, 'request')]
    uses += [(self.time, (*_NUMBERS, 'timestamp'), 'time')]
    for column, choices, use in uses:
      kind = self.types.get(column, choices[0])
      if kind not in choices:
        raise ValueError(
          f'schema: column_types has {column!r}: {kind!r}, but as {use} it can '
          f'be one of {list(choices)} alone'
        )

  def _check_vocabularies(self) -> None:
    every = categorical((*self.features, *self.hidden))
    for a in every:
      for b in every:
        if a.table == b.table and a.ids == 'vocabulary' != b.ids:
          raise ValueError(
            f'schema: {a.name!r} has a vocabulary, and {b.name!r}, of the same '
            f'table {a.table!r}, has ids={b.ids!r}; make them alike, or give '
            'them tables of their own'
          )
        mine, theirs = (a.size, a.min_count), (b.size, b.min_count)
        if a.table == b.table and a.ids == 'vocabulary' and mine != theirs:
          raise ValueError(
            f'schema: {a.name!r} and {b.name!r} share the vocabulary of table '
            f'{a.table!r} and disagree on size and min_count: {mine} and '
            f'{theirs}; make them equal'
          )

  def _check_roles(self) -> None:
    """Raises ValueError if what is known when is said in two ways."""
    shown = [
      (f.column, f'feature {f.name!r} of {kind}')
      for kind, group in (
        ('context', self.context),
        ('item', self.item),
        ('hidden', self.hidden),
      )
      for f in group
    ]
    keys = [(self.user, 'the user'), (self.time, 'the time')]
    keys += [(self.request, 'the request')]
    tasks = [(t.column, f'the label of task {t.name!r}') for t in self.tasks]
    actions = [(f.column, f'feature {f.name!r} of action') for f in self.action]
    for outcomes, uses in ((tasks, shown + keys), (actions, shown)):
      for column, outcome in outcomes:
        for other, use in uses:
          if column == other:
            raise ValueError(
              f'schema: column {column!r} is {outcome} and {use}, which is '
              'known when the item is shown: the model would read what it is '
              'to predict. List it in `action` alone, which only later events '
              'read, or name another column'
            )

  @functools.cached_property
  def types(self) -> dict[str, ColumnType]:
    """`column_types` as a dict."""
    return dict(self.column_types)

  def check_types_of(self, columns: Sequence[str]) -> None:
    """Raises a ValueError if `column_types` has a column not in `columns`."""
    for name in self.types:
      if name not in columns:
        close = dicts.nearest(name, columns)
        hint = f'; did you mean {close!r}?' if close else ''
        raise ValueError(
          f'schema: column_types has {name!r}, a column that nothing reads'
          f'{hint}'
        )

  @functools.cached_property
  def item_features(self) -> tuple[Feature, ...]:
    """`item` and `derived`: the features of a candidate."""
    return self.item + self.derived

  @functools.cached_property
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

  @functools.cached_property
  def columns(self) -> tuple[str, ...]:
    """The columns of a log that are read, each once."""
    names = [self.user, self.time, *filter(None, [self.request])]
    names += [x.column for x in (*self.logged, *self.tasks)]
    return tuple(dict.fromkeys(names))

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


_NUMBERS: tuple[ColumnType, ...] = ('number', 'integer')
_KEYS: tuple[ColumnType, ...] = ('text', 'integer')


def _choices(feature: Feature) -> tuple[ColumnType, ...]:
  keyed = isinstance(feature, Categorical) and feature.ids != 'index'
  return _KEYS if keyed else _NUMBERS


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
