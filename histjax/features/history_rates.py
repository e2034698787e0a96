"""How labels came out over the events that a candidate sees."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from histjax import config as dicts
from histjax.features import base
from histjax.schema import Dense, Feature, Schema


@dataclasses.dataclass(frozen=True)
class HistoryRates(base.DerivedFeature):
  """How each task's labels came out over the events visible to the candidate.

  Over those with the candidate's value of a categorical feature of items, or
  over all, '*'. Of n such events, k of them positive,

      history_<task>_<feature> = log((k + 1) / (n - k + 1))
      history_count_<feature> = log(1 + n)

  (of '*': `history_<task>` and `history_count`). 'tab@5' and '*@5' count the
  last 5 of those alone: `history_<task>_tab_last5` and `history_<task>_last5`,
  without a count. An event keeps its own when it becomes history. They tell
  numbers; softmax attention alone tells means.

  Attributes:
    by: names of features, or '*'; each may end in '@<number of events>'.
  """

  by: tuple[str, ...]

  needs_labels: ClassVar[bool] = True
  of_view: ClassVar[bool] = True

  def __post_init__(self):
    dicts.normalize(self)
    suffixes = [suffix for _, _, suffix in self._parts()]
    if not self.by or len(set(suffixes)) < len(suffixes):
      raise ValueError(
        f'data.features: HistoryRates.by={self.by} must name at least one, '
        'each once'
      )

  def _parts(self) -> list[tuple[str | None, int | None, str]]:
    """Feature (None: any event), how many (None: all), the names' ending."""
    parts = []
    for entry in self.by:
      name, last = base.feature_and_last(entry, 'HistoryRates.by')
      suffix = '' if name == '*' else f'_{name}'
      suffix += '' if last is None else f'_last{last}'
      parts.append((None if name == '*' else name, last, suffix))
    return parts

  def reads(self) -> tuple[str, ...]:
    """The features that events are told apart by."""
    return tuple(dict.fromkeys(n for n, _, _ in self._parts() if n is not None))

  def check(self, schema: Schema) -> None:
    """Raises ValueError if there are no such features."""
    base.check_names(self, 'by', schema, self.reads())

  def features(self, schema: Schema, state: base.State) -> tuple[Feature, ...]:
    """Dense features, one a task, and the count."""
    found = []
    for _, last, suffix in self._parts():
      what = [t.name for t in schema.tasks]
      if last is None:
        what.append('count')
      found += [Dense(f'history_{w}{suffix}') for w in what]
    return tuple(found)

  def lookback(self, history_length: int | None) -> base.Lookback | None:
    """All events that the candidate sees; of '*@5' alone the last 5."""
    events = 0
    for name, last, _ in self._parts():
      reach = last if name is None else None  # A value may be far back.
      if history_length is not None:
        reach = history_length if reach is None else min(reach, history_length)
      if reach is None:
        return None
      events = max(events, reach)
    return base.Lookback(events=events)

  def apply(
    self,
    events: base.Events,
    impressions: base.Impressions,
    state: base.State,
  ) -> dict[str, np.ndarray]:
    """See the class."""
    found = {}
    num_events = len(events)
    for name, last, suffix in self._parts():
      order = np.arange(num_events)
      low, high = impressions.start, impressions.visible
      if name is not None:
        # Events by value; those of one value stay in order.
        value = events.features[name]
        order = np.argsort(value, kind='stable')
        place = value[order].astype(np.int64) * num_events + order
        first = impressions.features[name].astype(np.int64) * num_events
        low = np.searchsorted(place, first + impressions.start)
        high = np.searchsorted(place, first + impressions.visible)
      if last is not None:
        low = np.maximum(low, high - last)
      n = high - low
      if last is None:
        found[f'history_count{suffix}'] = np.log1p(n).astype(np.float32)
      for task in events.schema.tasks:
        label = events.labels[task.name][order]
        total = np.append(0.0, np.cumsum(label, dtype=np.float64))
        k = total[high] - total[low]
        odds = np.log((k + 1) / (n - k + 1))
        found[f'history_{task.name}{suffix}'] = odds.astype(np.float32)
    return found
