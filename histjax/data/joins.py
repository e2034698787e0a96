"""Candidates of many users joined to a log: rows of all of them at once.

What `requests.make_row` makes of one request, made of whole tables: each
user's candidates of one context are a row, and the user's events its history.
With `as_of` candidates are grouped as those of a log's split are, by what
`RowConfig.kind` says: it decides where histories of a bounded length begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax import vocabulary
from histjax.data import columns as columns_lib
from histjax.data import hashing
from histjax.data.events import EventLog
from histjax.data.parts import Columns
from histjax.data.rows import RowConfig, Rows
from histjax.features import FittedFeatures, Impressions
from histjax.schema import Feature, Schema
from histjax.vocabulary import Vocabulary

Arrays = Mapping[str, Any]
"""`{name: [n]}`, of NumPy; texts that are kept are Arrow's."""
KEEP = 'keep/'


@dataclasses.dataclass(frozen=True, eq=False)
class Join:
  """How candidates are joined to a log.

  Attributes:
    schema: of the model.
    config: how a row's history is cut.
    features: what is derived of both.
    as_of: candidates may be earlier than events, and see what was before, in
      rows as evaluation makes them; needs ties='strict'.
    keep: columns of keys of the candidates that nothing reads, for the output.
  """

  schema: Schema
  config: RowConfig
  features: FittedFeatures
  as_of: bool = False
  keep: tuple[str, ...] = ()

  def __post_init__(self):
    missing = set(self.schema.derived) - set(self.features.derived)
    if missing:
      raise ValueError(
        f'schema.derived has {sorted(f.name for f in missing)}, which '
        '`features` do not compute; give those that training saved'
      )
    for feature in vocabulary.of(self.schema):
      vocabulary.check(feature, self.features.vocabularies)
    if self.as_of and self.config.ties != 'strict':
      raise ValueError(
        f'as_of=True with ties={self.config.ties!r}: a log does not say which '
        "events of a candidate's own time were before it; train with "
        "ties='strict' (--config.data.rows.ties=strict), or leave as_of out"
      )

  @property
  def timed(self) -> bool:
    """Whether candidates have times."""
    strict = self.config.ties == 'strict'
    return self.features.needs('time') or strict or self.as_of

  @property
  def log_table(self) -> Table:
    """What is read of the log."""
    schema = self.schema
    tasks = self.features.needs('labels')
    return Table(
      schema,
      (*schema.item, *schema.hidden, *schema.action),
      time=True,
      request=bool(schema.request),
      labels=tasks,
      vocabularies=self.features.vocabularies,
    )

  @property
  def candidates_table(self) -> Table:
    """What is read of candidates."""
    schema = self.schema
    return Table(
      schema,
      (*schema.item, *schema.hidden, *schema.context),
      time=self.timed,
      request=self.as_of and bool(schema.request),
      labels=False,
      vocabularies=self.features.vocabularies,
      keep=self.keep,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Which columns of files are read, and as what.

  Attributes:
    schema: of the model.
    features: that are read.
    time: whether the time is.
    request: whether the request is.
    labels: whether the tasks' labels are.
    vocabularies: as `columns.encode`.
    keep: columns of keys that are kept as they are.
  """

  schema: Schema
  features: Sequence[Feature]
  time: bool
  request: bool
  labels: bool
  vocabularies: Mapping[str, Vocabulary] | None = None
  keep: tuple[str, ...] = ()

  @property
  def columns(self) -> list[str]:
    """The columns, each once."""
    schema = self.schema
    names = [schema.user, *(f.column for f in self.features)]
    if self.time:
      names.append(schema.time)
    if self.request:
      names.append(schema.request)
    if self.labels:
      names += [task.column for task in schema.tasks]
    return list(dict.fromkeys([*names, *self.keep]))

  def use(self, column: str) -> str:
    """What a column is, to say why it is needed."""
    if column == self.schema.user:
      return 'the user'
    if column == self.schema.request:
      return 'the request'
    for feature in self.features:
      if column == feature.column:
        return f'feature {feature.name!r}'
    if column == self.schema.time:
      return 'the time'
    if column in self.keep:
      return 'to be kept'
    return 'a label, which a derived feature counts'

  def encode(self, columns: Columns) -> tuple[dict[str, Any], bool]:
    """The columns but for the user's, checked, and if times are timestamps.

    Returns:
      `{name: [n]}`: 'time', 'request' (uint64 digests), 'feature/<name>',
      'label/<task>' and 'keep/<column>' (`columns.keys`), those that the table
      has.

    Raises:
      ValueError: a value is missing or bad; the message says where.
    """
    found: dict[str, Any] = {}
    is_timestamp = False
    if self.time:
      found['time'], is_timestamp = columns_lib.encode_time(
        columns, self.schema.time
      )
    if self.request:
      codes, keys = columns_lib.encode_keys(columns, self.schema.request)
      found['request'] = hashing.digests(keys)[codes]
    if self.labels:  # Before features, as `EventLog.from_parts`.
      for task in self.schema.tasks:
        found[f'label/{task.name}'] = columns_lib.encode_label(columns, task)
    encoded = columns_lib.encode(columns, self.features, self.vocabularies)
    found |= {f'feature/{name}': values for name, values in encoded.items()}
    for name in self.keep:
      found[f'{KEEP}{name}'] = columns_lib.keys(columns, name)
    return found, is_timestamp

  def split(self, arrays: Arrays, kind: str) -> dict[str, np.ndarray]:
    """Those of `encode` that are of a kind, 'feature' or 'label', by name."""
    return {
      name.removeprefix(f'{kind}/'): values
      for name, values in arrays.items()
      if name.startswith(f'{kind}/')
    }


def make_rows(
  join: Join,
  keys: np.ndarray,
  events: Arrays,
  shown: Arrays,
  *,
  is_timestamp: bool,
) -> tuple[Rows, np.ndarray]:
  """The rows of some users' candidates, without labels.

  Args:
    join: how.
    keys: `[users]`.
    events: `Table.encode` of `join.log_table`, and 'user', an index into
      `keys`, sorted by user, then time.
    shown: likewise of `join.candidates_table`, in any order.
    is_timestamp: whether times are timestamps.

  Returns:
    The rows, and int64 `[c]`, the row of `shown` that each candidate of the
    rows is. A user's rows follow each other, and candidates of a row are in
    the order of `shown`.

  Raises:
    ValueError: a history is longer than on_overflow='error' lets it be.
  """
  config = join.config
  log = _log(join, keys, events, is_timestamp)
  before = _before(join, log, shown)
  order, starts = _groups(join, shown, before)
  shown = {
    name: values[order]
    for name, values in shown.items()
    if not name.startswith(KEEP)
  }
  user, before = shown['user'], before[order]
  counts = np.diff(np.append(starts, len(order)))
  sees = before
  if config.kind == 'snapshot' and len(order):
    sees = np.repeat(np.minimum.reduceat(before, starts), counts)
  start, stop = _history(join, log, user[starts], starts, sees)
  features = join.candidates_table.split(shown, 'feature')
  known, derived = {}, {}
  if join.features.configs:
    past = log.events(config.ties)
    known = join.features.of_events(past, config.history_length)
    impressions = Impressions(
      user=hashing.digests(keys)[user],
      begin=log.offsets[user],
      shown=before,
      start=np.repeat(start, counts),
      visible=sees,
      time=shown.get('time', np.zeros(len(user), log.time.dtype)),
      features=features,
    )
    derived = join.features.of_impressions(past, impressions, known)
  rows = Rows(
    log=dataclasses.replace(
      log, user=np.concatenate([log.user, user.astype(np.int32)]), labels={}
    ),
    config=config,
    features={**known, **_both(join, log, features)},
    events=len(log) + np.arange(len(order)),
    offsets=np.append(starts, len(order)),
    start=start,
    stop=stop,
    visible=sees,
    derived=derived,
  )
  return rows, order


def _both(join: Join, log: EventLog, shown: Arrays) -> dict[str, np.ndarray]:
  """Features with the candidates' behind the events', as `Rows` has them."""
  schema = join.schema
  return {
    **{f.name: log.features[f.name] for f in schema.action},
    **{
      f.name: np.concatenate([log.features[f.name], shown[f.name]])
      for f in schema.item
    },
    **{f.name: np.pad(shown[f.name], (len(log), 0)) for f in schema.context},
  }


def _log(join: Join, keys, events: Arrays, is_timestamp: bool) -> EventLog:
  table = join.log_table
  return EventLog(
    schema=join.schema,
    keys=keys,
    user=events['user'].astype(np.int32),
    time=events['time'],
    is_timestamp=is_timestamp,
    features=table.split(events, 'feature'),
    labels=table.split(events, 'label'),
    request=events.get('request'),
    extra={},
  )


def _groups(
  join: Join, shown: Arrays, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Candidates by row, and where each of these begins; see the module."""
  config = join.config
  labels = [shown['user']]
  labels += [shown[f'feature/{f.name}'] for f in join.schema.context]
  if join.as_of and config.kind in ('pointwise', 'request'):
    labels.append(before)  # A row each, or as good as that: they see the same.
  cut = join.as_of and config.kind == 'streaming' and config.max_candidates
  within = [shown['time']] if cut else []
  order = np.lexsort([*within, *labels[::-1]])  # Stable; by user first.
  new = np.zeros(len(order), bool)
  new[:1] = True
  for label in labels:
    new[1:] |= np.diff(label[order]) != 0
  starts = np.flatnonzero(new)
  if cut:
    place = np.arange(len(order)) - starts[np.cumsum(new) - 1]
    starts = np.flatnonzero(place % cut == 0)
  return order, starts


def _before(join: Join, log: EventLog, shown: Arrays) -> np.ndarray:
  """The event after the last one that was shown before each candidate."""
  user = shown['user']
  before = log.offsets[user + 1]
  if join.config.ties == 'strict':
    before = _earlier(log, user, shown['time'])
  if log.request is None or 'request' not in shown:
    return before
  # Events of a candidate's own request, and what came after its first event.
  values = np.unique(log.request)
  pairs = log.user.astype(np.int64) * (len(values) + 1)
  pairs += np.searchsorted(values, log.request)
  pairs, first = np.unique(pairs, return_index=True)
  rank = np.searchsorted(values, shown['request'])
  known = np.append(values, 0)[rank] == shown['request']
  known &= rank < len(values)
  wanted = user * (len(values) + 1) + rank
  place = np.minimum(np.searchsorted(pairs, wanted), max(len(pairs) - 1, 0))
  if not len(pairs):
    return before
  known &= pairs[place] == wanted
  seen = log.visible('strict')[first[place]]
  return np.where(known, np.minimum(before, seen), before)


def _earlier(log: EventLog, user: np.ndarray, time: np.ndarray) -> np.ndarray:
  """The event after the user's last one before each time."""
  stop = log.offsets[user + 1]
  last = log.time[np.maximum(stop - 1, 0)] if len(log) else time
  some = np.flatnonzero((stop > log.offsets[user]) & (last >= time))
  if some.size:
    times = np.unique(log.time)
    step = len(times) + 1
    # Users and their times as one increasing number.
    place = log.user * np.int64(step) + np.searchsorted(times, log.time)
    wanted = user[some] * np.int64(step)
    wanted += np.searchsorted(times, time[some], 'left')
    stop[some] = np.searchsorted(place, wanted, 'left')
  return stop


def _history(join: Join, log: EventLog, user, starts, sees):
  """Where the history of each row begins and ends."""
  config, begin = join.config, log.offsets[user]
  if not len(starts):
    return begin, begin
  least = np.minimum.reduceat(sees, starts)
  stop = np.maximum.reduceat(sees, starts)
  if config.history_length is None:
    return begin, stop
  length = least - begin
  bad = np.flatnonzero(length > config.history_length)
  if config.on_overflow == 'error' and bad.size:
    raise ValueError(
      f'user {str(log.keys[user[bad[0]]])!r}: history has {length[bad[0]]} '
      f'events, more than history_length={config.history_length}; shorten it, '
      "or set on_overflow='truncate'"
    )
  return np.maximum(begin, least - config.history_length), stop
