"""Between the library's frozen dataclasses and `ml_collections` configs.

A config file names what differs from the defaults; `config_dict` adds the
rest. `Config` is the flag: every field can be set on the command line, see
`overrides`:

    --config.model.encoder.num_layers=4 --config.optimizer.learning_rate=3e-4

A name that is not a field is refused. The model's schema is the dataset's, and
is not part of the config.
"""

from __future__ import annotations

import pathlib
import sysconfig
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import flag_util
import overrides
from histjax import config as config_lib
from histjax.data import datasets
from histjax.schema import Categorical, Schema, Task
from histjax.training.config import TrainConfig

flags.disclaim_key_flags()  # --config is the binaries'; --help shows it.

_LATE = ('select', 'task_weights', 'max_unique_ids')
_ANY_SCHEMA = Schema(
  user='user', time='time', item=(Categorical('item', 1),), tasks=(Task('y'),)
)


class Config:
  """The flag `--config`, a file, and `--config.<field>` for each field.

  _CONFIG = Config(TrainConfig, 'The run.')
  app.run(main, flags_parser=_CONFIG.parse)
  """

  def __init__(self, cls: type, description: str, *, required: bool = True):
    """Defines the flag.

    Args:
      cls: the dataclass that says which fields there are.
      description: what the config is.
      required: whether it has to be given.
    """
    self._cls = cls
    self._overrides: list[tuple[str, Any]] = []
    # It would look for overrides in sys.argv, without knowing their types.
    self._flag = config_flags.DEFINE_config_file(
      'config',
      None,
      f'{description} Every field can be set, as --config.seed=1.',
      sys_argv=[],
    )
    if required:
      flags.mark_flag_as_required('config')

  def parse(self, argv: Sequence[str]) -> list[str]:
    """Parses flags, for `app.run(flags_parser=..)`."""
    flag_util.look_here()  # A config file imports what is beside it.
    rest, self._overrides = overrides.split_argv(argv, 'config')
    try:
      return flags.FLAGS(rest)
    except Exception as error:  # The file is code, and may raise anything.
      cause: BaseException = error
      of_file = 'flag --config=' in str(error)
      while (  # What the file itself raised, and not how it came to be told.
        of_file
        and cause.__context__ is not None
        and isinstance(cause, (flags.Error, ValueError, OSError))
      ):
        cause = cause.__context__
      if isinstance(cause, AttributeError) and cause.name == 'get_config':
        path = getattr(cause.obj, '__file__', None)
        raise SystemExit(
          f'AttributeError: --config: {path} has no get_config(); define it as '
          'experiments/configs/events.py does'
        ) from error
      said = f'{cause}{_at(cause)}'
      if isinstance(error, flags.UnrecognizedFlagError):
        meant = config_lib.paths_of(self._cls, error.flagname)
        if path := next(meant, None):
          said = (
            f'unknown flag --{error.flagname}; did you mean --config.{path}?'
          )
      raise SystemExit(f'{type(cause).__name__}: {said}') from error

  def values(self) -> dict[str, Any]:
    """The config, with what the command line sets.

    Raises:
      ValueError: there is no config, or an override names no field or has a
        value of a wrong type.
      OSError: there is no such file.
    """
    if self._flag.value is None:
      raise ValueError('name a file with --config')
    try:
      values = self._flag.value.to_dict()
    except OSError as error:  # Kept since parsing, with what led to it.
      name = config_flags.get_config_filename(flags.FLAGS['config'])
      if pathlib.Path(name.partition(':')[0]).exists():
        raise OSError(f'--config={name!r}: {error.__cause__}') from error
      raise FileNotFoundError(
        f'--config={name!r} does not exist; name a Python file, as '
        'experiments/configs/synthetic.py'
      ) from error
    for path, _ in self._overrides:
      if self._cls is TrainConfig and f'{path}.'.startswith('model.schema.'):
        raise ValueError(
          f'{path} cannot be set: the schema of the model is that of the '
          'dataset; change the data'
        )
    return overrides.apply(self._cls, values, self._overrides)


def _at(error: BaseException) -> str:
  """The line of a config file behind an error."""
  library = pathlib.Path(config_lib.__file__).parent
  others = {library, pathlib.Path(sysconfig.get_path('stdlib'))}
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    path = pathlib.Path(frame.filename)
    if path.is_file() and path.parent != pathlib.Path(__file__).parent:
      if others.isdisjoint(path.parents) and 'site-packages' not in path.parts:
        return f' ({path}, line {frame.lineno})'
  return ''


def config_dict(values: dict[str, Any]) -> ml_collections.ConfigDict:
  """All fields of a `TrainConfig`; `values` in place of defaults.

  Args:
    values: `{field: value or dict of fields}`, as `config.from_dict` takes;
      without `model.schema`.

  Raises:
    ValueError: an unknown field, or a value of the wrong type.
  """
  model = {**values.get('model', {}), 'schema': _ANY_SCHEMA}
  # Their names are checked against the dataset's tasks and tables, later.
  late = {k: v for k, v in values.items() if k in _LATE}
  checked = {k: v for k, v in values.items() if k not in late}
  config = config_lib.from_dict(TrainConfig, {**checked, 'model': model})
  full = {**config_lib.to_dict(config), **late}
  del full['model']['schema']
  return ml_collections.ConfigDict(_with_tuples(full))


def load(values: dict[str, Any]) -> tuple[TrainConfig, datasets.Dataset]:
  """The run that a config describes, and its dataset.

  Args:
    values: of `Config.values`, or `to_dict` of what `config_dict` returns.

  Raises:
    ValueError: the config or the data is bad; the message says where.
  """
  config_dict(values)  # All but names of tasks and tables, before any work.
  data = config_lib.from_dict(datasets.DataConfig, values['data'])
  dataset = datasets.load(data)
  model = {**values['model'], 'schema': dataset.schema}
  return (
    config_lib.from_dict(TrainConfig, {**values, 'data': data, 'model': model}),
    dataset,
  )


def _with_tuples(value: Any) -> Any:
  """Lists of scalars as tuples, which configs may change as a whole."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  if isinstance(value, list) and not any(isinstance(v, dict) for v in value):
    return tuple(value)
  return value
