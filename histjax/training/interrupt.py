"""SIGTERM and SIGINT end a run between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
  """Remembers that a signal came; a second SIGINT stops at once.

  A context manager. Handlers are installed in the main thread only (Python
  has no other place for them) and the previous ones put back at the end. With
  several processes the signals are left to JAX, whose preemption service lets
  all of them stop at the same step.
  """

  def __init__(self) -> None:
    """Installs nothing yet."""
    self.signal: signal.Signals | None = None
    self._previous: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Interrupt:
    if (
      threading.current_thread() is threading.main_thread()
      and jax.process_count() == 1
    ):
      for number in _SIGNALS:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused_exception: object) -> None:
    for number, handler in self._previous.items():
      # None: it was not installed from Python and cannot be put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._previous.clear()

  def received(self) -> bool:
    """Whether this process got a signal."""
    return self.signal is not None

  def requested(self, step: int) -> bool:
    """Whether to stop before `step`; the same in all processes."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.received()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = signal.Signals(number)
