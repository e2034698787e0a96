"""How requests reach the device and logits come back.

On a GPU both lie in pinned host memory that the program itself copies from and
to, and the host looks whether it is done instead of going to sleep. On other
platforms they are NumPy arrays, handed over and fetched.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from histjax.scoring import layout as layout_lib

_SPIN = 3e-4
"""Seconds to look for a result without a pause."""

_LOOK = 5e-3
"""Seconds to look at all before going to sleep, which is waking up late."""


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
  """Room for one request.

  Attributes:
    array: the program's argument, int32 `[layout.size]`.
    buffer: its memory.
    views: where to write it.
    requests: the same, by the requests that share it.
  """

  array: Any
  buffer: np.ndarray
  views: dict[str, layout_lib.View]
  requests: list[dict[str, layout_lib.View]]


@functools.cache
def of_device(device: jax.Device | None) -> Transport:
  """The one transport of a device; None: programs are spread over several."""
  if device is None or device.platform != 'gpu':
    return Transport()
  if os.environ.get('PJRT_GPU_ENABLE_ASYNC_DISPATCH') not in (None, '', '0'):
    # Then arrays in pinned memory are said to be ready before they are written
    # (JAX 0.11.2).
    return Transport()
  kinds = [m.kind for m in device.addressable_memories()]
  return Transport(device if 'pinned_host' in kinds else None)


class Transport:
  """To and from one device, or several; see `of_device`."""

  def __init__(self, device: jax.Device | None = None):
    """Makes a transport.

    Args:
      device: whose programs read and write pinned memory of the host; None:
        they are given NumPy arrays.
    """
    self._pinned = self._device = None
    if device is not None:
      self._pinned = jax.sharding.SingleDeviceSharding(
        device, memory_kind='pinned_host'
      )
      self._device = jax.sharding.SingleDeviceSharding(device)
    # Of each layout, the slots that no program will read any more, and those
    # that one may still read, with a result of it. A slot that never comes back
    # is garbage as soon as its program has read it.
    self._free: dict[layout_lib.Layout, collections.deque[Slot]] = (
      collections.defaultdict(collections.deque)
    )
    self._lent: dict[layout_lib.Layout, collections.deque[tuple[Slot, Any]]] = (
      collections.defaultdict(collections.deque)
    )

  @property
  def output(self) -> Any:
    """`out_shardings` of what is fetched."""
    return self._pinned

  @property
  def options(self) -> dict[str, str]:
    """Of XLA, for programs."""
    return {}

  def read(self, request: Any) -> tuple[Any, Any]:
    """The request on the device, and what `done` is given; in a program."""
    if self._pinned is not None:
      request = jax.device_put(request, self._device)
    return request, None

  def ready(self, begun: Any, logits: Any, pool: Any) -> tuple[Any, Any]:
    """The logits, and the pool that is still to be written; in a program."""
    del begun
    return logits, pool

  def done(self, begun: Any, logits: Any, *states: Any) -> Any:
    """The logits, once these states are written as well; in a program."""
    del begun, states
    return logits

  def slot(self, layout: layout_lib.Layout) -> Slot:
    """A free slot. What it holds is left over."""
    try:
      return self._free[layout].pop()
    except IndexError:
      pass
    try:
      slot, result = self._lent[layout].popleft()
      # NumPy's: of jax.disable_jit.
      if isinstance(result, np.ndarray) or result.is_ready():
        return slot
      self._lent[layout].appendleft((slot, result))
    except IndexError:
      pass
    buffer = np.zeros(layout.size, np.int32)
    if self._pinned is None:
      views = layout.views(buffer)
      return Slot(buffer, buffer, views, layout.split(views))
    pinned = jax.device_put(buffer, self._pinned)
    pinned.block_until_ready()
    # JAX has no other way to write where it reads. Nothing else does, and no
    # program that reads it is running when a slot is free.
    memory: Any = (ctypes.c_int32 * layout.size).from_address(
      pinned.unsafe_buffer_pointer()
    )
    memory.owner = pinned  # For as long as a program or a view has it.
    buffer = np.frombuffer(memory, np.int32)
    views = layout.views(buffer)
    return Slot(pinned, buffer, views, layout.split(views))

  def release(
    self,
    layout: layout_lib.Layout,
    slot: Slot,
    result: Any = None,
  ) -> None:
    """Takes a slot back.

    Args:
      layout: its.
      slot: of `slot`.
      result: of the program that reads it, to see when it has; None: it has.
    """
    if result is None:
      self._free[layout].append(slot)
    else:
      self._lent[layout].append((slot, result))

  def fetch(self, array: Any) -> np.ndarray:
    """The array in host memory, waited for."""
    if self._pinned is not None:
      look(array.is_ready)
    return np.asarray(array)


def look(is_ready: Callable[[], bool]) -> bool:
  """Whether it is ready, if need be after some milliseconds of looking."""
  if is_ready():
    return True
  begin = time.perf_counter()
  while not is_ready():
    waited = time.perf_counter() - begin
    if waited > _LOOK:
      return False
    if waited > _SPIN:
      time.sleep(0)  # Other threads of Python run meanwhile.
  return True
