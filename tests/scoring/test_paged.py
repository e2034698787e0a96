"""A pool's programs score, extend and encode as a scorer does its caches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import scoring
from histjax.quantization import Quantized
from histjax.scoring import paged
from histjax.scoring import pages as pages_lib
from histjax.serving.pages import Pages, Shape
from histjax.types import History
from tests import support
from tests.scoring import scorers

EVENTS = 20
NEW = 3


def scorer(variant, **options) -> scoring.Scorer:
  return scorers.scorer(
    variant, history_buckets=(24,), row_buckets=(4,), **options
  )


class PagedTest(parameterized.TestCase):
  @parameterized.parameters(
    ('causal', None), ('bfloat16', None), ('causal', 'int8'), ('cross', 'int8')
  )
  def test_equals_scorer(self, variant, cache_dtype):
    s = scorer(variant, cache_dtype=cache_dtype)
    batch = support.batch(
      np.random.default_rng(0), 3, EVENTS + NEW, shared_visible=True
    )
    total = np.maximum(batch.history.length, NEW)
    old = History(batch.history.features, total - NEW)
    new = History(
      {
        name: np.stack([x[i, n - NEW : n] for i, n in enumerate(total)])
        for name, x in batch.history.features.items()
      },
      np.full(3, NEW, np.int32),
    )
    candidates = batch.candidates.replace(visible=None)
    request = candidates, batch.context
    pages = Pages(Shape.of(s.config, s.options), 16, s.device)
    of_users = [[5, 2], [1, 9], [7, 3]]
    place = paged.Place(
      pages.to_read(of_users, 4, 24),
      pages.to_write(of_users, [0, 0, 0], 4, 24),
      np.asarray(old.length),
      24,
    )
    p = paged.PagedScorer(s)
    tolerance = scorers.TOLERANCE[s.config.dtype]

    def check(pending, wanted):
      found = scorers.real(pending.result(), batch)
      np.testing.assert_allclose(
        found, scorers.real(wanted, batch), **tolerance
      )

    cache, wanted = s.encode_and_score(old, *request)
    pool, pending = p.encode(pages.pool, place, old, *request)
    check(pending, wanted)
    check(p.score(pool, place, *request), wanted)
    cache, wanted = s.extend_and_score(cache, new, *request)
    pool, pending = p.extend(pool, place, new, *request)
    check(pending, wanted)
    place = place._replace(length=total)
    check(p.score(pool, place, *request), wanted)
    if cache_dtype is None:
      check(
        p.score(pool, place, *request),
        s.score_joint(
          batch.replace(
            history=History(batch.history.features, total),
            candidates=candidates,
          )
        ),
      )

  @given(
    capacity=st.sampled_from([5, 32, 75]),  # Few shapes to compile.
    new=st.sampled_from([0, 1, 18]),
    share=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    quantized=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
  )
  def test_new_events_are_written(self, capacity, new, share, quantized, seed):
    rng = np.random.default_rng(seed)
    new = min(new, capacity)
    length = (np.array(share) * (capacity - new)).astype(np.int32)
    width, unit = pages_lib.number(capacity), pages_lib.EVENTS
    beyond = 2 * width + 1

    def draw(*shape):
      return rng.integers(-9, 9, shape).astype(np.float32)

    def pair(rows, events, scales):
      codes = jnp.asarray(draw(2, rows, events, 2, 3))
      if not quantized:
        return codes
      return Quantized(codes, jnp.asarray(draw(2, rows, scales, 2)))

    pool = pair(beyond, unit, 1)
    pages = rng.permutation(beyond)[: 2 * width].reshape(2, width)
    pages = pages.astype(np.int32)
    states = pair(2, capacity, width)
    # All but the pages of new events is there already.
    here, first = np.arange(width)[None], length[:, None] // unit
    pool = pages_lib.write(pool, np.where(here < first, pages, beyond), states)
    found = pages_lib.extended(
      pool, np.where(here < first, beyond, pages), states, length, new
    )
    read = pages_lib.read(found, pages, capacity)
    for x, wanted in zip(
      jax.tree.leaves(read), jax.tree.leaves(states), strict=True
    ):
      for row, stop in enumerate(length + new):
        if x.shape[2] != capacity:  # Scales of pages.
          stop = pages_lib.number(int(stop))
        chex.assert_trees_all_equal(x[:, row, :stop], wanted[:, row, :stop])

  def test_warm_up(self):
    s = scorer('causal')
    pages = Pages(Shape.of(s.config, s.options), 8, s.device)
    p = paged.PagedScorer(s)
    sizes = {'rows': 4, 'events': 24, 'candidates': 5, 'new_events': 2}
    pages.pool, done = p.warm_up(pages.pool, **sizes, visible=False)
    self.assertEqual(done.num_programs, 4)
    pages.pool, done = p.warm_up(pages.pool, **sizes, visible=False)
    self.assertEqual(done.num_compilations, 0)
    for part in (pages.pool.keys, pages.pool.values):
      self.assertEqual(float(abs(part).max()), 0)

  def test_refused(self):
    s = scorer('causal')
    batch = support.batch(np.random.default_rng(0), 3, EVENTS)
    pages = Pages(Shape.of(s.config, s.options), 8, s.device)
    index = pages.to_read([], 4, 24)
    place = paged.Place(index, index, np.zeros(2, np.int32), 24)
    with self.assertRaisesRegex(ValueError, '3 rows, history 2'):
      paged.PagedScorer(s).score(
        pages.pool, place, batch.candidates, batch.context
      )


if __name__ == '__main__':
  absltest.main()
