"""Metrics against scikit-learn and pencil and paper."""

import math
import time

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from histjax import metrics


def draw(seed, n, *, ties=False, users=7):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=n).astype(np.float32)
  if ties:
    logits = np.round(logits)
  labels = (rng.random(n) < 0.3).astype(np.float32)
  return logits, labels, rng.integers(0, users, n).astype(np.int32)


def accumulate(logits, labels, group, mask=None):
  """A batch `[B, 1]` of each."""
  acc = metrics.RankingMetrics(['y'])
  acc.update(
    {'y': logits[:, None]},
    {'y': labels[:, None]},
    None if mask is None else mask[:, None],
    group,
  )
  return acc


class FunctionsTest(parameterized.TestCase):
  @parameterized.product(seed=[0, 1, 2, 3], ties=[False, True])
  def test_equals_scikit_learn(self, seed, ties):
    logits, labels, group = draw(seed, 200, ties=ties)
    labels[:2] = 0, 1
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(
      metrics.auc(logits, labels),
      sklearn_metrics.roc_auc_score(labels, logits),
      rtol=1e-12,
    )
    loss = sklearn_metrics.log_loss(labels, p)
    np.testing.assert_allclose(
      metrics.logloss(logits, labels), loss, rtol=1e-12
    )
    base = sklearn_metrics.log_loss(labels, np.full_like(p, labels.mean()))
    np.testing.assert_allclose(
      metrics.normalized_entropy(logits, labels), loss / base, rtol=1e-6
    )
    areas, counts = [], []
    for user in np.unique(group):
      mine = group == user
      if 0 < labels[mine].sum() < mine.sum():
        areas.append(sklearn_metrics.roc_auc_score(labels[mine], logits[mine]))
        counts.append(mine.sum())
    np.testing.assert_allclose(
      metrics.gauc(logits, labels, group),
      np.average(areas, weights=counts),
      rtol=1e-12,
    )

  def test_by_hand(self):
    # Pairs: (.8, .5) won, (.5, .5) tied, (.8, .1) and (.5, .1) won: 3.5 / 4.
    scores = np.array([0.8, 0.5, 0.5, 0.1])
    labels = np.array([1, 1, 0, 0])
    self.assertEqual(metrics.auc(scores, labels), 3.5 / 4)
    self.assertEqual(metrics.auc(-scores, labels), 0.5 / 4)
    self.assertEqual(metrics.auc(np.zeros(4), labels), 0.5)
    # User 0: 1 of 1 pairs, 2 impressions; user 1: 1 / 2 of 2 pairs, 3
    # impressions; user 2 has one class only.
    self.assertEqual(
      metrics.gauc(
        np.array([2.0, 1.0, 3.0, 2.0, 1.0, 9.0]),
        np.array([1, 0, 0, 1, 0, 1]),
        np.array([0, 0, 1, 1, 1, 2]),
      ),
      (1.0 * 2 + 0.5 * 3) / 5,
    )
    # Scores that two users share are no tie.
    self.assertEqual(
      metrics.gauc(
        np.zeros(5), np.array([1, 0, 1, 0, 0]), np.array([0, 0, 1, 1, 1])
      ),
      0.5,
    )
    self.assertEqual(metrics.logloss(np.zeros(4), labels), math.log(2))
    self.assertEqual(metrics.normalized_entropy(np.zeros(4), labels), 1.0)

  def test_extreme_logits_lose_no_precision(self):
    # In float32 the sigmoid of both is 1: only logits tell them apart.
    logits, labels = np.array([40.0, 50.0]), np.array([0, 1])
    self.assertEqual(metrics.auc(logits, labels), 1.0)
    self.assertEqual(metrics.logloss(logits, labels), 20.0)
    self.assertEqual(metrics.logloss(np.array([-1e4]), np.array([1])), 1e4)
    self.assertEqual(metrics.logloss(np.array([1e4]), np.array([0])), 1e4)

  @parameterized.parameters([0], [1])
  def test_one_class_is_nan(self, label):
    scores, labels = np.array([0.1, 0.2]), np.full(2, label)
    group = np.zeros(2, np.int32)
    self.assertTrue(math.isnan(metrics.auc(scores, labels)))
    self.assertTrue(math.isnan(metrics.gauc(scores, labels, group)))
    self.assertTrue(math.isnan(metrics.normalized_entropy(scores, labels)))
    self.assertTrue(math.isfinite(metrics.logloss(scores, labels)))

  @parameterized.parameters(math.nan, math.inf, -math.inf)
  def test_refuses_what_is_not_finite(self, bad):
    with self.assertRaisesRegex(ValueError, '1 of 2 scores are not finite'):
      metrics.auc(np.array([0.0, bad]), np.array([0, 1]))

  def test_refuses_labels_other_than_0_and_1(self):
    with self.assertRaisesRegex(ValueError, 'label 0.5 must be 0 or 1'):
      metrics.logloss(np.zeros(2), np.array([0, 0.5]))

  def test_refuses_other_shapes(self):
    for shape, other in (((2,), (3,)), ((2, 2), (2, 2)), ((), ())):
      with self.assertRaisesRegex(ValueError, 'one-dimensional and of one len'):
        metrics.auc(np.zeros(shape), np.zeros(other))

  @parameterized.parameters(
    (np.zeros(3, int), r'int64 \(3,\)'),
    # Each NaN is another user, who would be left out.
    (np.full(2, np.nan), r'float64 \(2,\)'),
    ([None, 'b'], r'object \(2,\)'),
  )
  def test_refuses_groups(self, group, message):
    with self.assertRaisesRegex(ValueError, f'group is {message}'):
      metrics.gauc(np.zeros(2), np.array([0, 1]), group)

  def test_refuses_masked_values(self):
    masked = np.ma.masked_array([0, 1], mask=[True, False])
    for metric in (metrics.auc, metrics.logloss, metrics.normalized_entropy):
      with self.assertRaisesRegex(ValueError, 'scores have masked'):
        metric(masked, np.array([0, 1]))
      with self.assertRaisesRegex(ValueError, 'labels have masked'):
        metric(np.array([0.5, 1]), masked)
    for i, name in enumerate(('scores', 'labels', 'group')):
      given = [np.array([0, 1])] * 3
      given[i] = masked
      with self.assertRaisesRegex(ValueError, f'{name} have masked'):
        metrics.gauc(*given)

  def test_many_users_are_quick(self):
    logits, labels, group = draw(0, 500_000, users=25_000)
    start = time.process_time()
    metrics.gauc(logits, labels, group)
    self.assertLess(time.process_time() - start, 1.0)

  def test_criterion(self):
    values = {'a/auc': 0.7, 'a/gauc': 0.6, 'a/logloss': 0.5, 'b/auc': np.nan}
    weights = {'a/auc': 1.0, 'a/gauc': 0.3, 'a/logloss': 2.0, 'b/auc': 0.0}
    np.testing.assert_allclose(
      metrics.criterion(values, weights), 0.7 + 0.18 - 1.0, rtol=1e-12
    )

  def test_direction(self):
    self.assertTrue(metrics.higher_is_better('like/gauc'))
    self.assertFalse(metrics.higher_is_better('like/ne'))


class AccumulatorTest(parameterized.TestCase):
  @given(
    st.integers(0, 2**31), st.integers(0, 60), st.integers(0, 60), st.booleans()
  )
  def test_any_split_in_any_order_gives_the_same(self, seed, i, j, ties):
    data = draw(seed, 60, ties=ties)
    i, j = sorted((i, j))
    parts = [
      accumulate(*(x[part] for x in data))
      for part in (slice(i), slice(i, j), slice(j, None))
    ]
    whole = accumulate(*data).result()
    a = parts[0].merge(parts[1]).merge(parts[2]).result()
    b = parts[2].merge(parts[1].merge(parts[0])).result()
    np.testing.assert_equal(a, whole)  # NaN equals NaN here.
    np.testing.assert_equal(b, whole)

  def test_masked_equals_left_out(self):
    logits, labels, group = draw(3, 50)
    mask = np.random.default_rng(0).random(50) < 0.5
    expected = accumulate(logits[mask], labels[mask], group[mask]).result()
    logits[~mask], labels[~mask] = np.nan, -1
    found = accumulate(logits, labels, group, mask).result()
    self.assertEqual(found, expected)

  def test_rows_share_their_group(self):
    acc = metrics.RankingMetrics(['a', 'b'])
    labels = np.array([[1.0, 0.0], [0.0, 1.0]])
    acc.update(
      {'a': np.array([[2.0, 1.0], [4.0, 3.0]]), 'b': np.zeros((2, 2))},
      {'a': labels, 'b': labels},
      None,
      np.array([5, 6]),
    )
    result = acc.result()
    self.assertEqual(result['a/gauc'], 0.5)  # Users 1 and 0.
    self.assertEqual(result['a/auc'], 0.5)
    self.assertEqual(
      set(result), {f'{t}/{m}' for t in 'ab' for m in metrics.METRICS}
    )
    np.testing.assert_array_equal(acc.predictions().group, [5, 5, 6, 6])

  def test_empty(self):
    result = metrics.RankingMetrics(['y']).gather().result()
    self.assertTrue(all(math.isnan(v) for v in result.values()))

  def test_refusals(self):
    acc = metrics.RankingMetrics(['y'])
    with self.assertRaisesRegex(ValueError, "task 'y': 1 of 1 scores"):
      acc.update({'y': np.array([[np.nan]])}, {'y': np.ones((1, 1))}, None, [0])
    with pytest.raises(ValueError, match="labels of task 'y' are missing"):
      acc.update({'y': np.ones((1, 1))}, {}, None, [0])
    for tasks in (['z'], ['y', 'z']):
      with pytest.raises(ValueError, match='cannot merge'):
        acc.merge(metrics.RankingMetrics(tasks))

  @parameterized.parameters(
    ({'logits': {'b': np.zeros((2, 3))}}, "logits of task 'a' are missing"),
    ({'logits': {'a': np.zeros(2), 'b': np.zeros(2)}}, r'must be \[B, C\]'),
    (
      {'labels': {'a': np.zeros((2, 3)), 'b': np.zeros((2, 1))}},
      r"labels of task 'b' have shape \(2, 1\)",
    ),
    (
      {'labels': {'a': np.ma.masked_array(np.ones((2, 3)), np.eye(2, 3))}},
      "labels of task 'a' have masked",
    ),
    ({'mask': np.ones((2, 3), np.int32)}, 'mask is int32'),
    ({'mask': np.ones((2, 1), bool)}, r'mask is bool \(2, 1\)'),
    ({'group': np.zeros(3, np.int32)}, r'group has shape \(3,\)'),
    ({'group': np.array([0.2, 0.7])}, 'group is float64'),
    ({'group': np.array([1, 1 + 2**32])}, 'group 4294967297 is outside int32'),
  )
  def test_refuses_other_batches(self, change, match):
    zeros = {'a': np.zeros((2, 3)), 'b': np.zeros((2, 3))}
    batch = {'logits': zeros, 'labels': zeros, 'mask': None, 'group': [0, 1]}
    with self.assertRaisesRegex(ValueError, match):
      metrics.RankingMetrics(['a', 'b']).update(**{**batch, **change})

  def test_refuses_no_tasks(self):
    with self.assertRaisesRegex(ValueError, 'tasks is empty'):
      metrics.RankingMetrics([]).update({}, {}, None, [])


if __name__ == '__main__':
  absltest.main()
