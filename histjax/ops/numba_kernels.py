"""Candidate tower and interaction head as machine code, called by XLA.

A unit of work is a group of a few tiles of candidates, which passes through all
layers together: a layer's weights, and a block of keys and values, are read for
all of its tiles before the next. XLA's threads take units until none is left.
Activations are held transposed, `[channels, LANES]`: a vector is one channel of
all candidates of a tile. So weights, keys and values are used one number at a
time for a whole vector, and sums over channels or keys, of norms and softmax
too, never cross the lanes of a vector.

XLA calls a `handler` by its foreign function interface (xla/ffi/api/c_api.h,
shipped with jaxlib), whose structures are `np.dtype`s here.

One file: what Numba keeps on disk is of one, and would not follow another.
"""

from __future__ import annotations

import functools
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
from histjax.ops.interaction_head.weights import TILE

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
# Tiles of a group, at most: what is read of a layer serves all of them. More
# gain nothing, and their activations leave the second cache.
_TILES = 8
_UNITS = 2  # Groups of every thread, at least, while there are tiles.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)
_WORD = 4  # Bytes of a float32.
_BYTES = LANES * _WORD  # Of a vector.
_ALIGN = 128  # Bytes: no vector lies across two cache lines.

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


@_vectors
def _pack(e, w, stride, count, packed):
  """Moves ROWS numbers of each k, which lie `stride` apart, together."""
  rows = ir.VectorType(_FLOAT, ROWS)

  def move(k, _):
    source = e.builder.add(w, e.builder.mul(k, stride))
    number = e.builder.load(
      e.builder.inttoptr(source, rows.as_pointer()), align=_WORD
    )
    target = e.builder.add(packed, e.builder.mul(k, k.type(ROWS * _WORD)))
    e.builder.store(
      number, e.builder.inttoptr(target, rows.as_pointer()), align=_WORD
    )
    return []

  e.loop(count, [], move)


_add_products = _product(ROWS, adjacent=True, add=True)
_add_one_product = _product(1, adjacent=True, add=True)
_set_products = _product(ROWS, adjacent=False, add=False)
_set_one_product = _product(1, adjacent=False, add=False)


@njit
def _linear(w, stride, x, count, c, rows):
  """`c[r] += sum_k w[k, r] x[k]` for `rows` vectors c."""
  r = 0
  while r + ROWS <= rows:
    _add_products((w + r * _WORD, stride, x, count, c + r * _BYTES))
    r += ROWS
  while r < rows:
    _add_one_product((w + r * _WORD, stride, x, count, c + r * _BYTES))
    r += 1


@njit
def _linear_of_tiles(w, stride, x, count, c, rows, tiles, apart, packed):
  """`_linear` for tiles whose x and c lie `apart` bytes from one another.

  The ROWS columns of w in use are packed, for all tiles: as they lie, they
  share cache lines with other columns and, at wide strides, sets and pages.
  """
  if tiles == 1:  # It would cost more than it saves.
    _linear(w, stride, x, count, c, rows)
    return
  r = 0
  while r + ROWS <= rows:
    _pack((w + r * _WORD, stride * _WORD, count, packed))
    for t in range(tiles):
      at = t * apart
      _add_products((packed, ROWS, x + at, count, c + at + r * _BYTES))
    r += ROWS
  while r < rows:
    for t in range(tiles):
      at = t * apart
      _add_one_product(
        (w + r * _WORD, stride, x + at, count, c + at + r * _BYTES)
      )
    r += 1


@njit
def _scores(w, stride, x, count, c, rows):
  """`c[r] = sum_k w[r, k] x[k]` for `rows` vectors c."""
  r = 0
  while r + ROWS <= rows:
    _set_products((w + r * _WORD * stride, stride, x, count, c + r * _BYTES))
    r += ROWS
  while r < rows:
    _set_one_product((w + r * _WORD * stride, stride, x, count, c + r * _BYTES))
    r += 1


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
def _copy(e, x, out, count):
  e.each(out, count, lambda i: e.load(x, i))


@_vectors
def _relu(e, x, count):
  # What is NaN stays NaN.
  e.each(x, count, lambda i: e.larger(e.load(x, i), e.const(0.0)))


@_vectors
def _cross(e, x0, y, x, count):
  """`x = x0 y + x`."""
  e.each(x, count, lambda i: e.fma(e.load(x0, i), e.load(y, i), e.load(x, i)))


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


def _named(name):
  """`njit` of a function that others are defined by the same code as.

  Numba tells such functions apart by numbers that are new in each process. What
  two processes have compiled and kept on disk would have the same symbols for
  different functions, of which the first to be loaded serves all.
  """

  def compiled(function):
    function.__qualname__ = f'{function.__qualname__}.{name}'
    return njit(function)

  return compiled


def _array(kind):
  """A function from an address and a size to the array there."""
  pointer = _pointer_to(kind)

  @_named(kind)
  def view(address, count):
    return carray(pointer(address), count)

  return view


_floats, _ints, _words = map(_array, (types.float32, types.int32, types.intp))


def _structure(name, *fields):
  """The layout of a C structure, and a function from an address to it."""
  dtype = np.dtype(list(fields), align=True)
  pointer = _pointer_to(numba.from_dtype(dtype))

  @_named(name)
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

# What a kernel is passed, in this order; attributes are sorted by their names.
OPERANDS = (
  'candidates', 'sin', 'cos', 'keys', 'values', 'start', 'stop', 'count',
  'query', 'output', 'mlp_in', 'mlp_out', 'bias', 'final_scale', 'final_bias',
)  # fmt: skip
# `layers` of them, from `first` of the weights and `cached` of the cache.
ATTRIBUTES = ('cached', 'final_norm', 'first', 'heads', 'layers', 'rotate')
HEAD_OPERANDS = (
  'features', 'user', 'readout', 'count', 'tiles', 'vectors', 'widths'
)  # fmt: skip
HEAD_ATTRIBUTES = ('cross_layers', 'rank', 'tasks')

_KEYS_AT, _MLP_IN_AT = OPERANDS.index('keys'), OPERANDS.index('mlp_in')
_WIDTHS_AT = HEAD_OPERANDS.index('widths')

# A call: the units of work, the rows, what a kernel adds.
_COMMON = _fields(
  'i8', 'next done users units groups group rows num_candidates result'
)
_JOB, _job = _structure(
  'job',
  *_COMMON,
  *_fields('i8', 'num_keys width hidden'),
  *_fields('i8', ' '.join((*ATTRIBUTES, *OPERANDS))),
)
_HEAD_JOB, _head_job = _structure(
  'head_job',
  *_COMMON,
  *_fields('i8', 'of_user of_features of_readout num_widths'),
  *_fields('i8', ' '.join((*HEAD_ATTRIBUTES, *HEAD_OPERANDS))),
)
_NEXT, _DONE, _USERS = (_JOB.fields[x][1] for x in ('next', 'done', 'users'))


def _layout(job, operands, attributes):
  """The bytes of a job, and where its operands and attributes begin."""
  return (
    job.itemsize, job.fields[operands[0]][1], job.fields[attributes[0]][1]
  )  # fmt: skip


_JOB_LAYOUT = _layout(_JOB, OPERANDS, ATTRIBUTES)
_HEAD_LAYOUT = _layout(_HEAD_JOB, HEAD_OPERANDS, HEAD_ATTRIBUTES)


@njit
def _transpose(source, count, width, target):
  """`[count, width]` to `[width, LANES]`, zeros in the lanes beyond."""
  _zero((target, width))
  x, y = _floats(source, count * width), _floats(target, width * LANES)
  for m in range(count):
    for d in range(width):
      y[d * LANES + m] = x[m * width + d]


@njit
def _find_bounds(start, stop, num_keys, bounds):
  """The keys that some lane sees, and those that every lane sees."""
  starts, stops = _ints(start, LANES), _ints(stop, LANES)
  lower, upper = num_keys, 0
  first_common, last_common = 0, num_keys
  for m in range(LANES):
    if starts[m] < stops[m]:
      lower, upper = min(lower, starts[m]), max(upper, stops[m])
    first_common = max(first_common, starts[m])
    last_common = min(last_common, stops[m])
  words = _words(bounds, 4)
  words[0], words[1], words[2], words[3] = (
    lower, upper, first_common, last_common
  )  # fmt: skip


@njit
def _attend(job, layer, row, tiles, apart, query, out, start, bounds, block):
  """Attention of all heads; `query` and `out` are `[width, LANES]`.

  All tiles read their i-th blocks of keys and values before their next: the
  same ones where their ranges begin together, and else near ones.
  """
  stop, state = start + _BYTES, bounds + _BYTES
  shrink = state + 2 * _BYTES
  most = 0
  for t in range(tiles):
    own = _words(bounds + t * apart, 4)
    most = max(most, own[1] - own[0])
  head_dim = job.width // job.heads
  cached = ((job.cached + layer) * job.rows + row) * job.num_keys * job.width
  for n in range(job.heads):
    channels = n * head_dim * _BYTES
    for t in range(tiles):
      _zero((out + t * apart + channels, head_dim))
      _start_softmax((state + t * apart,))
    for offset in range(0, most, _KEYS):
      for t in range(tiles):
        at = t * apart
        own = _words(bounds + at, 4)
        first = own[0] + offset
        count = min(_KEYS, own[1] - first)
        if count <= 0:
          continue
        keys = (cached + first * job.width + n * head_dim) * _WORD
        scores = block + at
        _scores(
          job.keys + keys, job.width, query + at + channels, head_dim,
          scores, count,
        )  # fmt: skip
        if first < own[2] or first + count > own[3]:
          _mask((scores, first, start + at, stop + at, count))
        _softmax((scores, count, state + at))
        if offset > 0:
          _scale((out + at + channels, shrink + at, head_dim))
        _linear(
          job.values + keys, job.width, scores, count,
          out + at + channels, head_dim,
        )  # fmt: skip
    for t in range(tiles):
      _finish_softmax((state + t * apart,))
      _scale((out + t * apart + channels, shrink + t * apart, head_dim))


@njit
def _tile_bytes(job):
  """Bytes of a tile: three activations, angles, range, softmax, a block."""
  rotated = job.width // job.heads
  block = max(_KEYS, _HIDDEN)
  return (3 * job.width + rotated + 6 + block) * _BYTES


@njit
def _work_bytes(job):
  """Bytes of a thread: its tiles, a factor, packed columns of a matrix."""
  packed = max(job.width, _HIDDEN) * ROWS * _WORD
  return job.group * _tile_bytes(job) + _BYTES + packed


@njit
def _begin_unit(job, row, first, count, width):
  """How many candidates of a unit are real, and the results of all of them.

  These are `width` numbers each, zeros of those that are not real.
  """
  here = min(job.num_candidates - first, count)
  real = max(min(_ints(job.count, job.rows)[row] - first, here), 0)
  index = row * job.num_candidates + first
  result = _floats(job.result + index * width * _WORD, here * width)
  for i in range(real * width, here * width):
    result[i] = 0
  return real, result


@njit
def _load_tile(job, row, first, real, x, sin, start, bounds, factor):
  """Fills a tile with its candidates, their angles and ranges."""
  width, half = job.width, job.width // job.heads // 2
  index = row * job.num_candidates + first
  _transpose(job.candidates + index * width * _WORD, real, width, x)
  if job.rotate:
    for source, target in ((job.sin, sin), (job.cos, sin + half * _BYTES)):
      _transpose(source + index * half * _WORD, real, half, target)
      _multiply((target, factor, half))
  stop = start + _BYTES
  for source, target in ((job.start, start), (job.stop, stop)):
    given, own = _ints(source + index * _WORD, real), _ints(target, LANES)
    for m in range(LANES):
      # Lanes without a candidate see what the first does, so as to force no
      # mask; their results are dropped.
      own[m] = min(max(given[m if m < real else 0], 0), job.num_keys)
  _find_bounds(start, stop, job.num_keys, bounds)


@njit
def _group(job, row, first_tile, tiles, work):
  """All layers of the candidates of a few tiles of a row."""
  width, hidden, heads = job.width, job.hidden, job.heads
  head_dim = width // heads
  apart = _tile_bytes(job)
  x = work
  z = x + width * _BYTES
  query = z + width * _BYTES
  sin = query + width * _BYTES
  cos = sin + head_dim // 2 * _BYTES
  start = sin + head_dim * _BYTES  # And the ranges' stops.
  bounds = start + 2 * _BYTES  # And the softmax's three vectors.
  block = bounds + 4 * _BYTES
  factor = work + job.group * apart
  packed = factor + _BYTES

  first = first_tile * LANES
  real, result = _begin_unit(job, row, first, tiles * LANES, width)
  tiles = (real + LANES - 1) // LANES
  _floats(factor, 1)[0] = _LOG2_E / math.sqrt(head_dim)
  for t in range(tiles):
    at = t * apart
    _load_tile(
      job, row, first + t * LANES, min(real - t * LANES, LANES),
      x + at, sin + at, start + at, bounds + at, factor,
    )  # fmt: skip

  for layer in range(job.layers):
    matrix = job.first + layer
    square = matrix * width * width * _WORD
    wide = matrix * width * hidden * _WORD
    query_bias = job.bias + matrix * (3 * width + hidden) * _WORD
    output_bias = query_bias + width * _WORD
    in_bias = output_bias + width * _WORD
    out_bias = in_bias + hidden * _WORD

    for at in range(0, tiles * apart, apart):
      _normalize((x + at, z + at, width))
      _set_bias((query_bias, query + at, width))
    _linear_of_tiles(
      job.query + square, width, z, width, query, width, tiles, apart, packed
    )
    for at in range(0, tiles * apart, apart):
      if job.rotate:
        for n in range(heads):
          _rotate(
            (query + at + n * head_dim * _BYTES, sin + at, cos + at,
             head_dim // 2)
          )  # fmt: skip
      else:
        _multiply((query + at, factor, width))
    _attend(job, layer, row, tiles, apart, query, z, start, bounds, block)
    for at in range(0, tiles * apart, apart):
      _add_bias((output_bias, x + at, width))
    _linear_of_tiles(
      job.output + square, width, z, width, x, width, tiles, apart, packed
    )

    for at in range(0, tiles * apart, apart):
      _normalize((x + at, z + at, width))
      _add_bias((out_bias, x + at, width))
    for channel in range(0, hidden, _HIDDEN):
      count = min(_HIDDEN, hidden - channel)
      for at in range(0, tiles * apart, apart):
        _set_bias((in_bias + channel * _WORD, block + at, count))
      _linear_of_tiles(
        job.mlp_in + wide + channel * _WORD, hidden, z, width, block, count,
        tiles, apart, packed,
      )  # fmt: skip
      for at in range(0, tiles * apart, apart):
        _gelu((block + at, count))
      _linear_of_tiles(
        job.mlp_out + wide + channel * width * _WORD, width, block, count,
        x, width, tiles, apart, packed,
      )  # fmt: skip

  for t in range(tiles):
    own = x + t * apart
    if job.final_norm:
      _normalize((own, own, width))
      _affine((job.final_scale, job.final_bias, own, width))
    y = _floats(own, width * LANES)
    for m in range(min(real - t * LANES, LANES)):
      for d in range(width):
        result[(t * LANES + m) * width + d] = y[d * LANES + m]


@njit
def _blocks(width):
  return (width + TILE - 1) // TILE


@njit
def _head_widths(job):
  """Vectors of x0, of the widest layer of the MLP, of a cross layer's rank."""
  deep = _blocks(job.of_user + job.of_features) + _blocks(job.of_readout)
  widest = 0
  for width in _ints(job.widths, job.num_widths):
    widest = max(widest, width)
  return deep * TILE, widest, job.rank


@njit
def _head_tile_bytes(job):
  """Bytes of a tile: x0, x, two layers of the MLP, two of a rank, a block."""
  deep, widest, rank = _head_widths(job)
  return (2 * (deep + widest + rank) + TILE) * _BYTES


@njit
def _head_work_bytes(job):
  """Bytes of a thread: its tiles, and one of the user."""
  return (job.group + 1) * _head_tile_bytes(job)


@njit
def _through(weights, first, last, x, c, columns, tiles, apart):
  """`c += x[first:last] W[first:last]`, in place of W its tiles, by rows."""
  wide = _blocks(columns)
  for k in range(first // TILE, (last + TILE - 1) // TILE):
    begin = max(first, k * TILE)
    count = min(last, (k + 1) * TILE) - begin
    for n in range(wide):
      w = weights + ((k * wide + n) * TILE + begin - k * TILE) * TILE * _WORD
      for at in range(0, tiles * apart, apart):
        _linear(
          w, TILE, x + at + begin * _BYTES, count,
          c + at + n * TILE * _BYTES, min(TILE, columns - n * TILE),
        )  # fmt: skip


@njit
def _head_group(job, row, first_tile, tiles, work):
  """The head of the candidates of a few tiles of a row."""
  of_user, of_features, of_readout = (
    job.of_user, job.of_features, job.of_readout
  )  # fmt: skip
  rank, cross_layers, tasks = job.rank, job.cross_layers, job.tasks
  widths = _ints(job.widths, job.num_widths)
  deep, widest, _ = _head_widths(job)
  near = of_user + of_features
  far = _blocks(near) * TILE  # Where the readout is.
  end = far + of_readout
  apart = _head_tile_bytes(job)
  x0 = work
  x = x0 + deep * _BYTES
  hidden = x + deep * _BYTES
  other = hidden + widest * _BYTES
  low = other + widest * _BYTES
  next_low = low + rank * _BYTES
  block = next_low + rank * _BYTES
  of_all = job.group * apart  # From a tile to what the user has in all.

  first = first_tile * LANES
  index = row * job.num_candidates + first
  real, result = _begin_unit(job, row, first, tiles * LANES, tasks)
  tiles = (real + LANES - 1) // LANES
  if tiles == 0:
    return

  in_mlp, in_cross = job.tiles, job.tiles
  depth = deep // TILE
  for i in range(job.num_widths):
    in_cross += depth * _blocks(widths[i]) * TILE * TILE * _WORD
    depth = _blocks(widths[i])
  low_blocks = _blocks(rank)
  bias = job.vectors

  # The user, of whom every candidate's sums begin with the same.
  _set_bias((job.user + row * of_user * _WORD, x0 + of_all, of_user))
  _set_bias((bias, hidden + of_all, widths[0]))
  _through(
    in_mlp, 0, of_user, x0 + of_all, hidden + of_all, widths[0], 1, apart
  )
  if cross_layers > 0:
    _zero((low + of_all, rank))
    _through(in_cross, 0, of_user, x0 + of_all, low + of_all, rank, 1, apart)
  for t in range(tiles):
    at = t * apart
    own = index + t * LANES
    count = min(real - t * LANES, LANES)
    _copy((x0 + of_all, x0 + at, of_user))
    _transpose(
      job.features + own * of_features * _WORD, count, of_features,
      x0 + at + of_user * _BYTES,
    )  # fmt: skip
    _transpose(
      job.readout + own * of_readout * _WORD, count, of_readout,
      x0 + at + far * _BYTES,
    )  # fmt: skip
    _copy((hidden + of_all, hidden + at, widths[0]))
    if cross_layers > 0:
      _copy((low + of_all, low + at, rank))
      _copy((x0 + at, x + at, deep))

  _through(in_mlp, of_user, near, x0, hidden, widths[0], tiles, apart)
  _through(in_mlp, far, end, x0, hidden, widths[0], tiles, apart)
  in_mlp += deep * _blocks(widths[0]) * TILE * _WORD
  bias += _blocks(widths[0]) * TILE * _WORD
  for i in range(1, job.num_widths):
    for at in range(0, tiles * apart, apart):
      _relu((hidden + at, widths[i - 1]))
      _set_bias((bias, other + at, widths[i]))
    _through(in_mlp, 0, widths[i - 1], hidden, other, widths[i], tiles, apart)
    in_mlp += _blocks(widths[i - 1]) * _blocks(widths[i]) * TILE * TILE * _WORD
    bias += _blocks(widths[i]) * TILE * _WORD
    hidden, other = other, hidden
  last = widths[job.num_widths - 1]
  for at in range(0, tiles * apart, apart):
    _relu((hidden + at, last))

  if cross_layers > 0:
    _through(in_cross, of_user, near, x0, low, rank, tiles, apart)
    _through(in_cross, far, end, x0, low, rank, tiles, apart)
    tile = in_cross + deep * low_blocks * TILE * _WORD
  for i in range(cross_layers):
    more = i + 1 < cross_layers
    for at in range(0, tiles * apart, apart):
      _zero((next_low + at, rank))
    for begin in range(0, deep, TILE):
      stop = near if begin < far else end
      count = min(TILE, stop - begin)
      channels = begin * _BYTES
      for at in range(0, tiles * apart, apart):
        _set_bias((bias + begin * _WORD, block + at, count))
        for k in range(low_blocks):
          _linear(
            tile + k * TILE * TILE * _WORD, TILE,
            low + at + k * TILE * _BYTES, min(TILE, rank - k * TILE),
            block + at, count,
          )  # fmt: skip
        y = x + at + channels
        _cross((x0 + at + channels, block + at, y, count))
        if more:
          for n in range(low_blocks):
            _linear(
              tile + (low_blocks + n) * TILE * TILE * _WORD, TILE, y, count,
              next_low + at + n * TILE * _BYTES, min(TILE, rank - n * TILE),
            )  # fmt: skip
      tile += low_blocks * (1 + more) * TILE * TILE * _WORD
    bias += deep * _WORD
    low, next_low = next_low, low

  last_bias = bias + tasks * _blocks(last) * TILE * _WORD
  if cross_layers > 0:
    last_bias += tasks * deep * _WORD
  for task in range(tasks):
    for at in range(0, tiles * apart, apart):
      _set_bias((last_bias + task * _WORD, block + at, 1))
      by = bias
      if cross_layers > 0:
        _add_one_product((by, 1, x + at, near, block + at))
        _add_one_product(
          (by + far * _WORD, 1, x + at + far * _BYTES, of_readout, block + at)
        )
        by += deep * _WORD
      _add_one_product((by, 1, hidden + at, last, block + at))
      y = _floats(block + at, LANES)
      own = at // apart * LANES
      for m in range(min(real - own, LANES)):
        result[(own + m) * tasks + task] = y[m]
    if cross_layers > 0:
      bias += deep * _WORD
    bias += _blocks(last) * TILE * _WORD


def _worker(name, view, group, work_bytes):
  """A function that takes units of a job until none is left."""

  @_named(name)
  def work(address):
    job = view(address)
    tiles = (job.num_candidates + LANES - 1) // LANES
    unit = _fetch_add(address + _NEXT, 1)
    if unit < job.units:
      memory = _malloc(work_bytes(job) + _ALIGN)
      aligned = (memory + _ALIGN - 1) // _ALIGN * _ALIGN
      while unit < job.units:
        row, part = unit // job.groups, unit % job.groups
        first = tiles * part // job.groups
        end = tiles * (part + 1) // job.groups
        group(job, row, first, end - first, aligned)
        _fetch_add(address + _DONE, 1)
        unit = _fetch_add(address + _NEXT, 1)
      _free(memory)

  return work


_work = _worker('tower', _job, _group, _work_bytes)
_head_work = _worker('head', _head_job, _head_group, _head_work_bytes)


@njit
def _leave(address):
  """The last one who knows a job frees it."""
  if _fetch_add(address + _USERS, -1) == 1:
    _free(address)


def _task(address):
  """What another thread runs, possibly after the call has returned."""
  _work(address)
  _leave(address)


def _head_task(address):
  """See `_task`."""
  _head_work(address)
  _leave(address)


_BASE = _fields('i8', 'struct_size extension_start')
# Of the header, under its names but where those changed; pointers are integers.
STRUCTURES: dict[str, np.dtype] = {}


def _of_header(name, *fields):
  STRUCTURES[name], view = _structure(name, *fields)
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
  'extension',
  ('struct_size', 'i8'),
  ('type', 'i4'),
  *_fields('i8', 'next metadata'),
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
def _schedule(api, context, memory, task, address):
  """Whether a thread will run the job."""
  args = _schedule_args(memory)
  args.struct_size, args.extension_start = _SCHEDULE_BYTES, 0
  args.ctx, args.task, args.data = context, task, address
  return not _drop(api, memory, _call(api.ThreadPool_Schedule, memory))


@njit
def _divide(job, threads):
  """Sets how many groups a row's tiles form, and the tiles of the largest.

  Groups are small enough that every thread takes a few: some begin late.
  """
  tiles = (job.num_candidates + LANES - 1) // LANES
  least = max(job.rows * ((tiles + _TILES - 1) // _TILES), _UNITS * threads)
  least = (least + threads - 1) // threads * threads
  job.groups = min((least + job.rows - 1) // job.rows, tiles)
  job.group = (tiles + job.groups - 1) // job.groups
  job.units = job.rows * job.groups


def _symbol(name):
  """The address of what has this name, resolved when this code is loaded."""

  @intrinsic
  def address(typing_context):
    del typing_context

    def generate(context, builder, signature, args):
      del context, signature, args
      kind = ir.FunctionType(ir.VoidType(), [])
      found = cgutils.get_or_insert_function(builder.module, kind, name)
      return builder.ptrtoint(found, ir.IntType(64))

    return types.intp(), generate

  return address


_TASK, _HEAD_TASK = 'histjax_candidate_tower_task', 'histjax_head_task'
_task_address, _head_task_address = _symbol(_TASK), _symbol(_HEAD_TASK)


@njit
def _begin(frame_address, layout):
  """The job of a call, or 0 if XLA asks for something else."""
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
  size, first_operand, first_attribute = layout
  address = _malloc(size)
  job = _job(address)
  num_args, num_attrs = frame.args.size, frame.attrs.size
  args = _words(frame.args.args, num_args)
  operands = _words(address + first_operand, num_args)
  for i in range(num_args):
    operands[i] = _buffer(args[i]).data
  job.result = _buffer(_words(frame.rets.rets, 1)[0]).data
  attributes = _words(frame.attrs.attrs, num_attrs)
  given = _words(address + first_attribute, num_attrs)
  for i in range(num_attrs):
    given[i] = _words(_scalar(attributes[i]).value, 1)[0]
  job.rows, job.num_candidates = _size(frame, 0, 0), _size(frame, 0, 1)
  job.next, job.done = 0, 0
  return address


@njit
def _size(frame, argument, axis):
  """Of an argument's axis."""
  args = _words(frame.args.args, frame.args.size)
  return _words(_buffer(args[argument]).dims, axis + 1)[axis]


@njit
def _share(frame_address, address, task):
  """Divides a job, and has other threads take part."""
  frame = _call_frame(frame_address)
  job = _job(address)
  api = _api(frame.api)
  memory = _malloc(_THREADS_BYTES + _SCHEDULE_BYTES)  # Of any arguments.
  threads = _num_threads(api, frame.ctx, memory)
  _divide(job, threads)
  others = min(threads, job.units) - 1
  job.users = others + 1
  for i in range(others):
    if not _schedule(api, frame.ctx, memory, task, address):
      for _ in range(i, others):
        _leave(address)
      break
  _free(memory)
  return job.units


@njit
def _end(address, units):
  """Waits for what other threads have begun."""
  while _read(address + _DONE) < units:
    _yield()
  _leave(address)


def _handler(frame_address):
  address = _begin(frame_address, _JOB_LAYOUT)
  if address != 0:
    frame = _call_frame(frame_address)
    job = _job(address)
    job.width = _size(frame, 0, 2)
    job.num_keys = _size(frame, _KEYS_AT, 2)
    job.hidden = _size(frame, _MLP_IN_AT, 2)
    units = _share(frame_address, address, _task_address())
    _work(address)
    _end(address, units)
  return 0


def _head_handler(frame_address):
  address = _begin(frame_address, _HEAD_LAYOUT)
  if address != 0:
    frame = _call_frame(frame_address)
    job = _head_job(address)
    job.of_features = _size(frame, 0, 2)
    job.of_user = _size(frame, 1, 1)
    job.of_readout = _size(frame, 2, 2)
    job.num_widths = _size(frame, _WIDTHS_AT, 0)
    units = _share(frame_address, address, _head_task_address())
    _head_work(address)
    _end(address, units)
  return 0


def _compile(signature, function):
  """Machine code, from the cache on disk if there can be one."""
  try:
    return cfunc(signature, cache=True)(function)
  except RuntimeError as error:
    if 'cannot cache function' not in str(error):
      raise
    return cfunc(signature)(function)  # No folder for it can be written.


_KERNELS = {
  'candidate_tower': (_TASK, _task, _handler),
  'interaction_head': (_HEAD_TASK, _head_task, _head_handler),
}
_tasks: dict[
  str, Any
] = {}  # What is compiled goes with the last reference to it.


@functools.cache
def handler(name: str) -> Any:
  """What XLA calls for a kernel: a C function, compiled."""
  symbol, task, call = _KERNELS[name]
  _tasks[symbol] = _compile(types.void(types.intp), task)
  llvm.add_symbol(symbol, _tasks[symbol].address)
  return _compile(types.intp(types.intp), call)
