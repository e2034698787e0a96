"""One row from plain values, as a server or a file of candidates has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax.data import columns as columns_lib
from histjax.data import hashing
from histjax.data import rows as rows_lib
from histjax.features import Events as PastEvents
from histjax.features import FittedFeatures, Impressions
from histjax.schema import Categorical, Feature, Schema

Events = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]


def make_row(
  schema: Schema,
  *,
  context: Mapping[str, Any],
  history: Events,
  candidates: Events,
  config: rows_lib.RowConfig | None = None,
  features: FittedFeatures | None = None,
  visible: int | None = None,
  as_of: bool = False,
) -> rows_lib.Row:
  """A row to score, checked and encoded as a log would be.

  Keys are the log's columns, as the schema names them; others are ignored, so
  that a log's own records can be passed.

  Args:
    schema: of the model: which columns are read, and what is derived.
    context: one value a column.
    history: the user's events, oldest first, as `[{column: value}]` or
      `{column: [values]}`; may be empty.
    candidates: the items to score, likewise; at least one. The time and the
      request, where the schema has them, may be in `context` instead.
    config: as the model was trained; only `kind`, `history_length`,
      `on_overflow` and `ties` are read. None: `RowConfig()`.
    features: what computes `schema.derived`, as training saved it.
    visible: the candidates see so many events of the history, and of later
      ones only that they were shown; None: all. So is a snapshot served that
      is older than the request.
    as_of: candidates may be earlier than events of the history, and then each
      sees what was before it (with kind='snapshot' what was before the first
      of them). Needs ties='strict'.

  Returns:
    The row, without labels. Candidates see the whole history but for events
    of their own request, and under ties='strict' those of their own time.

  Raises:
    ValueError: a value is missing or bad, events are out of order, a
      candidate is earlier than one of them, or `features` are not given.
  """
  config = config or rows_lib.RowConfig()
  features = _checked_features(schema, features)
  context = _one(context)
  past = _columns(history, 'history')
  shown = _columns(candidates, 'candidates')
  num_events, num_candidates = _length(past), _length(shown)
  if not num_candidates:
    raise ValueError('candidates is empty; give at least one item to score')
  for name in (schema.time, schema.request):
    if name and name not in shown and name in context:
      shown[name] = [context[name]] * num_candidates
  if as_of and config.ties != 'strict':
    raise ValueError(
      f'as_of=True with ties={config.ties!r}: a log does not say which events '
      "of a candidate's own time were before it; train with ties='strict'"
    )
  needs_time = features.needs('time') or config.ties == 'strict'
  time, is_timestamp = _time(schema, past, shown, needs_time, as_of)
  derives = bool(features.configs)
  before, seen = _visible(schema, past, shown, time, config.ties, derives)
  sees = _seen(before, config, visible, num_events)
  start = _start(sees, config)
  stop = int(sees.max())
  one = {name: [value] for name, value in context.items()}
  items = schema.item + schema.hidden
  of_events = _encode(schema, past, items, num_events, 'history')
  of_candidates = _encode(schema, shown, items, num_candidates, 'candidates')
  known = {name: values[:stop] for name, values in past.items()}
  actions = _encode(schema, known, schema.action, stop, 'history')
  if derives:
    user = np.zeros(1, np.uint64)
    if features.needs('user'):
      user = _user(schema, context)
    events = PastEvents(
      schema=schema,
      user=np.repeat(user, num_events),
      begin=np.zeros(num_events, np.int64),
      visible=seen,
      time=time[:num_events],
      is_timestamp=is_timestamp,
      features=of_events,
      # Of events that nobody sees no outcome is read.
      labels={
        name: np.pad(label, (0, num_events - stop))
        for name, label in _labels(schema, known, stop).items()
      }
      if features.needs('labels')
      else {},
    )
    impressions = Impressions(
      user=np.repeat(user, num_candidates),
      begin=np.zeros(num_candidates, np.int64),
      shown=before,
      start=np.full(num_candidates, start),
      visible=sees,
      time=time[num_events:],
      features=of_candidates,
    )
    derived = features.of_events(events, config.history_length)
    of_candidates |= features.of_impressions(events, impressions, derived)
    of_events |= derived
  return rows_lib.Row(
    context={
      name: values[0]
      for name, values in _encode(
        schema, one, schema.context, 1, 'context'
      ).items()
    },
    history={
      **{f.name: of_events[f.name][start:stop] for f in schema.item_features},
      **{name: values[start:] for name, values in actions.items()},
    },
    candidates={f.name: of_candidates[f.name] for f in schema.item_features},
    visible=(sees - start).astype(np.int32),
    labels={},
  )


def _checked_features(
  schema: Schema, features: FittedFeatures | None
) -> FittedFeatures:
  features = features or FittedFeatures()
  known = {f.name: f for f in features.derived}
  for feature in schema.derived:
    if known.get(feature.name) != feature:
      raise ValueError(
        f'schema.derived has {feature.name!r}, which `features` do not '
        f'compute ({sorted(known)}); give those that training saved, as '
        '`histjax.features.load(workdir)` reads them'
      )
  return features


def _user(schema: Schema, context: Mapping[str, Any]) -> np.ndarray:
  if schema.user not in context:
    raise ValueError(
      f'context lacks column {schema.user!r}, the user, whose own events the '
      'rates leave out; give it (of a new user, too)'
    )
  return _keys(
    schema, {schema.user: [context[schema.user]]}, schema.user, 'context'
  )


def _keys(schema: Schema, columns, name: str, source: str) -> np.ndarray:
  """Digests of a column of keys, uint64 `[n]`."""
  table = columns_lib.from_mapping(columns, [name], source, schema)
  codes, keys = columns_lib.encode_keys(table, name)
  return hashing.digests(keys)[codes]


def _seen(
  before: np.ndarray, config: rows_lib.RowConfig, visible, num_events: int
) -> np.ndarray:
  """The event after the last one that each candidate sees, `[c]`."""
  if visible is not None:
    if not 0 <= visible <= num_events:
      raise ValueError(
        f'visible={visible} must be in [0, {num_events}], the events of the '
        'history'
      )
    before = np.minimum(before, visible)
  if config.kind == 'snapshot':
    return np.full_like(before, before.min())
  return before


def _start(sees: np.ndarray, config: rows_lib.RowConfig) -> int:
  """The first event of the row's history."""
  if config.history_length is None:
    return 0
  least = int(sees.min())
  if config.on_overflow == 'error' and least > config.history_length:
    raise ValueError(
      f'history has {least} events, more than history_length='
      f"{config.history_length}; shorten it, or set on_overflow='truncate'"
    )
  return max(0, least - config.history_length)


def _one(context: Any) -> Mapping[str, Any]:
  if not isinstance(context, Mapping):
    raise ValueError(
      f'context is a {type(context).__name__}; give {{column: value}}'
    )
  return context


def _columns(events: Events, source: str) -> dict[str, Sequence[Any]]:
  if isinstance(events, Mapping):
    return _equal_columns(events, source)
  try:
    if isinstance(events, str):
      raise TypeError
    events = list(events)
  except TypeError:
    raise ValueError(
      f'{source} is a {type(events).__name__}; give [{{column: value}}] or '
      '{column: [values]}'
    ) from None
  for row, event in enumerate(events):
    if not isinstance(event, Mapping):
      raise ValueError(
        f'{source} row {row} is a {type(event).__name__}; give '
        '{column: value}'
      )
  names = dict.fromkeys(name for event in events for name in event)
  for row, event in enumerate(events):
    for name in names:
      if name not in event:
        raise ValueError(
          f'{source} row {row} lacks {name!r}, which another row has; give '
          'all rows the same keys'
        )
  return {name: [event[name] for event in events] for name in names}


def _equal_columns(columns: Mapping[str, Any], source: str):
  found = {}
  for name, values in columns.items():
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(
      values, '__iter__'
    ):
      raise ValueError(
        f'column {name!r} of {source} is {values!r}, a '
        f'{type(values).__name__}; give one value an event, as a list'
      )
    found[name] = values if hasattr(values, '__len__') else list(values)
  lengths = {name: len(values) for name, values in found.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(
      f'columns of {source} differ in length: {lengths}; make them equal'
    )
  return found


def _length(columns: Mapping[str, Sequence[Any]]) -> int:
  return len(next(iter(columns.values()))) if columns else 0


def _encode(
  schema: Schema,
  columns: Mapping[str, Sequence[Any]],
  features: tuple[Feature, ...],
  length: int,
  source: str,
) -> dict[str, np.ndarray]:
  if not length:
    return {
      f.name: np.zeros(
        0, np.int32 if isinstance(f, Categorical) else np.float32
      )
      for f in features
    }
  table = columns_lib.from_mapping(
    columns, [f.column for f in features], source, schema
  )
  return {
    f.name: columns_lib.encode_categorical(table, f)
    if isinstance(f, Categorical)
    else columns_lib.encode_dense(table, f)
    for f in features
  }


def _time(
  schema: Schema, past, shown, needed: bool, as_of: bool
) -> tuple[np.ndarray, bool]:
  """Times of events and, after them, candidates; whether they are timestamps.

  Zeros if the time is not needed and not given.
  """
  num_events, num_candidates = _length(past), _length(shown)
  given = schema.time in shown and (schema.time in past or not num_events)
  if not given and not needed:
    return np.zeros(num_events + num_candidates, np.int64), False
  time, is_timestamp = _one_clock(schema, past, shown)
  _check_order(schema, time, num_events, as_of)
  return time, is_timestamp


def _visible(
  schema: Schema, past, shown, time: np.ndarray, ties: str, derives: bool
) -> tuple[np.ndarray, np.ndarray]:
  """What was before each candidate, `[c]`, and each event, `[l]`."""
  num_events, num_candidates = _length(past), _length(shown)
  before = np.full(num_candidates, num_events)
  seen = np.arange(num_events)
  if ties == 'strict':
    before, seen = (
      np.searchsorted(time[:num_events], t, 'left')
      for t in (time[num_events:], time[:num_events])
    )
  if not schema.request or not num_events:
    return before, seen
  named = schema.request in past or schema.request in shown
  if not named and not derives:  # Nothing asks for what an event saw.
    return before, seen
  own = _keys(schema, past, schema.request, 'history')
  values, first = np.unique(own, return_index=True)
  # A request's events see what was before the first of them.
  seen = seen[first[np.searchsorted(values, own)]]
  if schema.request in shown:
    wanted = _keys(schema, shown, schema.request, 'candidates')
    place = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    known = values[place] == wanted
    before = np.where(known, np.minimum(before, seen[first[place]]), before)
  return before, seen


def _one_clock(schema: Schema, past, shown) -> tuple[np.ndarray, bool]:
  """Times of events, then of candidates, and whether they are timestamps."""
  name, times, kinds = schema.time, [], {}
  for source, columns in {'history': past, 'candidates': shown}.items():
    if not _length(columns):
      continue
    if name not in columns:
      raise ValueError(
        f'{source} lacks column {name!r}, the time, which '
        "a derived feature or ties='strict' needs; give it"
      )
    table = columns_lib.from_mapping(columns, [name], source, schema)
    values, kinds[source] = columns_lib.encode_time(table, name)
    times.append(values)
  columns_lib.check_clocks(name, kinds)
  return np.concatenate(times), kinds['candidates']


def _labels(schema: Schema, past, length: int) -> dict[str, np.ndarray]:
  if not length:
    return {task.name: np.zeros(0, np.float32) for task in schema.tasks}
  columns = [task.column for task in schema.tasks]
  table = columns_lib.from_mapping(past, columns, 'history', schema)
  return {t.name: columns_lib.encode_label(table, t) for t in schema.tasks}


def _check_order(
  schema: Schema, time: np.ndarray, num_events: int, as_of: bool
) -> None:
  late = np.flatnonzero(np.diff(time[:num_events]) < 0)
  if late.size:
    raise ValueError(
      f'column {schema.time!r}: history row {late[0] + 1} is earlier than the '
      'row before; order the history oldest first'
    )
  early = np.flatnonzero(time[num_events:] < time[max(num_events - 1, 0)])
  if num_events and early.size and not as_of:
    raise ValueError(
      f'column {schema.time!r}: candidate {early[0]} is earlier than the '
      "history's last event; drop the events after it, or set as_of=True"
    )
