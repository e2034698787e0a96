"""Keys and values in 8 bits: bounded errors, and scores of what they mean."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given

import histjax
from histjax import quantization, scoring
from histjax.types import History
from tests import support
from tests.scoring.scorers import TOLERANCE, count_compilations, real

KINDS = quantization.KINDS
SEEDS = st.integers(0, 2**32 - 1)
SHAPE = (2, 3, 37, 2, 4)  # The third block is not full.


def values(rng) -> np.ndarray:
  """Of very different sizes by layer, user, head and block."""
  size = 10.0 ** rng.integers(-6, 6, (*SHAPE[:2], 3, SHAPE[3]))
  size = np.repeat(size, quantization.BLOCK, axis=2)[:, :, : SHAPE[2], :, None]
  return (rng.normal(size=SHAPE) * size).astype(np.float32)


_quantize = jax.jit(quantization.quantize, static_argnames='kind')
_widen = jax.jit(functools.partial(quantization.widen, dtype='float32'))
_extended = jax.jit(quantization.extended)


class QuantizationTest(parameterized.TestCase):
  @parameterized.parameters(*KINDS)
  @given(seed=SEEDS)
  def test_error(self, kind, seed):
    rng = np.random.default_rng(seed)
    x = values(rng)
    length = rng.integers(0, SHAPE[2] + 1, SHAPE[1], dtype=np.int32)
    real_events = np.arange(SHAPE[2]) < length[:, None]
    unseen = np.where(real_events[None, :, :, None, None], x, np.nan)
    found = _quantize(unseen, length, kind=kind)
    self.assertEqual(found.codes.dtype, jnp.dtype(kind))
    back = np.asarray(_widen(found))
    scale = np.repeat(np.asarray(found.scale), quantization.BLOCK, axis=2)
    scale = scale[:, :, : SHAPE[2], :, None]
    if kind == 'int8':
      bound = 0.5 * scale
    else:  # 3 bits of mantissa; the least step is 2 ** -9.
      bound = np.maximum(np.abs(x) / 16, scale / 1024)
    bound = np.broadcast_to(bound, x.shape)
    for row in range(SHAPE[1]):
      seen = np.s_[:, row, : length[row]]
      error = np.abs(back[seen] - x[seen])
      # Sums of two roundings to float32 beside that to a code.
      self.assertTrue((error <= bound[seen] * (1 + 1e-5)).all())
      np.testing.assert_array_equal(back[:, row, length[row] :], 0)

  @parameterized.parameters(*KINDS)
  def test_zeros_and_the_smallest(self, kind):
    x = np.zeros(SHAPE, np.float32)
    x[0, 0, 0, 0, 0] = 1e-44
    length = np.full(SHAPE[1], SHAPE[2], np.int32)
    np.testing.assert_array_equal(_widen(_quantize(x, length, kind=kind)), 0)

  @parameterized.parameters(((2, 3, 0, 2, 4),), ((2, 0, 37, 2, 4),))
  def test_nothing(self, shape):
    x, length = np.zeros(shape, np.float32), np.zeros(shape[1], np.int32)
    found = quantization.quantize(x, length, 'int8')
    self.assertEqual(found.shape, shape)
    blocks = -(-shape[2] // quantization.BLOCK)
    self.assertEqual(found.scale.shape, (*shape[:2], blocks, shape[3]))
    self.assertEqual(quantization.widen(found, 'float32').shape, shape)

  @parameterized.product(kind=KINDS, value=(np.nan, np.inf, -np.inf))
  def test_what_is_not_finite_stays_so(self, kind, value):
    x = np.ones(SHAPE, np.float32)
    x[1, 2, 17, 1, 3] = value
    length = np.full(SHAPE[1], SHAPE[2], np.int32)
    back = np.array(_widen(_quantize(x, length, kind=kind)))
    block = np.s_[1, 2, 16:32, 1]
    self.assertTrue(np.isnan(back[block]).all())
    back[block] = 1
    np.testing.assert_allclose(back, 1, rtol=1e-6)

  @parameterized.parameters(*KINDS)
  @given(seed=SEEDS)
  def test_extended(self, kind, seed):
    """Full blocks stay as they are; others are quantized once more."""
    rng = np.random.default_rng(seed)
    x = values(rng)
    length = rng.integers(0, SHAPE[2] + 1, SHAPE[1], dtype=np.int32)
    capacity = int(rng.choice((20, SHAPE[2])))
    start = rng.integers(0, length + 1, dtype=np.int32)
    start = np.minimum(start, capacity)
    before = _quantize(x[:, :, :capacity], start, kind=kind)
    known = np.asarray(_widen(before))
    after = x.copy()
    for row in range(SHAPE[1]):
      after[:, row, : start[row]] = known[:, row, : start[row]]
    found = _extended(before, after, start, length)
    expected = _quantize(after, length, kind=kind)
    for row in range(SHAPE[1]):
      full = start[row] // quantization.BLOCK * quantization.BLOCK
      if start[row] == length[row]:  # Nothing is new: all stays, to the bit.
        full = capacity
      for a, b, size in (
        (found.codes, before.codes, full),
        (found.scale, before.scale, -(-full // quantization.BLOCK)),
      ):
        a, b = (np.asarray(v, np.float32)[:, row, :size] for v in (a, b))
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
      np.asarray(_widen(found)), np.asarray(_widen(expected)), rtol=1e-6
    )


class CacheTest(parameterized.TestCase):
  def make(self, kind=None, **options):
    config = support.config()
    return scoring.Scorer(
      config,
      support.init(config)[1],
      scoring.ScorerConfig(cache_dtype=kind, **options),
    )

  def score(self, s, cache, batch):
    return real(s.score(cache, batch.candidates, batch.context), batch)

  @parameterized.parameters(*KINDS)
  def test_scores_are_those_of_what_the_codes_mean(self, kind):
    plain, s = self.make(), self.make(kind)
    batch = support.batch(np.random.default_rng(0), num_events=40)
    exact = plain.encode(batch.history)
    cache = s.encode(batch.history)
    self.assertLess(cache.nbytes, 0.3 * exact.nbytes)  # 0.27 of float32.
    meant = exact.replace(
      keys=quantization.widen(cache.keys, 'float32'),
      values=quantization.widen(cache.values, 'float32'),
    )
    found = self.score(s, cache, batch)
    np.testing.assert_allclose(
      found, self.score(plain, meant, batch), **TOLERANCE['float32']
    )
    # Nearly those of the model: an eighth of a bit of keys and values of
    # order 1, in two layers.
    expected = self.score(plain, exact, batch)
    self.assertGreater(np.abs(found - expected).max(), 0)
    np.testing.assert_allclose(found, expected, atol=0.05)
    # The same by hand, in one program, taken, stacked, of a plain scorer.
    again, logits = s.encode_and_score(
      batch.history, batch.candidates, batch.context
    )
    for x in (
      self.score(plain, histjax.quantize(exact, kind), batch),
      self.score(plain, cache.take([0, 1, 2]), batch),
      self.score(
        s, histjax.stack([cache.take([0]), again], [[0], [1, 2]]), batch
      ),
      real(logits, batch),
    ):
      np.testing.assert_allclose(x, found, **TOLERANCE['float32'])

  @parameterized.parameters(*KINDS)
  def test_extend(self, kind):
    """Past the bucket, too; only the last block of each was read again."""
    s = self.make(kind)
    batch = support.batch(np.random.default_rng(0), num_events=40)
    history = batch.history.replace(length=np.array([20, 33, 40], np.int32))
    batch = batch.replace(
      history=history, candidates=batch.candidates.replace(visible=None)
    )
    start = np.array([16, 15, 16], np.int32)
    cache = s.encode(history.replace(length=start))
    self.assertEqual(cache.capacity, 16)
    column = np.minimum(start[:, None] + np.arange(25), 39)
    events = History(
      {
        k: np.take_along_axis(v, column, axis=1)
        for k, v in history.features.items()
      },
      history.length - start,
    )
    cache, logits = s.extend_and_score(
      cache, events, batch.candidates, batch.context
    )
    self.assertEqual(cache.capacity, 64)
    self.assertEqual(cache.keys.codes.dtype, jnp.dtype(kind))
    self.assertEqual(cache.keys.scale.shape[2], 4)
    # Keys of events after the first block are of what was rounded before.
    np.testing.assert_allclose(
      real(logits, batch),
      self.score(s, s.encode(history), batch),
      atol=0.05,
    )
    np.testing.assert_allclose(
      self.score(s, cache, batch), real(logits, batch), **TOLERANCE['float32']
    )

  def test_warm_up(self):
    s = self.make(
      'int8', history_buckets=(8,), candidate_buckets=(5,), row_buckets=(3,)
    )
    s.warm_up(rows=3, events=8, candidates=5, new_events=1, visible=True)
    batch = support.batch(np.random.default_rng(0), num_events=7)
    one = History(
      {k: v[:, :1] for k, v in batch.history.features.items()},
      np.ones(3, np.int32),
    )
    with count_compilations() as compiled:
      cache = s.extend(s.encode(batch.history), one)
      s.score(cache, batch.candidates, batch.context)
    self.assertEmpty(compiled)
    s.extend(cache, one.replace(length=np.zeros(3, np.int32)))
    with self.assertRaisesRegex(ValueError, 'was given to extend'):
      s.score(cache, batch.candidates, batch.context)

  def test_bad_arguments(self):
    s = self.make()
    batch = support.batch(np.random.default_rng(0))
    cache = s.encode(batch.history)
    with self.assertRaisesRegex(ValueError, "kind='int4' must be one of"):
      histjax.quantize(cache, 'int4')
    with self.assertRaisesRegex(ValueError, "cache_dtype='bfloat16' must be"):
      scoring.ScorerConfig(cache_dtype='bfloat16')
    quantized = histjax.quantize(cache, 'int8')
    with self.assertRaisesRegex(ValueError, 'is quantized already, to int8'):
      histjax.quantize(quantized, 'int8')
    with self.assertRaisesRegex(
      ValueError, r'caches\[1\] holds int8, caches\[0\] float32'
    ):
      histjax.stack([cache, quantized])
    with self.assertRaisesRegex(ValueError, 'that no Scorer made'):
      histjax.quantize(cache.replace(info=None), 'int8')


if __name__ == '__main__':
  absltest.main()
