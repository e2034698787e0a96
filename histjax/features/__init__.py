"""Derived features of items: fitted, saved with a run, and served.

One file each. `DataConfig.features` lists them, in the order in which they are
computed:

    'features': [
      {'type': 'time_gap', 'buckets': 24},
      {'type': 'history_rates', 'by': ['*', 'tab@5']},
    ]
"""

from histjax.features.activity import Activity
from histjax.features.base import (
  Counts,
  DerivedFeature,
  Events,
  Impressions,
  Lookback,
  State,
)
from histjax.features.fitted import (
  FittedFeatures,
  check_mergeable,
  collect,
  counted,
  fit,
  load,
  merge,
)
from histjax.features.history_rates import HistoryRates
from histjax.features.rates import Rates
from histjax.features.recent_rates import RecentRates
from histjax.features.recent_shares import RecentShares
from histjax.features.time_gap import TimeGap

__all__ = [
  'Activity',
  'Counts',
  'DerivedFeature',
  'Events',
  'FittedFeatures',
  'HistoryRates',
  'Impressions',
  'Lookback',
  'Rates',
  'RecentRates',
  'RecentShares',
  'State',
  'TimeGap',
  'check_mergeable',
  'collect',
  'counted',
  'fit',
  'load',
  'merge',
]
