"""How the candidate meets the history.

Every fusion is a module with one signature, so that they can be compared:

    fused = fusion(history, candidates, length, visible)      # [B, C, D]

An *amortizable* one also has `encode`, `score` and `extend`, which split that
call into a part that depends on the history alone and a part per candidate:

    keys, values = fusion.encode(history, length)
    fused = fusion.score(keys, values, length, candidates, visible)

Here `history` and `candidates` are tokens `[B, L, D]` and `[B, C, D]`,
`length` is int32 `[B]`, and `visible` int32 `[B, C]` or None for all events.
A *packable* one also takes the `segments` of packed rows, by that name.

One that has a *tower* scores by `ops.candidate_tower` when it is given packed
weights: `apply({'params': params, 'tower': fusion.pack(params, dtype)}, ..)`.
"""

from __future__ import annotations

from histjax.nn.fusion.append import AppendCross, AppendIsolated
from histjax.nn.fusion.base import Fusion
from histjax.nn.fusion.cross import CrossOnly
from histjax.nn.fusion.late import MeanPool, NoHistory, TargetAttention
from histjax.nn.fusion.per_candidate import AppendSelf, Concat

FUSIONS: dict[str, type[Fusion]] = {
  'append_cross': AppendCross,
  'append_isolated': AppendIsolated,
  'cross_only': CrossOnly,
  'append_self': AppendSelf,
  'concat': Concat,
  'target_attention': TargetAttention,
  'mean_pool': MeanPool,
  'none': NoHistory,
}


def amortizable() -> tuple[str, ...]:
  """The names of the fusions that have encode, score and extend."""
  return tuple(name for name, f in FUSIONS.items() if f.amortizable)


def packable() -> tuple[str, ...]:
  """The names of the fusions that take packed rows."""
  return tuple(name for name, f in FUSIONS.items() if f.packable)


__all__ = [
  'FUSIONS',
  'AppendCross',
  'AppendIsolated',
  'AppendSelf',
  'Concat',
  'CrossOnly',
  'Fusion',
  'MeanPool',
  'NoHistory',
  'TargetAttention',
  'amortizable',
  'packable',
]
