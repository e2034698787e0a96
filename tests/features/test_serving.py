"""A request's row is the log's row: all features, all ties, to the bit."""

import dataclasses
import pathlib
import tempfile
from unittest import mock

import chex
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import features
from histjax.data import requests
from histjax.data.datasets import model_schema
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.features import (
  Activity,
  DerivedFeature,
  FittedFeatures,
  HistoryRates,
  Rates,
  RecentRates,
  RecentShares,
  TimeGap,
)
from histjax.schema import Categorical, Dense, Schema, Task
from tests import marks

ALL = (
  Activity((2, 5)),
  TimeGap(6),
  Rates(('item', 'tab*shop', 'shop'), prior=2.0),
  RecentRates(3),
  HistoryRates(('*', 'tab', 'shop', 'tab@2', '*@3')),
  RecentShares(('tab@4', 'item@2')),
)


def schema(request: bool) -> Schema:
  return Schema(
    user='uid',
    time='ts',
    request='rid' if request else '',
    time_unit=0.5,
    context=(Categorical('age', 9),),
    item=(
      Categorical('item', 8),
      Categorical('tab', 3, column='page'),
      Categorical('shop', 4),
      Dense('price', offset=1.0, scale=2.0),
    ),
    action=(Categorical('stars', 6),),
    tasks=(Task('liked', column='stars', threshold=4), Task('click')),
  )


@st.composite
def columns(draw):
  """A few users, tied times, requests mixed up; numbers or timestamps."""
  n = draw(st.integers(4, 24))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  user = rng.integers(0, 3, n)
  time = rng.integers(0, draw(st.sampled_from([3, 30])), n)
  if draw(st.booleans()):
    time = np.datetime64('2022-05-01', 'ms') + time * np.timedelta64(500, 'ms')
  name = draw(st.sampled_from([str, int]))
  stars = rng.integers(1, 6, n)
  stars[:2] = 1, 5  # Training has both kinds of label.
  return {
    'uid': np.array([name(u + 5) for u in user]),
    'ts': time,
    'rid': rng.integers(0, 4, n),
    'age': user,
    'item': rng.integers(0, 8, n),
    'page': rng.integers(0, 3, n),
    'shop': rng.integers(0, 4, n),
    'price': rng.normal(size=n),
    'stars': stars,
    'click': rng.integers(0, 2, n),
  }


def load(data, request: bool, seed: int, without=('shop',)):
  """The log, its fitted features, and its training events."""
  index = np.arange(len(data['uid']))
  log = EventLog.from_columns(
    {**data, 'n': index}, schema(request), extra=('n',)
  )
  train = np.random.default_rng(seed).random(len(log)) < 0.5
  train |= log.extra['n'] < 2
  fitted = features.fit(ALL, log.events(), train)
  of_model = model_schema(log.schema, fitted, without)
  return dataclasses.replace(log, schema=of_model), fitted, train


def records(data, log):
  """Events as dicts, in the order of the log."""
  names = log.schema.columns
  return [
    {name: data[name][n].item() for name in names} | {'ts': data['ts'][n]}
    for n in log.extra['n']
  ]


def compare(row, wanted, but=()):
  for field in ('context', 'history', 'candidates'):
    found, expected = getattr(row, field), getattr(wanted, field)
    assert set(found) == set(expected), (field, set(found) ^ set(expected))
    for name in but:
      found, expected = ({**x} for x in (found, expected))
      found.pop(name, None), expected.pop(name, None)
    chex.assert_trees_all_equal(found, expected, strict=True)
  np.testing.assert_array_equal(row.visible, wanted.visible, strict=True)


class RequestTest(parameterized.TestCase):
  @marks.slow_unless(lambda ties, request: request)
  @parameterized.product(ties=('order', 'strict'), request=(False, True))
  @given(
    data=columns(),
    length=st.none() | st.integers(0, 5),
    seed=st.integers(0, 99),
  )
  def test_same_as_the_log_s_row(self, ties, request, data, length, seed):
    log, fitted, train = load(data, request, seed)
    config = RowConfig('pointwise', length, ties=ties)
    everything = np.ones(len(log), bool)
    served = make_rows(log, everything, config, fitted)
    trained = make_rows(log, everything, config, fitted, train=train)
    events = records(data, log)
    rates = [
      f.name
      for f in fitted.derived
      if f.name.startswith(('rate_', 'recent_rate_'))
    ]
    for i, event in enumerate(events):
      past = events[log.offsets[log.user[i]] : i]
      row = requests.make_row(
        log.schema,
        context=event,
        history=past,
        candidates=[event],
        config=config,
        features=fitted,
      )
      compare(row, served[i])
      compare(row, trained[i], but=rates)
    self.assertIn('rate_tab_x_shop', rates)

  @parameterized.product(request=(False, True))
  @given(data=columns(), seed=st.integers(0, 99))
  def test_snapshots(self, request, data, seed):
    log, fitted, train = load(data, request, seed)
    config = RowConfig('snapshot', 4, ties='strict')
    rows = make_rows(log, ~train, config, fitted)
    events = records(data, log)
    for r in range(len(rows)):
      shown = rows.candidate_events(r)
      user = log.user[shown[0]]
      row = requests.make_row(
        log.schema,
        context=events[shown[0]],
        history=events[log.offsets[user] : log.offsets[user + 1]],
        candidates=[events[i] for i in shown],
        config=config,
        features=fitted,
        as_of=True,
      )
      compare(row, rows[r])

  @given(data=columns(), seed=st.integers(0, 99))
  def test_an_older_snapshot(self, data, seed):
    log, fitted, _ = load(data, False, seed)
    config = RowConfig('snapshot', ties='strict')
    user = log.user[-1]
    *past, last = records(data, log)[log.offsets[user] :]
    seen = len(past) // 2

    def row(history):
      return requests.make_row(
        log.schema,
        context=last,
        history=history,
        candidates=[last],
        config=config,
        features=fitted,
        visible=min(seen, sum(e['ts'] < last['ts'] for e in past)),
      )

    blank = [{**e, 'stars': 1, 'click': 0} for e in past[seen:]]
    compare(row(past), row(past[:seen] + blank))

  @given(data=columns(), seed=st.integers(0, 99))
  def test_saved_and_loaded(self, data, seed):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    log, fitted, _ = load(data, False, seed)
    fitted.save(folder)
    again = features.load(folder)
    self.assertEqual(again.digest(), fitted.digest())
    self.assertEqual(again.configs, fitted.configs)
    self.assertEqual(again.derived, fitted.derived)
    everything = np.ones(len(log), bool)
    config = RowConfig(ties='strict')
    for a, b in zip(
      make_rows(log, everything, config, fitted),
      make_rows(log, everything, config, again),
      strict=True,
    ):
      compare(a, b)


def small():
  """Eight events of two users, one after the other."""
  n = 8
  return {
    **dict.fromkeys(('age', 'page', 'shop', 'rid'), np.zeros(n, np.int64)),
    'uid': np.arange(n) % 2,
    'ts': np.arange(n),
    'item': np.arange(n),
    'price': np.ones(n),
    'stars': np.array([1, 5] * 4),
    'click': np.zeros(n, np.int64),
  }


@dataclasses.dataclass(frozen=True)
class Shown(DerivedFeature):
  """Reads of a candidate what was shown, and what an earlier one adds."""

  of_view = True

  def features(self, schema, state):
    return (Dense('shown'),)

  def apply(self, events, impressions, state):
    number = impressions.shown - impressions.begin
    found = impressions.features['activity_2'] + number.astype(np.float32)
    return {'shown': found}


class OwnTest(absltest.TestCase):
  def test_reads_all_that_impressions_have(self):
    data = small()
    log = EventLog.from_columns(data, schema(False))
    everything = np.ones(len(log), bool)
    fitted = features.fit((Activity((2,)), Shown()), log.events(), everything)
    log = dataclasses.replace(log, schema=model_schema(log.schema, fitted, ()))
    for row in make_rows(log, everything, RowConfig('snapshot'), fitted):
      self.assertEqual(row.visible.tolist(), [0] * 4)
      found = row.candidates['shown'] - row.candidates['activity_2']
      np.testing.assert_array_equal(found, np.arange(4))
    *past, event = (
      {k: data[k][i].item() for k in log.schema.columns} for i in (0, 2, 4)
    )
    row = requests.make_row(
      log.schema,
      context=event,
      history=past,
      candidates=[event],
      features=fitted,
      visible=1,
    )
    for part, number in ((row.history, 0), (row.candidates, 2)):
      np.testing.assert_array_equal(part['shown'] - part['activity_2'], number)


class RefusedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.data = small()
    self.log, self.fitted, _ = load(self.data, False, 0)

  def make(self, **change):
    event = records(self.data, self.log)[0]
    return requests.make_row(
      self.log.schema,
      **{
        'context': event,
        'history': [],
        'candidates': [event],
        'features': self.fitted,
        **change,
      },
    )

  def test_what_is_missing(self):
    event = records(self.data, self.log)[0]
    with self.assertRaisesRegex(ValueError, "'activity_2', which `features`"):
      self.make(features=None)
    with self.assertRaisesRegex(ValueError, "context lacks column 'uid'"):
      self.make(context={'age': 0})
    with self.assertRaisesRegex(ValueError, "candidates lacks column 'ts'"):
      without = {k: v for k, v in event.items() if k != 'ts'}
      self.make(candidates=[without], context={'uid': 1, 'age': 0})
    with self.assertRaisesRegex(ValueError, r'visible=1 must be .*\[0, 0\]'):
      self.make(visible=1)
    with self.assertRaisesRegex(ValueError, "as_of=True with ties='order'"):
      self.make(as_of=True)
    with self.assertRaisesRegex(ValueError, "lacks column 'stars', the label"):
      past = {k: v for k, v in event.items() if k != 'stars'}
      self.make(history=[past])

  def test_a_feature_without_categories(self):
    for config in (
      Rates(('item*price',)),
      HistoryRates(('price',)),
      RecentShares(('price@2',)),
    ):
      with self.assertRaisesRegex(ValueError, "names 'price'; it must be one"):
        config.check(self.log.schema)

  def test_digest_knows_types_and_shapes(self):
    zeros = np.zeros(4, np.int64)
    digests = {
      FittedFeatures((TimeGap(),), ({'x': x},), ((),)).digest()
      for x in (zeros, zeros.view(np.float64), zeros.reshape(2, 2))
    }
    self.assertLen(digests, 3)

  def test_a_damaged_file(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    with self.assertRaisesRegex(FileNotFoundError, 'features.npz does not'):
      features.load(folder)
    self.fitted.save(folder)
    path = folder / 'features.npz'
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with self.assertRaisesRegex(ValueError, 'is damaged'):
      features.load(folder)
    states = [dict(s) for s in self.fitted.states]
    states[2]['mean'] = states[2]['mean'] + 1e-9
    changed = dataclasses.replace(self.fitted, states=tuple(states))
    self.assertNotEqual(changed.digest(), self.fitted.digest())
    digest = self.fitted.digest()
    with mock.patch.object(
      features.FittedFeatures, 'digest', lambda self: digest
    ):
      changed.save(folder)
    with self.assertRaisesRegex(ValueError, 'does not have its checksum'):
      features.load(folder)
    with mock.patch('histjax.features.fitted._VERSION', 0):
      self.fitted.save(folder)
    with self.assertRaisesRegex(ValueError, 'is of version 0, this library re'):
      features.load(folder)


if __name__ == '__main__':
  absltest.main()
