"""The candidate tower as two Hopper kernels a layer, for many candidates.

The attention is that of `history_attention`; the other kernel takes a layer
from the attention's output to the next layer's queries. There a warpgroup
computes all columns of 64 candidates: norms need nobody else, and products are
as wide as the matrix units go. Another warpgroup streams candidates and weights
through one ring of shared memory. Between the kernels candidates are in device
memory, which costs less at D = 256 than what `pallas_gpu` pays to hold the
residual stream beside an attention. NOTES.md has the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from histjax.ops import dependent
from histjax.ops.candidate_tower import hopper, reference
from histjax.types import KeyRange

ROWS = hopper.ROWS
WORKERS = 2  # Computing warpgroups of a block.
TILE = ROWS * WORKERS
MULTIPROCESSORS = 132
SLOT = 16384  # Bytes of a slot of the ring.
SHARED_MEMORY = 232_448 - 1024  # Bytes of a block, less barriers.
REGISTERS = (240, 24)  # Of a thread that computes and of one that loads.
PIECE = 32  # Columns of what is added, normalized or activated at once.
HALF = 128  # Columns of a product.
CHUNK = 128  # Hidden channels that are computed at once.


class _Kind(NamedTuple):
  """What a kernel computes.

  Attributes:
    rows: candidates of all users.
    width: D.
    hidden: F.
    head_dim: H.
    dtype: of the residual stream that it reads.
    attended: whether it ends a layer, which begins with attention's output.
    then: what follows: 'query', the next layer's, 'norm', the last one, or
      'nothing'.
  """

  rows: int
  width: int
  hidden: int
  head_dim: int
  dtype: str
  attended: bool
  then: str

  @property
  def num_tiles(self) -> int:
    return pl.cdiv(self.rows, TILE)

  @property
  def slots(self) -> int:
    """Of the ring, eight or nine: all the shared memory that is left."""
    act = 2 * TILE * self.width
    bias = 4 * (4 * self.width + self.hidden)
    return (SHARED_MEMORY - act - bias) // SLOT

  @property
  def grid(self) -> int:
    return min(self.num_tiles, MULTIPROCESSORS)


def fits(width: int, hidden: int) -> bool:
  """Whether there are kernels of this D and F, which is a multiple of D."""
  biases = (3 * width + hidden) // PIECE
  return width == 256 and biases <= 256  # Rows, as many as one copy takes.


def candidate_tower(
  plgpu: Any,
  attention: Callable[..., jax.Array],
  candidates: Float[Array, 'B C D'],
  position: Int[Array, 'B C'] | None,
  keys: Float[Array, 'layers*B L N H'],
  values: Float[Array, 'layers*B L N H'],
  key_range: KeyRange,
  weights: reference.TowerWeights,
  *,
  count: Int[Array, 'B'] | None,
  final_norm: bool,
) -> Float[Array, 'B C D']:
  """As `api.candidate_tower`, of D = 256; C and L are multiples of 8.

  Args:
    plgpu: the Mosaic GPU module.
    attention: queries `[B, C, N, H]`, keys, values, range, `[1]`, a layer's
      first row of keys, and `count` -> `[B, C, N, H]`.
    candidates: `[B, C, D]`.
    position: `[B, C]`.
    keys: of all layers and rows.
    values: likewise.
    key_range: of the candidates.
    weights: of the tower.
    count: see there.
    final_norm: see there.
  """
  num_rows, num_candidates, width = candidates.shape
  num_layers, _, hidden = weights.mlp_in.shape
  num_heads, head_dim = keys.shape[2:]
  rows = num_rows * num_candidates
  place = None
  if position is not None:  # Registers are loaded by whole tiles.
    place = jnp.pad(position.reshape(rows), (0, -rows % TILE))
  bias = weights.bias.reshape(num_layers, -1, PIECE)
  final = [
    y.reshape(-1, PIECE) for y in (weights.final_scale, weights.final_bias)
  ]

  live = None
  if count is not None:
    live = jnp.arange(num_candidates, dtype=jnp.int32)[None, :] < count[:, None]
  tiles = hopper.tiles(rows, TILE, live)

  def run(layer, x, attended, then):
    kind = _Kind(
      rows,
      width,
      hidden,
      head_dim,
      str(x.dtype),
      attended is not None,
      then,
    )
    # Under jit, layers share what is built for one of them.
    return jax.jit(_kernel(plgpu, kind))(
      jnp.full((1,), layer, jnp.int32),
      tiles,
      x,
      attended,
      place,
      weights.query,
      weights.output,
      weights.mlp_in,
      weights.mlp_out,
      bias,
      *final,
    )

  x = candidates.reshape(rows, width)
  _, y = run(0, x, None, 'query')
  for layer in range(num_layers):
    query = y.reshape(num_rows, num_candidates, num_heads, head_dim)
    first_row = jnp.full((1,), layer * num_rows, jnp.int32)
    attended = attention(query, keys, values, key_range, first_row, count)
    then = 'query'
    if layer == num_layers - 1:
      then = 'norm' if final_norm else 'nothing'
    x, y = run(layer, x, attended.reshape(rows, width), then)
  out = (y if final_norm else x[:rows]).reshape(candidates.shape)
  return out if live is None else jnp.where(live[:, :, None], out, 0)


@functools.lru_cache(maxsize=64)
def _kernel(plgpu, kind):
  """Builds the call for static shapes."""
  width = kind.width
  swizzled = functools.partial(hopper.swizzled, plgpu)
  x_out = y_out = None
  if kind.attended and kind.then != 'norm':
    x_out = jax.ShapeDtypeStruct((kind.num_tiles * TILE, width), jnp.float32)
  if kind.then != 'nothing':
    y_out = jax.ShapeDtypeStruct((kind.rows, width), jnp.bfloat16)
  num_bias = (3 * width + kind.hidden) // PIECE
  return plgpu.kernel(
    functools.partial(_body, plgpu=plgpu, kind=kind),
    out_type=(x_out, y_out),
    scratch_types=dict(
      act=swizzled((WORKERS, width // 64, ROWS, 64)),
      ring=plgpu.RefUnion(
        swizzled((kind.slots, 64, HALF)),  # Weights.
        swizzled((kind.slots, TILE, 64)),  # Candidates.
        swizzled((kind.slots, TILE, 32), jnp.float32),
      ),
      bias_smem=plgpu.SMEM((num_bias, PIECE), jnp.float32),
      query_bias_smem=plgpu.SMEM((width // PIECE, PIECE), jnp.float32),
      bias_full=plgpu.Barrier(num_arrivals=2),
      full=plgpu.Barrier(num_barriers=kind.slots),
      free=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=kind.slots),
    ),
    grid=(kind.grid,),
    grid_names=('block',),
    num_threads=WORKERS + 1,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    kernel_name=dependent.kernel_name('candidate_layer'),
  )


def _body(
  layer_ref, tiles_ref, x_ref, attended_ref, place_ref, wq_ref, wo_ref, w1_ref,
  w2_ref, bias_ref, scale_ref, shift_ref, x_out_ref, y_ref,
  *, plgpu, kind, act, ring, bias_smem, query_bias_smem, bias_full, full, free,
):  # fmt: skip
  """One block: some tiles of 128 candidates, one after the other."""
  dependent.wait(plgpu)
  block, wg = lax.axis_index('block'), lax.axis_index('wg')
  grid = jnp.int32(kind.grid)
  count = lax.div(tiles_ref[0] - 1 - block + grid, grid)

  def first_row(i):
    return tiles_ref[1 + block + i * grid] * TILE

  layer = layer_ref[0]
  of_query = layer + 1 if kind.attended and kind.then == 'query' else layer
  stream = _Stream(plgpu, kind, ring, full, free)

  @pl.when(wg < WORKERS)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action='increase')
    plgpu.barrier_wait(bias_full)

    @pl.loop(0, count)
    def _(i):
      first = first_row(i) + wg * ROWS
      worker = _Worker(
        stream,
        lax.optimization_barrier(wg),
        act,
        bias_smem,
        query_bias_smem,
      )
      worker.tile(
        i * stream.per_tile,
        pl.ds(first, ROWS),
        place_ref,
        (scale_ref, shift_ref),
        x_out_ref,
        y_ref,
      )

    if y_ref is not None:
      plgpu.wait_smem_to_gmem(0)

  @pl.when(wg == WORKERS)
  def _():
    plgpu.set_max_registers(REGISTERS[1], action='decrease')

    @plgpu.warp_map
    def _(warp):
      @pl.when(warp == 0)
      def _():
        plgpu.copy_gmem_to_smem(bias_ref.at[layer], bias_smem, bias_full)
        plgpu.copy_gmem_to_smem(
          bias_ref.at[of_query, pl.ds(0, kind.width // PIECE)],
          query_bias_smem,
          bias_full,
        )

        @pl.loop(0, count)
        def _(i):
          stream.fill(
            i * stream.per_tile,
            pl.ds(first_row(i), TILE),
            x_ref,
            attended_ref,
            wo_ref.at[layer],
            w1_ref.at[layer],
            w2_ref.at[layer],
            wq_ref.at[of_query],
          )


class _Stream:
  """The ring: what a tile needs, in the order in which it is needed.

  Slots have numbers that go on from tile to tile.
  """

  def __init__(self, plgpu, kind, ring, full, free):
    self.plgpu, self.kind = plgpu, kind
    self.weights, self.wide, narrow = ring
    self.full, self.free = full, free
    self.deep, self.halves = kind.width // 64, kind.width // HALF
    self.residual = self.wide if kind.dtype == 'bfloat16' else narrow
    self.num_x = kind.width // self.residual.shape[2]
    self.chunks = kind.hidden // CHUNK
    self.num_out = CHUNK // 64 * self.halves
    # The first slots of a tile's residual stream, MLP and W_q.
    self.x = self.deep * (1 + self.halves) if kind.attended else 0
    self.mlp = self.x + self.num_x
    self.query = self.mlp
    if kind.attended:
      self.query += self.chunks * (self.deep + self.num_out)
    self.per_tile = self.query
    if kind.then == 'query':
      self.per_tile += self.deep * self.halves

  def slot(self, number):
    return lax.rem(number, jnp.int32(self.kind.slots))

  def wait(self, number):
    """The slot, once it is full."""
    slot = self.slot(number)
    self.plgpu.barrier_wait(self.full.at[slot])
    return slot

  def release(self, number):
    """Says that this warpgroup has read the slot."""
    self.plgpu.barrier_arrive(self.free.at[self.slot(number)])

  def fill(self, number, rows, x_ref, attended_ref, wo, w1, w2, wq):
    """Starts the copies of a tile."""
    plgpu, kind, deep, halves = self.plgpu, self.kind, self.deep, self.halves

    def put(number, source, view):
      slot = self.slot(number)

      @pl.when(number >= kind.slots)
      def _():
        plgpu.barrier_wait(self.free.at[slot])

      plgpu.copy_gmem_to_smem(source, view.at[slot], self.full.at[slot])

    def put_columns(number, ref, view, k):
      size = view.shape[2]
      put(number, ref.at[rows, pl.ds(k * size, size)], view)

    def put_weights(number, ref, k, h):
      at = pl.ds(64 * k, 64), pl.ds(HALF * h, HALF)
      put(number, ref.at[at], self.weights)

    def put_output(k):
      at = number + k * (1 + halves)
      put_columns(at, attended_ref, self.wide, k)
      for h in range(halves):
        put_weights(at + 1 + h, wo, k, h)

    def put_residual(k):
      put_columns(number + self.x + k, x_ref, self.residual, k)

    def put_chunk(c):
      at = number + self.mlp + c * (deep + self.num_out)
      for k in range(deep):
        put_weights(at + k, w1, k, c)
      for k in range(self.num_out):
        row = c * (CHUNK // 64) + k // halves
        put_weights(at + deep + k, w2, row, k % halves)

    def put_query(k):
      for h in range(halves):
        put_weights(number + self.query + k * halves + h, wq, k, h)

    if kind.attended:
      pl.loop(0, deep)(put_output)
    pl.loop(0, self.num_x)(put_residual)
    if kind.attended:
      pl.loop(0, self.chunks)(put_chunk)
    if kind.then == 'query':
      pl.loop(0, deep)(put_query)


class _Worker(hopper.Warpgroup):
  """A computing warpgroup: 64 candidates of a tile.

  Slots' numbers and the warpgroup's are hidden from the compiler where they
  are used, or it would keep all addresses that follow from them.
  """

  def __init__(self, stream, wg, act, bias_smem, query_bias_smem):
    super().__init__(stream.plgpu)
    self.kind, self.stream = stream.kind, stream
    self.wg, self.all_act = wg, act
    self.bias_smem, self.query_bias_smem = bias_smem, query_bias_smem
    self.act = act.at[wg]
    self.acc = self.plgpu.ACC((ROWS, HALF), jnp.float32)

  def row(self, ref):
    """`[64, n]` with `ref`, `[n]`, in each row."""
    load = functools.partial(self.plgpu.load, layout=self.column_layout)
    return self.across(load(ref, optimized=False))

  def bias(self, ref, channel, columns):
    """`[64, columns]` from `channel` on."""
    return hopper.join(
      self.row(ref.at[(channel + i) // PIECE]) for i in range(0, columns, PIECE)
    )

  def tile(self, number, rows, place_ref, final, x_out_ref, y_ref):
    """All of the kernel, for the tile whose first slot is `number`."""
    plgpu, kind, stream = self.plgpu, self.kind, self.stream
    x = self.project(number) if kind.attended else None
    x = self.add(x, number + stream.x)
    if y_ref is not None:  # `act` is being copied.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    self.put_norm(x)
    if kind.attended:
      x = self.mlp(x, number + stream.mlp)
    if x_out_ref is not None:
      x_out_ref[rows] = x
    if kind.then == 'nothing':
      return
    if kind.attended:
      self.put_norm(x, *(final if kind.then == 'norm' else ()))
    if kind.then == 'query':
      self.put_query(number + stream.query, rows, place_ref)
    for n in range(kind.width // 64):
      plgpu.copy_smem_to_gmem(
        self.act.at[n], y_ref.at[rows, pl.ds(64 * n, 64)], commit_group=False
      )
    plgpu.commit_smem_to_gmem_group()

  def project(self, number):
    """Attention's output times W_o."""
    plgpu, stream = self.plgpu, self.stream
    number = lax.optimization_barrier(number)
    rows = pl.ds(self.wg * ROWS, ROWS)
    each = 1 + stream.halves

    def run(*accs):
      for k in range(stream.deep):
        at = number + k * each
        left = stream.wide.at[stream.wait(at), rows]
        for h, acc in enumerate(accs):
          plgpu.wgmma(acc, left, stream.weights.at[stream.wait(at + 1 + h)])
          plgpu.wgmma_wait(1)  # All but this one have been read.
          if h:
            stream.release(at + h)
          elif k:
            stream.release(at - each)
            stream.release(at - 1)
      plgpu.wgmma_wait(0)
      stream.release(at)
      stream.release(at + each - 1)
      return hopper.join(acc[...] for acc in accs)

    return pl.run_scoped(run, *[self.acc] * stream.halves)

  def add(self, x, number):
    """x + the residual stream + b_o; the stream alone without `x`."""
    plgpu, stream = self.plgpu, self.stream
    number = lax.optimization_barrier(number)
    rows = pl.ds(self.wg * ROWS, ROWS)
    size = stream.residual.shape[2]
    pieces = []
    for k in range(stream.num_x):
      at = k * size
      slot = stream.wait(number + k)
      y = plgpu.load(
        stream.residual.at[slot, rows], layout=plgpu.Layout.WGMMA
      ).astype(jnp.float32)
      if x is not None:
        y = (
          x[:, at : at + size]
          + y
          + self.bias(self.bias_smem, self.kind.width + at, size)
        )
      pieces.append(y)
      if k % 4 == 3:
        plgpu.commit_smem()  # Loads of a slot come before its next copy.
        for j in range(4):
          stream.release(number + k - j)
    return hopper.join(pieces)

  def put_norm(self, x, scale_ref=None, shift_ref=None):
    """Puts the norm of `x` into `act`."""
    width = self.kind.width
    pieces = [x[:, i : i + PIECE] for i in range(0, width, PIECE)]
    mean = lax.optimization_barrier(x.sum(axis=1) * (1 / width))
    square = 0.0
    for piece in pieces:
      gap = piece - self.down(mean, PIECE)
      square += (gap * gap).sum(axis=1)
    scale = lax.rsqrt(square * (1 / width) + reference.EPSILON)
    mean, scale = lax.optimization_barrier((mean, scale))
    done = []
    for n, piece in enumerate(pieces):
      y = (piece - self.down(mean, PIECE)) * self.down(scale, PIECE)
      if scale_ref is not None:
        y = y * self.row(scale_ref.at[n]) + self.row(shift_ref.at[n])
      done.append(y.astype(jnp.bfloat16))
      if n % 2:
        self.act[n // 2] = hopper.join(done)
        done = []
    self.plgpu.commit_smem()

  def mlp(self, x, number):
    """x + gelu(act W_1 + b_1) W_2 + b_2."""
    plgpu, stream, kind = self.plgpu, self.stream, self.kind
    width = kind.width
    deep, num_out, halves = stream.deep, stream.num_out, stream.halves
    x = [
      x[:, i : i + HALF]
      + self.bias(self.bias_smem, 2 * width + kind.hidden + i, HALF)
      for i in range(0, width, HALF)
    ]

    def loop(accs):
      @pl.loop(0, stream.chunks)
      def _(c):
        at = lax.optimization_barrier(number + c * (deep + num_out))
        act = self.all_act.at[lax.optimization_barrier(self.wg)]

        def hidden(acc):
          for k in range(deep):
            plgpu.wgmma(acc, act.at[k], stream.weights.at[stream.wait(at + k)])
            plgpu.wgmma_wait(1)
            if k:
              stream.release(at + k - 1)
            else:

              @pl.when(c > 0)  # The last product of the chunk before.
              def _():
                stream.release(at - 1)

          u = plgpu.wgmma_accumulator_load(acc, wait_n=0)
          stream.release(at + deep - 1)
          return u

        u = pl.run_scoped(hidden, plgpu.ACC((ROWS, CHUNK), jnp.float32))
        first = 2 * width // PIECE + c * (CHUNK // PIECE)
        pieces = []
        for n in range(CHUNK // PIECE):
          bias = self.row(self.bias_smem.at[first + n])
          y = u[:, PIECE * n : PIECE * (n + 1)] + bias
          pieces.append(hopper.gelu(y).astype(jnp.bfloat16))
        u = hopper.join(pieces)
        for k in range(num_out):
          j = k // halves * 64
          w = stream.weights.at[stream.wait(at + deep + k)]
          plgpu.wgmma(accs[k % halves], u[:, j : j + 64], w)
          if k:
            plgpu.wgmma_wait(1)
            stream.release(at + deep + k - 1)

    x = pl.run_state(loop)(tuple(plgpu.ACC.init(y) for y in x))
    stream.release(number + stream.chunks * (deep + num_out) - 1)
    return hopper.join(x)

  def put_query(self, number, rows, place_ref):
    """Puts act W_q + b_q, rotated, into `act`."""
    plgpu, stream, kind = self.plgpu, self.stream, self.kind
    number = lax.optimization_barrier(number)
    act = self.all_act.at[lax.optimization_barrier(self.wg)]
    place = None
    if place_ref is not None:
      place = plgpu.load(
        place_ref.at[rows], layout=self.row_layout, optimized=False
      ).astype(jnp.float32)

    def run(*accs):
      for k in range(stream.deep):
        for h, acc in enumerate(accs):
          at = number + k * stream.halves + h
          plgpu.wgmma(acc, act.at[k], stream.weights.at[stream.wait(at)])
          if k or h:
            plgpu.wgmma_wait(1)
            stream.release(at - 1)
      plgpu.wgmma_wait(0)
      stream.release(at)
      return hopper.join(acc[...] for acc in accs)

    q = pl.run_scoped(run, *[self.acc] * stream.halves)
    for n in range(0, kind.width, 64):
      turns = self.rotation(place, kind.head_dim)
      y = q[:, n : n + 64] + self.bias(self.query_bias_smem, n, 64)
      act[n // 64] = hopper.join(self.rotated(y, turns, kind.head_dim))
    plgpu.commit_smem()
