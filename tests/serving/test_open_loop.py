"""The load test: who comes when, what is counted, and that faults are found."""

import contextlib
import dataclasses
import os
import socket

import numpy as np
import pytest

from benchmarking import (
  load,
  load_check,
  load_client,
  load_engines,
  load_plot,
  load_suite,
)
from histjax.serving import cache_store, engine, messages, server
from tests.serving.conftest import running, service_of
from tests.training import runs

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


def stateless(scorer, kind):
  return load_engines.Stateless(scorer, kind, engine.EngineConfig())


def test_users():
  settings = dataclasses.replace(SETTINGS, longest=20)
  users = load.Users(settings, SCHEMA, 'time')
  records = users.schedule(rate=50, seconds=8)
  assert 300 < len(records) < 500
  at = [x.at for x in records]
  assert at == sorted(at)
  assert 0 <= at[0] <= at[-1] <= 8
  counts = np.bincount([x.user for x in records], minlength=4)
  assert counts[0] > counts[3]
  assert {len(x.candidates['item']) for x in records} == {6}
  events = users.events(0)
  assert users.count(0) == 20
  assert {len(x) for x in events.values()} == {20}
  assert events['time'] == sorted(events['time'])
  assert max(events['time']) < min(records[0].candidates['time'])
  assert set(events['stars']) <= {3, 4, 5}
  assert set(events['click']) == {0, 1}
  assert users.context(1) == users.context(1)
  assert users.context(1)['segment'] in (2, 3)
  assert users.events(1, 2, 4)['item'] == users.events(1)['item'][2:4]


@pytest.mark.parametrize('whole', [False, True])
def test_bodies(whole):
  """What they say of a user is, in their order, what the user did."""
  users = load.Users(SETTINGS, SCHEMA, 'time', whole=whole)
  records = [*users.all(), *users.schedule(rate=20, seconds=2)]
  assert sorted(x.user for x in records[:4]) == [0, 1, 2, 3]
  known = dict.fromkeys(range(4), 0)
  for record in records:
    body = messages.decode(messages.MSGPACK, record.body)
    user = record.user
    assert body.user == user
    assert body.first == (0 if whole else known[user])
    assert body.events == users.events(user, body.first, record.stop)
    assert body.candidates['item'] == record.candidates['item'].tolist()
    known[user] = record.stop
    assert messages.decode(
      messages.MSGPACK, users.body(record, 0)
    ).events == users.events(user, 0, record.stop)
  assert max(known.values()) > 5


@pytest.mark.parametrize(
  ('capacity', 'expected'), [(40, 40.0), (3, 2.5), (1, 0.0), (30, 28.28)]
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
    try_rate, first=10, limit_ms=50, step=2.0, tries=4
  )
  assert best == pytest.approx(expected, rel=0.01)
  assert [x['offered'] for x in tried] == asked
  assert len(asked) <= 4


def test_an_unanswered_request_is_no_success():
  best, _ = load.highest_rate(
    lambda rate: {'requests': 10, 'answered': 9, 'rate': rate, 'p99': 1.0},
    first=1,
    limit_ms=50,
    tries=2,
  )
  assert best == 0


def answered(user, stop, source='hit', model='stub'):
  """A record with a reply."""
  reply = messages.ScoreReply(
    {'click': [0.0]},
    {},
    [],
    source,
    stop,
    messages.Timings(1, 1, 1, 1, 1),
    1,
    model,
  )
  content = messages.encode(messages.MSGPACK, reply)
  return load.Record(user, 0.0, {}, stop, b'', 0.01, 200, content, 1)


def test_hit_rates():
  order = [(1, 'encoded'), (2, 'encoded'), (1, 'hit'), (3, 'encoded')]
  order += [(2, 'extended'), (1, 'encoded')]
  records = [answered(user, 20, source) for user, source in order]
  # Two pages each. Of two users: 1 hits, 3 puts 2 out, 2 puts 1 out.
  found = load.hit_rates(records, 6, num_pages=5)
  assert found == {'measured': 2 / 6, 'ideal': 1 / 6}
  assert load.hit_rates(records, 6, num_pages=6)['ideal'] == 3 / 6
  assert load.hit_rates(records, 3, num_pages=6) == {
    'measured': 1 / 3,
    'ideal': 2 / 3,
  }
  # Who has more events takes more pages.
  records[2].stop = 33
  assert load.hit_rates(records, 6, num_pages=6)['ideal'] == 1 / 6


def test_plot():
  tried = [{'offered': 10.0 * i, 'p99': 9.0 * i} for i in (2, 1, 3)]
  found = {'rate': 20.0, 'capacity': 40.0, 'tried': tried, 'alone': {'p99': 5}}
  slow = {'rate': 0.0, 'capacity': 0.5, 'tried': [], 'alone': {'p99': 2000.0}}
  figure = load_plot.plot(
    {
      'results': {'store': found, 'encode': found, 'plain': slow},
      'load': vars(SETTINGS),
      'settings': {'limit_ms': 50.0},
      'environment': {'device': 'cpu', 'cpu_count': 2},
    }
  )
  curve, bars = figure.axes
  assert curve.lines[0].get_xdata().tolist() == [10, 20, 30]
  assert [x.get_height() for x in bars.patches] == [20, 20, 0.5]


@pytest.mark.parametrize('kind', ['store', 'encode', 'plain'])
def test_scores_are_checked(kind, workdir, scored):
  if kind == 'store':
    scoring = engine.Engine(workdir)
  else:
    scoring = stateless(scored.scorer, kind)
  with running(service_of(scoring)) as found:
    users = load.Users(
      SETTINGS, load_client.schema(found.url), 'time', whole=kind != 'store'
    )
    records = users.schedule(rate=20, seconds=1)
    seconds = load_client.run(found.url, users, records, timeout=600)
    metrics = load_client.metrics(found.url)
  summary = load.summary(records, seconds)
  assert summary['answered'] == summary['sent'] == len(records) > 5
  assert summary['statuses'] == {'200': len(records)}
  assert summary['p50'] <= summary['p99']
  assert min(summary['phases'].values()) > 0
  sources = summary['sources']
  assert sum(sources.values()) == len(records)
  if kind == 'store':
    assert sources['encoded'] <= 4  # Users.
    assert metrics['histjax_store_misses'] == sources['encoded']
    pages = metrics['histjax_store_pages']
    rates = load.hit_rates(records, len(records), int(pages))
    assert rates['measured'] == rates['ideal'] > 0
  else:
    assert sources == {'encoded': len(records)}
  scorers = {scored.scorer.fingerprint: scored.scorer}
  checked = load_check.check(records, users, scorers)
  assert checked['scores'] == len(records) * 6 * 2  # Candidates and tasks.
  assert checked['largest'] < 1
  assert not checked['wrong']
  # It is no check if it finds nothing.
  reply = records[3].reply
  logits = {k: [x + 1e-3 for x in v] for k, v in reply.logits.items()}
  fewer = {k: v[1:] for k, v in reply.logits.items()}
  for name, value in (
    ('logits', logits),
    ('logits', fewer),
    ('model', 'another'),
    ('num_events', 1),
  ):
    kept = getattr(reply, name)
    setattr(reply, name, value)
    assert load_check.check(records, users, scorers)['wrong']
    setattr(reply, name, kept)


def test_whoever_was_forgotten_sends_all_again(workdir):
  store = cache_store.StoreConfig(host_bytes=5000)  # Of about two users.
  scoring = engine.Engine(workdir, engine.EngineConfig(store))
  with running(service_of(scoring)) as found:
    users = load.Users(SETTINGS, load_client.schema(found.url), 'time')
    records = users.schedule(rate=30, seconds=1)
    load_client.run(
      found.url, users, records, timeout=600, open_loop=False, connections=1
    )
  assert {x.status for x in records} == {200}
  assert sum(x.sent for x in records) > len(records)
  scorers = {scoring.fingerprint: scoring.scorer}
  assert not load_check.check(records, users, scorers)['wrong']


@pytest.mark.slow
def test_every_score_through_two_roll_overs(workdir, tmp_path):
  """While states are evicted and extended."""
  paths = [workdir]
  for seed in (1, 2):
    paths.append(tmp_path / str(seed))
    runs.run(paths[-1], num_steps=5, seed=seed)
  store = cache_store.StoreConfig(24 << 10)  # Of 11 users.

  @contextlib.contextmanager
  def start(link, kind, suite):
    assert kind == 'store'
    assert '--watch_s=0.2' in suite.more
    scoring, warm_up = server.make_engine(str(link), 1, [32], 8, store=store)
    service = service_of(scoring, warm_up=warm_up)

    def watch():
      return server.watch(service, str(link), scoring, 0.05)

    with running(service, background=[watch]) as found:
      yield load_client.Served(found.url, os.getpid())

  settings = load.Load(users=30, history=5, longest=30, candidates=6)
  suite = load_suite.Suite(settings, seconds=3)
  link, said = tmp_path / 'served', []
  found = load_suite.check(paths, link, 40, suite, said.append, start)
  checked = found['check']
  assert not checked['wrong']
  assert checked['scores'] > 40 * 3 * 6
  assert len(checked['models']) == 3
  assert found['server']['histjax_roll_overs_total{outcome="done"}'] == 2
  assert 0 < found['budget']['used'] <= found['budget']['limit'] == 24 << 10
  assert 'scores of 3 models' in said[-1]


def test_a_server_that_is_not_there():
  users = load.Users(SETTINGS, SCHEMA, 'time')
  records = users.schedule(rate=20, seconds=0.5)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  load_client.run(f'http://127.0.0.1:{port}', users, records)
  assert {x.status for x in records} == {0}
  assert {x.latency for x in records} == {None}


def test_stateless_engines_refuse_what_they_cannot_know(scored):
  scoring = stateless(scored.scorer, 'encode')
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
