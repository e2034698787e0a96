"""What client and server say to each other: JSON for people, MessagePack else.

A body is decoded into these types in one pass that refuses unknown fields and
values of other types; `Limits` bounds what is read at all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from histjax import config as dicts

JSON = 'application/json'
MSGPACK = 'application/vnd.msgpack'
PROBLEM = 'application/problem+json'
_ALIASES = {'application/msgpack': MSGPACK, 'application/x-msgpack': MSGPACK}

Value = int | float | str | bool
Column = list[Value]
Table = dict[str, Column] | list[dict[str, Value]]


class ScoreRequest(
  msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True
):
  """Score candidates for a user, after what the user did.

  Attributes:
    user: the user's key as the log has it.
    candidates: `{column: [values]}` or `[{column: value}]`; at least one.
    context: one value a column.
    events: the user's events, oldest first, from number `first` on.
    first: how many events the user had before `events`; 0: `events` is the
      whole history.
    timeout_ms: from the request's arrival; if its turn has not come by then, it
      is dropped with status 504. None: the server's.
  """

  user: int | str
  candidates: Table
  context: dict[str, Value] = {}
  events: Table = []
  first: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
  timeout_ms: Annotated[float, Meta(gt=0, le=3_600_000)] | None = None


class Timings(msgspec.Struct):
  """Milliseconds of each phase of a request.

  Attributes:
    read: of the body's arrival.
    decode: of its checks.
    queue: waiting for a batch.
    rows: of the batch, made on the host.
    score: of the batch: states and scores.
  """

  read: float
  decode: float
  queue: float
  rows: float
  score: float


class ScoreReply(msgspec.Struct):
  """Scores in the order of the candidates.

  Attributes:
    logits: `{task: [candidates]}`.
    probabilities: their sigmoids.
    order: candidates by the first task's score, the best first; ties keep the
      order of the request.
    source: 'hit': the user's state was used as it was; 'extended': by the new
      events; 'encoded': the history was read.
    num_events: of the user, now in the state; the next request's `first`.
    timings_ms: by phase.
    batch_size: requests that were scored together.
    model: the fingerprint of the model that scored it.
  """

  logits: dict[str, list[float]]
  probabilities: dict[str, list[float]]
  order: list[int]
  source: Literal['hit', 'extended', 'encoded']
  num_events: int
  timings_ms: Timings
  batch_size: int
  model: str = ''


class Problem(msgspec.Struct, omit_defaults=True):
  """What is wrong with a request (RFC 9457).

  Attributes:
    title: the status in words.
    status: of HTTP.
    detail: what is wrong.
    field: of the request, or a column.
    value: what it was, shortened.
    fix: what to do.
    type: 'about:blank'.
  """

  title: str
  status: int
  detail: str
  field: str | None = None
  value: str | None = None
  fix: str | None = None
  type: str = 'about:blank'


class AttentionReply(msgspec.Struct):
  """The last layer's attention of one candidate.

  Attributes:
    weights: of each event, oldest first, the mean over heads; they sum to 1.
    first: the number of the first of these events.
  """

  weights: list[float]
  first: int


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may be.

  Attributes:
    body_bytes: of its body; a compressed one is refused.
    body_seconds: until its body must be there.
    candidates: the most.
    events: the most.
    columns: of candidates, events and context each.
    text: characters of a text.
  """

  body_bytes: int = 8 << 20
  body_seconds: float = 10.0
  candidates: int = 4096
  events: int = 16_384
  columns: int = 256
  text: int = 1024

  def __post_init__(self):
    dicts.normalize(self)
    for name, value in dataclasses.asdict(self).items():
      if not value > 0:
        raise ValueError(f'{name}={value} must be above 0')

  @classmethod
  def parse(cls, text: str, candidates: int | None = None) -> Limits:
    """The limits that a text changes, as 'candidates=2000,events=100'.

    Args:
      text: may be empty.
      candidates: that programs are compiled for, the most there may be.

    Raises:
      ValueError: a name is no limit, or a value no number above 0, or beyond
        what programs are compiled for.
    """
    kinds = {name: type(x) for name, x in dataclasses.asdict(cls()).items()}
    found: dict[str, Any] = {}
    if candidates is not None:
      found['candidates'] = candidates
    for pair in filter(None, text.split(',')):
      name, _, value = pair.partition('=')
      if name not in kinds:
        raise ValueError(f'limits: {name!r} is none of {sorted(kinds)}')
      try:
        found[name] = kinds[name](value)
      except ValueError:
        raise ValueError(f'limits: {pair!r} has no number; give one') from None
    if candidates is not None and found['candidates'] > candidates:
      raise ValueError(
        f'limits: candidates={found["candidates"]} is beyond the {candidates} '
        'that programs are compiled for; raise that (--warm_up)'
      )
    return cls(**found)


class BadRequestError(Exception):
  """A request that is refused; `problem` says why."""

  def __init__(self, problem: Problem, retry_after_s: float | None = None):
    super().__init__(problem)
    self.problem = problem
    self.retry_after_s = retry_after_s

  def __str__(self) -> str:
    return self.problem.detail


_TITLES = {
  400: 'Malformed request',
  401: 'No valid token',
  404: 'Not found',
  405: 'Method not allowed',
  408: 'Body too slow',
  409: 'History not known',
  413: 'Too large',
  415: 'Unsupported media type',
  422: 'Bad value',
  429: 'Too many requests',
  500: 'Internal error',
  503: 'Not ready',
  504: 'Too late',
}


def refusal(
  status: int,
  detail: str,
  *,
  field: str | None = None,
  value: Any = None,
  fix: str | None = None,
) -> BadRequestError:
  """The exception of a refused request."""
  if value is not None:
    value = value if isinstance(value, str) else repr(value)
    value = value if len(value) <= 100 else f'{value[:100]}..'
  title = _TITLES.get(status, 'Refused')
  return BadRequestError(Problem(title, status, detail, field, value, fix))


_DECODERS: Mapping[str, Any] = {
  JSON: msgspec.json.Decoder(ScoreRequest),
  MSGPACK: msgspec.msgpack.Decoder(ScoreRequest),
}
_ENCODERS: Mapping[str, Any] = {
  JSON: msgspec.json.Encoder(),
  MSGPACK: msgspec.msgpack.Encoder(),
}


def media_type(header: str) -> str:
  """`JSON` or `MSGPACK`; another is refused with 415."""
  name = header.partition(';')[0].strip().lower()
  name = _ALIASES.get(name, name)
  if name not in _DECODERS:
    raise refusal(
      415,
      f'Content-Type is {header!r}',
      field='Content-Type',
      value=header,
      fix=f'send {JSON} or {MSGPACK}',
    )
  return name


_QUALITY = re.compile(r';\s*q=([01]\.?\d*)\s*(?:;|$)')


def accepted(header: str) -> str | None:
  """The one that Accept prefers; of equals `MSGPACK`; None: neither."""
  weights: dict[str, float] = {}
  for part in header.lower().split(','):
    name = part.partition(';')[0].strip()
    match = _QUALITY.search(part)
    weights[_ALIASES.get(name, name)] = float(match[1]) if match else 1.0
  best = max((MSGPACK, JSON), key=lambda x: weights.get(x, 0.0))
  return best if weights.get(best) else None


def decode(media: str, body: bytes | bytearray) -> ScoreRequest:
  """The request of a body, its types checked.

  Raises:
    BadRequestError: with 400, or 422 of a well-formed body.
  """
  try:
    return _DECODERS[media].decode(body)
  except msgspec.ValidationError as error:
    what, _, path = _with_column(str(error), media, body).partition(' - at `')
    field = path.rstrip('`').removeprefix('$').lstrip('.') or None
    name = re.search('(?:unknown|required) field `(.*)`', what)
    raise refusal(
      422,
      f'{what} - at `{path}' if path else what,
      field=name[1][:100] if name and not field else field,
      fix=_fix(what),
    ) from error
  except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
    raise refusal(
      400, f'the body is no {media}: {error}', fix='send what the schema says'
    ) from error


_IN_COLUMN = re.compile(
  r' - at `\$\.(candidates|events|context)(?:\[(\d+)\])?\[\.\.\.\](.*)`$'
)


def _with_column(said: str, media: str, body: bytes | bytearray) -> str:
  """A message of msgspec, which writes '[...]' for a column's name."""
  match = _IN_COLUMN.search(said)
  if match is None:
    return said
  read = msgspec.json if media == JSON else msgspec.msgpack
  try:
    name = _bad_column(read.decode(body), match[1], match[2])
  except (msgspec.DecodeError, RecursionError, ValueError):
    return said  # As of 1e999, which is no number of any type.
  except (LookupError, TypeError, AttributeError):
    return said  # A field that is there twice.
  start = said[: match.start(3) - len('[...]')]
  return f'{start}[{name[:100]!r}]{match[3]}`'


def _bad_column(request: Any, field: str, row: str | None) -> str:
  """The first column of a table, or of its row, that is not of its type."""
  columns = request[field] if row is None else request[field][int(row)]
  kind = Column if row is None and field != 'context' else Value
  for name, value in columns.items():
    try:
      msgspec.convert(value, kind)
    except msgspec.ValidationError:
      return name
  raise LookupError(field)


def _fix(what: str) -> str:
  """Of a message of msgspec."""
  if match := re.search('unknown field `(.*)`', what):
    known = ScoreRequest.__struct_fields__
    close = dicts.nearest(match[1], known)
    meant = f'rename it to {close!r}' if close else 'leave it out'
    return f'{meant}; known are {sorted(known)}'
  if match := re.search('required (field `.*`)', what):
    return f'send the {match[1]}'
  if what == 'Number out of range':
    return 'send a number that a float64 holds'
  match = re.match('Expected (.*?)(?:, got .*)?$', what)
  return f'send {match[1]}' if match else what


def encode(media: str, message: Any) -> bytes:
  """A body."""
  return _ENCODERS[media].encode(message)


def size(table: Table) -> int:
  """The number of rows of a table; of unequal columns, the longest."""
  if isinstance(table, dict):
    return max(map(len, table.values()), default=0)
  return len(table)


def check(
  request: ScoreRequest, known: Mapping[str, frozenset[str]], limits: Limits
) -> None:
  """Checks what types do not say, before any work is spent.

  Args:
    request: as decoded.
    known: the columns that may be in `candidates`, `events` and `context`.
    limits: of the server.

  Raises:
    BadRequestError: 413 for too many, 422 for a bad value.
  """
  most = {'candidates': limits.candidates, 'events': limits.events}
  for field, limit in most.items():
    table = getattr(request, field)
    if (number := size(table)) > limit:
      raise refusal(
        413,
        f'{field} has {number} rows, the server takes {limit}',
        field=field,
        value=number,
        fix=f'send at most {limit}, or start the server for more (--warm_up, '
        '--limits)',
      )
  if not size(request.candidates):
    raise refusal(
      422,
      'candidates is empty',
      field='candidates',
      fix='give at least one item to score',
    )
  _check_text('user', request.user, limits)
  _check_columns('context', request.context, known['context'], limits)
  for name, value in request.context.items():
    _check_values(f'context.{name}', [value], limits)
  for field in most:
    _check_table(field, getattr(request, field), known[field], limits)


def _check_table(field, table: Table, known, limits: Limits) -> None:
  if isinstance(table, dict):
    _check_columns(field, table, known, limits)
    for name, values in table.items():
      _check_values(f'{field}.{name}', values, limits)
    return
  for names in {tuple(row): row for row in table}.values():
    _check_columns(field, names, known, limits)
  for name in dict.fromkeys(name for row in table for name in row):
    # Whether all rows have it is checked where rows are made.
    values = [row.get(name, 0) for row in table]
    _check_values(f'{field}.{name}', values, limits)


def _check_columns(field, columns, known, limits: Limits) -> None:
  if len(columns) > limits.columns:
    raise refusal(
      413,
      f'{field} has {len(columns)} columns, the server takes {limits.columns}',
      field=field,
      value=len(columns),
      fix=f'send at most {limits.columns}',
    )
  unknown = sorted(set(columns) - known)
  if unknown:
    shown = [name[:100] for name in unknown[:10]]
    raise refusal(
      422,
      f'{field} has columns that the model does not know: {shown}',
      field=field,
      value=shown,
      fix=f'leave them out; known are {sorted(known)}',
    )


def _check_values(field, values: Column, limits: Limits) -> None:
  try:
    if math.isfinite(sum(values)):  # type: ignore[arg-type]
      return  # Then each is, and there is no text.
  except (TypeError, OverflowError):
    pass
  for row, value in enumerate(values):
    if isinstance(value, str):
      _check_text(field, value, limits)
    elif isinstance(value, float) and not math.isfinite(value):
      raise refusal(
        422,
        f'{field} row {row} is {value}, not finite',
        field=field,
        value=value,
        fix='send a finite number',
      )


def _check_text(field, value: Value, limits: Limits) -> None:
  if isinstance(value, str) and len(value) > limits.text:
    raise refusal(
      413,
      f'{field} is a text of {len(value)} characters, the server takes '
      f'{limits.text}',
      field=field,
      value=value[:20],
      fix=f'send at most {limits.text}',
    )
