"""Shapes that rows are padded to, against all that there could be."""

import itertools
import math

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import buckets
from histjax.data import bucketing
from tests import support

SIZES = st.lists(
  st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=30
)


def cost(sizes, into):
  """Slots of the rows, each in the cheapest shape."""
  return sum(
    min(w + t for w, t in into if length <= w and count <= t)
    for length, count in sizes
  )


class ShapesTest(parameterized.TestCase):
  @support.examples(50)
  @given(sizes=SIZES, limit=st.integers(1, 4))
  def test_against_all(self, sizes, limit):
    length, count = np.array(sizes).T
    into = bucketing.shapes(length, count, limit)
    self.assertLessEqual(len(into), limit)
    place = bucketing.smallest(length, count, into)
    self.assertEqual(sorted({*place.tolist()}), list(range(len(into))))
    found = sum(sum(into[i]) for i in place)
    self.assertEqual(found, cost(sizes, into))
    wide, tall = (
      sorted({buckets.round_up(int(x)) for x in axis})
      for axis in (length, count)
    )
    largest = (wide[-1], tall[-1])
    others = set(itertools.product(wide, tall)) - {largest}
    # As many as there can be: more never cost more.
    chosen = itertools.combinations(others, min(limit - 1, len(others), 3))
    best = min(cost(sizes, [largest, *some]) for some in chosen)
    alone = cost(sizes, [largest])
    slack = limit * alone / 100  # Shapes that save less are not taken.
    saved = (1 - 1 / math.e) * (alone - best) - slack
    self.assertGreaterEqual(alone - found, saved)
    if limit <= 2 and best < 0.99 * alone:
      self.assertEqual(found, best)

  def test_one_that_only_exchange_finds(self):
    # Alone the middle saves most; beside the longest, the two ends do.
    sizes = [(8, 1)] * 10 + [(16, 1)] * 10 + [(24, 1)] * 10 + [(80, 1)] * 2
    length, count = np.array(sizes).T
    into = bucketing.shapes(length, count, 3)
    both = itertools.combinations([8, 16, 24], 2)
    best = min(cost(sizes, [(80, 1), (a, 1), (b, 1)]) for a, b in both)
    self.assertEqual(cost(sizes, into), best)

  def test_many_sizes(self):
    rng = np.random.default_rng(0)
    length = np.minimum(rng.pareto(1.0, 20_000) * 20, 10_000).astype(np.int64)
    count = np.maximum(length // 3, 1)
    into = bucketing.shapes(length, count, 4)
    self.assertLen(into, 4)
    self.assertEqual(into[-1][0], buckets.round_up(int(length.max())))
    place = bucketing.smallest(length, count, into)
    self.assertTrue(
      (np.array(into)[place] >= np.stack([length, count], 1)).all()
    )
    # Of lengths that halve four times.
    halves = np.array(buckets.of_data(length, 4))
    slots = halves[np.searchsorted(halves, length)].sum()
    self.assertLess(np.array(into)[place][:, 0].sum(), slots / 1.5)


if __name__ == '__main__':
  absltest.main()
