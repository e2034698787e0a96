"""Checks and pads what goes into a model, on the host, before any work.

Every complaint is a ValueError that names the field, the value and what it
should be. Features may be anything that `np.asarray` makes an array of ids or
numbers. They become int32 and float32 of the shape asked for, with zeros as
padding, so that neither types nor sizes make new programs. A device array that
has all of that already stays where it is, and its values are not looked at: to
read it back would stall the device. Others are read, padded and sent again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from histjax import key_range
from histjax import schema as schema_lib
from histjax.types import Candidates, History, RankingBatch


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
      type, an id outside its table, not finite, or a candidate that sees more
      than the history has.
  """
  check_type(batch, RankingBatch, 'batch')
  length = lengths(schema, batch.history)
  shape = candidates_shape(schema, batch.candidates)
  num_rows = len(length)
  check_rows(shape[0], num_rows)
  num_events = _shape_of(batch.history.features)[1]
  return batch.replace(
    context=context(schema, batch.context, num_rows, num_rows),
    history=history(schema, batch.history, length, (num_rows, num_events)),
    candidates=candidates(
      schema, batch.candidates, length, shape, causal
    ).replace(mask=real_candidates(batch.candidates)),
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
  padded_rows: int,
) -> dict[str, Any]:
  """The context `{name: [B]}`, checked, `[padded_rows]`."""
  return _features(
    'context', features, schema.context, (num_rows,), (padded_rows,)
  )


def lengths(schema: schema_lib.Schema, value: History) -> np.ndarray:
  """int32 `[B]`, the length of each history, checked against its features."""
  check_type(value, History, 'history')
  _check_names('history.features', value.features, schema.history_features)
  shape = _shape_of(value.features)
  length = _host('history.length', value.length)
  if len(shape) != 2 or length.shape != shape[:1]:
    raise ValueError(
      f'history: features have shape {shape} and length {length.shape}; '
      'they must be [B, L] and [B]'
    )
  _check_integers('history.length', length)
  if length.size and not 0 <= length.min() <= length.max() <= shape[1]:
    raise ValueError(
      f'history.length spans [{length.min()}, {length.max()}], outside '
      f'[0, L] with L={shape[1]}'
    )
  length = length.astype(np.int32)
  length.setflags(write=False)  # It becomes the cache's.
  return length


def history(
  schema: schema_lib.Schema,
  value: History,
  length: np.ndarray,
  padded: tuple[int, int],
) -> History:
  """The history, checked up to each length, of shape `padded`.

  Args:
    schema: names the features.
    value: `[B, L]`.
    length: `lengths` of it.
    padded: rows and events; those beyond every length may be cut.
  """
  shape = _shape_of(value.features)
  real = np.arange(shape[1])[None, :] < length[:, None]
  return History(
    features=_features(
      'history.features',
      value.features,
      schema.history_features,
      shape,
      padded,
      real,
    ),
    length=_fill(length, None, padded[:1]),
  )


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
  for field in ('visible', 'mask'):
    part = getattr(value, field)
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
  return None if value.mask is None else np.asarray(value.mask)


def candidates(
  schema: schema_lib.Schema,
  value: Candidates,
  length: np.ndarray,
  padded: tuple[int, int],
  causal: bool,
) -> Candidates:
  """The candidates, checked where `mask` is True, of shape `padded`.

  Args:
    schema: names the features.
    value: `[B, C]`.
    length: int32 `[B]`, of the histories.
    padded: rows and candidates.
    causal: whether an event sees earlier ones alone, so that a candidate may
      see a part of the history.

  Returns:
    Candidates without a mask; `visible` None where that is all of the history.
  """
  shape = _shape_of(value.features)
  real = real_candidates(value)
  features = _features(
    'candidates.features',
    value.features,
    schema.item_features,
    shape,
    padded,
    real,
  )
  visible = _visible(value, length, real, causal)
  if visible is not None:
    visible = _fill(visible, real, padded)
  return Candidates(features, visible)


def count(value: Candidates, shape: tuple[int, int], rows: int) -> np.ndarray:
  """int32 `[rows]`, the candidates of each row up to its last real one."""
  real = real_candidates(value)
  found = np.zeros(rows, np.int32)
  if real is None:
    found[: shape[0]] = shape[1]
  else:
    end = np.arange(1, shape[1] + 1)[None, :]
    found[: shape[0]] = np.where(real, end, 0).max(axis=1, initial=0)
  return found


def _visible(
  value: Candidates,
  length: np.ndarray,
  real: np.ndarray | None,
  causal: bool,
) -> np.ndarray | None:
  if value.visible is None:
    return None
  visible = _host('candidates.visible', value.visible)
  _check_integers('candidates.visible', visible)
  limit = np.broadcast_to(length[:, None], visible.shape)
  if real is not None:
    visible = np.where(real, visible, limit)
  bad = (visible < 0) | (visible > limit)
  if bad.any():
    row, column = np.argwhere(bad)[0]
    raise ValueError(
      f'candidates.visible[{row}, {column}]={visible[row, column]} is '
      f"outside [0, {length[row]}], the row's history.length"
    )
  if not causal:
    key_range.check_bidirectional(visible, length)
  if np.array_equal(visible, limit):
    return None
  return visible


def _features(
  field: str,
  features: Mapping[str, Any],
  spec: Sequence[schema_lib.Feature],
  shape: tuple[int, ...],
  padded: tuple[int, ...],
  real: np.ndarray | None = None,
) -> dict[str, Any]:
  """The features of `spec`, checked where `real`, of shape `padded`."""
  _check_names(field, features, spec)
  whole = shape == padded and (real is None or bool(real.all()))
  found: dict[str, Any] = {}
  for feature in spec:
    name = f'{field}[{feature.name!r}]'
    value: Any = features[feature.name]
    if not isinstance(value, jax.Array):
      value = _host(name, value)
    if value.shape != shape:
      raise ValueError(f'{name} has shape {value.shape}; expected {shape}')
    is_id = isinstance(feature, schema_lib.Categorical)
    if value.dtype.kind not in ('iu' if is_id else 'f'):
      wanted = 'integer ids' if is_id else 'floating-point values'
      dtype = 'int32' if is_id else 'float32'
      raise ValueError(
        f'{name} has dtype {value.dtype}, as in {_example(value)}; expected '
        f'{wanted}: make it an array of np.{dtype}'
      )
    wanted_type = np.dtype(np.int32 if is_id else np.float32)
    if isinstance(value, jax.Array):
      if whole and value.dtype == wanted_type:
        found[feature.name] = value
        continue
      value = np.asarray(value)
    _check_values(name, value, feature, real)
    found[feature.name] = _fill(value, real, padded, wanted_type)
  return found


def _check_values(
  name: str,
  value: np.ndarray,
  feature: schema_lib.Feature,
  real: np.ndarray | None,
) -> None:
  if isinstance(feature, schema_lib.Categorical):
    bad = (value < 0) | (value >= feature.size)
    wanted = f'an id in [0, {feature.size})'
  else:
    with np.errstate(over='ignore'):
      bad = ~np.isfinite(value.astype(np.float32, copy=False))
    wanted = 'a finite number in float32'
  if real is not None:
    bad &= real
  if bad.any():
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
      f'{name}{list(where)} is {value[where]}; expected {wanted}'
    )


def _check_names(
  field: str, features: Mapping[str, Any], spec: Sequence[schema_lib.Feature]
) -> None:
  wanted = [f.name for f in spec]
  if not isinstance(features, Mapping):
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
  try:
    return np.asarray(value)
  except ValueError as error:  # A ragged list.
    raise ValueError(f'{field} is no array: {error}') from error


def _shape_of(features: Mapping[str, Any]) -> tuple[int, ...]:
  """The shape of the first feature, which all must have."""
  name, value = next(iter(features.items()))
  if not isinstance(value, jax.Array):
    value = _host(f'features[{name!r}]', value)
  return value.shape


def _example(value: Any) -> str:
  return repr(np.asarray(value).reshape(-1)[:1].tolist())[1:-1] or 'nothing'


def _fill(
  value: np.ndarray,
  real: np.ndarray | None,
  padded: tuple[int, ...],
  dtype: Any = np.int32,
) -> np.ndarray:
  """Zeros of shape `padded`, with the real values at the beginning.

  Always a copy: the device may read it when the caller has changed the array.
  """
  if value.shape == padded and (real is None or real.all()):
    return value.astype(dtype)
  out = np.zeros(padded, dtype)
  part = tuple(map(slice, map(min, value.shape, padded)))
  out[part] = value[part] if real is None else np.where(real, value, 0)[part]
  return out
