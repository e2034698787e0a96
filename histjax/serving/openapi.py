"""The OpenAPI document of the application, made of its messages' types."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import msgspec

from histjax.serving import messages

_REFERENCE = '#/components/schemas/{name}'
_SAID = {
  400: 'The body is malformed.',
  401: 'No valid bearer token.',
  408: 'The body did not come in time.',
  409: 'The history before `first` is not known: send all with first=0.',
  413: 'The body, or a list in it, is too large.',
  415: 'Another media type, or a compressed body.',
  422: 'A value is bad; the problem names the field and the fix.',
  429: 'As many requests wait as may; Retry-After says when to come back.',
  503: 'Warming up or draining.',
  504: 'Its turn had not come when its time was over.',
}
_RETRY = {
  'Retry-After': {
    'schema': {'type': 'integer', 'minimum': 1},
    'description': 'Seconds.',
  }
}


def document(*, token: bool, page: bool) -> dict[str, Any]:
  """The OpenAPI 3.1 document.

  Args:
    token: whether a bearer token is asked for.
    page: whether the page and what it asks for are served.
  """
  types = [
    messages.ScoreRequest,
    messages.ScoreReply,
    messages.Problem,
    messages.AttentionReply,
  ]
  _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
  paths = {
    '/health/live': _get(
      'The process answers.', 'text/plain', {503: _SAID[503]}
    ),
    '/health/ready': _get(
      'Requests are scored.', 'text/plain', {503: _SAID[503]}
    ),
    '/metrics': _get('For Prometheus.', 'text/plain', _closed(token)),
    '/v1/schema': _get(
      'The columns that the model reads.', messages.JSON, _closed(token)
    ),
    '/v1/score': _post('ScoreReply', 'Scores candidates for a user.', token),
  }
  if page:
    paths['/v1/catalogue'] = _get(
      'Items and users of the page.', messages.JSON, _closed(token)
    )
    paths['/v1/attention'] = _post(
      'AttentionReply',
      'Where in the whole history (first=0) one candidate looks.',
      token,
    )
  found: dict[str, Any] = {
    'openapi': '3.1.0',
    'info': {'title': 'histjax', 'version': metadata.version('histjax')},
    'paths': paths,
    'components': {'schemas': components},
  }
  if token:
    found['components']['securitySchemes'] = {
      'token': {'type': 'http', 'scheme': 'bearer'}
    }
    for path, operations in paths.items():
      if path.startswith('/v1') or path == '/metrics':
        for operation in operations.values():
          operation['security'] = [{'token': []}]
  return found


def _closed(token: bool) -> dict[int, str]:
  return {401: _SAID[401]} if token else {}


def _get(summary: str, media: str, problems: dict[int, str]) -> dict[str, Any]:
  kind = 'object' if media == messages.JSON else 'string'
  ok = {'description': 'OK', 'content': {media: {'schema': {'type': kind}}}}
  return {'get': {'summary': summary, 'responses': _responses(ok, problems)}}


def _post(reply: str, summary: str, token: bool) -> dict[str, Any]:
  def content(name):
    schema = {'schema': {'$ref': _REFERENCE.format(name=name)}}
    return {media: schema for media in (messages.JSON, messages.MSGPACK)}

  ok = {'description': 'Scored.', 'content': content(reply)}
  problems = {k: v for k, v in _SAID.items() if token or k != 401}
  return {
    'post': {
      'summary': summary,
      'requestBody': {'required': True, 'content': content('ScoreRequest')},
      'responses': _responses(ok, problems),
    }
  }


def _responses(ok: dict[str, Any], problems: dict[int, str]) -> dict[str, Any]:
  schema = {'$ref': _REFERENCE.format(name='Problem')}
  found: dict[str, Any] = {'200': ok}
  for status, said in problems.items():
    found[str(status)] = {
      'description': said,
      'content': {messages.PROBLEM: {'schema': schema}},
    }
    if status in (429, 503):
      found[str(status)]['headers'] = _RETRY
  return found
