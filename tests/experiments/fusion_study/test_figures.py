"""Figures of studies whose test split is too small for some metrics."""

import pytest

from fusion_study import report


def row(variant, mean, low, high):
  auc = {'mean': mean, 'values': [mean], 'low': low, 'high': high}
  return {
    'variant': variant,
    'kind': 'grid',
    'amortizable': True,
    'window': 50,
    'auc': auc,
    'gauc': auc,
  }


def test_metrics_that_are_undefined():
  rows = [
    row('concat', 0.7, 0.6, 0.8),
    row('none', 0.6, None, None),  # On some resamples.
    row('mean_pool', None, None, None),
  ]
  summary = {'baseline': 'concat', 'datasets': {'small': rows}}
  report.quality(summary)
  costs = {'concat': 1.0, 'none': 2.0, 'mean_pool': 3.0}
  figure = report.cost_figure(summary, {'unit': 'ms', 'fusions': costs})
  ((concat, whiskers), (none, no_whiskers)) = (
    (line, bars) for line, _, bars in figure.axes[0].containers
  )
  assert concat.get_ydata()[0] == 0.7 and none.get_ydata()[0] == 0.6
  (whisker,) = whiskers
  assert whisker.get_segments()[0][:, 1] == pytest.approx([0.6, 0.8])
  assert not no_whiskers
