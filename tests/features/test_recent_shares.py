"""What was shown last is counted by value, whatever its outcome."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.data import datasets
from histjax.features import RecentShares
from tests.data import logs
from tests.features.test_activity import EVENTS, SMALL, log_of


class RecentSharesTest(parameterized.TestCase):
  @parameterized.product(ties=('order', 'strict'), stamps=(False, True))
  @given(events=EVENTS, seed=st.integers(0, 99))
  def test_definition(self, ties, stamps, events, seed):
    log = log_of(events, stamps)
    rng = np.random.default_rng(seed)
    item, train = rng.integers(0, 3, len(log)), rng.random(len(log)) < 0.7
    log = dataclasses.replace(log, features={'item': item})
    shares = RecentShares(('item@2', 'item@5'))
    log, fitted = logs.derive(log, shares, train=train)
    found = fitted.of_events(log.events(ties), None)
    usual = sorted(set(item[train]))
    names = [f'recent_item_{v}_of_{n}' for n in (2, 5) for v in usual]
    self.assertEqual([f.name for f in log.schema.derived], names)
    for i in range(len(log)):
      past = [
        item[j]
        for j in range(len(log))
        if log.user[j] == log.user[i]
        and (log.time[j] < log.time[i] if ties == 'strict' else j < i)
      ]
      expected = [
        sum(x == v for x in past[-n:]) / n for n in (2, 5) for v in usual
      ]
      np.testing.assert_allclose(
        [found[n][i] for n in names], expected, atol=1e-6
      )

  def test_rare_values_are_left_out(self):
    log = log_of([(0, i) for i in range(400)])
    item = np.arange(400) % 2
    item[[7, 300, 301]] = 2  # One of the first 200, where 2 would be enough.
    log = dataclasses.replace(log, features={'item': item})
    log, _ = logs.derive(
      log, RecentShares(('item@3',)), train=np.arange(400) < 200
    )
    self.assertEqual(
      [f.name for f in log.schema.derived],
      ['recent_item_0_of_3', 'recent_item_1_of_3'],
    )

  @parameterized.parameters('item', 'item@', 'item@0', 'other@3', 'item@3@4')
  def test_bad_names(self, name):
    with self.assertRaisesRegex(ValueError, f'RecentShares.*{name[:5]}'):
      logs.derive(log_of([(0, 0)]), RecentShares((name,)))

  def test_of_a_dataset(self):
    found = datasets.load(
      datasets.DataConfig(SMALL, features=(RecentShares(('category@4',)),))
    )
    name = 'recent_category_1_of_4'
    self.assertIn(name, [f.name for f in found.schema.derived])
    row = found.splits['test'][0]
    self.assertEqual(row.candidates[name].dtype, np.float32)
    self.assertIn(name, row.history)


if __name__ == '__main__':
  absltest.main()
