"""History rates count the labels that a candidate may see, and no others."""

import math
import re

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import datasets
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.features import FittedFeatures, HistoryRates
from histjax.schema import Categorical, Schema, Task
from tests.data import logs

SCHEMA = Schema(
  user='user',
  time='time',
  item=(Categorical('item', 50), Categorical('tab', 2)),
  action=(Categorical('stars', 6),),
  tasks=(
    Task('liked', column='stars', threshold=4),
    Task('loved', column='stars', threshold=5),
  ),
  hidden=(Categorical('shop', 3),),
)
RATES = HistoryRates(('*', 'tab', 'shop', '*@2', 'shop@1'))
EVENTS = st.lists(
  st.tuples(
    st.integers(0, 2),
    st.integers(0, 15),
    st.integers(0, 1),
    st.integers(0, 2),
    st.integers(1, 5),
  ),
  min_size=1,
  max_size=30,
)


def _columns(events):
  names = ('user', 'time', 'tab', 'shop', 'stars')
  columns = dict(zip(names, np.array(events).T, strict=True))
  return {**columns, 'item': np.arange(len(events))}


def _expected(log, event, begin, end):
  """Of the event that sees [begin, end), from the definition."""
  found = {}
  for name, last, suffix in (
    *(('', None, ''), ('tab', None, '_tab'), ('shop', None, '_shop')),
    *(('', 2, '_last2'), ('shop', 1, '_shop_last1')),
  ):
    same = list(range(begin, end))
    if name:
      value = log.features[name]
      same = [i for i in same if value[i] == value[event]]
    if last is None:
      found[f'history_count{suffix}'] = math.log(1 + len(same))
    else:
      same = same[-last:]
    for task, label in log.labels.items():
      k = sum(float(label[i]) for i in same)
      found[f'history_{task}{suffix}'] = math.log((k + 1) / (len(same) - k + 1))
  return found


class HistoryRatesTest(parameterized.TestCase):
  @parameterized.product(
    config=(
      RowConfig('pointwise', 3),
      RowConfig('pointwise', ties='strict'),
      RowConfig('streaming', 2, max_candidates=4),
      RowConfig('snapshot', 3, ties='strict'),
      RowConfig('snapshot', snapshot_every=4.0),
    )
  )
  @given(events=EVENTS, seed=st.integers(0, 99))
  def test_of_rows(self, config, events, seed):
    log = EventLog.from_columns(_columns(events), SCHEMA)
    mask = np.random.default_rng(seed).random(len(log)) < 0.7
    log, fitted = logs.derive(log, RATES)
    rows = make_rows(log, mask, config, fitted)
    past = log.visible(config.ties)
    for r in range(len(rows)):
      row, start = rows[r], rows.start[r]
      for c, event in enumerate(rows.candidate_events(r)):
        wanted = _expected(log, event, start, start + row.visible[c])
        for name, value in wanted.items():
          np.testing.assert_allclose(row.candidates[name][c], value, atol=1e-6)
      for i in range(start, rows.stop[r]):
        begin = log.offsets[log.user[i]]
        if config.history_length is not None:
          begin = max(begin, past[i] - config.history_length)
        for name, value in _expected(log, i, begin, past[i]).items():
          np.testing.assert_allclose(
            row.history[name][i - start], value, atol=1e-6
          )

  def test_schema(self):
    dense = [f.name for f in RATES.features(SCHEMA, {})]
    self.assertEqual(
      dense,
      [
        f'history_{name}{suffix}'
        for suffix in ('', '_tab', '_shop')
        for name in ('liked', 'loved', 'count')
      ]
      + [
        f'history_{name}{suffix}'
        for suffix in ('_last2', '_shop_last1')
        for name in ('liked', 'loved')
      ],
    )
    with self.assertRaisesRegex(ValueError, "by names 'stars'.*'tab'"):
      HistoryRates(('stars',)).check(SCHEMA)
    for name in ('tab@', 'tab@0', '*@-1', 'tab@2@3', 'tab@1.5'):
      with self.assertRaisesRegex(ValueError, f'has {re.escape(repr(name))}; '):
        HistoryRates((name,))
    with self.assertRaisesRegex(ValueError, 'each once'):
      HistoryRates(('shop', '*@2', '*@02'))
    with self.assertRaisesRegex(ValueError, "hidden has 'shop', which none"):
      datasets.model_schema(SCHEMA, FittedFeatures(), ())

  def test_of_a_dataset(self):
    config = datasets.DataConfig(
      datasets.Synthetic(num_users=20, requests_per_user=5),
      features=(HistoryRates(('*', 'item')),),
      without=('item',),
    )
    found = datasets.load(config)
    self.assertEqual([f.name for f in found.schema.hidden], ['item'])
    batch = found.splits['test'].batch(
      [0], num_rows=1, num_events=512, num_candidates=512
    )
    for part in (batch.history, batch.candidates):
      self.assertNotIn('item', part.features)
      for name in ('history_count', 'history_count_item'):
        self.assertEqual(part.features[name].dtype, np.float32)


if __name__ == '__main__':
  absltest.main()
