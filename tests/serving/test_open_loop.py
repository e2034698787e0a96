"""The load test: who comes when, what is counted, and that faults are found."""

import dataclasses

import numpy as np
import pytest

from benchmarking import load, load_engines
from histjax.serving import engine
from tests.serving.conftest import running, service_of

SETTINGS = load.Load(users=4, history=5, candidates=6, new_events=0.5)
SCHEMA = {
  'columns': {
    'context': {'segment': {'type': 'integer', 'minimum': 2, 'maximum': 3}},
    'candidates': {
      'item': {'type': 'integer or text'},
      'price': {'type': 'number'},
      'time': {'type': 'number or ISO 8601 text'},
    },
    'events': {
      'item': {'type': 'integer or text'},
      'stars': {'type': 'number', 'task': 'like', 'threshold': 4},
      'click': {'type': 'number', 'task': 'click', 'threshold': None},
      'time': {'type': 'number or ISO 8601 text'},
    },
  }
}


def test_users():
  users = load.Users(SETTINGS, SCHEMA, 'time')
  records = users.schedule(rate=50, seconds=8)
  assert 300 < len(records) < 500
  at = [x.at for x in records]
  assert at == sorted(at)
  assert 0 <= at[0] <= at[-1] <= 8
  counts = np.bincount([x.user for x in records], minlength=4)
  assert counts[0] > counts[3]
  assert {len(x.candidates['item']) for x in records} == {6}
  for _ in range(30):
    users.act(1)
  events = users.events(1)
  assert users.count(1) > 5
  assert {len(x) for x in events.values()} == {users.count(1)}
  assert events['time'] == sorted(events['time'])
  assert max(events['time']) < min(records[0].candidates['time'])
  assert set(events['stars']) <= {3, 4, 5}
  assert set(events['click']) == {0, 1}
  assert users.context(1) == users.context(1)
  assert users.context(1)['segment'] in (2, 3)
  assert users.events(1, 2, 4)['item'] == events['item'][2:4]


@pytest.mark.parametrize(
  ('capacity', 'expected'), [(40, 40.0), (3, 2.5), (2, 0.0)]
)
def test_highest_rate(capacity, expected):
  asked = []

  def try_rate(rate):
    asked.append(rate)
    good = rate <= capacity
    return {
      'requests': 10,
      'answered': 10,
      'rate': rate,
      'p99': 10.0 if good else 99.0,
    }

  best, tried = load.highest_rate(
    try_rate, first=10, limit_ms=50, step=2.0, tries=3
  )
  assert best == expected
  assert [x['offered'] for x in tried] == asked
  assert len(asked) <= 3


def test_an_unanswered_request_is_no_success():
  best, _ = load.highest_rate(
    lambda rate: {'requests': 10, 'answered': 9, 'rate': rate, 'p99': 1.0},
    first=1,
    limit_ms=50,
    tries=2,
  )
  assert best == 0


def test_ideal_hit_rate():
  records = [load.Record(user, 0.0, {}) for user in (1, 2, 1, 3, 2, 1)]
  # Of two users: 1 hits, 3 puts 2 out, 2 puts 1 out.
  assert load.ideal_hit_rate(records, 2) == 1 / 6
  assert load.ideal_hit_rate(records, 3) == 3 / 6


@pytest.mark.parametrize('kind', ['store', 'encode', 'plain'])
def test_scores_are_checked(kind, workdir, scored):
  if kind == 'store':
    scoring = engine.Engine(workdir)
  else:
    scoring = load_engines.Stateless(scored.scorer, kind)
  with running(service_of(scoring)) as found:
    users = load.Users(
      SETTINGS, load.schema(found.url), 'time', whole=kind != 'store'
    )
    records = users.schedule(rate=20, seconds=1)
    seconds = load.run(found.url, users, records, timeout=600)
    metrics = load.metrics(found.url)
  summary = load.summary(records, seconds)
  assert summary['answered'] == len(records) > 5
  assert summary['statuses'] == {'200': len(records)}
  assert summary['p50'] <= summary['p99']
  sources = summary['sources']
  assert sum(sources.values()) == len(records)
  if kind == 'store':
    assert sources['encoded'] <= 4  # Users.
    assert metrics['histjax_store_misses'] == sources['encoded']
  else:
    assert sources == {'encoded': len(records)}
  scorers = {scored.scorer.fingerprint: scored.scorer}
  number, worst, wrong = load.wrong(records, users, scorers, 1e-4)
  assert number == len(records) * 6 * 2  # Candidates and tasks.
  assert worst < 1
  assert not wrong
  # It is no check if it finds nothing.
  reply = records[3].reply
  logits = {k: [x + 1e-3 for x in v] for k, v in reply.logits.items()}
  for name, value in (('logits', logits), ('model', 'another')):
    kept = getattr(reply, name)
    setattr(reply, name, value)
    assert load.wrong(records, users, scorers, 1e-4)[2]
    setattr(reply, name, kept)


def test_stateless_engines_refuse_what_they_cannot_know(scored):
  scoring = load_engines.Stateless(scored.scorer, 'encode')
  request = engine.Request(
    user=1,
    candidates=[{'item': 1, 'category': 1}],
    context={'segment': 1},
  )
  later = dataclasses.replace(request, first=1)
  bad = dataclasses.replace(request, candidates=[{'item': 1}])
  good, unknown, refused = scoring.score([request, later, bad])
  assert good.source == 'encoded'
  assert isinstance(unknown, engine.UnknownHistory)
  assert isinstance(refused, ValueError)
