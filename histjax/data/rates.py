"""Rates of the main task by feature value, as dense features of items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from histjax.data.events import EventLog
from histjax.data.schema import Categorical, Dense


def with_rates(
  log: EventLog, train: np.ndarray, rates: Sequence[str], prior: float = 10.0
) -> EventLog:
  """A log whose items have log-odds of the first task as features.

  For value v of a feature, with n training events of other users and k of
  them positive, and the overall rate p of training:

    rate = logit((k + prior p) / (n + prior)) - logit(p)

  The user's own events are left out everywhere, as their labels are what is
  predicted (target encoding; Micci-Barreca, SIGKDD Explorations 2001). Labels
  of other users are read whenever they were given, within training.

  Args:
    log: the events.
    train: bool `[n]`, the events to count.
    rates: categorical features of items, or crosses as 'item*hour'. Each
      becomes the feature `rate_item`, `rate_item_x_hour`.
    prior: events at the overall rate that each value begins with, > 0.

  Raises:
    ValueError: no such feature, or training labels are all the same.
  """
  if not rates:
    return log
  schema = log.schema
  known = [f.name for f in schema.item if isinstance(f, Categorical)]
  label = log.labels[schema.tasks[0].name].astype(np.float64)
  mean = label[train].mean() if train.any() else 0.0
  if not 0 < mean < 1:
    raise ValueError(
      f'data: rates={tuple(rates)} of task {schema.tasks[0].name!r}, whose '
      'training labels are all the same; give both kinds, or leave rates empty'
    )
  features = dict(log.features)
  added = []
  for rate in rates:
    value = np.zeros(len(log), np.int64)
    for name in rate.split('*'):
      if name not in known:
        raise ValueError(
          f'data: rates={rate!r} names {name!r}; it must be one of the '
          f'categorical features of items, {known}, or some joined by "*"'
        )
      column = log.features[name]
      value = _dense(value * (int(column.max()) + 1) + column)
    own = _dense(value * log.num_users + log.user)
    count, positive = (
      _total(value, train, weight) - _total(own, train, weight)
      for weight in (np.ones_like(label), label)
    )
    smoothed = (positive + prior * mean) / (count + prior)
    name = 'rate_' + rate.replace('*', '_x_')
    features[name] = (_logit(smoothed) - _logit(mean)).astype(np.float32)
    added.append(Dense(name))
  schema = dataclasses.replace(schema, item=(*schema.item, *added))
  return dataclasses.replace(log, schema=schema, features=features)


def _dense(value: np.ndarray) -> np.ndarray:
  return np.unique(value, return_inverse=True)[1]


def _total(group, mask, weight) -> np.ndarray:
  """For each event, the weight of the masked events of its group."""
  size = int(group.max()) + 1
  return np.bincount(group[mask], weight[mask], size)[group]


def _logit(p):
  return np.log(p) - np.log1p(-p)
