"""Rates count other users' training labels that come before, and no others."""

import fractions
import math

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import datasets
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.features import Rates, base
from histjax.schema import Categorical, Schema, Task
from tests.data import logs

SCHEMA = Schema(
  user='user',
  time='time',
  context=(Categorical('age', 4),),
  item=(Categorical('item', 3), Categorical('tab', 2)),
  tasks=(Task('click'),),
)


@st.composite
def _columns(draw):
  n = draw(st.integers(4, 40))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  return {
    'user': rng.integers(0, 4, n),
    'time': np.arange(n),
    'age': np.zeros(n, np.int64),
    'item': rng.integers(0, 3, n),
    'tab': rng.integers(0, 2, n),
    'click': np.append(rng.integers(0, 2, n - 2), [0, 1]),
  }


def _log(x: fractions.Fraction) -> float:
  return math.log(x.numerator) - math.log(x.denominator)


def _logit(p):
  return math.log(p / (1 - p))


class RatesTest(parameterized.TestCase):
  @parameterized.parameters(('item', 1.0), ('item*tab', 10.0))
  @given(data=_columns(), seed=st.integers(0, 99))
  def test_definition(self, rate, prior, data, seed):
    log = EventLog.from_columns(data, SCHEMA)
    train = np.random.default_rng(seed).random(len(log)) < 0.5
    label = log.labels['click']
    if len(set(label[train])) < 2:
      with self.assertRaisesRegex(ValueError, 'are all the same'):
        logs.derive(log, Rates((rate,), prior), train=train)
      return
    log, fitted = logs.derive(log, Rates((rate,), prior), train=train)
    name = 'rate_' + rate.replace('*', '_x_')
    self.assertEqual([f.name for f in fitted.derived], [name])
    trained = fitted.of_events(log.events(), None, train=train)[name]
    served = fitted.of_events(log.events(), None)[name]
    value = list(zip(*(log.features[n] for n in rate.split('*')), strict=True))
    mean = label[train].mean(dtype=np.float64)
    # The order that training events come in, as the definition has it.
    rank = np.full(len(log), len(log))
    rank[train] = np.argsort(np.argsort(base.ranks(log.events())[train]))

    def expected(i, last):
      others = [
        float(label[j])
        for j in np.flatnonzero(train)
        if value[j] == value[i]
        and log.user[j] != log.user[i]
        and rank[j] < last
      ]
      smoothed = (sum(others) + prior * mean) / (len(others) + prior)
      return _logit(smoothed) - _logit(mean)

    everything = range(len(log))
    np.testing.assert_allclose(
      trained, [expected(i, rank[i]) for i in everything], atol=1e-6
    )
    np.testing.assert_allclose(
      served, [expected(i, len(log)) for i in everything], atol=1e-6
    )
    for found, of_train in ((trained, train), (served, None)):
      rows = make_rows(log, train, RowConfig(), fitted, train=of_train)
      for r, row in enumerate(rows):
        np.testing.assert_array_equal(
          row.candidates[name], found[rows.candidate_events(r)]
        )

  @parameterized.parameters(1e-100, 1e-17, 1e-9, 1e300)
  def test_any_prior_gives_finite_rates(self, prior):
    # Of others: a click, a miss, one of each, two clicks.
    log = EventLog.from_columns(
      {
        'user': [0, 1, 0, 1, 0, 1, 2],
        'time': range(7),
        'age': [0] * 7,
        'item': [0, 0, 1, 1, 2, 2, 2],
        'tab': [0] * 7,
        'click': [1, 1, 0, 0, 1, 0, 1],
      },
      SCHEMA,
    )
    log, fitted = logs.derive(log, Rates(('item',), prior))
    found = fitted.of_events(log.events(), None)['rate_item']
    mean = 4 / 7

    def expected(k, n):
      p, m = fractions.Fraction(prior), fractions.Fraction(mean)
      odds = (k + p * m) * (1 - m) / ((n - k + p * (1 - m)) * m)
      return _log(odds)

    # By user.
    seen = [(1, 1), (0, 1), (1, 2), (1, 1), (0, 1), (2, 2), (1, 2)]
    np.testing.assert_allclose(
      found, [expected(k, n) for k, n in seen], rtol=1e-6, atol=1e-6
    )

  def test_a_rate_does_not_tell_the_label(self):
    # One value, every event of another user, so that a mean over the others
    # is lower where the label is 1: within the value it would tell the label.
    n = 4000
    rng = np.random.default_rng(0)
    columns = {k: np.zeros(n, np.int64) for k in ('age', 'item', 'tab')}
    click = rng.integers(0, 2, n)
    log = EventLog.from_columns(
      {**columns, 'user': np.arange(n), 'time': np.arange(n), 'click': click},
      SCHEMA,
    )
    _, fitted = logs.derive(log, Rates(('item',)))
    found = fitted.of_events(log.events(), None, train=np.ones(n, bool))
    rate = found['rate_item']
    difference = rate[click == 1].mean() - rate[click == 0].mean()
    self.assertLess(abs(difference), 4 * rate.std() / np.sqrt(n / 4))

  @parameterized.parameters('age', 'nothing', 'item*nothing')
  def test_unknown(self, rate):
    log = EventLog.from_columns(
      {k: [0, 1] for k in ('user', 'time', 'age', 'item', 'tab', 'click')},
      SCHEMA,
    )
    with self.assertRaisesRegex(ValueError, 'one of the categorical features'):
      logs.derive(log, Rates((rate,)))

  def test_bad_fields(self):
    for prior in (0.0, -1.0, 1e-101, math.nan, math.inf):
      with self.assertRaisesRegex(ValueError, 'prior=.* must be at least'):
        Rates(('item',), prior)
    for by in ((), ('item', 'item')):
      with self.assertRaisesRegex(ValueError, 'at least one, each once'):
        Rates(by)

  def test_crosses_fit_into_64_bits(self):
    sizes = {'a': 2**31 - 1, 'b': 2**31 - 1, 'c': 2}
    item = tuple(Categorical(name, size) for name, size in sizes.items())
    schema = Schema(user='u', time='t', item=item, tasks=(Task('click'),))
    Rates(('a*b', 'a*c')).check(schema)
    with self.assertRaisesRegex(ValueError, r"'a\*b\*c', .* cross fewer"):
      Rates(('a*b*c',)).check(schema)

  def test_of_a_dataset(self):
    small = datasets.Synthetic(num_users=20, requests_per_user=5)
    options = {'features': (Rates(('item',)),), 'without': ('segment',)}
    plain = datasets.load(datasets.DataConfig(small))
    found = datasets.load(datasets.DataConfig(small, **options))
    names = [f.name for f in found.schema.features]
    self.assertIn('rate_item', names)
    self.assertEqual(
      set(names),
      {f.name for f in plain.schema.features} - {'segment'} | {'rate_item'},
    )
    batch = found.splits['test'].batch(
      [0], num_rows=1, num_events=512, num_candidates=512
    )
    self.assertEqual(batch.candidates.features['rate_item'].dtype, np.float32)
    self.assertIn('rate_item', batch.history.features)
    self.assertNotIn('segment', batch.context)

  def test_without_unknown(self):
    with self.assertRaisesRegex(ValueError, "without='size' must be one of"):
      datasets.load(
        datasets.DataConfig(datasets.Synthetic(num_users=2), without=('size',))
      )


if __name__ == '__main__':
  absltest.main()
