"""Users, events and small models to serve them with."""

from __future__ import annotations

import functools

import numpy as np

from histjax import features, scoring
from histjax.data import requests
from histjax.data.datasets import model_schema
from histjax.data.events import EventLog
from histjax.data.row_maker import RowMaker
from histjax.data.rows import RowConfig, collate
from histjax.features import (
  Activity,
  HistoryRates,
  Rates,
  RecentRates,
  RecentShares,
  TimeGap,
)
from histjax.serving.engine import Request
from tests import support
from tests.features import test_serving

# Sums run in another order, at other positions; logits are of order 1.
TOLERANCE = {'rtol': 2e-5, 'atol': 2e-5}
BUCKETS = scoring.ScorerConfig(
  microbatch=16,
  history_buckets=(16, 48),
  candidate_buckets=(4,),
  row_buckets=(4,),
)
DERIVED = (
  Activity((3,)),
  TimeGap(6),
  Rates(('item',), prior=2.0),
  RecentRates(2),
  HistoryRates(('tab@2', '*@3')),
  RecentShares(('tab@2',)),
)
# Encoder and rows of each; of all that serving treats differently.
VARIANTS = {
  'causal': ({}, RowConfig()),
  'strict': ({}, RowConfig(ties='strict')),
  'truncated': ({}, RowConfig(history_length=6)),
  'window': ({'encoder__window': 3}, RowConfig()),
  'window_strict': (
    {'encoder__window': 3},
    RowConfig(history_length=9, ties='strict'),
  ),
  'cross_window': (
    {'fusion': 'cross_only', 'encoder__window': 3},
    RowConfig(),
  ),
  'short_window': ({'encoder__window': 5}, RowConfig(history_length=6)),
  'bidirectional': (
    {'encoder__causal': False},
    RowConfig(history_length=12),
  ),
}


def event(rng: np.random.Generator, time: int, user: int) -> dict:
  """One event as a log has it."""
  return {
    'uid': user,
    'ts': time,
    'age': user % 9,
    'item': int(rng.integers(8)),
    'page': int(rng.integers(3)),
    'shop': int(rng.integers(4)),
    'price': float(rng.normal()),
    'stars': int(rng.integers(1, 6)),
    'click': int(rng.integers(2)),
  }


def events(rng, number: int, user: int, start: int = 0) -> list[dict]:
  """A user's events; some share their time."""
  times = start + np.cumsum(rng.integers(0, 3, number))
  return [event(rng, int(t), user) for t in times]


@functools.cache
def fitted(derived: bool, request: bool = False):
  """A schema, and features fitted to a log of it."""
  rng = np.random.default_rng(0)
  rows = [e for user in range(9) for e in events(rng, 20, user)]
  data = {name: np.array([r[name] for r in rows]) for name in rows[0]}
  data['rid'] = rng.integers(1000, size=len(rows))
  log = EventLog.from_columns(data, test_serving.schema(request))
  configs = DERIVED if derived else ()
  found = features.fit(configs, log.events(), np.ones(len(log), bool))
  return model_schema(log.schema, found, ()), found


@functools.cache
def maker(variant: str, derived: bool) -> RowMaker:
  schema, found = fitted(derived)
  return RowMaker(schema, VARIANTS[variant][1], found)


def scorer(variant: str, derived: bool = False, seed: int = 0):
  """A scorer of random parameters; those of one config are shared."""
  return _scorer(tuple(VARIANTS[variant][0].items()), derived, seed)


@functools.cache
def _scorer(fields, derived, seed):
  config = support.config(schema=fitted(derived)[0], **dict(fields))
  _, variables = support.init(config, seed)
  return scoring.Scorer(config, variables, BUCKETS)


def expected(variant, derived, request, history, seed=0) -> dict:
  """What evaluation computes of all events of the user."""
  rows = maker(variant, derived)
  row = requests.make_row(
    rows.schema,
    context={rows.schema.user: request.user, **request.context},
    history=history,
    candidates=request.candidates,
    config=rows.config,
    features=rows.features,
  )
  batch = collate([row])
  of = scorer(variant, derived, seed)
  cache = of.encode(batch.history)
  logits = of.score(cache, batch.candidates, batch.context)
  return {name: x[0] for name, x in logits.items()}


def request(rng, user: int, history, first=None, number=None) -> Request:
  """Some candidates for a user, after the events of `history`."""
  first = len(history) if first is None else first
  time = history[-1]['ts'] if history else 0
  number = int(rng.integers(1, 5)) if number is None else number
  shown = [event(rng, time + int(rng.integers(2)), user) for _ in range(number)]
  for item in shown:
    del item['stars'], item['click']
  return Request(
    user=user,
    candidates=shown,
    context={'age': user % 9},
    events=history[first:],
    first=first,
  )


def check(result, wanted) -> None:
  """Raises unless it is a result with these logits."""
  if isinstance(result, Exception):
    raise result
  assert result.logits.keys() == wanted.keys()
  for name, values in wanted.items():
    np.testing.assert_allclose(
      result.logits[name], values, **TOLERANCE, err_msg=name
    )
