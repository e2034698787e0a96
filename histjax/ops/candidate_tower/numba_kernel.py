"""The candidate tower as machine code: Numba and vectors, called by XLA.

A unit of work is a tile of candidates, which passes through all layers with
its activations in the core's own caches: XLA's threads take units until none
is left. Activations are held transposed, `[channels, LANES]`: a vector is one
channel of all candidates of the tile. So weights, keys and values are read as
they lie, one number at a time for a whole vector, and sums over channels or
keys, of norms and softmax too, never cross the lanes of a vector.

XLA calls `handler` by its foreign function interface (xla/ffi/api/c_api.h,
shipped with jaxlib), whose structures are `np.dtype`s here.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from histjax.ops.candidate_tower.reference import EPSILON

types: Any = numba.types
config: Any = numba.config
intrinsic: Any = numba_intrinsic  # Its calls look like plain Python's.

_FEATURES = config.CPU_FEATURES
if _FEATURES is None:  # Numba compiles for this machine.
  _FEATURES = llvm.get_host_cpu_features().flatten()
# Sums of a product that are in registers at once: ROWS vectors of LANES. They
# leave room for a vector of factors and a number: of 32 registers of 16 lanes,
# of 16 of 8, or of 32 of 4.
LANES, ROWS = (32, 8) if '+avx512f' in _FEATURES else (16, 6)
_KEYS = 128  # In a block of scores, which stays in the first cache.
_HIDDEN = 128  # Channels of the MLP computed at once; likewise.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)
_WORD = 4  # Bytes of a float32.
_BYTES = LANES * _WORD  # Of a vector.
_ALIGN = 128  # Bytes: no vector lies across two cache lines.
_TASK = 'histjax_candidate_tower_task'

_FLOAT: Any = ir.FloatType()
_INT: Any = ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)


class _Emitter:
  """Emits instructions on vectors of LANES numbers, at addresses."""

  def __init__(self, builder):
    self.builder = builder

  def address(self, base, index, kind=_VECTOR):
    pointer = self.builder.inttoptr(base, kind.as_pointer())
    return self.builder.gep(pointer, [index])

  def load(self, base, index, kind=_VECTOR):
    value = self.builder.load(self.address(base, index, kind))
    value.align = _WORD
    return value

  def store(self, value, base, index):
    self.builder.store(value, self.address(base, index)).align = _WORD

  def const(self, number):
    return ir.Constant(_VECTOR, [number] * LANES)

  def ints(self, number):
    return ir.Constant(_INTS, [number] * LANES)

  def spread(self, number):
    """A number in every lane."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = self.builder.insert_element(undefined, number, _INT(0))
    return self.builder.shuffle_vector(first, undefined, self.ints(0))

  def number(self, base, index):
    """The number at an address, in every lane."""
    return self.spread(self.load(base, index, _FLOAT))

  def fma(self, a, b, c):
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    name = f'llvm.fmuladd.v{LANES}f32'  # Fused where that is fast.
    function = cgutils.get_or_insert_function(self.builder.module, kind, name)
    return self.builder.call(function, [a, b, c])

  def larger(self, a, b):
    """The larger; a, if that is NaN."""
    return self.builder.select(self.builder.fcmp_ordered('<', a, b), b, a)

  def exp2(self, x):
    """`2^x` to 2 ulp; 0 below -126.5. `x` is at most 127."""
    b = self.builder
    x = self.larger(x, self.const(-127.0))
    # The sum's last bits are the integer next to x.
    magic = self.const(1.5 * 2**23)
    sum_ = b.fadd(x, magic)
    rest = b.fsub(x, b.fsub(sum_, magic))
    power = self.const(math.log(2) ** 7 / math.factorial(7))
    for k in range(6, -1, -1):
      power = self.fma(
        power, rest, self.const(math.log(2) ** k / math.factorial(k))
      )
    exponent = b.add(b.bitcast(sum_, _INTS), self.ints(127))
    scale = b.bitcast(b.shl(exponent, self.ints(23)), _VECTOR)
    return b.fmul(power, scale)

  def loop(self, count, start, body):
    """`for i in range(count): sums = body(i, sums)`; returns the last sums."""
    b = self.builder
    before, kind = b.block, count.type
    head, inner, after = (b.append_basic_block(x) for x in 'hba')
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(kind)
    index.add_incoming(kind(0), before)
    sums = [b.phi(x.type) for x in start]
    for phi, x in zip(sums, start, strict=True):
      phi.add_incoming(x, before)
    b.cbranch(b.icmp_signed('<', index, count), inner, after)
    b.position_at_end(inner)
    results = body(index, sums)
    index.add_incoming(b.add(index, kind(1)), b.block)
    for phi, x in zip(sums, results, strict=True):
      phi.add_incoming(x, b.block)
    b.branch(head)
    b.position_at_end(after)
    return sums

  def each(self, x, count, value):
    """`x[i] = value(i)` for `count` vectors."""

    def body(i, _):
      self.store(value(i), x, i)
      return []

    self.loop(count, [], body)


def _vectors(emit):
  """An intrinsic of integers (addresses, sizes) from what emits its code."""

  @intrinsic
  def call(typing_context, args):
    del typing_context

    def generate(context, builder, signature, values):
      (values,) = values
      words = [
        context.cast(builder, x, t, types.intp)
        for x, t in zip(
          cgutils.unpack_tuple(builder, values), signature.args[0], strict=True
        )
      ]
      emit(_Emitter(builder), *words)
      return context.get_dummy_value()

    return types.void(args), generate

  return call


def _product(rows, *, adjacent, add):
  """`c[r] (+)= sum_k w[k, r] x[k]` for `rows` vectors c.

  `adjacent`: whether w's numbers of one k lie side by side, `stride` from those
  of the next k; otherwise those of one r do.
  """

  @_vectors
  def emit(e, w, stride, x, count, c):
    b, kind = e.builder, w.type
    at = [kind(r) if adjacent else b.mul(stride, kind(r)) for r in range(rows)]

    def body(k, sums):
      base = b.mul(k, stride) if adjacent else k
      factor = e.load(x, k)
      return [
        e.fma(e.number(w, b.add(base, i)), factor, s)
        for i, s in zip(at, sums, strict=True)
      ]

    # From zero: begun at c, which may be large, each would be rounded to that.
    totals = e.loop(count, [e.const(0.0)] * rows, body)
    for r, total in enumerate(totals):
      if add:
        total = b.fadd(e.load(c, kind(r)), total)
      e.store(total, c, kind(r))

  return emit


def _products(*, adjacent, add):
  """`_product` for any number of vectors c."""
  many = _product(ROWS, adjacent=adjacent, add=add)
  one = _product(1, adjacent=adjacent, add=add)

  @njit
  def product(w, stride, x, count, c, rows):
    step = _WORD if adjacent else _WORD * stride
    r = 0
    while r + ROWS <= rows:
      many((w + r * step, stride, x, count, c + r * _BYTES))
      r += ROWS
    while r < rows:
      one((w + r * step, stride, x, count, c + r * _BYTES))
      r += 1

  return product


_linear = _products(adjacent=True, add=True)
_scores = _products(adjacent=False, add=False)


@_vectors
def _zero(e, x, count):
  e.each(x, count, lambda i: e.const(0.0))


@_vectors
def _set_bias(e, bias, x, count):
  e.each(x, count, lambda i: e.number(bias, i))


@_vectors
def _add_bias(e, bias, x, count):
  e.each(x, count, lambda i: e.builder.fadd(e.load(x, i), e.number(bias, i)))


@_vectors
def _normalize(e, x, out, count):
  b = e.builder
  (total,) = e.loop(
    count, [e.const(0.0)], lambda i, s: [b.fadd(s[0], e.load(x, i))]
  )
  size = e.spread(b.sitofp(count, _FLOAT))
  mean = b.fdiv(total, size)

  def square(i, s):
    y = b.fsub(e.load(x, i), mean)
    return [e.fma(y, y, s[0])]

  (total,) = e.loop(count, [e.const(0.0)], square)
  variance = b.fadd(b.fdiv(total, size), e.const(EPSILON))
  kind = ir.FunctionType(_VECTOR, [_VECTOR])
  root = cgutils.get_or_insert_function(
    b.module, kind, f'llvm.sqrt.v{LANES}f32'
  )
  inverse = b.fdiv(e.const(1.0), b.call(root, [variance]))

  e.each(out, count, lambda i: b.fmul(b.fsub(e.load(x, i), mean), inverse))


@_vectors
def _affine(e, scale, bias, x, count):
  e.each(
    x,
    count,
    lambda i: e.fma(e.load(x, i), e.number(scale, i), e.number(bias, i)),
  )


@_vectors
def _gelu(e, x, count):
  """`x / (1 + exp(-2 u))` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`."""
  b = e.builder
  factor = -2 * math.sqrt(2 / math.pi) * _LOG2_E

  def gelu(i):
    y = e.load(x, i)
    u = e.fma(b.fmul(y, y), e.const(0.044715 * factor), e.const(factor))
    u = b.fmul(u, y)
    u = b.select(b.fcmp_ordered('<', u, e.const(126.0)), u, e.const(126.0))
    return b.fdiv(y, b.fadd(e.const(1.0), e.exp2(u)))

  e.each(x, count, gelu)


@_vectors
def _rotate(e, x, sin, cos, half):
  """Turns pairs of vectors, `half` apart."""
  b = e.builder

  def turn(i, _):
    other = b.add(i, half)
    p, q, s, c = (
      e.load(*at) for at in ((x, i), (x, other), (sin, i), (cos, i))
    )
    e.store(b.fsub(b.fmul(p, c), b.fmul(q, s)), x, i)
    e.store(b.fadd(b.fmul(q, c), b.fmul(p, s)), x, other)
    return []

  e.loop(half, [], turn)


@_vectors
def _multiply(e, x, factor, count):
  """`x *= factor`, a number."""
  y = e.number(factor, count.type(0))
  e.each(x, count, lambda i: e.builder.fmul(e.load(x, i), y))


@_vectors
def _scale(e, x, factor, count):
  """`x *= factor`, a vector."""
  y = e.load(factor, count.type(0))
  e.each(x, count, lambda i: e.builder.fmul(e.load(x, i), y))


@_vectors
def _mask(e, scores, first, start, stop, count):
  """Scores of keys outside of the lanes' ranges become the lowest."""
  b = e.builder
  zero = count.type(0)
  first_seen, last = (e.load(x, zero, _INTS) for x in (start, stop))

  def masked(i):
    index = e.spread(b.trunc(b.add(first, i), _INT))
    seen = b.and_(
      b.icmp_signed('>=', index, first_seen), b.icmp_signed('<', index, last)
    )
    return b.select(seen, e.load(scores, i), e.const(-math.inf))

  e.each(scores, count, masked)


@_vectors
def _softmax(e, scores, count, state):
  """Scores become weights; `state` is `[top, total, shrink]`, vectors."""
  b, kind = e.builder, count.type
  top, total = e.load(state, kind(0)), e.load(state, kind(1))
  (new,) = e.loop(
    count, [top], lambda i, s: [e.larger(e.load(scores, i), s[0])]
  )
  shrink = e.exp2(b.fsub(top, new))

  def weigh(i, s):
    weight = e.exp2(b.fsub(e.load(scores, i), new))
    e.store(weight, scores, i)
    return [b.fadd(s[0], weight)]

  (total,) = e.loop(count, [b.fmul(total, shrink)], weigh)
  for i, x in enumerate((new, total, shrink)):
    e.store(x, state, kind(i))


@_vectors
def _start_softmax(e, state):
  kind = state.type
  e.store(e.const(_LOWEST), state, kind(0))
  e.store(e.const(0.0), state, kind(1))


@_vectors
def _finish_softmax(e, state):
  """`shrink` becomes 1 / total, or 0 if no key was seen."""
  b, kind = e.builder, state.type
  total = e.load(state, kind(1))
  some = b.fcmp_ordered('>', total, e.const(0.0))
  inverse = b.select(some, b.fdiv(e.const(1.0), total), e.const(0.0))
  e.store(inverse, state, kind(2))


def _pointer_to(kind):
  @intrinsic
  def pointer(typing_context, address):
    del typing_context

    def generate(context, builder, signature, args):
      target = context.get_value_type(signature.return_type)
      return builder.inttoptr(args[0], target)

    return types.CPointer(kind)(address), generate

  return pointer


def _array(kind):
  """A function from an address and a size to the array there."""
  pointer = _pointer_to(kind)

  @njit
  def view(address, count):
    return carray(pointer(address), count)

  return view


_floats, _ints, _words = map(_array, (types.float32, types.int32, types.intp))


def _structure(*fields):
  """The layout of a C structure, and a function from an address to it."""
  dtype = np.dtype(list(fields), align=True)
  pointer = _pointer_to(numba.from_dtype(dtype))

  @njit
  def view(address):
    return carray(pointer(address), 1)[0]

  return dtype, view


def _fields(kind, names):
  return tuple((name, kind) for name in names.split())


@intrinsic
def _fetch_add(typing_context, address, number):
  """Adds to an integer in one step; returns what it was."""
  del typing_context

  def generate(context, builder, signature, args):
    del context, signature
    pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
    return builder.atomic_rmw('add', pointer, args[1], 'seq_cst')

  return types.intp(types.intp, types.intp), generate


@intrinsic
def _read(typing_context, address):
  """An integer that other threads change."""
  del typing_context

  def generate(context, builder, signature, args):
    del context, signature
    pointer = builder.inttoptr(args[0], args[0].type.as_pointer())
    return builder.load_atomic(pointer, 'seq_cst', 8)

  return types.intp(types.intp), generate


@intrinsic
def _call(typing_context, function, argument):
  """Calls a C function of one pointer that returns a pointer."""
  del typing_context

  def generate(context, builder, signature, args):
    del context, signature
    kind = ir.FunctionType(args[1].type, [args[1].type])
    return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])

  return types.intp(types.intp, types.intp), generate


_malloc = types.ExternalFunction('malloc', types.intp(types.intp))
_free = types.ExternalFunction('free', types.void(types.intp))
_yield = types.ExternalFunction('sched_yield', types.int32())

# What `numba_cpu` passes, in this order; attributes are sorted by their names.
OPERANDS = (
  'candidates', 'sin', 'cos', 'keys', 'values', 'start', 'stop', 'count',
  'query', 'output', 'mlp_in', 'mlp_out', 'bias', 'final_scale', 'final_bias',
)  # fmt: skip
ATTRIBUTES = ('final_norm', 'heads', 'rotate')

_KEYS_AT, _MLP_IN_AT = OPERANDS.index('keys'), OPERANDS.index('mlp_in')

# A call: the units of work, the shape, the options, the addresses.
_JOB, _job = _structure(
  *_fields('i8', 'next done users units'),
  *_fields('i8', 'layers rows num_candidates num_keys width hidden'),
  *_fields('i8', ' '.join(ATTRIBUTES)),
  *_fields('i8', ' '.join(OPERANDS)),
  *_fields('i8', 'result'),
)
_JOB_BYTES = _JOB.itemsize
_NEXT, _DONE, _USERS, _FIRST_OPERAND, _FIRST_ATTRIBUTE = (
  _JOB.fields[name][1]
  for name in ('next', 'done', 'users', OPERANDS[0], ATTRIBUTES[0])
)


@njit
def _transpose(source, count, width, target):
  """`[count, width]` to `[width, LANES]`, zeros in the lanes beyond."""
  _zero((target, width))
  x, y = _floats(source, count * width), _floats(target, width * LANES)
  for m in range(count):
    for d in range(width):
      y[d * LANES + m] = x[m * width + d]


@njit
def _attend(job, layer, row, query, out, start, stop, work):
  """Attention of all heads; `query` and `out` are `[width, LANES]`."""
  starts, stops = _ints(start, LANES), _ints(stop, LANES)
  lower, upper = job.num_keys, 0
  first_common, last_common = 0, job.num_keys  # Keys that every lane sees.
  for m in range(LANES):
    if starts[m] < stops[m]:
      lower, upper = min(lower, starts[m]), max(upper, stops[m])
    first_common = max(first_common, starts[m])
    last_common = min(last_common, stops[m])
  head_dim = job.width // job.heads
  state = work + _KEYS * _BYTES
  shrink = state + 2 * _BYTES
  cached = (layer * job.rows + row) * job.num_keys * job.width
  for n in range(job.heads):
    channels = n * head_dim * _BYTES
    _zero((out + channels, head_dim))
    _start_softmax((state,))
    for first in range(lower, upper, _KEYS):
      count = min(_KEYS, upper - first)
      at = (cached + first * job.width + n * head_dim) * _WORD
      _scores(job.keys + at, job.width, query + channels, head_dim, work, count)
      if first < first_common or first + count > last_common:
        _mask((work, first, start, stop, count))
      _softmax((work, count, state))
      if first > lower:
        _scale((out + channels, shrink, head_dim))
      _linear(job.values + at, job.width, work, count, out + channels, head_dim)
    _finish_softmax((state,))
    _scale((out + channels, shrink, head_dim))


@njit
def _work_bytes(job):
  """Bytes that a tile needs: three activations, the angles, a block."""
  rotated = job.width // job.heads
  block = max(_KEYS, _HIDDEN) + 3
  return (3 * job.width + rotated + 3 + block) * _BYTES


@njit
def _tile(job, row, tile, work):
  """All layers of the candidates of one tile."""
  width, hidden, heads = job.width, job.hidden, job.heads
  head_dim = width // heads
  half = head_dim // 2
  x = work
  z = x + width * _BYTES
  query = z + width * _BYTES
  sin = query + width * _BYTES
  cos = sin + half * _BYTES
  start = cos + half * _BYTES
  stop = start + _BYTES
  factor = stop + _BYTES
  block = factor + _BYTES

  first = tile * LANES
  here = min(job.num_candidates - first, LANES)
  real = max(min(_ints(job.count, job.rows)[row] - first, here), 0)
  index = row * job.num_candidates + first
  result = _floats(job.result + index * width * _WORD, here * width)
  for i in range(real * width, here * width):
    result[i] = 0
  if real == 0:
    return
  _transpose(job.candidates + index * width * _WORD, real, width, x)
  _floats(factor, 1)[0] = _LOG2_E / math.sqrt(head_dim)
  if job.rotate:
    for source, target in ((job.sin, sin), (job.cos, cos)):
      _transpose(source + index * half * _WORD, real, half, target)
      _multiply((target, factor, half))
  for source, target in ((job.start, start), (job.stop, stop)):
    given, own = _ints(source + index * _WORD, here), _ints(target, LANES)
    for m in range(LANES):
      # Lanes without a candidate see what the first does, so as to force no
      # mask; their results are dropped.
      own[m] = min(max(given[m if m < real else 0], 0), job.num_keys)

  for layer in range(job.layers):
    square = layer * width * width * _WORD
    wide = layer * width * hidden * _WORD
    query_bias = job.bias + layer * (3 * width + hidden) * _WORD
    output_bias = query_bias + width * _WORD
    in_bias = output_bias + width * _WORD
    out_bias = in_bias + hidden * _WORD

    _normalize((x, z, width))
    _set_bias((query_bias, query, width))
    _linear(job.query + square, width, z, width, query, width)
    if job.rotate:
      for n in range(heads):
        _rotate((query + n * head_dim * _BYTES, sin, cos, half))
    else:
      _multiply((query, factor, width))
    _attend(job, layer, row, query, z, start, stop, block)
    _add_bias((output_bias, x, width))
    _linear(job.output + square, width, z, width, x, width)

    _normalize((x, z, width))
    _add_bias((out_bias, x, width))
    for channel in range(0, hidden, _HIDDEN):
      count = min(_HIDDEN, hidden - channel)
      _set_bias((in_bias + channel * _WORD, block, count))
      _linear(
        job.mlp_in + wide + channel * _WORD, hidden, z, width, block, count
      )
      _gelu((block, count))
      _linear(
        job.mlp_out + wide + channel * width * _WORD, width, block, count,
        x, width,
      )  # fmt: skip

  if job.final_norm:
    _normalize((x, x, width))
    _affine((job.final_scale, job.final_bias, x, width))
  y = _floats(x, width * LANES)
  for m in range(real):
    for d in range(width):
      result[m * width + d] = y[d * LANES + m]


@njit
def _work(address):
  """Takes units until none is left."""
  job = _job(address)
  tiles = (job.num_candidates + LANES - 1) // LANES
  unit = _fetch_add(address + _NEXT, 1)
  if unit < job.units:
    memory = _malloc(_work_bytes(job) + _ALIGN)
    work = (memory + _ALIGN - 1) // _ALIGN * _ALIGN
    while unit < job.units:
      _tile(job, unit // tiles, unit % tiles, work)
      _fetch_add(address + _DONE, 1)
      unit = _fetch_add(address + _NEXT, 1)
    _free(memory)


@njit
def _leave(address):
  """The last one who knows a job frees it."""
  if _fetch_add(address + _USERS, -1) == 1:
    _free(address)


def _task(address):
  """What another thread runs, possibly after the call has returned."""
  _work(address)
  _leave(address)


_BASE = _fields('i8', 'struct_size extension_start')
# Of the header, under its names but where those changed; pointers are integers.
STRUCTURES: dict[str, np.dtype] = {}


def _of_header(name, *fields):
  STRUCTURES[name], view = _structure(*fields)
  return view


_of_header('Args', *_BASE, *_fields('i8', 'size types args'))
_of_header('Rets', *_BASE, *_fields('i8', 'size types rets'))
_of_header('Attrs', *_BASE, *_fields('i8', 'size types names attrs'))
_call_frame = _of_header(
  'CallFrame',
  *_BASE,
  *_fields('i8', 'api ctx'),
  ('stage', 'i4'),
  *((name, STRUCTURES[name.title()]) for name in ('args', 'rets', 'attrs')),
  ('future', 'i8'),
)
_buffer = _of_header(
  'Buffer', *_BASE, ('dtype', 'i4'), *_fields('i8', 'data rank dims')
)
_scalar = _of_header('Scalar', ('dtype', 'i4'), ('value', 'i8'))
_of_header('Api_Version', *_BASE, *_fields('i4', 'major_version minor_version'))
_metadata = _of_header(
  'Metadata',
  ('struct_size', 'i8'),
  ('api_version', STRUCTURES['Api_Version']),
  ('traits', 'i4'),
  ('state_type_id', 'i8'),
)
_api = _of_header(
  'Api',
  *_BASE,
  ('api_version', STRUCTURES['Api_Version']),
  *_fields('i8', 'internal_api Error_Create _error_text Error_Destroy'),
  *_fields('i8', 'Handler_Register Stream_Get Type_Register _context_get'),
  *_fields('i8', 'State_Set State_Get'),
  *_fields('i8', 'DeviceMemory_Allocate DeviceMemory_Free'),
  *_fields('i8', 'ThreadPool_Schedule ThreadPool_NumThreads'),
)
_error_destroy = _of_header('Error_Destroy_Args', *_BASE, ('error', 'i8'))
_num_threads_args = _of_header(
  'ThreadPool_NumThreads_Args', *_BASE, *_fields('i8', 'ctx num_threads')
)
_schedule_args = _of_header(
  'ThreadPool_Schedule_Args', *_BASE, *_fields('i8', 'ctx task data')
)
# An extension of a call frame by which XLA asks for a handler's version.
_, _extension = _structure(
  ('struct_size', 'i8'), ('type', 'i4'), *_fields('i8', 'next metadata')
)
_ERROR_BYTES, _THREADS_BYTES, _SCHEDULE_BYTES = (
  STRUCTURES[f'{name}_Args'].itemsize
  for name in ('Error_Destroy', 'ThreadPool_NumThreads', 'ThreadPool_Schedule')
)
MAJOR, MINOR = 0, 3  # Of the interface that these structures follow.
_METADATA = 1
_EXECUTE = 3


@njit
def _drop(api, memory, error):
  """Frees an error; whether there was one."""
  if error == 0:
    return False
  args = _error_destroy(memory)
  args.struct_size, args.extension_start = _ERROR_BYTES, 0
  args.error = error
  _call(api.Error_Destroy, memory)
  return True


@njit
def _num_threads(api, context, memory):
  number = memory + _THREADS_BYTES
  args = _num_threads_args(memory)
  args.struct_size, args.extension_start = _THREADS_BYTES, 0
  args.ctx, args.num_threads = context, number
  if _drop(api, memory, _call(api.ThreadPool_NumThreads, memory)):
    return 1
  return max(_words(number, 1)[0], 1)


@njit
def _schedule(api, context, memory, address):
  """Whether a thread will run the job."""
  args = _schedule_args(memory)
  args.struct_size, args.extension_start = _SCHEDULE_BYTES, 0
  args.ctx, args.task, args.data = context, _task_address(), address
  return not _drop(api, memory, _call(api.ThreadPool_Schedule, memory))


@intrinsic
def _task_address(typing_context):
  """The address of `_task`, resolved when this code is loaded."""
  del typing_context

  def generate(context, builder, signature, args):
    del context, signature, args
    kind = ir.FunctionType(ir.VoidType(), [])
    task = cgutils.get_or_insert_function(builder.module, kind, _TASK)
    return builder.ptrtoint(task, ir.IntType(64))

  return types.intp(), generate


def _handler(frame_address):
  frame = _call_frame(frame_address)
  if frame.extension_start != 0:
    extension = _extension(frame.extension_start)
    if extension.type == _METADATA:
      metadata = _metadata(extension.metadata)
      version = metadata.api_version
      version.major_version, version.minor_version = MAJOR, MINOR
      metadata.traits, metadata.state_type_id = 0, 0
      return 0
  if frame.stage != _EXECUTE:
    return 0
  address = _malloc(_JOB_BYTES)
  job = _job(address)
  num_args, num_attrs = frame.args.size, frame.attrs.size
  args = _words(frame.args.args, num_args)
  operands = _words(address + _FIRST_OPERAND, num_args)
  for i in range(num_args):
    operands[i] = _buffer(args[i]).data
  job.result = _buffer(_words(frame.rets.rets, 1)[0]).data
  attributes = _words(frame.attrs.attrs, num_attrs)
  given = _words(address + _FIRST_ATTRIBUTE, num_attrs)
  for i in range(num_attrs):
    given[i] = _words(_scalar(attributes[i]).value, 1)[0]
  dims = _words(_buffer(args[0]).dims, 3)
  job.rows, job.num_candidates, job.width = dims[0], dims[1], dims[2]
  job.num_keys = _words(_buffer(args[_KEYS_AT]).dims, 5)[2]
  dims = _words(_buffer(args[_MLP_IN_AT]).dims, 3)
  job.layers, job.hidden = dims[0], dims[2]
  job.units = job.rows * ((job.num_candidates + LANES - 1) // LANES)
  job.next, job.done = 0, 0

  api = _api(frame.api)
  memory = _malloc(_THREADS_BYTES + _SCHEDULE_BYTES)  # Of any arguments.
  others = min(_num_threads(api, frame.ctx, memory), job.units) - 1
  job.users = others + 1
  for i in range(others):
    if not _schedule(api, frame.ctx, memory, address):
      for _ in range(i, others):
        _leave(address)
      break
  _free(memory)
  units = job.units
  _work(address)
  while _read(address + _DONE) < units:
    _yield()
  _leave(address)
  return 0


def _compile(signature, function):
  """Machine code, from the cache on disk if there can be one."""
  try:
    return cfunc(signature, cache=True)(function)
  except RuntimeError as error:
    if 'cannot cache function' not in str(error):
      raise
    return cfunc(signature)(function)  # No folder for it can be written.


_compiled_task = _compile(types.void(types.intp), _task)
llvm.add_symbol(_TASK, _compiled_task.address)
handler = _compile(types.intp(types.intp), _handler)
