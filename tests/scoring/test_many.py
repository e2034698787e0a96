"""Several requests as one program."""

import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import scoring
from tests import support
from tests.scoring.scorers import TOLERANCE, real, scorer


def requests_of(s, rng, shapes, **options):
  """`(cache, candidates, context)` of each `(rows, events, candidates)`."""
  found = []
  for shape in shapes:
    batch = support.batch(rng, *shape, **options)
    found.append((s.encode(batch.history), batch.candidates, batch.context))
  return found


class ManyTest(parameterized.TestCase):
  @given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(
      st.tuples(
        st.sampled_from((1, 3)), st.sampled_from((9, 20)), st.integers(1, 16)
      ),
      min_size=1,
      max_size=5,
    ),
  )
  def test_equals_one_after_another(self, seed, shapes):
    """Of any rows, capacities, numbers of candidates, masks and `visible`."""
    s = scorer()
    rng = np.random.default_rng(seed)
    given_requests = requests_of(s, rng, shapes, shared_visible=bool(seed % 2))
    if seed % 3 == 0:  # One that says nothing of what it sees.
      cache, candidates, context = given_requests[0]
      given_requests[0] = cache, candidates.replace(visible=None), context
    found = s.score_many(given_requests)
    self.assertLen(found, len(given_requests))
    for logits, request in zip(found, given_requests, strict=True):
      expected = s.score(*request)
      mask = request[1].mask
      for task, values in expected.items():
        self.assertEqual(logits[task].shape, values.shape)
        np.testing.assert_allclose(
          logits[task][mask], values[mask], **TOLERANCE['float32']
        )

  def test_one_program_for_each_power_of_two(self):
    config = support.config(encoder__num_layers=1)
    s = scoring.Scorer(config, support.init(config)[1])
    rng = np.random.default_rng(0)
    many = requests_of(s, rng, [(1, 9, 5)] * 8, shared_visible=True)
    for number, compiled in ((8, 2), (5, 2), (7, 2), (3, 3), (4, 3), (1, 4)):
      s.score_many(many[:number])
      self.assertEqual(s.num_compilations, compiled)

  def test_in_flight_and_in_any_order(self):
    s = scorer()
    rng = np.random.default_rng(1)
    many = requests_of(s, rng, [(2, 9, 5)] * 4)
    expected = [real(s.score(*x), Batch(x)) for x in many]
    pending = [*s.score_many_async(many[:2]), *s.score_many_async(many[2:])]
    for i in (3, 0, 2, 1, 1):
      np.testing.assert_allclose(
        real(pending[i].result(), Batch(many[i])),
        expected[i],
        **TOLERANCE['float32'],
      )

  def test_one_that_is_bad_is_named_before_any_is_scored(self):
    s = scorer()
    many = requests_of(s, np.random.default_rng(2), [(1, 9, 5)] * 2)
    cache, candidates, context = many[1]
    item = np.full((1, 5), 40, np.int32)
    bad = candidates.replace(
      features={**candidates.features, 'item': item}, mask=None
    )
    with self.assertRaisesRegex(ValueError, r"\['item'\]\[0, 0\] is 40"):
      s.score_many([many[0], (cache, bad, context)])
    self.assertEqual(s.score_many(iter([])), [])


class Batch:
  """What `real` reads of one."""

  def __init__(self, request):
    self.candidates = request[1]
