"""Training, evaluation and checkpoints.

`TrainConfig` and `train_and_evaluate` are imported when they are asked for,
with the packages that read data; steps and folders need none of those.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from histjax.training.config import TrainConfig
  from histjax.training.loop import train_and_evaluate

_LAZY = {
  'TrainConfig': 'histjax.training.config',
  'train_and_evaluate': 'histjax.training.loop',
}


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return list(__all__)


__all__ = ['TrainConfig', 'train_and_evaluate']
