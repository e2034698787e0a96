"""Columns of a log, checked and encoded: Arrow in, NumPy out.

Every complaint names the column, the value, where it is and what to do.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from histjax.data import hashing
from histjax.schema import Categorical, Dense, Task


@dataclasses.dataclass(frozen=True)
class Columns:
  """Columns of equal length and where each row came from.

  Attributes:
    table: the data.
    sources: what each part is called in messages.
    starts: the first row of each part, increasing.
  """

  table: pa.Table
  sources: tuple[str, ...]
  starts: tuple[int, ...] = (0,)

  def __len__(self) -> int:
    return self.table.num_rows

  def where(self, row: int) -> str:
    """`row` for people: the file and the row in it, counting data from 0."""
    part = bisect.bisect_right(self.starts, row) - 1
    return f'{self.sources[part]} row {row - self.starts[part]}'

  def array(self, name: str) -> pa.Array:
    """The column `name`, without nulls, as one array of a plain type.

    Raises:
      ValueError: there is no such column, or a value is missing.
    """
    check_names(self.table.column_names, [name], self.sources[0])
    column = self.table[name]
    if pa.types.is_dictionary(column.type):
      column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
      column = column.cast(pa.large_string())
    if pa.types.is_decimal(column.type):
      column = column.cast(pa.float64())
    array = column.combine_chunks()
    if array.null_count:
      row = int(np.flatnonzero(pc.is_null(array).to_numpy(False))[0])
      raise ValueError(
        f'column {name!r}: {self.where(row)} has no value (null); fill it '
        'in, or drop the row, before loading'
      )
    return array

  def fail(self, name: str, row: int, value: Any, problem: str):
    """Raises the ValueError for a bad value."""
    raise ValueError(
      f'column {name!r}: {self.where(row)} holds {value!r}: {problem}'
    )


def check_names(known: Sequence[str], wanted: Sequence[str], source: str):
  """Raises a ValueError if a column of `wanted` is not `known`."""
  for name in wanted:
    count = list(known).count(name)
    if count > 1:
      raise ValueError(
        f'column {name!r} occurs {count} times in {source}; rename one'
      )
    if count == 0:
      close = difflib.get_close_matches(name, known, 1)
      hint = f'; did you mean {close[0]!r}?' if close else ''
      raise ValueError(
        f'column {name!r} is not in {source}, which has '
        f'{sorted(map(str, known))}{hint}'
      )


def from_mapping(
  columns: Mapping[str, Any], wanted: Sequence[str], source: str
) -> Columns:
  """Columns held in memory: `{name: array, list or Arrow array}`.

  Raises:
    ValueError: a wanted column is missing, of no usable type or of a length
      of its own.
  """
  check_names(list(columns), wanted, source)
  arrays = {}
  for name in wanted:
    try:
      arrays[name] = pa.array(columns[name])
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
      raise ValueError(
        f'column {name!r} of {source} is not a column of numbers or strings '
        f'({error}); give one type throughout'
      ) from error
  lengths = {name: len(a) for name, a in arrays.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(
      f'columns of {source} differ in length: {lengths}; make them equal'
    )
  return Columns(pa.table(arrays), (source,))


def encode_categorical(columns: Columns, feature: Categorical) -> np.ndarray:
  """int32 ids `[n]` in `[0, feature.size)`.

  Raises:
    ValueError: an id is outside the table, or of a type that is no id.
  """
  array = columns.array(feature.column)
  if pa.types.is_large_string(array.type):
    if feature.ids == 'index':
      columns.fail(
        feature.column,
        0,
        array[0].as_py(),
        f"a string is no index of feature {feature.name!r}; set ids='hash'",
      )
    encoded = array.dictionary_encode()
    rows = hashing.hash_strings(encoded.dictionary.to_pylist(), feature.size)
    return rows[encoded.indices.to_numpy()]
  values = integers(columns, feature.column)
  if feature.ids == 'hash':
    return hashing.hash_integers(values, feature.size)
  bad = (values < 0) | (values >= feature.size)
  if bad.any():
    row = int(np.flatnonzero(bad)[0])
    columns.fail(
      feature.column,
      row,
      values[row].item(),
      f'outside the table of feature {feature.name!r}, [0, {feature.size}); '
      "raise its size, or set ids='hash'",
    )
  return values.astype(np.int32)


def encode_dense(columns: Columns, feature: Dense) -> np.ndarray:
  """float32 `[n]`, `(value - offset) / scale` after the optional logarithm.

  Raises:
    ValueError: a value is no number, not finite, or negative under `log`.
  """
  values = numbers(columns, feature.column)
  raw = values
  if feature.log:
    _check(
      columns, feature.column, raw, raw < 0, 'log needs >= 0; set log=False'
    )
    values = np.log1p(values)
  with np.errstate(over='ignore'):
    scaled = ((values - feature.offset) / feature.scale).astype(np.float32)
  bad = ~np.isfinite(scaled)
  _check(
    columns,
    feature.column,
    raw,
    bad,
    f'too large for float32 as feature {feature.name!r}; raise its scale',
  )
  return scaled


def encode_label(columns: Columns, task: Task) -> np.ndarray:
  """float32 `[n]` in {0, 1}.

  Raises:
    ValueError: without a threshold, a value is neither 0 nor 1.
  """
  values = numbers(columns, task.column)
  if task.threshold is not None:
    return (values >= task.threshold).astype(np.float32)
  _check(
    columns,
    task.column,
    values,
    (values != 0) & (values != 1),
    f'a label of task {task.name!r} is 0 or 1; fix it, or set the threshold '
    'from which on it counts as 1',
  )
  return values.astype(np.float32)


def encode_time(columns: Columns, name: str) -> tuple[np.ndarray, bool]:
  """Times `[n]` and whether they are timestamps.

  Returns:
    int64 or float64 in the column's unit; int64 nanoseconds since 1970 (UTC)
    for timestamps and dates.

  Raises:
    ValueError: a time is negative, not finite, or neither number nor
      timestamp.
  """
  array = columns.array(name)
  if pa.types.is_large_string(array.type):
    array = _parse_times(columns, name, array)
  is_timestamp = pa.types.is_timestamp(array.type) or pa.types.is_date(
    array.type
  )
  if is_timestamp:
    try:
      array = array.cast(pa.timestamp('ns')).cast(pa.int64())
    except pa.ArrowInvalid as error:
      raise ValueError(
        f'column {name!r} of {columns.sources[0]}: {error}; timestamps must '
        'lie between 1970 and 2262'
      ) from error
    values = array.to_numpy()
  elif pa.types.is_integer(array.type):
    values = integers(columns, name)
  else:
    values = numbers(columns, name)
  _check(
    columns,
    name,
    values,
    values < 0,
    'a time must be >= 0 (a timestamp: 1970 or later); fix it or shift all',
  )
  return values, is_timestamp


def _parse_times(columns: Columns, name: str, array: pa.Array) -> pa.Array:
  """ISO 8601 strings as timestamps; all with a time zone, or none."""
  for zone in (None, 'UTC'):
    try:
      return array.cast(pa.timestamp('ns', zone))
    except pa.ArrowInvalid:
      continue
  columns.fail(
    name,
    0,
    array[0].as_py(),
    'a time must be a number or an ISO 8601 timestamp; this column is of '
    'strings that are not all of one such form',
  )


def encode_keys(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Dense codes int64 `[n]` of a column and the sorted distinct keys."""
  array = columns.array(name)
  if not pa.types.is_large_string(array.type):
    is_uint64 = pa.types.is_uint64(array.type)
    values = array.to_numpy() if is_uint64 else integers(columns, name)
    keys, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int64), keys
  encoded = array.dictionary_encode()
  keys = np.array(encoded.dictionary.to_pylist())
  order = np.argsort(keys, kind='stable')
  rank = np.empty(len(keys), np.int64)
  rank[order] = np.arange(len(keys))
  return rank[encoded.indices.to_numpy()], keys[order]


def numbers(columns: Columns, name: str) -> np.ndarray:
  """The column `name` as finite float64 `[n]`.

  Raises:
    ValueError: a value is no number, or not finite.
  """
  array = columns.array(name)
  if not _is_number(array.type):
    columns.fail(
      name,
      0,
      array[0].as_py(),
      f'a number is needed, but the column is of type {array.type}',
    )
  values = array.cast(pa.float64(), safe=False).to_numpy()
  _check(columns, name, values, ~np.isfinite(values), 'it must be finite')
  return values


def integers(columns: Columns, name: str) -> np.ndarray:
  """The column `name` as int64 `[n]`; whole floats count as integers.

  Raises:
    ValueError: a value is not a whole number.
  """
  array = columns.array(name)
  if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
    if pa.types.is_uint64(array.type):
      return array.to_numpy().astype(np.int64)  # Wraps, as the hash does.
    return array.cast(pa.int64()).to_numpy()
  values = numbers(columns, name)
  bad = (values != np.floor(values)) | (np.abs(values) >= 2**53)
  _check(columns, name, values, bad, 'a whole number is needed')
  return values.astype(np.int64)


def _is_number(kind: pa.DataType) -> bool:
  return (
    pa.types.is_integer(kind)
    or pa.types.is_floating(kind)
    or pa.types.is_boolean(kind)
  )


def _check(columns: Columns, name, values, bad, problem: str) -> None:
  if bad.any():
    row = int(np.flatnonzero(bad)[0])
    columns.fail(name, row, values[row].item(), problem)
