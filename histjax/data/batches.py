"""Checks a batch on the host before it meets a device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from histjax.data.schema import Categorical, Feature, Schema
from histjax.types import RankingBatch


def validate_batch(batch: RankingBatch, schema: Schema) -> None:
  """Checks shapes, types and values of a batch, padding included.

  A device does not: an id outside its table or a range beyond the history
  would silently read something else there.

  Args:
    batch: of NumPy (or device) arrays.
    schema: what it must hold.

  Raises:
    ValueError: a field is missing, unknown, or has a bad shape, type or value.
  """
  group = np.asarray(batch.group)
  if group.ndim != 1:
    raise ValueError(f'batch.group has shape {group.shape}; it must be [B]')
  rows = (len(group),)
  _features('context', batch.context, schema.context, rows)
  events = _width('history.features', batch.history.features, rows)
  _features(
    'history.features',
    batch.history.features,
    schema.history_features,
    (*rows, events),
  )
  length = _whole('history.length', batch.history.length, rows)
  _range('history.length', length, 0, events)
  shape = (
    *rows,
    _width('candidates.features', batch.candidates.features, rows),
  )
  _features(
    'candidates.features',
    batch.candidates.features,
    schema.item_features,
    shape,
  )
  if batch.candidates.visible is not None:
    visible = _whole('candidates.visible', batch.candidates.visible, shape)
    _range('candidates.visible', visible, 0, events)
    bad = np.argwhere(visible > length[:, None])
    if bad.size:
      b, c = bad[0]
      raise ValueError(
        f'batch.candidates.visible[{b}, {c}] = {visible[b, c]} is beyond the '
        f'history: history.length[{b}] = {length[b]}; a candidate sees at '
        'most the events there are'
      )
  mask = np.ones(shape, bool)
  if batch.candidates.mask is not None:
    mask = np.asarray(batch.candidates.mask)
    if mask.shape != shape or mask.dtype != bool:
      raise ValueError(
        f'batch.candidates.mask is {mask.dtype}{list(mask.shape)}; it must be '
        f'bool{list(shape)}'
      )
  if batch.labels:
    _names('labels', batch.labels, [t.name for t in schema.tasks])
  for name, values in batch.labels.items():
    values = _shaped(f'labels[{name!r}]', values, shape)
    _report(
      f'labels[{name!r}]',
      values,
      mask & (values != 0) & (values != 1),
      'a label is 0 or 1',
    )


def _features(
  field: str,
  given: Mapping[str, np.ndarray],
  features: tuple[Feature, ...],
  shape: tuple[int, ...],
) -> None:
  _names(field, given, [f.name for f in features])
  for feature in features:
    name = f'{field}[{feature.name!r}]'
    if isinstance(feature, Categorical):
      values = _whole(name, given[feature.name], shape)
      _range(name, values, 0, feature.size - 1)
      continue
    values = _shaped(name, given[feature.name], shape)
    if not np.issubdtype(values.dtype, np.floating):
      raise ValueError(f'batch.{name} is {values.dtype}; it must be float32')
    _report(name, values, ~np.isfinite(values), 'it must be finite')


def _names(field: str, given: Mapping, wanted: list[str]) -> None:
  missing = [name for name in wanted if name not in given]
  unknown = [name for name in given if name not in wanted]
  if missing or unknown:
    raise ValueError(
      f'batch.{field} lacks {missing} and has unknown {unknown}; the schema '
      f'has {wanted}'
    )


def _width(field: str, features: Mapping, rows: tuple[int]) -> int:
  for name, values in features.items():
    shape = np.shape(values)
    if len(shape) != 2 or shape[:1] != rows:
      raise ValueError(
        f'batch.{field}[{name!r}] has shape {shape}; it must be '
        f'[{rows[0]}, any]'
      )
    return shape[1]
  raise ValueError(f'batch.{field} is empty; the schema says what it needs')


def _shaped(name: str, values, shape: tuple[int, ...]) -> np.ndarray:
  values = np.asarray(values)
  if values.shape != shape:
    raise ValueError(
      f'batch.{name} has shape {values.shape}; it must be {shape}'
    )
  return values


def _whole(name: str, values, shape: tuple[int, ...]) -> np.ndarray:
  values = _shaped(name, values, shape)
  if not np.issubdtype(values.dtype, np.integer):
    raise ValueError(f'batch.{name} is {values.dtype}; it must be int32')
  return values


def _range(name: str, values: np.ndarray, low: int, high: int) -> None:
  _report(
    name,
    values,
    (values < low) | (values > high),
    f'it must lie in [{low}, {high}]',
  )


def _report(name: str, values: np.ndarray, bad: np.ndarray, rule: str) -> None:
  if bad.any():
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
      f'batch.{name}{list(place)} = {values[place].item()!r}; {rule}'
    )
