"""Candidates of many users, from files: joined to a log, scored, ranked."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from histjax import Scorer
from histjax.data import columns as columns_lib
from histjax.data import files, requests, rows
from histjax.features import FittedFeatures
from histjax.schema import Categorical, Feature, Schema


class UserTable:
  """The columns of some files, checked, by user.

  Attributes:
    table: the columns as they were read.
    codes: int64 `[n]`, the user of each row as an index into `keys`.
    keys: `[users]`, the users as the files have them.
    encoded: `{feature: [n]}`, as the model reads them.
    is_timestamp: whether the times read, if any, are timestamps.
  """

  def __init__(
    self,
    paths: Sequence[str],
    schema: Schema,
    features: Sequence[Feature],
    others: Sequence[str] = (),
  ):
    """Reads the user, the `features` and the columns `others`.

    Raises:
      ValueError: a file or a value in it is bad; the message says which.
    """
    names = [schema.user, *(f.column for f in features), *others]
    names = list(dict.fromkeys(names))
    self.table = files.read(paths, names, schema)
    self.codes, self.keys = columns_lib.encode_keys(self.table, schema.user)
    self.encoded = {
      f.name: columns_lib.encode_categorical(self.table, f)
      if isinstance(f, Categorical)
      else columns_lib.encode_dense(self.table, f)
      for f in features
    }
    for task in schema.tasks:
      if task.column in others:
        columns_lib.encode_label(self.table, task)
    self._values = {name: columns_lib.raw(self.table, name) for name in names}
    self.is_timestamp, order = False, np.argsort(self.codes, kind='stable')
    if schema.time in others:
      when, self.is_timestamp = columns_lib.encode_time(self.table, schema.time)
      order = np.lexsort((when, self.codes))
      if self.is_timestamp:
        when = when.astype('datetime64[ns]')
      self._values[schema.time] = when
    starts = np.searchsorted(self.codes[order], np.arange(len(self.keys) + 1))
    known = columns_lib.canonical_keys(self.keys)
    self._rows = {
      key: order[starts[i] : starts[i + 1]] for i, key in enumerate(known)
    }

  def __contains__(self, key: str) -> bool:
    return key in self._rows

  def of(self, key: str) -> np.ndarray:
    """The rows of a user, by time if that was read; `key` is canonical."""
    return self._rows.get(key, np.zeros(0, np.int64))

  def take(self, some: np.ndarray) -> dict[str, np.ndarray]:
    """`{column: values}` of these rows."""
    return {name: values[some] for name, values in self._values.items()}


@dataclasses.dataclass(frozen=True)
class Join:
  """How candidates are joined to a log.

  Attributes:
    schema: of the model.
    config: how a row's history is cut.
    features: what is derived of both.
    as_of: candidates may be earlier than events, and see what was before.
  """

  schema: Schema
  config: rows.RowConfig
  features: FittedFeatures
  as_of: bool = False


def read(
  join: Join, events: Sequence[str], candidates: Sequence[str]
) -> tuple[UserTable, UserTable]:
  """The log and the candidates, of one clock.

  Raises:
    ValueError: a file or a value in it is bad; the message says which.
  """
  schema, features = join.schema, join.features
  items = [*schema.item, *schema.hidden]
  strict = join.config.ties == 'strict'
  timed = features.needs('time') or strict or join.as_of
  others = [schema.time]
  if schema.request:
    others.append(schema.request)
  of_candidates = [schema.time] if timed else []
  if join.as_of:
    of_candidates = others.copy()
  if features.needs('labels'):
    others += [t.column for t in schema.tasks]
  log = UserTable(events, schema, [*items, *schema.action], others)
  shown = UserTable(
    candidates, schema, [*items, *schema.context], of_candidates
  )
  if timed:
    columns_lib.check_clocks(
      schema.time,
      {'the log': log.is_timestamp, 'the candidates': shown.is_timestamp},
    )
  return log, shown


def check_known(log: UserTable, shown: UserTable) -> int:
  """The number of the candidates' users that have events.

  Raises:
    ValueError: it is none.
  """
  users = columns_lib.canonical_keys(shown.keys)
  known = sum(user in log for user in users)
  if not known:
    raise ValueError(
      f'none of the {len(users)} users of the candidates, such as '
      f'{users[0]!r}, is in the log, whose users are such as '
      f'{columns_lib.canonical_keys(log.keys[:1])[0]!r}; correct the users, or '
      'set --allow_new_users to rank without any history'
    )
  return known


def groups(schema: Schema, shown: UserTable) -> list[np.ndarray]:
  """Candidates by user and context, which a row of the model has one of."""
  labels = [shown.codes, *(shown.encoded[f.name] for f in schema.context)]
  order = np.lexsort(labels[::-1])  # Stable; by user first.
  new = np.zeros(len(order), bool)
  for label in labels:
    new[1:] |= np.diff(label[order]) != 0
  return np.split(order, np.flatnonzero(new))


def score(
  scorer: Scorer,
  join: Join,
  log: UserTable,
  shown: UserTable,
  *,
  rows_per_batch: int,
) -> dict[str, np.ndarray]:
  """`{task: probabilities [n]}` of the candidates.

  Raises:
    ValueError: a user's candidates do not follow from its events, or a score
      is not finite.
  """
  schema = join.schema
  users = columns_lib.canonical_keys(shown.keys)
  scores = {
    t.name: np.full(len(shown.codes), np.nan, np.float32) for t in schema.tasks
  }
  parts = groups(schema, shown)
  for some in progress(parts, rows_per_batch):
    made = [
      _row(join, log, shown, users[shown.codes[part[0]]], part) for part in some
    ]
    batch = rows.collate(made)
    cache = scorer.encode(batch.history)
    found = scorer.score(cache, batch.candidates, batch.context)
    for name, values in found.items():
      logits = np.asarray(values, np.float32)
      for b, part in enumerate(some):
        own = logits[b, : len(part)]
        bad = np.flatnonzero(~np.isfinite(own))
        if bad.size:
          row = int(part[bad[0]])
          raise ValueError(
            f'user {users[shown.codes[row]]!r}: the score {name!r} of '
            f'{shown.table.where(row)} is {own[bad[0]]}; nothing is written. '
            "Look for values far from training's in that row and in the "
            "user's events, or for parameters that are not finite"
          )
        scores[name][part] = np.exp(-np.logaddexp(0, -own))
  return scores


def _row(join: Join, log, shown, user: str, part: np.ndarray) -> rows.Row:
  schema = join.schema
  candidates = shown.take(part)
  try:
    return requests.make_row(
      schema,
      context={
        name: candidates[name][0]
        for name in (schema.user, *(f.column for f in schema.context))
      },
      history=log.take(log.of(user)),
      candidates=candidates,
      config=join.config,
      features=join.features,
      as_of=join.as_of,
    )
  except ValueError as error:
    raise ValueError(f'user {user!r}: {error}') from error


def progress(parts: Sequence, size: int) -> Iterator[Sequence]:
  """Slices of `size`, telling on the way how many are done, and how fast."""
  begin = told = time.monotonic()
  for start in range(0, len(parts), size):
    yield parts[start : start + size]
    done, now = min(start + size, len(parts)), time.monotonic()
    if done == len(parts) or now - told > 5:
      rate = done / max(now - begin, 1e-9)
      print(f'{done}/{len(parts)} requests, {rate:.1f} a second', flush=True)
      told = now


def ranked(
  schema: Schema,
  shown: UserTable,
  scores: Mapping[str, np.ndarray],
  task: str,
  top_k: int,
) -> dict[str, np.ndarray]:
  """The best `top_k` of each user, best first, as columns to write."""
  best = np.lexsort((-scores[task], shown.codes))  # Ties: as in the file.
  user = shown.codes[best]
  rank = np.arange(len(best)) - np.searchsorted(user, user)
  best, rank = best[rank < top_k], rank[rank < top_k]
  return {
    schema.user: shown.keys[shown.codes[best]],
    'rank': rank + 1,
    'row': best,
    **{f'score_{name}': values[best] for name, values in scores.items()},
  }


def check_output(schema: Schema) -> None:
  """Raises a ValueError if the output would have a column twice."""
  taken = ['rank', 'row', *(f'score_{t.name}' for t in schema.tasks)]
  if schema.user in taken:
    raise ValueError(
      f'the column of users is named {schema.user!r}, as one of the output, '
      f'{taken}; train with another name of it'
    )


def check_path(output: pathlib.Path, inputs: list[str]) -> None:
  """Raises a ValueError if the output cannot be written, or is an input."""
  if output.suffix not in ('.csv', '.parquet'):
    raise ValueError(f'--output={output} must end in .csv or .parquet')
  if output.is_dir():
    raise ValueError(f'--output={output} is a folder; name a file in it')
  if not output.parent.is_dir():
    raise ValueError(
      f'--output={output}: {output.parent} is no folder; make it'
    )
  if not os.access(output.parent, os.W_OK):
    raise ValueError(
      f'--output={output}: {output.parent} cannot be written to; name another'
    )
  for name in inputs:
    path = pathlib.Path(name).resolve()
    if path in (output.resolve(), *output.resolve().parents) and path.exists():
      raise ValueError(
        f'--output={output} would be among the inputs, {name}; name another'
      )


def write(path: pathlib.Path, columns: dict) -> None:
  """Writes the columns whole or not at all."""
  table = pa.table({name: pa.array(x) for name, x in columns.items()})
  temporary = f'{path}.{os.getpid()}.tmp'
  try:
    write_table = (
      csv.write_csv if path.suffix == '.csv' else (parquet.write_table)
    )
    write_table(table, temporary)
    os.replace(temporary, path)
  finally:
    pathlib.Path(temporary).unlink(missing_ok=True)
