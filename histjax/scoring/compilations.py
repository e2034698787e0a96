"""How many programs XLA compiled, by what caused them."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax

_EVENT = '/jax/core/compile/backend_compile_duration'


class Counter:
  """Counts the programs compiled within `call`, by the thread in it.

  Attributes:
    number: of them so far. One that is found in a persistent cache counts.
  """

  def __init__(self):
    self.number = 0
    _listen()

  def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function; counts here what is compiled for it."""
    token = _active.set(self)
    try:
      return function(*arguments)
    finally:
      _active.reset(token)


_active: contextvars.ContextVar[Counter | None] = contextvars.ContextVar(
  'active', default=None
)


@functools.cache
def _listen() -> None:
  """Once, since JAX keeps listeners for good."""

  def on_event(event: str, duration_secs: float, **kwargs: Any) -> None:
    del duration_secs, kwargs
    counter = _active.get()
    if counter is not None and event == _EVENT:
      counter.number += 1

  jax.monitoring.register_event_duration_secs_listener(on_event)
