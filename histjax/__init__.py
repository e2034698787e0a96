"""Ranking with long user histories in JAX and Flax."""

from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn.encoder import EncoderConfig
from histjax.nn.interaction import InteractionConfig
from histjax.ops import candidate_tower, history_attention
from histjax.schema import Categorical, Dense, Schema, Task
from histjax.scoring.scorer import Scorer, ScorerConfig
from histjax.types import (
  Candidates,
  History,
  HistoryCache,
  KeyRange,
  RankingBatch,
)

__version__ = '0.1.0'

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
  'history_attention',
]
