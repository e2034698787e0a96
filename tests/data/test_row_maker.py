"""A past that grows step by step makes the rows of one that is read whole."""

import dataclasses
import hashlib

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import features
from histjax.data import requests, row_maker
from histjax.data.rows import RowConfig
from histjax.features import HistoryRates, Lookback, Rates
from tests.features import test_serving

USER = 'uid'


def steps(rng, number):
  """Cuts `number` events into random steps."""
  cuts = np.sort(rng.integers(0, number + 1, 3))
  return list(zip([0, *cuts], [*cuts, number], strict=True))


def grown(maker, events, rng, depth=None):
  """The past after random steps, dropping what is not needed any more.

  None: an event is of a request that is not kept.
  """
  past = maker.start()
  user = np.zeros(1, np.uint64)
  for start, stop in steps(rng, len(events)):
    if stop > start:
      asked = maker.ask(events[start], [events[start]])
      user = asked.user
    new = maker.read(events[start:stop])
    before, past = past, maker.extend(past, new, user)
    visible = past.visible[len(past) - len(new) :]
    if maker.reach(depth).lacks(before, visible, new.time, new.request):
      return None
    past = past.since(maker.reach(depth).first_needed(past))
  return past


class RowMakerTest(parameterized.TestCase):
  @parameterized.product(ties=('order', 'strict'), request=(False, True))
  @given(
    data=test_serving.columns(),
    length=st.none() | st.integers(0, 5),
    seed=st.integers(0, 99),
  )
  def test_same_as_make_row(self, ties, request, data, length, seed):
    """Each derived feature, to the bit, from the events that are kept."""
    log, fitted, _ = test_serving.load(data, request, seed)
    config = RowConfig('pointwise', length, ties=ties)
    maker = row_maker.RowMaker(log.schema, config, fitted)
    rng = np.random.default_rng(seed)
    user = int(rng.integers(log.num_users))
    own = slice(log.offsets[user], log.offsets[user + 1])
    *events, last = test_serving.records(data, log)[own]
    past = grown(maker, events, rng, length)
    asked = maker.ask(last, [last])
    if past is None:
      return
    view = maker.view(past, asked)
    lacks = maker.reach(length).lacks(
      past, view.before, asked.time, asked.request
    )
    if lacks or view.start < past.first:
      self.assertTrue(request)  # Of an old one.
      return
    wanted = requests.make_row(
      log.schema,
      context=last,
      history=events,
      candidates=[last],
      config=config,
      features=fitted,
    )
    found = maker.candidates(past, asked, view)
    self.assertEqual(found.keys(), wanted.candidates.keys())
    for name, values in wanted.candidates.items():
      np.testing.assert_array_equal(found[name], values, name, strict=True)
    history = past.history(view.start, view.stop)
    for name, values in wanted.history.items():
      np.testing.assert_array_equal(history[name], values, name, strict=True)
    np.testing.assert_array_equal(view.sees - view.start, wanted.visible)
    self.assertEqual(asked.context, wanted.context)

  @parameterized.product(ties=('order', 'strict'), request=(False, True))
  def test_dropped_events(self, ties, request):
    """Of a long past a few events are enough, or it is said that they are not.

    Requests have three events, and now and then one more, much later.
    """
    rng = np.random.default_rng(0)
    number = 200
    data = {
      'uid': np.zeros(number, np.int64),
      'ts': np.cumsum(rng.integers(0, 4, number)),
      'rid': np.arange(number) // 3,
      'age': np.zeros(number, np.int64),
      'item': rng.integers(0, 8, number),
      'page': rng.integers(0, 3, number),
      'shop': rng.integers(0, 4, number),
      'price': rng.normal(size=number),
      'stars': rng.integers(1, 6, number),
      'click': rng.integers(0, 2, number),
    }
    late = rng.random(number) < 0.1
    data['rid'][late] -= rng.integers(1, 9, late.sum())
    log, fitted, _ = test_serving.load(data, request, 0)
    config = RowConfig('pointwise', 6, ties=ties)
    maker = row_maker.RowMaker(log.schema, config, fitted)
    reach = maker.reach(6)
    events = test_serving.records(data, log)
    past, equal, lost = maker.start(), 0, 0
    for i, event in enumerate(events):
      asked = maker.ask(event, [event])
      view = maker.view(past, asked)
      if reach.lacks(past, view.before, asked.time, asked.request):
        lost += 1  # As if the whole history was sent.
        past = maker.extend(maker.start(), maker.read(events[:i]), asked.user)
        view = maker.view(past, asked)
      wanted = requests.make_row(
        log.schema,
        context=event,
        history=events[:i],
        candidates=[event],
        config=config,
        features=fitted,
      )
      found = maker.candidates(past, asked, view)
      for name, values in wanted.candidates.items():
        np.testing.assert_array_equal(found[name], values, name)
      if view.start >= past.first:
        equal += bool(past.first)
        history = past.history(view.start, view.stop)
        for name, values in wanted.history.items():
          np.testing.assert_array_equal(history[name], values, name)
      past = maker.extend(past, maker.read([event]), asked.user)
      past = past.since(reach.first_needed(past))
      self.assertLess(len(past), 40)
    self.assertGreater(equal, 150)
    self.assertEqual(lost > 0, request)

  @given(data=test_serving.columns(), seed=st.integers(0, 99))
  def test_digest_and_comparison(self, data, seed):
    log, fitted, _ = test_serving.load(data, False, seed)
    maker = row_maker.RowMaker(log.schema, None, fitted)
    rng = np.random.default_rng(seed)
    events = test_serving.records(data, log)
    events = events[log.offsets[-2] :]
    whole = maker.read(events)
    one, many = hashlib.blake2b(), hashlib.blake2b()
    whole.update(one)
    for start, stop in steps(rng, len(events)):
      maker.read(events[start:stop]).update(many)
    self.assertEqual(one.digest(), many.digest())
    self.assertIsNone(whole.first_difference(maker.read(events)))
    place = int(rng.integers(len(events)))
    other = [dict(e) for e in events]
    other[place]['click'] = 1 - other[place]['click']
    changed = maker.read(other)
    found = whole.first_difference(changed)
    self.assertEqual(found, place)  # HistoryRates read the label.
    digest = hashlib.blake2b()
    changed.update(digest)
    self.assertNotEqual(one.digest(), digest.digest())

  def test_lookback(self):
    _, fitted, _ = test_serving.load(test_serving.small(), False, 0)
    self.assertEqual(fitted.lookback(7), Lookback(7, 5))
    self.assertIsNone(fitted.lookback(None))  # HistoryRates of everything.
    rest = features.FittedFeatures(
      tuple(c for c in fitted.configs if not isinstance(c, HistoryRates)),
    )
    self.assertEqual(rest.lookback(None), Lookback(4, 5))
    self.assertEqual(features.FittedFeatures().lookback(None), Lookback())
    self.assertEqual(Rates(('item',)).lookback(3), Lookback())
    last = HistoryRates(('*@3', '*@2'))
    self.assertEqual(last.lookback(None), Lookback(3))
    self.assertEqual(last.lookback(2), Lookback(2))
    self.assertIsNone(HistoryRates(('tab@3',)).lookback(None))
    own = features.FittedFeatures((test_serving.Shown(),))
    self.assertIsNone(own.lookback(3))

  def test_stop_after_a_step(self):
    """It is of each past its own."""
    log, fitted, _ = test_serving.load(test_serving.small(), False, 0)
    maker = row_maker.RowMaker(log.schema, None, fitted)
    events = test_serving.records(test_serving.small(), log)[:4]
    user = np.zeros(1, np.uint64)
    past = maker.extend(maker.start(), maker.read(events[:2]), user)
    self.assertEqual((past.stop, past.until(1).stop), (2, 1))
    moved = dataclasses.replace(past, first=5)
    self.assertEqual((moved.stop, moved.since(6).stop), (7, 7))
    longer = maker.extend(past, maker.read(events[2:]), user)
    self.assertEqual((past.stop, longer.stop), (2, 4))

  def test_refused(self):
    log, fitted, _ = test_serving.load(test_serving.small(), False, 0)
    maker = row_maker.RowMaker(log.schema, None, fitted)
    events = test_serving.records(test_serving.small(), log)[:4]
    user = np.zeros(1, np.uint64)
    past = maker.extend(maker.start(), maker.read(events[2:]), user)
    with self.assertRaisesRegex(ValueError, 'earlier than the last event kn'):
      maker.extend(past, maker.read(events[:1]), user)
    late = {**events[-1], 'ts': np.datetime64('2022-05-01')}
    with self.assertRaisesRegex(ValueError, 'are numbers in the training log'):
      maker.read([late])
    # Of features that were saved without their log's clock.
    fitted = dataclasses.replace(fitted, is_timestamp=None)
    maker = row_maker.RowMaker(log.schema, None, fitted)
    with self.assertRaisesRegex(ValueError, 'times are numbers in history and'):
      maker.extend(past, maker.read([late]), user)


if __name__ == '__main__':
  absltest.main()
