"""History attention as Pallas Mosaic GPU kernels, for NVIDIA Hopper.

The forward pass is FlashAttention-2 (Dao, arXiv 2307.08691) on wgmma and TMA:
a block of the grid takes 64 queries a warpgroup and streams blocks of keys and
values through shared memory; base-2 softmax with the scale folded in. The
backward pass is two kernels, for the queries and for the keys and values, so
that no sum depends on the order in which blocks run.

Blocks of keys that no query of a tile sees are never loaded; only blocks at the
edge of some query's range are masked. Overlap comes from several small blocks
to a multiprocessor, not from roles within one, so registers per thread decide
the speed: 128 let four warpgroups run, 168 three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from histjax.ops import dependent, partition
from histjax.types import KeyRange

plgpu: Any = mosaic_gpu  # Its types are those of one JAX version.
mosaic_utils: Any = utils
_MIN_JAX = (0, 11, 0)
_HEAD_DIMS = (16, 32, 64, 128)  # Others are padded with zeros.
MAX_GRID = 65535  # Blocks along all axes of a grid but one.
_ROWS = 64  # What a warpgroup's matrix product yields.
_FAR = 1 << 30  # Beyond any key.
_MOST_COPIED = 256  # Numbers that the copy engine moves at once.
_LOWEST = -1e30  # Finite, so that a masked score is below it.
_LOG2_E = math.log2(math.e)

_MATRIX = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)  # A value of each row.
_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# Spread over the lanes of a warp and the same in every warp.
_LANES = plgpu.Layout.TILED(
  plgpu.Tiling(((32,), (1,))),
  warp_dims=(plgpu.Replicated(4),),
  lane_dims=(-2,),
  vector_dim=-1,
)


def history_attention(
  query: Float[Array, 'B Q N H'],
  key: Float[Array, 'B L N H'],
  value: Float[Array, 'B L N H'],
  key_range: KeyRange,
  *,
  scale: float,
) -> Float[Array, 'B Q N H']:
  """See `api.history_attention`; keys and values must all be finite."""
  if jax.__version_info__ < _MIN_JAX:
    raise NotImplementedError(
      'pallas_gpu needs the Mosaic GPU of JAX '
      f'{".".join(map(str, _MIN_JAX))} or newer, not of {jax.__version__}'
    )
  if query.dtype not in (jnp.float16, jnp.bfloat16):
    raise NotImplementedError(
      f'pallas_gpu computes in 16 bits, and query is {query.dtype}'
    )
  head_dim = query.shape[-1]
  if head_dim > _HEAD_DIMS[-1]:
    raise NotImplementedError(
      f'pallas_gpu has head dimensions up to {_HEAD_DIMS[-1]}, not H={head_dim}'
    )
  if max(query.shape[0], query.shape[2]) > MAX_GRID:
    raise NotImplementedError(
      f'pallas_gpu takes at most {MAX_GRID} rows and as many heads, not '
      f'B={query.shape[0]}, N={query.shape[2]}'
    )
  num_queries, num_keys = query.shape[1], key.shape[1]
  call = _Call(scale, key_range.structure, num_keys)
  # The copy engine moves tiles of eight rows.
  width = next(x for x in _HEAD_DIMS if x >= head_dim)
  query, key, value = (
    _pad(_pad(x, 8), width, axis=3) for x in (query, key, value)
  )
  start, stop = (
    _pad(x, 8, mode='edge') for x in (key_range.start, key_range.stop)
  )
  out = _jitted(query, key, value, start, stop, call)
  return out[:, :num_queries, :, :head_dim]


# Under jit, layers share what is built for one of them.
@functools.partial(jax.jit, static_argnames='num_keys')
def of_layer(
  query: Float[Array, 'B Q N H'],
  keys: Float[Array, 'rows L N H'],
  values: Float[Array, 'rows L N H'],
  key_range: KeyRange,
  first_row: Int[Array, '1'],
  count: Int[Array, 'B'] | None,
  pages: Int[Array, 'B P'] | None = None,
  *,
  num_keys: int,
) -> Float[Array, 'B Q N H']:
  """Attention to the rows `first_row, first_row + 1, ..` of keys and values.

  With `pages` these are pages, and row b has those that follow one another in
  `pages[b]`, counted from `first_row` on; see `fits_pages`.

  As `history_attention` with a scale of `H ** -0.5`, but without gradients, and
  keys and values before or after all ranges of a row may hold anything.
  What queries `count` and beyond give is undefined, and mostly not computed. At
  most `MAX_GRID` rows; multiples of 8 queries and keys, of which `num_keys`
  are no padding; H 16, 32, 64 or 128.
  """
  call = _Call(
    query.shape[3] ** -0.5, key_range.structure, num_keys, clean=True
  )
  inputs = (query, keys, values, key_range.start, key_range.stop)
  return _forward(call, False, *inputs, first_row, count, pages)[0]


def fits_pages(size: int) -> bool:
  """Whether `of_layer` reads pages of so many events."""
  return not size % 8 and not _ROWS % size


class Backward(NamedTuple):
  """How a kernel of the backward pass divides the work.

  Attributes:
    warpgroups: of a block of the grid, which hold 64 queries or keys each.
    block: of the other kind, in a step.
    stages: blocks in flight, two or more.
    overlap: whether a step begins beside the last product of the one before,
      which mostly takes registers.
  """

  warpgroups: int
  block: int
  stages: int = 2
  overlap: bool = False


class Config(NamedTuple):
  """How the kernels divide the work.

  Attributes:
    warpgroups: of a block of the forward grid, which takes 64 queries each.
    block: keys in a step of the forward pass.
    stages: blocks of keys and values in flight, two or more.
    parts: the products with the values are begun when a `1 / parts` of the
      weights is known.
    d_query: of the kernel for the query's gradient.
    d_key: of the kernel for the gradients of keys and values.
  """

  warpgroups: int
  block: int
  stages: int = 2
  parts: int = 1
  d_query: Backward = Backward(1, 64)
  d_key: Backward = Backward(1, 64, overlap=True)


def config(
  query_shape: tuple[int, int, int, int], structure: str = 'any'
) -> Config:
  """A good choice on an H100 or H200 by `[B, Q, N, H]`, from measurements."""
  num_rows, num_queries, num_heads, head_dim = query_shape
  tiles = num_rows * num_heads * pl.cdiv(num_queries, 2 * _ROWS)
  if structure in ('any', 'ascending'):
    # Ranges may be narrow, so that a large block would be mostly hidden.
    # An overlap would take the registers of a fourth warpgroup at 32.
    d_key = Backward(1, 64, overlap=head_dim > 32)
    choice = Config(1, 64, d_key=d_key)
  elif head_dim <= 32 or tiles < 132:  # Larger tiles would leave cores idle.
    choice = Config(1, 64 if head_dim == 128 else 128)
  elif head_dim == 64:
    # Two warpgroups halve what is read; in parts the weights take fewer
    # registers, so that four warpgroups run.
    choice = Config(2, 128, parts=2)
  else:
    choice = Config(2, 64)
  if head_dim == 128:
    # Two warpgroups run whether they take 168 registers or 255.
    return choice._replace(d_query=Backward(2, 64, stages=3, overlap=True))
  return choice._replace(d_query=Backward(1 if head_dim <= 32 else 2, 64))


class _Call(NamedTuple):
  """What is known of a call when it is traced."""

  scale: float
  structure: str
  num_keys: int
  clean: bool = False  # Whether what nobody sees may hold anything.

  @property
  def ranged(self) -> bool:
    """Whether each query has a range of its own, which must be read."""
    return self.structure in ('any', 'ascending')


class _Bounds(NamedTuple):
  """Of the ranges of some queries; an empty range is `[_FAR, 0)`."""

  first_min: Any
  first_max: Any
  last_min: Any
  last_max: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, start, stop, call):
  def forward(*inputs):
    return _forward(call, False, *inputs)[0]

  inputs = (query, key, value, start, stop)
  return partition.by_rows(forward, (0,) * 5, 0)(*inputs)


def _forward_rule(query, key, value, start, stop, call):
  inputs = (query, key, value, start, stop)
  forward = functools.partial(_forward, call, True)
  out, log_total = partition.by_rows(forward, (0,) * 5, (0, 0))(*inputs)
  return out, (*inputs, out, log_total)


def _backward_rule(call, residuals, d_out):
  def backward(query, key, value, start, stop, out, log_total, d_out):
    inputs = (query, key, value, start, stop)
    d_query, delta = _d_query(call, *inputs, out, log_total, d_out)
    return d_query, *_d_key_value(call, *inputs, log_total, delta, d_out)

  gradients = partition.by_rows(backward, (0,) * 8, (0,) * 3)
  return *gradients(*residuals, d_out), None, None


_attend.defvjp(_forward_rule, _backward_rule)
# Without jit, rows on several devices would not be split.
_jitted = jax.jit(_attend, static_argnums=5)


def _forward(
  call, residuals, query, key, value, start, stop, first_row=None, live=None,
  pages=None,
):  # fmt: skip
  """The output and `log2(sum(exp(scores)))`, infinite at an empty range."""
  num_rows, num_queries, num_heads, head_dim = query.shape
  dtype, factor = query.dtype, call.scale * _LOG2_E
  choice = config(query.shape, call.structure)
  warpgroups, block = choice.warpgroups, choice.block
  stages = min(choice.stages, pl.cdiv(call.num_keys, block))
  tile = warpgroups * _ROWS
  num_tiles = pl.cdiv(num_queries, tile)
  if call.ranged:
    start, stop = (_pad(x, tile, mode='edge') for x in (start, stop))
  part = block // choice.parts
  page, per_block = block, 1  # Of a block of keys.
  if pages is not None:
    page = key.shape[1]
    per_block = block // page
    pages = _pad(pages, 32)  # A warpgroup copies 128 bytes or more.

  def body(
    q_ref, k_ref, v_ref, start_ref, stop_ref, first_row_ref, live_ref,
    pages_ref, out_ref, total_ref,
    *, q_smem, k_smem, v_smem, total_smem, pages_smem, q_ready, k_ready,
    v_ready, pages_ready, free,
  ):  # fmt: skip
    dependent.wait(plgpu)
    b, n, t = _block_index()
    first = 0 if first_row is None else first_row_ref[0]
    wg = lax.axis_index('wg')
    if pages is not None:
      _fetch_pages(pages_ref.at[b], pages_smem, pages_ready, wg)
    base = t * tile + wg * _ROWS
    at = (b, pl.ds(base, _ROWS), n)
    plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem.at[wg], q_ready.at[wg])
    limits, bounds = _ranges(
      call, start_ref, stop_ref, b, t, tile, base, num_queries
    )
    lower, count = _key_blocks(call, bounds, block)
    if live is not None:
      count = jnp.where(t * tile < live_ref[b], count, 0)

    def copy(at, slot, rows):
      for ref, smem, ready in (
        (k_ref, k_smem, k_ready),
        (v_ref, v_smem, v_ready),
      ):
        plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot, rows], ready.at[slot])

    def fetch(step, slot):
      if pages is None:
        keys = pl.ds((lower + step) * block, block)
        copy((first + b, keys, n), slot, slice(None))
        return

      # Behind a row's last key there may be any.
      numbers = [
        jnp.minimum(
          first + pages_smem[(lower + step) * per_block + j], key.shape[0] - 1
        )
        for j in range(per_block)
      ]

      @plgpu.warp_map  # Each warp starts some of the copies.
      def _(warp):
        for j in range(per_block):

          @pl.when(warp == j % 4)
          def _(j=j):
            copy((numbers[j], slice(None), n), slot, pl.ds(j * page, page))

    stream = _Stream(fetch, free, stages, count, wg)
    if pages is not None:
      plgpu.barrier_wait(pages_ready)
    stream.begin()
    plgpu.barrier_wait(q_ready.at[wg])

    def step(i, carry):
      acc, top, total = carry
      slot = lax.rem(i, stages)
      offset = (lower + i) * block

      def scores(ref):
        plgpu.barrier_wait(k_ready.at[slot])
        plgpu.wgmma(ref, q_smem.at[wg], k_smem.at[slot].T)
        stream.refill(i)
        return ref[...]

      s = pl.run_scoped(scores, plgpu.ACC((_ROWS, block), jnp.float32))
      s, fold = _fold(s, factor)
      edge = offset + block > bounds.last_min
      if call.ranged:
        edge = edge | (offset < bounds.first_max)
      s = _mask(s, edge, limits, offset)
      new_top = jnp.maximum(top, s.max(axis=1) * fold)
      shrink = jnp.exp2(top - new_top)

      def weights(j):
        x = s[:, j * part : (j + 1) * part]
        return jnp.exp2(x * fold - _over_columns(new_top, x.shape))

      p = weights(0)
      total = total * shrink + p.sum(axis=1)
      p = p.astype(dtype)
      acc = acc * _over_columns(shrink, acc.shape)
      plgpu.barrier_wait(v_ready.at[slot])
      if call.clean:
        _clean(v_smem.at[slot], bounds, offset)

      def add(refs):
        acc_ref, total_ref = refs
        plgpu.wgmma(acc_ref, p, v_smem.at[slot, pl.ds(0, part)])
        for j in range(1, choice.parts):
          more = weights(j)
          total_ref[...] += more.sum(axis=1)
          plgpu.wgmma(
            acc_ref, more.astype(dtype), v_smem.at[slot, pl.ds(j * part, part)]
          )

      acc, total = pl.run_state(add)((plgpu.ACC.init(acc), total))
      stream.release(i)
      return acc, new_top, total

    acc, top, total = lax.fori_loop(
      0,
      count,
      step,
      (
        _full((_ROWS, head_dim), 0, _MATRIX),
        _full((_ROWS,), _LOWEST, _ROW),
        _full((_ROWS,), 0, _ROW),
      ),
    )
    some = total > 0
    inverse = jnp.where(some, 1 / total, 0.0)
    acc = acc * _over_columns(inverse, acc.shape)
    plgpu.commit_smem()  # All warps have read the queries.
    q_smem.at[wg][...] = acc.astype(dtype)
    if residuals:
      total_smem.at[wg][...] = jnp.where(some, top + jnp.log2(total), jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[wg], out_ref.at[at])
    if residuals:
      plgpu.copy_smem_to_gmem(
        total_smem.at[wg], total_ref.at[b, n, pl.ds(base, _ROWS)]
      )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  blocks = _tiles((stages, block, head_dim), dtype)
  total_shape = (num_rows, num_heads, num_tiles * tile)
  return _kernel(
    body,
    dependent.kernel_name('history_attention'),
    grid=(num_rows, num_heads, num_tiles),
    warpgroups=warpgroups,
    out_type=(
      jax.ShapeDtypeStruct(query.shape, dtype),
      jax.ShapeDtypeStruct(total_shape, jnp.float32) if residuals else None,
    ),
    scratch_types=dict(
      q_smem=_tiles((warpgroups, _ROWS, head_dim), dtype),
      k_smem=blocks,
      v_smem=blocks,
      total_smem=plgpu.SMEM((warpgroups, _ROWS), jnp.float32)
      if residuals
      else None,
      pages_smem=None
      if pages is None
      else plgpu.SMEM(pages.shape[1:], jnp.int32),
      q_ready=plgpu.Barrier(num_barriers=warpgroups),
      k_ready=plgpu.Barrier(num_arrivals=per_block, num_barriers=stages),
      v_ready=plgpu.Barrier(num_arrivals=per_block, num_barriers=stages),
      pages_ready=None
      if pages is None
      else plgpu.Barrier(num_arrivals=pl.cdiv(pages.shape[1], _MOST_COPIED)),
      free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    ),
  )(query, key, value, start, stop, first_row, live, pages)


def _fetch_pages(ref, smem, ready, wg):
  """Starts the copy of a row's pages."""

  @pl.when(wg == 0)
  def _():
    for i in range(0, smem.shape[0], _MOST_COPIED):
      some = pl.ds(i, min(_MOST_COPIED, smem.shape[0] - i))
      plgpu.copy_gmem_to_smem(ref.at[some], smem.at[some], ready)


def _d_query(call, query, key, value, start, stop, out, log_total, d_out):
  """The query's gradient, and `delta = sum(d_out out)` of `[B, N, Q]`."""
  num_rows, num_queries, num_heads, head_dim = query.shape
  dtype, factor = query.dtype, call.scale * _LOG2_E
  warpgroups, block, stages, overlap = config(
    query.shape, call.structure
  ).d_query
  stages = min(stages, pl.cdiv(call.num_keys, block))
  tile = warpgroups * _ROWS
  num_tiles = pl.cdiv(num_queries, tile)
  log_total = _pad(log_total, tile, axis=2)
  if call.ranged:
    start, stop = (_pad(x, tile, mode='edge') for x in (start, stop))

  def body(
    q_ref, k_ref, v_ref, start_ref, stop_ref, out_ref, total_ref, d_out_ref,
    dq_ref, delta_ref,
    *, q_smem, d_out_smem, out_smem, k_smem, v_smem, delta_smem,
    q_ready, k_ready, v_ready, free,
  ):  # fmt: skip
    b, n, t = _block_index()
    wg = lax.axis_index('wg')
    base = t * tile + wg * _ROWS
    at = (b, pl.ds(base, _ROWS), n)
    row = (b, n, pl.ds(base, _ROWS))
    for ref, smem in (
      (q_ref, q_smem),
      (d_out_ref, d_out_smem),
      (out_ref, out_smem),
    ):
      plgpu.copy_gmem_to_smem(ref.at[at], smem.at[wg], q_ready.at[wg])
    total = plgpu.load(total_ref.at[row], layout=_ROW, optimized=False)
    limits, bounds = _ranges(
      call, start_ref, stop_ref, b, t, tile, base, num_queries
    )
    lower, count = _key_blocks(call, bounds, block)

    def fetch(step, slot):
      at = (b, pl.ds((lower + step) * block, block), n)
      plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], k_ready.at[slot])
      plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[slot], v_ready.at[slot])

    stream = _Stream(fetch, free, stages, count, wg)
    stream.begin()
    plgpu.barrier_wait(q_ready.at[wg])
    o, d_o = (
      plgpu.load(x.at[wg], layout=_MATRIX).astype(jnp.float32)
      for x in (out_smem, d_out_smem)
    )
    delta = (o * d_o).sum(axis=1)
    delta_smem.at[wg][...] = delta
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(delta_smem.at[wg], delta_ref.at[row])

    def loop(dq_acc):
      def step(i, carry):
        slot = lax.rem(i, stages)
        offset = (lower + i) * block

        def products(s_ref, dp_ref):
          plgpu.barrier_wait(k_ready.at[slot])
          plgpu.wgmma(s_ref, q_smem.at[wg], k_smem.at[slot].T)
          plgpu.barrier_wait(v_ready.at[slot])
          plgpu.wgmma(dp_ref, d_out_smem.at[wg], v_smem.at[slot].T)
          if not overlap:
            stream.refill(i)
          s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
          if overlap:  # Those before have ended, too.
            stream.release(i - 1)
            stream.refill(i)
          s, fold = _fold(s, factor)
          edge = offset + block > bounds.last_min
          if call.ranged:
            edge = edge | (offset < bounds.first_max)
          s = _mask(s, edge, limits, offset)
          p = jnp.exp2(s * fold - _over_columns(total, s.shape))
          dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
          return p * (dp - _over_columns(delta, s.shape))

        acc = plgpu.ACC((_ROWS, block), jnp.float32)
        ds = pl.run_scoped(products, acc, acc).astype(dtype)
        plgpu.wgmma(dq_acc, ds, k_smem.at[slot])
        if not overlap:
          plgpu.wgmma_wait(0)
          stream.release(i)
        return carry

      lax.fori_loop(0, count, step, 0)
      return dq_acc[...]

    dq = pl.run_scoped(loop, plgpu.ACC((_ROWS, head_dim), jnp.float32))
    plgpu.commit_smem()  # All warps have read the queries.
    q_smem.at[wg][...] = (dq * call.scale).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[at])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  rows = _tiles((warpgroups, _ROWS, head_dim), dtype)
  blocks = _tiles((stages, block, head_dim), dtype)
  delta_shape = (num_rows, num_heads, num_tiles * tile)
  return _kernel(
    body,
    'history_attention_d_query',
    grid=(num_rows, num_heads, num_tiles),
    warpgroups=warpgroups,
    out_type=(
      jax.ShapeDtypeStruct(query.shape, dtype),
      jax.ShapeDtypeStruct(delta_shape, jnp.float32),
    ),
    scratch_types=dict(
      q_smem=rows,
      d_out_smem=rows,
      out_smem=rows,
      k_smem=blocks,
      v_smem=blocks,
      delta_smem=plgpu.SMEM((warpgroups, _ROWS), jnp.float32),
      q_ready=plgpu.Barrier(num_arrivals=3, num_barriers=warpgroups),
      k_ready=plgpu.Barrier(num_barriers=stages),
      v_ready=plgpu.Barrier(num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    ),
  )(query, key, value, start, stop, out, log_total, d_out)


def _d_key_value(call, query, key, value, start, stop, log_total, delta, d_out):
  """The gradients of keys and values; scores are transposed, `[key, query]`."""
  num_rows, num_queries, num_heads, head_dim = query.shape
  dtype, factor = query.dtype, call.scale * _LOG2_E or 1e-30
  warpgroups, block, stages, overlap = config(query.shape, call.structure).d_key
  num_blocks = pl.cdiv(num_queries, block)
  stages = min(stages, num_blocks)
  tile = warpgroups * _ROWS
  num_tiles = pl.cdiv(call.num_keys, tile)
  log_total, delta = (_pad(x, block, axis=2) for x in (log_total, delta))
  start, stop = (_pad(x, block, mode='edge') for x in (start, stop))
  limits, seen_by = None, None
  if call.ranged:
    limits, seen_by = _seen_by(start, stop, block, tile, call.num_keys)

  def body(
    q_ref, k_ref, v_ref, start_ref, stop_ref, total_ref, delta_ref, d_out_ref,
    limits_ref, seen_by_ref, dk_ref, dv_ref,
    *, k_smem, v_smem, q_smem, d_out_smem, total_smem, delta_smem, start_smem,
    stop_smem, k_ready, q_ready, d_out_ready, free,
  ):  # fmt: skip
    b, n, t = _block_index()
    wg = lax.axis_index('wg')
    base = t * tile + wg * _ROWS
    at = (b, pl.ds(base, _ROWS), n)
    plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[wg], k_ready.at[wg])
    plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[wg], k_ready.at[wg])
    if call.ranged:
      lower, upper = seen_by_ref[b, t, 0], seen_by_ref[b, t, 1]
    else:
      length = jnp.clip(stop_ref[b, num_queries - 1], 0, call.num_keys)
      lower = 0
      if call.structure == 'causal':
        lower = jnp.minimum(lax.div(t * tile, block), num_blocks)
      upper = jnp.where(t * tile < length, num_blocks, lower)
    count = upper - lower

    def fetch(step, slot):
      queries = pl.ds((lower + step) * block, block)
      ready = q_ready.at[slot]
      plgpu.copy_gmem_to_smem(q_ref.at[b, queries, n], q_smem.at[slot], ready)
      plgpu.copy_gmem_to_smem(
        total_ref.at[b, n, queries], total_smem.at[slot], ready
      )
      if call.ranged:
        plgpu.copy_gmem_to_smem(
          start_ref.at[b, queries], start_smem.at[slot], ready
        )
      if call.structure != 'prefix':
        plgpu.copy_gmem_to_smem(
          stop_ref.at[b, queries], stop_smem.at[slot], ready
        )
      ready = d_out_ready.at[slot]
      plgpu.copy_gmem_to_smem(
        d_out_ref.at[b, queries, n], d_out_smem.at[slot], ready
      )
      plgpu.copy_gmem_to_smem(
        delta_ref.at[b, n, queries], delta_smem.at[slot], ready
      )

    stream = _Stream(fetch, free, stages, count, wg)
    stream.begin()
    plgpu.barrier_wait(k_ready.at[wg])
    k, v = k_smem.at[wg], v_smem.at[wg]
    column = functools.partial(plgpu.load, layout=_COLUMN)

    def mask(s, step, slot):
      offset = (lower + step) * block
      if call.ranged:
        first_max, last_min = (
          limits_ref[b, lower + step, 0],
          limits_ref[b, lower + step, 1],
        )
        edge = (base + _ROWS > last_min) | (base < first_max)
      else:
        edge = base + _ROWS > _stop(call, offset, length)

      def masked():
        index = base + _iota(s.shape, 0, _MATRIX)
        if call.structure == 'prefix':
          return jnp.where(index < length, s, -jnp.inf)
        last = jnp.minimum(column(stop_smem.at[slot]), call.num_keys)
        x = jnp.where(index < _over_rows(last, s.shape), s, -jnp.inf)
        if not call.ranged:
          return x
        first = _over_rows(column(start_smem.at[slot]), s.shape)
        return jnp.where(index < first, -jnp.inf, x)

      return lax.cond(edge, masked, lambda: s)

    def loop(dk_acc, dv_acc):
      def step(i, carry):
        slot = lax.rem(i, stages)

        def products(s_ref, dp_ref):
          # They begin at what would be subtracted from them, so that it takes
          # no registers of its own.
          plgpu.barrier_wait(q_ready.at[slot])
          total = _over_rows(column(total_smem.at[slot]), s_ref.shape)
          s_ref = _begin_at(total * (-1 / factor), s_ref)
          plgpu.barrier_wait(d_out_ready.at[slot])
          delta = _over_rows(column(delta_smem.at[slot]), dp_ref.shape)
          dp_ref = _begin_at(-delta, dp_ref)
          plgpu.wgmma(s_ref, k, q_smem.at[slot].T)
          plgpu.wgmma(dp_ref, v, d_out_smem.at[slot].T)
          if not overlap:
            stream.refill(i)
          s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
          if overlap:  # Those before have ended, too.
            stream.release(i - 1)
            stream.refill(i)
          s, fold = _fold(s, factor)
          p = jnp.exp2(mask(s, i, slot) * fold)
          plgpu.wgmma(dv_acc, p.astype(dtype), d_out_smem.at[slot])
          dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
          plgpu.wgmma(dk_acc, (p * dp).astype(dtype), q_smem.at[slot])

        acc = plgpu.ACC((_ROWS, block), jnp.float32)
        pl.run_scoped(products, acc, acc)
        if not overlap:
          plgpu.wgmma_wait(0)
        plgpu.commit_smem()  # Loads of the slot come before its next copy.
        if not overlap:
          stream.release(i)
        return carry

      lax.fori_loop(0, count, step, 0)
      return dk_acc[...], dv_acc[...]

    acc = plgpu.ACC((_ROWS, head_dim), jnp.float32)
    dk, dv = pl.run_scoped(loop, acc, acc)
    k_smem.at[wg][...] = (dk * call.scale).astype(dtype)
    v_smem.at[wg][...] = dv.astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_smem.at[wg], dk_ref.at[at])
    plgpu.copy_smem_to_gmem(v_smem.at[wg], dv_ref.at[at])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  rows = _tiles((warpgroups, _ROWS, head_dim), dtype)
  blocks = _tiles((stages, block, head_dim), dtype)
  values = plgpu.SMEM((stages, block), jnp.float32)
  indices = plgpu.SMEM((stages, block), jnp.int32)
  out = jax.ShapeDtypeStruct(key.shape, dtype)
  return _kernel(
    body,
    'history_attention_d_key_value',
    grid=(num_rows, num_heads, num_tiles),
    warpgroups=warpgroups,
    out_type=(out, out),
    scratch_types=dict(
      k_smem=rows,
      v_smem=rows,
      q_smem=blocks,
      d_out_smem=blocks,
      total_smem=values,
      delta_smem=values,
      start_smem=indices if call.ranged else None,
      stop_smem=None if call.structure == 'prefix' else indices,
      k_ready=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
      q_ready=plgpu.Barrier(
        num_arrivals={'prefix': 2, 'causal': 3}.get(call.structure, 4),
        num_barriers=stages,
      ),
      d_out_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    ),
  )(
    query, key, value, start, stop, log_total, delta, d_out, limits, seen_by
  )  # fmt: skip


class _Stream(NamedTuple):
  """Blocks that pass through the slots of a ring in shared memory.

  The first warpgroup fetches; each says when it has read a slot. A slot is
  refilled a step after it was read, so the wait for the others is short.
  """

  fetch: Callable[[Any, Any], None]
  free: Any
  stages: int
  count: Any
  wg: Any

  def begin(self):
    """Fetches the first blocks."""

    @pl.when(self.wg == 0)
    def _():
      pl.loop(0, jnp.minimum(self.count, self.stages))(
        lambda i: self.fetch(i, i)
      )

  def refill(self, i):
    """In step `i`: fetches into the slot that step `i - 1` read."""

    @pl.when((self.wg == 0) & (i > 0) & (i + self.stages - 1 < self.count))
    def _():
      slot = lax.rem(i - 1, self.stages)
      plgpu.barrier_wait(self.free.at[slot])
      self.fetch(i - 1 + self.stages, slot)

  def release(self, i):
    """Says that this warpgroup has read the slot of step `i`, if any."""

    @pl.when((i >= 0) & (i + self.stages < self.count))  # Someone waits.
    def _():
      plgpu.barrier_arrive(self.free.at[lax.rem(i, self.stages)])


def _kernel(body, name, *, grid, warpgroups, out_type, scratch_types):
  """A kernel over a grid of rows, heads and tiles."""
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch_types,
    grid=grid,
    grid_names=('row', 'head', 'tile'),
    num_threads=warpgroups,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name=name,
  )


def _block_index():
  """Row, head and tile; neighbours share the row and the head."""
  return tuple(lax.axis_index(name) for name in ('row', 'head', 'tile'))


def _ranges(call, start_ref, stop_ref, b, t, tile, base, num_queries):
  """The ranges of 64 queries, `[64]` each, and the bounds of their tile.

  `first` is None if it is 0. In bounds of a causal tile, `last_min` is of the
  64 queries.
  """
  if call.ranged:

    def load(at, layout):
      first, last = (
        plgpu.load(ref.at[b, at], layout=layout, optimized=False)
        for ref in (start_ref, stop_ref)
      )
      first, last = jnp.maximum(first, 0), jnp.minimum(last, call.num_keys)
      empty = first >= last
      return jnp.where(empty, _FAR, first), jnp.where(empty, 0, last)

    limits = load(pl.ds(base, _ROWS), _ROW)
    firsts, lasts = load(pl.ds(t * tile, tile), _LANES)
    # The compiler knows that a maximum over a warp is the same in its lanes.
    # Were the bounds of the loop not, its products would be serialized.
    bounds = _Bounds(
      -jnp.max(-firsts), jnp.max(firsts), -jnp.max(-lasts), jnp.max(lasts)
    )
    return limits, bounds
  length = jnp.clip(stop_ref[b, num_queries - 1], 0, call.num_keys)
  if call.structure == 'prefix':
    last = plgpu.layout_cast(lax.broadcast(length, (_ROWS,)), _ROW)
    # Opaque, or each score's distance to `length` is kept in a register.
    last = lax.optimization_barrier(last)
    return (None, last), _Bounds(0, 0, length, length)
  last = _stop(call, base + _iota((_ROWS,), 0, _ROW), length)
  bounds = _Bounds(
    0, 0, _stop(call, base, length), _stop(call, t * tile + tile - 1, length)
  )
  return (None, last), bounds


def _stop(call, query, length):
  """The stop of queries in a 'prefix' or 'causal' call."""
  if call.structure == 'prefix':
    return length
  own = jnp.minimum(query + 1, length)
  return jnp.where(query < call.num_keys, own, length)


def _key_blocks(call, bounds, block):
  """The first block of keys that a tile sees, and how many."""
  lower: Any = 0
  if call.ranged:
    lower = lax.div(jnp.minimum(bounds.first_min, call.num_keys), block)
  return lower, lax.div(bounds.last_max + (block - 1), block) - lower


def _mask(s, edge, limits, offset):
  """Scores, -inf outside the ranges, which are the `limits` of the rows."""

  def masked():
    first, last = limits
    index = offset + _iota(s.shape, 1, _MATRIX)
    x = jnp.where(index < _over_columns(last, s.shape), s, -jnp.inf)
    if first is not None:
      hidden = index < _over_columns(first, s.shape)
      x = jnp.where(hidden, -jnp.inf, x)
    return x

  return lax.cond(edge, masked, lambda: s)


def _clean(values, bounds, offset):
  """Zeroes values that no query of the tile sees, since 0 NaN = NaN.

  All warpgroups of the tile write the same.
  """
  block, head_dim = values.shape
  first, last = bounds.first_min - offset, bounds.last_max - offset

  @pl.when((first > 0) | (last < block))
  def _():
    plgpu.inline_mgpu(
      arg_types=(
        plgpu.RefType(_transforms(head_dim, values.dtype)),
        plgpu.Layout.WG_SPLAT(()),
        plgpu.Layout.WG_SPLAT(()),
      )
    )(functools.partial(_zero_rows, block=block, head_dim=head_dim))(
      values, first, last
    )
    plgpu.commit_smem()


def _zero_rows(ctx, values, first, last, *, block, head_dim):
  """Zeroes rows of `values` outside `[first, last)`, a thread each.

  In PTX, since a tile of them in registers would leave too few for the rest.
  """
  del ctx
  row_bytes = min(2 * head_dim, 128)
  columns = 2 * head_dim // row_bytes
  stores = ''.join(
    f'@p st.shared.v4.b32 [a + {8 * row_bytes * c + at}], {{0, 0, 0, 0}}; '
    for c in range(columns)
    for at in range(0, row_bytes, 16)
  )
  mosaic_utils.inline_ptx(
    '{ .reg .pred p; .reg .b32 r, a; and.b32 r, $3, 127; '
    'setp.lt.s32 p, r, $1; setp.ge.or.s32 p, r, $2, p; '
    f'setp.lt.and.s32 p, r, {block}, p; '
    f'shr.u32 a, r, 3; mad.lo.u32 a, a, {8 * row_bytes * columns}, $0; '
    f'and.b32 r, r, 7; mad.lo.u32 a, r, {row_bytes}, a; {stores}}}',
    llvm.ptrtoint(
      ir.IntegerType.get_signless(32), mosaic_utils.memref_ptr(values)
    ),
    *(x.registers.item() for x in (first, last)),
    mosaic_utils.thread_idx(),
    has_side_effects=True,
  )


def _seen_by(start, stop, block: int, tile: int, num_keys: int):
  """What blocks of queries see, and which of them see each tile of keys.

  Returns:
    `[B, blocks, 2]`, the largest start and the smallest stop of each block;
    `[B, tiles, 2]`, the first block that sees a tile and one past the last.
  """
  shape = (start.shape[0], start.shape[1] // block, block)
  num_tiles = pl.cdiv(num_keys, tile)
  first, last = jnp.clip(start, 0, num_keys), jnp.clip(stop, 0, num_keys)
  empty = first >= last
  first = jnp.where(empty, _FAR, first).reshape(shape)
  last = jnp.where(empty, 0, last).reshape(shape)
  limits = jnp.stack([first.max(axis=2), last.min(axis=2)], axis=2)
  edge = tile * jnp.arange(num_tiles, dtype=jnp.int32)[None, :, None]
  sees = (first.min(axis=2)[:, None] < edge + tile) & (
    last.max(axis=2)[:, None] > edge
  )  # [B, tiles, blocks]
  index = jnp.arange(shape[1], dtype=jnp.int32)[None, None]
  upper = jnp.where(sees, index + 1, 0).max(axis=2)
  lower = jnp.where(sees, index, shape[1]).min(axis=2)
  return limits, jnp.stack([jnp.minimum(lower, upper), upper], axis=2)


def _tiles(shape, dtype):
  """Shared memory in the form that the matrix units read."""
  return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[-1], dtype))


def _transforms(width, dtype):
  size = jnp.dtype(dtype).itemsize
  swizzle = min(128, width * size)  # Bytes.
  return (
    plgpu.TilingTransform((8, swizzle // size)),
    plgpu.SwizzleTransform(swizzle),
  )


def _begin_at(value, acc):
  """An accumulator, now of `value`."""
  acc[...] = value
  return acc


def _fold(s, factor: float):
  """Scores and what is left to multiply them by, which keeps their order."""
  return (s, factor) if factor > 0 else (s * factor, 1.0)


def _full(shape, value, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _iota(shape, axis: int, layout):
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def _over_columns(x, shape):
  return lax.broadcast_in_dim(x, shape, [0])


def _over_rows(x, shape):
  return lax.broadcast_in_dim(x, shape, [1])


def _pad(x, multiple: int, axis: int = 1, mode: str = 'constant'):
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, pad, mode=mode) if pad[axis][1] else x
