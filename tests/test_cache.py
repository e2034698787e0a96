"""Users' states are values: taken, stacked, donated."""

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

import histjax
from histjax.types import History
from tests import support
from tests.scoring.scorers import rows, scorer


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.s = scorer()
    rng = np.random.default_rng(0)
    self.batches = [support.batch(rng), support.batch(rng, num_events=20)]
    self.caches = [self.s.encode(x.history) for x in self.batches]

  def score(self, cache, batch):
    return self.s.score(cache, batch.candidates, batch.context)

  def test_take(self):
    batch, cache = self.batches[0], self.caches[0]
    expected = self.score(cache, batch)
    for index in ([2], [1, 1], [2, 0, 1, 2, 0], np.array([0, 2])):
      taken = cache.take(index)
      np.testing.assert_array_equal(
        taken.info.length, batch.history.length[list(index)]
      )
      self.assertEqual(taken.info.num_users, len(index))
      self.assertEqual(taken.capacity, cache.capacity)
      index = np.asarray(index)
      chex.assert_trees_all_close(
        self.score(taken, rows(batch, index)),
        rows(expected, index),
        rtol=1e-5,
        atol=1e-5,
      )

  def test_rows_that_are_read_once(self):
    cache = self.caches[0]
    taken = cache.take(iter((2, 0)))
    np.testing.assert_array_equal(taken.info.length, cache.info.length[[2, 0]])

  def test_stack(self):
    """Also of other capacities: padding changes no score."""
    self.assertEqual([x.capacity for x in self.caches], [16, 32])
    expected = [
      self.score(cache, batch)
      for cache, batch in zip(self.caches, self.batches, strict=True)
    ]
    stacked = histjax.stack(self.caches)
    self.assertEqual((stacked.num_rows, stacked.capacity), (8, 32))
    np.testing.assert_array_equal(
      stacked.length[:6],
      np.concatenate([x.history.length for x in self.batches]),
    )
    np.testing.assert_array_equal(stacked.length[6:], 0)

    def concatenated(x, y):
      return np.concatenate([x, y])

    parts = [x.replace(history=None) for x in self.batches]
    both = jax.tree.map(concatenated, *parts)
    found = self.score(stacked, both)
    chex.assert_trees_all_close(
      found, jax.tree.map(concatenated, *expected), rtol=1e-5, atol=1e-5
    )
    some = histjax.stack(self.caches, [[2], [0, 1]])
    index = np.array([2, 3, 4])
    chex.assert_trees_all_close(
      self.score(some, rows(both, index)),
      rows(found, index),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_stacked_users_go_on(self):
    batch, cache = self.batches[0], self.caches[0]
    taken = cache.take([1, 0])
    again = History(
      rows(batch.history.features, np.array([1, 0])),
      batch.history.length[[1, 0]],
    )
    longer = self.s.extend(taken, again)
    expected = self.s.extend(cache, batch.history, donate=False)
    chex.assert_trees_all_close(
      self.score(longer, rows(batch, np.array([1, 0]))),
      rows(self.score(expected, batch), np.array([1, 0])),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_what_cannot_be_stacked(self):
    cache = self.caches[0]
    other = scorer('window').encode(self.batches[0].history)
    mapped = jax.tree.map(lambda x: x, cache)
    none = self.s.encode(rows(self.batches[0].history, slice(0, 0)))
    for call, message in (
      (lambda: histjax.stack([]), 'given no caches; give at least one'),
      (lambda: histjax.stack([cache, other]), r'caches\[1\] was made by the m'),
      (lambda: histjax.stack([cache, mapped]), 'that no Scorer made'),
      (lambda: mapped.take([0]), 'that no Scorer made'),
      (lambda: histjax.stack([cache], [[0], [1]]), '2 rows for 1 caches'),
      (
        lambda: cache.take([0, 3]),
        r'row 3 of caches\[0\] is no user: it has 3',
      ),
      (lambda: cache.take([-1]), 'row -1 of .* is no user'),
      (lambda: cache.take([]), 'rows name no user; name at least one'),
      (lambda: cache.take([True, False, True]), 'are not integers; give the n'),
      (lambda: cache.take(np.array([True])), 'are not integers; give the numb'),
      (lambda: cache.take([0.0]), r'rows of caches\[0\]: \[0.0\] are not int'),
      (lambda: cache.take(1), r'rows of caches\[0\]: 1 are not integers'),
      (lambda: none.take([0]), 'row 0 of .* is no user: it has 0'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        call()

  def test_rows_have_their_buckets(self):
    s = scorer(row_buckets=(3, 5))
    cache = s.encode(self.batches[0].history)
    self.assertEqual(cache.take([0]).num_rows, 3)
    self.assertEqual(cache.take([0, 1, 2, 0]).num_rows, 5)
    with self.assertRaisesRegex(ValueError, '6 rows do not fit the largest'):
      histjax.stack([cache, cache])

  def test_nbytes(self):
    cache = self.caches[0]
    # Keys and values of 2 layers, 4 rows, 16 events, 2 heads of 8 channels.
    self.assertEqual(cache.nbytes, 2 * 2 * 4 * 16 * 2 * 8 * 4)

  def test_a_donated_cache_is_refused(self):
    batch, cache = self.batches[0], self.caches[0]
    expected = self.score(cache, batch)
    event = rows(batch.history, slice(0, 3)).replace(
      length=np.ones(3, np.int32)
    )
    copied = self.s.extend(cache, event, donate=False)
    chex.assert_trees_all_equal(self.score(cache, batch), expected)
    longer = self.s.extend(cache, event)
    chex.assert_trees_all_equal(
      self.score(longer, batch), self.score(copied, batch)
    )
    for call in (
      lambda: self.score(cache, batch),
      lambda: self.s.backends(cache, batch.candidates, batch.context),
      lambda: self.s.extend(cache, event),
      lambda: cache.take([0]),
      lambda: histjax.stack([longer, cache]),
    ):
      with self.assertRaisesRegex(ValueError, 'given to extend.*donate=False'):
        call()


if __name__ == '__main__':
  absltest.main()
