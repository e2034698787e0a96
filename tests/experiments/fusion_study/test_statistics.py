"""Against scikit-learn, SciPy and pencil and paper."""

import contextlib
import math
from unittest import mock

import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from fusion_study import statistics
from histjax import metrics


def draw(seed, size=300, users=20, *, ties=False, skill=0.5):
  """Scores, labels and users; the score tells some of the label."""
  rng = np.random.default_rng(seed)
  labels = rng.random(size) < 0.4
  scores = rng.normal(size=size) + skill * labels
  if ties:
    scores = np.round(scores)
  return scores.astype(np.float32), labels, rng.integers(0, users, size)


class WeightedTest(parameterized.TestCase):
  @parameterized.product(seed=[0, 1, 2], ties=[False, True])
  def test_auc_equals_scikit_learn(self, seed, ties):
    scores, labels, user = draw(seed, ties=ties)
    weights = statistics.resample_users(20, 30, seed)
    found = statistics.weighted_auc(scores, labels, user, weights)
    wanted = [
      sklearn_metrics.roc_auc_score(labels, scores, sample_weight=w[user])
      for w in weights
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)

  @parameterized.product(seed=[0, 1, 2], ties=[False, True])
  def test_gauc_is_that_of_the_users_drawn(self, seed, ties):
    """A user drawn twice is as two users with the same impressions."""
    scores, labels, user = draw(seed, ties=ties)
    weights = statistics.resample_users(20, 10, seed)
    found = statistics.weighted_gauc(scores, labels, user, weights)
    for value, w in zip(found, weights, strict=True):
      areas, counts = [], []
      for u, times in enumerate(w):
        mine = user == u
        if times and 0 < labels[mine].sum() < mine.sum():
          area = sklearn_metrics.roc_auc_score(labels[mine], scores[mine])
          areas += [area] * times
          counts += [mine.sum()] * times
      np.testing.assert_allclose(
        value, np.average(areas, weights=counts), rtol=1e-12
      )

  @given(st.integers(0, 10_000), st.booleans())
  def test_equal_weights_are_the_metrics(self, seed, ties):
    scores, labels, user = draw(seed, 80, 9, ties=ties)
    ones = np.ones((1, 9), np.uint16)
    args = scores, labels, user, ones
    self.assertAlmostEqual(
      statistics.weighted_auc(*args)[0], metrics.auc(scores, labels), 12
    )
    self.assertAlmostEqual(
      statistics.weighted_gauc(*args)[0],
      metrics.gauc(scores, labels, user),
      12,
    )

  def test_undefined(self):
    scores, user = np.array([1.0, 2.0, 3.0]), np.array([0, 1, 1])
    labels = np.array([1, 0, 1])
    # The second weighting has no positives but user 1's; the third no user 1.
    weights = np.array([[1, 1], [0, 1], [1, 0]], np.uint16)
    np.testing.assert_array_equal(
      statistics.weighted_auc(scores, labels, user, weights),
      [0.5, 1.0, math.nan],
    )
    np.testing.assert_array_equal(
      statistics.weighted_gauc(scores, labels, user, weights),
      [1.0, 1.0, math.nan],
    )

  def test_resamples(self):
    weights = statistics.resample_users(500, 400)
    self.assertTrue((weights.sum(axis=1) == 500).all())
    # Binomial(U, 1 / U): mean 1, variance 1 - 1 / U.
    self.assertAlmostEqual(weights.var(), 1 - 1 / 500, delta=0.02)
    np.testing.assert_array_equal(weights, statistics.resample_users(500, 400))
    self.assertFalse(
      np.array_equal(weights, statistics.resample_users(500, 400, seed=1))
    )

  def test_a_resample_does_not_sort(self):
    scores, labels, user = draw(0, 2_000, 250)

    def sorts(function, resamples):
      weights = statistics.resample_users(250, resamples)
      with contextlib.ExitStack() as stack:
        counted = [
          stack.enter_context(
            mock.patch.object(np, name, wraps=getattr(np, name))
          )
          for name in ('argsort', 'sort', 'lexsort', 'unique')
        ]
        function(scores, labels, user, weights)
      return sum(each.call_count for each in counted)

    for function in (statistics.weighted_auc, statistics.weighted_gauc):
      few = sorts(function, 2)
      self.assertGreater(few, 0)
      self.assertEqual(sorts(function, 40), few)


class IntervalTest(parameterized.TestCase):
  def test_interval_equals_that_of_scipy(self):
    """GAUC is a ratio of sums over users, which SciPy can resample, too."""
    scores, labels, user = draw(3, 4000, 150)
    other = draw(4, 4000, 150)[0] + 0.4 * labels

    def parts(scores):
      area, count = metrics.auc_by_group(scores, labels, user)
      return area * count

    count = np.bincount(user).astype(float)

    def statistic(a, b, n, axis):
      return (a.sum(axis) - b.sum(axis)) / n.sum(axis)

    wanted = scipy.stats.bootstrap(
      (parts(scores), parts(other), count),
      statistic,
      paired=True,
      vectorized=True,
      method='percentile',
      n_resamples=4000,
      rng=np.random.default_rng(0),
    )
    weights = statistics.resample_users(150, 4000)
    drawn = [
      statistics.weighted_gauc(s, labels, user, weights)
      for s in (scores, other)
    ]
    difference = statistics.mean_difference(drawn[0][None], drawn[1][None])
    found = statistics.compare(0.0, difference, margin=1.0)
    # Two simulations: a quantile of 4000 has a standard error of 0.04 of it.
    spread = 0.15 * wanted.standard_error
    interval = wanted.confidence_interval
    self.assertAlmostEqual(found.low, interval.low, delta=spread)
    self.assertAlmostEqual(found.high, interval.high, delta=spread)

  @parameterized.parameters(
    # mean, standard error, verdict, at margin 0.002.
    (0.0, 0.0005, 'equivalent'),
    (0.0011, 0.0005, 'equivalent'),  # Though surely not zero.
    (0.003, 0.001, 'better'),
    (-0.003, 0.001, 'worse'),
    (0.001, 0.002, 'undecided'),
  )
  def test_verdicts(self, mean, error, verdict):
    # The quantiles of a normal distribution, not a sample of it.
    grid = (np.arange(2000) + 0.5) / 2000
    drawn = scipy.stats.norm.ppf(grid, mean, error)
    found = statistics.compare(mean, drawn, margin=0.002)
    self.assertEqual(found.verdict, verdict)
    self.assertAlmostEqual(found.low, mean - 1.96 * error, delta=0.01 * error)
    self.assertAlmostEqual(found.high, mean + 1.96 * error, delta=0.01 * error)
    p = max(
      scipy.stats.norm.cdf(-0.002, mean, error),
      scipy.stats.norm.sf(0.002, mean, error),
    )
    self.assertAlmostEqual(found.p_equivalence, p, delta=1e-3)
    # Both tests reject at 5 % if and only if the 90 % interval is inside.
    low, high = scipy.stats.norm.interval(0.9, mean, error)
    self.assertEqual(
      found.verdict == 'equivalent', -0.002 < low and high < 0.002
    )

  def test_test_of_equivalence_equals_two_t_tests(self):
    """Of a mean over users, where SciPy has both one-sided tests."""
    values = np.random.default_rng(0).normal(0, 0.03, 2000)
    values += 0.001 - values.mean()
    weights = statistics.resample_users(2000, 5000)
    found = statistics.compare(
      values.mean(), weights @ values / 2000, margin=0.002
    )
    p = max(
      scipy.stats.ttest_1samp(values, -0.002, alternative='greater').pvalue,
      scipy.stats.ttest_1samp(values, 0.002, alternative='less').pvalue,
    )
    self.assertBetween(p, 0.02, 0.2)  # Else the next line shows little.
    self.assertAlmostEqual(found.p_equivalence, p, delta=0.012)

  def test_seeds_are_averaged(self):
    ours = np.array([[3.0, 5.0], [5.0, 9.0]])
    baseline = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    np.testing.assert_array_equal(
      statistics.mean_difference(ours, baseline), [3.0, 5.0]
    )

  def test_drawing_seeds_adds_their_variance(self):
    """Var = (s^2 / S) (S - 1) / S of each: the bootstrap of a mean."""
    rng = np.random.default_rng(0)
    ours, baseline = rng.normal(size=(2, 5, 1)).repeat(50_000, axis=2)
    self.assertEqual(
      statistics.mean_difference(ours, baseline).std().round(12), 0
    )
    drawn = statistics.mean_difference(ours, baseline, resample_seeds=0)
    wanted = (ours[:, 0].var() + baseline[:, 0].var()) / 5
    self.assertAlmostEqual(drawn.var() / wanted, 1.0, delta=0.03)
    self.assertAlmostEqual(
      drawn.mean(), ours[:, 0].mean() - baseline[:, 0].mean(), delta=0.02
    )

  def test_mean_and_deviation(self):
    self.assertEqual(statistics.mean_and_deviation([1.0, 3.0]), (2.0, 2**0.5))
    mean, deviation = statistics.mean_and_deviation([1.0])
    self.assertEqual(mean, 1.0)
    self.assertTrue(math.isnan(deviation))

  def test_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, 'margin=0 must be positive'):
      statistics.compare(0.0, np.zeros(10), margin=0)
    with self.assertRaisesRegex(ValueError, 'too few users'):
      statistics.compare(0.0, np.array([0.1, math.nan]), margin=0.1)


if __name__ == '__main__':
  absltest.main()
