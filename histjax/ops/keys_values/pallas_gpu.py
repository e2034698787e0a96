"""Keys and values in one Hopper kernel: Pallas Mosaic GPU, wgmma, TMA.

A tile is 64 events of one user and 64 channels of keys and of values, whole
heads. One warpgroup reads the events from device memory into registers, where
it norms them while the weights are copied, multiplies, rotates the keys and
stores both where they belong in the cache: the arrays are written in place.
Where there are many events a block has several such groups of channels, and
norms once for all of them.

From D = 512 on histories are read by a product of `pallas_gpu_products`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import run_state
from jaxtyping import Array, Float, Int

from histjax.ops import dependent
from histjax.ops.candidate_tower import hopper, pallas_gpu_products
from histjax.ops.candidate_tower.reference import (
  EPSILON,
  TowerWeights,
  sums_of,
)
from histjax.ops.history_attention import pallas_gpu as attention
from histjax.ops.keys_values.reference import KeyValueWeights
from histjax.types import KeyRange, Paged

ROWS = hopper.ROWS
PIECE = 64  # Channels of keys, and of values, that are computed at once.
MULTIPROCESSORS = 132
MAX_WIDTH = 256  # Of events in registers.
HEAD_DIMS = (16, 32, 64)
MOST_WEIGHTS = 131_072  # Bytes of them in a block.


class _Kind(NamedTuple):
  """What a kernel computes.

  Attributes:
    num_rows: users, B.
    num_events: of a user that are computed, a multiple of 64.
    capacity: L.
    width: D.
    head_dim: H.
    rotate: whether keys are rotated.
    placed: whether events go behind those of the cache; else a user's first
      event into slot 0.
    ragged: whether there is a count.
  """

  num_rows: int
  num_events: int
  capacity: int
  width: int
  head_dim: int
  rotate: bool
  placed: bool
  ragged: bool

  @property
  def tiles(self) -> int:
    """Of a user."""
    return self.num_events // ROWS

  @property
  def pieces(self) -> int:
    return self.width // PIECE

  @property
  def per_block(self) -> int:
    """Pieces of a block: all that leave no multiprocessor idle."""
    most = MOST_WEIGHTS // (2 * self.width * 2 * PIECE)
    choices = [n for n in range(1, most + 1) if not self.pieces % n]
    tiles = self.num_rows * self.tiles
    busy = [n for n in choices if tiles * self.pieces // n >= MULTIPROCESSORS]
    return max(busy, default=1)

  @property
  def groups(self) -> int:
    """Blocks of a tile."""
    return self.pieces // self.per_block


def keys_values(
  events: Float[Array, 'B E D'],
  keys: Float[Array, 'layers B L N H'],
  values: Float[Array, 'layers B L N H'],
  weights: KeyValueWeights,
  *,
  layer: int,
  rotate: bool,
  start: Int[Array, 'B'] | None = None,
  count: Int[Array, 'B'] | None = None,
) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
  """See `api.keys_values`."""
  plgpu = hopper.mosaic_gpu()
  _check(events, keys, weights, start)
  num_rows, num_events, width = events.shape
  if width >= hopper.WIDE:
    return pallas_gpu_products.keys_values(
      plgpu,
      events,
      keys,
      values,
      weights.matrix,
      weights.bias,
      sums_of(weights),
      layer=layer,
      rotate=rotate,
    )
  shape = keys.shape
  # Registers are moved by whole tiles.
  after = -num_events % ROWS
  if after:
    events = jnp.pad(events, [(0, 0), (0, after), (0, 0)])
    if start is not None and count is None:
      count = jnp.full((num_rows,), num_events, jnp.int32)
  computed = num_events + after
  if start is None:  # Events from L on go nowhere.
    computed = min(computed, pl.cdiv(shape[2], ROWS) * ROWS)
  kind = _Kind(
    num_rows,
    computed,
    shape[2],
    width,
    shape[4],
    rotate,
    start is not None,
    count is not None,
  )
  cached = (shape[0] * num_rows, shape[2], width)
  if start is not None:  # Or XLA would copy the slice by itself.
    start = jnp.maximum(start, 0)
  operands = hopper.no_slices(
    (start, count, events, weights.matrix, weights.bias)
  )

  def write(caches):
    _kernel(plgpu, kind)(jnp.full((1,), layer, jnp.int32), *operands, *caches)

  # Both are results and operands of the call, in one place.
  caches = run_state(write)((keys.reshape(cached), values.reshape(cached)))
  keys, values = (x.reshape(shape) for x in caches)
  return keys, values


def read_histories(
  events: Float[Array, 'B L D'],
  key_range: KeyRange,
  weights: TowerWeights,
  keys_values: KeyValueWeights,
  *,
  num_heads: int,
  rotate: bool,
  count: Int[Array, 'B'] | None = None,
  cache: tuple[Paged, Paged] | None = None,
) -> tuple[Any, Any]:
  """See `histories.read_histories`."""
  plgpu = hopper.mosaic_gpu()
  num_rows, num_events, width = events.shape
  hidden = weights.mlp_in.shape[2]
  fits = pallas_gpu_products.fits(width, hidden, width // num_heads)
  if (
    not fits
    or num_events % 8
    or num_rows > attention.MAX_GRID
    or weights.query.dtype != jnp.bfloat16
  ):
    raise NotImplementedError(
      'pallas_gpu reads histories of bfloat16, D and F multiples of 256, H 64 '
      'or 128, D >= 512 and L a multiple of 8, not of '
      f'{weights.query.dtype}, D={width}, F={hidden}, N={num_heads}, '
      f'L={num_events}'
    )
  if cache is not None:
    page = cache[0].pool.shape[2]
    if not attention.fits_pages(page) or num_events % page:
      raise NotImplementedError(
        f'pallas_gpu writes pages of 8, 16, 32 or 64 events that divide L, not '
        f'{page} of L={num_events}'
      )
  return pallas_gpu_products.read_histories(
    plgpu,
    functools.partial(attention.of_layer, num_keys=num_events),
    events,
    key_range,
    weights,
    keys_values.matrix,
    keys_values.bias,
    sums_of(keys_values),
    num_heads=num_heads,
    rotate=rotate,
    count=count,
    cache=cache,
  )


def _check(events, keys, weights, start):
  """Raises NotImplementedError at a call that the kernel cannot compute."""
  width, head_dim = events.shape[2], keys.shape[4]
  if weights.matrix.dtype != jnp.bfloat16:
    raise NotImplementedError(
      'pallas_gpu takes bfloat16 weights, keys and values, not '
      f'{weights.matrix.dtype}'
    )
  if start is None and keys.shape[2] % 8:  # What the copy engine moves.
    raise NotImplementedError(
      f'pallas_gpu takes L a multiple of 8 without start, not {keys.shape[2]}'
    )
  if width >= hopper.WIDE:
    if not pallas_gpu_products.fits(width, width, head_dim):
      raise NotImplementedError(
        f'pallas_gpu takes D a multiple of {pallas_gpu_products.COLUMNS} and H '
        f'64 or 128 from D {hopper.WIDE} on, not D={width} and H={head_dim}'
      )
    if start is not None:
      raise NotImplementedError(
        f'pallas_gpu has no kernel that puts events of D={width} behind others'
      )
    return
  if width % PIECE or width > MAX_WIDTH or head_dim not in HEAD_DIMS:
    raise NotImplementedError(
      f'pallas_gpu takes D a multiple of {PIECE} up to {MAX_WIDTH} and H one '
      f'of {HEAD_DIMS}, not D={width} and H={head_dim}'
    )


@functools.lru_cache(maxsize=64)
def _kernel(plgpu, kind):
  """Builds the call for static shapes."""
  swizzled = functools.partial(hopper.swizzled, plgpu)
  per_block = kind.per_block
  if kind.placed:
    # Rows are copied one by one, and have to begin at multiples of 128 bytes.
    out = plgpu.SMEM((per_block, 2, ROWS, PIECE), jnp.bfloat16)
  else:
    out = swizzled((per_block, 2, ROWS, PIECE))
  return plgpu.kernel(
    functools.partial(_body, plgpu=plgpu, kind=kind),
    scratch_types=dict(
      x_smem=swizzled((kind.pieces, ROWS, PIECE)),
      w_smem=swizzled((per_block, 2, kind.width, PIECE)),
      out_smem=out,
      full=plgpu.Barrier(num_arrivals=2, num_barriers=per_block),
    ),
    grid=(kind.num_rows * kind.tiles * kind.groups,),
    grid_names=('block',),
    num_threads=1,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    kernel_name=dependent.kernel_name('keys_values'),
  )


def _body(
  layer_ref, start_ref, count_ref, x_ref, w_ref, bias_ref, keys_ref, values_ref,
  *, plgpu, kind, x_smem, w_smem, out_smem, full,
):  # fmt: skip
  """One block: a tile."""
  dependent.wait(plgpu)
  block, layer = lax.axis_index('block'), layer_ref[0]
  tile = lax.div(block, jnp.int32(kind.groups))
  piece = lax.rem(block, jnp.int32(kind.groups)) * kind.per_block
  row = lax.div(tile, jnp.int32(kind.tiles))
  first = lax.rem(tile, jnp.int32(kind.tiles)) * ROWS
  slot = first if start_ref is None else start_ref[row] + first
  live = jnp.int32(ROWS)
  if count_ref is not None:
    live = jnp.clip(count_ref[row] - first, 0, ROWS)
  if kind.placed:
    live = jnp.clip(kind.capacity - slot, 0, live)
  at = layer * kind.num_rows + row
  caches = keys_ref, values_ref
  worker = _Tile(plgpu, kind)

  def write():
    plgpu.commit_smem()
    for n in range(kind.per_block):
      columns = pl.ds((piece + n) * PIECE, PIECE)
      for which, ref in enumerate(caches):
        out = out_smem.at[n, which]
        if not kind.placed:
          plgpu.copy_smem_to_gmem(
            out, ref.at[at, pl.ds(slot, ROWS), columns], commit_group=False
          )
          continue

        @pl.loop(0, live)
        def _(event, out=out, ref=ref, columns=columns):
          plgpu.copy_smem_to_gmem(
            out.at[event],
            ref.at[at, slot + event, columns],
            commit_group=False,
          )

    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)

  @pl.when(live > 0)
  def _():
    for n in range(kind.per_block):
      for which in range(2):
        column = which * kind.width + (piece + n) * PIECE
        plgpu.copy_gmem_to_smem(
          w_ref.at[layer, :, pl.ds(column, PIECE)],
          w_smem.at[n, which],
          full.at[n],
        )
    worker.norm(x_ref.at[row, pl.ds(first, ROWS)], x_smem)
    place = worker.place(slot) if kind.rotate else None
    for n in range(kind.per_block):
      plgpu.barrier_wait(full.at[n])
      for which in range(2):
        column = which * kind.width + (piece + n) * PIECE
        y = worker.product(
          x_smem, w_smem.at[n, which], bias_ref.at[layer, pl.ds(column, PIECE)]
        )
        if not which:
          turns = worker.rotation(place, kind.head_dim)
          y = hopper.join(worker.rotated(y, turns, kind.head_dim))
        y = y.astype(jnp.bfloat16)
        if kind.placed:
          hopper.put(plgpu, out_smem.at[n, which], y)
        else:
          out_smem.at[n, which][...] = y
    write()

  if kind.placed or not kind.ragged:
    return

  @pl.when(live == 0)
  def _():
    zero = jnp.zeros((ROWS, PIECE), jnp.bfloat16)
    zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    for n in range(kind.per_block):
      for which in range(2):
        out_smem.at[n, which][...] = zero
    write()


class _Tile(hopper.Warpgroup):
  """The warpgroup that computes a tile."""

  def __init__(self, plgpu: Any, kind: _Kind):
    super().__init__(plgpu)
    self.kind = kind

  def norm(self, x_ref, x_smem):
    """Puts the norm of events into blocks of columns."""
    plgpu, width = self.plgpu, self.kind.width
    x = plgpu.load(x_ref, layout=plgpu.Layout.WGMMA, optimized=False)
    x = x.astype(jnp.float32)
    pieces = [x[:, at : at + PIECE] for at in range(0, width, PIECE)]
    mean = self.down(x.sum(axis=1) * (1 / width), PIECE)
    pieces = [piece - mean for piece in pieces]
    square = sum((piece * piece).sum(axis=1) for piece in pieces)
    scale = self.down(lax.rsqrt(square * (1 / width) + EPSILON), PIECE)
    for n, piece in enumerate(pieces):
      x_smem.at[n][...] = (piece * scale).astype(jnp.bfloat16)
    plgpu.commit_smem()

  def place(self, slot):
    """The positions of events, the first of which is in `slot`."""
    index = self.plgpu.broadcasted_iota(
      jnp.int32, (ROWS,), 0, layout=self.row_layout
    )
    return (index + slot).astype(jnp.float32)

  def product(self, x_smem, w_smem, bias_ref):
    """`[64, 64]`, float32."""
    plgpu = self.plgpu

    def run(acc):
      for k in range(self.kind.pieces):
        plgpu.wgmma(acc, x_smem.at[k], w_smem.at[pl.ds(k * PIECE, PIECE)])
      plgpu.wgmma_wait(0)
      return acc[...]

    y = pl.run_scoped(run, plgpu.ACC((ROWS, PIECE), jnp.float32))
    bias = plgpu.load(bias_ref, layout=self.column_layout, optimized=False)
    return y + self.across(bias)
