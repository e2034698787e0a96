"""A cache knows its users and its model."""

import pickle

import jax
import numpy as np
from absl.testing import parameterized

import histjax
from histjax import scoring
from histjax.cache import CacheInfo
from tests import support
from tests.scoring.scorers import TOLERANCE, real, rows, scorer


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.s = scorer()
    self.batch = support.batch(np.random.default_rng(0))
    self.cache = self.s.encode(self.batch.history)

  def other(self, variables=None, **fields):
    config = support.config(**fields)
    variables = self.s._variables if variables is None else variables
    return scoring.Scorer(config, variables)

  def score(self, cache, s=None):
    s = s or self.s
    return s.score(cache, self.batch.candidates, self.batch.context)

  def test_carries_what_the_host_must_know(self):
    info = self.cache.info
    self.assertEqual(info.num_users, 3)
    self.assertEqual(self.cache.num_rows, 4)
    self.assertIsInstance(info.length, np.ndarray)
    np.testing.assert_array_equal(info.length, self.batch.history.length)
    self.assertEqual(info.fingerprint, self.s.fingerprint)

  def test_its_lengths_are_its_own(self):
    history = self.batch.history
    extended = self.s.extend(self.cache, history)
    history.length[:] = 0  # Still the caller's to change.
    self.assertGreater(self.cache.info.length.max(), 0)
    for cache in (self.cache, extended):
      with self.assertRaisesRegex(ValueError, 'read-only'):
        cache.info.length[0] = 1

  def test_a_row_beyond_the_last_user(self):
    four = rows(self.batch, np.array([0, 1, 2, 0]))
    for method, arguments, what in (
      (self.s.score, (four.candidates, four.context), 'candidates'),
      (self.s.extend, (four.history,), 'events'),
      (self.s.backends, (four.candidates, four.context), 'candidates'),
      (
        self.s.extend_and_score,
        (self.batch.history, four.candidates, four.context),
        'candidates',
      ),
      (
        self.s.extend_and_score,
        (four.history, self.batch.candidates, self.batch.context),
        'events',
      ),
    ):
      with self.assertRaisesRegex(
        ValueError, f'{what} have 4 rows, the cache 3; encode every user'
      ):
        method(self.cache, *arguments)

  def test_fewer_rows_than_users(self):
    two = rows(self.batch, slice(0, 2))
    found = real(self.s.score(self.cache, two.candidates, two.context), two)
    expected = self.score(self.cache)
    np.testing.assert_array_equal(found, real(rows(expected, slice(0, 2)), two))
    longer = self.s.extend(self.cache, two.history)
    length = self.batch.history.length.copy()
    length[:2] *= 2
    np.testing.assert_array_equal(longer.info.length, length)
    np.testing.assert_array_equal(longer.length[:3], length)

  def test_one_of_another_model(self):
    variables = self.s._variables
    changed = jax.tree.map(lambda x: x, variables)
    tables = changed['tables']['tables']
    tables['item'] = tables['item'].at[39, 7].add(1e-6)
    for other in (
      self.other(changed),
      self.other(encoder__window=4),
      self.other(encoder__positions='none'),
    ):
      request = (self.batch.candidates, self.batch.context)
      for method, arguments in (
        (other.score, request),
        (other.backends, request),
        (other.extend, (self.batch.history,)),
        (
          other.extend_and_score,
          (self.batch.history, self.batch.candidates, self.batch.context),
        ),
      ):
        with self.assertRaisesRegex(
          ValueError, 'cache was made by the model .*; encode the history again'
        ):
          method(self.cache, *arguments)

  def test_one_on_another_device(self):
    device = jax.devices()[1]
    for cache in (self.cache, histjax.quantize(self.cache, 'int8')):
      moved = cache.replace(
        keys=jax.device_put(cache.keys, device),
        values=jax.device_put(cache.values, device),
      )
      for call in (
        lambda x, cache=cache: histjax.stack([cache, x]),
        lambda x: self.s.extend(x, self.batch.history),
        self.score,
      ):
        with self.assertRaisesRegex(ValueError, r'1.* on .*0; encode there'):
          call(moved)
    free = self.cache.replace(
      keys=np.asarray(self.cache.keys), values=np.asarray(self.cache.values)
    )
    np.testing.assert_array_equal(
      real(self.score(free), self.batch),
      real(self.score(self.cache), self.batch),
    )

  def test_one_of_the_same_model(self):
    """In other containers, by other implementations."""
    variables = jax.tree.map(np.array, self.s._variables)
    variables = dict(reversed(variables.items()))
    other = self.other(variables, encoder__attention='reference')
    self.assertEqual(other.fingerprint, self.s.fingerprint)
    np.testing.assert_allclose(
      real(self.score(self.cache, other), self.batch),
      real(self.score(self.cache), self.batch),
      **TOLERANCE['float32'],
    )

  def test_one_that_no_scorer_vouches_for(self):
    mapped = jax.tree.map(lambda x: x, self.cache)
    self.assertIsNone(mapped.info)
    for cache in (mapped, None, self.batch.history):
      with self.assertRaisesRegex(ValueError, 'that no Scorer made'):
        self.score(cache)

  def test_one_whose_fields_were_changed(self):
    """Scores of it would be those of other histories."""
    keys, values = self.cache.keys, self.cache.values
    for change in (
      {'length': np.zeros(4, np.int32)},
      {'length': self.cache.length[:2]},
      {'keys': keys[:, :2], 'values': values[:, :2]},
      {'keys': keys[:, :, :4], 'values': values[:, :, :4]},
      {'values': values[:, :, :4]},
    ):
      changed = self.cache.replace(**change)
      for use in (
        self.score,
        lambda x: self.s.extend(x, self.batch.history),
        lambda x: x.take([0]),
        lambda x: histjax.quantize(x, 'int8'),
      ):
        with self.assertRaisesRegex(ValueError, 'was made of histories of'):
          use(changed)
    with self.assertRaisesRegex(ValueError, 'read-only'):
      self.cache.length[0] = 0

  @parameterized.parameters('int8', None)
  def test_one_that_was_kept_elsewhere(self, kind):
    cache = histjax.quantize(self.cache, kind) if kind else self.cache
    expected = real(self.score(cache), self.batch)
    arrays = jax.tree.map(np.asarray, cache)
    for kept in (
      arrays.replace(info=cache.info),
      pickle.loads(pickle.dumps(cache)),
    ):
      np.testing.assert_array_equal(
        real(self.score(kept), self.batch), expected
      )
      self.assertEqual(kept.take([1]).info.length, cache.info.length[1])

  def test_users_make_no_programs(self):
    traced = []
    length = jax.jit(lambda cache: traced.append(1) or cache.length)
    for n in (1, 2):
      info = CacheInfo(np.zeros(n, np.int32), str(n))
      length(self.cache.replace(info=info))
    self.assertEqual(traced, [1])
