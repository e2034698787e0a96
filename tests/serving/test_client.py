"""The client tries again what may be tried again."""

import datetime
import math
import types

import httpx
import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from histjax.data import parsing
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
  with pytest.raises(
    client.UnavailableError, match='503 T: what; do this, after 3 tries'
  ):
    make(answers, retries=2).score(7, {'item': [1]})
  assert not answers.answers
  assert len(slept) == 2


def test_waits_are_bounded(slept):
  busy = (429, {'retry-after': '3600'})
  answers = Answers(503, 503, 503, busy, 200)
  make(answers, max_backoff_s=0.08).score(7, {'item': [1]})
  assert slept == [0.05, 0.08, 0.08, 60.0]


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


@pytest.mark.parametrize(
  ('status', 'said'),
  [(502, '502 Bad Gateway'), (200, '200 OK: the answer is no message')],
)
def test_answers_of_a_proxy(slept, status, said):
  class Proxy(httpx.BaseTransport):
    def handle_request(self, request):
      return httpx.Response(status, text='<html>')

  with pytest.raises(client.ServerError, match=said):
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


ZONE = datetime.timezone(datetime.timedelta(hours=8))


@pytest.mark.parametrize(
  'moments',
  [
    np.array(['2024-01-01T00:00:00.000000001'], 'datetime64[ns]'),
    np.array(['2024-01-01T00:00:00.5'], 'datetime64[us]'),
    np.array(['2024-01-01T05'], 'datetime64[h]'),
    np.array(['2024'], 'datetime64[Y]'),
    [np.datetime64('2024-01-01T00:00', 'm')],
    [datetime.datetime(2024, 1, 1, 7, 30)],
    [datetime.datetime(2024, 1, 1, 7, 30, tzinfo=ZONE)],
    [datetime.date(2024, 1, 1)],
    pd.Series(pd.to_datetime(['2024-01-01T07:30:00.000000001'])),
    pd.Series(pd.to_datetime(['2024-01-01T07:30']).tz_localize(ZONE)),
    [pd.Timestamp('2024-01-01T07:30', tz=ZONE)],
  ],
)
def test_a_moment_is_read_as_itself(slept, moments):
  """As it is in process, by what the server reads texts with."""
  answers = Answers(200, 200)
  wanted = parsing.to_array(moments).cast('timestamp[ns]').cast('int64')
  rows = [{'ts': x} for x in moments]
  for candidates in ({'ts': moments}, rows):
    make(answers).score(7, candidates, context={'ts': rows[0]['ts']})
    body = answers.requests.pop().content
    request = messages.decode(messages.MSGPACK, body)
    found = request.candidates
    found = found['ts'] if isinstance(found, dict) else [found[0]['ts']]
    for text in (found, [request.context['ts']]):
      times, _ = parsing.text_to_times(pa.array(text, pa.large_string()))
      assert times.cast('int64').to_pylist() == wanted.to_pylist()


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ({3, 1}, 'a set; give'),
    ([{3}], 'a set; give'),
    ([2**64], f'{2**64}, which does not fit into 64 bits; give it as'),
    ([-(2**63) - 1], 'which does not fit into 64 bits'),
    (np.array(['NaT'], 'datetime64[ns]'), 'NaT'),
    ([pd.NaT], 'NaT'),
    (np.array([1], 'timedelta64[ns]'), 'timedelta64'),
    ([np.timedelta64(1, 'ns')], 'a timedelta64; give'),
    ([datetime.timedelta(1)], 'a timedelta; give'),
    (np.array([1], np.longdouble), 'a longdouble; give'),
  ],
)
def test_what_would_be_something_else(slept, values, said):
  for part in ('candidates', 'events'):
    tables = {'candidates': {'item': [1]}, part: {'item': values}}
    with pytest.raises(ValueError, match=rf'{part}\.item has .*{said}'):
      make(Answers()).score(7, **tables)


@pytest.mark.parametrize(
  'odd',
  [
    *(np.int8(3), np.uint64(3), np.float32(3), np.float64(3), np.bool_(1)),
    *(np.str_('3'), '3', True, math.nan, math.inf, 2**63, -0.0, 1e308),
    *(datetime.datetime(2024, 1, 1), np.datetime64('2024-01-01'), pd.NaT),
    *(datetime.timedelta(1), np.timedelta64(1, 's'), {3}, 1j, 2**64),
    *(np.longdouble(3), np.float16(3), np.array(3), pd.Timestamp(0)),
  ],
  ids=repr,
)
def test_a_value_among_numbers_is_sent_as_alone(odd):
  def sent(values):
    try:
      table = client._table('candidates', {'x': values})
      content = client._ENCODER.encode(table)
      return repr(msgspec.msgpack.decode(content)['x'][-1])
    except (ValueError, OverflowError) as error:
      return repr(error)

  for others in ([], [1], [1.0], [True], [2**63, 1.5], [1e308, 1e308]):
    assert sent([*others, odd]) == sent([odd])
    assert sent([odd, *others, odd]) == sent([odd])


def test_a_user_of_65_bits(slept):
  with pytest.raises(ValueError, match=f'user has {2**64}, which does not fit'):
    make(Answers()).score(2**64, {'item': [1]})


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


@pytest.mark.parametrize('token', ['secret one\n', ' secret one', 'secr\net'])
def test_a_token_that_no_header_takes(token):
  """Said at once, and without it."""
  with pytest.raises(ValueError, match=r'^token must be printable') as caught:
    client.Client('http://127.0.0.1', token=token)
  assert 'secr' not in str(caught.value)


@pytest.mark.parametrize('url', ['127.0.0.1:8000', 'localhost', 'ftp://x', ''])
def test_a_url_of_another_scheme(url):
  with pytest.raises(ValueError, match=r'must begin with .http:'):
    client.Client(url)


def test_no_server(slept):
  with client.Client('http://127.0.0.1:1', retries=1) as one:
    assert not one.is_ready()
    with pytest.raises(client.UnavailableError, match='ConnectError'):
      one.schema()


@pytest.mark.parametrize('options', [{'retries': -1}, {'backoff_s': 0}])
def test_bad_options(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    client.Client('http://127.0.0.1', **options)
