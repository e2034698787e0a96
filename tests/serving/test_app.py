"""The application, over HTTP on the loopback interface."""

import asyncio
import concurrent.futures
import dataclasses
import gzip
import json
import threading
import types

import httpx
import msgspec
import numpy as np
import pytest

import histjax
from histjax.serving import app as app_lib
from histjax.serving import batcher, columns, messages
from histjax.serving.engine import Result, UnknownHistory
from histjax.training import evaluation
from tests.serving import bodies
from tests.serving.conftest import connect, running, service_of
from tests.training import runs


def problem_of(response):
  assert response.headers['content-type'] == messages.PROBLEM
  found = msgspec.json.decode(response.content, type=messages.Problem)
  assert found.status == response.status_code
  return found


def post(found, body, **headers):
  if not isinstance(body, bytes):
    body = json.dumps(body).encode()
  headers = {'content-type': messages.JSON, **headers}
  return found.http.post('/v1/score', content=body, headers=headers)


class Stub:
  """Stands for an engine whose scores are the candidates' items."""

  def __init__(self, scorer):
    self.scorer, self.fingerprint = scorer, 'stub'
    self.go, self.begun = threading.Event(), threading.Event()
    self.go.set()

  def metrics(self):
    return {'hits': 3, 'transfers': {'bytes': 5}}

  def score(self, requests):
    self.begun.set()
    assert self.go.wait(60)
    return [self._one(x) for x in requests]

  def _one(self, request):
    if request.user == 'unknown':
      return UnknownHistory('no state of it')
    if request.user == 'broken':
      return RuntimeError('a secret')
    items = np.asarray(request.candidates['item'], np.float32)
    return Result({'click': items}, 'hit', 5)


class TestScores:
  @pytest.mark.parametrize('media', [messages.JSON, messages.MSGPACK])
  def test_are_those_of_the_scorer(self, served, workdir, media):
    body = bodies.body(9, 4)
    response = served.http.post(
      '/v1/score',
      content=messages.encode(media, body),
      headers={'content-type': media},
    )
    assert response.headers['content-type'] == media
    decode = msgspec.json if media == messages.JSON else msgspec.msgpack
    reply = decode.decode(response.content, type=messages.ScoreReply)
    scorer = histjax.Scorer.from_workdir(workdir)
    row = scorer.make_row(
      context=body['context'],
      history=body['events'],
      candidates=body['candidates'],
    )
    batch = histjax.collate([row])
    wanted = scorer.score_joint(batch)
    assert set(reply.logits) == set(wanted) == {'click', 'like'}
    for task, logits in reply.logits.items():
      # Float32, of order 1; the joint pass sums in another order.
      np.testing.assert_allclose(logits, wanted[task][0, :9], atol=1e-5)
      np.testing.assert_allclose(
        reply.probabilities[task], 1 / (1 + np.exp(-np.array(logits)))
      )
    best = np.argsort(-np.array(reply.logits['click']), kind='stable')
    assert reply.order == best.tolist()
    assert reply.num_events == 4
    assert reply.batch_size == 1
    assert min(dataclasses.astuple(_plain(reply.timings_ms))) >= 0

  def test_rows_are_records_or_columns(self, served):
    body = bodies.body(3, 2)
    records = {
      name: [
        dict(zip(body[name], row, strict=True))
        for row in zip(*body[name].values(), strict=True)
      ]
      for name in ('candidates', 'events')
    }
    found = [post(served, x).json() for x in (body, {**body, **records})]
    assert found[0]['logits'] == found[1]['logits']

  def test_of_a_new_user(self, served):
    body = bodies.body(user='nobody', events=[])
    assert post(served, body).json()['num_events'] == 0

  def test_accepts_what_is_asked_for(self, served):
    for accept, wanted in (
      (messages.MSGPACK, messages.MSGPACK),
      ('application/msgpack', messages.MSGPACK),
      ('Application/X-MsgPack; q=0.9, */*', messages.MSGPACK),
      (f'{messages.JSON}, {messages.MSGPACK}', messages.MSGPACK),
      (f'{messages.JSON}, {messages.MSGPACK};q=0.5', messages.JSON),
      (f'{messages.MSGPACK}; q=0., {messages.JSON};q=0.1', messages.JSON),
      ('application/jsonl, text/html', messages.JSON),
    ):
      response = post(served, bodies.body(), accept=accept)
      assert response.headers['content-type'] == wanted
    body = messages.encode(messages.MSGPACK, bodies.body())
    response = post(
      served,
      body,
      accept='application/json-seq',
      **{'content-type': messages.MSGPACK},
    )
    assert response.headers['content-type'] == messages.MSGPACK

  def test_are_those_of_evaluation(self, served):
    """Logged impressions, request by request, as the server is sent them."""
    dataset = runs.dataset()
    rows, log = dataset.splits['test'], dataset.log
    run = served.service.engine.scorer.run
    predicted = evaluation.predict(
      histjax.Ranker(run.config.model),
      run.variables,
      rows,
      run.config.pipeline,
      runs.mesh(),
    ).predictions()
    events = np.concatenate(
      [rows.candidate_events(r) for r in range(len(rows))]
    )
    visible = log.visible()
    wanted = dict(zip(events.tolist(), predicted.logits['click'], strict=True))
    offsets = log.offsets
    checked = 0
    for event in events[::7]:
      user = int(log.user[event])
      past = slice(int(offsets[user]), int(visible[event]))
      names = ('item', 'category', 'click', 'like')
      body = {
        'user': log.key(event),
        'context': {'segment': int(log.features['segment'][event])},
        'candidates': {
          n: [int(log.features[n][event])] for n in ('item', 'category')
        },
        'events': {n: log.features[n][past].tolist() for n in names},
      }
      (logit,) = post(served, body).json()['logits']['click']
      # Float32, of order 1; evaluation sums in another order.
      np.testing.assert_allclose(logit, wanted[event], atol=1e-5)
      checked += 1
    assert checked > 10


def _plain(struct):
  fields = {f: getattr(struct, f) for f in struct.__struct_fields__}
  return dataclasses.make_dataclass('Plain', fields)(**fields)


BAD = {
  'no json': (b'{"user": ', 400, None),
  'no utf-8': (b'\xff\xfe', 400, None),
  'empty': (b'', 400, None),
  'deep': (b'[' * 100_000, 422, None),
  'nan': (b'{"user": 1, "candidates": {"item": [NaN]}}', 400, None),
  'null': (b'null', 422, None),
  'unknown field': (bodies.body(path='/etc/passwd'), 422, 'path'),
  'no user': ({'candidates': {'item': [1]}}, 422, 'user'),
  'user is a list': (bodies.body(user=[1]), 422, 'user'),
  'negative first': (bodies.body(first=-1), 422, 'first'),
  'first is text': (bodies.body(first='0'), 422, 'first'),
  'timeout 0': (bodies.body(timeout_ms=0), 422, 'timeout_ms'),
  'no candidates': (bodies.body(candidates={}), 422, 'candidates'),
  'empty candidates': (
    bodies.body(candidates={'item': [], 'category': []}), 422, 'candidates',
  ),
  'unknown column': (
    bodies.body(candidates={'item': [1], 'category': [1], 'itme': [1]}),
    422, 'candidates',
  ),
  'outcome of a candidate': (
    bodies.body(candidates={'item': [1], 'category': [1], 'click': [1]}),
    422, 'candidates',
  ),
  'unknown context': (bodies.body(context={'segmnet': 1}), 422, 'context'),
  'missing column': (bodies.body(candidates={'item': [1]}), 422, 'category'),
  'unequal columns': (
    bodies.body(candidates={'item': [1, 2], 'category': [1]}), 422, None,
  ),
  'wrong type': (
    bodies.body(candidates={'item': ['x'], 'category': [1]}), 422, 'item',
  ),
  'fraction': (
    bodies.body(candidates={'item': [1.5], 'category': [1]}), 422, 'item',
  ),
  'negative': (
    bodies.body(candidates={'item': [-1], 'category': [1]}), 422, 'item',
  ),
  'outside the table': (
    bodies.body(candidates={'item': [20], 'category': [1]}), 422, 'item',
  ),
  'null value': (
    bodies.body(candidates={'category': [1], 'item': [None]}), 422,
    "candidates['item'][0]",
  ),
  'null value of a row': (
    bodies.body(
      candidates=[{'category': 1, 'item': 1}, {'category': 1, 'item': None}]
    ), 422, "candidates[1]['item']",
  ),
  'null value of the context': (
    bodies.body(context={'segment': None}), 422, "context['segment']",
  ),
  'null value of a table that is there twice': (
    b'{"user": 1, "candidates": {"item": [null]}, "candidates": 5}', 422,
    'candidates[...][0]',
  ),
  'number for a column': (
    bodies.body(candidates={'category': [1], 'item': 1}), 422,
    "candidates['item']",
  ),
  'nested': (
    bodies.body(candidates={'item': [[1]], 'category': [1]}), 422,
    "candidates['item'][0]",
  ),
  'huge integer': (
    bodies.body(candidates={'item': [10**30], 'category': [1]}), 422, 'item',
  ),
  'huge float': (
    b'{"user": 1, "candidates": {"item": [1e999]}}', 422,
    'candidates[...][0]',
  ),
  'long text': (bodies.body(user='x' * 2000), 413, 'user'),
  'many candidates': (bodies.body(5000), 413, 'candidates'),
  'many events': (bodies.body(3, 20_000), 413, 'events'),
  'many columns': (
    bodies.body(context={f'c{i}': 1 for i in range(300)}), 413, 'context',
  ),
}  # fmt: skip


class TestRefusals:
  @pytest.mark.parametrize('name', BAD)
  def test_bad_bodies(self, served, name):
    body, status, field = BAD[name]
    response = post(served, body)
    assert response.status_code == status, response.text
    problem = problem_of(response)
    assert problem.field == field
    assert problem.detail
    assert len(response.content) < 5000
    assert problem.fix
    assert problem.fix != problem.detail

  @pytest.mark.parametrize(
    ('name', 'fix'),
    [
      ('no user', 'send the field `user`'),
      ('huge float', 'send a number that a float64 holds'),
      ('negative first', 'send `int` >= 0'),
      ('null value', 'send `bool | int | float | str`'),
      ('outside the table', 'send an id in [0, 20)'),
      ('negative', 'send an id in [0, 20)'),
    ],
  )
  def test_says_what_the_client_can_do(self, served, name, fix):
    assert problem_of(post(served, BAD[name][0])).fix == fix

  @pytest.mark.parametrize(
    ('changes', 'said'),
    [
      ({'evnts': []}, "rename it to 'events'; known are ['candidates', "),
      ({'zzz': []}, "leave it out; known are ['candidates', "),
    ],
  )
  def test_names_the_known_fields(self, served, changes, said):
    problem = problem_of(post(served, bodies.body(**changes)))
    assert problem.field in changes
    assert problem.fix.startswith(said)

  @pytest.mark.parametrize(
    ('feature', 'value', 'fix'),
    [
      (histjax.Dense('x', log=True), -1.0, 'send a value >= 0'),
      (histjax.Dense('x'), 1e300, 'send a smaller value'),
      (histjax.Dense('x'), '', 'send a value'),
      (histjax.Dense('x'), '3,0', 'send a number'),
      (histjax.Categorical('x', 9), 9, 'send an id in [0, 9)'),
      (histjax.Categorical('x', 9), 'x', 'send an integer'),
      (histjax.Categorical('x', 9), 1.5, 'send an integer'),
      (histjax.Categorical('x', 9, ids='hash'), '', 'send a value'),
    ],
  )
  def test_fixes_of_values(self, feature, value, fix):
    """Not those of training, as to set log=False."""
    schema = histjax.Schema(
      item=(feature,), tasks=(histjax.Task('click'),), user='u', time='t'
    )
    with pytest.raises(ValueError, match="column 'x'") as found:
      histjax.make_row(
        schema, context={'u': 1}, history=[], candidates=[{'x': value}]
      )
    problem = app_lib.of_value_error(found.value).problem
    assert problem.field == 'x'
    assert problem.fix == fix

  @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
  def test_what_is_not_finite(self, served, value):
    for changes, field in (
      ({'context': {'segment': value}}, 'context.segment'),
      (
        {'candidates': {'item': [1.0, value], 'category': [1, 1]}},
        'candidates.item',
      ),
      ({'events': [{**bodies.EVENT, 'item': value}]}, 'events.item'),
      ({'timeout_ms': value}, 'timeout_ms'),
    ):
      response = served.http.post(
        '/v1/score',
        content=messages.encode(messages.MSGPACK, bodies.body(**changes)),
        headers={'content-type': messages.MSGPACK},
      )
      assert response.status_code == 422
      assert problem_of(response).field == field

  def test_names_the_row_that_is_not_finite(self, served):
    rows = [{**bodies.EVENT, 'item': x} for x in (1.0, 2.0, np.nan)]
    columns = {name: [row[name] for row in rows] for name in bodies.EVENT}
    for events in (rows, columns):
      response = served.http.post(
        '/v1/score',
        content=messages.encode(messages.MSGPACK, bodies.body(events=events)),
        headers={'content-type': messages.MSGPACK},
      )
      assert 'events.item row 2 is nan' in problem_of(response).detail

  @pytest.mark.parametrize(
    ('values', 'said'),
    [
      ([1e308, 1e308], None),  # The sum is not finite.
      ([2**1100, 1.0], None),  # It is of no float.
      ([1, 'text', True], None),
      ([1e308, 1e308, np.inf], 'row 2 is inf'),
      ([2**1100, 1.0, np.nan], 'row 2 is nan'),
      (['a', -np.inf], 'row 1 is -inf'),
      ([1, 'x' * 2000], 'a text of 2000'),
      (['x', 'y' * 2000], 'a text of 2000'),
    ],
  )
  def test_values_of_a_column(self, values, said):
    request = messages.ScoreRequest(7, {'item': values})
    parts = ('candidates', 'events', 'context')
    known = dict.fromkeys(parts, frozenset({'item'}))
    if said is None:
      messages.check(request, known, messages.Limits())
      return
    with pytest.raises(messages.BadRequestError, match=said):
      messages.check(request, known, messages.Limits())

  def test_names_unknown_columns_and_the_known(self, served):
    body = bodies.body(candidates={'item': [1], 'category': [1], 'itme': [1]})
    problem = problem_of(post(served, body))
    assert "'itme'" in problem.detail
    assert "'item'" in problem.fix

  def test_bad_messagepack(self, served):
    for content, status in ((b'\xc1', 400), (b'\x81', 400), (b'\x01', 422)):
      response = served.http.post(
        '/v1/score',
        content=content,
        headers={'content-type': messages.MSGPACK},
      )
      assert response.status_code == status
      problem_of(response)

  def test_other_media(self, served):
    for media in ('text/plain', '', 'application/x-pickle', 'a' * 1000):
      response = post(served, bodies.body(), **{'content-type': media})
      assert response.status_code == 415
      assert messages.JSON in problem_of(response).fix

  def test_compressed_bodies_are_not_opened(self, served):
    bomb = gzip.compress(bytes(50 << 20))
    for encoding in ('gzip', 'deflate', 'br', 'gzip, gzip'):
      response = post(served, bomb, **{'content-encoding': encoding})
      assert response.status_code == 415
      assert problem_of(response).field == 'Content-Encoding'

  def test_a_million_candidates(self, served):
    body = bodies.body(1_000_000)
    response = post(served, body)
    assert response.status_code == 413
    assert problem_of(response).field == 'candidates'

  def test_a_long_body_is_not_read(self, served):
    with connect(served) as connection:
      connection.sendall(
        b'POST /v1/score HTTP/1.1\r\nHost: x\r\n'
        b'Content-Type: application/json\r\n'
        b'Content-Length: 99999999999\r\n\r\n{'
      )
      assert connection.recv(1 << 16).startswith(b'HTTP/1.1 413')

  def test_a_long_body_in_chunks_is_not_read_to_its_end(self, served):
    sent = 0

    def chunks():
      nonlocal sent
      for _ in range(1000):
        sent += 1 << 20
        yield bytes(1 << 20)

    try:
      response = served.http.post(
        '/v1/score',
        content=chunks(),
        headers={'content-type': messages.JSON},
      )
      assert response.status_code == 413
    except OSError:
      raise
    except Exception as error:  # Closed while it was still sending.
      assert 'rror' in type(error).__name__
    assert sent < 100 << 20

  def test_paths_and_methods(self, served):
    for path in ('/nothing', '/page/../engine.py', '/page/%2e%2e/engine.py'):
      response = served.http.get(path)
      assert response.status_code == 404
      assert '/openapi.json' in problem_of(response).fix
    response = served.http.get('/v1/score')
    assert response.status_code == 405
    assert response.headers['allow'] == 'POST'


class TestService:
  def test_is_ready_after_warm_up(self, scored):
    go = threading.Event()
    service = service_of(Stub(scored.scorer), warm_up=lambda: go.wait(60))
    with running(service, ready=False) as found:
      assert found.http.get('/health/live').status_code == 200
      for response in (
        found.http.get('/health/ready'), post(found, bodies.body())
      ):  # fmt: skip
        assert response.status_code == 503
        assert response.headers['retry-after'] == '1'
        assert problem_of(response).detail == 'warming up'
      go.set()
      while found.http.get('/health/ready').status_code != 200:
        threading.Event().wait(0.01)
      assert post(found, bodies.body()).status_code == 200

  def test_tells_that_it_is_ready_when_it_is(self, scored):
    told = []
    service = service_of(
      Stub(scored.scorer), on_ready=lambda: told.append(service.ready)
    )
    with running(service):
      assert told == [True]

  def test_a_drain_that_begins_in_the_warm_up(self, scored):
    """Nothing is scored by an engine that still compiles."""
    go, stub, told = threading.Event(), Stub(scored.scorer), []
    service = service_of(
      stub,
      warm_up=lambda: go.wait(60),
      on_ready=lambda: told.append('ready'),
    )
    with running(service, ready=False) as found:
      service.drain()
      response = post(found, bodies.body())
      assert response.status_code == 503
      assert problem_of(response).detail == 'draining'
      assert not stub.begun.is_set()
      go.set()
      while post(found, bodies.body()).status_code != 200:
        threading.Event().wait(0.01)
      assert found.http.get('/health/ready').status_code == 503
    assert not told

  def test_a_background_task_that_fails_is_told(self, scored, monkeypatch):
    said = []
    monkeypatch.setattr(app_lib.logging, 'exception', said.append)

    async def fail():
      raise BrokenPipeError('nobody reads what it prints')

    service = service_of(Stub(scored.scorer))
    with running(service, background=[fail]) as found:
      assert post(found, bodies.body()).status_code == 200
    assert said == ['a background task failed']

  def test_a_failed_warm_up(self, scored):
    def fail():
      raise RuntimeError('no memory')

    service = service_of(Stub(scored.scorer), warm_up=fail)
    app = app_lib.make_app(service)

    async def asked():
      transport = httpx.ASGITransport(app)
      async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url='http://x') as http,
      ):
        while service.state == 'warming up':
          await asyncio.sleep(0.01)
        return [await http.get(f'/health/{x}') for x in ('live', 'ready')]

    for response in asyncio.run(asked()):
      assert response.status_code == 503
      assert problem_of(response).detail == 'warm-up failed'
    assert str(service.failure) == 'no memory'

  def test_a_server_ends_after_a_failed_warm_up(self, scored):
    """It would answer 503 for ever."""
    go = threading.Event()

    def fail():
      go.wait(60)
      raise RuntimeError('no memory')

    service = service_of(Stub(scored.scorer), warm_up=fail)
    with running(service, ready=False) as found:
      assert found.http.get('/health/live').status_code == 200
      go.set()
      with pytest.raises(httpx.ConnectError):
        while True:
          try:
            found.http.get('/health/live')
          except (httpx.ReadError, httpx.RemoteProtocolError):  # It closed.
            pass

  def test_engine_errors(self, scored):
    with running(service_of(Stub(scored.scorer))) as found:
      response = post(found, bodies.body(user='unknown', first=4))
      assert response.status_code == 409
      problem = problem_of(response)
      assert (problem.field, problem.value) == ('first', '4')
      assert 'first=0' in problem.fix
      response = post(found, bodies.body(user='broken'))
      assert response.status_code == 500
      assert 'secret' not in response.text
      assert post(found, bodies.body()).json()['source'] == 'hit'

  def test_a_full_queue_and_deadlines(self, scored):
    stub = Stub(scored.scorer)
    stub.go.clear()
    config = app_lib.AppConfig(batcher.BatcherConfig(max_queue=2))
    with (
      running(service_of(stub, config)) as found,
      concurrent.futures.ThreadPoolExecutor() as pool,
    ):
      first = pool.submit(post, found, bodies.body())
      assert stub.begun.wait(60)
      waiting = [
        pool.submit(post, found, bodies.body(timeout_ms=60_000))
        for _ in range(2)
      ]
      while found.service.batcher.waiting < 2:
        threading.Event().wait(0.01)
      refused = post(found, bodies.body())
      assert refused.status_code == 429
      assert int(refused.headers['retry-after']) >= 1
      stub.go.set()
      for future in (first, *waiting):
        assert future.result().status_code == 200
      stub.go.clear()
      stub.begun.clear()
      first = pool.submit(post, found, bodies.body())
      assert stub.begun.wait(60)
      late = post(found, bodies.body(timeout_ms=20))
      assert late.status_code == 504
      assert problem_of(late).field == 'timeout_ms'
      assert problem_of(late).detail == 'not begun within 20 ms'
      late = post(found, bodies.body(timeout_ms=0.001))
      assert late.status_code == 504
      said = '0.001 ms were over before it was queued'
      assert problem_of(late).detail.startswith(said)
      stub.go.set()
      assert first.result().status_code == 200

  def test_tokens(self, scored):
    config = app_lib.AppConfig(token='correct horse')
    with running(
      service_of(scored, config), with_page=True, ready=False
    ) as found:
      for path in ('/', '/page/page.js', '/health/live', '/openapi.json'):
        assert found.http.get(path).status_code == 200
      for given in ('', 'Bearer', 'Bearer correct', 'Basic correct horse'):
        headers = {'authorization': given}
        response = found.http.get('/v1/schema', headers=headers)
        assert response.status_code == 401
        assert response.headers['www-authenticate'] == 'Bearer'
        assert post(found, b'', **headers).status_code == 401
        response = found.http.get('/metrics', headers=headers)
        assert response.status_code == 401
      for scheme in ('Bearer', 'bearer'):  # Of RFC 9110: in any case.
        headers = {'authorization': f'{scheme} correct horse'}
        assert found.http.get('/v1/schema', headers=headers).status_code == 200
    assert 'horse' not in repr(config)

  def test_metrics(self, scored):
    with running(service_of(Stub(scored.scorer))) as found:
      post(found, bodies.body())
      post(found, b'')
      found.http.get('/nothing')
      text = found.http.get('/metrics').text
    for line in (
      'histjax_requests_total{path="/v1/score",status="200"} 1.0',
      'histjax_requests_total{path="/v1/score",status="400"} 1.0',
      'histjax_requests_total{path="other",status="404"} 1.0',
      'histjax_phase_seconds_count{phase="queue"} 1.0',
      'histjax_phase_seconds_count{phase="rows"} 1.0',
      'histjax_phase_seconds_count{phase="score"} 1.0',
      'histjax_phase_seconds_count{phase="reply"} 1.0',
      'histjax_batch_size_sum 1.0',
      'histjax_states_total{source="hit"} 1.0',
      'histjax_store_hits 3.0',
      'histjax_store_transfers_bytes 5.0',
      'histjax_ready 1.0',
      'histjax_model_info{fingerprint="stub"} 1.0',
    ):
      assert line in text.splitlines()

  def test_schema(self, served):
    found = served.http.get('/v1/schema').json()
    assert found['model'] == served.service.engine.fingerprint
    assert set(found['columns']['candidates']) == {'item', 'category'}
    assert set(found['columns']['events']) == {
      *('item', 'category', 'click', 'like')
    }
    assert found['columns']['context']['segment']['maximum'] == 3

  def test_needs_derived_columns(self, scored):
    run = scored.scorer.run
    rows = dataclasses.replace(run.config.data.rows, ties='strict')
    features = types.SimpleNamespace(
      needs=lambda what: what == 'labels', configs=(1,), is_timestamp=None
    )
    found = columns.Columns.of_run(scored.scorer.config.schema, rows, features)
    assert set(found.needed['candidates']) == {'item', 'category', 'time'}
    assert set(found.needed['events']) == {
      *('item', 'category', 'click', 'like', 'time', 'request')
    }

  def test_token_files(self, tmp_path, monkeypatch):
    monkeypatch.delenv('HISTJAX_TOKEN', raising=False)
    assert app_lib.read_token() == ''
    monkeypatch.setenv('HISTJAX_TOKEN', 'of the environment')
    assert app_lib.read_token() == 'of the environment'
    monkeypatch.setenv('HISTJAX_TOKEN', 'of a file \r\n')
    assert app_lib.read_token() == 'of a file'
    monkeypatch.setenv('HISTJAX_TOKEN', ' ')  # Not: without a token.
    with pytest.raises(ValueError, match='HISTJAX_TOKEN is white space'):
      app_lib.read_token()
    path = tmp_path / 'token'
    path.write_text('of a file\n')
    assert app_lib.read_token(str(path)) == 'of a file'
    path.write_text('\n')
    with pytest.raises(ValueError, match='is empty'):
      app_lib.read_token(str(path))

  def test_limits_of_a_text(self):
    found = messages.Limits.parse('candidates=20,body_seconds=0.5')
    assert found == messages.Limits(candidates=20, body_seconds=0.5)
    assert messages.Limits.parse('', 20).candidates == 20
    assert messages.Limits.parse('candidates=9', 20).candidates == 9

  @pytest.mark.parametrize(
    ('make', 'said'),
    [
      (lambda: app_lib.AppConfig(timeout_s=0), 'timeout_s=0'),
      (lambda: app_lib.AppConfig(token='short'), 'fewer than 8'),
      (lambda: app_lib.AppConfig(token='long enough\n'), 'no header brings'),
      (lambda: messages.Limits(candidates=0), 'candidates=0'),
      (lambda: messages.Limits.parse('events=x'), "'events=x' has no number"),
      (lambda: messages.Limits.parse('items=3'), "'items' is none of"),
      (
        lambda: messages.Limits.parse('candidates=21', 20),
        'candidates=21 is beyond the 20',
      ),
    ],
  )
  def test_bad_configs(self, make, said):
    with pytest.raises(ValueError, match=said):
      make()
