"""The mean rate of what the user was shown last."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from histjax import config as dicts
from histjax.features import base, rates
from histjax.schema import Dense, Feature, Schema


@dataclasses.dataclass(frozen=True)
class RecentRates(base.DerivedFeature):
  """For each feature of `Rates`, its mean over the user's last events.

      recent_rate_<name> = sum of rate_<name> over the last events / last

  It tells what was shown, not what came of it, and so is the same whatever
  history a candidate sees. In `DataConfig.features` it comes after `Rates`.

  Attributes:
    last: how many events.
  """

  last: int

  def __post_init__(self):
    dicts.normalize(self)
    if self.last < 1:
      raise ValueError(
        f'data.features: RecentRates.last={self.last} must be >= 1'
      )

  def check(self, schema: Schema) -> None:
    """Raises ValueError if there are no rates."""
    if not _rates(schema):
      raise ValueError(
        'data.features: RecentRates needs Rates, which must come before it'
      )

  def merge(self, parts: Sequence[base.State], schema: Schema) -> base.State:
    """Notes which rates there are."""
    del parts
    return {'rates': np.array(_rates(schema))}

  def features(self, schema: Schema, state: base.State) -> tuple[Feature, ...]:
    """One dense feature a rate."""
    names = state['rates'].tolist()
    return tuple(Dense(f'recent_{name}') for name in names)

  def lookback(self, history_length: int | None) -> base.Lookback:
    """The last events."""
    del history_length
    return base.Lookback(events=self.last)

  def apply(
    self,
    events: base.Events,
    impressions: base.Impressions,
    state: base.State,
  ) -> dict[str, np.ndarray]:
    """See the class."""
    found = {}
    for name in state['rates'].tolist():
      rate = events.features[name].astype(np.float64)
      total = np.zeros(len(impressions.shown))
      # One by one, the last first: the difference of two running sums would
      # depend on what came before them.
      for back in range(1, self.last + 1):
        place = impressions.shown - back
        some = place >= impressions.begin
        total[some] += rate[place[some]]
      found[f'recent_{name}'] = (total / self.last).astype(np.float32)
    return found


def _rates(schema: Schema) -> list[str]:
  return [f.name for f in schema.derived if f.name.startswith(rates.PREFIX)]
