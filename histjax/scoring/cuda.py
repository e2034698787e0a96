"""What `graphs` needs of CUDA's driver and of XLA's foreign function interface.

Structures are those of `xla/ffi/api/c_api.h`, which jaxlib ships, and of
`cuda.h`; both keep the order of what is there when they grow.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Pointer = ctypes.c_void_p
_MAJOR, _MINOR = 0, 3  # Of the interface that these structures follow.
_METADATA = 1
_INITIALIZE, _EXECUTE = 2, 3
_NOT_READY = 600
_STREAM_GET_OFFSET = 80  # In `XLA_FFI_Api`.


def _structure(name: str, *fields: tuple[str, Any]) -> Any:
  base = ('struct_size', ctypes.c_size_t), ('extension_start', Pointer)
  return type(name, (ctypes.Structure,), {'_fields_': [*base, *fields]})


_Array = _structure(
  'Array',
  ('size', ctypes.c_int64),
  ('types', Pointer),
  ('items', ctypes.POINTER(Pointer)),
)
_Buffer = _structure('Buffer', ('dtype', ctypes.c_int), ('data', Pointer))
_Frame = _structure(
  'Frame',
  ('api', Pointer),
  ('ctx', Pointer),
  ('stage', ctypes.c_int),
  ('args', _Array),
  ('rets', _Array),
)
_StreamGet = _structure('StreamGet', ('ctx', Pointer), ('stream', Pointer))
_Version = _structure(
  'Version', ('major', ctypes.c_int), ('minor', ctypes.c_int)
)


class _Extension(ctypes.Structure):
  _fields_ = (
    ('struct_size', ctypes.c_size_t),
    ('type', ctypes.c_int),
    ('next', Pointer),
    ('metadata', Pointer),
  )


class _Metadata(ctypes.Structure):
  _fields_ = (
    ('struct_size', ctypes.c_size_t),
    ('version', _Version),
    ('traits', ctypes.c_uint32),
    ('state_type_id', ctypes.c_int64),
  )


_HANDLER = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(_Frame))
_STREAM_GET = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(_StreamGet))
_registered: dict[str, Any] = {}


def register(
  name: str,
  execute: Callable[[int, list[int], list[int]], None],
  initialize: Callable[[], None] | None = None,
  platform: str = 'CUDA',
) -> None:
  """Makes functions known to XLA as what a custom call calls.

  Args:
    name: of the target; what a name is given first stays.
    execute: when it is the call's turn; of the stream and the addresses of
      operands and results. It must not raise.
    initialize: before the program that has the call is executed. It must not
      raise.
    platform: where; the stream is 0 where there are none.
  """
  if name in _registered:
    return

  def handler(frame: Any) -> None:
    call = frame.contents
    if call.extension_start:
      extension = _Extension.from_address(call.extension_start)
      if extension.type == _METADATA:
        metadata = _Metadata.from_address(extension.metadata)
        metadata.version.major, metadata.version.minor = _MAJOR, _MINOR
        metadata.traits, metadata.state_type_id = 0, 0
        return
    if call.stage == _INITIALIZE and initialize is not None:
      initialize()
    if call.stage != _EXECUTE:
      return
    address = Pointer.from_address(call.api + _STREAM_GET_OFFSET).value
    get = _STREAM_GET(address or 0)
    asked = _StreamGet(ctypes.sizeof(_StreamGet), None, call.ctx, None)
    get(ctypes.byref(asked))
    operands, results = (
      [_Buffer.from_address(x.items[i]).data for i in range(x.size)]
      for x in (call.args, call.rets)
    )
    execute(asked.stream or 0, operands, results)

  _registered[name] = _HANDLER(handler)
  capsule = jax.ffi.pycapsule(_registered[name])
  stages = {'execute': capsule}
  if initialize is not None:
    stages['initialize'] = capsule
  jax.ffi.register_ffi_target(name, stages, platform=platform)


@functools.cache
def _library() -> Any:
  """The driver. Its calls keep Python's lock: all but `wait` are short."""
  return ctypes.PyDLL('libcuda.so.1')


@functools.cache
def _waiting_library() -> Any:
  return ctypes.CDLL('libcuda.so.1')


class Error(RuntimeError):
  """A call of the driver failed."""


def check(status: int, what: str) -> None:
  """Raises `Error` unless a call of the driver succeeded."""
  if status:
    name = ctypes.c_char_p()
    _library().cuGetErrorName(status, ctypes.byref(name))
    error = (name.value or b'').decode()
    raise Error(f'{what}: {error or status}')


def _call(name: str, *arguments: Any) -> None:
  check(getattr(_library(), name)(*arguments), name)


_thread = threading.local()


def use(device: jax.Device) -> None:
  """Makes a device's context the thread's, as calls of the driver need."""
  if getattr(_thread, 'device', None) == device.id:
    return
  number, context = ctypes.c_int(), Pointer()
  _call('cuDeviceGet', ctypes.byref(number), device.local_hardware_id)
  _call('cuDevicePrimaryCtxRetain', ctypes.byref(context), number)
  _call('cuCtxSetCurrent', context)
  _thread.device = device.id


def pinned(size: int, dtype: Any) -> np.ndarray:
  """`[size]` in memory of the host that a device reads and writes."""
  nbytes = size * np.dtype(dtype).itemsize
  address = Pointer()
  _call('cuMemHostAlloc', ctypes.byref(address), ctypes.c_size_t(nbytes), 0)
  memory: Any = (ctypes.c_byte * nbytes).from_address(address.value or 0)
  memory.owner = _Pinned(address)
  return np.frombuffer(memory, dtype)


class _Pinned:
  """Frees such memory when no array has it any more."""

  def __init__(self, address: Pointer):
    self._address, self._free = address, _library().cuMemFreeHost

  def __del__(self):
    self._free(self._address)


class Event:
  """Tells when what was given to a stream before it is done."""

  def __init__(self):
    """Without times; who waits for it sleeps."""
    self._event = Pointer()
    _call('cuEventCreate', ctypes.byref(self._event), 1 | 2)
    library = _library()
    self._record, self._query = library.cuEventRecord, library.cuEventQuery
    self._destroy = library.cuEventDestroy_v2

  def record(self, stream: Pointer) -> None:
    """At the end of what the stream was given so far."""
    if status := self._record(self._event, stream):
      check(status, 'cuEventRecord')

  def is_ready(self) -> bool:
    """Whether it is done.

    Raises:
      Error: what was done failed.
    """
    status = self._query(self._event)
    if status == 0:
      return True
    if status != _NOT_READY:
      check(status, 'cuEventQuery')
    return False

  def wait(self) -> None:
    """Until it is done; other threads of Python run meanwhile."""
    status = _waiting_library().cuEventSynchronize(self._event)
    check(status, 'cuEventSynchronize')

  def __del__(self):
    self._destroy(self._event)


class _Edge(ctypes.Structure):
  """What passes between two nodes; zeros: the second begins after the first."""

  _fields_ = (
    ('from_port', ctypes.c_ubyte),
    ('to_port', ctypes.c_ubyte),
    ('type', ctypes.c_ubyte),
    ('reserved', ctypes.c_ubyte * 5),
  )


class _Kernel(ctypes.Structure):
  _fields_ = (
    ('function', Pointer),
    ('sizes', ctypes.c_uint * 7),
    ('parameters', Pointer),
    ('extra', Pointer),
    ('kernel', Pointer),
    ('context', Pointer),
  )


class Graph:
  """A CUDA graph; empty at first, or what a stream recorded."""

  def __init__(self, handle: Pointer | None = None):
    """Of the driver's handle, which it will destroy."""
    if handle is None:
      handle = Pointer()
      _call('cuGraphCreate', ctypes.byref(handle), 0)
    self.handle = handle
    self._destroy = _library().cuGraphDestroy

  @property
  def kinds(self) -> list[int]:
    """Of its nodes: 0 is a kernel, 1 a copy, 2 a fill."""
    number = ctypes.c_size_t()
    _call('cuGraphGetNodes', self.handle, None, ctypes.byref(number))
    if not number.value:
      return []
    nodes = (Pointer * number.value)()
    _call('cuGraphGetNodes', self.handle, nodes, ctypes.byref(number))
    return [_kind(Pointer(node)) for node in nodes]

  def overlap(self, waits: str, most: int) -> int:
    """Lets kernels begin before the kernel before them has ended.

    Args:
      waits: in the names of those that wait for it by themselves.
      most: if there are more of them, none is changed.

    Returns:
      How many; 0 with a driver that is older than 12.3.
    """
    if not hasattr(_library(), 'cuGraphAddDependencies_v2'):
      return 0
    number = ctypes.c_size_t()
    get = functools.partial(_call, 'cuGraphGetEdges_v2', self.handle)
    get(None, None, None, ctypes.byref(number))
    sources, nodes = (Pointer * number.value)(), (Pointer * number.value)()
    edges = (_Edge * number.value)()
    get(sources, nodes, edges, ctypes.byref(number))
    early = [
      (source, node, edge)
      for source, node, edge in zip(sources, nodes, edges, strict=True)
      if _kind(Pointer(source)) == _kind(Pointer(node)) == 0  # Kernels.
      and waits in _name(Pointer(node))
    ]
    if len(early) > most:
      return 0
    for source, node, edge in early:
      ends = (self.handle, (Pointer * 1)(source), (Pointer * 1)(node))
      one = ctypes.c_size_t(1)
      _call('cuGraphRemoveDependencies_v2', *ends, ctypes.byref(edge), one)
      edge.from_port = edge.type = 1  # Programmatic, both.
      _call('cuGraphAddDependencies_v2', *ends, ctypes.byref(edge), one)
    return len(early)

  def append(self, graph: Graph, after: Pointer | None) -> Pointer:
    """Adds a copy of another; returns its node."""
    node = Pointer()
    before = None if after is None else (Pointer * 1)(after)
    _call(
      'cuGraphAddChildGraphNode',
      ctypes.byref(node),
      self.handle,
      before,
      ctypes.c_size_t(0 if after is None else 1),
      graph.handle,
    )
    return node

  def __del__(self):
    self._destroy(self.handle)


def _kind(node: Pointer) -> int:
  kind = ctypes.c_int()
  _call('cuGraphNodeGetType', node, ctypes.byref(kind))
  return kind.value


def _name(node: Pointer) -> str:
  """Of a kernel."""
  found, name = _Kernel(), ctypes.c_char_p()
  _call('cuGraphKernelNodeGetParams_v2', node, ctypes.byref(found))
  if found.function:
    _call('cuFuncGetName', ctypes.byref(name), Pointer(found.function))
  else:
    _call('cuKernelGetName', ctypes.byref(name), Pointer(found.kernel))
  return (name.value or b'').decode()


class Launchable:
  """A graph that is ready to run."""

  def __init__(self, graph: Graph):
    """Of a graph, of which it keeps a copy."""
    self._handle = Pointer()
    _call(
      'cuGraphInstantiateWithFlags',
      ctypes.byref(self._handle),
      graph.handle,
      ctypes.c_ulonglong(0),
    )
    self._launch = _library().cuGraphLaunch
    self._destroy = _library().cuGraphExecDestroy

  def launch(self, stream: Pointer) -> None:
    """Gives it to a stream."""
    if status := self._launch(self._handle, stream):
      check(status, 'cuGraphLaunch')

  def __del__(self):
    self._destroy(self._handle)


@functools.cache
def own_stream(device: int) -> Pointer:
  """A stream that nothing else uses, to record copies on.

  Args:
    device: the id of the one in use, see `use`.
  """
  del device
  stream = Pointer()
  _call('cuStreamCreate', ctypes.byref(stream), 1)
  return stream


def begin(stream: Pointer) -> None:
  """From now on a stream records what it is given, and does not do it."""
  _call('cuStreamBeginCapture_v2', stream, 2)


def end(stream: Pointer) -> Graph:
  """What it was given since `begin`.

  Raises:
    Error: it was given something that a graph cannot hold.
  """
  handle = Pointer()
  _call('cuStreamEndCapture', stream, ctypes.byref(handle))
  return Graph(handle if handle else None)


def copy_in(address: int, array: np.ndarray, stream: Pointer) -> None:
  """From pinned memory to a device's, when it is the stream's turn."""
  _call(
    'cuMemcpyHtoDAsync_v2',
    Pointer(address),
    Pointer(array.ctypes.data),
    ctypes.c_size_t(array.nbytes),
    stream,
  )


def copy_out(array: np.ndarray, address: int, stream: Pointer) -> None:
  """The other way."""
  _call(
    'cuMemcpyDtoHAsync_v2',
    Pointer(array.ctypes.data),
    Pointer(address),
    ctypes.c_size_t(array.nbytes),
    stream,
  )


def copy(to: int, source: int, nbytes: int, stream: Pointer) -> None:
  """Within a device's memory."""
  _call(
    'cuMemcpyDtoDAsync_v2',
    Pointer(to),
    Pointer(source),
    ctypes.c_size_t(nbytes),
    stream,
  )
