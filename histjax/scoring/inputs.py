"""Checks what goes into a model, and writes it where the program reads it.

All of it is on the host, before any work, but that values of candidates to be
scored from a cache are looked at while their program runs. Every complaint is a
ValueError that names the field, the value and what it should be. Features may
be anything that `np.asarray` makes an array of ids or numbers; a device array
is read back, which stalls the device. They become int32 and float32 of the
padded shape, zeros in the padding, so that neither types nor sizes make new
programs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax import key_range
from histjax import schema as schema_lib
from histjax.scoring import layout as layout_lib
from histjax.types import Candidates, History, RankingBatch

_PLAIN = {np.ndarray}


def check_batch(
  schema: schema_lib.Schema, batch: RankingBatch, *, causal: bool = True
) -> RankingBatch:
  """Checks shapes, types and values of rows; not what is in their padding.

  Args:
    schema: what the batch must hold.
    batch: labels and group are not read.
    causal: as `EncoderConfig.causal`.

  Returns:
    The batch as a model takes it, with its own shape, zeros in the padding, and
    `visible` None where that is all of the history.

  Raises:
    ValueError: something is missing or not in the schema, of another shape or
      type, an id outside its table, a dense value beyond `schema.MAX_DENSE`, or
      a candidate that sees more than the history has.
  """
  check_type(batch, RankingBatch, 'batch')
  check_not_packed(batch)
  length, (rows, events) = lengths(schema, batch.history)
  shape = candidates_shape(schema, batch.candidates)
  check_rows(shape[0], rows)
  real = real_candidates(batch.candidates)
  seen = visible(batch.candidates, length, real, causal)
  layout = layout_lib.Layout(
    (
      layout_lib.features('context', schema.context, (rows,)),
      layout_lib.features('history', schema.history_features, (rows, events)),
      layout_lib.features('candidates', schema.item_features, shape),
    )
  )
  buffer = np.zeros(layout.size, np.int32)
  views = layout.views(buffer)
  context(schema, batch.context, rows, views['context'])
  history(schema, batch.history, length, views['history'])
  candidates(schema, batch.candidates, shape, real, views['candidates'])
  if not layout.is_good(buffer, views):
    check_context(schema, batch.context)
    check_history(schema, batch.history, length)
    check_candidates(schema, batch.candidates, real)
  if seen is not None:
    seen = np.where(True if real is None else real, seen, 0).astype(np.int32)
  return batch.replace(
    context=views['context'].features,
    history=History(views['history'].features, length),
    candidates=Candidates(
      views['candidates'].features,
      seen,
      None
      if batch.candidates.mask is None
      else np.array(batch.candidates.mask),
    ),
  )


def check_not_packed(batch: RankingBatch) -> None:
  """Raises ValueError if its rows hold several users."""
  if batch.segments is not None:
    raise ValueError(
      'batch.segments: the rows are packed, which is for training; score users '
      'in rows of their own, as histjax.collate makes them without `pieces`, '
      'and batches of PipelineConfig(pack=False) are'
    )


def check_rows(of_candidates: int, of_history: int) -> None:
  """Raises ValueError unless both are as many."""
  if of_candidates != of_history:
    raise ValueError(
      f'candidates have {of_candidates} rows, history {of_history}; make them '
      'equal'
    )


def context(
  schema: schema_lib.Schema,
  features: Mapping[str, Any],
  num_rows: int,
  view: layout_lib.View,
) -> None:
  """Writes the context `{name: [B]}`."""
  _write('context', features, schema.context, (num_rows,), None, view)


def check_context(
  schema: schema_lib.Schema, features: Mapping[str, Any]
) -> None:
  """Raises ValueError for the first value that must not be."""
  _check_values('context', features, schema.context, None)


def lengths(
  schema: schema_lib.Schema, value: History
) -> tuple[np.ndarray, tuple[int, int]]:
  """int32 `[B]`, the length of each history, and the features' `(B, L)`."""
  check_type(value, History, 'history')
  _check_names('history.features', value.features, schema.history_features)
  shape = _shape_of(value.features)
  length = value.length
  if type(length) is not np.ndarray:
    length = _host('history.length', length)
  if len(shape) != 2 or length.shape != shape[:1]:
    raise ValueError(
      f'history: features have shape {shape} and length {length.shape}; '
      'they must be [B, L] and [B]'
    )
  if length.dtype != np.int32:
    _check_integers('history.length', length)
  values = length.tolist()  # Of so few NumPy's reductions take longer.
  if values and not 0 <= min(values) <= max(values) <= shape[1]:
    raise ValueError(
      f'history.length spans [{min(values)}, {max(values)}], outside '
      f'[0, L] with L={shape[1]}'
    )
  length = length.astype(np.int32)
  length.setflags(write=False)  # It becomes the cache's.
  return length, shape


def history(
  schema: schema_lib.Schema,
  value: History,
  length: np.ndarray,
  view: layout_lib.View,
) -> None:
  """Writes the events up to each length, `[B, L]`; others may be cut."""
  shape = _shape_of(value.features)
  real = _real_events(shape, length)
  spec = schema.history_features
  _write('history.features', value.features, spec, shape, real, view)


def check_history(
  schema: schema_lib.Schema, value: History, length: np.ndarray
) -> None:
  """Raises ValueError for the first value that must not be."""
  real = _real_events(_shape_of(value.features), length)
  spec = schema.history_features
  _check_values('history.features', value.features, spec, real)


def _real_events(shape, length) -> np.ndarray | None:
  """bool `[B, L]`, False at padding; None: there is none."""
  if min(length.tolist(), default=shape[1]) >= shape[1]:
    return None
  return np.arange(shape[1])[None, :] < length[:, None]


def candidates_shape(
  schema: schema_lib.Schema, value: Candidates
) -> tuple[int, int]:
  """`(B, C)`, the same in all parts of the candidates."""
  check_type(value, Candidates, 'candidates')
  _check_names('candidates.features', value.features, schema.item_features)
  shape = _shape_of(value.features)
  if len(shape) != 2:
    raise ValueError(
      f'candidates: features have shape {shape}; it must be [B, C]'
    )
  for field, part in (('visible', value.visible), ('mask', value.mask)):
    if part is None:
      continue
    part = _host(f'candidates.{field}', part)
    if part.shape != shape:
      raise ValueError(
        f'candidates.{field} has shape {part.shape}; features have {shape}'
      )
    if field == 'mask' and part.dtype != bool:
      raise ValueError(
        f'candidates.mask has dtype {part.dtype}; expected bool, False at '
        'padding'
      )
  return shape


def real_candidates(value: Candidates) -> np.ndarray | None:
  """bool `[B, C]`, False at padding; None: there is none."""
  if value.mask is None:
    return None
  mask = np.array(value.mask)  # Its own: it is read again with the logits.
  return None if mask.all() else mask


def candidates(
  schema: schema_lib.Schema,
  value: Candidates,
  shape: tuple[int, int],
  real: np.ndarray | None,
  view: layout_lib.View,
) -> None:
  """Writes the candidates `[B, C]`, zeros where they are not real."""
  spec = schema.item_features
  _write('candidates.features', value.features, spec, shape, real, view)


def check_candidates(
  schema: schema_lib.Schema, value: Candidates, real: np.ndarray | None
) -> None:
  """Raises ValueError for the first value that must not be."""
  spec = schema.item_features
  _check_values('candidates.features', value.features, spec, real)


def count(
  shape: tuple[int, int], real: np.ndarray | None, view: layout_lib.View
) -> None:
  """Writes int32 `[B]`, the candidates of each row up to its last real one."""
  out = view.number
  if real is None:
    out[...] = shape[1]
  else:
    end = np.arange(1, shape[1] + 1)[None, :]
    out[: shape[0]] = np.where(real, end, 0).max(axis=1, initial=0)
  if shape[0] < len(out):
    out[shape[0] :] = 0


def numbers(value: np.ndarray, view: layout_lib.View) -> None:
  """Writes integers, zeros behind them."""
  out = view.number
  if value.shape == out.shape:
    out[...] = value
  else:
    out.fill(0)
    out[tuple(map(slice, value.shape))] = value


def visible(
  value: Candidates,
  length: np.ndarray,
  real: np.ndarray | None,
  causal: bool,
) -> np.ndarray | None:
  """int `[B, C]`, checked where candidates are real; None: all events.

  Args:
    value: the candidates.
    length: int32 `[B]`, of the histories.
    real: of `real_candidates`.
    causal: whether an event sees earlier ones alone, so that a candidate may
      see a part of the history.
  """
  if value.visible is None:
    return None
  seen = _host('candidates.visible', value.visible)
  _check_integers('candidates.visible', seen)
  limit = np.broadcast_to(length[:, None], seen.shape)
  if real is not None:
    seen = np.where(real, seen, limit)
  bad = (seen < 0) | (seen > limit)
  if bad.any():
    row, column = np.argwhere(bad)[0]
    raise ValueError(
      f'candidates.visible[{row}, {column}]={seen[row, column]} is '
      f"outside [0, {length[row]}], the row's history.length"
    )
  if not causal:
    key_range.check_bidirectional(seen, length)
  if np.array_equal(seen, limit):
    return None
  return seen


def _write(
  field: str,
  given: Mapping[str, Any],
  spec: Sequence[schema_lib.Feature],
  shape: tuple[int, ...],
  real: np.ndarray | None,
  view: layout_lib.View,
) -> None:
  """Writes the features of `spec`, of `shape`, zeros where not `real`.

  Values are checked by `Layout.is_good`, all of a request at once.
  """
  if not (real is None and _write_as_is(given, shape, view)):
    _check_names(field, given, spec)
    if not _write_converted(field, given, spec, shape, real, view):
      _check_values(field, given, spec, real)
      raise AssertionError(f'{field}: an id was lost, and none is bad')


def _write_as_is(given: Any, shape: tuple[int, ...], view: layout_lib.View):
  """Whether features were of the right types and size, and are written."""
  columns = view.columns
  if type(given) is not dict or len(given) != len(columns):
    return False
  part: Any = ...
  if shape != view.part.shape:
    if any(map(operator.gt, shape, view.part.shape)):  # It is to be cut.
      return False
    view.clear()
    part = tuple(map(slice, shape))
  for name, out, dtype in columns:
    value = given.get(name)
    if type(value) is not np.ndarray or value.dtype != dtype:
      return False
    if value.shape != shape:
      return False
    out[part] = value
  return True


def alike(requests: Sequence[tuple[Any, Any]]) -> tuple[int, int] | None:
  """The `(B, C)` that all may have, if none has a mask or `visible`.

  Args:
    requests: `(candidates, context)`, at least one; not checked.
  """
  for value, _ in requests:
    if type(value) is not Candidates:
      return None
    if value.visible is not None or value.mask is not None:
      return None
  features = requests[0][0].features
  if type(features) is not dict or not features:
    return None
  shape: Any = getattr(next(iter(features.values())), 'shape', ())
  return shape if len(shape) == 2 else None


def write_together(
  given: Sequence[Any], shape: tuple[int, ...], view: layout_lib.View
) -> bool:
  """Writes features of several, rows of one after those of the one before it.

  Zeros are in the padding.

  Args:
    given: features of each.
    shape: of each.
    view: to write.

  Returns:
    Whether all were of the right names, types and shape; else what is written
    means nothing.
  """
  columns, number = view.columns, len(given)
  every, whole = (number * shape[0], *shape[1:]), view.part.shape
  part: Any = ...
  if every != whole:
    if any(map(operator.gt, every, whole)):
      return False
    view.clear()
    part = tuple(map(slice, every))
  sizes, shapes = [len(columns)] * number, [shape] * number
  try:
    if [len(x) for x in given] != sizes:
      return False
    for name, out, _ in columns:
      parts = [features.get(name) for features in given]
      if [x.shape for x in parts] != shapes:
        return False
      if set(map(type, parts)) != _PLAIN:  # A masked one would lose its mask.
        return False
      np.concatenate(parts, out=out[part], casting='no')
  except (AttributeError, TypeError):  # No dict, no arrays, or other types.
    return False
  return True


def _write_converted(field, given, spec, shape, real, view) -> bool:
  """Writes features of any types; whether no id was lost by that."""
  whole = view.part.shape
  if shape != whole:
    view.clear()
  part = tuple(map(slice, map(min, shape, whole)))
  good = True
  for feature in spec:
    value = given[feature.name]
    if type(value) is not np.ndarray:
      value = _host(f'{field}[{feature.name!r}]', value)
    table = feature.size if isinstance(feature, schema_lib.Categorical) else 0
    if value.shape != shape or value.dtype.kind not in ('iu' if table else 'f'):
      raise _malformed(field, feature, value, shape)
    if real is not None:
      value = np.where(real, value, 0)
    if table and value.dtype != np.int32:  # It could wrap.
      good &= not value.size or bool(0 <= value.min() and value.max() < table)
    out = view.features[feature.name][part]
    with np.errstate(over='ignore'):  # What overflows is not finite.
      out[...] = value[part]
  return good


def _malformed(field, feature, value, shape) -> ValueError:
  name = f'{field}[{feature.name!r}]'
  if value.shape != shape:
    return ValueError(f'{name} has shape {value.shape}; expected {shape}')
  is_id = isinstance(feature, schema_lib.Categorical)
  wanted = 'integer ids' if is_id else 'floating-point values'
  dtype = 'int32' if is_id else 'float32'
  return ValueError(
    f'{name} has dtype {value.dtype}, as in {_example(value)}; expected '
    f'{wanted}: make it an array of np.{dtype}'
  )


def _check_values(field, given, spec, real) -> None:
  """Raises ValueError for the first value that must not be."""
  for feature in spec:
    value = np.asarray(given[feature.name])
    if isinstance(feature, schema_lib.Categorical):
      bad = (value < 0) | (value >= feature.size)
      wanted = f'an id in [0, {feature.size})'
    else:
      with np.errstate(over='ignore'):
        size = np.abs(value.astype(np.float32, copy=False))
      bad = ~(size <= schema_lib.MAX_DENSE)
      wanted = f'a finite number of at most {schema_lib.MAX_DENSE:g}'
    if real is not None:
      bad &= real
    if bad.any():
      where = tuple(int(i) for i in np.argwhere(bad)[0])
      raise ValueError(
        f'{field}[{feature.name!r}]{list(where)} is {value[where]}; expected '
        f'{wanted}'
      )


def _check_names(
  field: str, features: Mapping[str, Any], spec: Sequence[schema_lib.Feature]
) -> None:
  is_mapping = type(features) is dict or isinstance(features, Mapping)
  if is_mapping and len(features) == len(spec):
    for feature in spec:
      if feature.name not in features:
        break
    else:
      return
  wanted = [f.name for f in spec]
  if not is_mapping:
    raise ValueError(
      f'{field} is a {type(features).__name__}; expected a dict of the '
      f'features {wanted}'
    )
  for name in wanted:
    if name not in features:
      raise ValueError(
        f'{field}[{name!r}] is missing; given {sorted(map(str, features))}, '
        f'the schema asks for {wanted}'
      )
  for name in features:
    if name not in wanted:
      raise ValueError(
        f'{field}[{name!r}] is not in the schema, which asks for {wanted}; '
        'leave it out'
      )


def _check_integers(field: str, value: np.ndarray) -> None:
  if value.dtype.kind not in 'iu':
    raise ValueError(
      f'{field} has dtype {value.dtype}; expected integers: make it an array '
      'of np.int32'
    )


def check_type(value: Any, cls: type, field: str) -> None:
  """Raises ValueError unless `value` is a `cls`."""
  if not isinstance(value, cls):
    raise ValueError(
      f'{field} is a {type(value).__name__}; expected a histjax.{cls.__name__}'
    )


def _host(field: str, value: Any) -> np.ndarray:
  if np.ma.is_masked(value):
    raise ValueError(
      f'{field} has masked values, which are missing; fill them in, or leave '
      'them out'
    )
  try:
    return np.asarray(value)
  except ValueError as error:  # A ragged list.
    raise ValueError(f'{field} is no array: {error}') from error


def _shape_of(features: Mapping[str, Any]) -> tuple[int, ...]:
  """The shape of the first feature, which all must have."""
  name, value = next(iter(features.items()))
  if not isinstance(value, np.ndarray):
    value = _host(f'features[{name!r}]', value)
  return value.shape


def _example(value: Any) -> str:
  return repr(np.asarray(value).reshape(-1)[:1].tolist())[1:-1] or 'nothing'
