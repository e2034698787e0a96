"""Plain values of a request, checked and encoded column by column."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax import config as dicts
from histjax.data import columns as columns_lib
from histjax.data import hashing, plain
from histjax.schema import Categorical, Feature, Schema
from histjax.vocabulary import Vocabulary

Events = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]


def one(context: Any) -> Mapping[str, Any]:
  """The context, if it is one value a column, else a ValueError."""
  if type(context) is not dict and not isinstance(context, Mapping):
    raise ValueError(
      f'context is a {type(context).__name__}; give {{column: value}}'
    )
  return context


def read(events: Events, source: str) -> dict[str, Sequence[Any]]:
  """Plain values as columns of one length; ValueError if they are none."""
  if type(events) is dict or isinstance(events, Mapping):
    return _equal_columns(events, source)
  if type(events) in (list, tuple) and not events:
    return {}
  try:
    if isinstance(events, str) or hasattr(events, 'keys'):
      raise TypeError  # A data frame iterates over its columns' names.
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
  if events and not names:  # Without columns they would be no events.
    raise ValueError(f'{source} row 0 is empty; give {{column: value}}')
  for row, event in enumerate(events):
    for name in names:
      if name not in event:
        raise ValueError(
          f'{source} row {row} lacks {name!r}, which another row has; give '
          'all rows the same keys'
        )
  return {name: [event[name] for event in events] for name in names}


def _equal_columns(columns: Mapping[str, Any], source: str):
  found: dict[str, Any] = dict(columns)
  for name, values in found.items():
    if type(values) is list:
      continue
    try:
      if isinstance(values, (str, bytes, Mapping)):
        raise TypeError
      iter(values)  # An array of no dimensions has __iter__, and refuses.
    except TypeError:
      raise ValueError(
        f'column {name!r} of {source} is {values!r}, a '
        f'{type(values).__name__}; give one value an event, as a list'
      ) from None
    found[name] = values if hasattr(values, '__len__') else list(values)
  if len(set(map(len, found.values()))) > 1:
    lengths = {name: len(values) for name, values in found.items()}
    raise ValueError(
      f'columns of {source} differ in length: {lengths}; make them equal'
    )
  return found


def check_known(
  known: frozenset[str], columns: Mapping[str, Any], source: str
) -> None:
  """Raises a ValueError if there are columns that are not known.

  What is misspelt would be as good as not given: a request, a time.
  """
  if columns.keys() <= known:
    return
  name = next(name for name in columns if name not in known)
  close = dicts.nearest(str(name), known)
  fix = f'rename it to {close!r}, or leave it out' if close else 'leave it out'
  raise ValueError(
    f'{source} has column {name!r}, which the model does not know; {fix}; '
    f'known are {sorted(known)}'
  )


def length_of(columns: Mapping[str, Sequence[Any]]) -> int:
  """The length of the columns of `read`."""
  return len(next(iter(columns.values()))) if columns else 0


def encode(
  schema: Schema,
  columns: Mapping[str, Sequence[Any]],
  features: tuple[Feature, ...],
  length: int,
  source: str,
  vocabularies: Mapping[str, Vocabulary],
) -> dict[str, np.ndarray]:
  """Ids and values of features, `{name: [length]}`."""
  if not length:
    return {
      f.name: np.zeros(
        0, np.int32 if isinstance(f, Categorical) else np.float32
      )
      for f in features
    }
  found = plain.encode(schema, columns, features, length, vocabularies)
  if found is not None:
    return found
  table = columns_lib.from_mapping(
    columns, [f.column for f in features], source, schema
  )
  return columns_lib.encode(table, features, vocabularies)


def encode_one(
  schema: Schema,
  values: Mapping[str, Any],
  features: tuple[Feature, ...],
  source: str,
  vocabularies: Mapping[str, Vocabulary],
) -> dict[str, np.generic]:
  """As `encode`, of one value a column, `{name: scalar}`."""
  found = plain.encode_one(schema, values, features, vocabularies)
  if found is not None:
    return found
  one = {name: [value] for name, value in values.items()}
  encoded = encode(schema, one, features, 1, source, vocabularies)
  return {name: x[0] for name, x in encoded.items()}


def keys(schema: Schema, columns, name: str, source: str) -> np.ndarray:
  """Digests of a column of keys, uint64 `[n]`."""
  found = plain.digests(schema, columns.get(name), name)
  if found is not None:
    return found
  table = columns_lib.from_mapping(columns, [name], source, schema)
  codes, keys = columns_lib.encode_keys(table, name)
  return hashing.digests(keys)[codes]


def user_of(schema: Schema, context: Mapping[str, Any]) -> np.ndarray:
  """The digest of the context's user, uint64 `[1]`."""
  if schema.user not in context:
    raise ValueError(
      f'context lacks column {schema.user!r}, the user, whose own events the '
      'rates leave out; give it (of a new user, too)'
    )
  return keys(
    schema, {schema.user: [context[schema.user]]}, schema.user, 'context'
  )


@functools.lru_cache(64)
def no_times(number: int) -> np.ndarray:
  """Zeros, which stand for times that nothing reads; read-only."""
  found = np.zeros(number, np.int64)
  found.setflags(write=False)
  return found


def times(
  schema: Schema, columns, number: int, wanted: bool, source: str
) -> tuple[np.ndarray, bool | None]:
  """Times, and whether they are timestamps; zeros if they are not wanted."""
  if not wanted or not number:
    return no_times(number), None
  if schema.time not in columns:
    raise ValueError(
      f'{source} lacks column {schema.time!r}, the time, which '
      "a derived feature or ties='strict' needs; give it"
    )
  found = plain.time(schema, columns[schema.time], schema.time)
  if found is not None:
    return found, False
  table = columns_lib.from_mapping(columns, [schema.time], source, schema)
  return columns_lib.encode_time(table, schema.time)


def labels(
  schema: Schema,
  past: Mapping[str, Sequence[Any]],
  length: int,
  source: str,
) -> dict[str, np.ndarray]:
  """Labels of all tasks, float32 `{task: [length]}`."""
  if not length:
    return {task.name: np.zeros(0, np.float32) for task in schema.tasks}
  found = plain.labels(schema, past, length)
  if found is not None:
    return found
  for task in schema.tasks:
    if task.column not in past:
      raise ValueError(
        f'{source} lacks column {task.column!r}, the label of task '
        f'{task.name!r}, which a derived feature counts; give it'
      )
  columns = [task.column for task in schema.tasks]
  table = columns_lib.from_mapping(past, columns, source, schema)
  return {t.name: columns_lib.encode_label(table, t) for t in schema.tasks}
