"""How labels came out over the events that a candidate sees."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from histjax.schema import Schema


def history_rates(
  schema: Schema,
  labels: Mapping[str, np.ndarray],
  history: Mapping[str, np.ndarray],
  candidates: Mapping[str, np.ndarray],
  start: np.ndarray,
  stop: np.ndarray,
) -> dict[str, np.ndarray]:
  """The features that `Schema.history_rates` adds, of candidates.

  Args:
    schema: names them.
    labels: `{task: [n]}`, 0 or 1, of all events.
    history: `{name: int [n]}`, the values of all events.
    candidates: `{name: int [c]}`, the values of candidates.
    start: int `[c]`, the first event that each candidate sees.
    stop: int `[c]`, the event after the last one.

  Returns:
    `{feature: float32 [c]}`.
  """
  found = {}
  num_events = len(next(iter(labels.values())))
  for rate in schema.rates_of_history:
    order, low, high = np.arange(num_events), start, stop
    if rate.feature is not None:
      # Events by value; those of one value stay in order.
      value = history[rate.feature]
      order = np.argsort(value, kind='stable')
      place = value[order].astype(np.int64) * num_events + order
      base = candidates[rate.feature].astype(np.int64) * num_events
      low = np.searchsorted(place, base + start)
      high = np.searchsorted(place, base + stop)
    if rate.last is not None:
      low = np.maximum(low, high - rate.last)
    n = high - low
    if rate.last is None:
      found[f'history_count{rate.suffix}'] = np.log1p(n).astype(np.float32)
    for task in schema.tasks:
      label = labels[task.name][order]
      total = np.append(0.0, np.cumsum(label, dtype=np.float64))
      k = total[high] - total[low]
      odds = np.log((k + 1) / (n - k + 1))
      found[f'history_{task.name}{rate.suffix}'] = odds.astype(np.float32)
  return found
