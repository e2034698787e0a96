"""Request bodies, bounded in bytes and time before anything is made of them."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from histjax.serving import messages


async def read(request: Request, limits: messages.Limits) -> bytearray:
  """The body.

  Args:
    request: whose body nobody has read.
    limits: of the server.

  Raises:
    BadRequestError: 413, 408, or 415 for a compressed one, which could be of
      any size once it is not.
  """
  encoding = request.headers.get('content-encoding', 'identity')
  if encoding.strip().lower() != 'identity':
    raise messages.refusal(
      415,
      f'Content-Encoding is {encoding!r}; compressed bodies are refused',
      field='Content-Encoding',
      value=encoding,
      fix='send it as it is',
    )
  length = request.headers.get('content-length', '')
  # HTTP servers refuse what is no number; a long one need not be read.
  if length.isdecimal() and (
    len(length) > 18 or int(length) > limits.body_bytes
  ):
    raise _too_large(length, limits)
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for chunk in request.stream():
        body += chunk
        if len(body) > limits.body_bytes:
          raise _too_large(f'at least {len(body)}', limits)
  except TimeoutError:
    raise messages.refusal(
      408,
      f'{len(body)} bytes of the body came in {limits.body_seconds:g} s',
      fix='send it faster, or less of it',
    ) from None
  except ClientDisconnect:
    raise messages.refusal(499, 'the client is gone') from None
  return body


def _too_large(length: str, limits: messages.Limits) -> Exception:
  return messages.refusal(
    413,
    f'the body has {length} bytes, the server takes {limits.body_bytes}',
    field='Content-Length',
    value=length,
    fix='send fewer candidates or events; new events alone, with `first`',
  )
