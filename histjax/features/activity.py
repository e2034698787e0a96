"""How much the user was shown lately."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from histjax import config as dicts
from histjax.features import base
from histjax.schema import Dense, Feature, Schema


@dataclasses.dataclass(frozen=True)
class Activity(base.DerivedFeature):
  """Numbers of the user's earlier events within spans of time.

  Of an impression at time t whose user was shown events at t_1 .. t_n before:

      activity_<span> = log(1 + #{i: t - t_i <= span})
      activity_since = log(1 + max(0, t - t_n)) / 10

  in seconds; t_n is the log's first time if n = 0. They tell what was shown,
  not what came of it, and so are the same whatever history a candidate sees.

  Attributes:
    spans: in whole seconds, each >= 1.
  """

  spans: tuple[int, ...]

  needs_time: ClassVar[bool] = True

  def __post_init__(self):
    dicts.normalize(self)
    spans = self.spans
    if not spans or min(spans) < 1 or len(set(spans)) < len(spans):
      raise ValueError(
        f'data.features: Activity.spans={spans} must be whole seconds >= 1, '
        'each once'
      )

  def collect(self, events: base.Events, train: np.ndarray) -> base.State:
    """Notes the first time."""
    del train
    return {'first': np.asarray(events.time.min())}

  def merge(self, parts: Sequence[base.State], schema: Schema) -> base.State:
    """Notes the log's first time."""
    del schema
    return {'first': np.asarray(min(part['first'] for part in parts))}

  def features(self, schema: Schema, state: base.State) -> tuple[Feature, ...]:
    """One dense feature a span, and one more."""
    names = [f'activity_{span}' for span in self.spans]
    return tuple(Dense(name) for name in (*names, 'activity_since'))

  def lookback(self, history_length: int | None) -> base.Lookback:
    """The longest span, and the last event."""
    del history_length
    return base.Lookback(events=1, seconds=max(self.spans))

  def apply(
    self,
    events: base.Events,
    impressions: base.Impressions,
    state: base.State,
  ) -> dict[str, np.ndarray]:
    """See the class."""
    time, begin = impressions.time, impressions.begin
    times, rank = np.unique(events.time, return_inverse=True)
    # Users and their times as one increasing number.
    step = len(times) + 1
    place = events.begin * step + rank
    found = {}
    for span in self.spans:
      oldest = base.before(time, span, events.seconds)
      oldest = np.searchsorted(times, oldest, 'left')
      first = np.searchsorted(place, begin * step + oldest, 'left')
      # An event of the same request may have been earlier than the span.
      count = np.maximum(impressions.shown - first, 0)
      found[f'activity_{span}'] = np.log1p(count).astype(np.float32)
    # A new user's time may be whole where the log's first one is not.
    kind = np.result_type(time, state['first'])
    last = np.full(len(time), state['first'], kind)
    some = impressions.shown > begin
    last[some] = events.time[impressions.shown[some] - 1]
    since = np.maximum(time - last, 0) * events.seconds
    found['activity_since'] = (np.log1p(since) / 10).astype(np.float32)
    return found
