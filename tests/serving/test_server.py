"""Faults: slow clients, signals, other parameters, several servers."""

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import httpx
import numpy as np
import pytest

import histjax
from histjax.data import rows as rows_lib
from histjax.serving import app as app_lib
from histjax.serving import (
  cache_store,
  client,
  columns,
  engine,
  messages,
  server,
)
from histjax.training import run as run_lib
from histjax.training import step_folders
from tests.serving import bodies
from tests.serving.conftest import connect, running, service_of
from tests.serving.test_app import Stub, post, problem_of
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[2]
HEAD = b'POST /v1/score HTTP/1.1\r\nHost: x\r\n'


class TestSlowClients:
  def test_a_body_that_does_not_come(self, scored):
    limits = messages.Limits(body_seconds=0.2)
    config = app_lib.AppConfig(limits=limits)
    with running(service_of(Stub(scored.scorer), config)) as found:
      for start in (b'', b'{"us'):
        with connect(found) as connection:
          connection.sendall(
            HEAD + b'Content-Type: application/json\r\n'
            b'Content-Length: 100\r\n\r\n' + start
          )
          answer = connection.recv(1 << 16)
        assert answer.startswith(b'HTTP/1.1 408')
        assert b'connection: close' in answer.lower()
      assert post(found, bodies.body()).status_code == 200

  def test_a_body_that_comes_too_slowly(self, scored):
    """Each byte in time, the whole body not."""
    limits = messages.Limits(body_seconds=0.3)
    config = app_lib.AppConfig(limits=limits)
    with (
      running(service_of(Stub(scored.scorer), config)) as found,
      connect(found) as connection,
    ):
      connection.sendall(
        HEAD + b'Content-Type: application/json\r\n'
        b'Content-Length: 1000000\r\n\r\n'
      )
      connection.settimeout(0.05)
      answer = b''
      while not answer:
        connection.sendall(b' ')
        try:
          answer = connection.recv(1 << 16)
        except TimeoutError:
          pass
      assert answer.startswith(b'HTTP/1.1 408')

  @pytest.mark.parametrize('sent', [b'', b'GET /hea', HEAD])
  def test_headers_that_do_not_come(self, scored, monkeypatch, sent):
    monkeypatch.setattr(server, '_HEAD_S', 0.2)
    with (
      running(service_of(Stub(scored.scorer))) as found,
      connect(found) as connection,
    ):
      connection.sendall(sent)
      with pytest.raises(ConnectionError):
        if not connection.recv(1 << 16):
          raise ConnectionResetError

  def test_headers_of_a_second_request(self, scored, monkeypatch):
    monkeypatch.setattr(server, '_HEAD_S', 0.2)
    with (
      running(service_of(Stub(scored.scorer))) as found,
      connect(found) as connection,
    ):
      connection.sendall(b'GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n')
      assert connection.recv(1 << 16).startswith(b'HTTP/1.1 200')
      connection.sendall(b'GET /hea')
      with pytest.raises(ConnectionError):
        if not connection.recv(1 << 16):
          raise ConnectionResetError

  def test_a_client_that_leaves(self, scored):
    stub = Stub(scored.scorer)
    with running(service_of(stub)) as found:
      with connect(found) as connection:
        connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{')
      with connect(found) as connection:
        connection.sendall(
          HEAD + b'Content-Type: application/json\r\nContent-Length: 2\r\n'
          b'\r\n{}'
        )
      assert post(found, bodies.body()).status_code == 200

  def test_who_leaves_the_queue_is_not_scored(self, scored):
    stub = Stub(scored.scorer)
    stub.go.clear()
    seen = mock.Mock(side_effect=stub.score)
    stub.score = seen
    service = service_of(stub)
    sent = json.dumps(bodies.body(user='gone')).encode()
    with (
      running(service) as found,
      concurrent.futures.ThreadPoolExecutor() as pool,
    ):
      first = pool.submit(post, found, bodies.body(user='first'))
      assert stub.begun.wait(60)
      with connect(found) as connection:
        connection.sendall(
          HEAD + b'Content-Type: application/json\r\n'
          b'Content-Length: %d\r\n\r\n' % len(sent) + sent
        )
        while not service.batcher.waiting:
          time.sleep(0.01)
      while service.batcher.waiting:
        time.sleep(0.01)
      last = pool.submit(post, found, bodies.body(user='last'))
      while not service.batcher.waiting:
        time.sleep(0.01)
      stub.go.set()
      assert first.result().status_code == last.result().status_code == 200
      told = 'histjax_requests_total{path="/v1/score",status="499"} 1.0'
      assert told in found.http.get('/metrics').text
    users = [[x.user for x in call.args[0]] for call in seen.call_args_list]
    assert users == [['first'], ['last']]

  def test_too_many_connections(self, scored):
    stub = Stub(scored.scorer)
    with running(service_of(stub), max_connections=3) as found:
      with connect(found), connect(found):
        with connect(found) as third:
          third.sendall(b'GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n')
          assert third.recv(1 << 16).startswith(b'HTTP/1.1 503')

  def test_head_of_endless_length(self, scored):
    with running(service_of(Stub(scored.scorer))) as found:
      with connect(found) as connection:
        try:
          for _ in range(1000):
            connection.sendall(b'x' * 10_000)
          answer = connection.recv(1 << 16)
          assert answer.startswith(b'HTTP/1.1 4')
        except ConnectionError:  # Closed while it was still sending.
          pass
      assert post(found, bodies.body()).status_code == 200


def scores(found, body):
  response = post(found, body)
  assert response.status_code == 200, response.text
  return response.json()['logits']['click']


class TestRollOver:
  def test_without_a_dropped_request_or_a_mixed_score(self, workdir, tmp_path):
    """Other parameters come while requests are scored."""
    served, other = tmp_path / 'run', tmp_path / 'other'
    shutil.copytree(workdir, served)
    runs.run(other, num_steps=5, seed=1)
    scoring = engine.Engine(served)
    service = service_of(scoring)
    body = bodies.body(12, 3)
    stop = threading.Event()
    seen = []

    def ask(url):
      with client.Client(url, retries=0, timeout_s=600) as one:
        while not stop.is_set():
          body_ = {k: v for k, v in body.items() if k != 'user'}
          seen.append(one.score(7, **body_).logits['click'])

    def watch():
      return server.watch(service, str(served), scoring, 0.05)

    with (
      running(service, background=[watch]) as found,
      concurrent.futures.ThreadPoolExecutor() as pool,
    ):
      old = scores(found, body)
      futures = [pool.submit(ask, found.url) for _ in range(3)]
      try:
        self._until(lambda: seen, futures)
        (served / 'checkpoints').rename(tmp_path / 'old')
        (other / 'checkpoints').rename(served / 'checkpoints')
        wanted = histjax.Scorer.from_workdir(served).fingerprint
        self._until(lambda: scoring.fingerprint == wanted, futures)
        new = scores(found, body)
        after = len(seen) + 10
        self._until(lambda: len(seen) >= after, futures)
      finally:
        stop.set()
      for future in futures:
        future.result()
      text = found.http.get('/metrics').text
    assert 'histjax_roll_overs_total{outcome="done"} 1.0' in text
    assert np.abs(np.subtract(old, new)).max() > 1e-3
    # Each is of the one or the other, to the rounding of float32 in programs
    # of other sizes; logits are of order 1.
    seen = np.array(seen)
    is_old = np.abs(seen - old).max(axis=1) < 1e-5
    is_new = np.abs(seen - new).max(axis=1) < 1e-5
    assert (is_old ^ is_new).all()
    assert is_old[0]
    assert is_new[-1]

  def _until(self, reached, futures):
    while not reached():
      assert not any(f.done() for f in futures)
      time.sleep(0.05)

  def test_what_cannot_be_read_is_not_served(self, workdir, tmp_path):
    served = tmp_path / 'run'
    shutil.copytree(workdir, served)
    scoring = engine.Engine(served)
    service = service_of(scoring)

    def watch():
      return server.watch(service, str(served), scoring, 0.02)

    with running(service, background=[watch]) as found:
      before = scores(found, bodies.body())
      time.sleep(0.1)  # It looked once.
      (served / 'features.npz').write_bytes(b'damaged')
      (served / 'checkpoints' / 'other').mkdir()
      failed = 'histjax_roll_overs_total{outcome="failed"}'
      while failed not in found.http.get('/metrics').text:
        time.sleep(0.05)
      assert scores(found, bodies.body()) == before


@pytest.mark.parametrize('told', [True, False])
def test_a_checkpoint_that_comes_before_the_watch(tmp_path, monkeypatch, told):
  """While the engine is made; no other comes after it."""
  folder = step_folders.of(tmp_path)
  (folder / '5').mkdir(parents=True)
  seen = server.listing(str(tmp_path)) if told else None
  (folder / '10').mkdir()
  assert looks_that_read(tmp_path, monkeypatch, seen) == 1


def test_parameters_that_are_served_are_not_read_again(tmp_path, monkeypatch):
  (step_folders.of(tmp_path) / '5').mkdir(parents=True)
  seen = server.listing(str(tmp_path))
  assert looks_that_read(tmp_path, monkeypatch, seen) == 0


def looks_that_read(workdir, monkeypatch, seen):
  """Of the first looks."""
  read = mock.Mock(return_value=['serves it'])
  monkeypatch.setattr(server, '_roll_over', read)
  looks = iter(range(3))

  def listing(workdir, look=server.listing):
    if next(looks, None) is None:
      raise KeyboardInterrupt
    return look(workdir)

  monkeypatch.setattr(server, 'listing', listing)
  with pytest.raises(KeyboardInterrupt):
    asyncio.run(
      server.watch(mock.MagicMock(), str(workdir), None, 0.001, seen=seen)
    )
  return read.call_count


def test_a_roll_over_tells_of_the_model_and_of_other_columns(
  scored, workdir, tmp_path, monkeypatch
):
  """Whose clients would get 422, and nobody would know why."""
  runs.run(tmp_path, num_steps=5, seed=1)
  stub = mock.Mock(scorer=scored.scorer, fingerprint=scored.fingerprint)
  assert server._roll_over(str(workdir), stub, 'best') == []
  (line,) = server._roll_over(str(tmp_path), stub, 'best')
  (scorer,) = stub.roll_over.call_args.args
  assert line == (
    f'serves the model {scorer.fingerprint[:12]} of step 5, {tmp_path}'
  )
  old = columns.Columns.of_scorer(scored.scorer)
  item = {**old.needed['candidates']['item'], 'maximum': 9}
  needed = {
    'context': {},
    'candidates': {**old.needed['candidates'], 'item': item},
    'events': {**old.needed['events'], 'price': {'type': 'number'}},
  }
  monkeypatch.setattr(
    columns.Columns,
    'of_scorer',
    lambda of: old if of is scored.scorer else columns.Columns({}, needed),
  )
  _, line = server._roll_over(str(tmp_path), stub, 'best')
  assert 'context.segment is gone, candidates.item is type integer' in line
  assert 'maximum 9, was type integer' in line
  assert 'events.price is new; requests' in line
  assert '422' in line


def test_a_roll_over_tells_of_longer_rows(scored, monkeypatch):
  """Who is refused with 413 from now on was served before."""
  run = scored.scorer.run

  def of(length):
    rows = rows_lib.RowConfig('pointwise', length)
    data = dataclasses.replace(run.config.data, rows=rows)
    config = dataclasses.replace(run.config, data=data)
    return histjax.Scorer.of_run(
      dataclasses.replace(run, config=config), server.buckets(1, [16], 4)
    )

  for before, after, warned in (
    (16, 16, False),
    (16, 17, True),
    (8, None, True),
    (17, 18, False),  # As whoever started it wanted it.
    (None, None, False),
  ):
    stub = mock.Mock(scorer=of(before), fingerprint='another')
    load = mock.Mock(return_value=of(after))
    monkeypatch.setattr(server.Scorer, 'from_workdir', load)
    _, *more = server._roll_over('run', stub, 'best')
    assert len(more) == warned
    for line in more:
      assert 'longer than the 16 events' in line
      assert '413' in line


def test_each_new_failure_of_a_watch_is_told_once(tmp_path, monkeypatch):
  """That of a folder without checkpoints, too."""
  failures = iter('aaabbb')

  def read(*unused):
    try:
      raise ValueError(next(failures))
    except StopIteration:
      raise KeyboardInterrupt from None

  monkeypatch.setattr(server, '_roll_over', read)
  logged = []
  monkeypatch.setattr(
    server.logging, 'error', lambda *args: logged.append(args[-1])
  )
  with pytest.raises(KeyboardInterrupt):
    asyncio.run(
      server.watch(mock.MagicMock(), str(tmp_path), None, 0.001, seen=None)
    )
  assert logged == ['ValueError: a', 'ValueError: b']


def test_what_stays_broken_is_read_less_and_less_often(tmp_path, monkeypatch):
  """And at once, when something else is there."""
  looks, reads = 0, []

  def listing(workdir):
    nonlocal looks
    looks += 1
    if looks == 130:
      raise KeyboardInterrupt
    return ('5',) if looks < 100 else ('10',)

  def read(*unused):
    reads.append(looks)
    raise ValueError('broken')

  monkeypatch.setattr(server, 'listing', listing)
  monkeypatch.setattr(server, '_roll_over', read)
  monkeypatch.setattr(server, '_RETRY_S', 0.016)
  clock = mock.Mock(monotonic=lambda: 0.001 * looks + 1e-9 * len(reads))
  monkeypatch.setattr(server, 'time', clock)
  with pytest.raises(KeyboardInterrupt):
    asyncio.run(server.watch(mock.MagicMock(), str(tmp_path), None, 0.001))
  wanted = [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100, 101, 103, 107, 115]
  # To the look: times are sums in floating point.
  np.testing.assert_allclose(reads, wanted, atol=9)
  assert len(reads) == len(wanted)


def test_all_addresses_of_a_host_have_one_port(monkeypatch):
  of = socket.getaddrinfo

  def two(host, port, **options):
    return of('127.0.0.1', port, **options) + of('127.0.0.2', port, **options)

  monkeypatch.setattr(socket, 'getaddrinfo', two)
  sockets = server.listen('localhost', 0)
  assert len({x.getsockname()[1] for x in sockets}) == 1
  assert len(sockets) == 2
  for one in sockets:
    one.close()


def test_buckets():
  found = server.buckets(32, [3000, 750], 100)
  assert found.row_buckets == (1, 8, 32)
  assert found.history_buckets == (750, 3000)
  assert found.candidate_buckets == (100,)
  assert server.buckets(1, [9], 5000).candidate_buckets == (1024,)
  assert server.buckets(1, [9], 9).row_buckets == (1,)
  assert server.buckets(6, [9], 9).row_buckets == (1, 2, 4, 6)
  with pytest.raises(ValueError, match='events=0'):
    server.buckets(1, [0], 1)


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up(workdir):
  """What is no larger than it was warmed up for; the rest is refused."""
  with pytest.raises(ModuleNotFoundError, match='my_own'):  # In a replica, too.
    server.make_engine(str(workdir), 3, [8, 16], 8, modules=['my_own'])
  with pytest.raises(ValueError, match='a state of 100000000000 events'):
    server.make_engine(str(workdir), 3, [8, 10**11], 8)
  scoring, warm_up = server.make_engine(str(workdir), 3, [8, 16], 8)
  warm_up()
  compiled = scoring.metrics()['compilations']
  limits = messages.Limits.parse('', candidates=8)
  config = app_lib.AppConfig(limits=limits, timeout_s=600)
  with running(service_of(scoring, config)) as found:
    seen = [post(found, bodies.body(8, n)).json() for n in (16, 16, 0, 2, 13)]
    assert [x['source'] for x in seen[:2]] == ['encoded', 'hit']
    later = bodies.body(3, 1)['events']
    last = post(found, bodies.body(3, events=later, first=13)).json()
    assert last['source'] == 'extended'
    assert min(x['timings_ms']['rows'] for x in seen) > 0
    for n, source in ((1, 'encoded'), (2, 'hit'), (3, 'hit')):
      requests = [engine.Request(**bodies.body(n, user=i)) for i in range(n)]
      assert scoring.score(requests)[0].source in (source, 'encoded')
    for body, field, said in (
      (bodies.body(9, 2), 'candidates', '9 rows, the server takes 8'),
      (bodies.body(8, 17), 'events', '17 events, more than max_events=16'),
    ):
      response = post(found, body)
      assert response.status_code == 413
      problem = problem_of(response)
      assert problem.field == field
      assert said in problem.detail
      assert '--warm_up' in problem.fix
  assert scoring.metrics()['compilations'] == compiled


def test_sizes_of_a_run(workdir):
  run = run_lib.load(workdir)
  assert server.default_events(run) == [256]

  def with_rows(**changes):
    data = dataclasses.replace(
      run.config.data, eval_rows=rows_lib.RowConfig(**changes)
    )
    return dataclasses.replace(
      run, config=dataclasses.replace(run.config, data=data)
    )

  assert server.default_events(
    with_rows(kind='snapshot', history_length=100)
  ) == [128]
  assert server.default_events(
    with_rows(kind='snapshot', history_length=1000)
  ) == [256, 1024]


def test_an_engine_of_small_states(workdir, scored):
  store = cache_store.StoreConfig(1 << 20, 1 << 18)
  found, _ = server.make_engine(
    workdir, 1, [16], 16, store=store, cache_dtype='int8'
  )
  request = engine.Request(**bodies.body(user='small', num_events=12))
  for scoring in (found, scored):
    scoring.score([request])
  (one,), (other,) = (x.score([request]) for x in (found, scored))
  assert one.source == other.source == 'hit'
  assert one.logits['click'].tolist() != other.logits['click'].tolist()
  # Keys and values of order 1, rounded to 1 / 127 of the largest.
  np.testing.assert_allclose(
    one.logits['click'], other.logits['click'], atol=0.05
  )
  assert found.store.device_bytes <= 1 << 20


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def test_a_port_is_held_before_the_server_runs(scored):
  sockets = server.listen('127.0.0.1', 0)
  port = sockets[0].getsockname()[1]
  with pytest.raises(OSError, match='in use'):
    server.listen('127.0.0.1', port)
  with running(service_of(Stub(scored.scorer)), sockets=sockets) as found:
    assert found.url == f'http://127.0.0.1:{port}'
  server.listen('127.0.0.1', port)[0].close()


@pytest.mark.parametrize(
  ('host', 'alone'),
  [('127.0.0.1', True), ('localhost', True), ('0.0.0.0', False)],
)
def test_who_reaches_a_socket(host, alone):
  sockets = server.listen(host, 0)
  assert {server.is_loopback(x) for x in sockets} == {alone}
  for one in sockets:
    one.close()


class Process:
  """`experiments/serve.py` as a user starts it."""

  def __init__(self, workdir, *flags, **variables):
    self.port = free_port()
    self.url = f'http://127.0.0.1:{self.port}'
    self.process = subprocess.Popen(
      [
        sys.executable, ROOT / 'experiments' / 'serve.py',
        f'--workdir={workdir}', f'--port={self.port}', '--warm_up=16,16',
        '--max_batch=1', *flags,
      ],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      env={**os.environ, **variables},
    )  # fmt: skip

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.process.kill()
    self.process.communicate()

  def wait_until_ready(self, token=''):
    with client.Client(self.url, token=token) as one:
      one.wait_until_ready(300)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_skips_the_drain_alone(scored, number):
  """What is in flight is answered after it, too."""
  stub = Stub(scored.scorer)
  stub.go.clear()
  with (
    running(service_of(stub)) as found,
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    found.server._drain_s = 0.5
    first = pool.submit(post, found, bodies.body())
    assert stub.begun.wait(60)
    found.server.handle_exit(number, None)
    assert not found.server.should_exit
    found.server.handle_exit(number, None)
    assert found.server.should_exit
    time.sleep(1)  # Longer than the drain would have been.
    assert not found.server.force_exit
    stub.go.set()
    assert first.result().status_code == 200


@pytest.mark.slow  # A process takes seconds to import everything.
class TestProcesses:
  def test_two_servers_of_one_workdir_and_a_drain(self, workdir):
    token = 'of one server alone'
    with (
      Process(
        workdir, '--drain_s=2', '--max_wait_ms=500', '--max_batch=8'
      ) as first,
      Process(workdir, '--page=no', HISTJAX_TOKEN=token) as second,
    ):
      first.wait_until_ready()
      second.wait_until_ready()
      body = {k: v for k, v in bodies.body().items() if k != 'user'}
      with (
        client.Client(first.url) as one,
        client.Client(second.url, token=token) as other,
      ):
        found = [x.score(7, **body).logits for x in (one, other)]
        assert found[0] == found[1]
      assert httpx.get(f'{second.url}/v1/schema').status_code == 401
      assert httpx.get(f'{second.url}/').status_code == 404
      assert httpx.get(f'{first.url}/').status_code == 200
      self._drains(first, body)
      assert httpx.get(f'{second.url}/health/ready').status_code == 200

  def _drains(self, found, body):
    """In flight and for a while: scored. Then no more, and the end."""
    with (
      httpx.Client(base_url=found.url, timeout=600) as http,
      concurrent.futures.ThreadPoolExecutor() as pool,
    ):
      send = [
        pool.submit(http.post, '/v1/score', json={'user': 1, **body})
        for _ in range(4)
      ]
      while 'histjax_queue_length 4.0' not in http.get('/metrics').text:
        if all(f.done() for f in send):
          break  # So fast, or so slow, that it was not seen.
      found.process.send_signal(signal.SIGTERM)
      while (ready := http.get('/health/ready')).status_code == 200:
        pass
      assert ready.status_code == 503
      assert problem_of(ready).detail == 'draining'
      late = http.post('/v1/score', json={'user': 1, **body})
      assert late.status_code == 200
      assert [f.result().status_code for f in send] == [200] * 4
    output, _ = found.process.communicate(timeout=600)
    # As uvicorn ends: by the signal, once all is done.
    assert found.process.returncode == -signal.SIGTERM, output
    assert 'Traceback' not in output
    assert output.count('ready') == 1, output  # Scripts wait for the word.
    assert 'answers 503 meanwhile\nready after ' in output
    with pytest.raises(httpx.ConnectError):
      httpx.get(f'{found.url}/health/live')

  @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
  def test_a_signal_during_the_warm_up(self, workdir, tmp_path, number):
    """Does not wait for it, even where a request came meanwhile."""
    body = {'user': 1, **bodies.body()}
    (tmp_path / 'like_ray.py').write_text(  # Has a handler of its own.
      f'import signal, sys\nsignal.signal({number:d}, lambda n, _: sys.exit(n))'
    )
    path = [str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])]
    with Process(
      workdir,
      *('--warm_up=64,512,1024,512', '--page=no', '--drain_s=600'),
      '--modules=like_ray',
      JAX_COMPILATION_CACHE_DIR=str(tmp_path),
      PYTHONPATH=os.pathsep.join(path),
    ) as found:
      for line in found.process.stdout:
        if line.startswith('warms up'):
          break
      with httpx.Client(base_url=found.url, timeout=60) as http:
        assert 'histjax_ready 0.0' in http.get('/metrics').text
        found.process.send_signal(number)
        while http.get('/health/ready').json()['detail'] != 'draining':
          pass
        assert http.post('/v1/score', json=body).status_code == 503
      found.process.send_signal(number)  # The drain is over.
      output, _ = found.process.communicate(timeout=300)
    assert found.process.returncode == -number
    assert not output

  def test_a_warm_up_that_fails(self, workdir, tmp_path):
    """Ends the process: whoever started it sees why, or starts it again."""
    (tmp_path / 'no_memory.py').write_text(
      'from histjax.serving import engine\n'
      'def fail(self, **unused):\n'
      "  raise RuntimeError('no memory')\n"
      'engine.Engine.warm_up = fail\n'
    )
    path = [str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])]
    with Process(
      workdir, '--modules=no_memory', PYTHONPATH=os.pathsep.join(path)
    ) as found:
      output, _ = found.process.communicate(timeout=300)
    assert found.process.returncode == 1
    assert output.endswith('the warm-up failed: RuntimeError: no memory\n')
    assert 'ready' not in output

  def test_warns_of_a_host_without_a_token(self, workdir):
    for variables in ({}, {'HISTJAX_TOKEN': 'a long one'}):
      with Process(workdir, '--host=0.0.0.0', **variables) as found:
        found.wait_until_ready(variables.get('HISTJAX_TOKEN', ''))
        found.process.terminate()
        output, _ = found.process.communicate(timeout=300)
      warned = f'anyone who reaches port {found.port} can use it; set HISTJAX'
      assert (warned in output) is (not variables)

  def test_bad_flags(self, workdir, tmp_path):
    for flags, said in (
      ([f'--token_file={tmp_path / "none"}'], '/none: No such file or dir'),
      (['--store_mib=0'], '--store_mib=0: 0 is not a positive integer'),
      (['--max_wait_ms=1e9'], '--max_wait_ms=1e9: 1000000000.0 is not'),
      (['--watch_s=nan'], '--watch_s=nan must be finite'),
      (['--limits=items=3'], "'items' is none of"),
      (['--page=no', '--titles=a.csv'], 'not served; add --page=yes'),
    ):
      with Process(workdir, *flags) as found:
        output, _ = found.process.communicate(timeout=300)
      assert found.process.returncode == 1
      assert said in output
      assert 'Traceback' not in output
