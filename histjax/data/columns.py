"""Columns of a log, checked and encoded: Arrow in, NumPy out.

What a column is read as follows from what the schema uses it for, never from
the values that it happens to hold. `histjax.schema` states the rules.

Every complaint names the column, the value, where it is and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from histjax import vocabulary
from histjax.data import hashing, parsing, parts
from histjax.data.parts import Columns
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

_YEAR = 365.2425 * 86400
_UNITS = {
  1.0: 'seconds',
  1e-3: 'milliseconds',
  1e-6: 'microseconds',
  1e-9: 'nanoseconds',
}


def from_mapping(
  columns: Any, wanted: Sequence[str], source: str, schema: Schema
) -> Columns:
  """Columns held in memory.

  Args:
    columns: `{name: values}`, a pandas.DataFrame or a pyarrow.Table; see
      `parsing.to_array` for what values may be.
    wanted: the columns to take.
    source: what to call them in messages.
    schema: says what counts as missing.

  Raises:
    ValueError: a wanted column is missing, of no usable type or of a length
      of its own.
  """
  if isinstance(columns, pa.Table):
    names = list(columns.column_names)
  elif isinstance(columns, Mapping) or hasattr(columns, 'keys'):
    names = list(columns.keys())
  else:
    raise ValueError(
      f'{source}: a {type(columns).__name__} is no table; give '
      '{column: values}'
    )
  parts.check_names(names, wanted, source)
  arrays = {}
  for name in wanted:
    try:
      arrays[name] = parsing.to_array(columns[name])
    except ValueError as error:
      raise ValueError(f'column {name!r} of {source}: {error}') from error
  lengths = {name: len(a) for name, a in arrays.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(
      f'columns of {source} differ in length: {lengths}; make them equal'
    )
  return Columns((pa.table(arrays),), (source,), schema)


def encode_categorical(columns: Columns, feature: Categorical) -> np.ndarray:
  """int32 ids `[n]` in `[0, feature.size)`; see also `digest_ids`.

  Raises:
    ValueError: an id is outside the table, or of a type that is no id.
  """
  name = feature.column
  if feature.ids != 'index':
    return hashing.rows(digest_ids(columns, feature), feature.size)
  values = _joined(
    columns,
    name,
    parts.as_integers,
    f'a whole number is needed as an index of feature {feature.name!r}; set '
    "ids='hash' or 'vocabulary' for texts, or make quantities dense",
  )
  if feature.out_of_vocabulary:
    return known(values, feature)
  parts.check(
    columns,
    name,
    values,
    (values < 0) | (values >= feature.size),
    f'outside the table of feature {feature.name!r}, [0, {feature.size}); '
    "raise its size, or set ids='hash' or out_of_vocabulary=True",
  )
  return values.astype(np.int32)


def digest_ids(columns: Columns, feature: Categorical) -> np.ndarray:
  """uint64 `[n]`, the digests of ids that are keys; see `hashing`.

  Raises:
    ValueError: an id is of a type that is no key.
  """
  return _joined(columns, feature.column, _digests)


def distinct_digests(columns: Columns, feature: Categorical) -> np.ndarray:
  """uint64, the distinct ones of `digest_ids`, of a column that is checked."""
  found = [np.zeros(0, np.uint64)]
  for start, array in columns.arrays(feature.column, texts=True):
    unique = array.unique()
    found.append(_digests(columns, feature.column, start, unique))
  return np.unique(np.concatenate(found))


def encode(
  columns: Columns,
  features: Sequence[Feature],
  vocabularies: Mapping[str, Vocabulary] | None = None,
) -> dict[str, np.ndarray]:
  """Ids and values of features, `{name: [n]}`.

  Args:
    columns: has theirs.
    features: the features.
    vocabularies: `{table: vocabulary}`; None: ids with a vocabulary stay
      digests, uint64.

  Raises:
    ValueError: a value is missing or bad, or a vocabulary is missing.
  """
  found = {}
  for feature in features:
    if isinstance(feature, Dense):
      found[feature.name] = encode_dense(columns, feature)
    elif feature.ids == 'vocabulary':
      digests = digest_ids(columns, feature)
      if vocabularies is not None:
        vocabulary.check(feature, vocabularies)
        digests = vocabularies[feature.table].rows(digests, feature.size)
      found[feature.name] = digests
    else:
      found[feature.name] = encode_categorical(columns, feature)
  return found


def known(values: np.ndarray, feature: Categorical) -> np.ndarray:
  """int32 ids `[n]`; those that are outside get the feature's last row."""
  last = feature.size - 1
  return np.where((values < 0) | (values > last), last, values).astype(np.int32)


def encode_dense(columns: Columns, feature: Dense) -> np.ndarray:
  """float32 `[n]`, `(value - offset) / scale` after the optional logarithm.

  Raises:
    ValueError: a value is no number, not finite, negative under `log`,
      beyond `MAX_RAW`, or beyond `MAX_DENSE` when scaled.
  """
  raw = numbers(columns, feature.column)
  if feature.log:
    parts.check(
      columns, feature.column, raw, raw < 0, 'log needs >= 0; set log=False'
    )
  scaled = scale(raw, feature)
  parts.check(
    columns,
    feature.column,
    raw,
    (np.abs(raw) > MAX_RAW) | ~(np.abs(scaled) <= MAX_DENSE),
    f'too large as feature {feature.name!r}: at most {MAX_RAW:g} before and '
    f'{MAX_DENSE:g} after scaling (better around 1); fix it, or raise its '
    'scale or set log=True',
  )
  return scaled.astype(np.float32)


def scale(raw: np.ndarray, feature: Dense) -> np.ndarray:
  """float64 `[n]`, `(value - offset) / scale` after the optional logarithm.

  Args:
    raw: float64 `[n]`, finite, and >= 0 under `log`.
    feature: says how.
  """
  values = np.log1p(raw) if feature.log else raw
  if feature.offset == 0 and feature.scale == 1:
    return values
  with np.errstate(over='ignore'):
    return (values - feature.offset) / feature.scale


def encode_label(columns: Columns, task: Task) -> np.ndarray:
  """float32 `[n]` in {0, 1}; see `bound` for a threshold's type.

  Raises:
    ValueError: a value is no number, or, without a threshold, neither 0 nor 1.
  """
  choices = 'a number'
  if task.threshold is None:
    choices = '0 or 1 (or true or false)'
  problem = f'a label of task {task.name!r} must be {choices}; write it so'
  values = numbers(columns, task.column, problem)
  if task.threshold is not None:
    bounds = _joined(columns, task.column, _bounds, task.threshold)
    return (values >= bounds).astype(np.float32)
  parts.check(
    columns,
    task.column,
    values,
    (values != 0) & (values != 1),
    f'a label of task {task.name!r} is 0 or 1; fix it, or set the threshold '
    'from which on it counts as 1',
  )
  return values.astype(np.float32)


def bound(threshold: float, dtype: np.dtype) -> float:
  """A threshold as a column of type `dtype` holds it, if that is a float.

  So 4.1 reaches 4.1 in a column of any width.
  """
  if dtype.kind != 'f':
    return threshold
  with np.errstate(over='ignore'):  # Infinite: it holds none as large.
    return float(np.array(threshold).astype(dtype))


def _bounds(columns, name, start, array, threshold: float) -> np.ndarray:
  del columns, name, start
  is_float = pa.types.is_floating(array.type)
  dtype = np.dtype(array.type.to_pandas_dtype() if is_float else np.float64)
  return np.full(len(array), bound(threshold, dtype))


def encode_time(columns: Columns, name: str) -> tuple[np.ndarray, bool]:
  """Times `[n]` and whether they are timestamps.

  Returns:
    int64 or float64 in the column's unit; int64 nanoseconds since 1970 (UTC)
    for timestamps and dates of any unit and zone.

  Raises:
    ValueError: a time is negative, not finite, or neither number nor
      timestamp; or one file has numbers and another timestamps.
  """
  arrays = columns.arrays(name)
  starts = [start for start, _ in arrays]
  found = [parts.as_times(columns, name, *part) for part in arrays]
  kinds = [is_timestamp for _, is_timestamp in found]
  for start, kind in zip(starts, kinds, strict=True):
    if kind != kinds[0]:
      said = {True: 'timestamps', False: 'numbers'}
      raise ValueError(
        f'column {name!r}: {columns.where(starts[0])} and on are '
        f'{said[kinds[0]]}, {columns.where(start)} and on {said[kind]}; give '
        'all of one kind'
      )
  values = _concatenate([values for values, _ in found])
  parts.check(
    columns,
    name,
    values,
    values < 0,
    'a time must be >= 0 (a timestamp: 1970 or later); fix it or shift all',
  )
  is_timestamp = bool(kinds and kinds[0])
  if not is_timestamp and len(values):
    _check_unit(columns, name, values)
  return values, is_timestamp


def _check_unit(columns: Columns, name: str, values: np.ndarray) -> None:
  """Numbers that are no times in the schema's unit are of another one."""
  unit = columns.schema.time_unit
  bad = values > MAX_SECONDS / unit
  if not bad.any():
    return
  value = values[int(np.argmax(bad))].item()
  hint = 'set time_unit to the seconds that a unit has'
  for other, what in _UNITS.items():
    if 1e8 < value * other < 1e10:  # From 1973 on.
      hint = f'if these are {what} since 1970, set time_unit={other:g}'
  parts.check(
    columns,
    name,
    values,
    bad,
    f'{value * unit / _YEAR:.3g} years in units of {unit:g} s (time_unit), '
    f'more than 292; {hint}',
  )


def check_clocks(name: str, kinds: Mapping[str, bool]) -> None:
  """Raises a ValueError unless all sources tell time alike.

  Args:
    name: the time column.
    kinds: `{source: encode_time's is_timestamp}`.
  """
  if len(set(kinds.values())) > 1:
    said = {True: 'timestamps', False: 'numbers'}
    told = ' and '.join(f'{said[v]} in {k}' for k, v in kinds.items())
    raise ValueError(
      f'column {name!r}: the times are {told}; give all of one kind'
    )


def encode_keys(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Dense codes int64 `[n]` of a column of keys and the distinct keys.

  Integers come in their order, before texts in theirs; texts that are
  integers (see `hashing`) count as those. So the codes do not depend on
  whether an integer came as such or as text.

  Returns:
    The codes, and the keys: int64 or uint64 if all are integers, else an
    object array of str.

  Raises:
    ValueError: a value is neither integer nor text.
  """
  arrays = columns.arrays(name, texts=True)
  found = [parts.as_keys(columns, name, *part) for part in arrays]
  if not any(pa.types.is_large_string(p.type) for p in found):
    values = [p.to_numpy() for p in found]
    whole = _concatenate(values)
    if whole.dtype.kind in 'iu':
      keys, codes = np.unique(whole, return_inverse=True)
      return codes.astype(np.int64), keys
  texts = pa.chunked_array([p.cast(pa.large_string()) for p in found])
  encoded = texts.combine_chunks().dictionary_encode()
  keys = np.array([*encoded.dictionary.to_pylist(), None], object)[:-1]
  order = order_of_keys(keys)
  rank = np.empty(len(keys), np.int64)
  rank[order] = np.arange(len(keys))
  return rank[encoded.indices.to_numpy()], keys[order]


def keys(columns: Columns, name: str) -> np.ndarray | pa.Array:
  """A column of keys as it is.

  Returns:
    `[n]`, int64 or uint64 if all are integers, else large_string.

  Raises:
    ValueError: a value is neither integer nor text.
  """
  arrays = columns.arrays(name, texts=True)
  found = [parts.as_keys(columns, name, *part) for part in arrays]
  if not any(pa.types.is_large_string(p.type) for p in found):
    whole = _concatenate([p.to_numpy() for p in found])
    if whole.dtype.kind in 'iu':
      return whole
  return pa.concat_arrays([p.cast(pa.large_string()) for p in found])


def digest_keys(
  columns: Columns, name: str
) -> tuple[np.ndarray | pa.Array, np.ndarray]:
  """A column of keys as it is, and the digest of each.

  Returns:
    `keys`, and uint64 `[n]`, `hashing.digests`.

  Raises:
    ValueError: a value is neither integer nor text.
  """
  texts = keys(columns, name)
  if isinstance(texts, np.ndarray):
    return texts, hashing.digests(texts)
  encoded = texts.dictionary_encode()
  distinct = np.array([*encoded.dictionary.to_pylist(), None], object)[:-1]
  return texts, hashing.digests(distinct)[encoded.indices.to_numpy()]


def order_of_keys(keys: np.ndarray) -> np.ndarray:
  """int64 `[n]` that sorts distinct keys as `encode_keys` orders them."""
  if keys.dtype.kind in 'iu':
    return np.argsort(keys)
  order = sorted(range(len(keys)), key=lambda i: _rank(str(keys[i])))
  return np.array(order, np.int64)


def _rank(key: str) -> tuple[int, int, str]:
  integer = hashing.as_integer(key)
  return (1, 0, key) if integer is None else (0, integer, '')


def canonical_keys(keys: np.ndarray) -> list[str]:
  """Keys of `encode_keys` as text, in which equal keys are equal: 7 is '7'."""
  return [str(key) for key in keys.tolist()]


def numbers(
  columns: Columns, name: str, problem: str = 'a number is needed; fix it'
) -> np.ndarray:
  """The column `name` as finite float64 `[n]`.

  Args:
    columns: has it.
    name: of the column.
    problem: of a text that is no number, for the message.

  Raises:
    ValueError: a value is no number, or not finite.
  """
  values = _joined(columns, name, parts.as_floats, problem)
  parts.check(columns, name, values, ~np.isfinite(values), 'it must be finite')
  return values


def raw(columns: Columns, name: str) -> np.ndarray:
  """The column `name` as it came `[n]`; texts if some part has texts."""
  arrays = [array for _, array in columns.arrays(name, unread=True)]
  tables = [pa.table([array], [name]) for array in arrays]
  try:
    table = pa.concat_tables(tables, promote_options='permissive')
  except (pa.ArrowInvalid, pa.ArrowTypeError):
    table = pa.concat_tables(
      [t.cast(pa.schema([(name, pa.large_string())])) for t in tables]
    )
  return table[name].to_numpy()


def _digests(columns, name, start, array) -> np.ndarray:
  array = parts.as_keys(columns, name, start, array)
  if not pa.types.is_large_string(array.type):
    return hashing.digests(array.to_numpy())
  encoded = array.dictionary_encode()
  texts = np.array([*encoded.dictionary.to_pylist(), None], object)[:-1]
  return hashing.digests(texts)[encoded.indices.to_numpy()]


def _joined(
  columns: Columns, name: str, convert: Callable[..., np.ndarray], *args
) -> np.ndarray:
  return _concatenate(
    [
      convert(columns, name, start, array, *args)
      for start, array in columns.arrays(name, texts=convert is _digests)
    ]
  )


def _concatenate(found: list[np.ndarray]) -> np.ndarray:
  return np.concatenate(found) if found else np.zeros(0, np.int64)
