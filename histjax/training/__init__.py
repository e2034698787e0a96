"""Training, evaluation and checkpoints."""

from histjax.training.config import TrainConfig
from histjax.training.loop import train_and_evaluate

__all__ = ['TrainConfig', 'train_and_evaluate']
