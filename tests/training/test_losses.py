"""The losses, against sums written out in NumPy."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import pipeline
from histjax.data import rows as data_rows
from histjax.training import losses
from tests import support
from tests.training import runs


def draw(seed, shape=(5, 7)):
  rng = np.random.default_rng(seed)
  z = {t: rng.normal(scale=3, size=shape).astype(np.float32) for t in 'ab'}
  y = {t: rng.integers(0, 2, shape).astype(np.float32) for t in 'ab'}
  y['a'][0], y['b'][1] = 1, 0  # Rows with one class, without pairs.
  mask = rng.random(shape) < 0.7
  mask[2] = False
  visible = np.sort(rng.integers(0, 9, shape), axis=1).astype(np.int32)
  return z, y, mask, visible


def pairs_in_numpy(z, y, mask, visible=None, span=None, weights=None):
  """`rank_loss_sum`, pair by pair, in float64."""
  total = count = 0.0
  for task in z:
    w = (weights or {}).get(task, 1.0)
    for b in range(len(mask)):
      kept = np.flatnonzero(mask[b])
      positive = [i for i in kept if y[task][b, i] == 1]
      negative = [i for i in kept if y[task][b, i] == 0]
      if not positive or not negative:
        continue
      loss = 0.0
      for i in positive:
        for j in negative:
          if span is None or abs(int(visible[b, i]) - visible[b, j]) < span:
            d = float(z[task][b, i]) - float(z[task][b, j])
            loss += np.logaddexp(0.0, -d)
      total += w * len(kept) / (len(positive) * len(negative)) * loss
      count += w * len(kept)
  return total, count


class LogLossTest(parameterized.TestCase):
  def test_equals_numpy(self):
    z, y, mask, _ = draw(0)
    total, weight = losses.loss_sum(z, y, mask, {'b': 3.0})
    expected = 0.0
    for task, w in (('a', 1.0), ('b', 3.0)):
      p = 1 / (1 + np.exp(-z[task].astype(np.float64)))
      nll = -np.log(np.where(y[task] == 1, p, 1 - p))
      expected += w * nll[mask].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    self.assertEqual(weight, 4 * mask.sum())

  def test_padding_may_be_nan(self):
    mask = np.array([[True, False]])
    labels = {'a': np.array([[1.0, np.nan]], np.float32)}

    def loss(z):
      return losses.loss_sum({'a': z}, labels, mask)[0]

    value, grad = jax.value_and_grad(loss)(jnp.array([[0.0, jnp.nan]]))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.5, 0.0]])

  def test_no_mask_means_all(self):
    ones = {'a': np.ones((2, 3), np.float32)}
    self.assertEqual(losses.loss_sum(ones, ones, None)[1], 6)


class RankLossTest(parameterized.TestCase):
  @given(
    seed=st.integers(0, 10_000),
    span=st.sampled_from([None, 1, 2, 4, 100]),
    weights=st.sampled_from([None, {'b': 3.0}]),
  )
  def test_streaming_rows_equal_numpy(self, seed, span, weights):
    z, y, mask, visible = draw(seed)
    found = losses.rank_loss_sum(
      z, y, mask, visible, span=span, task_weights=weights
    )
    expected = pairs_in_numpy(z, y, mask, visible, span, weights)
    # Sums in float32 of up to a hundred terms.
    np.testing.assert_allclose(found, expected, rtol=1e-5)

  @parameterized.parameters(None, 1)
  def test_request_rows_are_one_position(self, span):
    z, y, mask, visible = draw(1)
    visible[:] = visible[:, :1]
    expected = pairs_in_numpy(z, y, mask)
    for same in (visible, None):
      found = losses.rank_loss_sum(z, y, mask, same, span=span)
      np.testing.assert_allclose(found, expected, rtol=1e-5)

  @parameterized.parameters(None, 2)
  def test_packed_rows(self, span):
    """The pairs of each segment, of which some see equally many events."""
    z, y, mask, visible = draw(3)

    def in_one(x):
      return x.reshape(1, -1)

    segment = np.repeat(np.arange(len(mask)), mask.shape[1])
    found = losses.rank_loss_sum(
      jax.tree.map(in_one, z),
      jax.tree.map(in_one, y),
      in_one(mask),
      in_one(visible),
      span=span,
      segment=in_one(segment),
    )
    expected = pairs_in_numpy(z, y, mask, visible, span)
    np.testing.assert_allclose(found, expected, rtol=1e-5)

  @parameterized.parameters('streaming', 'request')
  def test_rows_of_a_dataset(self, kind):
    log = runs.dataset().log
    config = data_rows.RowConfig(kind=kind)
    rows = data_rows.make_rows(log, np.ones(len(log), bool), config)
    batches = pipeline.eval_batches(rows, pipeline.PipelineConfig())
    with contextlib.closing(batches):
      batch = next(batches)
    rng = np.random.default_rng(0)
    z = {t: rng.normal(size=y.shape) for t, y in batch.labels.items()}
    z = {t: x.astype(np.float32) for t, x in z.items()}
    arguments = z, batch.labels, batch.candidates.mask, batch.candidates.visible
    total, weight = losses.rank_loss_sum(*arguments, span=1)
    expected = pairs_in_numpy(*arguments, span=1)
    np.testing.assert_allclose((total, weight), expected, rtol=1e-5)
    # All of a request is at one position; a stream has other pairs, too.
    every, _ = losses.rank_loss_sum(*arguments)
    self.assertEqual(kind == 'request', bool(np.isclose(every, total)))
    self.assertGreater(total, 0)

  def test_parts_of_a_batch_add_up(self):
    z, y, mask, visible = draw(2)

    def part(rows):
      return np.array(
        losses.rank_loss_sum(
          {t: x[rows] for t, x in z.items()},
          {t: x[rows] for t, x in y.items()},
          mask[rows],
          visible[rows],
          span=3,
        )
      )

    np.testing.assert_allclose(
      part(slice(0, 2)) + part(slice(2, 5)), part(slice(0, 5)), rtol=1e-6
    )

  def test_gradient_and_padding(self):
    mask = np.array([[True, True, False], [True, False, False]])
    labels = {'a': np.array([[0, 1, np.nan], [1, 0, 0]], np.float32)}

    def loss(z):
      return losses.rank_loss_sum({'a': z}, labels, mask)[0]

    z = jnp.array([[2.0, 1.0, jnp.nan], [5.0, jnp.nan, 0.0]])
    value, grad = jax.value_and_grad(loss)(z)
    np.testing.assert_allclose(value, 2 * np.log1p(np.e), rtol=1e-6)
    slope = 2 / (1 + np.exp(-1.0))
    expected = [[slope, -slope, 0], [0, 0, 0]]
    np.testing.assert_allclose(grad, expected, rtol=1e-6)

  def test_beside_the_log_loss(self):
    batch = support.batch(np.random.default_rng(0), 6)
    rng = np.random.default_rng(1)
    z = {t: rng.normal(size=batch.candidates.shape) for t in batch.labels}
    z = {t: x.astype(np.float32) for t, x in z.items()}
    mask, visible = batch.candidates.mask, batch.candidates.visible
    weights = {'like': 0.5}
    log_loss, count = losses.loss_sum(z, batch.labels, mask, weights)
    ranks, pairs = pairs_in_numpy(z, batch.labels, mask, visible, 3, weights)
    config = losses.RankLossConfig(weight=0.2, span=3)
    found = losses.batch_loss(z, batch, task_weights=weights, rank_loss=config)
    expected = log_loss / count + 0.2 * ranks / pairs
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for off in (None, dataclasses.replace(config, weight=0.0)):
      found = losses.batch_loss(z, batch, task_weights=weights, rank_loss=off)
      np.testing.assert_allclose(found, log_loss / count, rtol=1e-6)

  def test_without_pairs_it_is_zero(self):
    batch = support.batch(np.random.default_rng(0), 4)
    z = {t: np.zeros(y.shape, np.float32) for t, y in batch.labels.items()}
    batch = batch.replace(labels={t: np.ones_like(x) for t, x in z.items()})
    config = losses.RankLossConfig(weight=1.0)
    found = losses.batch_loss(z, batch, rank_loss=config)
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)

  @parameterized.parameters(
    ({'weight': -1.0}, r'rank_loss\.weight=-1.0 must be >= 0'),
    ({'weight': float('nan')}, r'rank_loss\.weight=nan must be'),
    ({'span': 0}, r'rank_loss\.span=0 must be at least 1'),
  )
  def test_refuses(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      losses.RankLossConfig(**fields)


if __name__ == '__main__':
  absltest.main()
