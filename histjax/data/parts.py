"""Columns in parts, one a file, and what the values of a part are read as.

Each `as_*` takes one part of a column, as `Columns.arrays` gives it: the
column's name, the part's first row, for messages, and its values.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from histjax import config as config_lib
from histjax.data import parsing
from histjax.schema import Schema

_NO_TIME = (
  'a time must be a number or an ISO 8601 timestamp (between 1970 and 2262), '
  'one of the two in all of the column'
)
_MISSING = ('', 'na', 'n/a', 'nan', 'none', 'null', 'nil', '-', '?')
_NO_KEY = {
  'boolean': "'true' in a CSV file is a text, and a boolean is none",
  'float': "'7.0' in a CSV file is another key than 7",
  'time': 'ids that look like dates or times were taken for such, and these '
  "do not tell how they were written: '2024-01-02', '12:30' or otherwise",
  'other': 'a key is an integer or a text',
}


@dataclasses.dataclass(frozen=True)
class Columns:
  """Columns in parts, one a file, and where each row came from.

  Attributes:
    parts: tables of the same columns, whose types may differ.
    sources: what each part is called in messages.
    schema: its `null_values` and `column_types` are applied.
    first: the row of its source that each part begins with; empty: 0.
  """

  parts: tuple[pa.Table, ...]
  sources: tuple[str, ...]
  schema: Schema
  first: tuple[int, ...] = ()

  def __len__(self) -> int:
    return self.starts[-1]

  @functools.cached_property
  def starts(self) -> tuple[int, ...]:
    """The first row of each part, and the number of rows."""
    counts = [part.num_rows for part in self.parts]
    return tuple(itertools.accumulate(counts, initial=0))

  def where(self, row: int) -> str:
    """`row` for people: the file and the row in it, counting data from 0."""
    part = bisect.bisect_right(self.starts[:-1], row) - 1
    row += (self.first[part] if self.first else 0) - self.starts[part]
    return f'{self.sources[part]} row {row}'

  def arrays(
    self, name: str, *, unread: bool = False, texts: bool = False
  ) -> list[tuple[int, pa.Array]]:
    """The column `name`, part by part, each with its first row.

    Args:
      name: the column.
      unread: it is kept as it came, so that any text is one.
      texts: whether a text may be a value, for the message of a missing one.

    Returns:
      Arrays without nulls. Texts are large_string, and declared types are
      applied.

    Raises:
      ValueError: there is no such column, a value is missing, or not of the
        type declared.
    """
    check_names(self.parts[0].column_names, [name], self.sources[0])
    found = []
    for start, part in zip(self.starts, self.parts, strict=False):
      if part.num_rows:
        array = _plain(self, name, start, part[name])
        words = () if unread else self.schema.null_values
        texts = texts and self.schema.types.get(name) in (None, 'text')
        self._check_missing(name, start, array, words, texts)
        found.append((start, self._declared(name, start, array)))
    return found

  def _check_missing(
    self,
    name: str,
    start: int,
    array: pa.Array,
    words: tuple[str, ...],
    texts: bool,
  ) -> None:
    missing = pc.is_null(array)
    if pa.types.is_large_string(array.type) and words:
      of_words = pc.is_in(array, pa.array(words, array.type))
      missing = pc.or_(missing, of_words)
    rows = np.flatnonzero(missing.to_numpy(zero_copy_only=False))
    if rows.size:
      value = array[int(rows[0])].as_py()
      said = 'null' if value is None else f'{value!r}'
      also = (
        ''
        if value is None or not texts
        else ', or take this text out of Schema.null_values if it is a value'
      )
      raise ValueError(
        f'column {name!r}: {self.where(start + int(rows[0]))} has no value '
        f'({said}); fill it in, or drop the row, before loading{also}'
      )

  def _declared(self, name: str, start: int, array: pa.Array) -> pa.Array:
    kind = self.schema.types.get(name)
    if kind is None or not len(array):
      return array
    is_text = pa.types.is_large_string(array.type)
    if kind == 'text':
      if is_text:
        return array
      _check_integers(self, name, start, array, 'it is declared a text')
      return array.cast(pa.large_string())
    if kind == 'timestamp':
      if is_text:
        return _parsed_times(self, name, start, array)
      if not _is_timestamp(array.type):
        self.fail(name, start, array[0].as_py(), 'it is declared a timestamp')
      return array
    if is_text:
      array = _parsed_numbers(self, name, start, array, f'no {kind}')
    if kind == 'number' and not _is_number(array.type):
      self.fail(name, start, array[0].as_py(), 'it is declared a number')
    if kind == 'integer' and not pa.types.is_integer(array.type):
      return pa.array(as_integers(self, name, start, array))
    return array

  def fail(self, name: str, row: int, value: Any, problem: str) -> NoReturn:
    """Raises the ValueError for a bad value."""
    said = repr(value)
    said = said if len(said) <= 80 else f'{said[:77]}...'
    again = ' (the header once more?)' if value == name else ''
    if isinstance(value, str) and value.lower() in _MISSING:
      again = ' (a missing value? fill it in, or drop the row)'
    if isinstance(value, str) and value.lower() in ('true', 'false'):
      again = ' (true and false are numbers where the column has no others)'
    raise ValueError(
      f'column {name!r}: {self.where(row)} holds {said}{again}: {problem}'
    )


class MissingColumnError(ValueError):
  """A table has no such `column`."""

  def __init__(self, message: str, column: str = ''):
    super().__init__(message)  # All that pickle gives back as arguments.
    self.column = column


def check_names(known: Sequence[str], wanted: Sequence[str], source: str):
  """Raises a ValueError if one of `wanted` is not `known`, or known twice.

  That it is not known is a MissingColumnError.
  """
  for name in wanted:
    count = list(known).count(name)
    if count > 1:
      raise ValueError(
        f'column {name!r} occurs {count} times in {source}; rename one'
      )
    if count == 0:
      texts = [str(k) for k in known]
      close = config_lib.nearest(name, texts)
      hint = f'; did you mean {close!r}?' if close else ''
      raise MissingColumnError(
        f'column {name!r} is not in {source}, which has {sorted(texts)}{hint}',
        name,
      )


def _plain(
  columns: Columns, name: str, start: int, column: pa.ChunkedArray
) -> pa.Array:
  """One array of an integer, float, boolean, text or time type."""
  kind = column.type
  if pa.types.is_dictionary(kind):
    column = column.cast(kind.value_type)
    kind = column.type
  texts = (
    pa.types.is_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
  )
  if any(is_kind(kind) for is_kind in texts):
    try:
      column = column.cast(pa.large_string())
    except pa.ArrowInvalid:
      values = column.to_pylist()
      row = next(i for i, v in enumerate(values) if not _is_utf8(v))
      columns.fail(
        name,
        start + row,
        values[row],
        'bytes that are not UTF-8; decode them, and write texts',
      )
  elif pa.types.is_decimal(kind) and kind.scale > 0:
    # Arrow's own cast is off by a unit in the last place: 15.000000 is not 15.
    column = column.cast(pa.large_string()).cast(pa.float64())
  elif pa.types.is_decimal(kind):
    for whole in (pa.int64(), pa.uint64(), pa.large_string()):
      try:
        column = column.cast(whole)
        break
      except pa.ArrowInvalid:
        continue
  array = column.combine_chunks()
  if isinstance(array, pa.ChunkedArray):
    array = pa.concat_arrays(array.chunks)
  return array


def _is_utf8(value: bytes | None) -> bool:
  try:
    (value or b'').decode()
  except UnicodeDecodeError:
    return False
  return True


def _parsed_numbers(columns, name, start, text, problem: str) -> pa.Array:
  array, bad = parsing.text_to_numbers(text)
  if array is None:
    columns.fail(name, start + bad, text[bad].as_py(), problem)
  return array


def _parsed_times(columns, name, start, text) -> pa.Array:
  array, bad = parsing.text_to_times(text)
  if array is None:
    columns.fail(
      name,
      start + bad,
      text[bad].as_py(),
      _NO_TIME,
    )
  return array


def as_keys(columns, name, start, array) -> pa.Array:
  """Texts, or int64 or uint64."""
  if pa.types.is_large_string(array.type):
    return array
  _check_integers(columns, name, start, array, '')
  if pa.types.is_uint64(array.type):
    return array
  return array.cast(pa.int64())


def _check_integers(columns, name, start, array, problem: str) -> None:
  if pa.types.is_integer(array.type):
    return
  kind = 'boolean' if pa.types.is_boolean(array.type) else 'other'
  kind = 'float' if pa.types.is_floating(array.type) else kind
  kind = 'time' if pa.types.is_temporal(array.type) else kind
  fix = {
    'time': 'write the column as the texts that the ids are',
    'other': 'write integers or texts',
  }.get(
    kind, "write integers or texts, or declare it 'integer' in column_types"
  )
  columns.fail(
    name,
    start,
    array[0].as_py(),
    f'of type {array.type}, which is no key ({problem or _NO_KEY[kind]}); '
    f'{fix}',
  )


def as_floats(
  columns, name, start, array, problem: str = 'a number is needed; fix it'
) -> np.ndarray:
  """float64, not yet checked to be finite."""
  if pa.types.is_large_string(array.type):
    array = _parsed_numbers(columns, name, start, array, problem)
  if not _is_number(array.type):
    columns.fail(
      name,
      start,
      array[0].as_py(),
      f'a number is needed, but the column is of type {array.type}',
    )
  return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def as_integers(
  columns, name, start, array, problem: str = 'a whole number is needed'
) -> np.ndarray:
  """int64; whole floats and booleans count, and texts of them."""
  if pa.types.is_large_string(array.type):
    array = _parsed_numbers(columns, name, start, array, problem)
  if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
    try:
      return array.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
      values = array.to_numpy()
      row = int(np.flatnonzero(values >= 2**63)[0])
      columns.fail(
        name, start + row, values[row].item(), 'it must be below 2**63'
      )
  values = as_floats(columns, name, start, array)
  check(columns, name, values, ~np.isfinite(values), 'it must be finite', start)
  whole = _exact(array.type)
  rounded = (np.abs(values) >= whole) & (np.abs(values) < 2**53)
  said = f'{array.type} rounds numbers from {whole:,.0f} on; write integers'
  check(columns, name, values, rounded, said, start)
  bad = (values != np.floor(values)) | (np.abs(values) >= 2**53)
  check(columns, name, values, bad, problem, start)
  return values.astype(np.int64)


def as_times(columns, name, start, array) -> tuple[np.ndarray, bool]:
  """The times of one part, and whether they are timestamps."""
  if pa.types.is_large_string(array.type):
    numbers, bad = parsing.text_to_numbers(array)
    if numbers is None and bad:  # It begins as numbers: so it should go on.
      columns.fail(name, start + bad, array[bad].as_py(), _NO_TIME)
    array = (
      _parsed_times(columns, name, start, array) if numbers is None else numbers
    )
  if not _is_timestamp(array.type):
    if pa.types.is_boolean(array.type):
      columns.fail(name, start, array[0].as_py(), _NO_TIME)
    if pa.types.is_integer(array.type):
      return as_integers(columns, name, start, array), False
    values = as_floats(columns, name, start, array)
    bad = ~np.isfinite(values)
    check(columns, name, values, bad, 'it must be finite', start)
    if array.type.bit_width < 64:
      whole = _exact(array.type)
      problem = (
        f'{array.type} rounds numbers above {whole:,.0f}; write integers, '
        'float64 or timestamps'
      )
      check(columns, name, values, values > whole, problem, start)
    return values, False
  try:  # Of a zone, too, this is the time in UTC.
    array = array.cast(pa.timestamp('ns')).cast(pa.int64())
  except pa.ArrowInvalid as error:
    raise ValueError(
      f'column {name!r} of {columns.where(start)} and on: {error}; timestamps '
      'must lie between 1970 and 2262'
    ) from error
  return array.to_numpy(), True


def _exact(kind: pa.DataType) -> float:
  """Whole numbers below are told apart; of a text it is as of float64."""
  is_float = pa.types.is_floating(kind)
  return 2 / np.finfo(kind.to_pandas_dtype() if is_float else np.float64).eps


def _is_timestamp(kind: pa.DataType) -> bool:
  return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def _is_number(kind: pa.DataType) -> bool:
  return (
    pa.types.is_integer(kind)
    or pa.types.is_floating(kind)
    or pa.types.is_boolean(kind)
  )


def check(columns, name, values, bad, problem: str, start: int = 0) -> None:
  """Raises the ValueError for the first of the `values` that are `bad`."""
  if bad.any():
    row = int(np.flatnonzero(bad)[0])
    columns.fail(name, start + row, values[row].item(), problem)
