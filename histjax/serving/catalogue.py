"""What the page shows: the items and some users of the log that a run is of."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from typing import Any

import numpy as np

from histjax.data import encodings
from histjax.data.events import EventLog
from histjax.schema import Categorical, Dense, Feature, Schema


@dataclasses.dataclass(frozen=True)
class User:
  """A user as the log has it.

  Attributes:
    key: the user's own.
    context: one value a column, of the last event.
    events: `{column: [values]}`, oldest first.
  """

  key: int | str
  context: dict[str, Any]
  events: dict[str, list[Any]]


@dataclasses.dataclass(frozen=True)
class Catalogue:
  """Values as the log has them, under its columns.

  Attributes:
    key: the column that tells items apart.
    items: `{column: [values]}`, one row an item, by how often they occur.
    titles: of each item.
    actions: `{column: choices}` of what a user can do.
    did: `{column: value}`, the most frequent positive event's.
    users: some of them; the first has no events.
    time: the column of times; `step` from one event to the next.
    step: in its unit; of texts, seconds.
    request: the column of requests, '' if there is none.
    is_key_read: the model reads a user's key, so that the page has to send it.
      Else it sends one of its own, and no user's state has its clicks.
  """

  key: str
  items: dict[str, list[Any]]
  titles: list[str]
  actions: dict[str, list[int]]
  did: dict[str, Any]
  users: list[User]
  time: str
  step: float
  request: str
  is_key_read: bool


def of_log(
  log: EventLog,
  *,
  num_users: int = 30,
  max_items: int = 4096,
  titles: dict[str, str] | None = None,
) -> Catalogue:
  """The catalogue of a log.

  Args:
    log: with the features that the model reads.
    num_users: to choose from.
    max_items: those that occur most often.
    titles: `{item: title}`.

  Raises:
    ValueError: a column is hashed or has a vocabulary, so that its values are
      not known.
  """
  schema = log.schema
  for feature in schema.logged:
    if isinstance(feature, Categorical) and feature.ids != 'index':
      raise ValueError(
        f'column {feature.column!r} has ids={feature.ids!r}, and the page '
        'would have to show its values, which are not kept; serve without the '
        'page'
      )
  columns = {f.column: _raw(f, log.features[f.name]) for f in schema.logged}
  key = schema.item[0].column
  item_columns = [f.column for f in schema.item + schema.hidden]
  found, last, count = np.unique(
    columns[key][::-1], return_index=True, return_counts=True
  )
  order = np.argsort(-count, kind='stable')[:max_items]
  last = (len(log) - 1 - last)[order]
  names = titles or {}
  positive = np.flatnonzero(next(iter(log.labels.values())) > 0)
  return Catalogue(
    key=key,
    items={c: columns[c][last].tolist() for c in item_columns},
    titles=[names.get(str(x), f'{key} {x}') for x in found[order].tolist()],
    actions={
      f.column: list(range(min(f.size, 32)))
      for f in schema.action
      if isinstance(f, Categorical)
    },
    did={f.column: _mode(columns[f.column][positive]) for f in schema.action},
    users=[
      _nobody(schema, log, columns),
      *(
        _user(schema, log, columns, item_columns, user)
        for user in _spread(log.num_users, num_users)
      ),
    ],
    time=schema.time,
    step=60.0 if log.is_timestamp else max(1.0, round(60 / schema.time_unit)),
    request=schema.request,
    is_key_read=schema.types.get(schema.user) == 'integer'
    or schema.user in {f.column for f in schema.context},
  )


def read_titles(path: str) -> dict[str, str]:
  """`{item: title}` of a CSV file with a header and two columns.

  Raises:
    ValueError: a row has not two, or the file is not in UTF-8.
  """
  try:
    with open(path, newline='', encoding='utf-8-sig') as file:
      rows = list(csv.reader(file))[1:]
  except UnicodeDecodeError as error:
    where = encodings.first_foreign(pathlib.Path(path))
    raise ValueError(
      f'titles={path!r} is not in UTF-8{where}; convert it, as by '
      f"'iconv -f windows-1252 -t utf-8 {path}'"
    ) from error
  for number, row in enumerate(rows, 2):
    if len(row) != 2:
      raise ValueError(
        f'titles={path!r}: line {number} has {len(row)} columns; give two, the '
        'item and its title'
      )
  return {item: title for item, title in rows}


def _raw(feature: Feature, values: np.ndarray) -> np.ndarray:
  """The log's values: those that are read as these."""
  if isinstance(feature, Dense):
    raw = values.astype(float) * feature.scale + feature.offset
    return np.expm1(raw) if feature.log else raw
  return values


def _mode(values: np.ndarray) -> Any:
  if not len(values):
    return 0
  found, count = np.unique(values, return_counts=True)
  return found[count.argmax()].item()


def _spread(number: int, wanted: int) -> list[int]:
  return np.unique(np.linspace(0, number - 1, wanted).astype(int)).tolist()


def _nobody(schema: Schema, log: EventLog, columns) -> User:
  """Somebody new, who is as most are."""
  context = {f.column: _mode(columns[f.column]) for f in schema.context}
  known = {str(key) for key in log.keys.tolist()}
  free = '0' if '0' not in known else f'{max(map(len, known)) * "9"}9'
  key: int | str = int(free) if log.keys.dtype.kind in 'iu' else free
  if schema.user in context:  # As 0, which is no user, or one that is.
    key = 0 if '0' not in known else context[schema.user]
    context[schema.user] = key
  return User(key, context, {})


def _user(
  schema: Schema, log: EventLog, columns, item_columns, user: int
) -> User:
  part = slice(*log.offsets[user : user + 2].tolist())
  actions = [f.column for f in schema.action]
  events = {c: columns[c][part].tolist() for c in [*item_columns, *actions]}
  events[schema.time] = [_moment(log, x) for x in log.time[part]]
  if schema.request and log.request is not None:
    events[schema.request] = log.request[part].tolist()
  return User(
    log.key(part.start),
    {f.column: columns[f.column][part][-1].item() for f in schema.context},
    events,
  )


def _moment(log: EventLog, time) -> Any:
  if log.is_timestamp:
    return str(np.datetime64(int(time), 'ns'))
  return time.item()
