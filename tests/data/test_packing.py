"""Rows share a row of a batch, every row once, and little of it is padding."""

import chex
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import packing, pipeline
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, collate, make_rows
from histjax.schema import Categorical, Schema, Task
from tests import support

SCHEMA = Schema(
  user='user',
  time='time',
  context=(Categorical('age', 100),),
  item=(Categorical('item', 2_000_000),),
  action=(Categorical('click', 2),),
  tasks=(Task('click'),),
)


def log_of(count, seed=0) -> EventLog:
  """Users with `count` events each; items tell the events apart."""
  rng = np.random.default_rng(seed)
  n = int(np.sum(count))
  data = {
    'user': np.repeat(np.arange(len(count)), count),
    'age': np.repeat(rng.integers(0, 100, len(count)), count),
    'time': np.arange(n),
    'item': np.arange(n),
    'click': rng.integers(0, 2, n),
  }
  return EventLog.from_columns(data, SCHEMA)


def heavy_tailed(events: int, seed=0) -> np.ndarray:
  """Events of users, log-normal: a median of 12 and a longest near 5000."""
  rng = np.random.default_rng(seed)
  count = np.maximum(1, rng.lognormal(2.5, 1.3, events // 8).astype(int))
  return count[: np.searchsorted(np.cumsum(count), events) + 1]


def slots(buckets) -> int:
  """Of candidates, padding included, in an epoch."""
  return sum(b.num_batches * b.num_rows * b.num_candidates for b in buckets)


class PackTest(parameterized.TestCase):
  @given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 200),
    longest=st.sampled_from([0, 1, 7, 300, 20_000]),
    most=st.sampled_from([1, 800, 10**6]),
    limit=st.integers(1, 4),
  )
  def test_every_row_once_and_in_its_room(
    self, seed, rows, longest, most, limit
  ):
    rng = np.random.default_rng(seed)
    length = rng.integers(0, longest + 1, rows)
    count = np.minimum(rng.zipf(1.5, rows), 5000)
    into = packing.shapes(length, count, most=most, limit=limit)
    self.assertLessEqual(len(into), limit)
    bins = packing.pack(length, count, into, rng)
    found = np.concatenate([b.rows for b in bins])
    np.testing.assert_array_equal(np.sort(found), np.arange(rows))
    self.assertContainsSubset(
      {(b.num_events, b.num_candidates) for b in bins}, into
    )
    for part in bins:
      self.assertEqual(part.offsets[-1], len(part.rows))
      for sizes, room in (
        (length, part.num_events),
        (count, part.num_candidates),
      ):
        used = np.add.reduceat(sizes[part.rows], part.offsets[:-1])
        self.assertLessEqual(used.max(), room)

  def test_a_bin_is_filled_to_the_brim(self):
    length, count = np.array([9, 7]), np.array([3, 5])
    rng = np.random.default_rng(0)
    (bins,) = packing.pack(length, count, [(16, 8)], rng)
    self.assertEqual(bins.offsets.tolist(), [0, 2])

  def test_the_same_again(self):
    length = np.random.default_rng(0).integers(0, 50, 300)
    into = packing.shapes(length, length + 1, most=100, limit=4)
    first, again, other = (
      packing.pack(length, length + 1, into, np.random.default_rng(seed))
      for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first[0].rows, again[0].rows)
    self.assertFalse(np.array_equal(first[0].rows, other[0].rows))

  @parameterized.parameters((200, 200), (50, 200), (None, None))
  def test_a_million_heavy_tailed_events(self, history_length, max_candidates):
    log = log_of(heavy_tailed(1_000_000))
    config = RowConfig(
      history_length=history_length, max_candidates=max_candidates
    )
    rows = make_rows(log, np.ones(len(log), bool), config)
    real = rows.candidate_counts.sum()
    padded = pipeline.make_buckets(rows, pipeline.PipelineConfig())
    packed = pipeline.make_buckets(rows, pipeline.PipelineConfig(pack=True))
    self.assertGreater(real / slots(packed), 0.85)
    self.assertLess(real / slots(padded), 0.7)
    self.assertLessEqual(len(packed), 2)
    events = sum(b.num_batches * b.num_rows * b.num_events for b in packed)
    self.assertGreater(rows.history_lengths.sum() / events, 0.85)


class BatchTest(parameterized.TestCase):
  @parameterized.parameters('pointwise', 'streaming')
  @given(seed=st.integers(0, 2**32 - 1), users=st.integers(1, 6))
  def test_holds_the_rows(self, kind, seed, users):
    rng = np.random.default_rng(seed)
    log = log_of(rng.integers(1, 9, users), seed)
    mask = rng.random(len(log)) < 0.7
    mask[rng.integers(len(log))] = True  # A split without events is refused.
    rows = make_rows(
      log, mask, RowConfig(kind, history_length=3, max_candidates=4)
    )
    indices = rng.permutation(len(rows))
    cuts = np.sort(rng.integers(0, len(rows) + 1, 2))
    pieces = np.diff([0, *cuts, len(rows)])  # Some have none.
    size = {
      'num_rows': 4,
      'num_events': int(max(1, rows.history_lengths.sum())),
      'num_candidates': int(max(1, rows.candidate_counts.sum())),
    }
    batch = rows.batch(indices, **size, pieces=pieces)
    again = collate([rows[i] for i in indices], **size, pieces=pieces)
    chex.assert_trees_all_equal(again, batch, strict=True)
    where = 0
    for b in range(4):
      begin = event = 0
      for number in range(pieces[b] if b < 3 else 0):
        row = rows[int(indices[where])]
        where += 1
        shown = slice(begin, begin + len(row.visible))
        past = slice(event, event + len(row.history['item']))
        begin, event = shown.stop, past.stop
        np.testing.assert_array_equal(
          batch.history.features['item'][b, past], row.history['item']
        )
        np.testing.assert_array_equal(
          batch.segments.events[b, past], past.start
        )
        for found, wanted in (
          (batch.candidates.features['item'], row.candidates['item']),
          (batch.candidates.visible, past.start + row.visible),
          (batch.candidates.mask, True),
          (batch.labels['click'], row.labels['click']),
          (batch.context['age'], row.context['age']),
          (batch.group, row.group),
          (batch.segments.candidates, past.start),
          (batch.segments.index, number),
        ):
          np.testing.assert_array_equal(found[b, shown], wanted)
      self.assertEqual(batch.history.length[b], event)
      self.assertFalse(batch.candidates.mask[b, begin:].any())
    support.check_rows_are_zero_at_padding(batch)

  def test_refuses(self):
    rows = make_rows(log_of([3, 4, 5]), np.ones(12, bool), RowConfig())
    size = {'num_rows': 2, 'num_events': 9, 'num_candidates': 9}
    with self.assertRaisesRegex(ValueError, 'pieces are 2 rows, .* are 3'):
      rows.batch([0, 1, 2], **size, pieces=[1, 1])
    with self.assertRaisesRegex(ValueError, '12 candidates do not fit'):
      rows.batch([0, 1, 2], **size, pieces=[3])
    with self.assertRaisesRegex(ValueError, '3 rows do not fit'):
      rows.batch([0, 1, 2], **size, pieces=[1, 1, 1])


if __name__ == '__main__':
  absltest.main()
