"""What the user was shown before an event, as dense features of items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from histjax.data.events import EventLog, Ties
from histjax.schema import Dense, categorical, feature_and_last

_LEAST_SHARE = 0.01  # Of training events, for a value to have a feature.


def with_activity(
  log: EventLog, spans: Sequence[int], ties: Ties = 'order'
) -> EventLog:
  """A log whose items say how many events the user had within each span.

  Of an event at time t whose user had earlier ones at times t_1 .. t_n:

    activity_<span> = log(1 + #{i: t - t_i <= span})
    activity_since = log(1 + t - t_n) / 10, t_n the log's first time if n = 0

  in seconds. They tell what was shown, not what came of it, and so are the
  same whatever history a candidate sees.

  Args:
    log: the events.
    spans: whole seconds, each >= 1; empty: the log as it is.
    ties: what is earlier, as `RowConfig.ties`.

  Raises:
    ValueError: a span is less than 1, or named twice.
  """
  if not spans:
    return log
  names = [f'activity_{span}' for span in spans]
  if min(spans) < 1 or len(set(names)) < len(names):
    raise ValueError(
      f'data: activity={tuple(spans)} must be whole seconds >= 1, each once'
    )
  unit = 1e-9 if log.is_timestamp else log.schema.time_unit
  stop = log.visible(ties)
  times, rank = np.unique(log.time, return_inverse=True)
  # Users and their times as one increasing number.
  place = log.user.astype(np.int64) * (len(times) + 1) + rank
  features = dict(log.features)
  for name, span in zip(names, spans, strict=True):
    # Whole nanoseconds: as floating-point numbers they would be rounded.
    width = span * 10**9 if log.is_timestamp else span / unit
    oldest = np.searchsorted(times, log.time - width, 'left')
    begin = np.searchsorted(place, place - rank + oldest, 'left')
    features[name] = np.log1p(stop - begin).astype(np.float32)
  last = np.where(
    stop > log.offsets[log.user], log.time[stop - 1], log.time.min()
  )
  since = (log.time - last) * unit
  features['activity_since'] = (np.log1p(since) / 10).astype(np.float32)
  added = [Dense(name) for name in (*names, 'activity_since')]
  schema = dataclasses.replace(log.schema, item=(*log.schema.item, *added))
  return dataclasses.replace(log, schema=schema, features=features)


def with_recent_shares(
  log: EventLog,
  train: np.ndarray,
  shares: Sequence[str],
  ties: Ties = 'order',
) -> EventLog:
  """A log whose items say what the user's last events before were of.

  'tab@10' adds for each value v of the feature `tab` that at least one in a
  hundred training events has (shares of rarer ones tell users apart)

    recent_tab_<v>_of_10 = #{of the user's 10 last events before: tab = v} / 10

  They tell what was shown, not what came of it, and so are the same whatever
  history a candidate sees.

  Args:
    log: the events.
    train: bool `[n]`, the training events.
    shares: each a categorical feature of items, '@' and a number of events
      >= 1; empty: the log as it is.
    ties: what is before, as `RowConfig.ties`.

  Raises:
    ValueError: a name that is not so.
  """
  known = {f.name: f.size for f in categorical(log.schema.item)}
  stop = log.visible(ties)
  features, added = dict(log.features), []
  for share in shares:
    name, last = feature_and_last(share, 'data: recent_shares')
    if name not in known or last is None:
      raise ValueError(
        f'data: recent_shares has {share!r}; it must be '
        "'<feature>@<number of events>' with one of the categorical features "
        f'of items, {list(known)}'
      )
    start = np.maximum(log.offsets[log.user], stop - last)
    column = log.features[name]
    count = np.bincount(column[train], minlength=known[name])
    for value in np.flatnonzero(count >= max(1, _LEAST_SHARE * train.sum())):
      total = np.append(0, np.cumsum(column == value))
      feature = f'recent_{name}_{value}_of_{last}'
      share_of = (total[stop] - total[start]) / last
      features[feature] = share_of.astype(np.float32)
      added.append(Dense(feature))
  schema = dataclasses.replace(log.schema, item=(*log.schema.item, *added))
  return dataclasses.replace(log, schema=schema, features=features)
