"""What is had without a model: sums of smoothed log-odds.

    z = b + sum_t (log_odds(rate_t) - b),     b = log_odds(p)
    rate_t(v) = (positives(v) + a p) / (n(v) + a)

with p the base rate of the training split. A term t is 'user', 'history' or
the name of a feature: v is the candidate's user or value, and its n(v)
impressions are those of the training split. For 'history' they are the most
recent events that the candidate sees, whatever their split: the user's running
rate. A model that is no better has learned nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from histjax.data.rows import Rows

SMOOTHING = 10.0
"""The a of rates over the training split."""
HISTORY_SMOOTHING = 3.0
"""The a of the user's running rate."""


def floor_logits(
  rows: Rows, train: Rows, terms: Sequence[str], task: str, window: int
) -> Float[np.ndarray, 'K']:
  """The floor's logit of every candidate.

  Args:
    rows: of the split to score.
    train: of the training split of the same log.
    terms: see the module.
    task: whose labels.
    window: events of 'history'.

  Returns:
    float64, in the order of `rows.events`.

  Raises:
    ValueError: an unknown term, or training labels that are all the same.
  """
  log = rows.log
  labels = log.labels[task].astype(np.float64)
  seen = labels[train.events]
  if not 0 < seen.sum() < len(seen):
    raise ValueError(
      f'floor: the {len(seen)} training labels of task {task!r} are all the '
      'same, so their log-odds are infinite; split so that both kinds are there'
    )
  base = seen.mean()
  logits = np.full(len(rows.events), _log_odds(base))
  for term in terms:
    if term == 'history':
      rate = _running_rate(rows, labels, base, window)
    else:
      value = log.user if term == 'user' else _feature(log, term)
      size = int(value.max()) + 1
      count = np.bincount(value[train.events], minlength=size)
      positives = np.bincount(value[train.events], weights=seen, minlength=size)
      rate = (positives + SMOOTHING * base) / (count + SMOOTHING)
      rate = rate[value[rows.events]]
    logits += _log_odds(rate) - _log_odds(base)
  return logits


def _running_rate(rows: Rows, labels, base: float, window: int):
  stop = rows.visible
  start = np.maximum(
    rows.log.offsets[rows.log.user[rows.events]], stop - window
  )
  total = np.append(0.0, np.cumsum(labels))
  positives = total[stop] - total[start]
  return (positives + HISTORY_SMOOTHING * base) / (
    stop - start + HISTORY_SMOOTHING
  )


def _feature(log, name: str):
  if name not in log.features or log.features[name].dtype != np.int32:
    known = [k for k, v in log.features.items() if v.dtype == np.int32]
    raise ValueError(
      f"floor: term {name!r} must be 'user', 'history' or one of {known}"
    )
  return log.features[name]


def _log_odds(p):
  return np.log(p) - np.log1p(-p)
