"""The servers that the suite `serving` asks, in threads of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarking import rankers
from histjax.data.rows import RowConfig
from histjax.features import FittedFeatures
from histjax.serving import app as app_lib
from histjax.serving import batcher, client, server
from histjax.serving.columns import Columns
from histjax.serving.engine import Request, Result

if TYPE_CHECKING:
  from benchmarking.serving import InProcess

_SECONDS = 600.0  # On a CPU the longest histories take a while.


class Http:
  """Asks a server for each request, one after another."""

  def __init__(self, store: client.Client, stateless: client.Client):
    self._store, self._stateless = store, stateless

  def score(self, kind: str, requests: Sequence[Request]) -> list[Result]:
    """See `serving.Way`."""
    asked = self._stateless if kind == 'no cache' else self._store
    return [_result(asked, request) for request in requests]


def _result(asked: client.Client, request: Request) -> Result:
  reply = asked.score(
    request.user,
    request.candidates,
    context=request.context,
    events=request.events,
    first=request.first,
  )
  logits: Mapping[str, Any] = reply.logits
  return Result(logits, reply.source, reply.num_events, reply.model)


@contextlib.contextmanager
def running(way: InProcess) -> Iterator[Http]:
  """Both engines behind servers of their own; a request waits for no other."""
  with contextlib.ExitStack() as stack:
    clients = [
      stack.enter_context(_server(engine))
      for engine in (way.store, way.stateless)
    ]
    yield Http(*clients)


@contextlib.contextmanager
def _server(engine: app_lib.ScoringEngine) -> Iterator[client.Client]:
  columns = Columns.of_run(rankers.SCHEMA, RowConfig(), FittedFeatures())
  service = app_lib.Service(
    engine,
    lambda: columns,
    app_lib.AppConfig(
      batcher.BatcherConfig(max_wait_s=0.0), timeout_s=_SECONDS
    ),
  )
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  found = server.Server(service, app_lib.make_app(service), port=port)
  thread = threading.Thread(target=found.run, name='server', daemon=True)
  thread.start()
  try:
    with client.Client(
      f'http://127.0.0.1:{port}', timeout_s=_SECONDS, retries=0
    ) as asked:
      asked.wait_until_ready()
      yield asked
  finally:
    found.should_exit = True
    thread.join(30)
