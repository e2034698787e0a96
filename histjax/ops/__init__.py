"""Operations with several implementations."""

from histjax.ops.candidate_tower.api import (
  candidate_tower,
  candidate_tower_backend,
  has_cpu_kernel,
)
from histjax.ops.candidate_tower.reference import TowerWeights
from histjax.ops.dispatch import target_platform
from histjax.ops.history_attention.api import (
  history_attention,
  history_attention_backend,
)

__all__ = [
  'TowerWeights',
  'candidate_tower',
  'candidate_tower_backend',
  'has_cpu_kernel',
  'history_attention',
  'history_attention_backend',
  'target_platform',
]
