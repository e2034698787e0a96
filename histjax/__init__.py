"""Ranking with long user histories in JAX and Flax.

What it takes to build a ranker, to load one and to score. What reads data
(`make_row`, `collate`) and trains (`histjax.training.train_and_evaluate`) is
imported when it is asked for, with the packages that it needs.
"""

from typing import TYPE_CHECKING, Any

from histjax.cache import HistoryCache, quantize, stack
from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn.encoder import EncoderConfig
from histjax.nn.interaction import InteractionConfig
from histjax.ops import candidate_tower, history_attention
from histjax.schema import Categorical, Dense, Schema, Task
from histjax.scoring.config import ScorerConfig
from histjax.scoring.scorer import Scorer
from histjax.types import (
  Candidates,
  History,
  KeyRange,
  RankingBatch,
)

if TYPE_CHECKING:
  from histjax.data.requests import make_row
  from histjax.data.rows import collate

__version__ = '0.1.0'

_LAZY = {
  'collate': 'histjax.data.rows',
  'make_row': 'histjax.data.requests',
}


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*__all__, '__version__']


__all__ = [
  'Candidates',
  'Categorical',
  'Dense',
  'EncoderConfig',
  'History',
  'HistoryCache',
  'InteractionConfig',
  'KeyRange',
  'Ranker',
  'RankerConfig',
  'RankingBatch',
  'Schema',
  'Scorer',
  'ScorerConfig',
  'Task',
  'candidate_tower',
  'collate',
  'history_attention',
  'make_row',
  'quantize',
  'stack',
]
