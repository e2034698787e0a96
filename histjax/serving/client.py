"""A client of the server, with retries.

with Client('http://127.0.0.1:8000') as client:
  reply = client.score(7, {'item': [1, 2]}, events=events)
  reply = client.score(7, {'item': [1, 2]}, events=new, first=reply.num_events)
"""

from __future__ import annotations

import datetime
import itertools
import random
import time
from collections.abc import Mapping, Sequence, Set
from typing import Any

import httpx
import msgspec
import numpy as np

from histjax.serving import messages

_RETRIED = (429, 503)


class ServerError(Exception):
  """The server refused a request.

  Attributes:
    problem: what it says.
  """

  def __init__(self, problem: messages.Problem):
    super().__init__(problem)
    self.problem = problem

  def __str__(self) -> str:
    problem = self.problem
    said = f'{problem.status} {problem.title}: {problem.detail}'
    return f'{said}; {problem.fix}' if problem.fix else said


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

    Raises:
      ValueError: an option cannot be.
    """
    if retries < 0:
      raise ValueError(f'retries={retries} must be at least 0')
    if not 0 < backoff_s <= max_backoff_s:
      raise ValueError(
        f'backoff_s={backoff_s} must be in (0, max_backoff_s={max_backoff_s}]'
      )
    if not url.startswith(('http://', 'https://')):
      raise ValueError(f"url={url!r} must begin with 'http://' or 'https://'")
    if token != token.strip() or not (token.isascii() and token.isprintable()):
      raise ValueError(  # Without the token: it is a secret.
        'token must be printable ASCII without white space around it; strip it'
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
        NumPy arrays. Moments (datetime, numpy.datetime64) are sent as texts
        in ISO 8601; without a time zone they are UTC.
      context: one value a column.
      events: what the user did since, oldest first, in the same form.
      first: the number of the first of them in the user's whole history: the
        last reply's `num_events`, or 0 for a whole history.
      timeout_ms: until its batch must have begun; None: the server's.

    Raises:
      ValueError: a value is of a type that cannot be sent, or an integer of
        more than 64 bits.
      UnknownHistoryError: send the whole history with first=0.
      ServerError: another refusal; its problem names the field and the fix.
      UnavailableError: no answer after all retries.
    """
    request: dict[str, Any] = {
      'user': _value('user', user),
      'candidates': _table('candidates', candidates),
      'context': _row('context', context or {}),
      'events': _table('events', events),
      'first': first,
    }
    if timeout_ms is not None:
      request['timeout_ms'] = timeout_ms
    response = self._send(
      'POST',
      '/v1/score',
      content=_encode(request),
      headers={'content-type': messages.MSGPACK, 'accept': messages.MSGPACK},
    )
    try:
      return msgspec.msgpack.decode(response.content, type=messages.ScoreReply)
    except msgspec.DecodeError as error:
      problem = messages.Problem(
        response.reason_phrase,
        response.status_code,
        f'the answer is no message of a server of histjax ({error})',
        fix='name the URL of one',
      )
      raise ServerError(problem) from error

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
        said = str(ServerError(_problem(response)))
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
  problem = _problem(response)
  if problem.status == 409:
    raise UnknownHistoryError(problem)
  raise ServerError(problem)


def _problem(response: httpx.Response) -> messages.Problem:
  try:
    return msgspec.json.decode(response.content, type=messages.Problem)
  except msgspec.DecodeError:  # Of a proxy.
    return messages.Problem(
      response.reason_phrase, response.status_code, response.text[:200]
    )


def _seconds(text: str) -> float:
  return min(float(text), 60.0) if text.isdecimal() else 0.0


_AS_THEY_ARE = {int, float, str, bool}
_BITS = -(2**63), 2**64 - 1


def _encode(request: Mapping[str, Any]) -> bytes:
  try:
    return _ENCODER.encode(request)
  except OverflowError:
    for part in ('user', 'first', 'context', 'candidates', 'events'):
      _check_bits(part, request[part])
    raise


def _check_bits(where: str, value: Any) -> None:
  """Raises the ValueError of an integer of more than 64 bits."""
  if isinstance(value, Mapping):
    for name, part in value.items():
      _check_bits(f'{where}.{name}', part)
  elif isinstance(value, (list, tuple)):
    for part in value:
      _check_bits(where, part)
  elif isinstance(value, int) and not _BITS[0] <= value <= _BITS[1]:
    raise ValueError(
      f'{where} has {value}, which does not fit into 64 bits; give it as text '
      'if it is a key'
    )


def _table(source: str, table: Any) -> Any:
  """Columns or rows, as they can be sent."""
  if isinstance(table, Mapping):
    return {k: _column(f'{source}.{k}', x) for k, x in table.items()}
  if not isinstance(table, (list, tuple)):
    return table
  if all(type(row) is dict for row in table):
    values = itertools.chain.from_iterable(map(dict.values, table))
    if _AS_THEY_ARE.issuperset(map(type, values)):
      return table
  return [_row(source, row) for row in table]


def _row(source: str, row: Any) -> Any:
  if not isinstance(row, Mapping):
    return row
  return {name: _value(f'{source}.{name}', x) for name, x in row.items()}


def _column(where: str, values: Any) -> Any:
  if isinstance(values, (list, tuple)):
    if _AS_THEY_ARE.issuperset(map(type, values)):
      return values
    return [_value(where, x) for x in values]
  if _kind(values) == 'M':
    array = np.asarray(values)
    if array.dtype.kind == 'M':  # Else pandas has a time zone in its type.
      return _moments(where, array)
  if hasattr(values, 'tolist') and _kind(values) != 'm':
    found = values.tolist()
    return (_column if isinstance(found, list) else _value)(where, found)
  return _value(where, values)


def _value(where: str, value: Any) -> Any:
  """What MessagePack has no type for as what it, and the server, have."""
  if _kind(value) == 'M':
    return _moments(where, np.asarray(value))
  if isinstance(value, datetime.datetime) and value == value:  # No NaT.
    if value.tzinfo is not None:
      value = value.astimezone(datetime.UTC)
    return value.isoformat()
  if hasattr(value, 'tolist') and _kind(value) != 'm':
    found = value.tolist()
    if type(found) is not type(value):  # Of float128 it is.
      return _value(where, found)
  if _kind(value) or isinstance(
    value, (Set, datetime.datetime, datetime.timedelta)
  ):
    raise _unsendable(where, value)
  return value


def _kind(values: Any) -> str:
  """Of an array or a number of NumPy; '' of all else."""
  return getattr(getattr(values, 'dtype', None), 'kind', '')


def _moments(where: str, values: Any) -> Any:
  """Texts of numpy.datetime64, one or an array, in their own unit."""
  if np.isnat(values).any():
    raise _unsendable(where, values)
  unit = np.datetime_data(values.dtype)[0]
  coarse = {'Y': 'D', 'M': 'D', 'W': 'D', 'h': 's', 'm': 's'}
  if unit in coarse:
    values = values.astype(f'datetime64[{coarse[unit]}]')
  return np.datetime_as_string(values).tolist()


def _unsendable(where: str, value: Any) -> ValueError:
  return ValueError(
    f'{where} has {value!r}, a {type(value).__name__}; give numbers, texts, '
    'booleans and moments, in lists or NumPy arrays'
  )


def _plain(value: Any) -> Any:
  """What is left after `_value`."""
  if isinstance(value, Mapping):
    return dict(value)
  raise _unsendable('a request', value)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
