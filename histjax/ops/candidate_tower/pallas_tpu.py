"""The candidate tower in one TPU kernel, as a Pallas grid over its layers.

The grid is (row, tile of candidates, layer, key block). A tile's float32
residual stream, its queries and its attention's sums stay in vector memory from
the first layer to the last; weights, keys and values stream in behind the
computation, a layer and a block ahead. The first step of a layer makes the
queries, each step attends to a block of keys with online softmax, the last one
projects the attention's output and runs the MLP. A key block that no candidate
of a tile sees is neither computed nor fetched, nor is anything for a tile whose
candidates do not count: the index maps know so from prefetched scalars.

Heads lie side by side in lanes, `[T, N H]`. Scores are held transposed, `[keys,
candidates]`, so that ranges, maxima and sums are rows `[1, candidates]`. One
head among those of 128 lanes is selected by zeroing the lanes of the others in
one factor, whose cost on the matrix unit does not depend on it. A width that is
no multiple of 128 leaves lanes of its last registers empty: blocks span the
whole width, and the compiler masks what lies beyond in sums and products.

Candidates and keys beyond the last are read from outside the arrays, so they
may be anything; a candidate's do not meet another's, a key's are replaced.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from histjax.ops import rotary, tpu
from histjax.ops.candidate_tower import reference
from histjax.types import KeyRange

_LANES = 128
# Candidates in a tile, keys in a block, columns of the MLP computed at once.
# Not tuned: no TPU was at hand.
_MAX_BLOCK = 512
_MAX_TILE_BYTES = 1 << 20  # Of a tile's tokens in float32.
# Less than the smallest vector memory of v5e, v5p and v6e, 64 MiB.
_MAX_VMEM = 48 << 20
# The index maps' scalars live in scalar memory, 1 MiB on the smallest TPU.
_MAX_SCALARS = 1 << 17
_NEGATIVE = -1e30  # Finite: below it lies -inf, which weighs exp(-inf) = 0.
_NN = (((1,), (0,)), ((), ()))  # x y
_NT = (((1,), (1,)), ((), ()))  # x y^T


class _Plan(NamedTuple):
  """How a call is cut.

  Attributes:
    num_candidates: C.
    num_keys: L.
    num_layers: of the tower.
    num_heads: N.
    head_dim: H.
    hidden: F.
    tile: candidates in a tile, a multiple of 128.
    block: keys in a block, a multiple of 128.
    rotate: whether queries are rotated.
    final_norm: whether the result is the last norm's.
    vmem: bytes of vector memory that the kernel asks for.
  """

  num_candidates: int
  num_keys: int
  num_layers: int
  num_heads: int
  head_dim: int
  hidden: int
  tile: int
  block: int
  rotate: bool
  final_norm: bool
  vmem: int

  @property
  def width(self) -> int:
    return self.num_heads * self.head_dim

  @property
  def tiles(self) -> int:
    return pl.cdiv(self.num_candidates, self.tile)


def candidate_tower(
  candidates: Float[Array, 'B C D'],
  position: Int[Array, 'B C'] | None,
  keys: Float[Array, 'layers B L N H'],
  values: Float[Array, 'layers B L N H'],
  key_range: KeyRange,
  weights: reference.TowerWeights,
  *,
  num_heads: int,
  count: Int[Array, 'B'] | None = None,
  final_norm: bool = True,
) -> Float[Array, 'B C D']:
  """See `api.candidate_tower`; cannot be differentiated."""
  num_rows, num_candidates, _ = candidates.shape
  rotate = position is not None
  plan = make_plan(candidates, keys, weights, num_heads, rotate, final_norm)
  if num_rows * (2 * plan.tiles + 1) > _MAX_SCALARS:
    raise NotImplementedError(
      f'pallas_tpu keeps the bounds of {num_rows * plan.tiles} tiles in scalar '
      f'memory, which holds {_MAX_SCALARS // 2}; split the rows'
    )
  if count is None:
    count = jnp.full((num_rows,), num_candidates, jnp.int32)
  # [B, 3, C]: rows of lanes, of which a column would fill 128.
  if position is None:
    position = jnp.zeros_like(key_range.start)
  seen = jnp.stack([*_clip(key_range, count, plan), position], axis=1)
  padding = plan.tiles * plan.tile - num_candidates
  seen = jnp.pad(seen, ((0, 0), (0, 0), (0, padding)))
  keys, values = (
    x.reshape(*x.shape[:3], plan.width) for x in (keys, values)
  )  # [layers, B, L, D]
  final = jnp.stack([weights.final_scale, weights.final_bias])
  return _call(
    count,
    candidates,
    seen,
    keys,
    values,
    weights.query,
    weights.output,
    weights.mlp_in,
    weights.mlp_out,
    weights.bias[:, None, :],
    final,
    plan=plan,
  )


def make_plan(
  candidates, keys, weights, num_heads: int, rotate: bool, final_norm: bool
) -> _Plan:
  """The blocks of a call, or a NotImplementedError that says why not."""
  num_candidates, width = candidates.shape[1:]
  num_layers, hidden = weights.mlp_in.shape[0], weights.mlp_in.shape[2]
  head_dim = width // num_heads
  if keys.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      'pallas_tpu computes in bfloat16 or float32, the types that a TPU '
      f'multiplies, and keys is {keys.dtype}'
    )
  # A head fills whole registers, or a whole number of them fills one. Another
  # would lie in parts of two.
  if head_dim % _LANES and (_LANES % head_dim or head_dim < 4):
    raise NotImplementedError(
      'pallas_tpu needs H = D / N that is a multiple of 128 or one of 4, 8, '
      f'16, 32, 64; got D={width}, H={head_dim}'
    )
  out_type = keys.dtype if final_norm else jnp.dtype(jnp.float32)
  types = (keys.dtype, candidates.dtype, out_type)
  limit = _MAX_TILE_BYTES // (4 * _whole(width))
  limit = max(_LANES, min(_MAX_BLOCK, limit // _LANES * _LANES))
  while True:
    tile = _block(num_candidates, limit)
    block = _block(keys.shape[2], limit)
    vmem = _vmem(tile, block, _whole(width), _whole(hidden), types)
    if vmem <= _MAX_VMEM:
      break
    if limit == _LANES:
      raise NotImplementedError(
        f'pallas_tpu would need {vmem >> 20} MiB of vector memory for '
        f'D={width}, F={hidden} in {keys.dtype}, and takes {_MAX_VMEM >> 20} '
        'at most'
      )
    limit -= _LANES
  return _Plan(
    num_candidates=num_candidates,
    num_keys=keys.shape[2],
    num_layers=num_layers,
    num_heads=num_heads,
    head_dim=head_dim,
    hidden=hidden,
    tile=tile,
    block=block,
    rotate=rotate,
    final_norm=final_norm,
    vmem=vmem,
  )


def _vmem(tile: int, block: int, width: int, hidden: int, types) -> int:
  """Bytes of vector memory for these many lanes of D and F, with a margin."""
  dtype, in_type, out_type = types
  # Candidates and results, in units of the type of matrices.
  tokens = tile * (in_type.itemsize + out_type.itemsize) // dtype.itemsize
  streamed = 2 * width * (width + hidden) + (2 * block + tokens) * width
  scratch = 5 * tile * width + tile * width * dtype.itemsize // 4
  temporary = 4 * tile * max(block, width, min(hidden, _MAX_BLOCK))
  return 2 * streamed * dtype.itemsize + 4 * (scratch + temporary) + (2 << 20)


def _whole(channels: int) -> int:
  """The lanes of the registers that hold them."""
  return pl.cdiv(channels, _LANES) * _LANES


def _block(size: int, limit: int) -> int:
  """A multiple of 128 up to `limit` that splits `size` evenly."""
  even = pl.cdiv(size, pl.cdiv(size, limit))
  return pl.cdiv(even, _LANES) * _LANES


def _clip(key_range: KeyRange, count, plan: _Plan):
  """Ranges within `[0, L)`; `[L, 0)` where empty or not counting."""
  start, stop = (
    jnp.clip(x, 0, plan.num_keys) for x in (key_range.start, key_range.stop)
  )
  index = jnp.arange(plan.num_candidates, dtype=jnp.int32)[None, :]
  empty = (start >= stop) | (index >= count[:, None])
  return jnp.where(empty, plan.num_keys, start), jnp.where(empty, 0, stop)


def _call(count, candidates, seen, keys, values, *weights, plan: _Plan):
  num_rows, _, width = candidates.shape
  start, stop = (
    seen[:, i].reshape(num_rows, plan.tiles, plan.tile) for i in range(2)
  )
  # The padding's start and stop are 0, which must not count as a start.
  first = jnp.where(start < stop, start, plan.num_keys).min(axis=2).reshape(-1)
  last = stop.max(axis=2).reshape(-1)
  blocks = pl.cdiv(last, plan.block) - first // plan.block
  specs = _specs(plan)
  tile, tokens = plan.tile, (plan.tile, width)
  scratch = [
    pltpu.VMEM(tokens, jnp.float32),  # The residual stream.
    pltpu.VMEM(tokens, keys.dtype),  # Queries.
    pltpu.VMEM((width, tile), jnp.float32),  # The attention's sums.
    pltpu.VMEM((plan.num_heads, tile), jnp.float32),  # Its largest scores.
    pltpu.VMEM((plan.num_heads, tile), jnp.float32),  # Its sums of weights.
  ]
  if plan.rotate:
    scratch += [pltpu.VMEM(tokens, jnp.float32)] * 2  # Cosines and sines.
  frequency = rotary.frequencies(plan.head_dim)[:, None]
  return pl.pallas_call(
    functools.partial(_kernel, plan=plan),
    name='candidate_tower',
    out_shape=jax.ShapeDtypeStruct(
      candidates.shape, keys.dtype if plan.final_norm else jnp.float32
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(
        num_rows,
        plan.tiles,
        plan.num_layers,
        jnp.maximum(blocks.max(), 1),
      ),
      in_specs=specs.inputs,
      out_specs=specs.output,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=plan.vmem,
    ),
  )(first, last, count, candidates, seen, frequency, keys, values, *weights)


class _Specs(NamedTuple):
  inputs: list[pl.BlockSpec]
  output: pl.BlockSpec


def _specs(plan: _Plan) -> _Specs:
  """The blocks of a step; what is not needed stays what it was before."""
  width, hidden = plan.width, plan.hidden

  def tokens(b, i, *_):
    return b, i, 0

  def ranges(b, i, *_):
    return b, 0, i

  def layer(b, i, at, first_ref, last_ref, count_ref):
    del first_ref, last_ref
    # The tile before ended with the last layer.
    counts = i * plan.tile < count_ref[b]
    return jnp.where(counts, at, plan.num_layers - 1)

  def weight(b, i, at, step, *refs):
    del step
    return layer(b, i, at, *refs), 0, 0

  def cached(b, i, at, step, *refs):
    lower, upper = _key_blocks(refs[0], refs[1], b, i, plan)
    block = jnp.minimum(lower + step, jnp.maximum(upper - 1, 0))
    return layer(b, i, at, *refs), b, block, 0

  def constant(*_):
    return 0, 0

  of_keys = pl.BlockSpec((1, 1, plan.block, width), cached)
  output = pl.BlockSpec((1, plan.tile, width), tokens)
  return _Specs(
    [
      output,
      pl.BlockSpec((1, 3, plan.tile), ranges),
      pl.BlockSpec((plan.head_dim // 2, 1), constant),
      of_keys,
      of_keys,
      pl.BlockSpec((1, width, width), weight),
      pl.BlockSpec((1, width, width), weight),
      pl.BlockSpec((1, width, hidden), weight),
      pl.BlockSpec((1, hidden, width), weight),
      pl.BlockSpec((1, 1, 3 * width + hidden), weight),
      pl.BlockSpec((2, width), constant),
    ],
    output,
  )


def _key_blocks(first_ref, last_ref, b, i, plan: _Plan):
  """The key blocks `[lower, upper)` that a tile sees."""
  tile = b * plan.tiles + i
  lower = jax.lax.div(first_ref[tile], plan.block)
  upper = jax.lax.div(last_ref[tile] + (plan.block - 1), plan.block)
  return lower, upper


# ------------------------------------------------------------------ kernel


class _Refs(NamedTuple):
  """What the kernel is given, in this order."""

  first: Any  # int32 [B * tiles], in scalar memory.
  last: Any
  count: Any  # int32 [B].
  candidates: Any  # [1, c, D]
  seen: Any  # int32 [1, 3, c]: start, stop, position.
  frequency: Any  # int32 [H / 2, 1]
  key: Any  # [1, 1, k, D]
  value: Any
  query_weight: Any  # [1, D, D]
  output_weight: Any
  mlp_in: Any  # [1, D, F]
  mlp_out: Any  # [1, F, D]
  bias: Any  # [1, 1, 3 D + F]
  final: Any  # [2, D]
  out: Any  # [1, c, D]
  stream: Any  # [c, D]
  query: Any  # [c, D]
  acc: Any  # [D, c]
  largest: Any  # [N, c]
  total: Any
  cos: Any = None  # [c, D]
  sin: Any = None


def _kernel(*refs, plan: _Plan):
  r = _Refs(*refs)
  b, i, layer, step = (pl.program_id(axis) for axis in range(4))
  last_step = step == pl.num_programs(3) - 1
  last_layer = layer == plan.num_layers - 1
  lower, upper = _key_blocks(r.first, r.last, b, i, plan)
  tile = b * plan.tiles + i
  left = r.count[b] - i * plan.tile  # Candidates of the tile that count.
  counts = left > 0

  @pl.when(counts & (layer == 0) & (step == 0))
  def _():
    r.stream[...] = r.candidates[0].astype(jnp.float32)
    if plan.rotate:
      _make_tables(r, plan)

  @pl.when(counts & (step == 0))
  def _():
    _make_queries(r, plan)
    r.acc[...] = jnp.zeros_like(r.acc)
    r.total[...] = jnp.zeros_like(r.total)
    r.largest[...] = jnp.full_like(r.largest, _NEGATIVE)

  @pl.when(counts & (lower + step < upper))
  def _():
    offset = (lower + step) * plan.block
    _attend(r, offset, r.first[tile], r.last[tile], plan)

  @pl.when(counts & last_step)
  def _():
    _finish_layer(r, plan)

  @pl.when(counts & last_step & last_layer)
  def _():
    x = r.stream[...]
    if plan.final_norm:
      x = reference.normalize(x) * r.final[0:1] + r.final[1:2]
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    r.out[0] = jnp.where(index < left, x, 0).astype(r.out.dtype)

  @pl.when(jnp.logical_not(counts) & last_step & last_layer)
  def _():
    r.out[...] = jnp.zeros_like(r.out)


def _make_tables(r: _Refs, plan: _Plan):
  """Cosines and sines of each candidate's angles, for all lanes."""
  angle = rotary.radians(r.seen[0, 2:3], r.frequency[...])  # [H / 2, c]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  r.cos[...] = jnp.concatenate([cos, cos] * plan.num_heads, axis=0).T
  r.sin[...] = jnp.concatenate([-sin, sin] * plan.num_heads, axis=0).T


def _make_queries(r: _Refs, plan: _Plan):
  """Queries times the scores' scale, rotated."""
  query = _linear(reference.normalize(r.stream[...]), r.query_weight, r, 0)
  if plan.rotate:
    half, width = plan.head_dim // 2, plan.width
    lane = jax.lax.broadcasted_iota(jnp.int32, query.shape, 1)
    partner = jnp.where(
      lane % plan.head_dim < half,
      _roll(query, width - half),  # The channel H / 2 behind.
      _roll(query, half),
    )
    query = query * r.cos[...] + partner * r.sin[...]
  r.query[...] = (plan.head_dim**-0.5 * query).astype(r.query.dtype)


def _attend(r: _Refs, offset, first, last, plan: _Plan):
  """Online softmax over a block of keys."""
  index = offset + jax.lax.broadcasted_iota(
    jnp.int32, (plan.block, plan.tile), 0
  )
  visible = (r.seen[0, 0:1] <= index) & (index < r.seen[0, 1:2])  # [k, c]
  value = tpu.rows(r.value[0, 0], first - offset, last - offset)
  value = value.T.astype(r.value.dtype)  # [D, k]
  for h in range(plan.num_heads):
    lanes, head, row = _lanes(h, plan), _head(h, plan), pl.ds(h, 1)
    query = _only_head(r.query[:, lanes], h, plan)
    scores = tpu.dot(r.key[0, 0, :, lanes], query, _NT)  # [k, c]
    scores = jnp.where(visible, scores, -jnp.inf)
    before = r.largest[row]  # [1, c]
    largest = jnp.maximum(before, scores.max(axis=0, keepdims=True))
    weight = jnp.exp(scores - largest)
    shrink = jnp.exp(before - largest)
    r.largest[row] = largest
    total = weight.sum(axis=0, keepdims=True)
    r.total[row] = shrink * r.total[row] + total
    r.acc[head] = shrink * r.acc[head] + tpu.dot(value[head], weight, _NN)


def _finish_layer(r: _Refs, plan: _Plan):
  """The output projection, the MLP and their residuals."""
  total = r.total[...]
  total = jnp.where(total == 0, 1, total)  # An empty range.
  for h in range(plan.num_heads):
    r.acc[_head(h, plan)] = r.acc[_head(h, plan)] / total[h : h + 1]
  width, hidden = plan.width, plan.hidden
  x = r.stream[...] + _linear(r.acc[...].T, r.output_weight, r, width)
  z = reference.normalize(x).astype(r.query.dtype)
  for begin in range(0, hidden, _MAX_BLOCK):
    chunk = slice(begin, min(begin + _MAX_BLOCK, hidden))
    bias = r.bias[0, :, 2 * width + chunk.start : 2 * width + chunk.stop]
    u = jax.nn.gelu(tpu.dot(z, r.mlp_in[0, :, chunk], _NN) + bias)
    x += tpu.dot(u, r.mlp_out[0, chunk], _NN)
  r.stream[...] = x + r.bias[0, :, 2 * width + hidden :]


def _linear(x, weight_ref, r: _Refs, begin: int):
  """`x W + b`, the bias from `begin` on."""
  weight = weight_ref[0]
  bias = r.bias[0, :, begin : begin + weight.shape[1]]
  return tpu.dot(x, weight, _NN) + bias


def _roll(x, shift: int):
  """`[T, D]` rolled by `shift` channels."""
  width = x.shape[1]
  if width % _LANES == 0:
    return pltpu.roll(x, shift, 1)
  # That rolls whole registers.
  return jnp.concatenate([x[:, width - shift :], x[:, : width - shift]], axis=1)


def _head(h: int, plan: _Plan):
  """The channels of a head."""
  return slice(h * plan.head_dim, (h + 1) * plan.head_dim)


def _lanes(h: int, plan: _Plan):
  """The channels in the registers that hold those of a head."""
  width = max(_LANES, plan.head_dim)
  begin = h * plan.head_dim // width * width
  return slice(begin, min(begin + width, plan.width))


def _only_head(x, h: int, plan: _Plan):
  """The lanes of `_lanes(h)`, with zeros in all but those of head `h`."""
  if x.shape[1] == plan.head_dim:
    return x
  begin = h * plan.head_dim % _LANES
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  inside = (lane >= begin) & (lane < begin + plan.head_dim)
  return jnp.where(inside, x.astype(jnp.float32), 0).astype(x.dtype)
