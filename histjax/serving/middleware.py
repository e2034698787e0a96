"""What every request passes: the token, the count; and how one is refused."""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection

from starlette.responses import Response
from starlette.types import ASGIApp

from histjax.serving import messages
from histjax.serving.metrics import Metrics

_OPEN = ('/health/', '/page/', '/openapi.json')


def problem(found: messages.Problem, **headers: str) -> Response:
  """The response of a problem; `headers` with `_` for `-`."""
  given = {k.replace('_', '-'): v for k, v in headers.items()}
  if found.status in (408, 413, 415):  # The body was not read.
    given['connection'] = 'close'
  if found.status in (429, 503):
    given.setdefault('retry-after', '1')
  if found.status == 401:
    given['www-authenticate'] = 'Bearer'
  return Response(
    messages.encode(messages.JSON, found),
    status_code=found.status,
    media_type=messages.PROBLEM,
    headers=given,
  )


class Authorized:
  """Asks for the token, where there is one."""

  def __init__(self, app: ASGIApp, token: str):
    self._app = app
    self._wanted = token.encode() if token else None

  async def __call__(self, scope, receive, send) -> None:
    """See ASGI."""
    path = scope.get('path', '')
    closed = path != '/' and not path.startswith(_OPEN)
    if scope['type'] == 'http' and self._wanted is not None and closed:
      given = dict(scope['headers']).get(b'authorization', b'')
      scheme, _, given = given.partition(b' ')
      if scheme.lower() != b'bearer' or not hmac.compare_digest(
        given.strip(), self._wanted
      ):
        refused = messages.refusal(
          401,
          f'{path} needs a token',
          field='Authorization',
          fix="send 'Authorization: Bearer TOKEN'",
        )
        await problem(refused.problem)(scope, receive, send)
        return
    await self._app(scope, receive, send)


class Counted:
  """Counts responses by path and status."""

  def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
    self._app, self._metrics, self._paths = app, metrics, paths

  async def __call__(self, scope, receive, send) -> None:
    """See ASGI."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    begun, status = time.monotonic(), 500

    async def counted(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      await self._app(scope, receive, counted)
    finally:
      path = scope['path'] if scope['path'] in self._paths else 'other'
      took = time.monotonic() - begun
      self._metrics.observe_request(path, status, took)
