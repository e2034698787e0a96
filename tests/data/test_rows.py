"""Rows show each candidate its past, all of it and nothing else."""

import dataclasses
import itertools
import math
from unittest import mock

import chex
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import grouping
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, collate, make_rows
from histjax.features import TimeGap
from tests import support
from tests.data import logs

KINDS = ('pointwise', 'request', 'streaming')


def views(rows) -> dict[int, list]:
  """`{item: [everything about a candidate]}`; items identify events."""
  found: dict[int, list] = {}
  for row in rows:
    for c, item in enumerate(row.candidates['item'].tolist()):
      stop = row.visible[c]
      view = {
        'seen': row.history['item'][:stop].tolist(),
        'stars': row.history['stars'][:stop].tolist(),
        'gaps': row.history['time_gap'][:stop].tolist(),
        'candidate': {k: v[c].item() for k, v in row.candidates.items()},
        'context': {k: v.item() for k, v in row.context.items()},
        'labels': {k: v[c].item() for k, v in row.labels.items()},
        'group': row.group,
      }
      found.setdefault(item, []).append(view)
  return found


def _snapshots(events, shown, begin, every):
  """`[(events before the moment, candidates)]` of one user."""
  period = {i: (events[i]['ts'] - begin) // every for i in shown}

  def before(number):
    return sum(e['ts'] < begin + number * every for e in events)

  groups = []
  for number in range(max(period.values(), default=-1) + 1):
    due = [
      i
      for i in shown
      if period[i] == number
      or (period[i] > number and before(number) != before(number + 1))
    ]
    if due:
      groups.append((before(number), due))
  return groups


class RowsTest(parameterized.TestCase):
  @parameterized.parameters(
    (kind, ties, request)
    for kind, ties, request in itertools.product(
      KINDS, ('order', 'strict'), (False, True)
    )
    # See test_request_rows_without_column.
    if (kind, ties, request) != ('request', 'order', False)
  )
  @given(data=logs.columns(), seed=st.integers(0, 99), limit=st.integers(1, 4))
  def test_sees_its_past_alone(self, kind, ties, request, data, seed, limit):
    log = EventLog.from_columns(data, logs.schema(request=request))
    mask = np.random.default_rng(seed).random(len(log)) < 0.6
    config = RowConfig(kind, ties=ties, max_candidates=limit)
    log, gaps = logs.derive(log, TimeGap(6))
    rows = make_rows(log, mask, config, gaps)
    found = views(rows)
    wanted = set(log.features['item'][mask].tolist())
    self.assertEqual(set(found), wanted)
    for user, events in logs.records(data).items():
      for index, event in enumerate(events):
        if event['item_id'] not in wanted:
          continue
        (view,) = found[event['item_id']]  # Once.
        past = logs.seen(events, index, ties, request)
        self.assertEqual(view['seen'], [events[i]['item_id'] for i in past])
        self.assertEqual(view['stars'], [events[i]['stars'] for i in past])
        self.assertEqual(
          view['gaps'],
          [
            self._gap(events, i, logs.seen(events, i, ties, request))
            for i in past
          ],
        )
        self.assertEqual(set(view['candidate']), {'item', 'price', 'time_gap'})
        self.assertEqual(
          view['candidate']['time_gap'], self._gap(events, index, past)
        )
        np.testing.assert_allclose(
          view['candidate']['price'], (event['price'] - 1) / 2, rtol=1e-6
        )
        self.assertEqual(view['context'], {'age': event['user_age']})
        self.assertEqual(
          view['labels'],
          {'liked': float(event['stars'] >= 4), 'click': float(event['click'])},
        )
        self.assertEqual(log.keys[view['group']], user)

  def _gap(self, events, index, past) -> int:
    if not past:
      return 0
    gap = events[index]['ts'] - events[past[-1]]['ts']
    return min(math.floor(math.log2(1 + gap)), 5)

  @parameterized.product(
    every=(None, 1, 7), ties=('order', 'strict'), request=(False, True)
  )
  @given(data=logs.columns(), seed=st.integers(0, 99), limit=st.integers(1, 4))
  def test_snapshots(self, every, ties, request, data, seed, limit):
    log = EventLog.from_columns(data, logs.schema(request=request))
    mask = np.random.default_rng(seed).random(len(log)) < 0.6
    config = RowConfig(
      'snapshot', ties=ties, max_candidates=limit, snapshot_every=every
    )
    wanted = set(log.features['item'][mask].tolist())
    begin = log.time[mask].min() if wanted else 0
    expected = []
    for events in logs.records(data).values():
      shown = [i for i, e in enumerate(events) if e['item_id'] in wanted]
      if every is None:
        groups = [(len(events), shown)] if shown else []
      else:
        groups = _snapshots(events, shown, begin, every)
      for taken, group in groups:
        least = [len(logs.seen(events, i, ties, request)) for i in group]
        past = list(range(min([taken, *least])))
        for i in group:
          gap = self._gap(events, i, past)
          items = [events[j]['item_id'] for j in past]
          expected.append((events[i]['item_id'], items, gap))
    log, gaps = logs.derive(log, TimeGap(6))
    rows = make_rows(log, mask, config, gaps)
    found = []
    for item, seen in views(rows).items():
      found += [(item, v['seen'], v['candidate']['time_gap']) for v in seen]
    self.assertCountEqual(found, expected)
    self.assertTrue(all(len(set(row.visible.tolist())) == 1 for row in rows))

  @parameterized.product(kind=(*KINDS, 'snapshot'), length=(0, 1, 3))
  @given(data=logs.columns())
  def test_history_length(self, kind, length, data):
    log = EventLog.from_columns(data, logs.schema(request=True))
    mask = np.ones(len(log), bool)
    log, gaps = logs.derive(log, TimeGap(6))
    whole = views(make_rows(log, mask, RowConfig(kind), gaps))
    rows = make_rows(log, mask, RowConfig(kind, length), gaps)
    for item, (view,) in views(rows).items():
      (full,) = whole[item]
      kept = len(view['seen'])
      # The most recent ones, and as many as asked for, if there are any.
      self.assertEqual(view['seen'], full['seen'][len(full['seen']) - kept :])
      self.assertGreaterEqual(kept, min(length, len(full['seen'])))
      if kind == 'pointwise':
        self.assertLessEqual(kept, length)
    for row in rows:
      self.assertLessEqual(row.visible.min(), length)
      self.assertEqual(row.visible.max(), len(row.history['item']))

  @parameterized.parameters(*KINDS, 'snapshot')
  @given(data=logs.columns(), seed=st.integers(0, 99))
  def test_batch_is_collate(self, kind, data, seed):
    rng = np.random.default_rng(seed)
    schema = logs.schema(request=True)
    log = EventLog.from_columns(data, schema)
    rows = make_rows(
      log, np.ones(len(log), bool), RowConfig(kind, ties='strict')
    )
    indices = rng.permutation(len(rows))[: rng.integers(1, len(rows) + 1)]
    shape = {
      'num_rows': len(indices) + int(rng.integers(3)),
      'num_events': int(rows.history_lengths.max()) + int(rng.integers(3)),
      'num_candidates': int(rows.candidate_counts.max()) + int(rng.integers(3)),
    }
    batch = rows.batch(indices, **shape)
    chex.assert_trees_all_equal(
      batch, collate([rows[i] for i in indices], **shape), strict=True
    )
    support.check_batch(batch, schema)
    self.assertEqual(batch.candidates.mask.shape[0], shape['num_rows'])
    self.assertEqual(
      batch.candidates.mask.sum(), rows.candidate_counts[indices].sum()
    )
    np.testing.assert_array_equal(
      batch.history.length[: len(indices)], rows.history_lengths[indices]
    )

  @given(data=logs.columns())
  def test_lengths_and_counts(self, data):
    log = EventLog.from_columns(data, logs.schema())
    rows = make_rows(log, np.ones(len(log), bool), RowConfig(max_candidates=3))
    for row, length, count in zip(
      rows, rows.history_lengths, rows.candidate_counts, strict=True
    ):
      self.assertLen(row.history['stars'], length)
      self.assertLen(row.candidates['item'], count)
      self.assertLessEqual(count, 3)
      self.assertEqual(row.visible.dtype, np.int32)
      self.assertEqual(row.history['item'].dtype, np.int32)
      self.assertEqual(row.candidates['price'].dtype, np.float32)

  def test_request_rows_share_visible(self):
    data = {
      'uid': ['a'] * 5,
      'ts': [0, 1, 1, 2, 3],
      'rid': [7, 8, 8, 7, 9],
      'user_age': [1] * 5,
      'item_id': [10, 11, 12, 13, 14],
      'price': [0.0] * 5,
      'stars': [1, 2, 3, 4, 5],
      'click': [0] * 5,
    }
    log = EventLog.from_columns(data, logs.schema(request=True))
    rows = make_rows(log, np.ones(5, bool), RowConfig('request'))
    self.assertEqual(
      [(r.candidates['item'].tolist(), r.visible.tolist()) for r in rows],
      # Request 7 goes on after 8 began, and still sees nothing of either.
      [([10, 13], [0, 0]), ([11, 12], [1, 1]), ([14], [4])],
    )

  def test_two_requests_of_one_time(self):
    log = EventLog.from_columns(
      {**self._data(), 'ts': [1, 1], 'rid': [7, 8]}, logs.schema(request=True)
    )
    rows = make_rows(log, np.ones(2, bool), RowConfig('request', ties='strict'))
    self.assertEqual([r.candidates['item'].tolist() for r in rows], [[3], [4]])

  def test_requests_stay_in_order(self):
    size = 60  # Where a sort that is not stable mixes them.
    zeros = np.zeros(size, np.int64)
    log = EventLog.from_columns(
      {
        **dict.fromkeys(('uid', 'user_age', 'price', 'stars', 'click'), zeros),
        'ts': np.arange(size),
        'rid': np.arange(size) % 2,
        'item_id': np.arange(size),
      },
      logs.schema(request=True),
    )
    rows = make_rows(log, np.ones(size, bool), RowConfig('request'))
    for row, start in zip(rows, (0, 1), strict=True):
      wanted = np.arange(start, size, 2)
      np.testing.assert_array_equal(row.candidates['item'], wanted)

  @parameterized.parameters(
    ([0, 1, 2, 3], 30.0),  # Half a minute each.
    # Timestamps have their own unit.
    (np.datetime64('2022-05-01') + 30 * np.arange(4, dtype='m8[s]'), 1e-8),
  )
  def test_snapshots_are_taken_every_so_many_seconds(self, times, unit):
    log = EventLog.from_columns(
      {**self._data(4), 'ts': times},
      dataclasses.replace(logs.schema(), time_unit=unit),
    )
    for every, taken in ((60.0, [0, 0, 2, 2]), (30.0, [0, 1, 2, 3])):
      config = RowConfig('snapshot', snapshot_every=every)
      rows = make_rows(log, np.ones(4, bool), config)
      latest = np.zeros(4, np.int64)
      for row in rows:
        items = row.candidates['item'] - 3
        latest[items] = np.maximum(latest[items], row.visible)
      self.assertEqual(latest.tolist(), taken)

  @parameterized.parameters(
    ([0, 300, 599, 600, 900], 1e-3, 0.3, [0, 1, 1, 2, 3]),
    (np.array([0, 300, 599, 600, 900], 'M8[ms]'), 1.0, 0.3, [0, 1, 1, 2, 3]),
    ([0.1, 0.3, 0.4, 0.7, 1.0], 1.0, 0.3, [0, 0, 1, 2, 3]),
    # Beyond 2**53 floats hold no whole numbers, and 2**63 is no int64.
    (2**60 + np.array([1, 2, 10**9, 10**9 + 1]), 1e-9, 1.0, [0, 0, 0, 1]),
    (2**60 + np.array([0, 1, 10**9 - 1, 10**9]), 1e-9, 1 / 3, [0, 0, 2, 3]),
  )
  def test_periods_are_exact(self, times, unit, every, expected):
    times = np.asarray(times)
    if times.dtype.kind == 'M':
      times, unit = times.astype('M8[ns]').astype(np.int64), 1e-9
    found = grouping._periods(times[::-1], times.min(), unit, every)
    self.assertEqual(found.tolist(), expected[::-1])

  @parameterized.parameters(1.0, 1e-4)
  def test_snapshots_of_empty_periods_cost_nothing(self, every):
    times = [0, 1, 3000, 3001]
    log = EventLog.from_columns({**self._data(4), 'ts': times}, logs.schema())
    config = RowConfig('snapshot', snapshot_every=every)
    with mock.patch.object(np, 'bincount', wraps=np.bincount) as count:
      rows = make_rows(log, np.ones(4, bool), config)
    self.assertLess(count.call_count, 20)
    self.assertEqual(
      [(r.candidates['item'].tolist(), r.visible.tolist()) for r in rows],
      [
        ([6], [3]),
        ([5, 6], [2, 2]),
        ([4, 5, 6], [1, 1, 1]),
        ([3, 4, 5, 6], [0, 0, 0, 0]),
      ],
    )

  def test_snapshots_that_are_not_told_apart(self):
    log = EventLog.from_columns({**self._data(2), 'ts': [0, 1]}, logs.schema())
    for every in (1e-16, 1e-320):
      with self.assertRaisesRegex(ValueError, f'snapshot_every={every} gives'):
        make_rows(
          log, np.ones(2, bool), RowConfig('snapshot', snapshot_every=every)
        )

  def test_negative_index_and_slice(self):
    rows = self._rows(RowConfig('pointwise'))
    self.assertEqual(rows[-1].candidates['item'], rows[1].candidates['item'])
    self.assertLen(rows[:5], 2)
    with self.assertRaises(IndexError):
      rows[2]

  def test_empty_mask(self):
    log = self._log()
    for kind in ('pointwise', 'streaming'):
      rows = make_rows(log, np.zeros(2, bool), RowConfig(kind, 3))
      self.assertEmpty(rows)
      self.assertEmpty(rows.history_lengths)

  def test_overflow_is_refused(self):
    config = RowConfig('pointwise', history_length=0, on_overflow='error')
    with self.assertRaisesRegex(
      ValueError, "user 'a' has 1 events .* history_length=0.*truncate"
    ):
      self._rows(config)
    self.assertLen(
      self._rows(RowConfig('streaming', 0, on_overflow='error')), 1
    )
    log = EventLog.from_columns(
      {**self._data(4), 'uid': ['a', 'b', 'b', 'b']}, logs.schema()
    )
    with self.assertRaisesRegex(ValueError, "user 'b' has 2 events"):
      make_rows(
        log, np.arange(4) == 3, dataclasses.replace(config, history_length=1)
      )

  def test_request_rows_without_column(self):
    with self.assertRaisesRegex(ValueError, "ties='strict'"):
      self._rows(RowConfig('request'))

  @parameterized.parameters('request', 'streaming')
  def test_context_that_changes_is_refused(self, kind):
    log = EventLog.from_columns(
      {**self._data(), 'user_age': [1, 2], 'rid': [1, 1]},
      logs.schema(request=True),
    )
    mask = np.ones(2, bool)
    with self.assertRaisesRegex(ValueError, "'age'.*'user_age'.*user 'a'"):
      make_rows(log, mask, RowConfig(kind))
    self.assertLen(make_rows(log, mask, RowConfig('pointwise')), 2)
    log = EventLog.from_columns(
      {
        **self._data(4),
        'uid': ['a', 'a', 'b', 'b'],
        'user_age': [1, 1, 1, 2],
        'rid': [1, 1, 2, 2],
      },
      logs.schema(request=True),
    )
    with self.assertRaisesRegex(ValueError, "'age'.*user 'b'"):
      make_rows(log, np.ones(4, bool), RowConfig(kind))

  @parameterized.parameters(
    ({'kind': 'stream'}, "kind='stream' must be one of"),
    ({'ties': 'none'}, "ties='none'"),
    ({'on_overflow': 'drop'}, "on_overflow='drop'"),
    ({'history_length': -1}, 'history_length=-1'),
    ({'max_candidates': 0}, 'max_candidates=0'),
    ({'snapshot_every': 60.0}, "with kind='snapshot', which is 'streaming'"),
    ({'kind': 'snapshot', 'snapshot_every': 0}, 'snapshot_every=0.0 must'),
    ({'kind': 'snapshot', 'snapshot_every': math.inf}, 'inf must be .*finite'),
  )
  def test_bad_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      RowConfig(**fields)

  def test_bad_mask(self):
    with self.assertRaisesRegex(ValueError, r'int64\[2\].*bool \[2\]'):
      make_rows(self._log(), np.array([0, 1]), RowConfig())

  @parameterized.parameters(
    ({'num_rows': 1}, '2 rows do not fit into num_rows=1'),
    ({'num_events': 0}, '1 events do not fit into num_events=0'),
    ({'num_candidates': 0}, '1 candidates do not fit into num_candidates=0'),
  )
  def test_too_small_batch(self, small, message):
    rows = self._rows(RowConfig('pointwise'))
    shape = {'num_rows': 2, 'num_events': 1, 'num_candidates': 1, **small}
    with self.assertRaisesRegex(ValueError, message):
      rows.batch([0, 1], **shape)
    with self.assertRaisesRegex(ValueError, message):
      collate(rows[:], **shape)

  def test_collate_without_histories(self):
    batch = collate(self._rows(RowConfig('pointwise', 0))[:])
    self.assertEqual(batch.history.features['item'].shape, (2, 1))
    self.assertEqual(batch.history.length.tolist(), [0, 0])

  @parameterized.parameters('history', 'candidates', 'labels', 'context')
  def test_collate_of_two_kinds(self, field):
    one, other = self._rows(RowConfig('pointwise'))[:2]
    self.assertNotEmpty(getattr(one, field))
    other = dataclasses.replace(other, **{field: {}})
    for rows in ([one, other], [other, one]):
      with self.assertRaisesRegex(ValueError, rf'rows\[1\].{field} has '):
        collate(rows)

  def test_collate_of_nothing(self):
    with self.assertRaisesRegex(ValueError, 'rows is empty'):
      collate([], num_rows=1, num_events=1, num_candidates=1)

  def _data(self, size=2):
    return {
      'uid': ['a'] * size,
      'ts': list(range(size)),
      'user_age': [1] * size,
      'item_id': [3 + i for i in range(size)],
      'price': [float(i) for i in range(size)],
      'stars': [1, 5] * (size // 2),
      'click': [0, 1] * (size // 2),
    }

  def _log(self):
    return EventLog.from_columns(self._data(), logs.schema())

  def _rows(self, config):
    return make_rows(self._log(), np.ones(2, bool), config)


if __name__ == '__main__':
  absltest.main()
