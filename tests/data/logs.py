"""Random small logs and what may be seen in them, by brute force."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from histjax import features
from histjax.schema import Categorical, Dense, Schema, Task

SIZE = 64  # Items; no two events of a log share one, so that they can be told.


def schema(*, request: bool = False) -> Schema:
  return Schema(
    user='uid',
    time='ts',
    request='rid' if request else '',
    context=(Categorical('age', 9, column='user_age'),),
    item=(
      Categorical('item', SIZE, column='item_id'),
      Dense('price', offset=1.0, scale=2.0),
    ),
    action=(Categorical('stars', 6),),
    tasks=(Task('liked', column='stars', threshold=4), Task('click')),
  )


def derive(log, *configs, train=None):
  """The log, whose schema says what is derived, and the fitted features."""
  train = np.ones(len(log), bool) if train is None else train
  fitted = features.fit(configs, log.events(), train)
  derived = dataclasses.replace(log.schema, derived=fitted.derived)
  return dataclasses.replace(log, schema=derived), fitted


@st.composite
def columns(
  draw, max_users: int = 4, max_events: int = 24, min_events: int = 1
):
  """Columns of a log: few users, tied times, requests of a user mixed up."""
  n = draw(st.integers(min_events, max_events))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  users = rng.integers(0, draw(st.integers(1, max_users)), n)
  return {
    'uid': np.array([f'u{u}' for u in users]),
    'ts': rng.integers(0, draw(st.sampled_from([2, 6, 40])), n),
    'rid': rng.integers(0, 4, n),
    'user_age': users % 9,
    'item_id': rng.permutation(SIZE)[:n],
    'price': rng.normal(size=n).round(3),
    'stars': rng.integers(1, 6, n),
    'click': rng.integers(0, 2, n),
  }


def records(data) -> dict[str, list[dict]]:
  """The events of each user in the order of a log, as dicts."""
  rows = [
    {name: values[i].item() for name, values in data.items()}
    for i in range(len(data['uid']))
  ]
  users: dict[str, list[dict]] = {}
  for row in rows:
    users.setdefault(row['uid'], []).append(row)
  return {u: sorted(rows, key=lambda r: r['ts']) for u, rows in users.items()}


def seen(events: list[dict], index: int, ties: str, request: bool) -> list[int]:
  """Which of a user's events the one at `index` may see."""
  first = index
  if request:
    same = [e['rid'] == events[index]['rid'] for e in events]
    first = same.index(True)
  if ties == 'order':
    return list(range(first))
  return [i for i, e in enumerate(events) if e['ts'] < events[first]['ts']]
