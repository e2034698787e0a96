"""The application in uvicorn: deadlines of connections, and a graceful end.

What of uvicorn is no option of it is in this file.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import importlib
import ipaddress
import os
import pathlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import uvicorn
from absl import logging
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from histjax import buckets as bucket_lib
from histjax.quantization import Kind
from histjax.scoring import Scorer, ScorerConfig
from histjax.serving import planning
from histjax.serving.app import RunEngine, Service
from histjax.serving.cache_store import StoreConfig
from histjax.serving.columns import Columns
from histjax.serving.engine import Engine, EngineConfig
from histjax.training import run as run_lib
from histjax.training import step_folders

_HEAD_S = 10.0
"""A request's line and headers must come in this time."""
_NEW_EVENTS = 16  # Of a request; with more the history is read again.
_EVENTS = 256
"""Of a history, where the run does not bound it."""
_RETRY_S = 300.0
"""Between tries to serve what cannot be read, at most, as it stays the same."""
_CPU_ROWS = 8
"""In a program: on a CPU more of them take as long as several programs."""


class _Protocol(H11Protocol):
  """Closes connections whose request does not come.

  uvicorn has a limit for what is idle after a response, none for a client that
  sends nothing, or its headers byte by byte.
  """

  _deadline: asyncio.TimerHandle | None = None

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    self._arm()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.cycle is None or self.cycle.response_complete:
      if self._deadline is None and self.timeout_keep_alive_task is None:
        self._arm()
    else:
      self._disarm()

  def connection_lost(self, exc: Exception | None) -> None:
    self._disarm()
    super().connection_lost(exc)

  def _arm(self) -> None:
    self._deadline = self.loop.call_later(_HEAD_S, self.transport.abort)

  def _disarm(self) -> None:
    if self._deadline is not None:
      self._deadline.cancel()
      self._deadline = None


class Server(uvicorn.Server):
  """Drains at SIGTERM or SIGINT, and ends if the warm-up fails.

  At first `/health/ready` says 503 and requests are scored as before, so that
  a balancer can look elsewhere; after `drain_s` no connection is accepted, what
  is in flight is answered, and the process ends. A second signal skips that
  wait. After a warm-up that failed `run` returns, and `Service.failure` says
  why: nothing would ever be scored.
  """

  def __init__(
    self,
    service: Service,
    app: Starlette,
    host: str = '127.0.0.1',
    port: int = 8000,
    drain_s: float = 1.0,
    *,
    max_connections: int = 2048,
  ):
    """Makes a server; `run` it in the main thread.

    Args:
      service: of the application.
      app: of `make_app`.
      host: address to listen at.
      port: to listen at.
      drain_s: see above.
      max_connections: more than these are answered 503.
    """
    if not 0 <= drain_s <= 3600:
      raise ValueError(f'drain_s={drain_s} must be in [0, 3600]')
    super().__init__(
      uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Protocol,
        ws='none',
        lifespan='on',
        access_log=False,
        log_level='warning',
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=30,
        limit_concurrency=max_connections,
      )
    )
    self._service, self._drain_s = service, drain_s
    self._loop: asyncio.AbstractEventLoop | None = None

  async def startup(self, sockets=None) -> None:
    """See uvicorn."""
    self._loop = asyncio.get_running_loop()
    await super().startup(sockets)

  async def on_tick(self, counter: int) -> bool:
    """See uvicorn; whether to end."""
    return await super().on_tick(counter) or self._service.failure is not None

  def handle_exit(self, sig: int, frame) -> None:
    """See uvicorn; a handler of signals."""
    if self._service.state == 'draining' or self._loop is None:
      super().handle_exit(sig, frame)
      return
    self._service.drain()
    self._loop.call_soon_threadsafe(
      self._loop.call_later, self._drain_s, self._end, sig, frame
    )

  def _end(self, sig: int, frame) -> None:
    if not self.should_exit:  # Else uvicorn takes it for another signal.
      super().handle_exit(sig, frame)


def listen(host: str, port: int) -> list[socket.socket]:
  """Sockets for `Server.run`, at each address of the host.

  Connections wait in them until it runs; nobody else gets the port.

  Args:
    host: name or address to listen at.
    port: to listen at; 0: a free one.

  Raises:
    OSError: there is no such address, or the port is taken.
  """
  found: list[socket.socket] = []
  wanted = port
  try:
    for family, kind, protocol, _, address in socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
      try:
        one = socket.socket(family, kind, protocol)
      except OSError:  # Of a family that this machine lacks, as asyncio.
        continue
      found.append(one)
      if os.name == 'posix':  # Elsewhere it lets others take the port.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
      one.bind((address[0], wanted, *address[2:]))
      wanted = one.getsockname()[1]  # One port, if any will do, for all.
      one.listen(2048)
  except OSError:
    for one in found:
      one.close()
    raise
  return found


def is_loopback(listener: socket.socket) -> bool:
  """Whether only this machine reaches a socket of `listen`."""
  address = listener.getsockname()[0].partition('%')[0]
  return ipaddress.ip_address(address).is_loopback


def make_engine(
  workdir: str,
  rows: int,
  events: Sequence[int] | None,
  candidates: int,
  cache_dir: str | None = None,
  store: StoreConfig | None = None,
  cache_dtype: Kind | None = None,
  which: Literal['best', 'latest'] = 'best',
  modules: Sequence[str] = (),
) -> tuple[Engine, Callable[[], Any]]:
  """The engine of a run with few `buckets`, and what compiles all of them.

  Args:
    workdir: of the run.
    rows: see `buckets`; on a CPU no more than 8 share a program.
    events: see `buckets`; None: what the run's rows need.
    candidates: see `buckets`.
    cache_dir: see `Scorer.warm_up`.
    store: how much is kept of users.
    cache_dtype: as `ScorerConfig`.
    which: the parameters that are best on validation, or the latest.
    modules: to import first, of derived features of your own.

  Raises:
    ValueError: as `buckets` and `Engine`, or the store can hold no state of so
      many events.
  """
  for name in modules:  # A replica has another process than a frontend.
    importlib.import_module(name)
  run = run_lib.load(workdir, which)
  on_cpu = jax.default_backend() == 'cpu'
  rows = min(rows, _CPU_ROWS) if on_cpu else rows
  config = dataclasses.replace(
    buckets(rows, events or default_events(run), candidates),
    cache_dtype=cache_dtype,
  )
  engine = Engine(
    Scorer.of_run(run, config),
    EngineConfig(
      store or StoreConfig(),
      max_rows=rows,
      max_new_events=config.new_event_buckets[-1],
      pad_rows=not on_cpu,
    ),
    scorer_config=config,
    which=which,
  )
  engine.store.check_room(config.history_buckets[-1])
  # Without the run, whose parameters are not served for ever.
  return engine, functools.partial(
    engine.warm_up,
    rows=rows,
    events=config.history_buckets[-1],
    candidates=candidates,
    cache_dir=cache_dir,
  )


def and_settle(warm_up: Callable[[], Any]) -> None:
  """Warms up; what is there then is never looked at by garbage collection.

  A pass over all objects of JAX stops every thread, for 0.3 s. For a process
  that does nothing but serve.
  """
  warm_up()
  gc.collect()
  gc.freeze()


def buckets(rows: int, events: Sequence[int], candidates: int) -> ScorerConfig:
  """Few: each combination of them is a program to compile.

  What is larger than the largest is refused; it would compile for seconds
  while others wait.

  Args:
    rows: users in a batch, at most.
    events: lengths that histories are padded to.
    candidates: of a request, at most.
  """
  for name, value in (('events', min(events)), ('candidates', candidates)):
    if value < 1:
      raise ValueError(f'warm_up: {name}={value} must be at least 1')
  few = {1, 2, 4, 8} if rows <= 8 else {1, 8}
  return ScorerConfig(
    row_buckets=tuple(sorted({n for n in few if n <= rows} | {rows})),
    history_buckets=tuple(sorted(set(events))),
    candidate_buckets=(min(candidates, ScorerConfig().microbatch),),
    new_event_buckets=tuple(sorted({1, min(_NEW_EVENTS, *events)})),
  )


def default_events(run: run_lib.Run) -> list[int]:
  """The length of states that rows of the run need; if long, a quarter, too."""
  data = run.config.data
  length = (data.eval_rows or data.rows).history_length
  most = planning.longest_state(run.config.model, length)
  most = _EVENTS if most is None else bucket_lib.bucket_size(most)
  return [most // 4, most] if most > 512 else [most]


async def watch(
  service: Service,
  workdir: str,
  engine: RunEngine,
  every_s: float,
  which: Literal['best', 'latest'] = 'best',
  seen: tuple | None = None,
  tell: Callable[[str], Any] = logging.info,
) -> None:
  """Rolls over to the workdir's parameters whenever they change.

  They are read in a thread, and the engine puts them in place between two
  batches: no request is dropped, and none is scored by both. What cannot be
  read is reported, once as long as it stays so, leaves the old ones in place,
  and is tried again after longer and longer. A run of other columns is served,
  too, and reported with them.

  Args:
    service: counts roll-overs.
    workdir: of the run.
    engine: of the service.
    every_s: seconds between looks; 0: none.
    which: parameters, the best or the latest.
    seen: the workdir's `listing` before the engine read its parameters. None:
      the first look reads them again, and compares.
    tell: of each roll-over, in a line.
  """
  if not every_s:
    return
  failure, failed, wait_s, again = '', None, every_s, 0.0
  while True:
    await asyncio.sleep(every_s)
    now = await asyncio.to_thread(listing, workdir)
    if now == seen or (now == failed and time.monotonic() < again):
      continue
    seen = now
    try:
      lines = await asyncio.to_thread(_roll_over, workdir, engine, which)
    except Exception as error:  # Training goes on, or somebody copies.
      service.metrics.roll_overs.labels('failed').inc()
      if failure != (failure := f'{type(error).__name__}: {error}'):
        logging.error('%s is not served: %s', workdir, failure)
      # Again, with what is there then; of the same, less and less often.
      longest = max(every_s, _RETRY_S)
      wait_s = min(2 * wait_s, longest) if now == failed else every_s
      seen, failed, again = None, now, time.monotonic() + wait_s
      continue
    failure, failed = '', None
    if lines:
      service.metrics.roll_overs.labels('done').inc()
    for line in lines:
      tell(line)


def _roll_over(
  workdir: str, engine: RunEngine, which: Literal['best', 'latest']
) -> list[str]:
  """What to tell of it; nothing: the same model is there."""
  old = engine.scorer
  scorer = Scorer.from_workdir(workdir, which, old.options)
  if scorer.fingerprint == engine.fingerprint:
    return []
  engine.roll_over(scorer)
  assert scorer.run is not None  # It is of a workdir.
  step = scorer.run.meta['best_step' if which == 'best' else 'step']
  lines = [
    f'serves the model {scorer.fingerprint[:12]} of step {step}, {workdir}'
  ]
  if found := Columns.of_scorer(scorer).changes(Columns.of_scorer(old)):
    lines.append(
      f'warning: it reads other columns than the model before: {found}; '
      'requests that do not have them are refused with 422'
    )
  if _is_beyond(scorer) and not _is_beyond(old):
    lines.append(
      'warning: its rows may be longer than the '
      f'{scorer.options.history_buckets[-1]} events that programs are made '
      'for; such histories are refused with 413 until the server is started '
      'again for them (--warm_up)'
    )
  return lines


def _is_beyond(scorer: Scorer) -> bool:
  """Whether rows of the run may be longer than programs are made for."""
  length, largest = (
    scorer.row_maker().config.history_length,
    scorer.options.history_buckets[-1:],
  )
  if not largest or scorer.config.receptive_field is not None:
    return False  # Of a window states that are too short are an error.
  return length is None or length > largest[0]


def listing(workdir: str) -> tuple:
  """What changes whenever a checkpoint is written or deleted."""
  try:
    folders = step_folders.of(pathlib.Path(workdir)).iterdir()
    return tuple(sorted((f.name, f.stat().st_mtime_ns) for f in folders))
  except OSError:
    return ()
