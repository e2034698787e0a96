"""Rates of the first task by feature value, over other users' events."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from histjax import config as dicts
from histjax.features import base
from histjax.schema import Categorical, Dense, Feature, Schema

PREFIX = 'rate_'
_LEAST_PRIOR = 1e-100  # Counts divided by it are finite.


@dataclasses.dataclass(frozen=True)
class Rates(base.DerivedFeature):
  """Log-odds of the first task by value, over other users' training events.

  For value v of a feature, with n training events of other users, k of them
  positive, and the overall rate p of training:

      rate = logit((k + prior p) / (n + prior)) - logit(p)

  In rows to train on, training events come in one random order (`base.ranks`)
  and count what comes before them alone (ordered target statistics;
  Prokhorenkova et al., CatBoost, NeurIPS 2018); everywhere else all of them
  count. To leave out the event's own label alone would not do: the rates of one
  value would then differ by the labels left out, and a model that knows the
  value, by its id or its duration, could read them off.

  Attributes:
    by: categorical features of items, or crosses as 'item*hour'. Each adds
      the feature `rate_item`, `rate_item_x_hour`.
    prior: events at the overall rate that each value begins with, at least
      1e-100.
  """

  by: tuple[str, ...]
  prior: float = 10.0

  needs_user: ClassVar[bool] = True

  def __post_init__(self):
    dicts.normalize(self)
    if not self.by or len(set(self.by)) < len(self.by):
      raise ValueError(
        f'data.features: Rates.by={self.by} must name at least one, each once'
      )
    if not _LEAST_PRIOR <= self.prior < math.inf:
      raise ValueError(
        f'data.features: Rates.prior={self.prior} must be at least '
        f'{_LEAST_PRIOR:g}, and finite; 10 is the default'
      )

  def reads(self) -> tuple[str, ...]:
    """The features whose values have rates."""
    return tuple(dict.fromkeys(n for by in self.by for n in by.split('*')))

  def check(self, schema: Schema) -> None:
    """Raises ValueError without such features, or with too many values."""
    base.check_names(self, 'by', schema, self.reads())
    for by in self.by:
      sizes = [size for _, size in _columns(schema, by)]
      if math.prod(sizes) > 2**62:
        raise ValueError(
          f'data.features: Rates.by has {by!r}, which has {sizes} values; '
          'their product must be at most 2**62: cross fewer features'
        )

  def collect(self, events: base.Events, train: np.ndarray) -> base.State:
    """Counts events and positives by value, in all and of each user."""
    label = _label(events)[train]
    users, user = np.unique(events.user[train], return_inverse=True)
    found: dict[str, np.ndarray] = {
      'users': users,
      'num_events': np.asarray(len(label)),
      'num_positive': np.asarray(label.sum()),
    }
    for i, by in enumerate(self.by):
      values, value = np.unique(
        _value(events.schema, events.features, by)[train], return_inverse=True
      )
      pairs, pair = np.unique(user * len(values) + value, return_inverse=True)
      found |= {
        f'{i}/values': values,
        f'{i}/count': np.bincount(value),
        f'{i}/positive': np.bincount(value, label),
        f'{i}/pair_user': users[pairs // max(len(values), 1)],
        f'{i}/pair_value': values[pairs % max(len(values), 1)],
        f'{i}/own_count': np.bincount(pair),
        f'{i}/own_positive': np.bincount(pair, label),
      }
    return found

  def merge(self, parts: Sequence[base.State], schema: Schema) -> base.State:
    """Adds up what was counted."""
    num_events = sum(int(part['num_events']) for part in parts)
    positive = sum(float(part['num_positive']) for part in parts)
    if not 0 < positive < num_events:
      raise ValueError(
        f'data.features: Rates of task {schema.tasks[0].name!r}, whose '
        'training labels are all the same; give both kinds, or leave Rates out'
      )

    def joined(name: str) -> np.ndarray:
      return np.concatenate([part[name] for part in parts])

    users = np.sort(joined('users'))
    state = {'users': users, 'mean': np.asarray(positive / num_events)}
    for i in range(len(self.by)):
      values, (count, total) = base.summed(
        parts, f'{i}/values', f'{i}/count', f'{i}/positive'
      )
      pair = np.searchsorted(users, joined(f'{i}/pair_user')) * len(values)
      pair += np.searchsorted(values, joined(f'{i}/pair_value'))
      order = np.argsort(pair)
      state |= {
        f'{i}/values': values,
        f'{i}/count': count,
        f'{i}/positive': total,
        f'{i}/pairs': pair[order],
        f'{i}/own_count': joined(f'{i}/own_count')[order],
        f'{i}/own_positive': joined(f'{i}/own_positive')[order],
      }
    return state

  def counted(self, events: base.Events) -> dict[str, np.ndarray]:
    """The values that have rates."""
    return {by: _value(events.schema, events.features, by) for by in self.by}

  def features(self, schema: Schema, state: base.State) -> tuple[Feature, ...]:
    """One dense feature a rate."""
    return tuple(Dense(_name(by)) for by in self.by)

  def lookback(self, history_length: int | None) -> base.Lookback:
    """Nothing of the user's past."""
    del history_length
    return base.Lookback()

  def apply(
    self,
    events: base.Events,
    impressions: base.Impressions,
    state: base.State,
  ) -> dict[str, np.ndarray]:
    """See the class; all training events of other users count."""
    found = {}
    user, known_user = _lookup(state['users'], impressions.user)
    for i, by in enumerate(self.by):
      values = state[f'{i}/values']
      value, known = _lookup(
        values, _value(events.schema, impressions.features, by)
      )
      pair, own = _lookup(state[f'{i}/pairs'], user * len(values) + value)
      own &= known & known_user
      count, positive = (
        np.where(known, state[f'{i}/{what}'][value], 0)
        - np.where(own, state[f'{i}/own_{what}'][pair], 0)
        for what in ('count', 'positive')
      )
      found[_name(by)] = self._rate(count, positive, state['mean'])
    return found

  def apply_training(
    self,
    events: base.Events,
    history_length: int | None,
    state: base.State,
    train: np.ndarray,
    before: Mapping[str, base.Counts] | None = None,
  ) -> dict[str, np.ndarray]:
    """See the class; of training events those before, in the random order."""
    found = self.apply(events, events.impressions(history_length), state)
    if not train.any():
      return found
    label, rank = _label(events)[train], base.ranks(events)[train]
    user = np.unique(events.user[train], return_inverse=True)[1]
    for by, value in self.counted(events).items():
      value = np.unique(value[train], return_inverse=True)[1]
      if before is None:
        of_all = base.count_before(value, rank, label)
      else:
        of_all = before[by]
      own = base.count_before(value * (user.max() + 1) + user, rank, label)
      found[_name(by)][train] = self._rate(
        of_all.events - own.events,
        of_all.positive - own.positive,
        state['mean'],
      )
    return found

  def _rate(self, count, positive, mean) -> np.ndarray:
    # As the class has it, without a probability, which could round to 1.
    odds = np.log1p(positive / (self.prior * mean))
    odds -= np.log1p((count - positive) / (self.prior * (1 - mean)))
    return odds.astype(np.float32)


def _name(by: str) -> str:
  return PREFIX + by.replace('*', '_x_')


def _columns(schema: Schema, by: str) -> list[tuple[str, int]]:
  sizes = {
    f.name: f.size
    for f in (*schema.item, *schema.hidden)
    if isinstance(f, Categorical)
  }
  return [(name, sizes[name]) for name in by.split('*')]


def _value(schema: Schema, features, by: str) -> np.ndarray:
  """The value of a feature, or of a cross, as one int64 `[n]`."""
  value = np.zeros((), np.int64)
  for name, size in _columns(schema, by):
    value = value * size + features[name]
  return value.astype(np.int64)


def _lookup(known: np.ndarray, wanted: np.ndarray):
  """Where each of `wanted` is in `known`, sorted, and whether it is."""
  place = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
  return place, known[place] == wanted


def _label(events: base.Events) -> np.ndarray:
  """Of the first task, float64 `[n]`."""
  return events.labels[events.schema.tasks[0].name].astype(np.float64)
