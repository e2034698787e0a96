"""The candidate tower in one Hopper kernel: Pallas Mosaic GPU, wgmma, TMA.

Many candidates of D = 256 go the way of `pallas_gpu_layers`, D >= 512 that of
`pallas_gpu_products`. Here a tile of 64
candidates is shared by workers, warpgroups that own the same rows and
different columns: a worker keeps its columns of the float32 residual stream in
registers through all layers, computes its own heads, and reads what the others
have computed from shared memory. Nothing of a candidate goes to device memory
but its final value. Where few candidates would leave the chip idle, the
workers of a tile sit in the blocks of a cluster and write into each other's
shared memory. One more warpgroup streams each worker's columns of the weights
and its heads' keys and values through a ring. NOTES.md has the measurements.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from histjax.ops import dependent
from histjax.ops.candidate_tower import (
  cluster,
  hopper,
  pallas_gpu_layers,
  pallas_gpu_products,
  reference,
)
from histjax.ops.history_attention import pallas_gpu as attention
from histjax.types import KeyRange, Paged, dense

ROWS = hopper.ROWS  # Candidates of a tile.
HEAD_DIMS = {64: (16, 32), 128: (32, 64), 256: (32, 64)}  # H, by D.
STEP = 64  # Keys whose scores are held at once.
NEVER = -1e30  # Less than any score; finite, so that NEVER - NEVER = 0.
META = 8  # int32 fields of a block of work.
MULTIPROCESSORS = 132
CLUSTERS_OF_FOUR = 28  # That run at once; 30 on the H200 that was tried.
CLUSTERS_OF_TWO = 66
LAYERS_FROM = 67  # Tiles; fewer are computed in clusters.
SHARED_MEMORY = 232_448 - 2048  # Bytes of a block, less what sums take.
ALIGNED = 1024  # Where an array in it begins.
BARRIERS = 32  # At most, in one array.
MOST_COPIED = 256  # Rows of what the copy engine moves at once.


@dataclasses.dataclass(frozen=True)
class Config:
  """How the kernel is cut.

  Attributes:
    tiles: of 64 candidates in a block.
    workers: warpgroups of a block that share each tile.
    blocks: of a cluster that share each tile, 1, 2 or 4.
    slot: elements of a slot of a ring; a matrix may leave some unused.
    group: chunks of the MLP's hidden layer between two meetings of workers.
    buffers: groups in shared memory, 1 or 2.
    park: where the residual stream waits during attention: in 'registers',
      in 'shared' memory or in 'device' memory.
    loader: one more warpgroup fills the rings; else the last tile's do, which
      are the later for it and seldom wait for the other tiles.
    late: clock cycles that workers other than a block's first wait before each
      attention: in step they want the same units at once.
    registers: per thread of a computing and of the loading warpgroup.
  """

  tiles: int = 2
  workers: int = 2
  blocks: int = 1
  slot: int = 8192
  group: int = 1
  buffers: int = 2
  park: Literal['registers', 'shared', 'device'] = 'registers'
  loader: bool = True
  late: int = 0
  registers: tuple[int, int] = (112, 24)


def default_config(
  num_rows: int, num_candidates: int, width: int, hidden: int, num_heads: int
) -> Config | Literal['layers', 'products']:
  """The fastest measured on an H200 for 4 heads; NOTES.md has the numbers."""
  tiles = num_rows * pl.cdiv(num_candidates, ROWS)
  if width >= hopper.WIDE:
    return 'products'
  wide = width // num_heads == 64
  if tiles >= LAYERS_FROM and _layers_compute(num_rows, width, hidden):
    return 'layers'
  if width == 64:
    return _narrow_config(tiles, num_candidates, hidden, num_heads)
  choices = []
  if tiles < LAYERS_FROM and num_heads == 4:
    change = functools.partial(
      Config, tiles=1, workers=1, blocks=4, buffers=1, registers=(232, 24)
    )
    if width == 128:
      group = min(4, hidden // 128)
      pairs = num_rows * pl.cdiv(num_candidates, 2 * ROWS)
      if tiles > CLUSTERS_OF_FOUR >= pairs:
        choices.append(change(tiles=2, slot=4096, group=group))
      if CLUSTERS_OF_FOUR < tiles <= CLUSTERS_OF_TWO:
        choices.append(change(workers=2, blocks=2, group=group))
      choices.append(change(slot=4096, group=group))
    else:
      group = min(2, hidden // 256)
      if tiles <= CLUSTERS_OF_FOUR:
        choices.append(change(group=group))
      choices.append(change(workers=2, blocks=2, group=group, late=600))
  elif width == 128:
    choices.append(Config(slot=8192 if wide else 4096, park='shared'))
  else:
    choices.append(Config(buffers=1, park='device', loader=False))
  for choice in choices:
    if _Plan(choice, 1, width, hidden, num_heads).fits():
      return choice
  return choices[-1]


def _narrow_config(tiles, num_candidates, hidden, num_heads) -> Config:
  """Of D = 64; every choice was run on an H200."""
  groups = hidden // 64
  group = next(n for n in (4, 2, 1) if not groups % n)
  change = functools.partial(
    Config,
    slot=2 * STEP * (64 // num_heads),  # More takes registers.
    group=group,
    buffers=min(2, groups // group),
  )
  alone = functools.partial(change, tiles=1, registers=(232, 24))
  choices = []
  if num_heads == 4 and tiles <= CLUSTERS_OF_FOUR:
    choices.append(alone(workers=1, blocks=4))
  elif num_heads == 4 and tiles <= CLUSTERS_OF_TWO:
    choices.append(alone(workers=2, blocks=2))
  elif tiles <= MULTIPROCESSORS or num_candidates <= ROWS:
    choices.append(alone(workers=2, slot=4096))
  choices.append(change())
  for choice in choices:
    if _Plan(choice, 1, 64, hidden, num_heads).fits():
      return choice
  return choices[-1]


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The sizes that follow from a `Config` and the shapes.

  `columns` and `heads` are of a worker. A block of columns is as wide as the
  swizzle allows, `wide`; a worker computes `sub` hidden channels of a chunk.
  """

  config: Config
  num_layers: int
  width: int
  hidden: int
  num_heads: int

  @property
  def all_workers(self) -> int:
    return self.config.workers * self.config.blocks

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @property
  def columns(self) -> int:
    return self.width // self.all_workers

  @property
  def heads(self) -> int:
    return self.num_heads // self.all_workers

  @property
  def wide(self) -> int:
    return min(64, self.columns)

  @property
  def sub(self) -> int:
    return self.wide

  @property
  def chunk(self) -> int:
    return self.sub * self.all_workers

  @property
  def num_groups(self) -> int:
    return self.hidden // (self.chunk * self.config.group)

  @property
  def keys(self) -> int:
    """Keys in a slot."""
    return self.config.slot // 2 // self.head_dim

  def tile_rows(self, rows: int, columns: int) -> int:
    """Rows of a matrix `[rows, columns]` that one slot holds."""
    return min(rows, self.config.slot // columns)

  def view(self, columns: int) -> tuple[int, int]:
    """A slot as a matrix of so many columns."""
    return self.config.slot // columns, columns

  @property
  def query_rows(self) -> int:
    return self.tile_rows(self.width, self.columns)

  @property
  def in_rows(self) -> int:
    return self.tile_rows(self.width, self.sub)

  @property
  def out_rows(self) -> int:
    return self.tile_rows(self.chunk, self.columns)

  @property
  def near(self) -> int:
    """Slots of a matrix that are multiplied by what a block computed itself.

    0 if these are no whole slots; then none comes first.
    """
    own = self.columns * self.config.workers
    whole = self.config.blocks > 1 and own % self.query_rows == 0
    return own // self.query_rows if whole else 0

  def rows_of(self, part: Any, index: Any, groups: int = 1) -> Any:
    """Which rows of a matrix, in slots, the slot `index` of a product has.

    What the block itself has computed is multiplied first, then what comes
    from its peers. `groups`: of columns, of which each block has its share.
    """
    if not self.near:
      return index
    own = jnp.int32(groups * self.near)
    ahead, index = lax.div(index, own), lax.rem(index, own)
    block = lax.rem(part + ahead, jnp.int32(self.config.blocks))
    group = lax.div(index, jnp.int32(self.near))
    at = group * self.config.blocks + block
    return at * self.near + lax.rem(index, jnp.int32(self.near))

  @property
  def num_bias(self) -> int:
    """Blocks of a layer's biases."""
    return (3 * self.width + self.hidden) // self.wide

  @property
  def query_in_act(self) -> bool:
    """Whether a head's queries fit a block of columns."""
    return self.wide == self.head_dim

  def counts(self) -> tuple[int, int, int]:
    """Slots of W_q (and W_o), and of a chunk of W_1 and of W_2."""
    return (
      self.width // self.query_rows,
      self.width // self.in_rows,
      self.chunk // self.out_rows,
    )

  @property
  def out_in_mid(self) -> bool:
    """Whether attention's queries and output go where hidden channels do."""
    config = self.config
    room = config.buffers * config.group * self.chunk
    return self.query_in_act and config.park != 'shared' and room >= self.width

  @property
  def slots(self) -> int:
    """Of each worker's ring: all the shared memory that is left.

    But no more than there may be barriers of a kind.
    """
    config = self.config
    used = 2 * config.tiles * ROWS * self.width
    used += config.tiles * ROWS * self.mid_bytes
    used += 4 * config.tiles * self.all_workers * ROWS * 8
    used += pl.cdiv(2 * 4 * (3 * self.width + self.hidden), ALIGNED) * ALIGNED
    barriers = config.tiles * (config.workers + 1) + 4
    if config.blocks > 1:
      used += ALIGNED  # The barriers that count what peers send.
      barriers += config.tiles
    # A slot has three.
    room = (SHARED_MEMORY - used - 8 * barriers) // (2 * config.slot + 3 * 8)
    return min(room, BARRIERS) // config.workers

  @property
  def mid_bytes(self) -> int:
    """Of a row of what holds hidden channels, or queries and the residual."""
    attention = 0 if self.query_in_act else 2 * self.width
    if self.config.park == 'shared':
      attention += 4 * self.width
    hidden = self.config.buffers * self.config.group * self.chunk
    return max(2 * hidden, attention)

  @property
  def first_parked(self) -> int:
    """Behind the queries, the first block of 32 columns of the residual."""
    return 0 if self.query_in_act else 2 * self.width // 128

  def fits(self) -> bool:
    """Whether the parts fit each other and shared memory."""
    config = self.config
    if self.num_heads % self.all_workers or self.width % self.all_workers:
      return False
    return (
      not self.hidden % (self.chunk * config.group)
      and not self.width % self.query_rows
      and not self.width % self.in_rows
      and not self.chunk % self.out_rows
      and not self.query_rows % self.wide
      and not self.keys % STEP
      and self.num_bias <= MOST_COPIED
      and (config.park != 'shared' or not self.columns % 32)
      and self.slots >= 2
      and (config.blocks == 1 or (self.heads == 1 and self.query_in_act))
      and config.buffers <= self.num_groups
      and (config.workers > 1 or not config.late)
    )


def candidate_tower(
  candidates: Float[Array, 'B C D'],
  position: Int[Array, 'B C'] | None,
  keys: Float[Array, 'layers B L N H'] | Paged,
  values: Float[Array, 'layers B L N H'] | Paged,
  key_range: KeyRange,
  weights: reference.TowerWeights,
  *,
  num_heads: int,
  count: Int[Array, 'B'] | None = None,
  layer: int | None = None,
  final_norm: bool = True,
  config: Config | Literal['layers', 'products'] | None = None,
) -> Float[Array, 'B C D']:
  """See `api.candidate_tower`; `config` is for measurements.

  'layers', 'products': as `pallas_gpu_layers`, `pallas_gpu_products` say.
  """
  plgpu = hopper.mosaic_gpu()
  num_rows, num_candidates, width = candidates.shape
  hidden = weights.mlp_in.shape[2]
  _check(candidates, keys, weights, num_heads)
  if config is None:
    config = default_config(num_rows, num_candidates, width, hidden, num_heads)
  pages = None
  if config == 'products' and isinstance(keys, Paged):
    if reads_pages(width, hidden, num_heads, keys.pool.shape[2]):
      # Of a request, XLA would give a slice, which may lie anywhere.
      pages = hopper.no_slices(keys.index)
  if pages is None:
    keys, values = dense(keys), dense(values)
  if config != 'products':  # It copies nothing of other layers.
    keys, values, weights = reference.of_layer(keys, values, weights, layer)
  num_layers, _, num_keys = keys.shape[:3]

  def pad(x, to, mode='constant'):
    after = to - x.shape[1]
    if not after:
      return x
    widths = [(0, 0), (0, after)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, mode=mode)

  # The copy engine moves 8 rows at a time.
  copied = pl.cdiv(num_candidates, 8) * 8

  def flat(y):
    """Layers and rows, or pages, as one axis."""
    if pages is not None:
      return y.pool.reshape(-1, *y.pool.shape[2:])
    y = y.reshape(num_layers * num_rows, *y.shape[2:])
    return pad(y, pl.cdiv(num_keys, 8) * 8)

  keys, values = flat(keys), flat(values)
  start, stop = key_range.start, key_range.stop
  if isinstance(config, str):
    run: Any = pallas_gpu_layers.candidate_tower
    computes = _layers_compute(num_rows, width, hidden)
    if config == 'products':
      run = functools.partial(
        pallas_gpu_products.candidate_tower,
        layer=layer,
        pages=pages,
        of_layer=len(keys) // num_layers,
      )
      computes = _products_compute(num_rows, width, hidden, num_heads)
    if not computes:
      raise NotImplementedError(
        f'no kernels in {config} for B={num_rows}, D={width}, N={num_heads}, '
        f'F={hidden}'
      )
    start, stop = (pad(y, copied, 'edge') for y in (start, stop))
    out = run(
      plgpu,
      functools.partial(attention.of_layer, num_keys=num_keys),
      pad(candidates, copied),
      None if position is None else pad(position, copied, 'edge'),
      keys,
      values,
      KeyRange(start, stop, key_range.structure),
      weights,
      count=count,
      final_norm=final_norm,
    )
    return out[:, :num_candidates]
  plan = _Plan(config, num_layers, width, hidden, num_heads)
  if not plan.fits():
    raise NotImplementedError(
      f'pallas_gpu has no plan for D={width}, N={num_heads}, F={hidden} with '
      f'{config}'
    )
  rows = config.tiles * ROWS
  num_blocks = pl.cdiv(num_candidates, rows)
  padded = num_blocks * rows
  # Registers are moved by whole blocks. Padding sees what the last one sees.
  whole = candidates.dtype == jnp.float32 or not final_norm
  x = pad(candidates, padded if whole else copied)
  place = start if position is None else position
  place = pad(place, padded, 'edge')
  structure = key_range.structure
  prefix = structure == 'prefix'
  few = num_rows * num_blocks <= MULTIPROCESSORS  # Any order is as good.
  meta = None
  # The kernel may know all of it from `stop` and `count`.
  if prefix and (few or count is None):
    start = None
  elif structure != 'any' and few:
    start, stop = None, pad(stop, padded, 'edge')
    # By one kernel of XLA's, which reads slices of whole blocks in place.
    place, stop = hopper.no_slices(jnp.stack([place, stop]))
  else:
    start, stop = jnp.maximum(start, 0), jnp.minimum(stop, num_keys)
    start, stop = pad(start, padded, 'edge'), pad(stop, padded, 'edge')
    meta = _blocks(start, stop, count, rows, prefix, sort=not few)
    start = start.reshape(-1)
  keys, values = (dense(y).reshape(*y.shape[:2], width) for y in (keys, values))
  call = _kernel(
    plgpu,
    plan,
    x.shape,
    (num_blocks, num_candidates, num_keys),
    prefix,
    position is not None,
    count is not None,
    final_norm,
  )
  out = call(
    meta,
    count,
    start,
    stop.reshape(-1),
    place.reshape(-1),
    x,
    keys,
    values,
    weights.query,
    weights.output,
    weights.mlp_in,
    weights.mlp_out,
    weights.bias.reshape(num_layers, -1, plan.wide),
    weights.final_scale.reshape(-1, plan.wide),
    weights.final_bias.reshape(-1, plan.wide),
  )
  return out[0][:, :num_candidates]


def reads_pages(width: int, hidden: int, num_heads: int, page: int) -> bool:
  """Whether keys and values are read from pages of so many events."""
  fits = pallas_gpu_products.fits(width, hidden, width // num_heads)
  return fits and attention.fits_pages(page)


def _layers_compute(num_rows, width, hidden):
  """Whether `pallas_gpu_layers` computes such a call."""
  fits = pallas_gpu_layers.fits(width, hidden)
  return fits and num_rows <= attention.MAX_GRID


def _products_compute(num_rows, width, hidden, num_heads):
  """Whether `pallas_gpu_products` computes such a call."""
  fits = pallas_gpu_products.fits(width, hidden, width // num_heads)
  return fits and num_rows <= attention.MAX_GRID


def _check(candidates, keys, weights, num_heads):
  """Raises NotImplementedError at a call that the kernel cannot compute."""
  width, head_dim = candidates.shape[2], keys.shape[4]
  hidden = weights.mlp_in.shape[2]
  if not pallas_gpu_products.fits(width, hidden, head_dim) and (
    head_dim not in HEAD_DIMS.get(width, ())
    or num_heads * head_dim != width
    or hidden % width
  ):
    raise NotImplementedError(
      'pallas_gpu takes D 64 with H 16 or 32, D 128 or 256 with H 32 or 64, '
      'and F a multiple of D, or D and F multiples of 256, H 64 or 128 and '
      'D >= 512, not '
      f'D={width}, N={num_heads}, H={head_dim}, F={hidden}'
    )
  if keys.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f'pallas_gpu takes bfloat16 keys, values and matrices, not {keys.dtype}'
    )


def _blocks(start, stop, count, rows, prefix, sort):
  """The list of work, int32 `[blocks, META]`; long blocks first if sorted.

  Fields: user, first candidate, the keys that some candidate sees (from, to),
  the keys that every candidate sees (from, to), the candidates that count, the
  first candidate's place in the padded arrays.
  """
  num_rows, padded = start.shape
  shape = (num_rows, padded // rows, rows)
  start, stop = start.reshape(shape), stop.reshape(shape)
  empty = start >= stop
  if prefix:  # All candidates of a row see the same: nothing to reduce.
    all_from = low = jnp.zeros_like(start[:, :, 0])
    all_to = high = jnp.maximum(stop[:, :, 0], 0)
  else:
    low = jnp.where(empty, jnp.iinfo(jnp.int32).max, start).min(axis=2)
    high = jnp.where(empty, 0, stop).max(axis=2)
    low = jnp.minimum(low, high)  # Nobody sees anything: low = high = 0.
    all_from, all_to = start.max(axis=2), stop.min(axis=2)
  row = lax.broadcasted_iota(jnp.int32, low.shape, 0)
  first = lax.broadcasted_iota(jnp.int32, low.shape, 1) * rows
  live = jnp.full_like(row, rows)
  if count is not None:
    live = jnp.clip(count[:, None] - first, 0, rows)
  meta = jnp.stack(
    [row, first, low, high, all_from, all_to, live, row * padded + first],
    axis=-1,
  ).reshape(-1, META)
  if not sort:
    return meta
  # Longest first; of few, as a counting rank, which is cheaper than a sort.
  cost = jnp.where(meta[:, 6] > 0, 512 + meta[:, 3] - meta[:, 2], 0)
  if len(meta) > 2048:
    return meta[jnp.argsort(cost, descending=True)]
  index = jnp.arange(cost.shape[0], dtype=jnp.int32)
  ahead = (cost[None, :] > cost[:, None]) | (
    (cost[None, :] == cost[:, None]) & (index[None, :] < index[:, None])
  )
  rank = ahead.sum(axis=1, dtype=jnp.int32)
  return jnp.zeros_like(meta).at[rank].set(meta, unique_indices=True)


@functools.lru_cache(maxsize=64)
def _kernel(plgpu, plan, x_shape, sizes, prefix, rotate, ragged, final_norm):
  """Builds the call for static shapes."""
  num_blocks = sizes[0]
  config = plan.config
  num_rows = x_shape[0]
  tiles, workers, slots = config.tiles, config.workers, plan.slots
  bf16, wide, head_dim = jnp.bfloat16, plan.wide, plan.head_dim

  def swizzled(shape, dtype=bf16, columns=wide):
    return hopper.swizzled(plgpu, shape, dtype, columns)

  # One place for each tile's hidden channels, or queries and residual stream:
  # the views have one stride, since a tile may be in its MLP and another not.
  room = ROWS * plan.mid_bytes
  mid = [
    swizzled(
      (
        tiles,
        room // (ROWS * columns * jnp.dtype(dtype).itemsize),
        ROWS,
        columns,
      ),
      dtype,
      columns,
    )
    for columns, dtype in (
      (plan.sub, bf16),
      (head_dim, bf16),
      (32, jnp.float32),
    )
  ]
  ring = workers * slots
  views = [
    swizzled((ring, *plan.view(head_dim)), columns=head_dim),
    swizzled((ring, *plan.view(plan.columns))),
    swizzled((ring, *plan.view(plan.sub))),
    swizzled((ring, *plan.view(plan.columns))),
  ]
  grouped, peers = {}, {}
  if config.blocks > 1:
    grouped = dict(cluster=(config.blocks,), cluster_names=('part',))
    peers = dict(
      sent=plgpu.SMEM((tiles, 4), jnp.int32),  # Two barriers each.
      together=plgpu.ClusterBarrier(
        collective_axes=('part',), num_arrivals=workers, num_barriers=tiles
      ),
    )
  scratch = dict(
    act=swizzled((tiles, plan.width // wide, ROWS, wide)),
    mid=plgpu.RefUnion(*mid),
    ring=plgpu.RefUnion(*views),
    stats=swizzled((tiles, plan.all_workers, ROWS, 8), jnp.float32, 8),
    bias_smem=plgpu.SMEM((2, plan.num_bias, wide), jnp.float32),
    x_full=plgpu.Barrier(
      num_arrivals=plan.columns // wide, num_barriers=tiles * workers
    ),
    kv_full=plgpu.Barrier(num_arrivals=2, num_barriers=ring),
    full=plgpu.Barrier(num_barriers=ring),
    free=plgpu.Barrier(num_arrivals=tiles, num_barriers=ring),
    bias_full=plgpu.Barrier(num_barriers=2),
    bias_free=plgpu.Barrier(num_arrivals=tiles * workers, num_barriers=2),
    met=plgpu.Barrier(num_arrivals=workers, num_barriers=tiles),
    **peers,
  )
  park = (
    num_rows * num_blocks, config.blocks * tiles * workers, ROWS, plan.columns
  )  # fmt: skip
  body = functools.partial(
    _body,
    plgpu=plgpu,
    plan=plan,
    sizes=sizes,
    prefix=prefix,
    rotate=rotate,
    ragged=ragged,
    final_norm=final_norm,
  )
  return plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct(x_shape, bf16 if final_norm else jnp.float32),
      jax.ShapeDtypeStruct(park, jnp.float32)
      if config.park == 'device'
      else None,
    ),
    scratch_types=scratch,
    grid=(num_rows * num_blocks,),
    grid_names=('block',),
    **grouped,
    num_threads=tiles * workers + config.loader,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    kernel_name=dependent.kernel_name('candidate_tower'),
  )


def _body(
  meta_ref, count_ref, start_ref, stop_ref, place_ref, x_ref, k_ref, v_ref,
  wq_ref, wo_ref, w1_ref, w2_ref, bias_ref, scale_ref, shift_ref,
  out_ref, park_ref,
  *, plgpu, plan, sizes, prefix, rotate, ragged, final_norm, **scratch,
):  # fmt: skip
  """One block: a warpgroup for each worker of each tile, and one that loads."""
  dependent.wait(plgpu)
  config = plan.config
  block, wg = lax.axis_index('block'), lax.axis_index('wg')
  part = lax.axis_index('part') if config.blocks > 1 else jnp.int32(0)
  num_blocks, num_candidates, num_keys = sizes
  if meta_ref is not None:
    row, first, seen_from, seen_to, all_from, all_to, live, place = (
      meta_ref[block, i] for i in range(META)
    )
  else:
    rows = config.tiles * ROWS
    row = lax.div(block, jnp.int32(num_blocks))
    first = lax.rem(block, jnp.int32(num_blocks)) * rows
    place, live = block * rows, rows
    if ragged:
      live = jnp.clip(count_ref[row] - first, 0, rows)
    seen_from = all_from = jnp.int32(0)
    if prefix:
      all_to = seen_to = stop_ref[row * num_candidates]
    else:  # They ascend.
      all_to, seen_to = stop_ref[place], stop_ref[place + rows - 1]
    all_to, seen_to = (jnp.clip(i, 0, num_keys) for i in (all_to, seen_to))
  context = _Context(
    plgpu=plgpu,
    plan=plan,
    part=part,
    row=row,
    low=lax.div(seen_from, jnp.int32(plan.keys)),
    steps=pl.cdiv(seen_to, jnp.int32(plan.keys))
    - lax.div(seen_from, jnp.int32(plan.keys)),
    seen=(seen_from, seen_to),
    everyone=(all_from, all_to),
    cache=(k_ref, v_ref),
    matrices=(wq_ref, wo_ref, w1_ref, w2_ref),
    bias_ref=bias_ref,
    num_rows=x_ref.shape[0],
    **scratch,
  )
  most, least = config.registers
  computing = config.tiles * config.workers
  work = live > 0 if ragged else True

  @pl.when(wg < computing)
  def _():
    if config.loader:
      plgpu.set_max_registers(most, action='increase')
    tile = lax.div(wg, jnp.int32(config.workers))
    worker = lax.rem(wg, jnp.int32(config.workers))
    mine = part * config.workers + worker
    here = first + tile * ROWS
    per = plan.columns // plan.wide
    act = scratch['act'].at[tile]
    own = row, pl.ds(here, ROWS), pl.ds(mine * plan.columns, plan.columns)

    def cut(n):
      columns = pl.ds((mine * per + n) * plan.wide, plan.wide)
      return row, pl.ds(here, ROWS), columns

    def read():
      """The residual stream, which is being copied unless it is float32."""
      layout = plgpu.Layout.WGMMA
      if x_ref.dtype == jnp.float32:
        return plgpu.load(x_ref.at[own], layout=layout, optimized=False)
      plgpu.barrier_wait(scratch['x_full'].at[wg])
      pieces = [
        plgpu.load(act.at[mine * per + n], layout=layout) for n in range(per)
      ]
      return hopper.join(pieces).astype(jnp.float32)

    @pl.when(work)
    def _():
      if x_ref.dtype != jnp.float32:
        for n in range(per):
          plgpu.copy_gmem_to_smem(
            x_ref.at[cut(n)], act.at[mine * per + n], scratch['x_full'].at[wg]
          )
      at = pl.ds(place + tile * ROWS, ROWS)
      layout = plgpu.Layout.WGMMA.reduce(1)

      def column(ref):
        return plgpu.load(ref.at[at], layout=layout, optimized=False)

      def same(i):
        return plgpu.layout_cast(lax.broadcast(i, (ROWS,)), layout)

      start = same(seen_from) if meta_ref is None else column(start_ref)
      if meta_ref is None and prefix:
        stop = same(lax.optimization_barrier(seen_to))
      else:
        stop = column(stop_ref)
        if meta_ref is None:
          stop = jnp.minimum(stop, num_keys)
      x = _Worker(
        context,
        tile=tile,
        worker=worker,
        mine=mine,
        limits=(start, stop),
        place=column(place_ref).astype(jnp.float32) if rotate else None,
        park_ref=park_ref,
        park_at=(block, part * computing + wg),
      ).run(
        read,
        (scale_ref, shift_ref) if final_norm else None,
        live - tile * ROWS if ragged else None,
      )
      if not final_norm:
        hopper.put(plgpu, out_ref.at[own], x)

    def zeros(columns, dtype):
      zero = jnp.zeros((ROWS, columns), dtype)
      return plgpu.layout_cast(zero, plgpu.Layout.WGMMA)

    if ragged:

      @pl.when(jnp.logical_not(work))
      def _():
        if final_norm:
          for n in range(per):
            act[mine * per + n] = zeros(plan.wide, jnp.bfloat16)
        else:
          nothing = zeros(plan.columns, jnp.float32)
          hopper.put(plgpu, out_ref.at[own], nothing)

    if not final_norm:
      return
    plgpu.commit_smem()
    for n in range(per):
      plgpu.copy_smem_to_gmem(
        act.at[mine * per + n], out_ref.at[cut(n)], commit_group=False
      )
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)

  if not config.loader:
    return

  @pl.when(wg == computing)
  def _():
    plgpu.set_max_registers(least, action='decrease')

    @pl.when(work)
    def _():
      @plgpu.warp_map
      def _(warp):
        @pl.when(warp < config.workers)  # One for each worker's ring.
        def _():
          @pl.loop(0, plan.num_layers)
          def _(layer):
            @pl.when(warp == 0)
            def _():
              context.fetch_bias(layer)

            @pl.loop(0, context.per_layer)
            def _(item):
              context.fetch(layer, item, warp)


@dataclasses.dataclass(frozen=True)
class _Context:
  """What the warpgroups of a block share; refs as in `_kernel`."""

  plgpu: Any
  plan: _Plan
  part: Any
  row: Any
  low: Any
  steps: Any
  seen: Any
  everyone: Any
  act: Any
  mid: Any
  ring: Any
  stats: Any
  bias_smem: Any
  x_full: Any
  kv_full: Any
  full: Any
  free: Any
  bias_full: Any
  bias_free: Any
  met: Any
  cache: Any
  matrices: Any
  bias_ref: Any
  num_rows: int
  sent: Any = None
  together: Any = None

  @property
  def per_layer(self):
    """Slots of a worker's ring that a layer fills."""
    plan = self.plan
    deep, n1, n2 = plan.counts()
    per_group = plan.config.group * (n1 + n2)
    return 2 * deep + plan.heads * self.steps + plan.num_groups * per_group

  def fetch_bias(self, layer):
    """Starts the copy of a layer's biases."""
    plgpu, two = self.plgpu, lax.rem(layer, jnp.int32(2))

    @pl.when(layer >= 2)
    def _():
      plgpu.barrier_wait(self.bias_free.at[two])

    plgpu.copy_gmem_to_smem(
      self.bias_ref.at[layer], self.bias_smem.at[two], self.bias_full.at[two]
    )

  def fetch(self, layer, item, worker):
    """Starts the copy of a layer's `item` into a worker's ring.

    In the order in which a `_Worker` takes them: W_q, each head's keys and
    values, W_o, then by group W_1 and W_2.
    """
    plgpu, plan = self.plgpu, self.plan
    deep, n1, n2 = plan.counts()
    group = plan.config.group
    wq_ref, wo_ref, w1_ref, w2_ref = self.matrices
    kv_view, q_view, in_view, out_view = self.ring
    mine = self.part * plan.config.workers + worker
    number = layer * self.per_layer + item
    slot = worker * plan.slots + lax.rem(number, jnp.int32(plan.slots))

    @pl.when(number >= plan.slots)
    def _():
      plgpu.barrier_wait(self.free.at[slot])

    def weight(ref, view, row, rows, column):
      plgpu.copy_gmem_to_smem(
        ref.at[layer, pl.ds(row, rows), pl.ds(column, view.shape[2])],
        view.at[slot, pl.ds(0, rows)],
        self.full.at[slot],
      )

    def query_or_output(ref, first):
      @pl.when((item >= first) & (item < first + deep))
      def _():
        row = plan.rows_of(self.part, item - first) * plan.query_rows
        weight(ref, q_view, row, plan.query_rows, mine * plan.columns)

    cached = plan.heads * self.steps
    query_or_output(wq_ref, 0)
    query_or_output(wo_ref, deep + cached)

    @pl.when((item >= deep) & (item < deep + cached))
    def _():
      step = item - deep
      head = mine * plan.heads
      for _ in range(plan.heads - 1):
        over = (step >= self.steps).astype(jnp.int32)
        step, head = step - over * self.steps, head + over
      at = (
        layer * self.num_rows + self.row,
        pl.ds((self.low + step) * plan.keys, plan.keys),
        pl.ds(head * plan.head_dim, plan.head_dim),
      )
      for j, ref in enumerate(self.cache):
        plgpu.copy_gmem_to_smem(
          ref.at[at],
          kv_view.at[slot, pl.ds(j * plan.keys, plan.keys)],
          self.kv_full.at[slot],
        )

    @pl.when(item >= 2 * deep + cached)
    def _():
      index = item - 2 * deep - cached
      per_group = jnp.int32(group * (n1 + n2))
      turn, index = lax.div(index, per_group), lax.rem(index, per_group)

      @pl.when(index < group * n1)
      def _():
        chunk = turn * group + lax.div(index, jnp.int32(n1))
        row = plan.rows_of(self.part, lax.rem(index, jnp.int32(n1)))
        column = chunk * plan.chunk + mine * plan.sub
        weight(w1_ref, in_view, row * plan.in_rows, plan.in_rows, column)

      @pl.when(index >= group * n1)
      def _():
        row = plan.rows_of(self.part, index - group * n1, group)
        row = turn * group * plan.chunk + row * plan.out_rows
        weight(w2_ref, out_view, row, plan.out_rows, mine * plan.columns)


class _Worker(hopper.Warpgroup):
  """A computing warpgroup: its columns of 64 candidates, all layers."""

  def __init__(
    self, context, *, tile, worker, mine, limits, place, park_ref, park_at,
  ):  # fmt: skip
    super().__init__(context.plgpu)
    self.context, self.plan = context, context.plan
    plan = self.plan
    self.place = place
    self.limits, self.park_ref, self.park_at = limits, park_ref, park_at
    self.per = plan.columns // plan.wide
    self.kv, *views = context.ring
    rows = plan.query_rows, plan.in_rows, plan.out_rows
    # Of each matrix the view of the ring, and how many of its rows are used.
    self.wq, self.w1, self.w2 = zip(views, rows, strict=True)
    self.layer = jnp.int32(0)
    self.locate(tile, worker, mine)

  def locate(self, tile, worker, mine):
    """Where this worker's things are."""
    self.tile, self.worker, self.mine = tile, worker, mine
    plan, context = self.plan, self.context
    hidden, queries, parked = (ref.at[tile] for ref in context.mid)
    self.act, self.hidden = context.act.at[tile], hidden
    self.queries, self.first_query = self.act, mine * plan.heads
    if plan.out_in_mid:
      self.queries = hidden
    elif not plan.query_in_act:
      self.queries = queries
    self.parked = self.park_ref
    if plan.config.park == 'shared':
      self.parked = parked
      self.first_parked = plan.first_parked + worker * (plan.columns // 32)

  def at_layer(self, layer):
    """Hides what does not change, or the compiler keeps it in registers."""
    other = copy.copy(self)
    other.layer = layer
    where = (self.tile, self.worker, self.mine)
    other.locate(*(lax.optimization_barrier(i) for i in where))
    if self.place is not None:
      other.place = lax.optimization_barrier(self.place)
    return other

  # Between registers and shared memory.

  def zeros(self, columns):
    x = jnp.zeros((ROWS, columns), jnp.float32)
    return self.plgpu.layout_cast(x, self.plgpu.Layout.WGMMA)

  def vector(self, value):
    x = jnp.full((ROWS,), value, jnp.float32)
    return self.plgpu.layout_cast(x, self.row_layout)

  def iota(self, shape, axis):
    return self.plgpu.broadcasted_iota(
      jnp.int32, shape, axis, layout=self.plgpu.Layout.WGMMA
    )

  def bias(self, two, at, blocks):
    """`[64, blocks * wide]`, from block `at` of the layer's biases."""
    found = []
    for j in range(blocks):
      b = self.plgpu.load(
        self.context.bias_smem.at[two, at + j], layout=self.column_layout
      )
      found.append(self.across(b))
    return hopper.join(found)

  # Between the workers of a tile.

  def meet(self):
    """Waits for the workers of the tile in this block."""
    met = self.context.met.at[self.tile]
    self.plgpu.barrier_arrive(met)
    self.plgpu.barrier_wait(met)

  def sync(self):
    """Waits for all workers of the tile."""
    if self.plan.config.blocks > 1:
      together = self.context.together.at[self.tile]
      self.plgpu.barrier_arrive(together)
      self.plgpu.barrier_wait(together)
    else:
      self.meet()

  def share(self, pieces, ref, at, turn):
    """Writes pieces to blocks `at, at + 1, ..` of `ref`, for all workers.

    In a cluster, calls are counted by two barriers in `turn`, so that what
    arrives early is not counted for the call before. Returns as `gather`.
    """
    for n, piece in enumerate(pieces):
      ref[at + n] = piece
    self.plgpu.commit_smem()
    if self.plan.config.blocks > 1:
      self.send(ref, at, turn)
    return self.gather(ref, 1, turn)

  def sent(self, turn):
    """The barrier of a layer's meeting number `turn`."""
    meetings = 5 + self.plan.num_groups
    odd = lax.rem(self.layer * meetings + turn, jnp.int32(2))
    return self.context.sent.at[self.tile, pl.ds(2 * odd, 2)]

  def send(self, ref, at, turn):
    """Starts the copies of piece `at` to the same place of the other blocks."""
    transforms = hopper.transforms(self.plgpu, ref.dtype, ref.shape[-1])
    ref_type = self.plgpu.RefType
    copy = functools.partial(cluster.send, blocks=self.plan.config.blocks)
    self.plgpu.inline_mgpu(arg_types=(ref_type(transforms), ref_type()))(copy)(
      ref.at[at], self.sent(turn)
    )

  def gather(self, ref, count, turn):
    """Waits for `count` pieces of each worker of this block.

    Returns what waits for the peers', to be called once by all workers, or
    None.
    """
    plgpu = self.plgpu
    blocks = self.plan.config.blocks
    if self.plan.config.workers > 1:
      self.meet()
    if blocks == 1:
      return None
    size = (blocks - 1) * count * math.prod(ref.shape[1:]) * ref.dtype.itemsize
    receive = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(
      functools.partial(cluster.receive, size=size)
    )
    return lambda: receive(self.sent(turn))

  def split(self, x, size):
    """`[64, columns]` as blocks `[64, size]`."""
    return [x[:, at : at + size] for at in range(0, x.shape[1], size)]

  def statistics(self, x, turn):
    """Mean and inverse deviation `[64]` over all workers' columns.

    The workers' means and sums of squares around them are joined as by Chan
    et al. 1979.
    """
    plan = self.plan
    workers, columns, width = plan.all_workers, plan.columns, plan.width
    mean = x.sum(axis=1) * (1 / columns)
    mean = lax.optimization_barrier(mean)
    square = 0.0
    for piece in self.split(x, min(32, columns)):
      gap = piece - self.down(mean, piece.shape[1])
      square += (gap * gap).sum(axis=1)
    left = self.iota((ROWS, 8), 1) < 4
    both = jnp.where(left, self.down(mean, 8), self.down(square, 8))
    stats = self.context.stats.at[self.tile]
    far = self.share([both], stats, self.mine, turn)
    if far is not None:
      far()
    parts = [
      self.plgpu.load(stats.at[w], layout=self.plgpu.Layout.WGMMA)
      for w in range(workers)
    ]
    total = sum(parts)
    mean = jnp.where(left, total, 0.0).sum(axis=1) * (0.25 / workers)
    spread = 0.0
    for part in parts:
      gap = part - self.down(mean, 8)
      spread += gap * gap
    variance = jnp.where(left, columns * spread, total).sum(axis=1)
    variance *= 0.25 / width
    scale = lax.rsqrt(variance + reference.EPSILON)
    return lax.optimization_barrier((mean, scale))

  def share_norm(self, x, turn):
    """Puts the norm of `x` into `act`; returns as `gather`."""
    mean, scale = self.statistics(x, turn)
    wide = self.plan.wide
    return self.share(
      (
        ((y - self.down(mean, wide)) * self.down(scale, wide)).astype(
          jnp.bfloat16
        )
        for y in self.split(x, wide)
      ),
      self.act,
      self.mine * self.per,
      turn + 1,
    )

  # Products with the tiles of a ring.

  @property
  def leads(self):
    """Whether this warpgroup fills its worker's ring."""
    return self.tile == self.plan.config.tiles - 1

  def slot(self, number):
    slots = self.plan.slots
    return self.worker * slots + lax.rem(number, jnp.int32(slots))

  def give(self, number):
    """Gives a slot back; without a loader, whoever leads refills it."""
    plgpu, plan, context = self.plgpu, self.plan, self.context
    plgpu.barrier_arrive(context.free.at[self.slot(number)])
    if plan.config.loader:
      return

    @pl.when(self.leads)
    def _():
      item = number - self.layer * context.per_layer + plan.slots
      over = (item >= context.per_layer).astype(jnp.int32)
      item, ahead = item - over * context.per_layer, self.layer + over

      @plgpu.warp_map
      def _(warp):
        @pl.when((warp == 0) & (ahead < plan.num_layers))
        def _():
          context.fetch(ahead, item, self.worker)

  def fill(self):
    """Starts the copies of all slots of this worker's ring, and of biases."""
    plan, context = self.plan, self.context

    @pl.when(self.worker == 0)
    def _():
      for index in range(min(2, plan.num_layers)):
        context.fetch_bias(jnp.int32(index))

    @pl.loop(0, plan.slots)
    def _(number):
      over = (number >= context.per_layer).astype(jnp.int32)
      context.fetch(over, number - over * context.per_layer, self.worker)

  def product(self, acc, left, matrix, number, tiles, groups=1, far=None):
    """acc += left @ tiles, of which `far` waits for those that peers compute.

    `groups`: see `rows_of`.
    """
    plgpu, plan = self.plgpu, self.plan
    view, rows = matrix
    per = rows // plan.wide
    # A slot's products run on into the next one's where there are registers.
    lag = int(plan.config.loader)

    def multiply(k):
      slot = self.slot(number + k)
      at = plan.rows_of(self.context.part, k, groups) * per
      plgpu.barrier_wait(self.context.full.at[slot])
      for i in range(per):
        w = view.at[slot, pl.ds(i * plan.wide, plan.wide)]
        plgpu.wgmma(acc, left.at[at + i], w)

    def step(k):
      multiply(k)
      plgpu.wgmma_wait(lag * per)
      self.give(number + k - lag)

    near = plan.near * groups
    if far is not None and not near:
      far()
    if lag:
      multiply(0)
    pl.loop(lag, near or tiles)(step)
    if near:
      if far is not None:
        far()
      pl.loop(near, tiles)(step)
    if lag:
      plgpu.wgmma_wait(0)
      self.give(number + tiles - 1)

  def times(self, init, *args, **options):
    """init + left @ tiles, see `product`."""

    def run(acc):
      self.product(acc, *args, **options)

    return pl.run_state(run)(self.plgpu.ACC.init(init))

  # The parts of a layer.

  def hide(self, s, base):
    """-inf outside each candidate's range.

    Eight columns at a time against a constant: an index array as wide as the
    scores would live in registers through the whole loop.
    """
    start, stop = self.limits
    column = self.iota((ROWS, 8), 1)
    after = self.down(start - base, 8) - column
    until = self.down(stop - base, 8) - column
    parts = []
    for at in range(0, s.shape[1], 8):
      seen = (after <= at) & (until > at)
      parts.append(jnp.where(seen, s[:, at : at + 8], -jnp.inf))
    return lax.concatenate(parts, 1)

  def clean(self, values, base):
    """Zeroes values that none may see, which may be NaN: 0 NaN = NaN."""
    seen_from, seen_to = self.context.seen
    v = self.plgpu.load(values, layout=self.plgpu.Layout.WGMMA)
    index = base + self.iota(v.shape, 0)
    keep = (index >= seen_from) & (index < seen_to)
    values[...] = jnp.where(keep, v, jnp.zeros_like(v))
    self.plgpu.commit_smem()

  def attend(self, n, number):
    """The output `[64, H]` of this worker's head `n`."""
    plan, steps = self.plan, self.context.steps
    empty = (
      self.zeros(plan.head_dim),
      self.vector(NEVER),
      self.zeros(8),  # Sums of every eighth weight, added up at the end.
    )
    out, _, total = lax.fori_loop(
      0, steps, functools.partial(self.attend_slot, n, number), empty
    )
    total = total.sum(axis=1)
    share = jnp.where(total > 0, 1 / total, 0.0)
    return (out * self.down(share, plan.head_dim)).astype(jnp.bfloat16)

  def attend_slot(self, n, number, i, carry):
    """Product, softmax, product with the keys and values of one slot."""
    slot = self.slot(number + i)
    self.plgpu.barrier_wait(self.context.kv_full.at[slot])
    for h in range(self.plan.keys // STEP):
      carry = self.attend_step(n, slot, i, h, carry)
    self.give(number + i)
    return carry

  def attend_step(self, n, slot, i, h, carry):
    """Adds what part `h` of a slot gives to the outputs and their sums."""
    plgpu, plan, context = self.plgpu, self.plan, self.context
    out, peak, total = carry
    query = self.queries.at[self.first_query + n]
    k = self.kv.at[slot, pl.ds(h * STEP, STEP)]
    v = self.kv.at[slot, pl.ds(plan.keys + h * STEP, STEP)]
    base = (context.low + i) * plan.keys + h * STEP

    def scores(acc):
      plgpu.wgmma(acc, query, k.T)
      return acc[...]

    s = pl.run_scoped(scores, plgpu.ACC((ROWS, STEP), jnp.float32))
    all_from, all_to = context.everyone
    seen_from, seen_to = context.seen

    def at_the_edge():
      @pl.when((base < seen_from) | (base + STEP > seen_to))
      def _():
        self.clean(v, base)

      return self.hide(s, base)

    partial = (base < all_from) | (base + STEP > all_to)
    s = lax.cond(partial, at_the_edge, lambda: s)
    new = jnp.maximum(peak, s.max(axis=1))
    decay = jnp.exp2(peak - new)
    p = jnp.exp2(s - self.down(new, STEP))
    total = total * self.down(decay, 8) + sum(self.split(p, 8))
    p = p.astype(jnp.bfloat16)

    def add(acc):
      plgpu.wgmma(acc, p, v)

    out = out * self.down(decay, plan.head_dim)
    return pl.run_state(add)(plgpu.ACC.init(out)), new, total

  def attention(self, x, number, two):
    """x + Attention(norm(x)) W_o + b_o."""
    plgpu, plan, context = self.plgpu, self.plan, self.context
    deep = plan.counts()[0]
    blocks = plan.width // plan.wide
    at = self.mine * self.per
    far = self.share_norm(x, 0)
    self.park(x)
    init = self.bias(two, at, self.per)
    q = self.times(init, self.act, self.wq, number, deep, far=far)
    number += deep
    # Scores in units of log 2.
    scale = plan.head_dim**-0.5 * math.log2(math.e)
    turns = self.rotation(self.place, plan.head_dim, scale)
    q = self.rotated(q, turns, plan.head_dim)
    if not plan.out_in_mid:
      self.sync()  # All have read what the queries or outputs replace.
    for n, head in enumerate(q):
      self.queries[self.first_query + n] = head
    plgpu.commit_smem()
    joined = plan.wide // plan.head_dim

    if plan.config.late:
      sleep = plgpu.inline_mgpu()(
        functools.partial(cluster.sleep, cycles=plan.config.late)
      )
      pl.when(self.worker > 0)(sleep)

    def outputs():
      for j in range(self.per):
        heads = [
          self.attend(n, number + n * context.steps)
          for n in range(j * joined, (j + 1) * joined)
        ]
        yield hopper.join(heads)

    attended = self.hidden if plan.out_in_mid else self.act
    far = self.share(outputs(), attended, at, 2)
    number += plan.heads * context.steps
    bias = self.bias(two, blocks + at, self.per)
    x = self.unpark(x) + bias
    return self.times(x, attended, self.wq, number, deep, far=far)

  def park(self, x):
    """Frees the registers of the residual stream."""
    config = self.plan.config
    if config.park == 'device':
      self.parked[self.park_at] = x
    elif config.park == 'shared':
      for n, piece in enumerate(self.split(x, 32)):
        self.parked[self.first_parked + n] = piece

  def unpark(self, x):
    """The residual stream; its place is opaque, or it would not be reread."""
    plgpu, layout = self.plgpu, self.plgpu.Layout.WGMMA
    config = self.plan.config
    if config.park == 'registers':
      return x
    if config.park == 'device':
      at = tuple(lax.optimization_barrier(i) for i in self.park_at)
      return plgpu.load(self.parked.at[at], layout=layout, optimized=False)
    first = lax.optimization_barrier(self.first_parked)
    pieces = [
      plgpu.load(self.parked.at[first + n], layout=layout)
      for n in range(self.plan.columns // 32)
    ]
    return hopper.join(pieces)

  def mlp(self, x, number, two):
    """x + gelu(norm(x) W_1 + b_1) W_2 + b_2."""
    plan, config = self.plan, self.plan.config
    _, n1, n2 = plan.counts()
    group, workers = config.group, plan.all_workers
    blocks = plan.width // plan.wide
    at = self.mine * self.per
    far_norm = self.share_norm(x, 3)
    x = x + self.bias(two, 2 * blocks + plan.hidden // plan.wide + at, self.per)

    def one_group(turn, x):
      first = number + turn * group * (n1 + n2)
      buffer = 0
      if config.buffers > 1:
        buffer = lax.rem(turn, jnp.int32(2)) * (group * workers)

      def chunk(c):
        block = 2 * blocks + (turn * group + c) * workers + self.mine
        init = self.bias(two, block, 1)

        far = None
        if far_norm is not None:  # Before the first product.
          far = functools.partial(pl.when((turn == 0) & (c == 0)), far_norm)
        u = self.times(init, self.act, self.w1, first + c * n1, n1, far=far)
        u = hopper.gelu(u).astype(jnp.bfloat16)
        if config.buffers == 1 and plan.num_groups > 1:

          @pl.when((turn > 0) & (c == 0))
          def _():
            self.sync()  # All have read the group before.

        at = buffer + c * workers + self.mine
        self.hidden[at] = u
        if config.blocks > 1:
          self.plgpu.commit_smem()
          self.send(self.hidden, at, 5 + turn)

      if group == 1:
        chunk(0)
      else:
        pl.loop(0, group)(chunk)
      self.plgpu.commit_smem()
      far = self.gather(self.hidden, group, 5 + turn)
      hidden = self.hidden.at[pl.ds(buffer, group * workers)]
      first += group * n1
      return self.times(
        x, hidden, self.w2, first, group * n2, groups=group, far=far
      )

    if plan.num_groups == 1:
      return one_group(0, x)
    return lax.fori_loop(0, plan.num_groups, one_group, x)

  def run(self, read, final, live):
    """All layers, of what `read` gives.

    With `final`, the last norm's scale and shift, leaves its output in `act`;
    else returns the residual stream. Zeros from candidate `live` on.
    """
    plgpu, plan, context = self.plgpu, self.plan, self.context
    at = self.mine * self.per
    deep = plan.counts()[0]
    x = read()

    def layer(index, x):
      two = lax.rem(index, 2)
      number = index * context.per_layer
      plgpu.barrier_wait(context.bias_full.at[two])
      x = self.at_layer(index).attention(x, number, two)
      number += 2 * deep + plan.heads * context.steps
      x = self.at_layer(index).mlp(x, number, two)
      plgpu.barrier_arrive(context.bias_free.at[two])
      if not plan.config.loader:

        @pl.when(self.leads & (self.worker == 0))
        def _():
          @plgpu.warp_map
          def _(warp):
            @pl.when((warp == 0) & (index + 2 < plan.num_layers))
            def _():
              context.fetch_bias(index + 2)

      return x

    if plan.config.blocks > 1:

      @pl.when(self.worker == 0)
      def _():
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(
          functools.partial(cluster.initialize, count=plan.config.workers)
        )(context.sent.at[self.tile])

      self.sync()
    if not plan.config.loader:

      @pl.when(self.leads)
      def _():
        @plgpu.warp_map
        def _(warp):
          @pl.when(warp == 0)
          def _():
            self.fill()

    x = lax.fori_loop(0, plan.num_layers, layer, x)
    if final is None:
      if live is not None:
        x = jnp.where(self.iota(x.shape, 0) < live, x, 0.0)
    else:
      last = self.at_layer(jnp.int32(plan.num_layers))
      mean, deviation = last.statistics(x, 0)
      scale_ref, shift_ref = final
      wide = plan.wide
      for n, y in enumerate(self.split(x, wide)):
        y = (y - self.down(mean, wide)) * self.down(deviation, wide)
        scale, shift = (
          plgpu.load(ref.at[at + n], layout=self.column_layout, optimized=False)
          for ref in (scale_ref, shift_ref)
        )
        y = y * self.across(scale) + self.across(shift)
        if live is not None:
          y = jnp.where(self.iota(y.shape, 0) < live, y, 0.0)
        self.act[at + n] = y.astype(jnp.bfloat16)
    if plan.config.blocks > 1:
      self.sync()  # Shared memory goes with the block that leaves first.
    return x
