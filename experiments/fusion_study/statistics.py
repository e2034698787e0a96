"""How sure a difference between two rankers is, when users are the sample.

Impressions of one user are not independent, so users are drawn, not
impressions: a resample gives every user a weight, how often it was drawn, and
a metric is that of the impressions so weighted. All rankers get the same
weights, which makes their differences paired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from histjax import metrics

Verdict = Literal['equivalent', 'better', 'worse', 'undecided']


def resample_users(
  num_users: int, num_resamples: int, seed: int = 0
) -> Int[np.ndarray, 'R U']:
  """How often each user is drawn, of as many draws as there are users.

  Returns:
    uint16 `[R, U]`; every row adds up to `num_users`.
  """
  rng = np.random.default_rng(seed)
  return np.stack(
    [
      np.bincount(
        rng.integers(num_users, size=num_users), minlength=num_users
      ).astype(np.uint16)
      for _ in range(num_resamples)
    ]
  )


def weighted_auc(
  scores: Shaped[np.ndarray, 'K'],
  labels: Shaped[np.ndarray, 'K'],
  user: Int[np.ndarray, 'K'],
  weights: Shaped[np.ndarray, 'R U'],
) -> Float[np.ndarray, 'R']:
  """The AUC of all impressions, once for each weighting of users.

      AUC_r = sum_{i+, j-} w_i w_j ([s_i > s_j] + [s_i = s_j] / 2)
              / (sum_{i+} w_i  sum_{j-} w_j),      w_k = weights[r, user_k]

  Sorted once; a resample then costs one cumulative sum.

  Args:
    scores: finite.
    labels: 0 or 1.
    user: of each impression, in [0, U).
    weights: >= 0.

  Returns:
    `[R]`; NaN where a class has no weight.
  """
  scores, positive = np.asarray(scores), np.asarray(labels) == 1
  order = np.argsort(scores, kind='stable')
  scores, positive, user = scores[order], positive[order], user[order]
  below, user_of_negative = scores[~positive], user[~positive]
  user_of_positive = user[positive]
  # Of each positive: how many negatives are below it, and not above it.
  first = np.searchsorted(below, scores[positive], 'left')
  last = np.searchsorted(below, scores[positive], 'right')
  found = np.full(len(weights), np.nan)
  cumulative = np.zeros(len(below) + 1)
  for r, row in enumerate(weights):
    w = row.astype(np.float64)
    np.cumsum(w[user_of_negative], out=cumulative[1:])
    w = w[user_of_positive]
    pairs = w.sum() * cumulative[-1]
    if pairs:
      wins = w @ (cumulative[first] + cumulative[last]) / 2
      found[r] = wins / pairs
  return found


def weighted_gauc(
  scores: Shaped[np.ndarray, 'K'],
  labels: Shaped[np.ndarray, 'K'],
  user: Int[np.ndarray, 'K'],
  weights: Shaped[np.ndarray, 'R U'],
) -> Float[np.ndarray, 'R']:
  """The GAUC, once for each weighting of users.

      GAUC_r = sum_u w_ru n_u AUC_u / sum_u w_ru n_u

  over users with both classes; see `histjax.metrics.gauc`.

  Args:
    scores: finite.
    labels: 0 or 1.
    user: of each impression, in [0, U).
    weights: >= 0.

  Returns:
    `[R]`; NaN where no user with both classes has weight.
  """
  area, count = metrics.auc_by_group(
    np.asarray(scores), np.asarray(labels), np.asarray(user)
  )
  defined = ~np.isnan(area)
  users, area, count = np.unique(user)[defined], area[defined], count[defined]
  found = np.full(len(weights), np.nan)
  for r, row in enumerate(weights):
    w = row[users] * count
    total = w.sum()
    if total:
      found[r] = w @ area / total
  return found


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A difference of means, ours less the baseline's, and what follows of it.

  Attributes:
    difference: of the metric on the test split as it is.
    low: of the 95 % interval, percentiles of the bootstrap.
    high: likewise.
    p_equivalence: the larger p-value of the two one-sided tests.
    verdict: see `compare`.
  """

  difference: float
  low: float
  high: float
  p_equivalence: float
  verdict: Verdict


def compare(
  difference: float, resampled: Float[np.ndarray, 'R'], margin: float
) -> Comparison:
  """Tests a difference for equivalence, then for its sign.

  Two one-sided tests (Schuirmann 1987, doi:10.1007/BF01068419), each at 5 %:
  of 'the true difference is <= -margin', whose p-value is the share of
  resampled differences <= -margin, and of '>= margin' likewise. The verdict is

  * 'equivalent' if both are rejected, which is to say that the 90 % interval
    lies within (-margin, margin). It is said first: a difference may be
    equivalent and still not zero, as the 95 % interval then shows;
  * else 'better' or 'worse' if the 95 % interval lies above or below zero;
  * else 'undecided': neither a difference nor its absence is shown.

  Args:
    difference: on the data itself.
    resampled: on each resample.
    margin: the largest difference that does not matter, > 0.

  Raises:
    ValueError: the margin is not positive, or a resampled value not finite.
  """
  if not margin > 0:
    raise ValueError(f'margin={margin} must be positive, as 0.002')
  if not np.isfinite(resampled).all():
    raise ValueError(
      'the metric is undefined on some resamples: too few users have both '
      'classes; test on more users'
    )
  low, high = np.quantile(resampled, [0.025, 0.975])
  # One is added to both, so that no p-value of a simulation is 0.
  beyond = max(
    np.count_nonzero(resampled <= -margin),
    np.count_nonzero(resampled >= margin),
  )
  p = (1 + beyond) / (1 + len(resampled))
  verdict: Verdict = 'undecided'
  if p < 0.05:
    verdict = 'equivalent'
  elif low > 0:
    verdict = 'better'
  elif high < 0:
    verdict = 'worse'
  return Comparison(float(difference), float(low), float(high), p, verdict)


def mean_difference(
  ours: Float[np.ndarray, 'S R'],
  baseline: Float[np.ndarray, 'S R'],
  *,
  resample_seeds: int | None = None,
) -> Float[np.ndarray, 'R']:
  """The difference of the means over seeds, on each resample of users.

  Args:
    ours: a metric by seed and resample.
    baseline: the same of the baseline; its seeds may be others.
    resample_seeds: also draw the seeds of each with replacement, from this
      random seed: what a training's own randomness adds. None: the trained
      models as they are.
  """
  if resample_seeds is None:
    return ours.mean(axis=0) - baseline.mean(axis=0)
  rng = np.random.default_rng(resample_seeds)

  def drawn(values):
    index = rng.integers(len(values), size=values.shape)
    return np.take_along_axis(values, index, axis=0).mean(axis=0)

  return drawn(ours) - drawn(baseline)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
  """The mean and the sample standard deviation, NaN of a single value."""
  deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
  return float(np.mean(values)), float(deviation)
