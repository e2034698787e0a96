"""Checks what goes into a model, on the host, before it meets a device.

Every complaint is a ValueError that names the field, the value and what it
should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax import schema as schema_lib
from histjax.types import Candidates, History, RankingBatch


def validate_batch(
  batch: RankingBatch, schema: schema_lib.Schema, *, causal: bool = True
) -> None:
  """Checks shapes, types and values of a batch; not what is in its padding.

  Args:
    batch: with or without labels.
    schema: what it must hold.
    causal: as `EncoderConfig.causal`.

  Raises:
    ValueError: something is missing, of another shape or type, an id outside
      its table, not finite, a label that is neither 0 nor 1, or a candidate
      that sees more than the history has.
  """
  num_rows = check_history(schema, batch.history)
  check_context(schema, batch.context, num_rows)
  shape = check_candidates(schema, batch.candidates)
  if shape[0] != num_rows:
    raise ValueError(
      f'candidates have {shape[0]} rows, history {num_rows}; make them equal'
    )
  check_visible(
    batch.candidates, np.asarray(batch.history.length), causal=causal
  )
  mask = batch.candidates.mask
  real = np.ones(shape, bool) if mask is None else np.asarray(mask, bool)
  for task in schema.tasks if batch.labels else ():
    value = np.asarray(batch.labels.get(task.name, ()))
    if value.shape != shape:
      raise ValueError(
        f'labels[{task.name!r}] has shape {value.shape}; expected {shape}'
      )
    bad = real & (value != 0) & (value != 1)
    if bad.any():
      where = tuple(int(i) for i in np.argwhere(bad)[0])
      raise ValueError(
        f'labels[{task.name!r}]{list(where)} is {value[where]}; expected 0 or 1'
      )


def check_context(
  schema: schema_lib.Schema, context: Mapping[str, Any], num_rows: int
) -> dict[str, Any]:
  """Checks `context`; returns what the schema names of it."""
  spec = schema.context
  _check_shapes('context', context, spec, (num_rows,))
  _check_values('context', context, spec)
  return {f.name: context[f.name] for f in spec}


def check_history(schema: schema_lib.Schema, history: History) -> int:
  """Checks a history up to each `length`; returns B."""
  spec = schema.history_features
  shape = _check_shapes('history.features', history.features, spec)
  length = np.asarray(history.length)
  if len(shape) != 2 or length.shape != shape[:1]:
    raise ValueError(
      f'history: features have shape {shape} and length {length.shape}; '
      'they must be [B, L] and [B]'
    )
  if length.size and not 0 <= length.min() <= length.max() <= shape[1]:
    raise ValueError(
      f'history.length spans [{length.min()}, {length.max()}], outside '
      f'[0, L] with L={shape[1]}'
    )
  real = np.arange(shape[1])[None, :] < length[:, None]
  _check_values('history.features', history.features, spec, real)
  return shape[0]


def check_candidates(
  schema: schema_lib.Schema, candidates: Candidates
) -> tuple[int, int]:
  """Checks candidates where `mask` is True; returns `(B, C)`."""
  spec = schema.item_features
  shape = _check_shapes('candidates.features', candidates.features, spec)
  if len(shape) != 2:
    raise ValueError(
      f'candidates: features have shape {shape}; it must be [B, C]'
    )
  for field in ('visible', 'mask'):
    value = getattr(candidates, field)
    if value is not None and np.shape(value) != shape:
      raise ValueError(
        f'candidates.{field} has shape {np.shape(value)}; features have {shape}'
      )
  mask = candidates.mask
  real = None if mask is None else np.asarray(mask, bool)
  _check_values('candidates.features', candidates.features, spec, real)
  return shape


def check_visible(
  candidates: Candidates, length: np.ndarray, *, causal: bool
) -> Candidates:
  """Checks `visible`; replaces it by None where it is all of the history.

  Args:
    candidates: `[B, C]`.
    length: `[B]`, of the histories.
    causal: whether an event sees earlier ones alone, so that a candidate may
      see a part of the history.
  """
  if candidates.visible is None:
    return candidates
  visible = np.asarray(candidates.visible)
  limit = np.broadcast_to(length[:, None], visible.shape)
  if candidates.mask is not None:
    visible = np.where(np.asarray(candidates.mask), visible, limit)
  if np.array_equal(visible, limit):
    return candidates.replace(visible=None)
  bad = (visible < 0) | (visible > limit)
  if bad.any():
    row, column = np.argwhere(bad)[0]
    raise ValueError(
      f'candidates.visible[{row}, {column}]={visible[row, column]} is '
      f"outside [0, {length[row]}], the row's history.length"
    )
  if not causal:
    row, column = np.argwhere(visible != limit)[0]
    raise ValueError(
      f'candidates.visible[{row}, {column}]={visible[row, column]} differs '
      f'from history.length={length[row]}, but encoder.causal=False: in a '
      'bidirectional history every event has seen the later ones. Give '
      'such a candidate a row of its own, or use encoder.causal=True'
    )
  return candidates.replace(visible=visible.astype(np.int32))


def _check_shapes(
  field: str,
  features: Mapping[str, Any],
  spec: Sequence[schema_lib.Feature],
  shape: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
  """Checks that the features are there, of one shape, which it returns."""
  for feature in spec:
    name = feature.name
    if name not in features:
      raise ValueError(
        f'{field}[{name!r}] is missing; given {sorted(features)}, the schema '
        f'asks for {[f.name for f in spec]}'
      )
    found = np.shape(features[name])
    if shape is None:
      shape = found
    if found != shape:
      raise ValueError(f'{field}[{name!r}] has shape {found}; expected {shape}')
  return shape or ()


def _check_values(
  field: str,
  features: Mapping[str, Any],
  spec: Sequence[schema_lib.Feature],
  real: np.ndarray | None = None,
) -> None:
  """Checks ids and numbers where `real`; device arrays only by dtype.

  Reading a device array back would stall the device. What slips through there
  is not lost: an id outside its table makes the score NaN.
  """
  for feature in spec:
    value = features[feature.name]
    is_id = isinstance(feature, schema_lib.Categorical)
    if is_id != np.issubdtype(value.dtype, np.integer):
      wanted = 'integer ids' if is_id else 'floating-point values'
      raise ValueError(
        f'{field}[{feature.name!r}] has dtype {value.dtype}; expected {wanted}'
      )
    if not isinstance(value, np.ndarray):
      continue
    if isinstance(feature, schema_lib.Categorical):
      bad = (value < 0) | (value >= feature.size)
      wanted = f'an id in [0, {feature.size})'
    else:
      bad = ~np.isfinite(value)
      wanted = 'a finite number'
    if real is not None:
      bad &= real
    if bad.any():
      where = tuple(int(i) for i in np.argwhere(bad)[0])
      raise ValueError(
        f'{field}[{feature.name!r}]{list(where)} is {value[where]}; expected '
        f'{wanted}'
      )
