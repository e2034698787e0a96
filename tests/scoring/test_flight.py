"""Several requests at once: none sees what another one wrote."""

from unittest import mock

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from histjax import scoring
from histjax.scoring import transport
from tests import support
from tests.scoring import scorers
from tests.scoring.scorers import TOLERANCE, rows, scorer

_SCORERS: dict = {}


def of_memory(pinned: bool) -> scoring.Scorer:
  """A scorer whose requests lie in NumPy arrays or in pinned memory.

  A CPU has pinned memory, too: what a GPU does is tested without one.
  """
  if pinned not in _SCORERS:
    config = support.config(encoder__num_layers=1)
    where = transport.Transport(jax.devices()[0] if pinned else None)
    with mock.patch.object(transport, 'of_device', return_value=where):
      _SCORERS[pinned] = scoring.Scorer(config, support.init(config)[1])
  return _SCORERS[pinned]


def batches(number, seed=0, **options):
  rng = np.random.default_rng(seed)
  return [
    support.batch(rng, shared_visible=True, **options) for _ in range(number)
  ]


def check(found, batch, s):
  """The logits of real candidates are those of the joint pass."""
  mask = batch.candidates.mask
  expected = s.score_joint(batch)
  chex.assert_trees_all_close(
    {k: v[mask] for k, v in found.items()},
    {k: v[mask] for k, v in expected.items()},
    **TOLERANCE['float32'],
  )


@parameterized.named_parameters(('numpy', False), ('pinned', True))
class FlightTest(parameterized.TestCase):
  def test_requests_in_flight(self, pinned):
    s = of_memory(pinned)
    rng = np.random.default_rng(1)
    for number in (3, 7, 5, 7):  # More than ever before, then again.
      made = batches(number, seed=number)
      pending = []
      for batch in made:
        given = jax.tree.map(np.copy, batch)
        cache = s.encode(given.history)
        pending.append(s.score_async(cache, given.candidates, given.context))
        for array in jax.tree.leaves(given):
          array.fill(1)  # It is still the caller's.
      for i in rng.permutation(number):
        found = pending[i].result()
        check(found, made[i], s)
        chex.assert_trees_all_equal(pending[i].result(), found)

  def test_slots_are_used_again(self, pinned):
    s = of_memory(pinned)
    batch = batches(1)[0]
    cache = s.encode(batch.history)
    request = cache, batch.candidates, batch.context
    slots = []
    take = s._transport.slot

    def slot(layout):
      slots.append(take(layout))
      return slots[-1]

    with mock.patch.object(s._transport, 'slot', slot):
      for _ in range(3):
        for x in [s.score_async(*request) for _ in range(4)]:
          x.result()
    self.assertLen(slots, 12)
    self.assertLen({id(x) for x in slots}, 4)
    self.assertLen({id(x) for x in slots[:4]}, 4)
    with mock.patch.object(s._transport, 'slot', slot):
      for _ in range(100):  # Slots that were read, the longest ago first.
        jax.block_until_ready(s.encode(batch.history).keys)
    self.assertEqual({id(x) for x in slots[12:62]}, {id(x) for x in slots[62:]})
    if pinned:
      kinds = {x.array.sharding.memory_kind for x in slots}
      self.assertEqual(kinds, {'pinned_host'})

  def test_a_slot_of_encode_is_used_when_it_was_read(self, pinned):
    s = of_memory(pinned)
    made = batches(6)
    caches = [s.encode(x.history) for x in made]
    caches = [
      s.extend(cache, batch.history.replace(length=np.ones(3, np.int32)))
      for cache, batch in zip(caches, made, strict=True)
    ]
    for cache, batch in zip(caches, made, strict=True):
      first = {k: v[:, :1] for k, v in batch.history.features.items()}
      whole = {
        k: np.concatenate([v, first[k]], axis=1)
        for k, v in batch.history.features.items()
      }
      for b, n in enumerate(batch.history.length):
        for k, v in whole.items():
          v[b, n] = first[k][b, 0]
      longer = batch.replace(
        history=batch.history.replace(
          features=whole, length=batch.history.length + 1
        ),
        candidates=batch.candidates.replace(visible=None),
      )
      found = s.score(cache, longer.candidates, longer.context)
      check(found, longer, s)

  def test_refused_logits_free_their_slot_once(self, pinned):
    s = scorers.poisoned(of_memory(pinned))
    first, second = map(scorers.without_bad, batches(2))
    bad = scorers.with_bad(first.candidates, ...)
    caches = [s.encode(x.history) for x in (first, second)]
    pending = s.score_async(caches[0], bad, first.context)
    for _ in range(2):
      with self.assertRaisesRegex(ValueError, 'candidate 0 is .*too large'):
        pending.result()
    both = [
      s.score_async(cache, batch.candidates, batch.context)
      for cache, batch in zip(caches, (first, second), strict=True)
    ]
    for x, batch in zip(both, (first, second), strict=True):
      check(x.result(), batch, s)

  def test_the_mask_is_that_of_the_request(self, pinned):
    """It says which logits must be finite, also when it is changed later."""
    s = scorers.poisoned(of_memory(pinned))
    batch = scorers.without_bad(batches(1)[0])
    mask = np.ones((3, 5), bool)
    mask[2, 4] = False
    candidates = scorers.with_bad(batch.candidates, 0, 1).replace(mask=mask)
    cache = s.encode(batch.history)
    pending = s.score_async(cache, candidates, batch.context)
    mask[0, 1] = False
    with self.assertRaisesRegex(ValueError, 'row 0, candidate 1 is'):
      pending.result()


class ManyTest(parameterized.TestCase):
  def requests(self, s, made):
    return [(s.encode(x.history), x.candidates, x.context) for x in made]

  def test_one_bad_request_stops_all(self):
    s = of_memory(False)
    made = [*batches(2), *batches(1, num_events=20)]
    requests = self.requests(s, made)
    cache, candidates, context = requests[2]
    for bad, message in (
      ((None, candidates, context), 'that no Scorer made'),
      ((cache, candidates, {**context, 'user': [1, 2, 99]}), r'\[2\] is 99'),
    ):
      with mock.patch.object(s, '_call') as call:
        with self.assertRaisesRegex(ValueError, message):
          s.score_many([*requests[:2], bad])
      call.assert_not_called()

  def test_what_a_slot_held_does_not_matter(self):
    s = of_memory(False)
    first, *_ = made = batches(3, seed=2)
    made = [x.replace(history=first.history) for x in made]
    made = [
      x.replace(candidates=x.candidates.replace(visible=None)) for x in made
    ]
    take = s._transport.slot

    def slot(layout):
      found = take(layout)
      found.buffer.fill(-1)  # As a request that was refused may leave it.
      return found

    with mock.patch.object(s._transport, 'slot', slot):
      for _ in range(2):  # Then values are checked after they were written.
        requests = self.requests(s, made)
        # Three share the program of four.
        for found, batch in zip(s.score_many(requests), made, strict=True):
          check(found, batch, s)
        check(s.score(*requests[0]), made[0], s)
        _, found = s.encode_and_score(first.history, *requests[0][1:])
        check(found, made[0], s)

  def test_a_bad_logit_is_of_its_request(self):
    s = scorers.poisoned(of_memory(False))
    made = [scorers.without_bad(x) for x in batches(2, seed=5)]
    requests = self.requests(s, made)
    bad = scorers.with_bad(made[1].candidates, ...)
    first, second = s.score_many_async(
      [requests[0], (requests[1][0], bad, made[1].context)]
    )
    with self.assertRaisesRegex(ValueError, 'row 0, candidate 0'):
      second.result()
    check(first.result(), made[0], s)


class ContextTest(absltest.TestCase):
  def test_is_of_the_request(self):
    s = scorer()
    batch = batches(1)[0]
    cache = s.encode(batch.history)
    other = rows(batch.context, np.array([1, 2, 0]))
    found = []
    for context in (batch.context, other):
      found.append(s.score(cache, batch.candidates, context))
      check(found[-1], batch.replace(context=context), s)
    mask = batch.candidates.mask
    apart = np.abs(found[0]['click'] - found[1]['click'])[mask]
    self.assertGreater(apart.min(), 1e-4)


if __name__ == '__main__':
  absltest.main()
