"""Scoring: one pass over a history, then any number of candidates.

`scorer` is the class that users hold, `programs` what it compiles, `inputs`
what it checks on the host before. `layout`, `transport` and `weights` say how
requests, logits and parameters come to a program and from it; `fingerprint` is
how a scorer knows its own caches.
"""

from histjax.scoring.config import ScorerConfig
from histjax.scoring.flight import Logits, Pending
from histjax.scoring.programs import score_microbatched, score_plain
from histjax.scoring.scorer import Scorer

__all__ = [
  'Logits',
  'Pending',
  'Scorer',
  'ScorerConfig',
  'score_microbatched',
  'score_plain',
]
