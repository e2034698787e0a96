"""Programs replayed as CUDA graphs, without XLA's dispatch.

To start a program costs XLA 100 to 200 us of the host's time, as much as all of
a request's kernels. So `Scorer.warm_up` records what XLA gives its stream in a
call of a program, from before its first kernel (when XLA initializes a custom
call in it) to a custom call at its end. A request is then: write into pinned
memory, launch the graph (copy in, the recorded kernels, copy out), look at an
event. What a program writes into a pool comes in a graph of its own behind
that event.

A graph holds addresses. Parameters, outputs and the copies of a cache are
arrays that are held; a pool's memory is compared at each call. The program's
temporary memory, which XLA takes and gives back at each call, is taken for good
(`_Hole`). All replays go to XLA's own stream, so they and programs that
are called as usual see one another's writes in order.

Of the recorded kernels, ours begin while the one before them ends, if they are
few (`ops.dependent`).

What cannot be recorded so, or does not give bit for bit what the program gives,
is refused with the reason (`CannotRecordError`), and the program is called.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from histjax.ops import dependent
from histjax.scoring import cuda, transport

_BEGIN, _END = 'histjax_graph_begin', 'histjax_graph_end'
_READY = 'histjax_graph_ready'
_ALIGN = 256
"""Bytes: what XLA's allocator rounds sizes to."""
_KERNEL, _COPY, _FILL = range(3)
_NOTHING = ('parameter', 'constant', 'get-tuple-element', 'bitcast', 'tuple')
"""Instructions that give the device nothing to do."""
_TRIES = 32
_OVERLAPPED = 12
"""Kernels of a program that begin early. With 20 to 40 of them one call in a
hundred took four times as long as others, and none less; see NOTES.md."""
_LOOPS = ('while', 'conditional', 'call')


class CannotRecordError(Exception):
  """A program cannot be replayed; says why."""


@dataclasses.dataclass
class _Seen:
  """What the two custom calls saw in a call of a program."""

  record: bool
  stream: int = 0
  temporary: int = 0
  logits: int = 0
  graphs: list[cuda.Graph] = dataclasses.field(default_factory=list)
  error: Exception | None = None

  def cut(self) -> None:
    """Ends what is recorded, and gives it to the stream, so that it is done."""
    stream = cuda.Pointer(self.stream)
    graph = cuda.end(stream)
    if self.graphs and not graph.kinds:
      return  # Nothing comes after the logits.
    self.graphs.append(graph)
    cuda.Launchable(graph).launch(stream)


_seen: _Seen | None = None
exclusive = threading.RLock()
"""Of whoever gives the stream something: while it records, nobody else does."""


class Marks:
  """Takes a `Transport`'s place in programs to record."""

  output = None

  @property
  def options(self) -> dict[str, str]:
    """Of XLA: what is recorded launches no graphs of XLA's."""
    return {'xla_gpu_enable_command_buffer': ''}

  def read(self, request: Any) -> tuple[Any, Any]:
    """The request, and what `done` is given; in a program.

    It is recorded from its beginning, whatever this depends on.
    """
    # From here to the end it is in use, so no result has its memory.
    temporary = jax.ShapeDtypeStruct((_ALIGN,), jnp.uint8)
    found = jax.ffi.ffi_call(_BEGIN, temporary, has_side_effect=True)(request)
    return request, found

  def ready(self, begun: Any, logits: Any, pool: Any) -> tuple[Any, Any]:
    """The logits, and the pool that is still to be written.

    It is two recordings: who waits for the logits does not wait for the second.
    """
    given, tree = jax.tree.flatten((logits, pool))
    logits, pool = jax.tree.unflatten(
      tree,
      jax.ffi.ffi_call(
        _READY,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given],
        has_side_effect=True,
        input_output_aliases={i: i for i in range(len(given))},
      )(*given, begun),
    )
    return logits, pool

  def done(self, begun: Any, logits: Any, *states: Any) -> Any:
    """The logits; up to here it is recorded, and so are all states."""
    return jax.ffi.ffi_call(
      _END,
      jax.ShapeDtypeStruct(logits.shape, logits.dtype),
      has_side_effect=True,
      input_output_aliases={0: 0},
    )(logits, begun, *jax.tree.leaves(states))


MARKS = Marks()


def register() -> None:
  """Makes the two custom calls known to XLA."""
  cuda.register(_BEGIN, _at_begin, _before)
  cuda.register(_READY, _at_ready)
  cuda.register(_END, _at_end)


def marked(plan: Any) -> Any:
  """The `programs.Plan` of programs to record; None: not on this device."""
  if plan.transport.output is None or plan.target.platform != 'cuda':
    return None
  return dataclasses.replace(plan, transport=MARKS)


def _before() -> None:
  seen = _seen
  if seen is not None and seen.record:
    try:
      cuda.begin(cuda.Pointer(seen.stream))
    except Exception as error:  # Not through XLA.
      seen.error = error


def _at_begin(stream: int, operands: list[int], results: list[int]) -> None:
  del operands
  seen = _seen
  if seen is not None:
    if seen.record and stream != seen.stream:
      seen.error = CannotRecordError('XLA has several streams')
    seen.stream, seen.temporary = stream, results[0]


def _at_ready(stream: int, operands: list[int], results: list[int]) -> None:
  del stream, results
  seen = _seen
  if seen is None:
    return
  seen.logits = operands[0]
  if seen.record and seen.error is None:
    try:
      seen.cut()
      cuda.begin(cuda.Pointer(seen.stream))
    except Exception as error:
      seen.error = error


def _at_end(stream: int, operands: list[int], results: list[int]) -> None:
  del stream, results
  seen = _seen
  if seen is None:
    return
  seen.logits = seen.logits or operands[0]
  if seen.record and seen.error is None:
    try:
      seen.cut()
    except Exception as error:
      seen.error = error


@contextlib.contextmanager
def _seeing(stream: int = 0) -> Iterator[_Seen]:
  """Around a call; with the stream, it is recorded."""
  global _seen
  with exclusive:
    _seen = found = _Seen(stream != 0, stream)
    try:
      yield found
    finally:
      _seen = None


@dataclasses.dataclass(frozen=True, eq=False)
class Slot(transport.Slot):
  """Room for one request, and what replays it.

  Attributes:
    recording: its.
    logits: float32 `[T, B, C]` in pinned memory.
    graph: copies in, computes, and copies out.
    event: recorded after it.
  """

  recording: Recording
  logits: np.ndarray
  graph: cuda.Launchable
  event: cuda.Event


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
  """Logits that are being computed.

  Attributes:
    slot: whose replay computes them.
  """

  slot: Slot

  @property
  def shape(self) -> tuple[int, ...]:
    """`[T, B, C]`."""
    return self.slot.logits.shape

  def is_ready(self) -> bool:
    """Whether they are there."""
    return self.slot.event.is_ready()

  def block_until_ready(self) -> Replayed:
    """Waits for them, asleep."""
    self.slot.event.wait()
    return self


class Recording:
  """A program's graph, with the memory that it reads and writes.

  Attributes:
    pool: the pool that it was given, in the arrays that the program returned
      last, until `record` is done and they are taken.
  """

  def __init__(
    self,
    program: Any,
    device: jax.Device,
    weights: Any,
    cached: tuple[Any, ...],
    donate: bool,
    copies: bool,
  ):
    """Of a program that is to be recorded.

    Args:
      program: a `programs.Program` with `MARKS`.
      device: to run on.
      weights: its first argument, held.
      cached: keys and values, or a pool's; see `copies`.
      donate: whether it writes into them, and so takes their memory.
      copies: whether calls give others of the same shapes, which are copied to
        where the graph reads them; else they must be in the memory of these.
    """
    self._program, self._layout = program, program.layout
    self._device, self._weights = device, weights
    self._donate, self._copies = donate, copies
    self._free: collections.deque[Slot] = collections.deque()
    self.pool: Any = cached

  def record(self) -> None:
    """Compiles and records it.

    Nothing may use the device meanwhile but what holds `exclusive`.

    Raises:
      CannotRecordError: it cannot be replayed.
    """
    register()
    device = self._device
    cuda.use(device)
    if self._copies:
      self.pool = _noise(self.pool, device)
    request = jax.device_put(np.zeros(self._layout.size, np.int32), device)
    lowered = self._program.call.lower(self._weights, *self.pool, request)
    self._compiled = lowered.compile()
    _check_schedule(self._compiled.as_text())
    # Kernels are loaded when they are first run, which cannot be recorded.
    with _seeing() as seen:
      logits = self._call(request)
    addresses, stream = self._addresses_now(), seen.stream
    for left in range(2, -1, -1):
      try:
        with _Hole(self._compiled, logits.nbytes, device) as hole:
          seen, logits = self._record(request, stream)
          self._temporary = hole.take(seen.temporary)
        break
      except CannotRecordError:
        if not left:
          raise
    # What another thread did meanwhile, the graph would do again.
    again, _ = self._record(request, stream)
    kinds, of_again = ([x.kinds for x in y.graphs] for y in (seen, again))
    known = {_KERNEL, _COPY, _FILL}
    if kinds != of_again or not set().union(*kinds) <= known:
      raise CannotRecordError(f'it has nodes of kinds {kinds}, then {of_again}')
    if self._addresses_now() != addresses:
      raise CannotRecordError('it does not write in place')
    self._graph, *after = seen.graphs
    self._graph.overlap(dependent.SUFFIX, _OVERLAPPED)
    self._after = [cuda.Launchable(x) for x in after]
    self._request = request
    self._logits, self._result = seen.logits, logits
    self._stream = cuda.Pointer(stream)
    self._addresses = addresses
    self._last: list[Any] = [lambda: None] * len(addresses)
    self._copied = self.pool if self._copies else None

  @property
  def nbytes(self) -> int:
    """Of the device's memory, that it holds."""
    held = (self._request, self._temporary, self._result, self._copied)
    return sum(x.nbytes for x in jax.tree.leaves(held))

  def slot(self) -> Slot:
    """A free slot. What it holds is left over."""
    try:
      return self._free.pop()
    except IndexError:
      return self._new_slot()

  def release(
    self, layout: Any, slot: transport.Slot, result: Any = None
  ) -> None:
    """Takes a slot back, whose logits nobody reads any more."""
    del layout
    assert isinstance(slot, Slot)
    if result is not None:
      result.block_until_ready()
    self._free.append(slot)

  def launch(self, slot: Slot, cached: tuple[Any, ...]) -> Any:
    """Replays it on what is in the slot.

    Args:
      slot: of `slot`.
      cached: as the program takes them.

    Returns:
      What the program returns: `Replayed` logits, after keys and values if it
      writes them.
    """
    cuda.use(self._device)
    with exclusive:
      if self._load(cached):
        slot.graph.launch(self._stream)
        slot.event.record(self._stream)
        for graph in self._after:  # It reads what is there until then.
          graph.launch(self._stream)
      else:  # Another pool: the program itself is called.
        self.pool = cached
        slot.logits[...] = self._call(slot.buffer.copy())
        cached, self.pool = self.pool, None
        slot.event.record(self._stream)
    return (*cached, Replayed(slot)) if self._donate else Replayed(slot)

  def fetch(self, replayed: Replayed) -> np.ndarray:
    """The logits, waited for."""
    slot = replayed.slot
    cuda.use(self._device)
    if not transport.look(slot.event.is_ready):
      slot.event.wait()
    return slot.logits.copy()  # The slot's will be written again.

  def check(self, longest: int, new: int = 0, pages: int = 0) -> None:
    """Compares what it gives on noise with what the program gives.

    Args:
      longest: history.
      new: events at most.
      pages: of the pool.

    Raises:
      CannotRecordError: one bit is different.
    """
    rng = np.random.default_rng(0)
    slot = self.slot()
    for _ in range(2):
      _fill(rng, slot.views, longest, new, pages)
      slot.logits.fill(np.nan)
      self.launch(slot, self.pool)
      found = self.fetch(Replayed(slot))
      expected = np.asarray(self._call(slot.buffer.copy()))
      if not np.array_equal(found, expected, equal_nan=True):
        raise CannotRecordError(
          'it gives other logits than the program, by up to '
          f'{np.abs(found - expected).max()}'
        )
    self._free.append(slot)

  def _call(self, request: Any) -> jax.Array:
    """Calls the program on the pool; returns logits."""
    request = jax.device_put(request, self._device)
    with exclusive:
      found = self._compiled(self._weights, *self.pool, request)
      jax.block_until_ready(found)
    if not self._donate:
      return found
    *states, logits = found
    self.pool = tuple(states)
    return logits

  def _record(self, request: jax.Array, stream: int) -> tuple[_Seen, jax.Array]:
    """Calls the program, recording it; what its marks saw, and the logits."""
    with _seeing(stream) as seen:
      try:
        logits = self._call(request)
      except Exception as error:
        with contextlib.suppress(cuda.Error):
          cuda.end(cuda.Pointer(stream))
        raise CannotRecordError(f'XLA failed: {error}') from error
    if seen.error is not None or not seen.graphs:
      raise CannotRecordError(f'CUDA failed: {seen.error}')
    return seen, logits

  def _addresses_now(self) -> list[int]:
    return [_address(x) for x in jax.tree.leaves(self.pool)]

  def _load(self, cached: Any) -> bool:
    """Whether the graph reads these now, and writes them."""
    if len(cached) != len(self._last):  # Else it has no trees.
      cached = jax.tree.leaves(cached)
    for i, array in enumerate(cached):
      if array.is_deleted():
        raise RuntimeError(
          'Array has been deleted: a cache or pool that was extended must not '
          'be used again'
        )
      if array is self._last[i]():
        continue
      address = _address(array)
      if address != self._addresses[i]:
        if not self._copies:
          return False
        if not array.is_ready():
          array.block_until_ready()  # It may come on another stream.
        cuda.copy(self._addresses[i], address, array.nbytes, self._stream)
      self._last[i] = weakref.ref(array)
    return True

  def _new_slot(self) -> Slot:
    cuda.use(self._device)
    buffer = cuda.pinned(self._layout.size, np.int32)
    buffer.fill(0)
    shape = self._result.shape
    logits = cuda.pinned(self._result.size, np.float32).reshape(shape)
    stream = cuda.own_stream(self._device.id)
    with exclusive:
      cuda.begin(stream)
      cuda.copy_in(_address(self._request), buffer, stream)
      first = cuda.end(stream)
      cuda.begin(stream)
      cuda.copy_out(logits, self._logits, stream)
      last = cuda.end(stream)
      whole, after = cuda.Graph(), None
      for part in (first, self._graph, last):
        after = whole.append(part, after)
      graph = cuda.Launchable(whole)
    views = self._layout.views(buffer)
    requests = self._layout.split(views)
    return Slot(
      None, buffer, views, requests, self, logits, graph, cuda.Event()
    )


class _Hole:
  """Free memory of just a program's temporary size, so that it can be held.

  XLA takes that memory from an allocator when a program is called, the smallest
  free piece that it fits in. Here is one between two neighbors in use, and
  smaller ones for what else a call takes. If a part of it was in the hole, all
  of it was; then an array takes the hole.
  """

  def __init__(self, compiled: Any, logits: int, device: jax.Device):
    self._device = device
    memory = compiled.memory_analysis()
    if memory is None:
      raise CannotRecordError('XLA does not tell its temporary memory')
    self._size = max(1, -(-memory.temp_size_in_bytes // _ALIGN)) * _ALIGN
    self._small = (logits, _ALIGN)
    self._kept: list[jax.Array] = []

  def __enter__(self) -> _Hole:
    crumbs = []
    for size in (*self._small, *self._small):
      crumbs.append(self._take(size))
      self._take(_ALIGN)
    found: dict[int, jax.Array] = {}
    for _ in range(_TRIES):
      array = self._take(self._size)
      found[_address(array)] = array
      for middle in (_address(array) + i * self._size for i in (-1, 0, 1)):
        ends = (middle - self._size, middle + self._size)
        if middle in found and all(end in found for end in ends):
          self._begin = middle
          hole = found.pop(middle)
          self._kept = [x for x in self._kept if x is not hole]
          self._kept = [
            x for x in self._kept if all(x is not y for y in crumbs)
          ]
          for x in (hole, *crumbs):
            x.delete()
          return self
    raise CannotRecordError('its temporary memory found no place')

  def take(self, address: int) -> jax.Array:
    """The memory, in which a program that was just called had this address."""
    if not self._begin <= address < self._begin + self._size:
      raise CannotRecordError('its temporary memory was elsewhere')
    for _ in range(_TRIES):
      found = self._take(self._size)
      if _address(found) == self._begin:
        return found
    raise CannotRecordError('its temporary memory was taken')

  def __exit__(self, *error: Any) -> None:
    self._kept = []

  def _take(self, size: int) -> jax.Array:
    zeros = np.zeros(size, np.uint8)
    array = jax.block_until_ready(jax.device_put(zeros, self._device))
    self._kept.append(array)
    return array


def _address(array: Any) -> int:
  return array.unsafe_buffer_pointer()


def _noise(tree: Any, device: jax.Device) -> Any:
  """Arrays like these, of random numbers of each type, on the device."""
  rng = np.random.default_rng(0)
  block = rng.standard_normal(4093)

  def noise(x: Any) -> jax.Array:
    many = np.resize(block, x.shape)
    if jnp.issubdtype(x.dtype, jnp.integer):
      many = np.round(many * 30)
    return jax.device_put(many.astype(x.dtype), device)

  return jax.block_until_ready(jax.tree.map(noise, tree))


def _fill(rng, views, longest: int, new: int, pages: int) -> None:
  """Writes a request of noise that is in bounds."""
  added: Any = 0
  for name, view in views.items():
    if view.part.sizes is not None:
      for i, size in enumerate(view.part.sizes):
        view.ids[i] = rng.integers(0, size, view.part.shape)
      view.dense[...] = rng.standard_normal(view.dense.shape)
      continue
    numbers = view.features[name]
    if name == 'new':
      numbers[...] = added = rng.integers(0, new + 1, numbers.shape)
    elif name == 'count':
      numbers[...] = views['candidates'].part.shape[1]
    elif name == 'read':
      numbers[...] = rng.integers(0, pages, numbers.shape)
    elif name == 'write':
      numbers[...] = pages  # Dropped.
  if 'length' in views:
    length = views['length'].features['length']
    length[...] = rng.integers(0, longest + 1 - added, length.shape)
    if 'visible' in views:
      views['visible'].features['visible'][...] = length[:, None]


_INSTRUCTION = re.compile(r'\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(')


def _check_schedule(text: str) -> None:
  """Raises unless a program does all before its last mark, and never waits."""
  if 'is_scheduled=true' not in text:
    raise CannotRecordError('XLA does not tell its schedule')
  ended = False
  for line in text[text.index('\nENTRY ') :].splitlines()[2:]:
    if line.startswith('}'):
      break
    found = _INSTRUCTION.match(line)
    if found is None:
      raise CannotRecordError(f'a line of its schedule is not known: {line}')
    name, kind = found.groups()
    if kind in _NOTHING:
      continue
    if ended or kind in _LOOPS:
      raise CannotRecordError(
        f'{kind} {name} ' + ('comes too late' if ended else 'may wait')
      )
    ended = f'"{_END}"' in line
  if not ended:
    raise CannotRecordError('its last mark is not in its schedule')
