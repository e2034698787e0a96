"""Rates of the main task by feature value, as dense features of items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from histjax.data.events import EventLog, Ties
from histjax.schema import Categorical, Dense


def with_rates(
  log: EventLog,
  train: np.ndarray,
  rates: Sequence[str],
  prior: float = 10.0,
  *,
  recent: int = 0,
  ties: Ties = 'order',
) -> EventLog:
  """A log whose items have log-odds of the first task as features.

  For value v of a feature, with n training events of other users that come
  before the event and k of them positive, and the overall rate p of training:

    rate = logit((k + prior p) / (n + prior)) - logit(p)

  Training events come in one random order, all others after them (ordered
  target statistics; Prokhorenkova et al., CatBoost, NeurIPS 2018). To leave
  out the event's own label alone would not do: the rates of one value would
  then differ by the labels left out, and a model that knows the value, by its
  id or its duration, could read them off.

  Args:
    log: the events.
    train: bool `[n]`, the events to count.
    rates: categorical features of items, or crosses as 'item*hour'. Each
      becomes the feature `rate_item`, `rate_item_x_hour`.
    prior: events at the overall rate that each value begins with, > 0.
    recent: if positive, there is also `recent_rate_item`: the sum of
      `rate_item` over the user's last `recent` events before, divided by
      `recent`. It tells what was shown, not what came of it.
    ties: with `recent`, what is before, as `RowConfig.ties`.

  Raises:
    ValueError: no such feature, or training labels are all the same.
  """
  if recent < 0 or (recent and not rates):
    raise ValueError(
      f'data: recent_rates={recent} must be >= 0, and needs rates, which are '
      f'{tuple(rates)}'
    )
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
  rank = np.full(len(log), len(log))
  rank[train] = np.random.default_rng(0).permutation(int(train.sum()))
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
      _before(value, rank, weight) - _before(own, rank, weight)
      for weight in (train.astype(np.float64), train * label)
    )
    smoothed = (positive + prior * mean) / (count + prior)
    name = 'rate_' + rate.replace('*', '_x_')
    rate_of = _logit(smoothed) - _logit(mean)
    features[name] = rate_of.astype(np.float32)
    added.append(Dense(name))
    if recent:
      stop = log.visible(ties)
      start = np.maximum(log.offsets[log.user], stop - recent)
      total = np.append(0.0, np.cumsum(rate_of))
      features[f'recent_{name}'] = (
        (total[stop] - total[start]) / recent
      ).astype(np.float32)
      added.append(Dense(f'recent_{name}'))
  schema = dataclasses.replace(schema, item=(*schema.item, *added))
  return dataclasses.replace(log, schema=schema, features=features)


def _dense(value: np.ndarray) -> np.ndarray:
  return np.unique(value, return_inverse=True)[1]


def _before(group, rank, weight) -> np.ndarray:
  """For each event, the weight of its group's events of lower rank.

  Events of equal rank must have no weight.
  """
  order = np.lexsort((rank, group))
  group = group[order]
  before = np.cumsum(weight[order]) - weight[order]
  found = np.empty(len(order))
  found[order] = before - before[np.searchsorted(group, group, 'left')]
  return found


def _logit(p):
  return np.log(p) - np.log1p(-p)
