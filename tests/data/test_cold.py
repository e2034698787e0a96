"""What training has not seen is left out of metrics, and counted."""

import hypothesis
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from histjax.data import cold, pipeline
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.schema import Categorical, Schema, Task
from tests.data import logs

OPTIONS = (
  cold.LeaveOut(cold_users=True),
  cold.LeaveOut(cold_items='item'),
  cold.LeaveOut(cold_users=True, cold_items='item'),
)
SCHEMA = Schema(
  user='uid',
  time='ts',
  item=(Categorical('item', 12, out_of_vocabulary=True),),
  tasks=(Task('click'),),
)
PIPELINE = pipeline.PipelineConfig(
  batch_events=64, auto_buckets=1, num_threads=0
)


@st.composite
def events(draw):
  """Few users and items, ids beyond the table, and a moment to split at."""
  size = draw(st.integers(2, 40))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  columns = {
    'uid': rng.integers(0, draw(st.integers(1, 8)), size),
    'ts': rng.integers(0, 10, size),
    'item': rng.integers(0, 15, size),
    'click': rng.integers(0, 2, size),
  }
  return columns, draw(st.integers(1, 9))


def oracle(columns, moment, leave_out):
  """Which events count, by loops over plain values."""
  train = columns['ts'] < moment
  users = set(columns['uid'][train].tolist())
  items = {i for i in columns['item'][train].tolist() if i < 11}
  keep, of_users, of_items = [], 0, 0
  for user, time, item in zip(
    columns['uid'], columns['ts'], columns['item'], strict=True
  ):
    cold_user = leave_out.cold_users and user not in users
    cold_item = bool(leave_out.cold_items) and item not in items
    if time >= moment:
      of_users += cold_user
      of_items += cold_item
    keep.append(time >= moment and not cold_user and not cold_item)
  return np.array(keep), of_users, of_items


class TestLeaveOut(parameterized.TestCase):
  @hypothesis.given(
    events(),
    st.sampled_from(OPTIONS),
    st.sampled_from(['pointwise', 'streaming', 'snapshot']),
  )
  def test_equals_the_oracle(self, drawn, leave_out, kind):
    columns, moment = drawn
    log = EventLog.from_columns(columns, SCHEMA, extra=['item', 'uid', 'ts'])
    train = log.time < moment
    config = RowConfig(kind)
    rows = make_rows(log, ~train, config)
    known = cold.Known(leave_out, make_rows(log, train, config))
    given = {**log.extra, 'click': log.labels['click']}
    keep, of_users, of_items = oracle(given, moment, leave_out)

    counts = known.counts(rows)
    self.assertEqual(counts.candidates, (~train).sum())
    self.assertEqual(counts.left_out, (~train).sum() - keep.sum())
    self.assertEqual(
      counts.cold_users, of_users if leave_out.cold_users else None
    )
    self.assertEqual(
      counts.cold_items, of_items if leave_out.cold_items else None
    )
    # Batch by batch, padding included: the labels of what counts.
    found, total = [], 0
    if train.all():
      with self.assertRaisesRegex(ValueError, 'there are no rows'):
        pipeline.make_buckets(rows, PIPELINE)
      return
    for batch in pipeline.eval_batches(rows, PIPELINE):
      mask = known.mask(batch)
      self.assertFalse((mask & ~batch.candidates.mask).any())
      total += mask.sum()
      group = np.broadcast_to(batch.group[:, None], mask.shape)
      found += zip(
        log.keys[group[mask]].tolist(),
        batch.labels['click'][mask].tolist(),
        strict=True,
      )
    self.assertEqual(total, keep.sum())
    wanted = zip(
      given['uid'][keep].tolist(), given['click'][keep].tolist(), strict=True
    )
    self.assertEqual(sorted(found), sorted(wanted))
    summary = known.label_summary(rows, 'click')
    self.assertEqual(summary.total, keep.sum())
    self.assertEqual(summary.positive, given['click'][keep].sum())

  def test_a_feature_that_is_none(self):
    for name in ('itm', 'price'):  # The other is no id.
      with pytest.raises(ValueError, match=f"cold_items='{name}'.*'item'"):
        cold.LeaveOut(cold_items=name).check(logs.schema())

  def test_what_is_said(self):
    self.assertEqual(
      str(cold.Counts(100, 15, None, 15)),
      '85 of 100 candidates count; 15 left out (15 of cold users)',
    )
    self.assertEqual(
      str(cold.Counts(10, 2, 3, 4)),
      '6 of 10 candidates count; 4 left out (2 of cold users, 3 of cold items)',
    )


if __name__ == '__main__':
  absltest.main()
