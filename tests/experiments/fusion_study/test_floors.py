"""Floors, by hand and against a loop over impressions."""

import math

import numpy as np
import pytest

from fusion_study import floors
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.schema import Categorical, Schema, Task

SCHEMA = Schema(
  user='user',
  time='time',
  item=(Categorical('item', 9),),
  action=(Categorical('act', 2),),
  tasks=(Task('y', column='act'),),
)


def log_of(seed=0, size=200):
  rng = np.random.default_rng(seed)
  return EventLog.from_columns(
    {
      'user': rng.integers(0, 12, size),
      'time': np.sort(rng.integers(0, 60, size)),
      'item': rng.integers(0, 9, size),
      'act': rng.integers(0, 2, size),
    },
    SCHEMA,
  )


def oracle(log, train, event, terms, window):
  """Of one event, from the definition."""

  def log_odds(p):
    return math.log(p / (1 - p))

  def smoothed(events, a):
    positives = sum(float(log.labels['y'][e]) for e in events)
    return (positives + a * base) / (len(events) + a)

  base = float(np.mean(log.labels['y'][train], dtype=np.float64))
  logit = log_odds(base)
  for term in terms:
    if term == 'history':
      before = [
        e
        for e in range(len(log))
        if log.user[e] == log.user[event] and log.time[e] < log.time[event]
      ]
      rate = smoothed(before[-window:], 3)
    else:
      value = log.user if term == 'user' else log.features[term]
      rate = smoothed([e for e in train if value[e] == value[event]], 10)
    logit += log_odds(rate) - log_odds(base)
  return logit


@pytest.mark.parametrize(
  'terms', [(), ('user',), ('user', 'item'), ('history', 'item')]
)
@pytest.mark.parametrize('kind', ['pointwise', 'streaming'])
def test_equals_the_definition(terms, kind):
  log = log_of()
  mask = np.arange(len(log)) % 3 > 0
  config = RowConfig(kind, history_length=4, ties='strict')
  train, test = make_rows(log, mask, config), make_rows(log, ~mask, config)
  found = floors.floor_logits(test, train, terms, 'y', window=4)
  wanted = [oracle(log, np.flatnonzero(mask), e, terms, 4) for e in test.events]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_values_that_training_has_not_seen_have_the_base_rate():
  log = log_of()
  mask = log.features['item'] < 8  # Item 8, the largest, is in test alone.
  train, test = (
    make_rows(log, m, RowConfig('pointwise')) for m in (mask, ~mask)
  )
  found = floors.floor_logits(test, train, ('item',), 'y', window=4)
  base = log.labels['y'][mask].mean(dtype=np.float64)
  np.testing.assert_allclose(found, math.log(base / (1 - base)), rtol=1e-6)


def test_unknown_term():
  log = log_of()
  rows = make_rows(log, np.ones(len(log), bool), RowConfig('pointwise'))
  with pytest.raises(
    ValueError, match=r"'colour' must be .* \['item', 'act'\]"
  ):
    floors.floor_logits(rows, rows, ('colour',), 'y', window=4)


def test_training_labels_of_one_kind():
  log = log_of()
  mask = log.labels['y'] == 1
  train, test = (
    make_rows(log, m, RowConfig('pointwise')) for m in (mask, ~mask)
  )
  with pytest.raises(ValueError, match="labels of task 'y' are all the same"):
    floors.floor_logits(test, train, ('user',), 'y', window=4)
