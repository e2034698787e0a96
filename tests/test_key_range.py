"""Key ranges, printed as whole masks: a row a query, a column a key."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from histjax import key_range as ranges
from tests.ops.history_attention import suite

NUM_EVENTS = 5


def masks(key_range) -> list[str]:
  """One picture per row of the batch; `#` is visible."""
  index = np.arange(NUM_EVENTS)
  start = np.asarray(key_range.start)[:, :, None]
  stop = np.asarray(key_range.stop)[:, :, None]
  visible = (start <= index) & (index < stop)
  return [
    '\n'.join(''.join('.#'[int(v)] for v in query) for query in row)
    for row in visible
  ]


def picture(text: str) -> str:
  return '\n'.join(text.split())


class HistoryRangeTest(parameterized.TestCase):
  def check(self, length, expected, structure, **kwargs):
    key_range = ranges.history_range(
      jnp.array([length], jnp.int32), NUM_EVENTS, **kwargs
    )
    self.assertEqual(masks(key_range), [picture(expected)])
    self.assertEqual(key_range.structure, structure)
    self.assertEqual(key_range.start.dtype, jnp.int32)
    self.assertEqual(key_range.stop.dtype, jnp.int32)

  def test_bidirectional(self):
    self.check(3, '###.. ###.. ###.. ###.. ###..', 'prefix', causal=False)

  def test_causal(self):
    self.check(3, '#.... ##... ###.. ###.. ###..', 'causal', causal=True)

  def test_causal_full(self):
    self.check(5, '#.... ##... ###.. ####. #####', 'causal', causal=True)

  def test_causal_empty(self):
    self.check(0, '..... ..... ..... ..... .....', 'causal', causal=True)

  def test_window(self):
    self.check(4, '#.... ##... .##.. ..##. ..##.', 'any', causal=True, window=2)

  def test_window_of_one_is_the_event_itself(self):
    self.check(5, '#.... .#... ..#.. ...#. ....#', 'any', causal=True, window=1)

  def test_wide_window_sees_what_causal_sees(self):
    self.check(3, '#.... ##... ###.. ###.. ###..', 'any', causal=True, window=9)

  def test_rows_have_their_own_length(self):
    key_range = ranges.history_range(
      jnp.array([1, 2], jnp.int32), NUM_EVENTS, causal=True
    )
    self.assertEqual(
      masks(key_range),
      [
        picture('#.... #.... #.... #.... #....'),
        picture('#.... ##... ##... ##... ##...'),
      ],
    )

  def test_window_without_causal(self):
    with self.assertRaisesRegex(ValueError, 'window=2 needs causal=True'):
      ranges.history_range(jnp.array([3]), 5, causal=False, window=2)

  @parameterized.parameters(0, -1)
  def test_window_below_one(self, window):
    with self.assertRaisesRegex(ValueError, 'at least 1'):
      ranges.history_range(jnp.array([3]), 5, causal=True, window=window)
    with self.assertRaisesRegex(ValueError, 'at least 1'):
      ranges.candidate_range(jnp.array([[3]]), window=window)


class CandidateRangeTest(parameterized.TestCase):
  VISIBLE = jnp.array([[0, 2, 5]], jnp.int32)

  def test_all_that_came_before(self):
    key_range = ranges.candidate_range(self.VISIBLE)
    self.assertEqual(masks(key_range), [picture('..... ##... #####')])
    self.assertEqual(key_range.structure, 'any')

  def test_window(self):
    key_range = ranges.candidate_range(self.VISIBLE, window=2)
    self.assertEqual(masks(key_range), [picture('..... ##... ...##')])
    self.assertEqual(key_range.structure, 'any')

  def test_shared(self):
    visible = jnp.array([[3, 3]], jnp.int32)
    key_range = ranges.candidate_range(visible, whole_history=True)
    self.assertEqual(masks(key_range), [picture('###.. ###..')])
    self.assertEqual(key_range.structure, 'prefix')

  def test_shared_window(self):
    visible = jnp.array([[3, 3]], jnp.int32)
    key_range = ranges.candidate_range(visible, window=2, whole_history=True)
    self.assertEqual(masks(key_range), [picture('.##.. .##..')])
    self.assertEqual(key_range.structure, 'any')


class ConcatenateTest(parameterized.TestCase):
  def joint(self, *, causal, shared, window=None, visible=3):
    length = jnp.array([3], jnp.int32)
    return ranges.concatenate(
      ranges.history_range(length, NUM_EVENTS, causal=causal, window=window),
      ranges.candidate_range(
        jnp.array([[visible, visible]], jnp.int32),
        window=window,
        whole_history=shared,
      ),
    )

  def test_causal(self):
    key_range = self.joint(causal=True, shared=True)
    self.assertEqual(
      masks(key_range),
      [picture('#.... ##... ###.. ###.. ###.. ###.. ###..')],
    )
    self.assertEqual(key_range.structure, 'causal')

  def test_bidirectional(self):
    key_range = self.joint(causal=False, shared=True)
    self.assertEqual(
      masks(key_range),
      [picture('###.. ###.. ###.. ###.. ###.. ###.. ###..')],
    )
    self.assertEqual(key_range.structure, 'prefix')

  def test_streaming(self):
    key_range = self.joint(causal=True, shared=False, visible=1)
    self.assertEqual(
      masks(key_range),
      [picture('#.... ##... ###.. ###.. ###.. #.... #....')],
    )
    self.assertEqual(key_range.structure, 'any')

  def test_window(self):
    key_range = self.joint(causal=True, shared=True, window=2)
    self.assertEqual(
      masks(key_range),
      [picture('#.... ##... .##.. .##.. .##.. .##.. .##..')],
    )
    self.assertEqual(key_range.structure, 'any')


class StructureTest(parameterized.TestCase):
  """A structure that is claimed is true, query by query."""

  @parameterized.product(
    causal=(False, True), num_candidates=(0, 1, 3), traced=(False, True)
  )
  def test_is_true(self, causal, num_candidates, traced):

    def joint(length):
      shape = (length.shape[0], num_candidates)
      visible = jnp.broadcast_to(length[:, None], shape)
      return ranges.concatenate(
        ranges.history_range(length, NUM_EVENTS, causal=causal),
        ranges.candidate_range(visible, whole_history=True),
      )

    joint = jax.jit(joint) if traced else joint

    @hypothesis.given(
      st.lists(st.integers(0, NUM_EVENTS), min_size=3, max_size=3)
    )
    def check(length):
      key_range = joint(jnp.array(length, jnp.int32))
      self.assertEqual(key_range.structure, 'causal' if causal else 'prefix')
      start, stop = suite.structured(
        length, NUM_EVENTS + num_candidates, NUM_EVENTS, key_range.structure
      )
      np.testing.assert_array_equal(key_range.start, start)
      np.testing.assert_array_equal(key_range.stop, stop)

    check()


if __name__ == '__main__':
  absltest.main()
