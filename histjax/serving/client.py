"""A client of the server, with retries.

with Client('http://127.0.0.1:8000') as client:
  reply = client.score(7, {'item': [1, 2]}, events=events)
  reply = client.score(7, {'item': [1, 2]}, events=new, first=reply.num_events)
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec

from histjax.serving import messages

_RETRIED = (429, 503)


class ServerError(Exception):
  """The server refused a request.

  Attributes:
    problem: what it says.
  """

  def __init__(self, problem: messages.Problem):
    said = f'{problem.status} {problem.title}: {problem.detail}'
    super().__init__(f'{said}; {problem.fix}' if problem.fix else said)
    self.problem = problem


class UnknownHistoryError(ServerError):
  """The server does not know the events before `first`: send all of them."""


class UnavailableError(Exception):
  """No answer after all retries."""


class Client:
  """Speaks to one server; may be shared by threads.

  A request that is sent twice is scored twice and appends its events once, so
  429, 503 and failed connections are retried, with exponential backoff and full
  jitter, no sooner than Retry-After says.
  """

  def __init__(
    self,
    url: str,
    *,
    token: str = '',
    timeout_s: float = 10.0,
    retries: int = 5,
    backoff_s: float = 0.05,
    max_backoff_s: float = 5.0,
    transport: httpx.BaseTransport | None = None,
  ):
    """Makes a client; use it as a context manager, or `close` it.

    Args:
      url: of the server.
      token: the server's, if it asks for one.
      timeout_s: of each try.
      retries: tries after the first.
      backoff_s: the longest wait before the first retry; doubles each time.
      max_backoff_s: of these waits.
      transport: of httpx.
    """
    if retries < 0:
      raise ValueError(f'retries={retries} must be at least 0')
    if not 0 < backoff_s <= max_backoff_s:
      raise ValueError(
        f'backoff_s={backoff_s} must be in (0, max_backoff_s={max_backoff_s}]'
      )
    headers = {'authorization': f'Bearer {token}'} if token else {}
    self._http = httpx.Client(
      base_url=url, headers=headers, timeout=timeout_s, transport=transport
    )
    self._retries = retries
    self._backoff_s, self._max_backoff_s = backoff_s, max_backoff_s

  def __enter__(self) -> Client:
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the connections."""
    self._http.close()

  def score(
    self,
    user: str | int,
    candidates: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    *,
    context: Mapping[str, Any] | None = None,
    events: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] = (),
    first: int = 0,
    timeout_ms: float | None = None,
  ) -> messages.ScoreReply:
    """Scores candidates for a user, after what the user did.

    Args:
      user: the key, as in the log.
      candidates: the items to score, `[{column: value}]` or
        `{column: [values]}`, under the log's column names; columns may be
        NumPy arrays.
      context: one value a column.
      events: what the user did since, oldest first, in the same form.
      first: the number of the first of them in the user's whole history: the
        last reply's `num_events`, or 0 for a whole history.
      timeout_ms: until its batch must have begun; None: the server's.

    Raises:
      ValueError: a value is of a type that cannot be sent.
      UnknownHistoryError: send the whole history with first=0.
      ServerError: another refusal; its problem names the field and the fix.
      UnavailableError: no answer after all retries.
    """
    request: dict[str, Any] = {
      'user': user,
      'candidates': candidates,
      'context': context or {},
      'events': events,
      'first': first,
    }
    if timeout_ms is not None:
      request['timeout_ms'] = timeout_ms
    response = self._send(
      'POST',
      '/v1/score',
      content=_ENCODER.encode(request),
      headers={'content-type': messages.MSGPACK, 'accept': messages.MSGPACK},
    )
    return msgspec.msgpack.decode(response.content, type=messages.ScoreReply)

  def schema(self) -> dict[str, Any]:
    """The columns that the model reads, and the server's limits."""
    return self._send('GET', '/v1/schema').json()

  def is_ready(self) -> bool:
    """Whether the server scores; False if it does not answer. No retries."""
    try:
      return self._http.get('/health/ready').status_code == 200
    except httpx.TransportError:
      return False

  def wait_until_ready(self, timeout_s: float = 60.0) -> None:
    """Returns once the server scores.

    Raises:
      UnavailableError: it did not by then.
    """
    deadline = time.monotonic() + timeout_s
    while not self.is_ready():
      if time.monotonic() > deadline:
        raise UnavailableError(f'not ready after {timeout_s:g} s')
      time.sleep(0.1)

  def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
    said = ''
    for attempt in range(self._retries + 1):
      least = 0.0
      try:
        response = self._http.request(method, path, **options)
      except httpx.TransportError as error:
        said = f'{type(error).__name__}: {error}'
      else:
        if response.status_code not in _RETRIED:
          return _checked(response)
        said = f'status {response.status_code}'
        least = _seconds(response.headers.get('retry-after', '0'))
      if attempt < self._retries:
        longest = min(self._backoff_s * 2**attempt, self._max_backoff_s)
        time.sleep(max(least, random.uniform(0, longest)))
    raise UnavailableError(
      f'{method} {path}: {said}, after {self._retries + 1} tries'
    )


def _checked(response: httpx.Response) -> httpx.Response:
  if response.is_success:
    return response
  try:
    problem = msgspec.json.decode(response.content, type=messages.Problem)
  except msgspec.DecodeError:  # Of a proxy.
    problem = messages.Problem(
      response.reason_phrase, response.status_code, response.text[:200]
    )
  if problem.status == 409:
    raise UnknownHistoryError(problem)
  raise ServerError(problem)


def _seconds(text: str) -> float:
  return min(float(text), 60.0) if text.isdecimal() else 0.0


def _plain(value: Any) -> Any:
  """What MessagePack has no type for as what it has one for."""
  if isinstance(value, Mapping):
    return dict(value)
  if hasattr(value, 'tolist'):  # NumPy's arrays and numbers.
    return value.tolist()
  raise ValueError(
    f'a request has {value!r}, a {type(value).__name__}; give numbers, texts '
    'and booleans, in lists or NumPy arrays'
  )


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
