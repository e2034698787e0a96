"""The mean rate of what was shown last, whatever its outcome."""

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax.features import Rates, RecentRates
from tests.data import logs
from tests.features.test_activity import EVENTS, log_of


class RecentRatesTest(parameterized.TestCase):
  @parameterized.product(ties=('order', 'strict'), last=(1, 3))
  @given(events=EVENTS, seed=st.integers(0, 99))
  def test_definition(self, ties, last, events, seed):
    log = log_of([*events, (0, 1), (1, 2)])
    rng = np.random.default_rng(seed)
    log.features['item'][:] = rng.integers(0, 3, len(log))
    log.labels['click'][:] = rng.integers(0, 2, len(log))
    log.labels['click'][:2] = 0, 1
    train = rng.random(len(log)) < 0.6
    train[:2] = True
    rates = Rates(('item',)), RecentRates(last)
    _, fitted = logs.derive(log, *rates, train=train)
    for mask in (None, train):
      found = fitted.of_events(log.events(ties), None, train=mask)
      for i in range(len(log)):
        past = [
          float(found['rate_item'][j])
          for j in range(len(log))
          if log.user[j] == log.user[i]
          and (log.time[j] < log.time[i] if ties == 'strict' else j < i)
        ]
        np.testing.assert_allclose(
          found['recent_rate_item'][i], sum(past[-last:]) / last, atol=1e-6
        )

  def test_refused(self):
    log = log_of([(0, 0)])
    for configs in ((RecentRates(3),), (RecentRates(3), Rates(('item',)))):
      with self.assertRaisesRegex(ValueError, 'which must come before it'):
        logs.derive(log, *configs)
    with self.assertRaisesRegex(ValueError, 'last=0 must be >= 1'):
      RecentRates(0)


if __name__ == '__main__':
  absltest.main()
