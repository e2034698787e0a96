"""Rows of many users at once are those of one request at a time."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from absl.testing import absltest
from hypothesis import strategies as st

from histjax import features, vocabulary
from histjax.data import columns as columns_lib
from histjax.data import joins, requests, rows
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig
from histjax.features import FittedFeatures
from histjax.schema import Categorical, Schema, Task
from tests.data import logs

TASKS = (Task('liked', column='stars', threshold=4), Task('click'))
CONFIGS = (
  features.TimeGap(8),
  features.Rates(by=('item', 'shop*item')),
  features.RecentRates(last=3),
  features.HistoryRates(by=('*', 'shop', 'item@2')),
  features.Activity(spans=(2, 5)),
  features.RecentShares(of=('shop@4',)),
)


def schema(request):
  found = logs.schema(request=request)
  shop = Categorical('shop', 4, ids='vocabulary', min_count=1)  # Of five.
  return dataclasses.replace(found, item=(*found.item, shop))


@st.composite
def cases(draw):
  """A log, candidates, and how they are joined."""
  data = draw(logs.columns(max_users=5, max_events=40))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  data['shop'] = data['item_id'] % 5
  # Both labels occur.
  data = {k: np.append(v, v[:1]) for k, v in data.items()}
  data['stars'][[0, -1]], data['click'][[0, -1]] = (1, 5), (0, 1)
  count = draw(st.integers(1, 30))
  as_of = draw(st.booleans())
  late = 0 if as_of else int(data['ts'].max())
  item = rng.integers(0, logs.SIZE, count)
  shown = {
    'uid': np.array([f'u{u}' for u in rng.integers(0, 7, count)]),
    'ts': late + rng.integers(0, 40, count),
    'rid': rng.integers(0, 6, count),
    'user_age': rng.integers(0, 2, count),
    'item_id': item,
    'price': rng.normal(size=count),
    'shop': item % 5,
  }
  config = RowConfig(
    kind=draw(st.sampled_from(['pointwise', 'streaming', 'snapshot'])),
    history_length=draw(st.sampled_from([None, 0, 1, 3, 8])),
    ties='strict' if as_of else draw(st.sampled_from(['order', 'strict'])),
  )
  return data, shown, config, as_of, draw(st.booleans()), draw(st.booleans())


def encoded(table, data, name):
  columns = columns_lib.from_mapping(data, table.columns, name, table.schema)
  return table.encode(columns)[0]


def joined(join, data, shown):
  """The rows, and the row of `shown` that each candidate is."""
  users = np.unique(shown['uid'])
  events = encoded(join.log_table, data, 'log')
  user = np.searchsorted(users, data['uid'])
  known = np.isin(data['uid'], users)
  events = {k: v[known] for k, v in {**events, 'user': user}.items()}
  order = np.lexsort((events['time'], events['user']))
  events = {k: v[order] for k, v in events.items()}
  asked = encoded(join.candidates_table, shown, 'candidates')
  asked['user'] = np.searchsorted(users, shown['uid'])
  return joins.make_rows(
    join, users.astype(object), events, asked, is_timestamp=False
  )


def with_vocabulary(log):
  """The log with what all of its events tell, and that."""
  masks = {split: np.ones(len(log), bool) for split in vocabulary.SPLITS}
  counted = vocabulary.count(log.schema, log.features, masks)
  known = vocabulary.fit(log.schema, counted)
  return log.with_vocabularies(known), known


@hypothesis.given(cases())
def test_rows_are_those_of_requests(case):
  data, shown, config, as_of, request, derive = case
  plain = schema(request)
  log, known = with_vocabulary(EventLog.from_columns(data, plain))
  fitted = FittedFeatures(vocabularies=known)
  if derive:
    log, fitted = logs.derive(log, *CONFIGS)
    fitted = dataclasses.replace(fitted, vocabularies=known)
    plain = log.schema
  join = joins.Join(plain, config, fitted, as_of)
  found, order = joined(join, data, shown)
  assert sorted(order) == list(range(len(shown['uid'])))
  users = logs.records(data)
  for r in range(len(found)):
    own = order[found.offsets[r] : found.offsets[r + 1]]
    # All of a user's candidates of one context, in their order.
    same = (shown['uid'] == shown['uid'][own[0]]) & (
      shown['user_age'] == shown['user_age'][own[0]]
    )
    if as_of and config.kind == 'pointwise':  # And of one view, see below.
      assert same[own].all()
      assert (
        len(set(found.visible[found.offsets[r] : found.offsets[r + 1]])) == 1
      )
    else:
      np.testing.assert_array_equal(own, np.flatnonzero(same))
    asked = {k: v[own] for k, v in shown.items()}
    if not join.timed:
      del asked['ts']
    if not (as_of and request):
      del asked['rid']
    wanted = requests.make_row(
      plain,
      context={'uid': asked['uid'][0], 'user_age': asked['user_age'][0]},
      history=[
        {name: event[name] for name in plain.columns}
        for event in users.get(asked['uid'][0], [])
      ],
      candidates=asked,
      config=config,
      features=fitted,
      as_of=as_of,
    )
    one, batch = (
      x.replace(labels={}, group=None)
      for x in (
        rows.collate([wanted], num_events=50, num_candidates=40),
        found.batch([r], num_rows=1, num_events=50, num_candidates=40),
      )
    )
    for part in ('context', 'history', 'candidates', 'labels'):
      mine, theirs = getattr(batch, part), getattr(one, part)
      for field in ('features', 'length', 'visible', 'mask'):
        if hasattr(theirs, field):
          np.testing.assert_equal(getattr(mine, field), getattr(theirs, field))
      if part == 'context':
        np.testing.assert_equal(mine, theirs)


@pytest.mark.parametrize('request_column', [False, True])
@pytest.mark.parametrize(
  ('kind', 'max_candidates'),
  [
    ('pointwise', None),
    ('request', None),
    ('streaming', None),
    ('streaming', 3),
    ('snapshot', 3),
  ],
)
@hypothesis.given(logs.columns(max_users=3, max_events=40), st.integers(0, 5))
def test_as_of_rows_are_those_of_a_split(
  request_column, kind, max_candidates, data, length
):
  """To the bit, whatever is before the candidates that see the least."""
  # Both labels occur; a user's context is one.
  data = {k: np.append(v, v[:1]) for k, v in data.items()}
  data['stars'][[0, -1]], data['click'][[0, -1]] = (1, 5), (0, 1)
  data['shop'] = data['item_id'] % 4
  # The order of the log, which is that of rows.
  order = np.lexsort((data['ts'], data['uid']))
  data = {k: v[order] for k, v in data.items()}
  shop = Categorical('shop', 4)
  plain = logs.schema(request=request_column)
  plain = dataclasses.replace(plain, item=(*plain.item, shop))
  log, fitted = logs.derive(EventLog.from_columns(data, plain), *CONFIGS)
  config = RowConfig(kind, length, max_candidates=max_candidates, ties='strict')
  late = data['ts'] >= np.median(data['ts'])
  wanted = rows.make_rows(log, late, config, fitted)
  join = joins.Join(log.schema, config, fitted, as_of=True)
  found, order = joined(join, data, {k: v[late] for k, v in data.items()})
  events = np.flatnonzero(late)[order]
  seen = []
  for part, shown, number in (
    (found, events, found.events[0]),
    (wanted, wanted.events, len(log)),
  ):
    user = part.log.user
    begin = np.searchsorted(user[:number], user[part.events])
    start = np.repeat(part.start, np.diff(part.offsets)) - begin
    values = {'start': start, 'visible': part.visible - begin}
    for feature in join.schema.item_features:
      values[feature.name] = part.of_candidates(feature.name, slice(None))
    seen.append({k: v[np.argsort(shown)] for k, v in values.items()})
  np.testing.assert_equal(*seen)


def test_a_history_that_is_too_long():
  join = joins.Join(
    logs.schema(),
    RowConfig('pointwise', history_length=1, on_overflow='error'),
    FittedFeatures(),
  )
  rng = np.random.default_rng(0)
  data = {
    'uid': np.array(['a', 'b', 'b']),
    'ts': np.arange(3),
    'item_id': np.arange(3),
    'price': rng.normal(size=3),
    'shop': np.arange(3),
    'stars': np.arange(3),
    'user_age': np.arange(3),
  }
  joined(join, data, {k: v[:1] for k, v in data.items()})
  with pytest.raises(ValueError, match="'b': history has 2 events, more than"):
    joined(join, data, data)


def test_what_cannot_be_joined():
  with pytest.raises(ValueError, match=r"as_of=True with ties='order'"):
    joins.Join(logs.schema(), RowConfig(), FittedFeatures(), as_of=True)
  derived = dataclasses.replace(
    logs.schema(), derived=(Categorical('time_gap', 8),)
  )
  with pytest.raises(ValueError, match=r"derived has \['time_gap'\], which"):
    joins.Join(derived, RowConfig(), FittedFeatures())
  with pytest.raises(ValueError, match="'shop' has a vocabulary, which is not"):
    joins.Join(schema(False), RowConfig(), FittedFeatures())


def test_columns():
  plain = Schema(
    'u',
    't',
    request='r',
    context=(Categorical('land', 9),),
    item=(Categorical('item', 9),),
    action=(Categorical('clicked', 2),),
    tasks=TASKS,
  )
  join = joins.Join(plain, RowConfig(), FittedFeatures())
  assert join.log_table.columns == ['u', 'item', 'clicked', 't', 'r']
  assert join.candidates_table.columns == ['u', 'item', 'land']
  join = joins.Join(plain, RowConfig(ties='strict'), FittedFeatures(), True)
  assert join.candidates_table.columns == ['u', 'item', 'land', 't', 'r']


if __name__ == '__main__':
  absltest.main()
