"""The client tries again what may be tried again."""

import types

import httpx
import msgspec
import numpy as np
import pytest

from histjax.serving import client, messages
from tests.serving import bodies

REPLY = messages.ScoreReply(
  {'click': [1.0]}, {'click': [0.7]}, [0], 'hit', 3,
  messages.Timings(1.0, 1.0, 1.0, 1.0, 1.0), 1,
)  # fmt: skip


class Answers(httpx.BaseTransport):
  """Answers in this order; keeps the requests."""

  def __init__(self, *answers):
    self.answers, self.requests = list(answers), []

  def handle_request(self, request):
    self.requests.append(request)
    answer = self.answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    if answer == 200:
      content = messages.encode(messages.MSGPACK, REPLY)
      return httpx.Response(200, content=content)
    status, headers = answer if isinstance(answer, tuple) else (answer, {})
    problem = messages.Problem('T', status, 'what', fix='do this')
    content = messages.encode(messages.JSON, problem)
    return httpx.Response(status, content=content, headers=headers)


@pytest.fixture
def slept(monkeypatch):
  found = []
  monkeypatch.setattr(client.time, 'sleep', found.append)
  monkeypatch.setattr(client.random, 'uniform', lambda low, high: high)
  return found


def make(transport, **options):
  return client.Client('http://127.0.0.1', transport=transport, **options)


def test_retries(slept):
  answers = Answers(
    503, httpx.ConnectError('refused'), httpx.ReadError('reset'),
    (429, {'retry-after': '2'}), 200,
  )  # fmt: skip
  reply = make(answers).score(7, {'item': [1]})
  assert reply == REPLY
  assert slept == [0.05, 0.1, 0.2, 2.0]
  assert len({x.content for x in answers.requests}) == 1


def test_gives_up(slept):
  answers = Answers(*[503] * 3)
  with pytest.raises(client.UnavailableError, match='status 503, after 3 tri'):
    make(answers, retries=2).score(7, {'item': [1]})
  assert not answers.answers
  assert len(slept) == 2


@pytest.mark.parametrize('status', [400, 401, 413, 422, 500, 504])
def test_refusals_are_not_retried(slept, status):
  answers = Answers(status)
  with pytest.raises(client.ServerError, match=f'{status} T: what; do this'):
    make(answers).score(7, {'item': [1]})
  assert not slept


def test_unknown_history(slept):
  with pytest.raises(client.UnknownHistoryError) as error:
    make(Answers(409)).score(7, {'item': [1]}, first=3)
  assert error.value.problem.status == 409


def test_answers_of_a_proxy(slept):
  class Proxy(httpx.BaseTransport):
    def handle_request(self, request):
      return httpx.Response(502, text='<html>')

  with pytest.raises(client.ServerError, match='502 Bad Gateway'):
    make(Proxy()).score(7, {'item': [1]})


def test_arrays_and_the_token(slept):
  answers = Answers(200)
  make(answers, token='a token').score(
    np.int64(7),
    {'item': np.arange(2), 'price': [np.float32(1), np.float64(1)]},
    context={'segment': np.int32(1)},
    events=[types.MappingProxyType({'item': np.int64(1)})],
    timeout_ms=5,
  )
  (request,) = answers.requests
  assert request.headers['authorization'] == 'Bearer a token'
  found = msgspec.msgpack.decode(request.content)
  assert found == {
    'user': 7,
    'candidates': {'item': [0, 1], 'price': [1.0, 1.0]},
    'context': {'segment': 1},
    'events': [{'item': 1}],
    'first': 0,
    'timeout_ms': 5,
  }


def test_what_is_no_value(slept):
  with pytest.raises(ValueError, match='1j, a complex; give numbers'):
    make(Answers(200)).score(7, {'item': [1j]})


def test_against_a_server(served):
  body = {k: v for k, v in bodies.body().items() if k != 'user'}
  with client.Client(served.url) as one:
    one.wait_until_ready()
    assert one.score(7, **body).num_events == 2
    assert one.schema()['model'] == served.service.engine.fingerprint
    with pytest.raises(client.ServerError, match=r"422 .*'category'"):
      one.score(7, {'item': [1]}, context=body['context'])
    with pytest.raises(client.UnknownHistoryError, match='first=0'):
      one.score(8, **{**body, 'first': 5})


def test_no_server(slept):
  with client.Client('http://127.0.0.1:1', retries=1) as one:
    assert not one.is_ready()
    with pytest.raises(client.UnavailableError, match='ConnectError'):
      one.schema()


@pytest.mark.parametrize('options', [{'retries': -1}, {'backoff_s': 0}])
def test_bad_options(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    client.Client('http://127.0.0.1', **options)
