"""Operations with several implementations."""

from histjax.ops.candidate_tower.api import (
  candidate_tower,
  candidate_tower_backend,
  has_cpu_kernel,
  tower_reads_pages,
)
from histjax.ops.candidate_tower.reference import TowerWeights
from histjax.ops.dispatch import target_platform
from histjax.ops.history_attention.api import (
  history_attention,
  history_attention_backend,
)
from histjax.ops.history_attention.reference import attention_weights
from histjax.ops.interaction_head.api import interaction_head
from histjax.ops.interaction_head.weights import HeadShape, HeadWeights
from histjax.ops.keys_values.api import keys_values
from histjax.ops.keys_values.histories import read_histories
from histjax.ops.keys_values.reference import KeyValueWeights

__all__ = [
  'HeadShape',
  'HeadWeights',
  'KeyValueWeights',
  'TowerWeights',
  'attention_weights',
  'candidate_tower',
  'candidate_tower_backend',
  'has_cpu_kernel',
  'history_attention',
  'history_attention_backend',
  'interaction_head',
  'keys_values',
  'read_histories',
  'target_platform',
  'tower_reads_pages',
]
