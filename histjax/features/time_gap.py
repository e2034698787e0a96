"""The time since the last event that the user had been through."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from histjax import config as dicts
from histjax.features import base
from histjax.schema import Categorical, Feature, Schema


@dataclasses.dataclass(frozen=True)
class TimeGap(base.DerivedFeature):
  """`time_gap`, a bucket of the time from the last visible event.

      time_gap = min(floor(log2(1 + seconds)), buckets - 1)

  and 0 if there is none. An event keeps its bucket when it becomes history.

  Attributes:
    buckets: how many there are.
  """

  buckets: int = 24

  needs_time: ClassVar[bool] = True
  of_view: ClassVar[bool] = True

  def __post_init__(self):
    dicts.normalize(self)
    if self.buckets < 1:
      raise ValueError(
        f'data.features: TimeGap.buckets={self.buckets} must be >= 1'
      )

  def features(self, schema: Schema, state: base.State) -> tuple[Feature, ...]:
    """One categorical feature."""
    return (Categorical('time_gap', self.buckets),)

  def lookback(self, history_length: int | None) -> base.Lookback:
    """One event."""
    del history_length
    return base.Lookback(events=1)

  def apply(
    self,
    events: base.Events,
    impressions: base.Impressions,
    state: base.State,
  ) -> dict[str, np.ndarray]:
    """See the class."""
    stop = impressions.visible
    gap = np.zeros(len(stop), impressions.time.dtype)
    some = stop > impressions.begin
    gap[some] = impressions.time[some] - events.time[stop[some] - 1]
    # frexp, not log2: powers of two must not round down.
    bucket = np.frexp(1 + gap * events.seconds)[1] - 1
    return {'time_gap': np.minimum(bucket, self.buckets - 1).astype(np.int32)}
