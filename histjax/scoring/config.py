"""How a scorer pads and splits its work."""

from __future__ import annotations

import dataclasses

from histjax import buckets, quantization
from histjax import config as dicts

_SMALLEST_HISTORY = 16
_SMALLEST_CANDIDATES = 16


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
  """How a `Scorer` pads and splits its work.

  Attributes:
    microbatch: candidates per row scored at once from a cache.
    plain_microbatch: the same for `score_plain`, where each is a whole pass.
    history_buckets: the lengths to pad histories to, ascending; a longer
      history is refused. Empty: `buckets.bucket_size`, without a limit.
    candidate_buckets: the same for candidates, up to `microbatch`; beyond it
      they are padded to a multiple of `microbatch`.
    row_buckets: the same for rows. Empty: powers of two.
    new_event_buckets: the same for the new events of `extend`.
    cache_dtype: what `encode` keeps keys and values as, 'int8' or
      'float8_e4m3fn' with scales (see `histjax.quantization`); None: the
      model's type.
    cuda_graphs: on an NVIDIA GPU, whether `warm_up` records programs that score
      as CUDA graphs, which are launched without XLA's dispatch, see
      `scoring.graphs`. It costs the memory that each takes while it runs.
  """

  microbatch: int = 1024
  plain_microbatch: int = 64
  history_buckets: tuple[int, ...] = ()
  candidate_buckets: tuple[int, ...] = ()
  row_buckets: tuple[int, ...] = ()
  new_event_buckets: tuple[int, ...] = ()
  cache_dtype: quantization.Kind | None = None
  cuda_graphs: bool = True

  def __post_init__(self):
    dicts.normalize(self)
    for field in ('microbatch', 'plain_microbatch'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be at least 1')
    for field in (
      'history_buckets',
      'candidate_buckets',
      'row_buckets',
      'new_event_buckets',
    ):
      buckets.check(field, getattr(self, field))

  def rows(self, number: int) -> int:
    """What so many rows are padded to."""
    return buckets.fit(number, self.row_buckets, 'rows', 1)

  def events(self, number: int) -> int:
    """What histories of so many events at most are padded to."""
    return buckets.fit(
      number, self.history_buckets, 'events in a history', _SMALLEST_HISTORY
    )

  def new_events(self, number: int) -> int:
    """What so many new events at most are padded to."""
    return buckets.fit(number, self.new_event_buckets, 'new events', 1)

  def candidates(self, number: int, microbatch: int) -> int:
    """What so many candidates a row are padded to."""
    if number > microbatch:
      return -(-number // microbatch) * microbatch
    found = buckets.fit(
      number, self.candidate_buckets, 'candidates', _SMALLEST_CANDIDATES
    )
    return min(found, microbatch)
