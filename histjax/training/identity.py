"""Whether two runs are the same: their configs, and what their data holds."""

from __future__ import annotations

import copy
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from histjax import config as dicts
from histjax.training.config import TrainConfig

_FREE = (
  'keep_checkpoints',
  'pipeline.num_threads',
  'pipeline.prefetch',
  'tensorboard',
)
"""Fields that a resumed run may change: they change no result."""
_PATHS = ('data_dir', 'manual_dir', 'paths', 'prepared')
"""Fields of `data`, at any depth, that say where files lie. They may change,
too: it is the fingerprint that says whether the data is the same."""


def check_same_run(
  config: TrainConfig, old: dict[str, Any], workdir: pathlib.Path
) -> None:
  """Raises ValueError, with the fields, unless `old` is the same run.

  Args:
    config: the run that is asked for.
    old: `to_dict` of the config of the one in `workdir`.
    workdir: its folder.
  """
  lines = run_differences(old, config, ('in workdir', 'asked for'))
  if lines:
    raise ValueError(
      f'workdir={str(workdir)!r} holds a run of another config; name another '
      'workdir, or take over these fields:\n' + '\n'.join(lines)
    )


def run_differences(
  old: dict[str, Any], config: TrainConfig, names: tuple[str, str]
) -> list[str]:
  """`config.differences` in the fields that can change a run's result.

  Args:
    old: `to_dict` of a config.
    config: the other.
    names: what to call the two.
  """
  return dicts.differences(
    of_result(old), of_result(dicts.to_dict(config)), names
  )


def of_result(values: dict[str, Any]) -> dict[str, Any]:
  """Without the fields that change no result."""
  values = _map_paths(values, lambda unused_field, unused_value: None)
  for field in _FREE:
    *parents, name = field.split('.')
    at: Any = values
    for parent in parents:
      at = at.get(parent)
      at = at if isinstance(at, dict) else {}
    at.pop(name, None)
  return values


def saved(config: TrainConfig) -> dict[str, Any]:
  """`to_dict` of a config whose paths hold in any current folder."""

  def absolute(unused_field, value):
    if isinstance(value, (list, tuple)):
      return [absolute(unused_field, v) for v in value]
    return value and os.path.abspath(os.path.expanduser(value))

  return _map_paths(dicts.to_dict(config), absolute)


def with_paths(values: dict[str, Any], **paths: Any) -> dict[str, Any]:
  """A run's config with its data at other places.

  Args:
    values: `to_dict` of a `TrainConfig`.
    **paths: by field of `data`: `paths`, `data_dir`, `manual_dir`; those that
      are None stay as they are.

  Raises:
    ValueError: the run's data has no such field.
  """
  left = {k: v for k, v in paths.items() if v is not None}
  found: set[str] = set()

  def replace(field, value):
    # Data of one kind has neither files nor folders of another.
    found.add(field)
    return left.get(field, value)

  values = _map_paths(values, replace)
  if unknown := sorted(left.keys() - found):
    raise ValueError(
      f'{unknown[0]}={left[unknown[0]]!r}: the data of this run has no such '
      f'field; it has {sorted(found)}'
    )
  return values


def _map_paths(
  values: dict[str, Any], change: Callable[[str, Any], Any]
) -> dict[str, Any]:
  """A deep copy with `change(field, value)` for each of `_PATHS` in data."""

  def walk(value):
    if isinstance(value, dict):
      return {
        k: change(k, v) if k in _PATHS else walk(v) for k, v in value.items()
      }
    return [walk(v) for v in value] if isinstance(value, list) else value

  values = copy.deepcopy(values)
  return {**values, 'data': walk(values.get('data'))}


def of_run(
  values: Mapping[str, Any], workdir: str | os.PathLike[str]
) -> TrainConfig:
  """The config that a run was saved with.

  Args:
    values: `load_variables` or `load_meta` has them.
    workdir: of the run.

  Raises:
    ValueError: it is of a version of histjax with other fields.
  """
  try:
    return dicts.from_dict(TrainConfig, values)
  except ValueError as e:
    raise ValueError(
      f'workdir={str(workdir)!r}: the config of this run is not one of this '
      f'version of histjax ({e}): import the modules of classes of your own '
      'first (--modules), train again in another workdir, or use the version '
      'that it was trained with'
    ) from e


def check_fingerprint(
  found: str,
  trained: str,
  workdir: str | os.PathLike[str],
  flag: str = '--config.data.source.paths',
) -> None:
  """Raises ValueError if the data is not what the run was trained on.

  Args:
    found: `fingerprint.fingerprint` of the data.
    trained: that of the run.
    workdir: of the run.
    flag: that names files of a log.
  """
  if found != trained:
    raise ValueError(
      f'workdir={str(workdir)!r}: the data has changed since this run was '
      f'trained (its fingerprint is {found[:12]}, that of the run '
      f'{trained[:12]}): users, times, features, labels or splits differ. Name '
      f'the files as they were ({flag}), or train again in another workdir'
    )
