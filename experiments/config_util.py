"""Between the library's frozen dataclasses and `ml_collections` configs.

A config file names what differs from the defaults; `config_dict` adds the
rest, so that every field can be set on the command line, with its type:

    --config.model.encoder.num_layers=4 --config.optimizer.learning_rate=3e-4

A name that is not a field is refused. The model's schema is the dataset's, and
is not part of the config.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict as config_dict_lib

from histjax import config as config_lib
from histjax.data import datasets
from histjax.schema import Categorical, Schema, Task
from histjax.training.config import TrainConfig

_ANY_SCHEMA = Schema(
  user='user', time='time', item=(Categorical('item', 1),), tasks=(Task('y'),)
)


def config_dict(values: dict[str, Any]) -> ml_collections.ConfigDict:
  """All fields of a `TrainConfig`, typed; `values` in place of defaults.

  Args:
    values: `{field: value or dict of fields}`, as `config.from_dict` takes;
      without `model.schema`.

  Raises:
    ValueError: an unknown field, or a value of the wrong type.
  """
  model = {**values.get('model', {}), 'schema': _ANY_SCHEMA}
  # Their names are checked against the dataset's tasks, later.
  late = {k: v for k, v in values.items() if k in ('select', 'task_weights')}
  checked = {k: v for k, v in values.items() if k not in late}
  config = config_lib.from_dict(TrainConfig, {**checked, 'model': model})
  full = {**config_lib.to_dict(config), **late}
  del full['model']['schema']
  return _typed(TrainConfig, full)


def load(
  config: ml_collections.ConfigDict,
) -> tuple[TrainConfig, datasets.Dataset]:
  """The run that a config describes, and its dataset.

  Raises:
    ValueError: the config or the data is bad; the message says where.
  """
  values = config.to_dict()
  data = config_lib.from_dict(datasets.DataConfig, values['data'])
  dataset = datasets.load(data)
  values['data'] = data
  values['model']['schema'] = dataset.schema
  return config_lib.from_dict(TrainConfig, values), dataset


def _typed(hint: Any, value: Any) -> Any:
  """`value` with ConfigDicts for dataclasses and typed Nones."""
  members = [hint]
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    members = [m for m in typing.get_args(hint) if m is not type(None)]
  if value is None:
    scalar = members[0] if members[0] in (int, float, str) else object
    return config_dict_lib.placeholder(scalar)
  if isinstance(value, dict):
    classes = {m.__name__.lower(): m for m in members if _is_dataclass(m)}
    cls = classes.get(value.get(config_lib.TYPE), members[0])
    hints = typing.get_type_hints(cls) if _is_dataclass(cls) else {}
    return ml_collections.ConfigDict(
      {k: _typed(hints.get(k, Any), v) for k, v in value.items()}
    )
  if isinstance(value, list) and not any(isinstance(v, dict) for v in value):
    return tuple(value)
  return value


def _is_dataclass(hint: Any) -> bool:
  return isinstance(hint, type) and dataclasses.is_dataclass(hint)
