"""How an operation picks one of its backends."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

_record: contextvars.ContextVar[dict[str, set[str]] | None] = (
  contextvars.ContextVar('record', default=None)
)


class Backend(NamedTuple):
  """One implementation of an operation.

  Attributes:
    call: the operation. Raises NotImplementedError, while being traced, at
      arguments that it cannot compute.
    check_device: raises NotImplementedError at a device that it cannot run on.
    suits: whether to pick it unasked for these arguments.
  """

  call: Callable[..., jax.Array]
  check_device: Callable[[jax.Device], None]
  suits: Callable[..., bool] = lambda *args, **kwargs: True


def any_device(device: jax.Device) -> None:
  """Accepts every device."""
  del device


def check_implementation(
  backends: Mapping[str, Backend], implementation: str | None
) -> None:
  """Raises ValueError at a name that no backend has."""
  if implementation is not None and implementation not in backends:
    raise ValueError(
      f'implementation={implementation!r} is unknown; use one of '
      f'{", ".join(map(repr, backends))}, or None for the fastest'
    )


@contextlib.contextmanager
def record() -> Iterator[dict[str, set[str]]]:
  """Collects `{operation: names of backends}` of the calls traced within."""
  used: dict[str, set[str]] = {}
  token = _record.set(used)
  try:
    yield used
  finally:
    _record.reset(token)


def names(used: Mapping[str, set[str]]) -> dict[str, str]:
  """`{operation: name}` of what `record` has collected, sorted."""
  return {k: ', '.join(sorted(v)) for k, v in sorted(used.items())}


def run(
  operation: str,
  backends: Mapping[str, Backend],
  implementation: str | None,
  device: jax.Device,
  *args: Any,
  **kwargs: Any,
) -> tuple[str, jax.Array]:
  """Runs the named backend, or the first that can; returns its name too.

  Raises:
    NotImplementedError: the named backend cannot compute this.
  """
  for name in backends if implementation is None else [implementation]:
    backend = backends[name]
    try:
      backend.check_device(device)
      if implementation is None and not backend.suits(*args, **kwargs):
        continue
      out = backend.call(*args, **kwargs)
    except NotImplementedError:
      if implementation is not None:
        raise
      continue
    used = _record.get()
    if used is not None:
      used.setdefault(operation, set()).add(name)
    return name, out
  raise AssertionError('some backend computes every call')


def device_of(x: Any) -> jax.Device:
  """Where a call will run: where `x` is, else the default device."""
  if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    return next(iter(x.devices()))
  config: Any = jax.config
  default = config.jax_default_device
  if default is None:
    return jax.local_devices()[0]
  if isinstance(default, str):
    return jax.local_devices(backend=default)[0]
  return default
