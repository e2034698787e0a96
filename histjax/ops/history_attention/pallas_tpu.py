"""History attention on TPU, as Pallas kernels with online softmax.

One grid step multiplies a block of keys with a tile of queries, for a group of
heads. Three kernels, each of which adds up in a fixed order: the output, the
query's gradient (both loop over key blocks), and the gradients of key and value
(loops over query tiles). A key block that no query of a tile sees is neither
computed nor fetched: the loops run from the tile's first seen key to its last,
known to the index maps as prefetched scalars.

The layout needs no transposed copy in memory, for any head dimension that is a
power of two. `[B, T, N, H]` is read as `[B, T, N H]`, and a group of G heads
fills the lanes of a block `[block, G H]`. Scores are held transposed,
`[keys, queries]`: the ranges, maxima and sums of the queries are then rows
`[1, queries]` that take no padding, and reductions run over sublanes. One head
of a group is selected by zeroing the lanes of the others in one factor of a
product, whose cost on the matrix unit does not depend on it.

Queries and keys beyond the last are read from outside the arrays, so they may
be anything and are replaced by zeros where they would meet a weight of zero.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from histjax.ops import partition, tpu
from histjax.types import KeyRange

_LANES = 128
# Queries and keys in a block. Not tuned: no TPU was at hand. A score block in
# float32 is then 1 MiB of the 16 MiB that a kernel may use on the smallest TPU.
_MAX_BLOCK = 512
_MAX_BLOCK_WIDTH = 256
# The index maps' scalars, int32, may fill half of the 1 MiB of scalar memory.
_MAX_SCALARS = 1 << 17
_NEGATIVE = -1e30  # Finite: below it lies -inf, which weighs exp(-inf) = 0.
_NN = (((1,), (0,)), ((), ()))  # x y
_NT = (((1,), (1,)), ((), ()))  # x y^T


class _Plan(NamedTuple):
  """How a call is cut.

  Attributes:
    num_queries: Q.
    num_keys: L.
    head_dim: H, padded.
    group: G, heads in a block.
    block_q: queries in a tile, a multiple of 128.
    block_k: keys in a block, a multiple of 128.
    scale: of the scores.
  """

  num_queries: int
  num_keys: int
  head_dim: int
  group: int
  block_q: int
  block_k: int
  scale: float

  @property
  def width(self) -> int:
    return self.group * self.head_dim

  @property
  def q_tiles(self) -> int:
    return pl.cdiv(self.num_queries, self.block_q)

  @property
  def k_blocks(self) -> int:
    return pl.cdiv(self.num_keys, self.block_k)


def history_attention(
  query: Float[Array, 'B Q N H'],
  key: Float[Array, 'B L N H'],
  value: Float[Array, 'B L N H'],
  key_range: KeyRange,
  *,
  scale: float,
) -> Float[Array, 'B Q N H']:
  """See `api.history_attention`; first-order gradients in reverse mode only."""
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      'pallas_tpu computes in bfloat16 or float32, the types that a TPU '
      f'multiplies, and query is {query.dtype}'
    )
  num_rows, num_queries, num_heads, head_dim = query.shape
  plan = make_plan(query.shape, key.shape[1], query.dtype, scale)
  num_scalars = 2 * num_rows * (plan.q_tiles + plan.k_blocks)
  if num_scalars > _MAX_SCALARS:
    raise NotImplementedError(
      f'pallas_tpu keeps {num_scalars} block bounds of {num_rows} rows in '
      f'scalar memory, which holds {_MAX_SCALARS}; split the rows'
    )
  pad = [(0, 0)] * 3 + [(0, plan.head_dim - head_dim)]
  q, k, v = (
    jnp.pad(x, pad).reshape(*x.shape[:2], -1) for x in (query, key, value)
  )  # [B, T, N H]
  out = _attend(q, k, v, *_clip(key_range, plan), plan)
  out = out.reshape(num_rows, num_queries, num_heads, -1)
  return out[..., :head_dim]


def make_plan(query_shape, num_keys: int, dtype, scale: float) -> _Plan:
  """The blocks of a call.

  A head takes a power of two of channels or a multiple of 128, so that heads
  fill lanes evenly, and at least the rows that one register packs.
  """
  _, num_queries, num_heads, head_dim = query_shape
  packed = 32 // jnp.dtype(dtype).itemsize
  if head_dim > _LANES:
    head_dim = _round_up(head_dim, _LANES)
  else:
    head_dim = max(packed, pl.next_power_of_2(head_dim))
  group = next(
    g
    for g in range(1, num_heads + 1)
    # A block spans whole registers or the whole array.
    if g == num_heads or num_heads % g == g * head_dim % _LANES == 0
  )
  limit = _MAX_BLOCK * _MAX_BLOCK_WIDTH // max(group * head_dim, 1)
  limit = max(_LANES, min(_MAX_BLOCK, limit // _LANES * _LANES))
  return _Plan(
    num_queries,
    num_keys,
    head_dim,
    group,
    _block(num_queries, limit),
    _block(num_keys, limit),
    scale,
  )


def _block(size: int, limit: int) -> int:
  """A multiple of 128 up to `limit` that splits `size` evenly."""
  return _round_up(pl.cdiv(size, pl.cdiv(size, limit)), _LANES)


def _round_up(size: int, multiple: int) -> int:
  return pl.cdiv(size, multiple) * multiple


def _clip(key_range: KeyRange, plan: _Plan):
  """Ranges `[B, Q']` of whole tiles; an empty one becomes `[L, 0)`."""
  start, stop = (
    jnp.clip(x, 0, plan.num_keys) for x in (key_range.start, key_range.stop)
  )
  empty = start >= stop
  start = jnp.where(empty, plan.num_keys, start)
  stop = jnp.where(empty, 0, stop)
  pad = ((0, 0), (0, plan.q_tiles * plan.block_q - plan.num_queries))
  return jnp.pad(start, pad, constant_values=plan.num_keys), jnp.pad(stop, pad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, start, stop, plan):
  return _by_rows(_forward, plan, 5, 2)(query, key, value, start, stop)[0]


def _forward_rule(query, key, value, start, stop, plan):
  out, log_total = _by_rows(_forward, plan, 5, 2)(
    query, key, value, start, stop
  )
  return out, (query, key, value, start, stop, out, log_total)


def _backward_rule(plan, residuals, cotangent):
  """`dS = P (dP - delta)`, `delta = sum(dO O)`; arXiv 2205.14135, B.4."""
  query, key, value, start, stop, out, log_total = residuals
  delta = cotangent.astype(jnp.float32) * out.astype(jnp.float32)
  delta = delta.reshape(*delta.shape[:2], -1, plan.head_dim).sum(axis=-1)
  delta = delta.swapaxes(1, 2)  # [B, N, Q]
  pad = plan.q_tiles * plan.block_q - plan.num_queries
  delta = jnp.pad(delta, ((0, 0), (0, 0), (0, pad)))
  delta = delta.reshape(log_total.shape)
  inputs = (query, key, value, cotangent, start, stop, log_total, delta)
  d_query, d_key, d_value = _by_rows(_backward, plan, 8, 3)(*inputs)
  return d_query, d_key, d_value, None, None


_attend.defvjp(_forward_rule, _backward_rule)


def _by_rows(function, plan: _Plan, num_in: int, num_out: int):
  return partition.by_rows(
    functools.partial(function, plan=plan),
    (0,) * num_in,
    (0,) * num_out,
    mesh_in_context=True,
  )


def _backward(*inputs, plan: _Plan):
  d_query = _query_gradient(*inputs, plan=plan)
  return d_query, *_key_gradients(*inputs, plan=plan)


# ------------------------------------------------------------------- calls


def _forward(query, key, value, start, stop, *, plan: _Plan):
  """The output and `log(sum(exp(scores)))`, `[B, N / G, G, Q']`."""
  num_rows, _, channels = query.shape
  num_groups = channels // plan.width
  bounds = tile_bounds(start, stop, plan)
  specs = _specs_over_keys(plan)
  statistics = (num_rows, num_groups, plan.group, start.shape[1])
  return pl.pallas_call(
    functools.partial(_forward_kernel, plan=plan),
    name='history_attention_forward',
    out_shape=(
      jax.ShapeDtypeStruct(query.shape, query.dtype),
      jax.ShapeDtypeStruct(statistics, jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(num_rows, num_groups, plan.q_tiles, _key_steps(*bounds, plan)),
      in_specs=[specs.query, specs.key, specs.key, specs.ranges],
      out_specs=(specs.query, specs.statistics),
      scratch_shapes=[
        pltpu.VMEM((plan.width, plan.block_q), jnp.float32),
        pltpu.VMEM((plan.group, plan.block_q), jnp.float32),
        pltpu.VMEM((plan.group, plan.block_q), jnp.float32),
      ],
    ),
    compiler_params=_PARALLEL,
  )(*bounds, query, key, value, jnp.stack([start, stop], axis=1))


def _query_gradient(
  query, key, value, cotangent, start, stop, log_total, delta, *, plan: _Plan
):
  num_rows, _, channels = query.shape
  bounds = tile_bounds(start, stop, plan)
  specs = _specs_over_keys(plan)
  steps = _key_steps(*bounds, plan)
  return pl.pallas_call(
    functools.partial(_query_gradient_kernel, plan=plan),
    name='history_attention_query_gradient',
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(num_rows, channels // plan.width, plan.q_tiles, steps),
      in_specs=[
        specs.query,
        specs.key,
        specs.key,
        specs.query,
        specs.ranges,
        specs.statistics,
        specs.statistics,
      ],
      out_specs=specs.query,
      scratch_shapes=[pltpu.VMEM((plan.width, plan.block_q), jnp.float32)],
    ),
    compiler_params=_PARALLEL,
  )(
    *bounds,
    query,
    key,
    value,
    cotangent,
    jnp.stack([start, stop], axis=1),
    log_total,
    delta,
  )


def _key_gradients(
  query, key, value, cotangent, start, stop, log_total, delta, *, plan: _Plan
):
  num_rows, _, channels = key.shape
  bounds = tile_bounds(start, stop, plan)
  tiles = key_block_bounds(*bounds, plan)
  steps = jnp.maximum(jnp.max(tiles[1] - tiles[0]), 1)
  specs = _specs_over_queries(plan)
  return pl.pallas_call(
    functools.partial(_key_gradients_kernel, plan=plan),
    name='history_attention_key_gradients',
    out_shape=(
      jax.ShapeDtypeStruct(key.shape, key.dtype),
      jax.ShapeDtypeStruct(value.shape, value.dtype),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(num_rows, channels // plan.width, plan.k_blocks, steps),
      in_specs=[
        specs.query,
        specs.key,
        specs.key,
        specs.query,
        specs.ranges,
        specs.statistics,
        specs.statistics,
      ],
      out_specs=(specs.key, specs.key),
      scratch_shapes=[
        pltpu.VMEM((plan.width, plan.block_k), jnp.float32),
        pltpu.VMEM((plan.width, plan.block_k), jnp.float32),
      ],
    ),
    compiler_params=_PARALLEL,
  )(
    *bounds,
    *tiles,
    query,
    key,
    value,
    cotangent,
    jnp.stack([start, stop], axis=1),
    log_total,
    delta,
  )


_PARALLEL = pltpu.CompilerParams(
  dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
)


def tile_bounds(
  start: Int[Array, 'B Q'], stop: Int[Array, 'B Q'], plan: _Plan
) -> tuple[Int[Array, 'tiles'], Int[Array, 'tiles']]:
  """The keys `[first, last)` that any query of a tile sees.

  Args:
    start: of whole tiles; L at an empty range.
    stop: likewise; 0 at an empty range.
    plan: the blocks.

  Returns:
    int32 `[B * tiles]`, row by row; `[L, 0)` where nothing is seen.
  """
  shape = (start.shape[0] * plan.q_tiles, plan.block_q)
  first, last = start.reshape(shape), stop.reshape(shape)
  return first.min(axis=1), last.max(axis=1)


def key_block_bounds(
  first: Int[Array, 'tiles'], last: Int[Array, 'tiles'], plan: _Plan
) -> tuple[Int[Array, 'blocks'], Int[Array, 'blocks']]:
  """The query tiles `[lower, upper)` between which a key block is seen.

  Args:
    first: of `tile_bounds`.
    last: likewise.
    plan: the blocks.

  Returns:
    int32 `[B * blocks]`, row by row; `[0, 0)` where nobody sees the block.
  """
  offset = plan.block_k * jnp.arange(plan.k_blocks, dtype=jnp.int32)
  first, last = (x.reshape(-1, plan.q_tiles, 1) for x in (first, last))
  offset = offset[None, None, :]
  sees = (first < offset + plan.block_k) & (last > offset)  # [B, tiles, blocks]
  lower = jnp.argmax(sees, axis=1).astype(jnp.int32)
  behind = jnp.argmax(sees[:, ::-1], axis=1).astype(jnp.int32)
  upper = jnp.where(sees.any(axis=1), plan.q_tiles - behind, 0)
  return lower.reshape(-1), upper.reshape(-1)


def _key_steps(first, last, plan: _Plan):
  """The most key blocks that any tile needs; at least one, to write zeros."""
  blocks = pl.cdiv(last, plan.block_k) - first // plan.block_k
  return jnp.maximum(blocks.max(), 1)


class _Specs(NamedTuple):
  query: pl.BlockSpec  # [B, Q, N H], also of the output and their gradients.
  key: pl.BlockSpec  # [B, L, N H], likewise.
  ranges: pl.BlockSpec  # [B, 2, Q']
  statistics: pl.BlockSpec  # [B, N / G, G, Q']


def _specs(plan: _Plan, tile: Any, block: Any) -> _Specs:
  """`tile` and `block` give the query tile and the key block of a step."""

  def query(b, g, *step):
    return b, tile(b, *step), g

  def key(b, g, *step):
    return b, block(b, *step), g

  def ranges(b, g, *step):
    del g
    return b, 0, tile(b, *step)

  def statistics(b, g, *step):
    return b, g, 0, tile(b, *step)

  return _Specs(
    pl.BlockSpec((1, plan.block_q, plan.width), query),
    pl.BlockSpec((1, plan.block_k, plan.width), key),
    pl.BlockSpec((1, 2, plan.block_q), ranges),
    pl.BlockSpec((1, 1, plan.group, plan.block_q), statistics),
  )


def _specs_over_keys(plan: _Plan) -> _Specs:
  """Steps over the key blocks of a tile; past the last it stays there."""

  def tile(b, i, step, first_ref, last_ref):
    del b, step, first_ref, last_ref
    return i

  def block(b, i, step, first_ref, last_ref):
    lower, upper = _key_blocks(first_ref, last_ref, b, i, plan)
    return jnp.minimum(lower + step, jnp.maximum(upper - 1, 0))

  return _specs(plan, tile, block)


def _specs_over_queries(plan: _Plan) -> _Specs:
  """Steps over the tiles of a key block; a skipped one stays at the first."""

  def tile(b, j, step, *refs):
    i, sees = _tile_of_step(b, j, step, *refs, plan=plan)
    return jnp.where(sees, i, refs[2][b * plan.k_blocks + j])

  def block(b, j, step, *refs):
    del b, step, refs
    return j

  return _specs(plan, tile, block)


def _key_blocks(first_ref, last_ref, b, i, plan: _Plan):
  """The key blocks `[lower, upper)` of tile `i`."""
  tile = b * plan.q_tiles + i
  lower = jax.lax.div(first_ref[tile], plan.block_k)
  upper = jax.lax.div(last_ref[tile] + (plan.block_k - 1), plan.block_k)
  return lower, upper


def _tile_of_step(
  b, j, step, first_ref, last_ref, lower_ref, upper_ref, *, plan: _Plan
):
  """The query tile of a step and whether it sees key block `j`."""
  block = b * plan.k_blocks + j
  i = lower_ref[block] + step
  tile = b * plan.q_tiles + jnp.minimum(i, plan.q_tiles - 1)
  offset = j * plan.block_k
  sees = (first_ref[tile] < offset + plan.block_k) & (last_ref[tile] > offset)
  return i, sees & (i < upper_ref[block])


# ----------------------------------------------------------------- kernels


def _forward_kernel(
  first_ref,
  last_ref,
  q_ref,  # [1, q, G H]
  k_ref,  # [1, k, G H]
  v_ref,
  range_ref,  # [1, 2, q]
  out_ref,
  log_total_ref,  # [1, 1, G, q]
  acc_ref,  # [G H, q]
  largest_ref,  # [G, q]
  total_ref,
  *,
  plan: _Plan,
):
  b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
  lower, upper = _key_blocks(first_ref, last_ref, b, i, plan)
  last_step = pl.num_programs(3) - 1
  tile = b * plan.q_tiles + i
  first, last = first_ref[tile], last_ref[tile]
  offset = (lower + step) * plan.block_k

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    total_ref[...] = jnp.zeros_like(total_ref)
    largest_ref[...] = jnp.full_like(largest_ref, _NEGATIVE)

  @pl.when(lower + step < upper)
  def _():
    visible = _visible(range_ref, offset, plan)
    value = tpu.rows(v_ref[0], first - offset, last - offset).T  # [G H, k]
    value = value.astype(v_ref.dtype)
    for h in range(plan.group):
      head, row = _head(h, plan), pl.ds(h, 1)
      q = _only_head(q_ref[0], h, plan)
      scores = _scores(k_ref[0], q, visible, plan)
      before = largest_ref[row]  # [1, q]
      largest = jnp.maximum(before, scores.max(axis=0, keepdims=True))
      weights = jnp.exp(scores - largest)  # [k, q]
      shrink = jnp.exp(before - largest)
      largest_ref[row] = largest
      total_ref[row] = shrink * total_ref[row] + weights.sum(
        axis=0, keepdims=True
      )
      acc_ref[head] = shrink * acc_ref[head] + tpu.dot(
        value[head], weights, _NN
      )

  @pl.when(step == last_step)
  def _():
    total = total_ref[...]
    total = jnp.where(total == 0, 1, total)  # An empty range.
    log_total_ref[0, 0] = largest_ref[...] + jnp.log(total)
    for h in range(plan.group):
      head = _head(h, plan)
      acc_ref[head] = acc_ref[head] / total[h : h + 1]
    out_ref[0] = acc_ref[...].T.astype(out_ref.dtype)


def _query_gradient_kernel(
  first_ref,
  last_ref,
  q_ref,  # [1, q, G H]
  k_ref,  # [1, k, G H]
  v_ref,
  d_out_ref,
  range_ref,  # [1, 2, q]
  log_total_ref,  # [1, 1, G, q]
  delta_ref,
  d_query_ref,
  acc_ref,  # [G H, q]
  *,
  plan: _Plan,
):
  b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
  lower, upper = _key_blocks(first_ref, last_ref, b, i, plan)
  last_step = pl.num_programs(3) - 1
  tile = b * plan.q_tiles + i
  first, last = first_ref[tile], last_ref[tile]
  offset = (lower + step) * plan.block_k

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(lower + step < upper)
  def _():
    visible = _visible(range_ref, offset, plan)
    key = tpu.rows(k_ref[0], first - offset, last - offset).T  # [G H, k]
    key = key.astype(k_ref.dtype)
    for h in range(plan.group):
      head = _head(h, plan)
      q = _only_head(q_ref[0], h, plan)
      d_out = _only_head(d_out_ref[0], h, plan)
      scores = _scores(k_ref[0], q, visible, plan)
      _, d_scores = _weights_and_gradient(
        scores, v_ref, d_out, log_total_ref, delta_ref, visible, h
      )
      acc_ref[head] += tpu.dot(key[head], d_scores, _NN)

  @pl.when(step == last_step)
  def _():
    d_query_ref[0] = (plan.scale * acc_ref[...].T).astype(d_query_ref.dtype)


def _key_gradients_kernel(
  first_ref,
  last_ref,
  lower_ref,
  upper_ref,
  q_ref,  # [1, q, G H]
  k_ref,  # [1, k, G H]
  v_ref,
  d_out_ref,
  range_ref,  # [1, 2, q]
  log_total_ref,  # [1, 1, G, q]
  delta_ref,
  d_key_ref,
  d_value_ref,
  d_key_acc_ref,  # [G H, k]
  d_value_acc_ref,
  *,
  plan: _Plan,
):
  b, j, step = (pl.program_id(axis) for axis in (0, 2, 3))
  last_step = pl.num_programs(3) - 1
  i, sees = _tile_of_step(
    b, j, step, first_ref, last_ref, lower_ref, upper_ref, plan=plan
  )
  num_queries = plan.num_queries - i * plan.block_q

  @pl.when(step == 0)
  def _():
    d_key_acc_ref[...] = jnp.zeros_like(d_key_acc_ref)
    d_value_acc_ref[...] = jnp.zeros_like(d_value_acc_ref)

  @pl.when(sees)
  def _():
    visible = _visible(range_ref, j * plan.block_k, plan)
    query = tpu.rows(q_ref[0], 0, num_queries).T  # [G H, q]
    query = query.astype(q_ref.dtype)
    cotangent = tpu.rows(d_out_ref[0], 0, num_queries).T
    cotangent = cotangent.astype(d_out_ref.dtype)
    for h in range(plan.group):
      head = _head(h, plan)
      q = _only_head(q_ref[0], h, plan)
      d_out = _only_head(d_out_ref[0], h, plan)
      scores = _scores(k_ref[0], q, visible, plan)
      weights, d_scores = _weights_and_gradient(
        scores, v_ref, d_out, log_total_ref, delta_ref, visible, h
      )
      d_value_acc_ref[head] += tpu.dot(cotangent[head], weights, _NT)
      d_key_acc_ref[head] += tpu.dot(query[head], d_scores, _NT)

  @pl.when(step == last_step)
  def _():
    d_key_ref[0] = (plan.scale * d_key_acc_ref[...].T).astype(d_key_ref.dtype)
    d_value_ref[0] = d_value_acc_ref[...].T.astype(d_value_ref.dtype)


def _visible(range_ref, offset, plan: _Plan):
  """Which query of the tile sees which key of the block, `[k, q]`."""
  shape = (plan.block_k, plan.block_q)
  index = offset + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (range_ref[0, 0:1] <= index) & (index < range_ref[0, 1:2])


def _scores(k, q, visible, plan: _Plan):
  """Scaled products, `[k, q]`; -inf outside the ranges."""
  return jnp.where(visible, plan.scale * tpu.dot(k, q, _NT), -jnp.inf)


def _weights_and_gradient(
  scores, v_ref, d_out, log_total_ref, delta_ref, visible, h
):
  """`P` and `dS / scale`, `[k, q]` each."""
  weights = jnp.exp(scores - log_total_ref[0, 0, h : h + 1])
  d_weights = tpu.dot(v_ref[0], d_out, _NT)
  d_scores = weights * (d_weights - delta_ref[0, 0, h : h + 1])
  # What is not seen may be anything, and 0 NaN = NaN.
  return weights, jnp.where(visible, d_scores, 0)


def _head(h: int, plan: _Plan):
  """The rows of head `h` in a transposed block `[G H, T]`."""
  return slice(h * plan.head_dim, (h + 1) * plan.head_dim)


def _only_head(x, h: int, plan: _Plan):
  """`[T, G H]` with zeros in the lanes of all heads but `h`."""
  if plan.group == 1:
    return x
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  inside = (lane >= h * plan.head_dim) & (lane < (h + 1) * plan.head_dim)
  return jnp.where(inside, x.astype(jnp.float32), 0).astype(x.dtype)
