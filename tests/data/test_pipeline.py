"""Every row once an epoch, on whichever hosts, from wherever it stopped."""

import json
import math

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import assume, given
from hypothesis import strategies as st

from histjax.data import pipeline
from histjax.data import rows as rows_lib
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig
from histjax.schema import Categorical, Schema, Task
from tests import support

SCHEMA = Schema(
  user='user',
  time='time',
  context=(Categorical('user', 1000),),
  item=(Categorical('item', 100_000),),
  action=(Categorical('click', 2),),
  tasks=(Task('click'),),
)


def some_rows(seed=0, users=40, longest=30, **config):
  """Rows of users with very different numbers of events."""
  rng = np.random.default_rng(seed)
  count = rng.integers(1, longest + 1, users)
  n = int(count.sum())
  data = {
    'user': np.repeat(np.arange(users), count),
    'time': np.arange(n),
    'item': np.arange(n),  # Tells the events apart.
    'click': rng.integers(0, 2, n),
  }
  log = EventLog.from_columns(data, SCHEMA)
  return rows_lib.make_rows(log, rng.random(n) < 0.9, RowConfig(**config))


def config(**fields) -> pipeline.PipelineConfig:
  return pipeline.PipelineConfig(
    **{'batch_events': 200, 'num_threads': 0, **fields}
  )


def items(batch) -> list[int]:
  return batch.candidates.features['item'][batch.candidates.mask].tolist()


class TrainBatchesTest(parameterized.TestCase):
  @parameterized.product(kind=('pointwise', 'streaming'), pack=(False, True))
  @support.examples(8)
  @given(
    seed=st.integers(0, 999),
    users=st.integers(1, 30),
    multiple=st.sampled_from([1, 2, 8]),
    threads=st.sampled_from([0, 2]),
  )
  def test_every_row_once_an_epoch(
    self, kind, pack, seed, users, multiple, threads
  ):
    rows = some_rows(seed, users, kind=kind)
    assume(len(rows))
    batches = pipeline.train_batches(
      rows,
      config(seed=seed, num_threads=threads, pack=pack),
      row_multiple=multiple,
      num_epochs=2,
    )
    epochs = [[], []]
    for number, batch in enumerate(batches):
      if pack:
        support.check_rows_are_zero_at_padding(batch)
      else:
        support.check_batch(batch, SCHEMA)
      self.assertEqual(len(batch.group) % multiple, 0)
      epochs[number // batches.batches_per_epoch] += items(batch)
    batches.close()
    wanted = sorted(rows.log.features['item'][rows.events].tolist())
    self.assertEqual(sorted(epochs[0]), wanted)
    self.assertEqual(sorted(epochs[1]), wanted)

  def test_no_epoch(self):
    with self.assertRaisesRegex(ValueError, 'num_epochs=0 must be >= 1'):
      pipeline.train_batches(some_rows(), config(), num_epochs=0)

  def test_shapes_are_those_of_the_buckets(self):
    rows = some_rows()
    batches = pipeline.train_batches(rows, config(), num_epochs=1)
    shapes = {
      (b.num_events, b.num_candidates, b.num_rows) for b in batches.buckets
    }
    self.assertGreater(len(shapes), 1)
    for batch in batches:
      n, width = batch.history.features['item'].shape
      self.assertIn((width, batch.candidates.mask.shape[1], n), shapes)
      self.assertLessEqual(n * (width + batch.candidates.mask.shape[1]), 200)

  def test_epochs_and_seeds_differ(self):
    rows = some_rows()
    batches = pipeline.train_batches(rows, config(), num_epochs=2)
    found = [items(b) for b in batches]
    half = batches.batches_per_epoch
    self.assertNotEqual(found[:half], found[half:])
    # Batches are made of other rows, not only in another order.
    self.assertNotEqual(
      sorted(sorted(b) for b in found[:half]),
      sorted(sorted(b) for b in found[half:]),
    )
    again = pipeline.train_batches(rows, config(), num_epochs=2)
    self.assertEqual([items(b) for b in again], found)
    other = pipeline.train_batches(rows, config(seed=1), num_epochs=1)
    self.assertNotEqual([items(b) for b in other], found[:half])

  def test_goes_on_without_end(self):
    batches = pipeline.train_batches(some_rows(users=2), config())
    for _ in range(5 * batches.batches_per_epoch):
      next(batches)

  @parameterized.product(
    threads=(0, 2), steps=(0, 1, 7, 23), pack=(False, True)
  )
  def test_resumes_bit_for_bit(self, threads, steps, pack):
    rows = some_rows(users=200 if pack else 40)
    fields = config(num_threads=threads, pack=pack)
    batches = pipeline.train_batches(rows, fields, num_epochs=3)
    for _ in range(steps):
      next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    fresh = pipeline.train_batches(rows, fields, num_epochs=3)
    for _ in range(3):  # Wherever it was before.
      next(fresh)
    fresh.set_state(state)
    rest, again = list(batches), list(fresh)
    self.assertLen(rest, 3 * batches.batches_per_epoch - steps)
    chex.assert_trees_all_equal(rest, again, strict=True)

  @parameterized.parameters(
    {'seed': 1},
    {'batch_events': 300},
    {'row_multiple': 3},
    {'history_buckets': (64,)},
    {'pack': True},
  )
  def test_position_of_another_order_is_refused(self, **fields):
    rows = some_rows()
    state = pipeline.train_batches(rows, config()).get_state()
    other = pipeline.train_batches(rows, config(**fields))
    with self.assertRaisesRegex(ValueError, 'another order of batches'):
      other.set_state(state)
    other = pipeline.train_batches(some_rows(seed=1), config())
    with self.assertRaisesRegex(ValueError, 'another order of batches'):
      other.set_state(state)

  @parameterized.product(hosts=(2, 4), train=(True, False), pack=(False, True))
  def test_hosts_share_each_batch(self, hosts, train, pack):
    rows = some_rows(users=200 if pack else 40)

    def batches(**kwargs):
      if train:
        kwargs['num_epochs'] = 2
      make = pipeline.train_batches if train else pipeline.eval_batches
      return list(make(rows, config(pack=pack), row_multiple=4, **kwargs))

    whole = batches()
    shards = [batches(shard_index=i, shard_count=hosts) for i in range(hosts)]
    for shard in shards:
      self.assertLen(shard, len(whole))
    for step, batch in enumerate(whole):
      parts = [shard[step] for shard in shards]
      chex.assert_trees_all_equal_shapes_and_dtypes(*parts)
      joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
      chex.assert_trees_all_equal(joined, batch, strict=True)

  def test_a_host_makes_an_earlier_batch_whole(self):
    options = {'row_multiple': 4, 'num_epochs': 2}
    whole = list(pipeline.train_batches(some_rows(), config(), **options))
    share = pipeline.train_batches(
      some_rows(), config(), shard_index=1, shard_count=2, **options
    )
    for _ in whole[:-1]:
      next(share)  # Where it is does not matter.
    for number in (0, 1, len(whole) - 2):
      chex.assert_trees_all_equal(share.whole(number), whole[number])

  @parameterized.parameters((1, 1), (2, 1), (8, 2), (6, 3), (8, 8), (1, 3))
  def test_batches_are_the_same_on_any_devices_and_hosts(self, devices, hosts):
    rows = some_rows()
    whole = list(pipeline.train_batches(rows, config(), num_epochs=2))
    shards = [
      pipeline.train_batches(
        rows,
        config(),
        row_multiple=devices,
        shard_index=i,
        shard_count=hosts,
        num_epochs=2,
      )
      for i in range(hosts)
    ]
    unit = math.lcm(devices, hosts)
    waste = max(
      (-b.num_rows % unit) / (b.num_rows + -b.num_rows % unit)
      for b in shards[0].buckets
    )
    self.assertAlmostEqual(shards[0].padding, waste)
    for batch, *parts in zip(whole, *shards, strict=True):
      joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
      n = len(batch.group)
      self.assertLen(joined.group, n + -n % unit)
      chex.assert_trees_all_equal(
        jax.tree.map(lambda x, n=n: x[:n], joined), batch, strict=True
      )
      self.assertFalse(joined.candidates.mask[n:].any())
      self.assertFalse(joined.history.length[n:].any())

  @parameterized.parameters((8, 2, 1, 1), (1, 1, 8, 4), (4, 1, 2, 2))
  def test_position_is_taken_up_by_others(self, devices, hosts, to, by):
    rows = some_rows()
    one = pipeline.train_batches(
      rows, config(), row_multiple=devices, shard_count=hosts
    )
    given = pipeline.train_batches(rows, config())
    steps = one.batches_per_epoch + 5  # In the second epoch.
    for _ in range(steps):
      next(one)
    count = sum(len(items(next(given))) > 0 for _ in range(steps))
    self.assertEqual(count, steps)
    state = json.loads(json.dumps(one.get_state()))
    self.assertEqual(state['epoch'], 1)
    fresh = pipeline.train_batches(rows, config(), num_epochs=2)
    seen = [
      int((next(fresh).candidates.mask).any(1).sum()) for _ in range(steps)
    ]
    self.assertEqual(state['rows'], sum(seen[one.batches_per_epoch :]))
    parts = [
      pipeline.train_batches(
        rows, config(), row_multiple=to, shard_index=i, shard_count=by
      )
      for i in range(by)
    ]
    for part in parts:
      part.set_state(state)
      self.assertEqual(part.get_state(), state)
    for _ in range(3):
      joined = [i for part in parts for i in items(next(part))]
      self.assertEqual(joined, items(next(given)))

  def test_position_between_two_batches_is_refused(self):
    batches = pipeline.train_batches(some_rows(), config())
    next(batches)
    state = batches.get_state()
    with self.assertRaisesRegex(ValueError, 'is between two batches'):
      batches.set_state({**state, 'rows': state['rows'] + 1})
    with self.assertRaisesRegex(ValueError, 'earlier version of histjax'):
      batches.set_state({'next_index': 1, 'order': 'of before'})


class EvalBatchesTest(parameterized.TestCase):
  @parameterized.parameters(1, 8)
  def test_every_row_once_in_order(self, multiple):
    rows = some_rows()
    batches = pipeline.eval_batches(rows, config(), row_multiple=multiple)
    found = list(batches)
    self.assertLen(found, batches.batches_per_epoch)
    self.assertEqual(
      sorted(i for b in found for i in items(b)),
      sorted(rows.log.features['item'][rows.events].tolist()),
    )
    again = pipeline.eval_batches(rows, config(seed=5), row_multiple=multiple)
    chex.assert_trees_all_equal(list(again), found, strict=True)


class BucketTest(parameterized.TestCase):
  @support.examples(10)
  @given(
    seed=st.integers(0, 99),
    events=st.integers(1, 500),
    unit=st.sampled_from([1, 3, 8]),
    auto=st.integers(1, 5),
  )
  def test_smallest_that_fits(self, seed, events, unit, auto):
    rows = some_rows(seed)
    buckets = pipeline.make_buckets(
      rows, config(batch_events=events, auto_buckets=auto, row_multiple=unit)
    )
    self.assertLessEqual(len(buckets), auto)
    found = []
    for bucket in buckets:
      found += bucket.rows.tolist()
      length = rows.history_lengths[bucket.rows]
      count = rows.candidate_counts[bucket.rows]
      cost = bucket.num_events + bucket.num_candidates
      for other in buckets:
        fits = (length <= other.num_events) & (count <= other.num_candidates)
        if other is bucket:
          self.assertTrue(fits.all())
        elif other.num_events + other.num_candidates < cost:
          self.assertFalse(fits.any())
      self.assertEqual(bucket.num_rows % unit, 0)
      # As many rows as fit; at least `row_multiple`.
      self.assertGreater((bucket.num_rows + unit) * cost, events)
      if bucket.num_rows > unit:
        self.assertLessEqual(bucket.num_rows * cost, events)
    self.assertEqual(sorted(found), list(range(len(rows))))

  def test_given(self):
    rows = some_rows()
    buckets = pipeline.make_buckets(
      rows, config(history_buckets=(5, 40), candidate_buckets=(2, 4, 30))
    )
    self.assertContainsSubset(
      {(b.num_events, b.num_candidates) for b in buckets},
      {(5, 2), (5, 4), (5, 30), (40, 2), (40, 4), (40, 30)},
    )

  @parameterized.parameters((1, [64]), (2, [24, 64]), (50, [24, 64]))
  def test_automatic_sizes_hold_two_in_a_hundred_rows(self, short, sizes):
    count = np.full(100, 60)
    count[:short] = 20
    n = int(count.sum())
    data = {
      'user': np.repeat(np.arange(100), count),
      'time': np.arange(n),
      'item': np.arange(n),
      'click': np.arange(n) % 2,
    }
    log = EventLog.from_columns(data, SCHEMA)
    rows = rows_lib.make_rows(log, np.ones(n, bool), RowConfig())
    buckets = pipeline.make_buckets(rows, config(auto_buckets=4))
    self.assertEqual([b.num_events for b in buckets], sizes)

  @support.examples(10)
  @given(
    seed=st.integers(0, 99),
    events=st.sampled_from([1, 2000, 9000]),
    unit=st.sampled_from([1, 3, 8]),
  )
  def test_packed(self, seed, events, unit):
    rows = some_rows(seed, users=300)
    buckets = pipeline.make_buckets(
      rows, config(batch_events=events, pack=True, row_multiple=unit)
    )
    found = []
    for bucket in buckets:
      found += bucket.rows.tolist()
      self.assertEqual(bucket.num_rows % unit, 0)
      if bucket.num_rows > unit:
        cost = bucket.num_events + bucket.num_candidates
        self.assertLessEqual(bucket.num_rows * cost, events)
      # The last batch is about as full as the others.
      missing = bucket.num_batches * bucket.num_rows - len(bucket.units)
      self.assertLess(missing, bucket.num_batches * unit)
    self.assertEqual(sorted(found), list(range(len(rows))))

  def test_packed_into_given_shapes(self):
    rows = some_rows()
    sizes = {'history_buckets': (20, 70), 'candidate_buckets': (18, 60)}
    buckets = pipeline.make_buckets(rows, config(pack=True, **sizes))
    self.assertEqual(
      [(b.num_events, b.num_candidates) for b in buckets], [(20, 18), (70, 60)]
    )
    for field, message in (
      ({'history_buckets': (5,), 'candidate_buckets': (60,)}, 'history_buck'),
      ({'history_buckets': (60,), 'candidate_buckets': (5,)}, 'candidate_bu'),
    ):
      with self.assertRaisesRegex(ValueError, rf'user \d+ has .*{message}'):
        pipeline.make_buckets(rows, config(pack=True, **field))

  def test_no_history_has_one_empty_slot(self):
    rows = some_rows(kind='pointwise', history_length=0)
    (bucket,) = pipeline.make_buckets(rows, config())
    self.assertEqual((bucket.num_events, bucket.num_candidates), (1, 1))

  @parameterized.parameters(
    ({'history_buckets': (5,)}, r'user \d+ has \d+ events .*history_buckets'),
    ({'candidate_buckets': (2,)}, r'user \d+ has \d+ candidates.*larger buck'),
  )
  def test_row_larger_than_the_largest(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      pipeline.train_batches(some_rows(), config(**fields))

  @parameterized.parameters(
    (
      {'history_buckets': (8, 4)},
      r'=\(8, 4\) must be positive and strictly asc',
    ),
    ({'candidate_buckets': (0,)}, 'candidate_buckets'),
    ({'batch_events': 0}, 'batch_events=0'),
    ({'row_multiple': 0}, 'pipeline: row_multiple=0'),
    ({'seed': -1}, 'seed=-1'),
    ({'num_threads': -1}, 'num_threads=-1'),
    ({'prefetch': -1}, 'prefetch=-1'),
    ({'auto_buckets': 0}, 'auto_buckets=0'),
    ({'pack': True, 'history_buckets': (8,)}, r'candidate_buckets=\(\) must'),
  )
  def test_bad_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      config(**fields)

  def test_bad_arguments(self):
    rows = some_rows()
    with self.assertRaisesRegex(ValueError, 'shard_index=2 must be in'):
      pipeline.train_batches(rows, config(), shard_index=2, shard_count=2)
    with self.assertRaisesRegex(ValueError, 'row_multiple=0'):
      pipeline.eval_batches(rows, config(), row_multiple=0)
    empty = rows_lib.make_rows(
      rows.log, np.zeros(len(rows.log), bool), RowConfig()
    )
    with self.assertRaisesRegex(ValueError, 'no rows'):
      pipeline.eval_batches(empty, config())


if __name__ == '__main__':
  absltest.main()
