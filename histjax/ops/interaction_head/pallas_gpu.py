"""The interaction head in one Hopper kernel: Pallas Mosaic GPU, wgmma, TMA.

A tile is 64 candidates, of one user or of several, since the user's channels
are part of x0. The head's two chains of products are a warpgroup each: one is
the MLP, the other the cross layers; they share x0, in shared memory, and meet
at the logits. Each streams its weights through a ring of its own, which it
refills itself once its products have read a slot. Where there are more tiles
than multiprocessors, a block computes two of them with the same rings.
NOTES.md has the measurements.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from histjax.ops import dependent
from histjax.ops.candidate_tower import hopper
from histjax.ops.interaction_head.weights import TILE, HeadShape, HeadWeights
from histjax.ops.interaction_head.weights import blocks as blocks_of

ROWS = hopper.ROWS
MULTIPROCESSORS = 132
ALIGNMENT = 1024  # Of an array in shared memory.
SHARED_MEMORY = 232_448 - 3 * ALIGNMENT  # Bytes of a block, less barriers.
SLOT = 2 * TILE * TILE  # Bytes of a tile of weights.
MAX_TASKS = 16
MAX_MLP = 256  # Channels whose sums are in registers.
MAX_RANK = 128
COPIED_ROWS = 256  # Of an array, that one copy takes.


class _Kind(NamedTuple):
  """What a kernel computes.

  Attributes:
    shape: of the head.
    rows: candidates of all users, a multiple of 8.
    num_candidates: of a user, C.
    ragged: whether there is a count.
  """

  shape: HeadShape
  rows: int
  num_candidates: int
  ragged: bool

  @property
  def chains(self) -> int:
    """Warpgroups of a tile."""
    return 2 if self.shape.cross_layers else 1

  @property
  def tiles(self) -> int:
    """Of a block."""
    shape = self.shape
    many = pl.cdiv(self.rows, ROWS) > MULTIPROCESSORS
    # Four warpgroups have 128 registers a thread.
    narrow = max(*shape.mlp, 2 * shape.rank * (self.chains > 1)) <= 128
    fits = self.num_slots(2) >= 2 * self.chains
    return 2 if many and narrow and fits else 1

  @property
  def num_blocks(self) -> int:
    return pl.cdiv(self.rows, ROWS * self.tiles)

  @property
  def num_vectors(self) -> int:
    """Rows of the packed vectors."""
    return self.shape.vector_rows()['logits_bias'] + blocks_of(self.shape.tasks)

  @property
  def lengths(self) -> tuple[int, int]:
    """Tiles of weights of the MLP and of the cross layers."""
    return len(self.shape.mlp_tiles()), len(self.shape.cross_tiles())

  def num_slots(self, tiles: int) -> int:
    """Slots that fit beside so many tiles."""
    shape = self.shape
    copies = 1 + (shape.cross_layers > 1)
    used = 2 * tiles * ROWS * TILE * shape.deep * copies
    for size in (self.num_vectors * TILE, *[tiles * shape.tasks * ROWS] * 2):
      used += pl.cdiv(4 * size, ALIGNMENT) * ALIGNMENT
    return (SHARED_MEMORY - used) // SLOT

  @property
  def slots(self) -> tuple[int, int]:
    """Of the rings of the MLP and of the cross layers."""
    mlp, cross = self.lengths
    slots = self.num_slots(self.tiles)
    of_mlp = slots
    if cross:
      of_mlp = round(slots * mlp / (mlp + cross))
      of_mlp = min(max(of_mlp, 2), slots - 2)
    return min(of_mlp, mlp), min(slots - of_mlp, cross)


def interaction_head(
  user: Float[Array, 'B U'],
  features: Float[Array, 'B C F'],
  readout: Float[Array, 'B C D'],
  weights: HeadWeights,
  *,
  count: Int[Array, 'B'] | None = None,
) -> Float[Array, 'B C T']:
  """See `api.interaction_head`."""
  plgpu = hopper.mosaic_gpu()
  shape = weights.shape
  num_rows, num_candidates = readout.shape[:2]
  rows = num_rows * num_candidates
  copied = pl.cdiv(rows, 8) * 8  # The copy engine moves 8 rows at a time.
  kind = _Kind(shape, copied, num_candidates, count is not None)
  _check(readout, weights, kind)
  user = jnp.broadcast_to(
    user[:, None, :], (num_rows, num_candidates, shape.user)
  )
  near = jnp.concatenate([user, features], axis=-1)
  near, far = (
    jnp.pad(
      x.reshape(rows, x.shape[-1]),
      [(0, copied - rows), (0, -x.shape[-1] % TILE)],
    )
    for x in (near, readout)
  )
  out = _kernel(plgpu, kind)(near, far, weights.tiles, weights.vectors, count)
  out = out[:, :rows].reshape(shape.tasks, num_rows, num_candidates)
  return jnp.moveaxis(out, 0, 2)


def _check(readout, weights, kind):
  """Raises NotImplementedError at a call that the kernel cannot compute."""
  shape = weights.shape
  if readout.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f'pallas_gpu takes bfloat16 candidates and weights, not {readout.dtype}'
    )
  if (
    shape.readout % TILE
    or max(shape.mlp) > MAX_MLP
    or shape.rank > MAX_RANK
    or shape.tasks > MAX_TASKS
  ):
    raise NotImplementedError(
      f'pallas_gpu takes D a multiple of {TILE}, MLP layers of at most '
      f'{MAX_MLP} channels, ranks of at most {MAX_RANK} and at most '
      f'{MAX_TASKS} tasks, not D={shape.readout}, {shape.mlp}, {shape.rank} '
      f'and {shape.tasks}'
    )
  if kind.num_slots(1) < 2 * kind.chains:
    raise NotImplementedError(
      f'pallas_gpu has no room in shared memory for {shape}'
    )


@functools.lru_cache(maxsize=64)
def _kernel(plgpu, kind):
  """Builds the call for static shapes."""
  shape, tiles = kind.shape, kind.tiles
  swizzled = functools.partial(hopper.swizzled, plgpu)
  x_smem = part_full = free = None
  if shape.cross_layers > 1:
    x_smem = swizzled((tiles, shape.deep, ROWS, TILE))
  if kind.chains > 1:
    part_full = plgpu.Barrier(num_barriers=tiles)
  if tiles > 1:
    free = plgpu.Barrier(num_arrivals=tiles - 1, num_barriers=sum(kind.slots))
  logits = plgpu.SMEM((tiles, shape.tasks, ROWS), jnp.float32)
  return plgpu.kernel(
    functools.partial(_body, plgpu=plgpu, kind=kind),
    out_type=jax.ShapeDtypeStruct(
      (shape.tasks, kind.num_blocks * tiles * ROWS), jnp.float32
    ),
    scratch_types=dict(
      x0_smem=swizzled((tiles, shape.deep, ROWS, TILE)),
      x_smem=x_smem,
      ring=swizzled((sum(kind.slots), TILE, TILE)),
      vectors_smem=plgpu.SMEM((kind.num_vectors, TILE), jnp.float32),
      part_smem=logits,
      out_smem=logits,
      x0_full=plgpu.Barrier(num_barriers=tiles * shape.deep),
      full=plgpu.Barrier(num_barriers=sum(kind.slots)),
      free=free,
      vectors_full=plgpu.Barrier(
        num_arrivals=pl.cdiv(kind.num_vectors, COPIED_ROWS)
      ),
      part_full=part_full,
    ),
    grid=(kind.num_blocks,),
    grid_names=('block',),
    num_threads=tiles * kind.chains,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    kernel_name=dependent.kernel_name('interaction_head'),
  )


def _body(
  near_ref, far_ref, tiles_ref, vectors_ref, count_ref, out_ref,
  *, plgpu, kind, out_smem, **scratch,
):  # fmt: skip
  """One block: a warpgroup for each chain of each tile."""
  dependent.wait(plgpu)
  shape = kind.shape
  block, wg = lax.axis_index('block'), lax.axis_index('wg')
  live = _live(kind, count_ref, block * ROWS * kind.tiles)

  tile = lax.div(wg, jnp.int32(kind.chains))
  first = (block * kind.tiles + tile) * ROWS
  last = lax.rem(wg, jnp.int32(kind.chains)) == 0
  make = functools.partial(
    _Chain, plgpu, kind, tile, tiles_ref, vectors_ref, **scratch
  )

  def fetch_x0(chain):
    for k in range(shape.deep):
      ref, at = (near_ref, k) if k < shape.near else (far_ref, k - shape.near)
      plgpu.copy_gmem_to_smem(
        ref.at[pl.ds(first, ROWS), pl.ds(at * TILE, TILE)],
        chain.x0_smem.at[k],
        chain.x0_full.at[chain.first_x0 + k],
      )

  def fetch_vectors():
    for row in range(0, kind.num_vectors, COPIED_ROWS):
      rows = pl.ds(row, min(COPIED_ROWS, kind.num_vectors - row))
      plgpu.copy_gmem_to_smem(
        vectors_ref.at[rows],
        scratch['vectors_smem'].at[rows],
        scratch['vectors_full'],
      )

  def write(logits):
    """Copies `[64]` of each task to where they belong."""
    out = out_smem.at[tile]
    for task, logit in enumerate(logits):
      out.at[task][...] = logit
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, out_ref.at[:, pl.ds(first, ROWS)])
    plgpu.wait_smem_to_gmem(0)

  @pl.when(live & last)
  def _():
    chain = make(of_mlp=not shape.cross_layers)
    chain.begin(1)
    fetch_x0(chain)
    if not shape.cross_layers:
      pl.when(tile == 0)(fetch_vectors)
    chain.begin(None)
    write(chain.cross() if shape.cross_layers else chain.mlp())

  if shape.cross_layers:

    @pl.when(live & jnp.logical_not(last))
    def _():
      chain = make(of_mlp=True)
      chain.begin(None)
      pl.when(tile == 0)(fetch_vectors)
      chain.share(chain.mlp())

  if live is True:
    return

  @pl.when(jnp.logical_not(live) & last)
  def _():
    zero = jnp.zeros((ROWS,), jnp.float32)
    zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA.reduce(1))
    write([zero] * shape.tasks)


def _live(kind, count_ref, first):
  """Whether a block has candidates that count, of two users at most."""
  rows = ROWS * kind.tiles
  if not kind.ragged or kind.num_candidates < rows:
    return True
  size = jnp.int32(kind.num_candidates)
  user = jnp.minimum(lax.div(first, size), count_ref.shape[0] - 1)
  following = jnp.minimum(user + 1, count_ref.shape[0] - 1)
  here = count_ref[user] > first - user * size
  reaches = first + rows > following * size
  return here | (reaches & (following > user) & (count_ref[following] > 0))


class _Chain(hopper.Warpgroup):
  """A warpgroup: one of the chains of products, of a tile."""

  def __init__(
    self, plgpu, kind, tile, tiles_ref, vectors_ref, *, of_mlp, x0_smem, x_smem,
    ring, vectors_smem, part_smem, x0_full, full, free, vectors_full, part_full,
  ):  # fmt: skip
    super().__init__(plgpu)
    self.kind, self.shape, self.tile = kind, kind.shape, tile
    self.rows_of = kind.shape.vector_rows()
    self.tiles_ref, self.vectors_ref = tiles_ref, vectors_ref
    self.x0_smem = x0_smem.at[tile]
    self.x_smem: Any = None if x_smem is None else x_smem.at[tile]
    self.ring, self.vectors_smem = ring, vectors_smem
    self.part_smem = part_smem.at[tile]
    self.x0_full, self.full, self.free = x0_full, full, free
    self.vectors_full = vectors_full
    self.part_full = None if part_full is None else part_full.at[tile]
    # This chain's tiles of weights and slots: where they begin, how many.
    self.first_weight = 0 if of_mlp else kind.lengths[0]
    self.length = kind.lengths[0 if of_mlp else 1]
    self.first_slot = 0 if of_mlp else kind.slots[0]
    self.slots = kind.slots[0 if of_mlp else 1]
    self.first_x0, self.begun = tile * self.shape.deep, 0

  # The ring. Tiles of weights have numbers, in the order of their use.

  def slot(self, number):
    if not isinstance(number, int):
      return self.first_slot + lax.rem(number, jnp.int32(self.slots))
    return self.first_slot + number % self.slots

  def fetch(self, number):
    slot = self.slot(number)
    self.plgpu.copy_gmem_to_smem(
      self.tiles_ref.at[self.first_weight + number],
      self.ring.at[slot],
      self.full.at[slot],
    )

  def begin(self, at_most):
    """Fills the ring, or so many slots of it. The first tile does."""
    to = self.slots if at_most is None else at_most

    @pl.when(self.tile == 0)
    def _():
      for number in range(self.begun, to):
        self.fetch(number)

    self.begun = to

  def refill(self, number):
    """What is done once this tile's warpgroup has read `number`."""
    slot = self.slot(number)

    @pl.when((number >= 0) & (number + self.slots < self.length))
    def _():
      if self.free is None:
        self.fetch(number + self.slots)
        return

      @pl.when(self.tile == 0)
      def _():
        self.plgpu.barrier_wait(self.free.at[slot])
        self.fetch(number + self.slots)

      @pl.when(self.tile > 0)
      def _():
        self.plgpu.barrier_arrive(self.free.at[slot])

  def multiply(self, acc, left, number):
    """Begins `acc += left w`, `w` being tile `number`."""
    slot = self.slot(number)
    self.plgpu.barrier_wait(self.full.at[slot])
    self.plgpu.wgmma(acc, left, self.ring.at[slot])
    if self.slots < self.length:
      self.plgpu.wgmma_wait(1)
      self.refill(number - 1)

  def product(self, left, columns, number):
    """`[64, 64]` each: so many blocks of columns of a product.

    Args:
      left: blocks of columns in registers; None: x0.
      columns: how many.
      number: of the first tile of weights.
    """

    def run(*accs):
      def step(k, x):
        for n, acc in enumerate(accs):
          self.multiply(acc, x, number + k * columns + n)

      if left is None:

        @pl.loop(0, self.shape.deep)
        def _(k):
          self.plgpu.barrier_wait(self.x0_full.at[self.first_x0 + k])
          step(k, self.x0_smem.at[k])

      else:
        for k, x in enumerate(left):
          step(k, x)
      self.plgpu.wgmma_wait(0)
      return [acc[...] for acc in accs]

    return pl.run_scoped(run, *[self.acc()] * columns)

  def acc(self):
    return self.plgpu.ACC((ROWS, TILE), jnp.float32)

  # What is in shared memory.

  def vector(self, name, block):
    """`[64, 64]` with a block of a vector in each row."""
    ref = self.vectors_smem.at[self.rows_of[name] + block]
    return self.across(
      self.plgpu.load(ref, layout=self.column_layout, optimized=False)
    )

  def load(self, ref):
    """`[64, 64]`, float32."""
    x = self.plgpu.load(ref, layout=self.plgpu.Layout.WGMMA)
    return x.astype(jnp.float32)

  def logits(self, x, name, block):
    """What a block of channels adds to the logits, `[64]` a task."""
    return [
      (x * self.vector(f'{name}_{task}', block)).sum(axis=1)
      for task in range(self.shape.tasks)
    ]

  # The chains.

  def mlp(self):
    """The MLP's part of the logits, or all of them."""
    layers, left, number = self.shape.mlp, None, 0
    logits: list[Any] = []
    for i, width in enumerate(layers):
      wide, hidden = blocks_of(width), []
      products = self.product(left, wide, number)
      number += wide * (self.shape.deep if left is None else len(left))
      if not i:
        self.plgpu.barrier_wait(self.vectors_full)
      for n, u in enumerate(products):
        y = jnp.maximum(u + self.vector(f'mlp_{i}', n), 0.0)
        if i + 1 < len(layers):
          hidden.append(y.astype(jnp.bfloat16))
        else:
          logits.append(self.logits(y, 'logits_mlp', n))
      left = hidden
    sums = [
      functools.reduce(operator.add, x) for x in zip(*logits, strict=True)
    ]
    return sums if self.shape.cross_layers else self.biased(sums)

  def cross(self):
    """The logits; waits for the MLP's part."""
    shape, plgpu = self.shape, self.plgpu
    wide = blocks_of(shape.rank)
    low = self.product(None, wide, 0)
    low = [y.astype(jnp.bfloat16) for y in low]
    plgpu.barrier_wait(self.vectors_full)
    number = shape.deep * wide
    for i in range(shape.cross_layers - 1):
      low = self.cross_layer(low, i, number)
      number += 2 * wide * shape.deep

    def step(block, logits):
      x = self.crossed(
        low, shape.cross_layers - 1, block, number + block * wide
      )
      more = self.logits(x, 'logits_x', block)
      return [a + b for a, b in zip(logits, more, strict=True)]

    zero = jnp.zeros((ROWS,), jnp.float32)
    zero = plgpu.layout_cast(zero, self.row_layout)
    logits = lax.fori_loop(0, shape.deep, step, [zero] * shape.tasks)
    plgpu.barrier_wait(self.part_full)
    parts = [
      plgpu.load(
        self.part_smem.at[task], layout=self.row_layout, optimized=False
      )
      for task in range(shape.tasks)
    ]
    return self.biased(a + b for a, b in zip(logits, parts, strict=True))

  def cross_layer(self, low, i, number):
    """Puts x after cross layer `i` into memory; returns the next `V x`."""
    wide = len(low)

    def run(*accs):
      @pl.loop(0, self.shape.deep)
      def _(block):
        at = number + block * 2 * wide
        x = self.crossed(low, i, block, at)
        if i:  # All have loaded before anybody stores.
          self.plgpu.commit_smem()
        self.x_smem.at[block][...] = x.astype(jnp.bfloat16)
        self.plgpu.commit_smem()
        for n, acc in enumerate(accs):
          self.multiply(acc, self.x_smem.at[block], at + wide + n)

      self.plgpu.wgmma_wait(0)
      return [acc[...].astype(jnp.bfloat16) for acc in accs]

    return pl.run_scoped(run, *[self.acc()] * wide)

  def crossed(self, low, i, block, number):
    """A block of x after cross layer `i`, float32."""
    (up,) = self.product(low, 1, number)
    x0 = self.load(self.x0_smem.at[block])
    x = self.load(self.x_smem.at[block]) if i else x0
    return x0 * (up + self.vector(f'up_{i}', block)) + x

  def biased(self, logits):
    row = self.rows_of['logits_bias']
    return [
      logit + self.vectors_ref[row, task] for task, logit in enumerate(logits)
    ]

  def share(self, logits):
    """Gives the other chain this one's part of the logits."""
    for task, logit in enumerate(logits):
      self.part_smem.at[task][...] = logit
    self.plgpu.commit_smem()
    self.plgpu.barrier_arrive(self.part_full)
