"""How an operation picks one of its backends."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from histjax.ops import devices

_record: contextvars.ContextVar[dict[str, set[str]] | None] = (
  contextvars.ContextVar('record', default=None)
)
# Of JAX, whose caches of traces and programs tell its values apart.
_context: Any = jax.make_user_context(None)


class Backend(NamedTuple):
  """One implementation of an operation.

  Attributes:
    call: the operation. Raises NotImplementedError, while being traced, at
      arguments that it cannot compute.
    check_target: raises NotImplementedError at a target that it cannot run on.
    suits: whether to pick it unasked for these arguments.
  """

  call: Callable[..., Any]
  check_target: Callable[[devices.Target], None]
  suits: Callable[..., bool] = lambda *args, **kwargs: True


def any_target(target: devices.Target) -> None:
  """Accepts every target."""
  del target


def lazy(module: str, name: str) -> Callable[..., jax.Array]:
  """The function `name` of a module that is imported when it is called.

  A kernel's module may import what JAX does not promise to keep. Should that
  move, this kernel alone is lost: the call raises NotImplementedError.
  """

  def call(*args, **kwargs):
    try:
      function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
      raise NotImplementedError(
        f'{module.rpartition(".")[2]} cannot be imported with JAX '
        f'{jax.__version__}: {error}'
      ) from error
    return function(*args, **kwargs)

  return call


@contextlib.contextmanager
def target_platform(
  platform: str, *, compute_capability: str = '', serialized: bool = False
) -> Iterator[None]:
  """Traces programs for this platform, whatever this machine has.

  Operations traced within pick the implementations of the platform, as to
  export a program for another machine. Outside of it the target is the device
  that the arguments lie on, or else JAX's default device.

      with ops.target_platform(
        'cuda', compute_capability='9.0', serialized=True
      ):
        exported = jax.export.export(jax.jit(f), platforms=['cuda'])(*shapes)

  Args:
    platform: 'cpu', 'cuda', 'rocm' or 'tpu'.
    compute_capability: of an NVIDIA GPU: '9.0' is Hopper. Without it no kernel
      is picked that asks for one.
    serialized: pick none whose calls `jax.export` does not guarantee to keep,
      as cuDNN's and those of NumPy.

  Raises:
    ValueError: no such platform, or a compute capability that is no number.
  """
  if platform not in devices.PLATFORMS:
    raise ValueError(
      f'platform={platform!r} is unknown; use one of {devices.PLATFORMS}'
    )
  try:
    float(compute_capability or 0)
  except ValueError:
    raise ValueError(
      f"compute_capability={compute_capability!r} must be a number: '9.0'"
    ) from None
  target = devices.Target(platform, compute_capability, serialized=serialized)
  with on(target):
    yield


def on(target: devices.Target) -> contextlib.AbstractContextManager[Any]:
  """Operations traced within are for `target`."""
  return _context(target)


def target_of(x: Any = None) -> devices.Target:
  """What a call is for: the context's target, else where `x` is.

  That is its device, or for an array that is traced, or none, the default one.
  """
  return _context.value or devices.Target.of(device_of(x))


def check_implementation(
  backends: Mapping[str, Backend],
  implementation: str | None,
  field: str = 'implementation',
) -> None:
  """Raises ValueError, of this field, at a name that no backend has."""
  if implementation is not None and implementation not in backends:
    raise ValueError(
      f'{field}={implementation!r} is unknown; use one of '
      f'{", ".join(map(repr, backends))}, or None for the fastest'
    )


@contextlib.contextmanager
def record() -> Iterator[dict[str, set[str]]]:
  """Collects `{operation: names of backends}` of the calls traced within."""
  used: dict[str, set[str]] = {}
  outer = _record.get()
  token = _record.set(used)
  try:
    yield used
  finally:
    _record.reset(token)
    if outer is not None:
      for operation, found in used.items():
        outer.setdefault(operation, set()).update(found)


def names(used: Mapping[str, set[str]]) -> dict[str, str]:
  """`{operation: name}` of what `record` has collected, sorted."""
  return {k: ', '.join(sorted(v)) for k, v in sorted(used.items())}


def run(
  operation: str,
  backends: Mapping[str, Backend],
  implementation: str | None,
  target: devices.Target,
  *args: Any,
  **kwargs: Any,
) -> tuple[str, Any]:
  """Runs the named backend, or the first that can; returns its name too.

  Within, `target_of` gives `target`.

  Raises:
    NotImplementedError: the named backend, or each, cannot compute this.
  """
  for name in backends if implementation is None else [implementation]:
    backend = backends[name]
    try:
      backend.check_target(target)
      if implementation is None and not backend.suits(*args, **kwargs):
        continue
      with on(target):
        out = backend.call(*args, **kwargs)
    except NotImplementedError:
      if implementation is not None:
        raise
      continue
    used = _record.get()
    if used is not None:
      used.setdefault(operation, set()).add(name)
    return name, out
  raise NotImplementedError(
    f'{operation}: none of {", ".join(backends)} computes this on {target}'
  )


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
