"""A pool's programs score, extend and encode as a scorer does its caches."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops, scoring
from histjax.quantization import Quantized
from histjax.scoring import paged
from histjax.scoring import pages as pages_lib
from histjax.serving.pages import Pages, Shape
from histjax.types import History
from tests import marks, support
from tests.scoring import scorers

EVENTS = 20
NEW = 3


def scorer(variant, **options) -> scoring.Scorer:
  return scorers.scorer(
    variant, history_buckets=(24,), row_buckets=(4,), **options
  )


class PagedTest(parameterized.TestCase):
  @marks.slow_unless(lambda variant, cache_dtype: variant == 'causal')
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

  def test_pages_read_where_they_are(self):
    """As kernels do; here what reads them copies them first."""
    rng = np.random.default_rng(0)
    s = scorers.scorer('causal', history_buckets=(32,), row_buckets=(4,))
    batch = support.batch(rng, 3, EVENTS, shared_visible=True)
    request = batch.candidates.replace(visible=None), batch.context
    pages = Pages(Shape.of(s.config, s.options), 16, s.device)
    of_users = [[5, 2], [1, 9], [7, 3]]
    place = paged.Place(
      pages.to_read(of_users, 4, 32),
      pages.to_write(of_users, [0, 0, 0], 4, 32),
      np.asarray(batch.history.length),
      32,
    )
    p = paged.PagedScorer(s)
    asked = []

    def reads(*args, **kwargs):
      asked.append(args)
      return True

    with mock.patch.object(ops, 'tower_reads_pages', reads):
      pool, first = p.encode(pages.pool, place, batch.history, *request)
      second = p.score(pool, place, *request)
      found = [scorers.real(x.result(), batch) for x in (first, second)]
    self.assertLen(asked, 2)
    wanted = scorers.real(s.score(s.encode(batch.history), *request), batch)
    for x in found:
      np.testing.assert_allclose(x, wanted, **scorers.TOLERANCE['float32'])

  @given(
    capacity=st.sampled_from([5, 32, 75]),  # Few shapes to compile.
    new=st.sampled_from([0, 1, 18]),
    share=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    quantized=st.booleans(),
    head_dim=st.sampled_from([3, 8]),
    seed=st.integers(0, 2**32 - 1),
  )
  def test_new_events_are_written(
    self, capacity, new, share, quantized, head_dim, seed
  ):
    rng = np.random.default_rng(seed)
    new = min(new, capacity)
    length = (np.array(share) * (capacity - new)).astype(np.int32)
    width, unit = pages_lib.number(capacity), pages_lib.EVENTS
    beyond = 2 * width + 1

    def draw(*shape):
      return rng.integers(-9, 9, shape).astype(np.float32)

    def pair(rows, events, scales):
      codes = jnp.asarray(draw(2, rows, events, 2, head_dim))
      if not quantized:
        return codes
      return Quantized(codes, jnp.asarray(draw(2, rows, scales, 2)))

    page = pages_lib.shape(2, head_dim)
    pool = jax.tree.map(
      lambda x: x.reshape(2, beyond, *page) if x.ndim == 5 else x,
      pair(beyond, unit, 1),
    )
    pages = rng.permutation(beyond)[: 2 * width].reshape(2, width)
    pages = pages.astype(np.int32)
    states = pair(2, capacity, width)
    # All but the pages of new events is there already.
    here, first = np.arange(width)[None], length[:, None] // unit
    there = here < first + (not new)
    pool = pages_lib.write(pool, np.where(there, pages, beyond), states)
    found = pages_lib.extended(
      pool,
      np.where(here < first, beyond, pages),
      states,
      length,
      np.full(2, new, np.int32),
      new,
    )
    read = pages_lib.read(found, pages, capacity, 2)
    for x, wanted in zip(
      jax.tree.leaves(read), jax.tree.leaves(states), strict=True
    ):
      for row, stop in enumerate(length + new):
        if x.shape[2] != capacity:  # Scales of pages.
          stop = pages_lib.number(int(stop))
        chex.assert_trees_all_equal(x[:, row, :stop], wanted[:, row, :stop])

  def test_pages_without_new_events_are_not_written(self):
    pool = jnp.ones((1, 6, *pages_lib.shape(1, 8)))
    index = np.arange(6, dtype=np.int32).reshape(3, 2)
    found = pages_lib.extended(
      pool,
      index,
      jnp.zeros((1, 3, 2 * pages_lib.EVENTS, 1, 8)),
      np.array([0, pages_lib.EVENTS + 4, 3], np.int32),
      np.array([2, 1, 0], np.int32),
      2,
    )
    kept = found.any((0, 2, 3)).reshape(3, 2)
    self.assertEqual(kept.tolist(), [[False, True], [True, False], [True] * 2])

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


class ManyTest(parameterized.TestCase):
  """Requests, of users of their own, are the rows of one program."""

  def setUp(self):
    super().setUp()
    self.s = scorers.scorer('one_layer', history_buckets=(24,))
    self.p = paged.PagedScorer(self.s)
    self.pages = Pages(
      Shape.of(self.s.config, self.s.options), 25, self.s.device
    )

  def batches(self, rng, shapes, **options):
    return [
      support.batch(rng, rows, EVENTS, candidates, **options)
      for rows, candidates in shapes
    ]

  def encode(self, batches):
    """The pool, and the places of each and of all."""
    pool, places, free = self.pages.pool, [], iter(range(1, 25))
    for batch in batches:
      number = len(batch.history.length)
      of_users = [[next(free), next(free)] for _ in range(number)]
      rows = self.s.options.rows(number)
      place = paged.Place(
        self.pages.to_read(of_users, rows, 24),
        self.pages.to_write(of_users, [0] * number, rows, 24),
        np.asarray(batch.history.length),
        24,
      )
      candidates = batch.candidates.replace(visible=None)
      pool, _ = self.p.encode(
        pool, place, batch.history, candidates, batch.context
      )
      places.append(place)
    self.pages.pool = pool
    real = [x.read[: len(x.length)] for x in places]
    index = np.concatenate(real)
    rows = self.s.options.rows(len(index))
    read = np.zeros((rows, 2), np.int32)
    read[: len(index)] = index
    length = np.concatenate([x.length for x in places])
    return pool, places, paged.Place(read, read, length, 24)

  @given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(
      st.tuples(st.integers(1, 3), st.sampled_from((1, 5, 16))),
      min_size=1,
      max_size=4,
    ),
    alike=st.booleans(),
    plain=st.booleans(),
    typed=st.booleans(),
  )
  def test_equals_one_after_another(self, seed, shapes, alike, plain, typed):
    """Of any rows, numbers of candidates, types, masks and `visible`."""
    if alike:
      shapes = [shapes[0]] * len(shapes)
    rng = np.random.default_rng(seed)
    made = self.batches(rng, shapes, shared_visible=bool(seed % 2))
    pool, places, place = self.encode(made)
    requests = []
    for batch in made:
      candidates, context = batch.candidates, batch.context
      if plain:
        candidates = candidates.replace(visible=None, mask=None)
      if not typed and rng.random() < 0.5:
        context = {k: v.tolist() for k, v in context.items()}
        features = {
          k: v.astype('int64' if v.dtype == np.int32 else 'float64')
          for k, v in candidates.features.items()
        }
        candidates = candidates.replace(features=features)
      requests.append((candidates, context))
    many = self.p.score_many(pool, place, requests)
    self.assertLen(many, len(requests))
    for found, own, request in zip(many, places, requests, strict=True):
      expected = self.p.score(pool, own, *request).result()
      real = request[0].mask
      for task, values in found.result().items():
        self.assertEqual(values.shape, request[0].shape)
        np.testing.assert_allclose(
          values if real is None else values[real],
          expected[task] if real is None else expected[task][real],
          **scorers.TOLERANCE['float32'],
        )

  def test_refused(self):
    made = self.batches(np.random.default_rng(0), [(1, 16)] * 3)
    pool, _, place = self.encode(made)
    candidates = [x.candidates.replace(visible=None, mask=None) for x in made]
    contexts = [x.context for x in made]

    def feature(name, value):
      features = {**candidates[1].features, name: value}
      return candidates[0], candidates[1].replace(features=features)

    item = np.zeros((1, 16), np.int32)
    item[0, 3] = 40
    masked = np.ma.masked_array(np.zeros_like(item), item == 40)
    numbers = np.zeros((1, 16), np.float32)
    numbers[0, 2] = np.nan
    for of_candidates, of_context, message in (
      (feature('item', item), {}, r"\['item'\]\[0, 3\] is 40"),
      (feature('duration', numbers), {}, r"\['duration'\]\[0, 2\] is nan"),
      (feature('item', numbers), {}, r"\['item'\] has dtype float32"),
      (feature('item', masked), {}, r"\['item'\] has masked values"),
      (feature('tag_0', item[:, :9]), {}, r"'\] has shape \(1, 9\)"),
      (feature('other', item), {}, r"\['other'\] is not in the schema"),
      (candidates[:2], {'user': np.array([99])}, r"'user'\]\[0\] is 99"),
      (candidates[:2], {'user': np.array([[1]])}, r'has shape \(1, 1\)'),
      ([candidates[0], None], {}, 'candidates is a NoneType'),
    ):
      requests = list(zip(of_candidates, contexts[:2], strict=True))
      requests[1] = requests[1][0], {**contexts[1], **of_context}
      requests.append((candidates[2], contexts[2]))
      for given_requests in (requests, requests[::-1]):
        with self.assertRaisesRegex(ValueError, message):
          self.p.score_many(pool, place, given_requests)
    good = list(zip(candidates, contexts, strict=True))
    with self.assertRaisesRegex(ValueError, '2 rows, history 3'):
      self.p.score_many(pool, place, good[:2])
    with self.assertRaisesRegex(ValueError, '0 rows, history 3'):
      self.p.score_many(pool, place, [])
    # What they left in a slot is nobody's.
    for x in self.p.score_many(pool, place, good):
      self.assertLen(x.result(), 2)

  def test_a_bad_logit_is_of_its_request(self):
    self.p = paged.PagedScorer(scorers.poisoned(self.s))
    made = self.batches(np.random.default_rng(0), [(1, 16)] * 2)
    made = [scorers.without_bad(x) for x in made]
    pool, places, place = self.encode(made)
    good, bad = (x.candidates.replace(visible=None, mask=None) for x in made)
    bad = scorers.with_bad(bad, ...)
    first, second = self.p.score_many(
      pool, place, [(good, made[0].context), (bad, made[1].context)]
    )
    with self.assertRaisesRegex(
      ValueError, 'row 0, candidate 0 is .*too large'
    ):
      second.result()
    expected = self.p.score(pool, places[0], good, made[0].context).result()
    for task, values in first.result().items():
      np.testing.assert_allclose(
        values, expected[task], **scorers.TOLERANCE['float32']
      )


if __name__ == '__main__':
  absltest.main()
