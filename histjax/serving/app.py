"""The ASGI application: one engine behind HTTP.

    GET  /                 the page               (`serving/page`)
    GET  /health/live      the process answers; 503 if its warm-up failed
    GET  /health/ready     503 until it is warm, and again when it drains
    GET  /metrics          for Prometheus
    GET  /openapi.json     the messages
    GET  /v1/schema        the columns that the model reads
    POST /v1/score         `messages.ScoreRequest` -> `messages.ScoreReply`

Requests are checked here and gathered by `batcher` into calls of the engine.
Nothing of a request is unpickled, decompressed or opened as a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import pathlib
import re
import time
from collections.abc import (
  AsyncIterator,
  Awaitable,
  Callable,
  Mapping,
  Sequence,
)
from typing import Any, Protocol, TypeVar

import numpy as np
from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from histjax.scoring import Scorer
from histjax.serving import batcher as batcher_lib
from histjax.serving import messages, middleware, openapi, reading
from histjax.serving import metrics as metrics_lib
from histjax.serving.columns import Columns
from histjax.serving.engine import Request, Result, UnknownHistory
from histjax.serving.planning import TooManyEvents

T = TypeVar('T')


class ScoringEngine(Protocol):
  """What the application needs of `engine.Engine`."""

  def score(self, requests: Sequence[Request]) -> list[Result | Exception]:
    """Scores each; one that is bad fails alone."""

  def metrics(self) -> Mapping[str, Any]:
    """Counters since the start."""

  @property
  def fingerprint(self) -> str:
    """Of the model."""


class RunEngine(ScoringEngine, Protocol):
  """An engine of a run, which can serve another one."""

  @property
  def scorer(self) -> Scorer:
    """Of what is served now."""

  def roll_over(self, scorer: Scorer) -> None:
    """Serves what another scorer has, from the next batch on."""


@dataclasses.dataclass(frozen=True)
class AppConfig:
  """How requests are served.

  Attributes:
    batcher: how they are gathered.
    limits: what they may be.
    timeout_s: a request's time until its batch begins, if it does not say.
    token: asked for as `Authorization: Bearer ..`; empty: none.
  """

  batcher: batcher_lib.BatcherConfig = dataclasses.field(
    default_factory=batcher_lib.BatcherConfig
  )
  limits: messages.Limits = dataclasses.field(default_factory=messages.Limits)
  timeout_s: float = 2.0
  token: str = dataclasses.field(default='', repr=False)

  def __post_init__(self):
    if not 0 < self.timeout_s <= 3600:
      raise ValueError(f'timeout_s={self.timeout_s} must be in (0, 3600]')
    token = self.token
    if token and (len(token) < 8 or not token.isascii()):
      raise ValueError(
        'token has fewer than 8 characters, or others than ASCII; make a '
        'longer one'
      )
    if token != token.strip() or not token.isprintable():
      raise ValueError(
        'token has white space around it, or control characters, which no '
        'header brings; leave them out'
      )


def read_token(path: str | None = None) -> str:
  """The token of a file, else of the environment's HISTJAX_TOKEN, else none.

  Without the white space around it.

  Raises:
    ValueError: the file is empty, or the variable white space.
    OSError: the file cannot be read.
  """
  if path is None:
    given = os.environ.get('HISTJAX_TOKEN', '')
    if given and not given.strip():
      raise ValueError('HISTJAX_TOKEN is white space; write a token into it')
    return given.strip()
  token = pathlib.Path(path).read_text(encoding='utf-8').strip()
  if not token:
    raise ValueError(f'token_file={path!r} is empty; write a token into it')
  return token


class Service:
  """The application's state: an engine, its queue, what is counted of it.

  Attributes:
    failure: what the warm-up raised, after which nothing is ever scored.
  """

  def __init__(
    self,
    engine: ScoringEngine,
    columns: Callable[[], Columns],
    config: AppConfig | None = None,
    *,
    warm_up: Callable[[], Any] = lambda: None,
    on_ready: Callable[[], Any] = lambda: None,
  ):
    """Makes a service; `app` serves it.

    Args:
      engine: scores.
      columns: of the run that the engine serves now.
      config: of requests.
      warm_up: runs in a thread; requests are scored after it.
      on_ready: called once `/health/ready` says so.
    """
    self.engine = engine
    self.columns = columns
    self.config = config or AppConfig()
    self.state = 'warming up'
    self.metrics = metrics_lib.Metrics(
      engine.metrics,
      lambda: self.batcher.waiting,
      lambda: self.ready,
      lambda: engine.fingerprint,
    )
    self.batcher = batcher_lib.Batcher(
      engine.score, self.config.batcher, observe=self.metrics.observe_batch
    )
    # Beside batches: what may compile, and they do not wait for.
    self.aside = batcher_lib.Batcher(
      lambda calls: [call() for call in calls],
      dataclasses.replace(self.config.batcher, max_batch=1, max_wait_s=0.0),
    )
    self.failure: Exception | None = None
    self._warm_up, self._on_ready = warm_up, on_ready
    self._is_warm = False

  @property
  def ready(self) -> bool:
    """Whether new requests should come."""
    return self.state == 'ready'

  def drain(self) -> None:
    """`/health/ready` says 503; requests are scored until the end, if ever."""
    self.state = 'draining'

  def check_open(self) -> None:
    """Raises a refusal, with 503, unless requests are scored."""
    if not self._is_warm:  # Draining or not: the engine is busy.
      raise messages.refusal(503, self.state, fix='come back later')

  async def run_warm_up(self) -> None:
    """Warms up, in a thread: `/health/live` answers meanwhile."""
    try:
      await asyncio.to_thread(self._warm_up)
    except Exception as error:
      logging.exception('warm-up failed')
      self.failure, self.state = error, 'warm-up failed'
      return
    self._is_warm = True
    if self.state == 'warming up':
      self.state = 'ready'
      self._on_ready()

  async def score(self, http: HttpRequest) -> Response:
    """`POST /v1/score`."""
    media, message, read_s, decode_s = await self.read(http)
    request = Request(
      user=message.user,
      candidates=message.candidates,
      context=message.context,
      events=message.events,
      first=message.first,
    )
    scored = await self.run(
      self.batcher, http, request, message, read_s + decode_s
    )
    for phase, seconds in (('read', read_s), ('decode', decode_s)):
      self.metrics.observe_phase(phase, seconds)
    result: Result = scored.result
    self.metrics.observe_source(result.source)
    score_s = scored.score_s - result.rows_s
    spent = read_s, decode_s, scored.queue_s, result.rows_s, score_s
    timings = messages.Timings(*(round(1000 * x, 3) for x in spent))
    begun = time.monotonic()
    response = respond(http, media, _reply(result, timings, scored.batch_size))
    self.metrics.observe_phase('reply', time.monotonic() - begun)
    return response

  async def read(
    self, http: HttpRequest
  ) -> tuple[str, messages.ScoreRequest, float, float]:
    """A body's media type, its message, and seconds to read and check it."""
    self.check_open()
    begun = time.monotonic()
    body = await reading.read(http, self.config.limits)
    there = time.monotonic()
    media = messages.media_type(http.headers.get('content-type', ''))
    message = messages.decode(media, body)
    messages.check(message, self.columns().known, self.config.limits)
    return media, message, there - begun, time.monotonic() - there

  async def run(
    self,
    batcher: batcher_lib.Batcher,
    http: HttpRequest,
    request: Any,
    message: messages.ScoreRequest,
    spent_s: float,
  ) -> batcher_lib.Scored:
    """What a batcher makes of a request; its errors as refusals.

    Args:
      batcher: of this service.
      http: whose body was read; once its client is gone, nothing is scored.
      request: for it.
      message: it is of.
      spent_s: of its time, what is over already.
    """
    timeout_s = self.config.timeout_s
    if message.timeout_ms is not None:
      timeout_s = min(message.timeout_ms / 1000, 3600.0)
    try:
      return await _while_there(
        http, batcher.score(request, timeout_s, spent_s)
      )
    except messages.BadRequestError:
      raise
    except batcher_lib.QueueFullError as error:
      refused = messages.refusal(429, str(error), fix='come back later')
      refused.retry_after_s = error.retry_after_s
      raise refused from error
    except batcher_lib.UnavailableError as error:
      raise messages.refusal(503, str(error), fix='come back later') from error
    except batcher_lib.DeadlineError as error:
      raise messages.refusal(
        504, str(error), field='timeout_ms', fix='give it more time'
      ) from error
    except UnknownHistory as error:
      raise messages.refusal(
        409,
        str(error),
        field='first',
        value=message.first,
        fix='send the whole history with first=0',
      ) from error
    except TooManyEvents as error:
      raise messages.refusal(
        413,
        str(error).partition('; ')[0],
        field='events',
        fix='start the server for longer histories (--warm_up), or train with '
        'history_length or a window',
      ) from error
    except ValueError as error:
      raise of_value_error(error) from error
    except Exception as error:  # Told to the log alone; the connection stays.
      logging.exception('the engine failed')
      raise messages.refusal(500, 'the server failed') from error

  def schema(self) -> dict[str, Any]:
    """`GET /v1/schema`."""
    columns = self.columns()
    return {
      'model': self.engine.fingerprint,
      'columns': columns.needed,
      'known': {k: sorted(v) for k, v in columns.known.items()},
      'limits': dataclasses.asdict(self.config.limits),
    }


def make_app(
  service: Service,
  *,
  background: Sequence[Callable[[], Any]] = (),
  routes: Sequence[BaseRoute] = (),
) -> Starlette:
  """The ASGI application of a service.

  Args:
    service: what it serves.
    background: coroutine functions that run as long as it does.
    routes: more of them, as of `page.routes`.
  """
  more = {route.path for route in routes if isinstance(route, Route)}
  document = openapi.document(
    token=bool(service.config.token), page='/v1/attention' in more
  )

  async def ready(http):
    if not service.ready:
      raise messages.refusal(503, service.state, fix='come back later')
    return Response('ready\n', media_type='text/plain')

  async def live(http):
    if service.state == 'warm-up failed':
      raise messages.refusal(503, service.state, fix='start it again')
    return Response('live\n', media_type='text/plain')

  async def metrics(http):
    text = await asyncio.to_thread(service.metrics.text)
    return Response(text, media_type=metrics_lib.CONTENT_TYPE)

  async def schema(http):
    return respond(http, messages.JSON, service.schema())

  async def describe(http):
    return Response(
      messages.encode(messages.JSON, document), media_type=messages.JSON
    )

  @contextlib.asynccontextmanager
  async def lifespan(app) -> AsyncIterator[None]:
    service.batcher.start()
    service.aside.start()
    tasks = [asyncio.create_task(service.run_warm_up())]
    tasks += [asyncio.create_task(_told(each)) for each in background]
    try:
      yield
    finally:
      service.drain()
      await service.batcher.stop()
      await service.aside.stop()
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)

  own = [
    Route('/health/live', live),
    Route('/health/ready', ready),
    Route('/metrics', metrics),
    Route('/openapi.json', describe),
    Route('/v1/schema', schema),
    Route('/v1/score', service.score, methods=['POST']),
  ]
  paths = more | {route.path for route in own}
  return Starlette(
    routes=[*own, *routes],
    middleware=[
      Middleware(middleware.Counted, metrics=service.metrics, paths=paths),
      Middleware(middleware.Authorized, token=service.config.token),
    ],
    exception_handlers={
      messages.BadRequestError: _on_refusal,
      HTTPException: _on_http,
      Exception: _on_error,
    },
    lifespan=lifespan,
  )


async def _while_there(http: HttpRequest, work: Awaitable[T]) -> T:
  """What the work returns; it is cancelled once the client is gone.

  One that gave up has sent its request again by now: while too many come,
  those that nobody waits for would take the place of others.
  """
  task = asyncio.current_task()
  assert task is not None

  async def leave():
    while (await http.receive())['type'] != 'http.disconnect':
      pass
    task.cancel()

  left = asyncio.create_task(leave())
  try:
    return await work
  except asyncio.CancelledError:
    if not left.done():  # The server ends.
      raise
    task.uncancel()
    raise messages.refusal(499, 'the client is gone') from None
  finally:
    left.cancel()


async def _told(background: Callable[[], Any]) -> None:
  try:
    await background()
  except Exception:  # Nobody else waits for it.
    logging.exception('a background task failed')


def respond(http: HttpRequest, media: str, message: Any) -> Response:
  """A message as the client accepts it, else as it spoke itself."""
  media = messages.accepted(http.headers.get('accept', '')) or media
  return Response(messages.encode(media, message), media_type=media)


_SEND = (
  (r'log needs >= 0$', 'send a value >= 0'),
  (r"outside the table of feature '.*', (\[0, \d+\))$", r'send an id in \1'),
  (r': a number is needed', 'send a number'),
  (r': a whole number is needed', 'send an integer'),
  (r' has no value \(', 'send a value'),
  (r'too large as feature ', 'send a smaller value'),
  (r'a label of task .* (?:is|must be) (0 or 1|a number)', r'send \1'),
)
"""What a client can do, where the library says what training can."""


def of_value_error(error: ValueError) -> messages.BadRequestError:
  """A refusal with what the library says: the field, the value; the fix."""
  detail, _, fix = str(error).rpartition('; ')
  for pattern, send in _SEND:
    if match := re.search(pattern, detail):
      fix = match.expand(send)
  field = None
  for mark in ("column '", "feature '"):
    if mark in str(error):
      field = str(error).partition(mark)[2].partition("'")[0]
      break
  return messages.refusal(
    422,
    detail or fix,
    field=field,
    fix=fix if detail else 'see /v1/schema for what each column takes',
  )


def _reply(
  result: Result, timings: messages.Timings, batch_size: int
) -> messages.ScoreReply:
  logits = {k: np.asarray(v, float) for k, v in result.logits.items()}
  best = next(iter(logits.values()))
  return messages.ScoreReply(
    logits={k: v.tolist() for k, v in logits.items()},
    probabilities={
      k: (0.5 * (1 + np.tanh(v / 2))).tolist() for k, v in logits.items()
    },
    order=np.argsort(-best, kind='stable').tolist(),
    source=result.source,
    num_events=result.num_events,
    timings_ms=timings,
    batch_size=batch_size,
    model=result.model,
  )


async def _on_refusal(http, error: Any) -> Response:
  headers = {}
  if error.retry_after_s is not None:
    headers['retry_after'] = str(max(1, math.ceil(error.retry_after_s)))
  return middleware.problem(error.problem, **headers)


async def _on_http(http, error: Any) -> Response:
  fix = 'GET /openapi.json lists paths and methods'
  refused = messages.refusal(error.status_code, error.detail, fix=fix)
  response = middleware.problem(refused.problem)
  response.headers.update(error.headers or {})
  return response


async def _on_error(http, error: Exception) -> Response:
  """The traceback goes to the log, and not to who sent the request."""
  return middleware.problem(messages.refusal(500, 'the server failed').problem)
