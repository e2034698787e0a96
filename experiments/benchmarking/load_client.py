"""A server in a process of its own, and a client that takes little time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from benchmarking.load import Record, Users
from histjax.serving import messages

_FOLDER = pathlib.Path(__file__).parents[1]


def run(
  url: str,
  users: Users,
  records: Sequence[Record],
  *,
  timeout: float = 5.0,
  connections: int = 64,
  open_loop: bool = True,
) -> float:
  """Sends requests at their times; fills in the records.

  Args:
    url: of the server, on this machine.
    users: whose they are.
    records: of `Users.schedule`.
    timeout: seconds, of each.
    connections: at most.
    open_loop: False: each connection sends its next request when it has an
      answer, and times are from then on.

  Returns:
    Seconds until the last reply.
  """
  gc.collect()
  gc.disable()  # It would stop all for tens of milliseconds.
  try:
    return asyncio.run(
      _run(url, users, records, timeout, connections, open_loop)
    )
  finally:
    gc.enable()


class _Connections:
  """Of HTTP/1.1, kept alive. A library's client takes a millisecond a request.

  That is as much as the server's own HTTP takes, on the same cores.
  """

  def __init__(self, url: str, number: int):
    host, _, port = url.removeprefix('http://').partition(':')
    self._address = host, int(port)
    self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    self._left = asyncio.Semaphore(number)
    self._head = (
      f'POST /v1/score HTTP/1.1\r\nhost: {host}\r\ncontent-type: '
      f'{messages.MSGPACK}\r\naccept: {messages.MSGPACK}\r\ncontent-length: '
    )

  async def post(self, body: bytes) -> tuple[int, bytes]:
    """Status and body."""
    async with self._left:
      if self._free:
        reader, writer = self._free.pop()
      else:
        reader, writer = await asyncio.open_connection(*self._address)
      try:
        writer.write(f'{self._head}{len(body)}\r\n\r\n'.encode() + body)
        head = (await reader.readuntil(b'\r\n\r\n')).lower()
        length = head.partition(b'content-length:')[2].partition(b'\r')[0]
        content = await reader.readexactly(int(length))
      except BaseException:
        writer.close()
        raise
      if b'connection: close' in head:
        writer.close()
      else:
        self._free.append((reader, writer))
      return int(head.split(b' ', 2)[1]), content

  def close(self) -> None:
    for _, writer in self._free:
      writer.close()


async def _run(url, users, records, timeout, connections, open_loop) -> float:
  found = _Connections(url, connections)
  begin = time.perf_counter()

  async def send(record):
    async with asyncio.timeout(timeout):
      await _send(found, users, record, begin)

  async def in_turn(left):
    for record in left:
      record.at = time.perf_counter() - begin
      await send(record)

  tasks = []
  if open_loop:
    for record in records:
      wait = begin + record.at - time.perf_counter()
      if wait > 0:
        await asyncio.sleep(wait)
      tasks.append(asyncio.create_task(send(record)))
  else:
    left = iter(records)
    tasks = [asyncio.create_task(in_turn(left)) for _ in range(connections)]
  for result in await asyncio.gather(*tasks, return_exceptions=True):
    if isinstance(result, BaseException) and not isinstance(
      result,
      (OSError, asyncio.IncompleteReadError),  # Timeouts are OSErrors.
    ):
      raise result
  seconds = time.perf_counter() - begin
  found.close()
  return seconds


async def _send(found, users: Users, record: Record, begin: float) -> None:
  body = record.body
  while record.sent < 3:
    record.sent, record.status = record.sent + 1, 0
    record.status, content = await found.post(body)
    if record.status != 409:
      break
    body = users.body(record, 0)  # It was forgotten there.
  if record.status == 200:
    record.latency = time.perf_counter() - begin - record.at
    record.content = content


@dataclasses.dataclass(frozen=True)
class Served:
  """A server's address and process."""

  url: str
  process: int

  def resident_bytes(self) -> int:
    """The most memory that it had; 0 where the system does not tell."""
    try:
      text = pathlib.Path(f'/proc/{self.process}/status').read_text()
    except OSError:
      return 0
    return int(text.partition('VmHWM:')[2].split()[0]) << 10


@contextlib.contextmanager
def server(command: Sequence[str], url: str) -> Iterator[Served]:
  """A binary of experiments/ in a process of its own, ready."""
  name, *arguments = command
  process = subprocess.Popen(
    [sys.executable, str(_FOLDER / name), *arguments],
    env=os.environ | {'PYTHONUNBUFFERED': '1'},
  )
  try:
    deadline = time.monotonic() + 600
    while True:
      if process.poll() is not None:
        raise RuntimeError(f'the server ended with {process.returncode}')
      with contextlib.suppress(httpx.TransportError):
        if httpx.get(f'{url}/health/ready').status_code == 200:
          break
      if time.monotonic() > deadline:
        raise RuntimeError('the server was not ready after 600 s')
      time.sleep(0.2)
    yield Served(url, process.pid)
  finally:
    process.terminate()
    process.wait(60)


def schema(url: str) -> dict[str, Any]:
  """What the server says of its columns."""
  return httpx.get(f'{url}/v1/schema').raise_for_status().json()


def metrics(url: str) -> dict[str, float]:
  """The server's own counts, by name and labels, without histograms."""
  text = httpx.get(f'{url}/metrics', timeout=30).raise_for_status().text
  lines = [x.split() for x in text.splitlines() if x.startswith('histjax_')]
  left_out = re.compile('_bucket{|_created')
  return {
    x[0]: float(x[1])
    for x in lines
    if len(x) == 2 and not left_out.search(x[0])
  }
