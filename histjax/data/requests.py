"""One row from plain values, as a server or a file of candidates has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax.data import columns as columns_lib
from histjax.data import events as events_lib
from histjax.data import rows as rows_lib
from histjax.data.history_rates import history_rates
from histjax.schema import Categorical, Feature, Schema

Events = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]


def make_row(
  schema: Schema,
  *,
  context: Mapping[str, Any],
  history: Events,
  candidates: Events,
  config: rows_lib.RowConfig | None = None,
) -> rows_lib.Row:
  """A row to score, checked and encoded as a log would be.

  Keys are the log's columns, as the schema names them; others are ignored, so
  that a log's own records can be passed.

  Args:
    schema: which columns are read.
    context: one value a column.
    history: the user's events, oldest first, as `[{column: value}]` or
      `{column: [values]}`; may be empty.
    candidates: the items to score, likewise; at least one. The time column,
      if the schema has `time_gap`, may be in `context` instead.
    config: as the model was trained; only `history_length`, `on_overflow` and
      `ties` are read. None: `RowConfig()`.

  Returns:
    The row, without labels. Candidates see the whole history; under
    ties='strict' what is strictly earlier.

  Raises:
    ValueError: a value is missing or bad, events are out of order, or a
      candidate is earlier than one of them.
  """
  config = config or rows_lib.RowConfig()
  context = _one(context)
  past = _columns(history, 'history')
  shown = _columns(candidates, 'candidates')
  num_events, num_candidates = _length(past), _length(shown)
  if not num_candidates:
    raise ValueError('candidates is empty; give at least one item to score')
  if schema.time not in shown and schema.time in context:
    shown[schema.time] = [context[schema.time]] * num_candidates
  visible, seen, gaps = _times(schema, past, shown, config.ties)
  start = 0
  if config.history_length is not None:
    least = int(visible.min())
    if config.on_overflow == 'error' and least > config.history_length:
      raise ValueError(
        f'history has {least} events, more than history_length='
        f"{config.history_length}; shorten it, or set on_overflow='truncate'"
      )
    start = max(0, least - config.history_length)
  one = {name: [value] for name, value in context.items()}
  encoded_history = _encode(
    schema,
    past,
    schema.item + schema.hidden + schema.action,
    num_events,
    'history',
  )
  encoded_candidates = _encode(
    schema, shown, schema.item + schema.hidden, num_candidates, 'candidates'
  )
  if schema.time_gap_buckets:
    encoded_history['time_gap'] = gaps[:num_events]
    encoded_candidates['time_gap'] = gaps[num_events:]
  if schema.history_rates:
    labels = _labels(schema, past, num_events)
    begin = np.zeros(num_events, np.int64)
    if config.history_length is not None:
      begin = np.maximum(begin, seen - config.history_length)
    everywhere = (schema, labels, encoded_history)
    of_events = history_rates(*everywhere, encoded_history, begin, seen)
    begin = np.full(num_candidates, start)
    encoded_candidates |= history_rates(
      *everywhere, encoded_candidates, begin, visible
    )
    encoded_history |= of_events
  for feature in schema.hidden:
    del encoded_history[feature.name], encoded_candidates[feature.name]
  stop = int(visible.max())
  return rows_lib.Row(
    context={
      name: values[0]
      for name, values in _encode(
        schema, one, schema.context, 1, 'context'
      ).items()
    },
    history={name: x[start:stop] for name, x in encoded_history.items()},
    candidates=encoded_candidates,
    visible=(visible - start).astype(np.int32),
    labels={},
  )


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


def _times(schema: Schema, past, shown, ties):
  """What candidates see, `[c]`, and events, `[l]`; time gaps, `[l + c]`."""
  num_events, num_candidates = _length(past), _length(shown)
  visible = np.full(num_candidates, num_events)
  gaps = np.zeros(num_events + num_candidates, np.int32)
  needed = bool(schema.time_gap_buckets) or ties == 'strict'
  first = np.arange(num_events)
  if not needed and not (schema.time in past and schema.time in shown):
    return visible, _by_request(schema, past, first), gaps
  time, is_timestamp = _one_clock(schema, past, shown)
  _check_order(schema, time, num_events)
  if ties == 'strict':
    first = np.searchsorted(time[:num_events], time[:num_events], 'left')
    visible = np.searchsorted(time[:num_events], time[num_events:], 'left')
  seen = _by_request(schema, past, first)
  if schema.time_gap_buckets:
    stop = np.concatenate([seen, visible])
    last = time[np.maximum(stop - 1, 0)]
    gap = np.where(stop > 0, time - last, 0)
    gaps = events_lib.gap_buckets(gap, schema, is_timestamp)
  return visible, seen, gaps


def _one_clock(schema: Schema, past, shown) -> tuple[np.ndarray, bool]:
  """Times of events, then of candidates, and whether they are timestamps."""
  name, times, kinds = schema.time, [], {}
  for source, columns in {'history': past, 'candidates': shown}.items():
    if not _length(columns):
      continue
    if name not in columns:
      raise ValueError(
        f'{source} lacks column {name!r}, the time, which '
        "Schema.time_gap_buckets or ties='strict' needs; give it"
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


def _by_request(schema: Schema, past, stop: np.ndarray) -> np.ndarray:
  """Moves `stop` before the event's own request, if the history says so."""
  if not schema.request or not len(stop):
    return stop
  table = columns_lib.from_mapping(past, [schema.request], 'history', schema)
  codes, _ = columns_lib.encode_keys(table, schema.request)
  _, first = np.unique(codes, return_index=True)
  return stop[first[codes]]


def _check_order(schema: Schema, time: np.ndarray, num_events: int) -> None:
  late = np.flatnonzero(np.diff(time[:num_events]) < 0)
  if late.size:
    raise ValueError(
      f'column {schema.time!r}: history row {late[0] + 1} is earlier than the '
      'row before; order the history oldest first'
    )
  early = np.flatnonzero(time[num_events:] < time[max(num_events - 1, 0)])
  if num_events and early.size:
    raise ValueError(
      f'column {schema.time!r}: candidate {early[0]} is earlier than the '
      "history's last event; drop the events after it"
    )
