"""Scoring: one pass over a history, then any number of candidates.

`scorer` is the class that users hold, `programs` what it compiles, `inputs`
what it checks and pads on the host before, `fingerprint` how it knows its own
caches.
"""

from histjax.scoring.programs import score_microbatched, score_plain
from histjax.scoring.scorer import Logits, Scorer, ScorerConfig

__all__ = [
  'Logits',
  'Scorer',
  'ScorerConfig',
  'score_microbatched',
  'score_plain',
]
