"""What the user's last events were of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from histjax import config as dicts
from histjax.features import base
from histjax.schema import Dense, Feature, Schema

_LEAST_SHARE = 0.01  # Of training events, for a value to have a feature.


@dataclasses.dataclass(frozen=True)
class RecentShares(base.DerivedFeature):
  """Shares of a feature's values among what the user was shown last.

  'tab@10' adds for each value v of the feature `tab` that at least one in a
  hundred training events has (shares of rarer ones tell users apart)

      recent_tab_<v>_of_10 = #{of the 10 last events shown before: tab = v} / 10

  They tell what was shown, not what came of it, and so are the same whatever
  history a candidate sees.

  Attributes:
    of: each a categorical feature of items, '@' and a number of events >= 1.
  """

  of: tuple[str, ...]

  def __post_init__(self):
    dicts.normalize(self)
    for name in self.of:
      if base.feature_and_last(name, 'RecentShares.of')[1] is None:
        raise ValueError(
          f'data.features: RecentShares.of has {name!r}; it must be '
          "'<feature>@<number of events>'"
        )
    if not self.of or len(set(self._parts())) < len(self.of):
      raise ValueError(
        f'data.features: RecentShares.of={self.of} must name at least one, '
        'each once'
      )

  def _parts(self) -> list[tuple[str, int]]:
    parts = [base.feature_and_last(name, 'RecentShares.of') for name in self.of]
    return [(name, last) for name, last in parts if last is not None]

  def reads(self) -> tuple[str, ...]:
    """The features whose values are counted."""
    return tuple(dict.fromkeys(name for name, _ in self._parts()))

  def check(self, schema: Schema) -> None:
    """Raises ValueError if there are no such features."""
    base.check_names(self, 'of', schema, self.reads())

  def collect(self, events: base.Events, train: np.ndarray) -> base.State:
    """Counts values."""
    found: dict[str, np.ndarray] = {}
    for name in self.reads():
      value, count = np.unique(events.features[name][train], return_counts=True)
      found |= {f'{name}/values': value, f'{name}/count': count}
    return found

  def merge(self, parts: Sequence[base.State], schema: Schema) -> base.State:
    """Finds the values that are not rare."""
    del schema
    state = {}
    for name in self.reads():
      value, (count,) = base.summed(parts, f'{name}/values', f'{name}/count')
      state[name] = value[count >= max(1, _LEAST_SHARE * count.sum())]
    return state

  def features(self, schema: Schema, state: base.State) -> tuple[Feature, ...]:
    """One dense feature a value and number of events."""
    return tuple(
      Dense(f'recent_{name}_{value}_of_{last}')
      for name, last in self._parts()
      for value in state[name].tolist()
    )

  def lookback(self, history_length: int | None) -> base.Lookback:
    """The longest of them."""
    del history_length
    return base.Lookback(events=max(last for _, last in self._parts()))

  def apply(
    self,
    events: base.Events,
    impressions: base.Impressions,
    state: base.State,
  ) -> dict[str, np.ndarray]:
    """See the class."""
    found = {}
    stop = impressions.shown
    for name, last in self._parts():
      start = np.maximum(impressions.begin, stop - last)
      for value in state[name].tolist():
        total = np.append(0, np.cumsum(events.features[name] == value))
        share = (total[stop] - total[start]) / last
        found[f'recent_{name}_{value}_of_{last}'] = share.astype(np.float32)
    return found
