"""What Pallas' GPU interpreter lacks to run our kernels and find their races.

It multiplies from memory alone and only onto zeros, knows no `inline_mgpu`,
does not look for races of matrix units, and takes a `RefUnion` for used by one
of its members as a whole. `Interpreted` adds this.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import types
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized
from jax._src import callback, source_info_util
from jax._src.pallas.mosaic.interpret import race_detection_state as ranges
from jax._src.pallas.mosaic_gpu.interpret import (
  gpu_callbacks,
  jaxpr_interpret,
  race_detection_state,
  shared_memory,
)
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from histjax.ops import dependent
from histjax.ops.history_attention import pallas_gpu as attention

LINE = 2048  # Bytes whose accesses are kept together.
IDEMPOTENT = 'clean'  # The function that may write at once with others.
SLOW: dict[int, float] = {}  # Seconds that a warpgroup's products take longer.
_SMEM = shared_memory.get_memory_space_idx(plgpu.SMEM)
Key = shared_memory.HostAllocationKey


class Instead:
  """A module with some of its functions replaced."""

  def __init__(self, module, **functions):
    self._module = module
    self.__dict__.update(functions)

  def __getattr__(self, name):
    return getattr(self._module, name)


class Begun(NamedTuple):
  """An accumulator that began at a value, to be added in the end."""

  acc: Any
  start: jax.Array


class Value:
  """A value that is read and written like a reference."""

  def __init__(self, value):
    self.value = value

  def __getitem__(self, index):
    return self.value

  def __setitem__(self, index, value):
    self.value = value


def wgmma(acc, a, b):
  """Any factor `a`, in registers or in memory."""
  acc = acc.acc if isinstance(acc, Begun) else acc
  in_memory = hasattr(jax.typeof(getattr(a, 'ref', a)), 'inner_aval')
  kind = plgpu.RefType() if in_memory else plgpu.Layout.WGMMA
  plgpu.inline_mgpu(arg_types=(plgpu.RefType(), kind, plgpu.RefType()))(
    multiply
  )(acc, a, b)


def wgmma_wait(n):
  plgpu.inline_mgpu()(functools.partial(finish, n=n))()


def wgmma_accumulator_load(acc, *, wait_n=0):
  if isinstance(acc, Begun):
    return wgmma_accumulator_load(acc.acc, wait_n=wait_n) + acc.start
  return plgpu.wgmma_accumulator_load(acc, wait_n=wait_n)


def run_state(function):
  """With accumulators, which the interpreter can only begin at zero."""

  def run(state):
    many = isinstance(state, (tuple, list))
    state = state if many else (state,)
    starts = [x._init for x in state if hasattr(x, '_init')]
    values = [Value(x) for x in state if not hasattr(x, '_init')]

    def body(*accs):
      accs = [Begun(*x) for x in zip(accs, starts, strict=True)]
      refs = (*accs, *values)
      function(refs if many else refs[0])
      results = [wgmma_accumulator_load(x) for x in accs]
      results += [x[...] for x in values]
      return tuple(results) if many else results[0]

    return pl.run_scoped(body, *(plgpu.ACC(x.shape, x.dtype) for x in starts))

  return run


# Functions of `inline_mgpu`, run in the thread that they stand for.


class Part(NamedTuple):
  """Of a buffer, what a transformed reference names."""

  key: Key
  access: Any

  @classmethod
  def of(cls, key, transforms):
    key = Key.from_array(key)
    transforms = gpu_callbacks._remove_noop_transforms(transforms)
    transforms = jax.tree.map(int, transforms)
    return cls(key, memory().access(key, transforms))

  def read(self):
    return memory().get_buffer_content(
      self.key, self.access, None, increment_clock=False
    )[0]

  def write(self, value):
    memory().store_buffer_content(
      self.key, self.access, value, None, increment_clock=False
    )


def memory():
  return gpu_callbacks._get_shared_memory()


def multiply(thread, acc, a, b):
  """A product that the matrix units begin now and end at a wait."""
  factors = [x.read() if isinstance(x, Part) else np.asarray(x) for x in (a, b)]
  product = np.matmul(*(x.astype(np.float32) for x in factors))
  acc.write(acc.read() + product)
  parts = [x for x in (a, b) if isinstance(x, Part)]
  races, now = gpu_callbacks.get_races(), memory().get_clock(thread)
  for part in parts:
    races.check(part, thread, now.async_smem_clock, False)
  races.unfinished.setdefault(thread, []).append(parts)


def finish(thread, *, n):
  """All but the last `n` products of a warpgroup have been read."""
  time.sleep(SLOW.get(thread.warpgroup_id, 0))
  races = gpu_callbacks.get_races()
  products = races.unfinished.setdefault(thread, [])
  while len(products) > n:
    # No warp but the first does anything on its own: the last one's place in
    # the clocks is the matrix units'.
    position = memory().thread_to_vc_position(thread.warp(3))
    with memory().lock:
      memory().clocks[thread].inc(position)
      now = memory().clocks[thread].copy()
    for part in products.pop(0):
      races.check(part, thread, now.generic_clock, False)
      races.record(part, thread, now.generic_clock, False, position)


def wgmma_accumulator_deref(*, thread, wait_n, **kwargs):
  if wait_n is not None:
    finish(thread, n=wait_n)
  return _deref(thread=thread, wait_n=wait_n, **kwargs)


_deref = gpu_callbacks.wgmma_accumulator_deref


@gpu_callbacks.fail_on_exception
def _call(token, thread, keys, transforms, values, *, function):
  args = [
    np.asarray(value) if value is not None else Part.of(key, transform)
    for key, transform, value in zip(keys, transforms, values, strict=True)
  ]
  function(thread, *args)
  return token


def interpret_inline_mgpu(self, eqn, token, get_invals):
  """Calls the function with the thread and `Part`s instead of references."""
  invals = get_invals()
  count = eqn.params['pytree_args'].num_leaves
  transforms = eqn.params['pytree_ref_transforms'].unflatten(invals[count:])
  keys, rest, values = [], [], []
  for var, value, transform in zip(
    eqn.invars[:count], invals[:count], transforms, strict=True
  ):
    if transform is None:
      key, value = None, value
    else:
      key, transform = jaxpr_interpret.resolve_ref(var.aval, value, transform)
      value = None
    keys.append(key)
    rest.append(transform)
    values.append(value)
  token = callback.io_callback(
    functools.partial(_call, function=eqn.params['mgpu_fn']),
    gpu_callbacks.TOKEN_SHAPE_DTYPE,
    token, self.thread, keys, rest, values,
  )  # fmt: skip
  return token, []


def zero_rows(thread, values, first, last, **sizes):
  """`_zero_rows` of history_attention."""
  del thread, sizes
  value = values.read().copy()
  index = np.arange(len(value))
  value[(index < first) | (index >= last)] = 0
  values.write(value)


# The tower's copies between the blocks of a cluster.


class Sent:
  """A barrier that counts warpgroups and the bytes that they wait for."""

  def __init__(self, count):
    self.count = count
    self.arrived = self.missing = self.phase = 0
    self.clock = None
    self.condition = threading.Condition()

  def add(self, clock, *, size=0, arrived=0):
    """Returns the phase that this belongs to; hold the condition."""
    phase = self.phase
    self.arrived += arrived
    self.missing += size
    if self.clock is None:
      self.clock = clock.copy()
    self.clock.update(clock)
    if self.arrived == self.count and not self.missing:
      self.arrived, self.phase = 0, phase + 1
      self.condition.notify_all()
    return phase


def place(barrier):
  """Where a barrier is, of those of all tiles of the block."""
  at = barrier.access.range
  return tuple(i if isinstance(i, int) else i.start for i in at)


def initialize(thread, barriers, *, count):
  peers = gpu_callbacks.get_races().peers
  for first in (0, 2):
    peers[barriers.key, (place(barriers)[0], first)] = Sent(count)


def send(thread, block, barrier, *, blocks):
  races, clock = gpu_callbacks.get_races(), memory().incr_clock(thread)
  value = block.read()
  for peer in range(blocks):
    if peer == thread.block_id:
      continue
    there, sent = (
      dataclasses.replace(part.key, block_id=peer) for part in (block, barrier)
    )
    there = Part(there, block.access)
    position, now = memory().get_next_tma_thread_id(), clock.copy()
    now.inc(position)
    for part, is_write in ((block, False), (there, True)):
      races.check(part, thread, now.async_smem_clock, is_write)
      races.record(part, thread, now.async_smem_clock, is_write, position)
    there.write(value)
    sent = races.peers[sent, place(barrier)]
    with sent.condition:
      sent.add(now, size=-value.nbytes)


def receive(thread, barrier, *, size):
  sent = gpu_callbacks.get_races().peers[barrier.key, place(barrier)]
  clock = memory().incr_clock(thread)
  with sent.condition:
    phase = sent.add(clock, size=size, arrived=1)
    while sent.phase == phase:
      memory().check_failed()
      sent.condition.wait(1)
    clock = sent.clock.copy()
  with memory().lock:
    memory().clocks[thread].update(clock)


def sleep(thread, *, cycles):
  del thread
  time.sleep(cycles * 1e-6)


CLUSTER = types.SimpleNamespace(
  initialize=initialize, send=send, receive=receive, sleep=sleep
)


class Lines(race_detection_state.GPURaceDetectionState):
  """Races in shared memory by the bytes of an access.

  Sees that two members of a union are used at a time, each in its bytes, that
  bytes are read as they were written, and what the matrix units read.
  """

  def __init__(self, **options):
    super().__init__(**options)
    self.lines = {}
    self.unfinished = {}
    self.peers = {}

  def check_read(self, thread, clock, key, access, source_info=None):
    self._check(super().check_read, thread, clock, key, access, source_info)

  def check_write(self, thread, clock, key, access, source_info=None):
    self._check(super().check_write, thread, clock, key, access, source_info)

  def _check(self, method, thread, clock, key, access, source_info):
    if key.memory_space_id != _SMEM:
      return method(thread, clock, key, access, source_info)
    part, is_write = Part(key, access), method.__name__ == 'check_write'
    self.check(part, thread, clock, is_write, source_info)
    self.record(part, thread, clock, is_write, None, source_info)

  def bytes(self, part):
    """The storage, and the first and last byte, in it, of an access."""
    found = memory().buffer_shape_and_dtype(part.key)
    shape, dtype = found.shape, found.dtype
    first = last = 0
    for size, index in zip(shape, part.access.range, strict=True):
      if isinstance(index, int):
        index = slice(index, index + 1)
      first = first * size + index.start
      last = last * size + index.stop - 1
    size = np.dtype(dtype).itemsize
    union, _ = self.ref_union_members.get(part.key, (part.key, 0))
    return union, first * size, (last + 1) * size - 1

  def at(self, union, line):
    return self.lines.setdefault((union, line), [])

  def check(self, part, thread, clock, is_write, source_info=None):
    """Reports a race with an access before, if there is one."""
    union, first, last = self.bytes(part)
    where = source_info and source_info_util.summarize(source_info)
    new = Access(part, first, last, is_write, thread, clock.clock, None, where)
    with self.lock:
      for line in range(first // LINE, last // LINE + 1):
        before = [x for x in self.at(union, line) if new.overlaps(x)]
        old = next((x for x in before if new.races(x)), None)
        written = [x for x in before if x.is_write]
        if old is None and not is_write and written:
          if written[-1].part.key != part.key:  # By another name.
            old = written[-1]
        if old is not None:
          self.races_found = True
          print(f'RACE DETECTED\n  {new}\n  {old}')
          return

  def record(self, part, thread, clock, is_write, position, source_info=None):
    union, first, last = self.bytes(part)
    where = source_info and source_info_util.summarize(source_info)
    new = Access(
      part, first, last, is_write, thread, clock.clock.copy(), position, where
    )
    with self.lock:
      for line in range(first // LINE, last // LINE + 1):
        self.lines[union, line] = [
          old for old in self.at(union, line) if not new.hides(old, line)
        ] + [new]


@dataclasses.dataclass(frozen=True)
class Access:
  """An access to shared memory that others must know of."""

  part: Part
  first: int
  last: int
  is_write: bool
  thread: Any
  clock: np.ndarray
  position: int | None  # The one that counts; None: all of the clock.
  where: str | None

  def __str__(self):
    kind = 'write' if self.is_write else 'read'
    part = self.part
    return (
      f'{kind} of {part.key.buffer_id}{part.access.range} from {self.thread} '
      f'in {self.where}'
    )

  def overlaps(self, old):
    if self.part.key == old.part.key:
      return ranges._ranges_overlap(
        self.part.access.range, old.part.access.range
      )
    return self.first <= old.last and old.first <= self.last

  def races(self, old):
    if not (self.is_write or old.is_write) or old.before(self):
      return False
    # Who rewrites values with what all would write races with no other.
    same = any(x.is_write and IDEMPOTENT in str(x.where) for x in (self, old))
    return (
      not same
      or not all(
        isinstance(x.thread, shared_memory.Warpgroup) for x in (self, old)
      )
      or self.thread == old.thread
    )

  def before(self, clock):
    """Whether who has this clock knows of the access."""
    if self.position is not None:
      return self.clock[self.position] <= clock.clock[self.position]
    return (self.clock <= clock.clock).all()

  def hides(self, old, line):
    """Whether who does not race with this does not with `old`."""
    at = np.clip((old.first, old.last), line * LINE, (line + 1) * LINE - 1)
    return (
      (self.is_write or (not old.is_write and old.thread == self.thread))
      and self.first <= at[0]
      and at[1] <= self.last
      and (
        old.before(self)
        if self.position is None
        else old.position == self.position and old.before(self)
      )
    )


def deallocate(self):
  """Without asking whether the last phase of a barrier was awaited."""
  with self.cv:
    self.ref_count -= 1
    if not self.ref_count and self.arrivals_count:
      raise ValueError(f'{self.arrivals_count} arrivals are pending')


class TestCase(parameterized.TestCase):
  """Interprets the kernels of `module` on the CPU."""

  module: Any = None

  def setUp(self):
    super().setUp()
    changed = Instead(
      plgpu,
      wgmma=wgmma,
      wgmma_wait=wgmma_wait,
      wgmma_accumulator_load=wgmma_accumulator_load,
    )
    self.plgpu = changed
    for module, name, value in (
      (self.module, 'pl', Instead(pl, run_state=run_state)),
      (gpu_callbacks, 'GPURaceDetectionState', Lines),
      (gpu_callbacks, 'wgmma_accumulator_deref', wgmma_accumulator_deref),
      (
        jaxpr_interpret.JaxprInterpreter,
        '_interpret_inline_mgpu_p',
        interpret_inline_mgpu,
      ),
      (shared_memory.Barrier, 'deallocate', deallocate),
      (dependent, 'wait', lambda plgpu: None),  # One kernel after the other.
    ):
      self.enter_context(mock.patch.object(module, name, value))
    params = plgpu.InterpretGPUParams(
      detect_races=True, num_tma_threads_per_device=64
    )
    self.enter_context(plgpu.force_gpu_interpret_mode(params))
    self.addCleanup(gpu_callbacks.reset_gpu_interpret_mode_state)

  def interpret_attention(self):
    """That of `history_attention`, too."""
    for name, value in (
      ('plgpu', self.plgpu),
      ('pl', self.module.pl),
      ('_zero_rows', zero_rows),
      ('of_layer', attention.of_layer.__wrapped__),  # Not another test's.
    ):
      self.enter_context(mock.patch.object(attention, name, value))

  def races_found(self):
    return gpu_callbacks.get_races().races_found
