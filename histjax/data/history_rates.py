"""How labels came out over the events that a candidate sees."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from histjax.data.schema import Schema


def history_rates(
  schema: Schema,
  label: np.ndarray,
  history: Mapping[str, np.ndarray],
  candidates: Mapping[str, np.ndarray],
  start: np.ndarray,
  stop: np.ndarray,
) -> dict[str, np.ndarray]:
  """The features that `Schema.history_rates` adds, of candidates.

  Args:
    schema: names them.
    label: `[n]`, of the first task, 0 or 1, of all events.
    history: `{name: int [n]}`, the values of all events.
    candidates: `{name: int [c]}`, the values of candidates.
    start: int `[c]`, the first event that each candidate sees.
    stop: int `[c]`, the event after the last one.

  Returns:
    `{feature: float32 [c]}`.
  """
  found = {}
  for name in schema.history_rates:
    order, low, high = np.arange(len(label)), start, stop
    if name != '*':
      # Events by value; those of one value stay in order.
      order = np.argsort(history[name], kind='stable')
      place = history[name][order].astype(np.int64) * len(label) + order
      base = candidates[name].astype(np.int64) * len(label)
      low = np.searchsorted(place, base + start)
      high = np.searchsorted(place, base + stop)
    total = np.append(0.0, np.cumsum(label[order], dtype=np.float64))
    n, k = high - low, total[high] - total[low]
    suffix = '' if name == '*' else f'_{name}'
    rate = np.log((k + 1) / (n - k + 1))
    found[f'history_rate{suffix}'] = rate.astype(np.float32)
    found[f'history_count{suffix}'] = np.log1p(n).astype(np.float32)
  return found
