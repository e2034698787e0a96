"""Columns of plain numbers and texts, encoded without Arrow.

A request has few values, and Arrow takes 10 to 40 us to read a column of them.
Each function gives what its namesake of `columns` gives of the same values, or
None if it cannot tell at once that these are good: then `columns` reads them,
which alone says what is wrong with a value.
"""

from __future__ import annotations

import functools
import marshal
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax import mixing
from histjax.data import columns as columns_lib
from histjax.data import hashing
from histjax.schema import (
  MAX_DENSE,
  MAX_RAW,
  MAX_SECONDS,
  Categorical,
  Dense,
  Feature,
  Schema,
  Task,
)
from histjax.vocabulary import Vocabulary

_TYPES: dict[type, Any] = {int: np.int64, float: np.float64}
_CODES: dict[Any, str] = {np.int64: 'q', np.float64: 'd'}
_UNSIGNED = {np.dtype(np.int32): np.uint32, np.dtype(np.int64): np.uint64}
_KINDS = {'integer': 'iu', 'number': 'iuf', None: 'iuf'}  # All of `_as_array`.
_MAX_EXACT = 2**53  # Arrow mixes whole numbers and others below that alone.
_MAX_TEXT = 64
_key = functools.lru_cache(1 << 16)(hashing.key)
# What `marshal`, version 2, writes of an item: a mark of its type, and itself;
# how many bytes that is, and what is read.
_MARKED: dict[type, tuple[bytes, int, np.dtype, np.dtype]] = {
  int: (b'i', 5, np.dtype('<i4'), np.dtype(np.int32)),
  float: (b'g', 9, np.dtype('<f8'), np.dtype(np.float64)),
}
_HEAD = 5  # Bytes before the items: the list's mark and length.


def encode(
  schema: Schema,
  columns: Mapping[str, Any],
  features: Sequence[Feature],
  length: int,
  vocabularies: Mapping[str, Vocabulary],
) -> dict[str, np.ndarray] | None:
  """Ids and values of features, `{name: [length]}`.

  Args:
    schema: declares types and missing values.
    columns: `{name: values}`.
    features: the features.
    length: of their columns, at least 1.
    vocabularies: `{table: vocabulary}`.
  """
  found = {}
  for feature in features:
    values = columns.get(feature.column)
    if isinstance(feature, Dense):
      encoded = _dense(schema, values, feature)
    elif feature.ids != 'index':
      keys = _keys(schema, values, feature.column)
      encoded = None
      if keys is not None and feature.ids == 'hash':
        encoded = hashing.hash_integers(keys, feature.size)
      elif keys is not None:
        known = vocabularies[feature.table]
        encoded = known.rows(mixing.mix(keys), feature.size)
    else:
      encoded = _index(schema, values, feature)
    if encoded is None or len(encoded) != length:
      return None
    found[feature.name] = encoded
  return found


def encode_one(
  schema: Schema,
  values: Mapping[str, Any],
  features: Sequence[Feature],
  vocabularies: Mapping[str, Vocabulary],
) -> dict[str, np.generic] | None:
  """As `encode`, of one value a column: `{name: int32 or float32}`."""
  found: dict[str, Any] = {}
  for feature in features:
    value = values.get(feature.column)
    quick = _one(value, feature)
    if quick is None or feature.column in schema.types:
      one = {feature.column: [value]}
      encoded = encode(schema, one, (feature,), 1, vocabularies)
      if encoded is None:
        return None
      quick = encoded[feature.name][0]
    found[feature.name] = quick
  return found


def _one(value: Any, feature: Feature) -> np.generic | None:
  """A number as the feature's; None: it takes more to tell."""
  kind = type(value)
  if isinstance(feature, Dense):
    if kind is int and -_MAX_EXACT < value < _MAX_EXACT:
      value = float(value)
    elif kind is not float:
      return None
    if feature.log or not -MAX_RAW <= value <= MAX_RAW:  # NaN is not, either.
      return None
    if feature.offset != 0 or feature.scale != 1:
      value = (value - feature.offset) / feature.scale
    return np.float32(value) if -MAX_DENSE <= value <= MAX_DENSE else None
  if kind is int and feature.ids == 'index' and 0 <= value < feature.size:
    if not feature.out_of_vocabulary:
      return np.int32(value)
  return None


def digests(schema: Schema, values: Any, name: str) -> np.ndarray | None:
  """uint64 `[n]` of keys, as `hashing.digests` of `columns.encode_keys`."""
  keys = _keys(schema, values, name)
  return None if keys is None else mixing.mix(keys)


def time(schema: Schema, values: Any, name: str) -> np.ndarray | None:
  """int64 or float64 `[n]`, no timestamps."""
  found = _numbers(schema, values, name)
  if found is None:
    return None
  last = MAX_SECONDS / schema.time_unit
  if found.dtype.kind == 'f':
    found = found.astype(np.float64)
    most = min(last, np.finfo(np.float64).max)
    return found if _within(found, 0, most) else None
  if not _within(found, 0, min(last, 2**63 - 1)):
    return None
  return found.astype(np.int64)


def labels(
  schema: Schema, columns: Mapping[str, Any], length: int
) -> dict[str, np.ndarray] | None:
  """Labels of all tasks, float32 `{task: [length]}`; see `encode`."""
  found = {}
  for task in schema.tasks:
    encoded = _label(schema, columns.get(task.column), task)
    if encoded is None or len(encoded) != length:
      return None
    found[task.name] = encoded
  return found


def _label(schema: Schema, values: Any, task: Task) -> np.ndarray | None:
  found = _numbers(schema, values, task.column)
  if found is None:
    return None
  dtype, found = found.dtype, found.astype(np.float64)
  if not np.isfinite(found).all():
    return None
  if task.threshold is not None:
    bound = columns_lib.bound(task.threshold, dtype)
    return (found >= bound).astype(np.float32)
  good = ((found == 0) | (found == 1)).all()
  return found.astype(np.float32) if good else None


def _index(schema, values, feature: Categorical) -> np.ndarray | None:
  found = _numbers(schema, values, feature.column)
  if found is None or found.dtype.kind == 'f':
    return None
  if feature.out_of_vocabulary:
    last = feature.size - 1
    outside = (found < 0) | (found > last)
    return np.where(outside, last, found).astype(np.int32)
  bits, unsigned = found, _UNSIGNED.get(found.dtype)
  if unsigned is not None:  # Below 0 is beyond all others.
    bits = found.view(unsigned)
  elif found.dtype.kind == 'i' and found[found.argmin()] < 0:
    return None
  if bits[bits.argmax()] >= feature.size:
    return None
  if unsigned is np.uint32 and found is not values:  # It is new.
    return found
  return found.astype(np.int32)


def _dense(schema, values, feature: Dense) -> np.ndarray | None:
  raw = _numbers(schema, values, feature.column)
  if raw is None:
    return None
  if raw.dtype.char != 'd':
    raw = raw.astype(np.float64)
  scaled = raw
  if feature.log or feature.offset != 0 or feature.scale != 1:
    if not _within(raw, 0 if feature.log else -MAX_RAW, MAX_RAW):
      return None
    scaled = columns_lib.scale(raw, feature)
  if not _within(scaled, -MAX_DENSE, MAX_DENSE):
    return None
  return scaled.astype(np.float32)


def _within(values: np.ndarray, low: float, high: float) -> bool:
  """Whether all are in `[low, high]`; of NaN there is none."""
  # In a third of the time of a reduction; a NaN comes first in both.
  least, most = values[values.argmin()], values[values.argmax()]
  return bool(low <= least and most <= high)


def _numbers(schema: Schema, values: Any, name: str) -> np.ndarray | None:
  """int32, int64, float64, or an array's own type `[n]`."""
  found = _marked(values)
  if found is None:
    found = _as_array(values)
  if found is None or not schema.column_types:
    return found
  kinds = _KINDS.get(schema.types.get(name))
  return None if kinds is None or found.dtype.kind not in kinds else found


def _as_array(values: Any) -> np.ndarray | None:
  if type(values) is np.ndarray:
    dtype = values.dtype
    good = dtype.kind in 'iuf' and dtype.isnative and dtype.char not in 'eg'
    return values if good and values.ndim == 1 and len(values) else None
  if type(values) not in (list, tuple) or not values:
    return None
  number, kind = len(values), type(values[0])
  if kind not in _TYPES:
    return None
  kinds = [*map(type, values)]
  same = kinds.count(kind) == number
  if not same and kinds.count(int) + kinds.count(float) < number:
    return None
  dtype = _TYPES[kind] if same else np.float64
  try:  # Half of what NumPy takes to read a list.
    packed = struct.pack(f'{number}{_CODES[dtype]}', *values)
  except (OverflowError, struct.error):
    return None
  found = np.frombuffer(packed, dtype)
  if not same and not _within(found, 1 - _MAX_EXACT, _MAX_EXACT - 1):
    return None
  return found


def _marked(values: Any) -> np.ndarray | None:
  """int32 or float64 `[n]` of a list of one type, int of 32 bits or float.

  None of others. To write items with their marks and to look at these takes
  half of what it takes to look at each type.
  """
  if (type(values) is not list and type(values) is not tuple) or not values:
    return None
  first, number = values[0], len(values)
  kind = type(first)
  if type(values[-1]) is not kind or kind not in _MARKED:
    return None
  if kind is int and not -(2**31) <= first < 2**31:
    return None
  mark, size, item, dtype = _MARKED[kind]
  try:
    written = marshal.dumps(values, 2)
  except ValueError:  # One is of a type that it does not know.
    return None
  # If an item has the mark, the next begins where the next mark must be.
  if written[_HEAD::size] != mark * number:
    return None
  return np.ndarray((number,), item, written, _HEAD + 1, (size,)).astype(dtype)


def _keys(schema: Schema, values: Any, name: str) -> np.ndarray | None:
  """int64 or uint64 `[n]` that `mixing.mix` mixes."""
  if type(values) in (list, tuple) and values and type(values[0]) is str:
    return _text_keys(schema, values, name)
  found = _numbers(schema, values, name)
  return None if found is None or found.dtype.kind == 'f' else found


def _text_keys(schema: Schema, values, name: str) -> np.ndarray | None:
  if name in schema.types or [*map(type, values)].count(str) < len(values):
    return None
  if max(map(len, values)) > _MAX_TEXT:  # Not to be kept.
    return None
  if schema.null_values and not set(schema.null_values).isdisjoint(values):
    return None
  try:
    return np.fromiter(map(_key, values), np.uint64, len(values))
  except UnicodeEncodeError:
    return None
