"""One run in many processes: how they find each other, what they agree on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed as _distributed  # The only way to its store.

HEARTBEAT_S = 20
"""After which JAX takes a silent process for dead; its default is 100."""
EXIT_CODE = os.EX_TEMPFAIL
"""Of a process that ends since another one is lost or late: try again."""
_WAIT_S = 24 * 3600
"""For another process, whose data may take long to load. It ends sooner if
that one is lost."""

_rounds = itertools.count()


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout_s: int = 300,
) -> None:
  """Joins the processes of a run, before anything else is done with JAX.

  Without arguments JAX finds the others by itself on SLURM, Open MPI, Cloud TPU
  and, with the package `kubernetes`, in an indexed Kubernetes Job.

  Args:
    coordinator_address: 'host:port', of process 0, with a port that is free.
    num_processes: of the run.
    process_id: of this one, from 0.
    timeout_s: for all to come; then this process ends by `end`, since JAX would
      abort it.

  Raises:
    ValueError: some arguments are given and others not, one is out of range,
      or none is given and no cluster was found.
  """
  _check(coordinator_address, num_processes, process_id)
  late = threading.Timer(
    timeout_s,
    end,
    [
      f'not all of {num_processes or "the"} processes came to '
      f'{coordinator_address or "the coordinator"} within {timeout_s} s: start '
      'all of them, each with a process_id of its own, and see that this port '
      'of process 0 can be reached'
    ],
  )
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      initialization_timeout=timeout_s + 60,
      heartbeat_timeout_seconds=HEARTBEAT_S,
    )
  except (ValueError, KeyError) as e:
    if coordinator_address is not None:
      raise
    raise ValueError(
      f'multi_host: no cluster was found ({e}). SLURM, Open MPI, Cloud TPU and '
      'indexed Jobs of Kubernetes (with the package kubernetes) are found by '
      'themselves; elsewhere give each process coordinator_address=host:port, '
      'num_processes and process_id'
    ) from e
  finally:
    late.cancel()


def write(line: str) -> None:
  """To stderr, and not through buffers, which another thread may hold."""
  with contextlib.suppress(OSError):
    stream = sys.__stderr__
    os.write(2 if stream is None else stream.fileno(), f'{line}\n'.encode())


def end(line: str) -> None:
  """Writes a line, and ends this process whatever its threads wait for."""
  write(line)
  os._exit(EXIT_CODE)


def _check(address: str | None, count: int | None, index: int | None) -> None:
  given = {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': index,
  }
  missing = [k for k, v in given.items() if v is None]
  if len(missing) == len(given):
    return
  if address is None or count is None or index is None:
    raise ValueError(
      f'{" and ".join(missing)} must be given, too: coordinator_address, '
      'num_processes and process_id go together, or none of them on a cluster '
      'that JAX knows'
    )
  host, colon, port = address.rpartition(':')
  if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
    raise ValueError(
      f"coordinator_address={address!r} must be 'host:port', as '10.0.0.1:8476'"
    )
  if count < 1:
    raise ValueError(f'num_processes={count} must be >= 1')
  if not 0 <= index < count:
    raise ValueError(
      f'process_id={index} must be in [0, num_processes={count})'
    )


def whoami() -> dict[str, Any]:
  """`process`, `host` and `pid` of this process."""
  return {
    'process': jax.process_index(),
    'host': socket.gethostname(),
    'pid': os.getpid(),
  }


def coordinator_host() -> str:
  """Where process 0 can be reached."""
  address = _distributed.global_state.coordinator_address
  if address is None:
    raise RuntimeError('JAX has no coordinator; call initialize first')
  return address.rpartition(':')[0].strip('[]')


def publish(key: str, value: str) -> None:
  """Tells all processes, once."""
  _client().key_value_set(key, value)


def wait_for(key: str) -> str:
  """What a process publishes under a key."""
  return _client().blocking_key_value_get(key, _WAIT_S * 1000)


def exchange(value: str) -> list[str]:
  """The values of all processes, in their order; all have to call it."""
  if jax.process_count() == 1:
    return [value]
  place = f'histjax/exchange/{next(_rounds)}'
  publish(f'{place}/{jax.process_index()}', value)
  return [wait_for(f'{place}/{i}') for i in range(jax.process_count())]


def check_same(values: Mapping[str, Any]) -> None:
  """Raises ValueError if a process has others than process 0.

  Args:
    values: JSON-able, by what they are.
  """
  texts = {k: json.dumps(v, sort_keys=True) for k, v in values.items()}
  digests = {
    k: hashlib.sha256(v.encode()).hexdigest()[:12] for k, v in texts.items()
  }
  found = [json.loads(x) for x in exchange(json.dumps([whoami(), digests]))]
  for who, other in found:
    for name, digest in digests.items():
      if other[name] != found[0][1][name]:
        raise ValueError(
          f'{name}: that of process {who["process"]} (host {who["host"]}) is '
          'not that of process 0: start all of them by the same command, with '
          f'the same files ({other[name]} and {found[0][1][name]}, of which '
          f'{digest} is that of process {jax.process_index()})'
        )


def check_shared(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder is not one and the same for all processes."""
  if jax.process_count() == 1:
    return
  mark = folder / f'.process-{jax.process_index()}-{secrets.token_hex(4)}'
  mark.touch()
  try:
    found = exchange(json.dumps([whoami(), mark.name]))
    for who, name in map(json.loads, found):
      if not (folder / name).exists():
        raise ValueError(
          f'workdir={str(folder)!r} of process {jax.process_index()} (host '
          f'{socket.gethostname()}) is not that of process {who["process"]} '
          f'(host {who["host"]}): name a folder that all hosts share'
        )
    exchange('seen')
  finally:
    mark.unlink()


def _client() -> Any:
  client = _distributed.global_state.client
  if client is None:
    raise RuntimeError('JAX knows no other processes; call initialize first')
  return client
