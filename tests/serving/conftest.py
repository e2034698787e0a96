"""A small trained run, and servers of it in threads of this process."""

import contextlib
import dataclasses
import socket
import threading

import httpx
import pytest

from histjax.serving import app as app_lib
from histjax.serving import columns, engine, page, server
from tests.training import runs


@pytest.fixture(scope='session')
def workdir(tmp_path_factory):
  """Of a run on the synthetic log; leave it as it is."""
  folder = tmp_path_factory.mktemp('served')
  runs.run(folder, num_steps=5)
  return folder


@pytest.fixture(scope='session')
def scored(workdir):
  """The engine of the run, which has compiled what tests ask for."""
  return engine.Engine(workdir)


@dataclasses.dataclass
class Running:
  """A server in a thread."""

  url: str
  service: app_lib.Service
  server: server.Server
  http: httpx.Client


def service_of(scoring, config=None, **options):
  """A service of an engine, or of what stands for one.

  Requests wait for as long as a slow machine compiles.
  """
  return app_lib.Service(
    scoring,
    lambda: columns.Columns.of_scorer(scoring.scorer),
    config or app_lib.AppConfig(timeout_s=600),
    **options,
  )


@contextlib.contextmanager
def running(
  service,
  *,
  with_page=False,
  background=(),
  ready=True,
  sockets=None,
  **options,
):
  """Serves in a thread, at a free port, or at `sockets`."""
  routes = page.of_run(service, service.engine, 'yes') if with_page else []
  app = app_lib.make_app(service, routes=routes, background=background)
  found = server.Server(service, app, port=0, drain_s=0, **options)
  thread = threading.Thread(target=found.run, args=[sockets])
  thread.start()
  try:
    while not found.started:
      assert thread.is_alive()
      threading.Event().wait(0.01)
    port = found.servers[0].sockets[0].getsockname()[1]
    url = f'http://127.0.0.1:{port}'
    with httpx.Client(base_url=url, timeout=600) as http:
      while ready and http.get('/health/ready').status_code != 200:
        threading.Event().wait(0.01)
      yield Running(url, service, found, http)
  finally:
    found.should_exit = True
    thread.join(300)
    assert not thread.is_alive()


@pytest.fixture(scope='module')
def served(scored):
  """A server of the run, with the page."""
  with running(service_of(scored), with_page=True) as found:
    yield found


def connect(found: Running) -> socket.socket:
  """A connection that speaks no HTTP by itself."""
  port = int(found.url.rpartition(':')[2])
  return socket.create_connection(('127.0.0.1', port), timeout=300)
