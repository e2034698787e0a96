"""Values as people hold and write them, as Arrow arrays of plain types.

Neither function knows what a column is for; `columns` does.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MOMENTS = (datetime.date, np.datetime64)
_EPOCH = datetime.datetime(1970, 1, 1)
_COARSE = ('Y', 'M', 'W', 'D', 'h', 'm')  # Units that Arrow does not know.
_NANOSECONDS = {'s': 10**9, 'ms': 10**6, 'us': 10**3, 'ns': 1}
_INTEGER = r'^-?[0-9]+$'
_NUMBER = r'(?i)^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?$'
_ZONE = r'[T ][0-9:.]+(Z|[+-][0-9]{2}(:?[0-9]{2})?)$'


def to_array(values: Any) -> pa.Array:
  """A column held in memory as an Arrow array.

  Args:
    values: an array of Arrow, NumPy or anything that turns into NumPy's, or
      any iterable of numbers, texts or moments (datetime, date,
      numpy.datetime64, pandas.Timestamp), of one of these throughout. Moments
      with a time zone are converted to UTC, those without are UTC.

  Raises:
    ValueError: it is no column, or not of one such type.
  """
  if isinstance(values, pa.ChunkedArray):
    return values.combine_chunks()
  if isinstance(values, pa.Array):
    return values
  if isinstance(values, (str, bytes, Mapping, Set)) or values is None:
    raise ValueError(
      f'it is {_short(values)}, one {type(values).__name__}; give a list or an '
      'array'
    )
  if not isinstance(values, (np.ndarray, Sequence)):
    values = _materialised(values)
  if isinstance(values, np.ndarray):
    if values.ndim != 1:
      raise ValueError(f'it has {values.ndim} dimensions; give one')
    if not values.dtype.isnative:  # Which Arrow does not read.
      values = values.astype(values.dtype.newbyteorder('='))
    if values.dtype.kind == 'M':
      unit, count = np.datetime_data(values.dtype)
      if unit in _COARSE:
        values = values.astype('datetime64[s]')
      elif count != 1:  # Arrow reads '25s' as 's'.
        values = values.astype(f'datetime64[{unit}]')
    if values.dtype.kind != 'O':
      return _arrow(values)
  return _of_items(list(values))


def text_to_numbers(text: pa.Array) -> tuple[pa.Array | None, int]:
  """Texts as int64, uint64 or float64.

  Args:
    text: large_string `[n]`. `007` is 7, `1e3` is 1000; all of them may be
      'true' and 'false' (in any case) instead, which are 1 and 0.

  Returns:
    The numbers and -1; or None and the first row that is neither number nor
    true or false; if there are both, the first of the latter.
  """
  if _all(pc.match_substring_regex(text, _INTEGER)):
    for kind in (pa.int64(), pa.uint64()):
      try:
        return text.cast(kind), -1
      except pa.ArrowInvalid:
        continue
  try:
    return text.cast(pa.float64()), -1
  except pa.ArrowInvalid:
    lower = pc.utf8_lower(text)
    word = pc.is_in(lower, pa.array(['true', 'false'], text.type))
    if _all(word):
      return pc.equal(lower, pa.scalar('true', text.type)).cast('int64'), -1
    number = pc.match_substring_regex(text, _NUMBER)
    either = pc.or_(word, number)
    return None, _first(pc.invert(number if _all(either) else either))


def text_to_times(text: pa.Array) -> tuple[pa.Array | None, int]:
  """ISO 8601 texts as timestamps in ns; those without a zone are UTC.

  Args:
    text: large_string `[n]`.

  Returns:
    The timestamps, in UTC, and -1; or None and the first row that is none.
  """
  zoned = pc.match_substring_regex(text, _ZONE).to_numpy(zero_copy_only=False)
  out = np.zeros(len(text), np.int64)
  for mask, zone in ((zoned, 'UTC'), (~zoned, None)):
    rows = np.flatnonzero(mask)
    if not rows.size:
      continue
    part, kind = text.take(pa.array(rows)), pa.timestamp('ns', zone)
    try:
      out[rows] = part.cast(kind).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
      bad = next((i for i, t in enumerate(part) if not _casts(t, kind)), 0)
      return None, int(rows[bad])
  return pa.array(out).cast(pa.timestamp('ns')), -1


def _materialised(values: Any):
  if hasattr(values, '__arrow_c_array__') or hasattr(values, 'dtype'):
    return np.asarray(values)
  try:
    return list(values)
  except TypeError as error:
    raise ValueError(
      f'it is {_short(values)}, one {type(values).__name__}; give a list or an '
      'array'
    ) from error


def _of_items(items: list[Any]) -> pa.Array:
  """Python's own objects, which Arrow would mix, truncate or overflow."""
  kinds = set(map(type, items)) - {type(None)}
  if any(issubclass(kind, _MOMENTS) for kind in kinds):
    _check_alike(items, kinds, _MOMENTS)
    return _moments(items)
  if any(issubclass(kind, str) for kind in kinds):
    if any(issubclass(kind, float) for kind in kinds):
      # NaN stands for a missing text in what pandas makes.
      items = [None if v != v else v for v in items]
      kinds = set(map(type, items)) - {type(None)}
    _check_alike(items, kinds, str)
  if kinds and all(issubclass(kind, (int, np.integer)) for kind in kinds):
    try:
      return _arrow(items)
    except OverflowError:
      return _big_integers(items)
  return _arrow(items)


def _big_integers(items: list[Any]) -> pa.Array:
  whole = [v for v in items if v is not None]
  low, high = min(whole), max(whole)
  if low < -(2**63) or high >= 2**64:
    row = items.index(low if low < -(2**63) else high)
    raise ValueError(
      f'row {row} holds {_short(items[row])}, which does not fit into 64 bits; '
      'give it as text'
    )
  if low >= 0:
    return pa.array(items, pa.uint64())
  return pa.array([None if v is None else str(v) for v in items])


def _check_alike(items: list[Any], kinds: set[type], kind) -> None:
  """Raises a ValueError if there are others than of `kind` and None."""
  if all(issubclass(k, kind) for k in kinds):
    return
  row = next(
    i for i, v in enumerate(items) if not isinstance(v, (kind, type(None)))
  )
  other = next(i for i, v in enumerate(items) if isinstance(v, kind))
  said = [
    f'{_short(items[i])}, a {type(items[i]).__name__}' for i in (row, other)
  ]
  raise ValueError(
    f'it is not a column of numbers or strings: row {row} holds {said[0]}, and '
    f'row {other} {said[1]}; give one type throughout'
  )


def _arrow(values) -> pa.Array:
  try:
    array = pa.array(values)
  except (pa.ArrowException, TypeError, UnicodeError) as error:
    raise ValueError(
      f'it is not a column of numbers or strings ({error}); give one type '
      'throughout'
    ) from error
  if isinstance(array, pa.ChunkedArray):  # More than 2 GiB of text.
    array = array.cast(pa.large_string()).combine_chunks()
  return array


def _moments(items: list[Any]) -> pa.Array:
  values = [None if v is None else _nanoseconds(v) for v in items]
  for row, value in enumerate(values):
    if value is not None and not -(2**63) <= value < 2**63:
      raise ValueError(
        f'row {row} holds {items[row]}; timestamps must lie between 1970 and '
        '2262'
      )
  return pa.array(values, pa.int64()).cast(pa.timestamp('ns'))


def _nanoseconds(value: Any) -> int | None:
  """Since 1970 in UTC; None of a NaT."""
  if isinstance(value, np.datetime64):
    unit = np.datetime_data(value.dtype)[0]
    if np.isnat(value):
      return None
    if unit in _COARSE:
      value, unit = value.astype('datetime64[s]'), 's'
    if unit not in _NANOSECONDS:
      value, unit = value.astype('datetime64[ns]'), 'ns'
    count = np.datetime_data(value.dtype)[1]
    return int(value.astype(np.int64)) * count * _NANOSECONDS[unit]
  if value != value:  # pandas.NaT
    return None
  if not isinstance(value, datetime.datetime):
    value = datetime.datetime(value.year, value.month, value.day)
  if value.tzinfo is not None:
    value = value.astimezone(datetime.UTC).replace(tzinfo=None)
  since = value - _EPOCH
  seconds = since.days * 86400 + since.seconds
  # A pandas.Timestamp has nanoseconds beside its microseconds.
  return (
    seconds * 10**9
    + since.microseconds * 1000
    + int(getattr(value, 'nanosecond', 0))
  )


def _casts(text: pa.Scalar, kind: pa.DataType) -> bool:
  try:
    pc.cast(text, kind)
  except pa.ArrowInvalid:
    return False
  return True


def _all(mask: pa.Array) -> bool:
  return bool(pc.all(mask).as_py())


def _first(mask: pa.Array) -> int:
  return max(pc.index(mask, pa.scalar(True)).as_py(), 0)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
