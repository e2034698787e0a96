"""The death of one process ends the others, with a line that names it.

JAX notices a silent process after its heartbeat timeout, and a collective may
wait for ever. So each process holds a connection to process 0. The kernel
closes it as soon as a process dies, however it dies, and gives it up when a
host is gone or cannot be reached, within 20 s; no thread of Python has to be on
time for that. A process that is alive but hangs is left to JAX's heartbeat.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from histjax.training import processes

_KEY = 'histjax/watchdog'
_GRACE_S = 2.0
"""In which the cause of an error may turn out to be the loss of another."""
_HELLO_S = 5.0
"""In which who has connected must say who it is."""
_LEAVE_S = 2 * _HELLO_S
"""In which process 0 tells all others that it leaves."""

_active: Watchdog | None = None
_count = 0


@contextlib.contextmanager
def watching() -> Iterator[None]:
  """Within, if one process is lost or fails, all others end.

  They write one line to stderr and exit with `processes.EXIT_CODE`. All
  processes have to enter it. With one process, or if it was entered already,
  it does nothing.
  """
  global _active, _count
  if _active is not None or jax.process_count() == 1:
    yield
    return
  _active, _count = Watchdog(f'{_KEY}/{_count}'), _count + 1
  try:
    yield
  except BaseException as e:
    text = str(e) if isinstance(e, SystemExit) else f'{type(e).__name__}: {e}'
    _active.failed(text)
    raise
  else:
    _active.close()
  finally:
    _active = None


@contextlib.contextmanager
def joined(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Iterator[None]:
  """Within, this is one process of several; for the whole of a program.

  An error ends this process at once, after it was written to stderr, and the
  others as `watching` says: the usual end of Python waits for all of them, and
  they may wait for this one.

  Args:
    coordinator_address: see `processes.initialize`.
    num_processes: of the job, see `processes.initialize`.
    process_id: of this one, from 0.

  Raises:
    ValueError: as `processes.initialize`.
  """
  processes.initialize(coordinator_address, num_processes, process_id)
  try:
    with watching():
      yield
  except BaseException as e:
    if isinstance(e, SystemExit):
      processes.write(str(e.code))
    else:
      traceback.print_exc()
    with contextlib.suppress(OSError):
      sys.stdout.flush()
    os._exit(1)


class Watchdog:
  """Of this process; see `watching`."""

  def __init__(self, key: str):
    """Connects; with process 0, which waits for nobody."""
    self._me = processes.whoami()
    self._closed = threading.Event()
    self._names = {0: 'process 0'}
    self._sockets: dict[int, socket.socket] = {}
    self._last: dict[str, Any] = {}
    if self._me['process'] == 0:
      server = _listen()
      port, self._token = server.getsockname()[1], secrets.token_hex(16)
      processes.publish(key, json.dumps([port, self._token, self._me]))
      self._start(functools.partial(self._watch_all, server))
      return
    port, self._token, first = json.loads(processes.wait_for(key))
    self._names[0] = _name(first)
    found = self._connect(processes.coordinator_host(), port)
    if found is not None:
      self._start(functools.partial(self._watch_first, found))

  def close(self) -> None:
    """Leaves in peace."""
    self._leave({'bye': True})

  def failed(self, reason: str) -> None:
    """Tells the others why this one ends, unless another one is lost."""
    if not self._closed.wait(_GRACE_S):
      first_line = reason.strip().split('\n')[0]
      self._leave({'end': f'{_name(self._me)} failed: {first_line}'})

  def _leave(self, last: dict[str, Any]) -> None:
    """After this, no thread of this one ends anything."""
    self._last = last
    self._closed.set()
    if self._me['process'] == 0:
      self._thread.join(_LEAVE_S)  # It tells them, then closes connections.
    else:
      self._tell(last)

  def _start(self, watch: Callable[[], None]) -> None:
    self._thread = threading.Thread(
      target=watch, name='histjax-watchdog', daemon=True
    )
    self._thread.start()

  def _connect(self, host: str, port: int) -> socket.socket | None:
    try:
      found = socket.create_connection((host, port), timeout=20)
    except OSError as e:
      processes.write(
        f'{_name(self._me)} cannot reach port {port} of {self._names[0]} at '
        f'{host} ({e}): that a process is lost will show in the heartbeat of '
        'JAX alone'
      )
      return None
    found.settimeout(None)
    _keep_alive(found)
    self._sockets[0] = found
    self._tell({'hello': self._me, 'token': self._token})
    return found

  def _tell(self, message: dict[str, Any]) -> None:
    """To those that this one is connected to."""
    data = json.dumps(message).encode() + b'\n'
    for peer in self._sockets.values():
      with contextlib.suppress(OSError):  # It is gone, which will show.
        peer.sendall(data)

  def _watch_first(self, first: socket.socket) -> None:
    """In every process but the first: reads until process 0 is gone."""
    for message in _messages(first):
      if 'bye' in message:
        return
      self._end(message['end'])
    self._end(f'{self._names[0]} is lost: its connection was closed')

  def _watch_all(self, server: socket.socket) -> None:
    """In process 0."""
    with selectors.DefaultSelector() as selector, server:
      server.settimeout(0)
      selector.register(server, selectors.EVENT_READ)
      while not self._closed.is_set():
        for ready, _ in selector.select(timeout=0.1):
          if ready.fileobj is server:
            for number in self._accepted(server):
              selector.register(
                self._sockets[number], selectors.EVENT_READ, number
              )
            continue
          number = ready.data
          peer = self._sockets[number]
          message = next(_messages(peer), {'end': None})
          if 'bye' in message:
            selector.unregister(peer)
            continue
          name = self._names[number]
          line = message['end'] or f'{name} is lost: its connection was closed'
          self._sockets.pop(number)
          self._end(line)
      # Whoever is not accepted would see a closed connection: a loss.
      for _ in self._accepted(server):
        pass
      self._tell(self._last)
    for peer in self._sockets.values():
      peer.close()

  def _accepted(self, server: socket.socket) -> Iterator[int]:
    """The processes that have connected since, by their numbers."""
    while True:
      try:
        peer, _ = server.accept()
      except OSError:  # No more; or it has gone already.
        return
      peer.settimeout(_HELLO_S)
      hello = next(_messages(peer), {})
      if hello.get('token') != self._token:
        peer.close()  # It is none of ours.
        continue
      _keep_alive(peer)
      number = int(hello['hello']['process'])
      self._names[number] = _name(hello['hello'])
      self._sockets[number] = peer
      yield number

  def _end(self, line: str) -> None:
    if self._closed.is_set():
      return
    processes.write(
      f'{line}. {_name(self._me)} ends, too; the same command goes on from the '
      'last checkpoint'
    )
    if self._me['process'] == 0 and self._sockets:
      self._tell({'end': line})
      time.sleep(1)  # JAX would abort the others as soon as this one is gone.
    # The main thread may wait in a collective for ever.
    os._exit(processes.EXIT_CODE)


def _name(who: dict[str, Any]) -> str:
  return f'process {who["process"]} (host {who["host"]}, pid {who["pid"]})'


def _listen() -> socket.socket:
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', 0), family=socket.AF_INET6, dualstack_ipv6=True
    )
  return socket.create_server(('', 0))


def _keep_alive(peer: socket.socket) -> None:
  """The kernel gives it up when nothing has come for 20 s."""
  peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in (
    ('TCP_KEEPIDLE', 5),
    ('TCP_KEEPINTVL', 5),
    ('TCP_KEEPCNT', 3),
    ('TCP_USER_TIMEOUT', 20_000),
  ):
    if hasattr(socket, name):
      peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _messages(peer: socket.socket) -> Iterator[dict[str, Any]]:
  """What comes, a JSON object a line, until the connection is closed."""
  held = b''
  while True:
    try:
      # Byte by byte, so that nothing of the next message is taken away.
      byte = peer.recv(1)
    except OSError:
      return
    if not byte:
      return
    if byte == b'\n':
      try:
        yield dict(json.loads(held))
      except (TypeError, ValueError):  # It is none of ours.
        return
      held = b''
    elif len(held) > 10_000:
      return
    else:
      held += byte
