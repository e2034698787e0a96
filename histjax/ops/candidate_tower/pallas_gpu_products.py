"""The candidate tower as Hopper kernels of one product each, for D >= 512.

A layer is the attention of `history_attention` and three products, of which
each finishes what belongs to it while its sums are in registers:

    query      rotated(norm(x) W_q + b_q)
    residual   x + attended W_o + b_o, and the moments of its rows
    hidden     gelu(norm(x) W_1 + b_1)
    residual   x + hidden W_2 + b_2, likewise

What reads a history also computes, of each layer,

    keys_values  rotated(norm(x) W_k + b_k) and norm(x) W_v + b_v

At this width neither a row of sums nor a layer's weights fit a multiprocessor,
and what passes between kernels stays in L2. A norm costs no pass over x: with
the moments m and v of a row, `norm(x) W = (x W - m sum(W)) / sqrt(v)`, where
`sum` is over W's rows. Between kernels x is bfloat16, as between the layers of
`nn.encoder`; so that it is as good a factor as its norm, each layer subtracts
the mean before from it, which no norm can see.

A block has two computing warpgroups of 64 candidates by 256 columns and one
that streams factors. At D = 512, 'hidden' has four of 64 by 128: while two
multiply the others finish what they have. NOTES.md has the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import run_state
from jaxtyping import Array, Float, Int

from histjax.ops import dependent
from histjax.ops.candidate_tower import hopper, reference
from histjax.types import KeyRange, Paged

ROWS = hopper.ROWS
WORKERS = 2  # Computing warpgroups of a block.
TILE = ROWS * WORKERS  # Candidates of a block.
COLUMNS = 256  # Of a product.
STEP = 64  # Rows of the weights in a slot of the ring.
SLOTS = 4
MULTIPROCESSORS = 132
# Of a thread that computes and of one that loads, by the computing warpgroups.
REGISTERS = {2: (240, 24), 4: (112, 32)}
PIECE = 64  # Columns that are finished at once.
MOST_COPIED = 256  # Numbers that the copy engine moves at once.
FEW = 512  # Tiles, of which one warpgroup finds those that count.
CHUNK = 128  # Columns of hidden channels that two warpgroups compute at once.
STRIP = 32  # Columns of it that are finished at once.


class _Kind(NamedTuple):
  """What a kernel computes.

  Attributes:
    then: what is done with the product; see the module.
    rows: candidates of all users.
    width: D.
    depth: rows of the weights.
    columns: of the weights.
    head_dim: H.
    bias: where the product's bias begins.
    sums: where the sums of the weights' rows begin.
    num_pages: of a layer's pool that is written; 0: there is none.
    page: events of a page.
  """

  then: Literal['query', 'hidden', 'residual', 'keys_values']
  rows: int
  width: int
  depth: int
  columns: int
  head_dim: int
  bias: int
  sums: int
  num_pages: int = 0
  page: int = 0

  @property
  def num_tiles(self) -> int:
    """Of the candidates."""
    return pl.cdiv(self.rows, TILE)

  @property
  def resident(self) -> bool:
    """Whether the candidates of a tile stay in shared memory."""
    return self.then == 'hidden' and self.width == 512

  @property
  def workers(self) -> int:
    """Computing warpgroups of a block."""
    return 2 * WORKERS if self.resident else WORKERS

  @property
  def span(self) -> int:
    """Columns of a tile: those with which the last block ends first."""
    if not self.resident:
      return COLUMNS
    # What begins and ends a tile takes as long as some columns.
    return min(
      (n for n in (1024, 512, 256) if not self.columns % n),
      key=lambda n: (
        pl.cdiv(self.num_tiles * self.columns // n, MULTIPROCESSORS) * (n + 96)
      ),
    )

  @property
  def parts(self) -> int:
    """Tiles of columns."""
    return self.columns // self.span

  @property
  def grid(self) -> int:
    return min(self.num_tiles * self.parts, MULTIPROCESSORS)


class _Stream(NamedTuple):
  """A residual stream.

  Attributes:
    rows: bfloat16 `[rows, D]`.
    moments: float32 `[parts, 2, rows]`, padded: the mean and the sum of squared
      deviations over each 256 columns.
  """

  rows: Any
  moments: Any


def fits(width: int, hidden: int, head_dim: int) -> bool:
  """Whether there are kernels of these sizes."""
  return (
    width >= hopper.WIDE
    and not width % COLUMNS
    and not hidden % COLUMNS
    and head_dim in (64, 128)
  )


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
  layer: int | None,
  final_norm: bool,
  pages: Int[Array, 'B P'] | None,
  of_layer: int,
) -> Float[Array, 'B C D']:
  """As `pallas_gpu_layers.candidate_tower`, of sizes that fit.

  Of one layer, if it is not None; keys and values, of which a layer has
  `of_layer`, may be those of all. With `pages` they are pages, and row b has
  the pages `pages[b]` of each layer.
  """
  num_layers = len(weights.query)
  of_all = keys.shape[0] == num_layers * of_layer
  run = _Layers(plgpu, candidates.shape, keys.shape[2:], position, count)
  sums = reference.sums_of(weights)
  x, mean = _begin(plgpu, candidates.reshape(run.rows, -1))
  for i in range(num_layers) if layer is None else (layer,):
    first_row = jnp.full((1,), i * of_layer if of_all else 0, jnp.int32)

    def attend(query, first_row=first_row):
      return attention(query, keys, values, key_range, first_row, count, pages)

    x, taken = run.layer(i, x, weights, sums, attend)
    mean += taken
  if final_norm and not candidates.shape[1] % ROWS:
    return _norm(plgpu, candidates.shape, count is not None)(
      *x, weights.final_scale, weights.final_bias, count
    ).reshape(candidates.shape)
  out = _end(x, mean, weights, final_norm).reshape(candidates.shape)
  if count is None:
    return out
  index = jnp.arange(candidates.shape[1], dtype=jnp.int32)
  return jnp.where((index[None, :] < count[:, None])[:, :, None], out, 0)


def read_histories(
  plgpu: Any,
  attention: Callable[..., jax.Array],
  events: Float[Array, 'B L D'],
  key_range: KeyRange,
  weights: reference.TowerWeights,
  matrix: Float[Array, 'layers D 2*D'],
  bias: Float[Array, 'layers 2*D'],
  key_sums: Float[Array, 'layers 2*D'],
  *,
  num_heads: int,
  rotate: bool,
  count: Int[Array, 'B'] | None,
  cache: tuple[Paged, Paged] | None,
) -> tuple[Any, Any]:
  """As `ops.read_histories`, of sizes that fit; L is a multiple of 8."""
  num_rows, num_events, width = events.shape
  num_layers, heads = len(matrix), (num_heads, width // num_heads)
  position = _slots(num_rows, num_events) if rotate else None
  run = _Layers(plgpu, events.shape, heads, position, count)
  sums, pages = reference.sums_of(weights), None
  x, _ = _begin(plgpu, events.reshape(run.rows, width))
  if cache is None:
    shape = (num_layers, num_rows, num_events, *heads)
    arrays = tuple(lax.empty(shape, jnp.bfloat16) for _ in range(2))
  else:
    arrays = tuple(y.pool for y in cache)
    pages = hopper.no_slices(cache[0].index)
  for i in range(num_layers):
    arrays = run.keys_values(i, x, matrix, bias, key_sums, arrays, pages)
    if i + 1 == num_layers:  # Nothing reads its events.
      break
    first_row = jnp.full((1,), i * arrays[0].shape[1], jnp.int32)
    keys, values = (y.reshape(-1, *y.shape[2:]) for y in arrays)

    def attend(query, keys=keys, values=values, first_row=first_row):
      # Events that do not count are queries, too: what is computed of the
      # others' tiles is to be finite.
      return attention(query, keys, values, key_range, first_row, None, pages)

    x, _ = run.layer(i, x, weights, sums, attend)
  if cache is None:
    return arrays
  keys, values = (
    y.replace(pool=pool) for y, pool in zip(cache, arrays, strict=True)
  )
  return keys, values


def keys_values(
  plgpu: Any,
  events: Float[Array, 'B E D'],
  keys: Float[Array, 'layers B L N H'],
  values: Float[Array, 'layers B L N H'],
  matrix: Float[Array, 'layers D 2*D'],
  bias: Float[Array, 'layers 2*D'],
  sums: Float[Array, 'layers 2*D'],
  *,
  layer: int,
  rotate: bool,
) -> tuple[Float[Array, 'layers B L N H'], Float[Array, 'layers B L N H']]:
  """As `ops.keys_values` without a start, of sizes that fit; E is at least L.

  All slots are computed: what means nothing is as finite as its event.
  """
  _, num_rows, capacity, *heads = keys.shape
  position = _slots(num_rows, capacity) if rotate else None
  shape = (num_rows, capacity, events.shape[2])
  run = _Layers(plgpu, shape, tuple(heads), position, None)
  x, _ = _begin(plgpu, events[:, :capacity].reshape(run.rows, -1))
  return run.keys_values(layer, x, matrix, bias, sums, (keys, values), None)


def _slots(num_rows, capacity):
  event = jnp.arange(capacity, dtype=jnp.int32)
  return jnp.broadcast_to(event, (num_rows, capacity))


class _Layers:
  """Runs the kernels of layers over the candidates, or events, of all users."""

  def __init__(self, plgpu, shape, heads, position, count):
    """Of `[B, C, D]`, (N, H), positions `[B, C]`, and how many count, `[B]`."""
    self.plgpu, self.heads = plgpu, heads
    self.users, self.width = shape[:2], shape[2]
    self.rows = shape[0] * shape[1]
    self.tiles = _tiles(plgpu, self.users, count)
    self.place = None
    if position is not None:  # Registers are loaded by whole tiles.
      after = -self.rows % TILE
      self.place = jnp.pad(position.reshape(self.rows), (0, after))

  def layer(self, i, x, weights, sums, attend):
    """The stream after layer `i`, and what was taken off its rows.

    Args:
      i: the layer.
      x: the stream before it.
      weights: of all layers.
      sums: `weights.sums`.
      attend: queries `[B, C, N, H]` -> what they read.
    """
    width, hidden = weights.mlp_in.shape[1:]
    run = functools.partial(self._run, layer=i, vector=weights.bias)
    query = run('query', x.rows, weights.query, x, 0, sums=sums)[0]
    attended = attend(query.reshape(*self.users, *self.heads))
    attended = attended.reshape(self.rows, width)
    mean = self._mean(x)
    x = _Stream(*run('residual', attended, weights.output, x, width)[1:])
    u = run('hidden', x.rows, weights.mlp_in, x, 2 * width, sums=sums)[0]
    mean += self._mean(x)
    at = 2 * width + hidden
    x = _Stream(*run('residual', u, weights.mlp_out, x, at)[1:])
    return x, mean

  def keys_values(self, layer, x, matrix, bias, sums, cache, pages):
    """The keys and values `[layers, B, L, N, H]` with those of a layer.

    Of whole tiles that do not count they are zeros. With `pages`, of which all
    are read where they are, they are pools.
    """
    shape = cache[0].shape
    operands = (x.rows, matrix, bias, sums, pages)
    rows, matrix, bias, sums, pages = hopper.no_slices(operands)

    def write(caches):
      self._run(
        'keys_values', rows, matrix, x, 0, layer, bias, sums, caches, pages
      )

    # Both are results and operands of the call, in one place.
    flat = (shape[0], self.rows, self.width)
    if pages is not None:
      flat = (*shape[:3], self.width)
    cache = run_state(write)(tuple(y.reshape(flat) for y in cache))
    return tuple(y.reshape(shape) for y in cache)

  def _run(
    self, then, left, right, x, bias, layer, vector, sums=None, caches=(),
    pages=None,
  ):  # fmt: skip
    """A kernel's results; `vector` holds its bias, from `bias` on."""
    depth, columns = right.shape[1:]
    of = (0, 0)
    if pages is not None:
      of = caches[0].shape[1:3]
      pages = jnp.pad(pages.reshape(-1), (0, -pages.size % (TILE // of[1])))
    stream = x.rows if then == 'residual' else None
    kind = _Kind(
      then,
      self.rows,
      self.width,
      depth,
      columns,
      self.heads[1],
      bias,
      self.width if then == 'hidden' else 0,
      *of,
    )
    kernel = _kernel(self.plgpu, kind)
    if then != 'keys_values':
      kernel = jax.jit(kernel)  # Layers share what is built for one of them.
    return kernel(
      jnp.full((1,), layer, jnp.int32),
      self.tiles,
      left,
      right,
      vector,
      sums,
      x.moments,
      self.place if then in ('query', 'keys_values') else None,
      pages,
      *(caches or (None, None)),
      stream,
    )

  def _mean(self, x):
    return x.moments[:, 0, : self.rows].mean(axis=0)


def _begin(plgpu, x):
  """The stream of `x`, `[rows, D]`, and what was taken off its rows."""
  rows, width = x.shape
  if x.dtype == jnp.bfloat16:
    moments = _moments(plgpu, rows, width)(x)
    return _Stream(x, moments), jnp.zeros((rows,), jnp.float32)
  mean = x.mean(axis=1)
  x = x - mean[:, None]
  rounded = x.astype(jnp.bfloat16)
  # Both moments in one pass, about a value that is among the others.
  x = x.reshape(rows, width // COLUMNS, COLUMNS)
  pivot = x[:, :, :1]
  gap = x - pivot
  means = gap.mean(axis=2)
  squares = jnp.square(gap).sum(axis=2) - COLUMNS * jnp.square(means)
  moments = jnp.stack([(means + pivot[:, :, 0]).T, squares.T], axis=1)
  moments = jnp.pad(moments, [(0, 0), (0, 0), (0, -rows % TILE)])
  return _Stream(rounded, moments), mean


def _end(x: _Stream, mean, weights, final_norm):
  """The last norm, or the residual stream with `mean` put back."""
  rows, width = x.rows.shape
  y = x.rows.astype(jnp.float32)
  if not final_norm:
    return y + mean[:, None]
  means, squares = x.moments[:, 0, :rows], x.moments[:, 1, :rows]
  mean = means.mean(axis=0)
  squares = squares + COLUMNS * jnp.square(means - mean[None])
  scale = lax.rsqrt(squares.sum(axis=0) * (1 / width) + reference.EPSILON)
  y = (y - mean[:, None]) * scale[:, None] * weights.final_scale[None]
  return (y + weights.final_bias[None]).astype(jnp.bfloat16)


def _tiles(plgpu, users, count):
  """As `hopper.tiles`, of candidates that count."""
  rows = users[0] * users[1]
  if count is None:
    return hopper.tiles(rows, TILE, None)
  if pl.cdiv(rows, TILE) <= FEW:
    # A warpgroup copies 128 bytes or more.
    count = jnp.pad(jnp.maximum(count, 0), (0, -users[0] % 32))
    return _tiles_kernel(plgpu, users)(count)
  index = jnp.arange(users[1], dtype=jnp.int32)
  return hopper.tiles(rows, TILE, index[None, :] < count[:, None])


@functools.lru_cache(maxsize=64)
def _tiles_kernel(plgpu, users):
  """The kernel of `_tiles` with a count; XLA would launch three."""
  num_rows, num_candidates = users
  rows = num_rows * num_candidates
  number = pl.cdiv(rows, TILE)

  def body(count_ref, out_ref, *, count_smem, ready):
    dependent.wait(plgpu)
    size = count_smem.shape[0]
    for i in range(0, size, MOST_COPIED):
      some = pl.ds(i, min(MOST_COPIED, size - i))
      plgpu.copy_gmem_to_smem(count_ref.at[some], count_smem.at[some], ready)
    plgpu.barrier_wait(ready)

    def of_tile(i, alive):
      first = i * TILE
      last = jnp.minimum(first + TILE, rows) - 1

      def of_row(b, some):
        begin = jnp.maximum(first - b * num_candidates, 0)
        return some | (begin < count_smem[b])

      some = lax.fori_loop(
        lax.div(first, num_candidates),
        lax.div(last, num_candidates) + 1,
        of_row,
        False,
      )
      # Those without live candidates come last, in any order.
      out_ref[1 + jnp.where(some, alive, number - 1 - (i - alive))] = i
      return alive + some.astype(jnp.int32)

    out_ref[0] = lax.fori_loop(0, number, of_tile, 0)

  size = num_rows + -num_rows % 32
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((1 + number,), jnp.int32),
    scratch_types=dict(
      count_smem=plgpu.SMEM((size,), jnp.int32),
      ready=plgpu.Barrier(num_arrivals=pl.cdiv(size, MOST_COPIED)),
    ),
    **_of_one_warpgroup(plgpu, 1, 'candidate_tiles'),
  )


def _of_one_warpgroup(plgpu, grid, name):
  """What small kernels have in common."""
  return dict(
    grid=(grid,),
    grid_names=('block',),
    num_threads=1,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    kernel_name=dependent.kernel_name(name),
  )


@functools.lru_cache(maxsize=64)
def _norm(plgpu, shape, counted):
  """The kernel of the last norm of a stream; zeros beyond the count.

  C is a multiple of 64.
  """
  num_rows, num_candidates, width = shape
  rows, parts = num_rows * num_candidates, width // COLUMNS
  pieces = COLUMNS // PIECE

  def body(
    x_ref, moments_ref, scale_ref, shift_ref, count_ref, out_ref,
    *, x_smem, ready,
  ):  # fmt: skip
    dependent.wait(plgpu)
    block = lax.axis_index('block')
    tile, part = lax.div(block, parts), lax.rem(block, parts)
    first = tile * ROWS
    mine = pl.ds(first, ROWS)

    def columns(n):
      return pl.ds(part * COLUMNS + n * PIECE, PIECE)

    for n in range(pieces):
      plgpu.copy_gmem_to_smem(x_ref.at[mine, columns(n)], x_smem.at[n], ready)
    worker = hopper.Warpgroup(plgpu)
    mean, scale = _norm_of(worker, moments_ref, first, width)
    if counted:
      row = lax.div(first, num_candidates)
      live = count_ref[row] - (first - row * num_candidates)
      index = plgpu.broadcasted_iota(
        jnp.int32, (ROWS,), 0, layout=worker.row_layout
      )
      # Also of what is not finite.
      live = worker.down(index, PIECE) < live
    plgpu.barrier_wait(ready)
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA)
    vector = functools.partial(
      plgpu.load, layout=worker.column_layout, optimized=False
    )
    for n in range(pieces):
      y = load(x_smem.at[n]).astype(jnp.float32)
      y = (y - worker.down(mean, PIECE)) * worker.down(scale, PIECE)
      y = y * worker.across(vector(scale_ref.at[columns(n)]))
      y = y + worker.across(vector(shift_ref.at[columns(n)]))
      if counted:
        y = jnp.where(live, y, 0.0)
      plgpu.commit_smem()  # All have loaded before anybody stores.
      x_smem.at[n][...] = y.astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(x_smem.at[n], out_ref.at[mine, columns(n)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
    scratch_types=dict(
      x_smem=hopper.swizzled(plgpu, (pieces, ROWS, PIECE)),
      ready=plgpu.Barrier(num_arrivals=pieces),
    ),
    **_of_one_warpgroup(plgpu, rows // ROWS * parts, 'candidate_norm'),
  )


def _norm_of(worker, moments_ref, first, width):
  """The means of 64 candidates and one over their deviations."""
  load = functools.partial(
    worker.plgpu.load, layout=worker.row_layout, optimized=False
  )
  rows, parts = pl.ds(first, ROWS), range(width // COLUMNS)
  means = [load(moments_ref.at[p, 0, rows]) for p in parts]
  mean = sum(means[1:], means[0]) * (COLUMNS / width)
  square = 0.0
  for p in parts:
    gap = means[p] - mean
    square += load(moments_ref.at[p, 1, rows]) + COLUMNS * (gap * gap)
  return mean, lax.rsqrt(square * (1 / width) + reference.EPSILON)


@functools.lru_cache(maxsize=64)
def _moments(plgpu, rows, width):
  """The kernel of `_Stream.moments` of `[rows, D]` bfloat16."""
  parts = width // COLUMNS
  tiles = pl.cdiv(rows, TILE) * TILE // ROWS

  def body(x_ref, out_ref, *, x_smem, out_smem, ready):
    dependent.wait(plgpu)
    block = lax.axis_index('block')
    tile, part = lax.div(block, parts), lax.rem(block, parts)
    mine = pl.ds(tile * ROWS, ROWS)
    for n in range(COLUMNS // PIECE):
      columns = pl.ds(part * COLUMNS + n * PIECE, PIECE)
      plgpu.copy_gmem_to_smem(x_ref.at[mine, columns], x_smem.at[n], ready)
    plgpu.barrier_wait(ready)
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA)
    pieces = [
      load(x_smem.at[n]).astype(jnp.float32) for n in range(COLUMNS // PIECE)
    ]
    moments = _row_moments(pieces)
    _put_moments(plgpu, moments, out_smem, out_ref.at[part, :, mine])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((parts, 2, tiles * ROWS), jnp.float32),
    scratch_types=dict(
      x_smem=hopper.swizzled(plgpu, (COLUMNS // PIECE, ROWS, PIECE)),
      out_smem=plgpu.SMEM((2, ROWS), jnp.float32),
      ready=plgpu.Barrier(num_arrivals=COLUMNS // PIECE),
    ),
    **_of_one_warpgroup(plgpu, tiles * parts, 'candidate_moments'),
  )


def _row_moments(pieces):
  """The moments of rows, each `[64]`, given some columns of them each."""
  mean = sum(piece.sum(axis=1) for piece in pieces) * (1 / COLUMNS)
  square = 0.0
  for piece in pieces:
    gap = piece - lax.broadcast_in_dim(mean, piece.shape, (0,))
    square += (gap * gap).sum(axis=1)
  return mean, square


def _put_moments(plgpu, moments, smem, ref):
  """Starts their copy."""
  for i, x in enumerate(moments):
    smem.at[i][...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, ref)


@functools.lru_cache(maxsize=64)
def _kernel(plgpu, kind):
  """Builds the call for static shapes."""
  swizzled = functools.partial(hopper.swizzled, plgpu)
  bf16, f32 = jnp.bfloat16, jnp.float32
  out: tuple[Any, ...] = (
    jax.ShapeDtypeStruct((kind.rows, kind.columns), bf16),
    *[None] * 2,
  )
  residual = kind.then == 'residual'
  if kind.then == 'keys_values':  # Which it is given.
    out = ()
  if residual:
    stream = jax.ShapeDtypeStruct((kind.rows, kind.width), bf16)
    moments = (kind.parts, 2, kind.num_tiles * TILE)
    out = (None, stream, jax.ShapeDtypeStruct(moments, f32))
  if kind.resident:
    memory = dict(
      left=swizzled((kind.width // STEP, TILE, STEP)),
      right=swizzled((SLOTS, STEP, CHUNK)),
      out_smem=swizzled((kind.workers, ROWS, STRIP), columns=STRIP),
      left_full=plgpu.Barrier(num_barriers=kind.width // STEP),
      left_free=plgpu.Barrier(num_arrivals=kind.workers),
    )
  else:
    memory = dict(
      left=swizzled((SLOTS, TILE, STEP)),
      right=plgpu.RefUnion(
        swizzled((SLOTS, STEP, COLUMNS)),  # Weights.
        swizzled((SLOTS, 2, TILE, PIECE)),  # Of the residual stream.
      ),
      out_smem=None if residual else swizzled((WORKERS, 2, ROWS, PIECE)),
      left_full=None,
      left_free=None,
    )
  return plgpu.kernel(
    functools.partial(_body, plgpu=plgpu, kind=kind),
    out_type=out,
    scratch_types=dict(
      **memory,
      moments_smem=plgpu.SMEM((WORKERS, 2, ROWS), f32) if residual else None,
      bias_smem=plgpu.SMEM((2, kind.span), f32),
      full=plgpu.Barrier(
        num_arrivals=1 if kind.resident else 2,
        num_barriers=SLOTS * kind.workers // WORKERS,
      ),
      free=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
      bias_full=plgpu.Barrier(
        num_arrivals=(1 if residual else 2) * kind.span // COLUMNS
      ),
      bias_free=plgpu.Barrier(num_arrivals=kind.workers),
    ),
    grid=(kind.grid,),
    grid_names=('block',),
    num_threads=kind.workers + 1,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    kernel_name=dependent.kernel_name(f'candidate_{kind.then}'),
  )


def _body(
  layer_ref, tiles_ref, left_ref, right_ref, bias_ref, sums_ref, moments_ref,
  place_ref, pages_ref, keys_ref, values_ref, stream_ref, y_ref=None,
  stream_out_ref=None, moments_out_ref=None,
  *, plgpu, kind, left, right, out_smem, moments_smem, bias_smem, full, free,
  bias_full, bias_free, left_full, left_free,
):  # fmt: skip
  """One block: some tiles, one after the other."""
  dependent.wait(plgpu)
  block, wg = lax.axis_index('block'), lax.axis_index('wg')
  grid, parts = jnp.int32(kind.grid), jnp.int32(kind.parts)
  count = lax.div(tiles_ref[0] * parts - 1 - block + grid, grid)
  layer = layer_ref[0]
  outs = [(0, y_ref)]
  if kind.then == 'keys_values':
    outs = [(0, keys_ref.at[layer]), (kind.width, values_ref.at[layer])]
  ring = _Ring(
    plgpu, kind, left, right, full, free, left_full, left_free, count
  )

  def at(i):
    """The first candidate and the first column of a tile."""
    number = block + i * grid
    tile = tiles_ref[1 + lax.div(number, parts)]
    return tile * TILE, lax.rem(number, parts) * kind.span

  registers = REGISTERS[kind.workers]

  @pl.when(wg < kind.workers)
  def _():
    plgpu.set_max_registers(registers[0], action='increase')
    worker = _Worker(ring, wg, bias_smem, bias_full, bias_free, moments_ref)

    @pl.loop(0, count)
    def _(i):
      first, column = at(i)
      if kind.then == 'residual':
        worker.residual(
          i * ring.per_tile,
          first + wg * ROWS,
          column,
          moments_smem.at[wg],
          (stream_out_ref, moments_out_ref),
        )
      elif kind.resident:
        worker.hidden(i * ring.per_tile, first, column, out_smem.at[wg], y_ref)
      else:
        worker.activation(
          i * ring.per_tile,
          first + wg * ROWS,
          column,
          out_smem.at[wg],
          place_ref,
          outs,
          pages_ref,
        )

    if kind.then == 'keys_values' and pages_ref is None:
      # Behind the tiles that count are the others, which nobody computes.
      others = kind.num_tiles * parts - (block + count * grid)
      worker.zeros(
        lax.div(others - 1 + grid, grid),
        lambda i: at(count + i),
        out_smem.at[wg],
        outs,
      )
    plgpu.wait_smem_to_gmem(0)

  @pl.when(wg == kind.workers)
  def _():
    plgpu.set_max_registers(registers[1], action='decrease')

    @plgpu.warp_map
    def _(warp):
      @pl.when(warp == 0)
      def _():
        @pl.loop(0, count)
        def _(i):
          first, column = at(i)
          rows = pl.ds(first, TILE)
          number = i * ring.per_tile

          def fill_bias():
            @pl.when(i > 0)
            def _():
              plgpu.barrier_wait(bias_free)

            for n in range(0, kind.span, COLUMNS):
              put = functools.partial(
                plgpu.copy_gmem_to_smem, barrier=bias_full
              )
              here = pl.ds(n, COLUMNS)
              there = pl.ds(kind.bias + column + n, COLUMNS)
              put(bias_ref.at[layer, there], bias_smem.at[0, here])
              if sums_ref is not None:
                there = pl.ds(kind.sums + column + n, COLUMNS)
                put(sums_ref.at[layer, there], bias_smem.at[1, here])

          if kind.resident:
            ring.fill_resident(
              i, number, rows, column, left_ref, right_ref.at[layer], fill_bias
            )
          else:
            ring.fill(number, rows, column, left_ref, right_ref.at[layer])
            fill_bias()
          if kind.then == 'residual':
            ring.fill_residual(number, rows, column, stream_ref)


class _Ring:
  """What a tile needs, in the order in which it is needed.

  Slots have numbers that go on from tile to tile.
  """

  def __init__(
    self, plgpu, kind, left, right, full, free, left_full, left_free, count
  ):
    self.plgpu, self.kind = plgpu, kind
    self.left, self.right = left, right
    if not kind.resident:
      self.right, self.stream = right
    self.full, self.free = full, free
    self.left_full, self.left_free = left_full, left_free
    self.deep = kind.depth // STEP
    # Slots of the residual stream, with two pieces each.
    self.of_stream = COLUMNS // PIECE // 2 if kind.then == 'residual' else 0
    self.per_tile = self.deep + self.of_stream
    if kind.resident:
      self.per_tile *= kind.span // CHUNK
    self.total = count * self.per_tile

  def slot(self, number):
    return lax.rem(number, jnp.int32(SLOTS))

  def wait(self, number, who=0):
    """The slot, once it is full; `who` is the warpgroup that it is for."""
    slot = self.slot(number)
    self.plgpu.barrier_wait(self.full.at[slot + SLOTS * who])
    return slot

  def release(self, number, slot=None):
    """Says that this warpgroup has read the slot, which may be known."""
    slot = self.slot(number) if slot is None else slot

    @pl.when(number + SLOTS < self.total)  # Somebody waits.
    def _():
      self.plgpu.barrier_arrive(self.free.at[slot])

  def claim(self, number, who=0):
    """The slot, once all have read what was in it before; `who` as above."""
    slot = self.slot(number)

    @pl.when(number >= SLOTS)
    def _():
      self.plgpu.barrier_wait(self.free.at[slot])

    return slot, self.full.at[slot + SLOTS * who]

  def fill(self, number, rows, column, left_ref, right):
    """Starts the copies of a tile's factors."""

    @pl.loop(0, self.deep)
    def _(k):
      slot, full = self.claim(number + k)
      depth = pl.ds(k * STEP, STEP)
      self.plgpu.copy_gmem_to_smem(
        right.at[depth, pl.ds(column, COLUMNS)],
        self.right.at[slot],
        full,
      )
      self.plgpu.copy_gmem_to_smem(
        left_ref.at[rows, depth], self.left.at[slot], full
      )

  def fill_resident(self, i, number, rows, column, left_ref, right, fill_bias):
    """Starts the copies of a tile, as its `i`th, whose candidates stay.

    The first products' factors come first, and what their end needs after them.
    """
    copy = self.plgpu.copy_gmem_to_smem

    def weights(n):
      chunk = lax.div(n, jnp.int32(self.deep))
      slot, full = self.claim(number + n, lax.rem(chunk, jnp.int32(WORKERS)))
      depth = pl.ds((n - chunk * self.deep) * STEP, STEP)
      columns = pl.ds(column + chunk * CHUNK, CHUNK)
      copy(right.at[depth, columns], self.right.at[slot], full)

    def candidates(k):
      depth = pl.ds(k * STEP, STEP)
      copy(left_ref.at[rows, depth], self.left.at[k], self.left_full.at[k])

    @pl.when(i > 0)
    def _():
      self.plgpu.barrier_wait(self.left_free)

    @pl.loop(0, SLOTS)
    def _(k):
      weights(k)
      candidates(k)

    pl.loop(SLOTS, self.deep)(candidates)
    pl.loop(SLOTS, self.deep)(weights)
    fill_bias()
    pl.loop(self.deep, self.per_tile)(weights)

  def pieces(self, slot):
    """Of a slot, where pieces of the residual stream `[128, 64]` are."""
    return self.left.at[slot], self.stream.at[slot, 0]

  def fill_residual(self, number, rows, column, stream_ref):
    """Starts the copies of a tile's residual stream."""

    @pl.loop(0, self.of_stream)
    def _(n):
      slot, full = self.claim(number + self.deep + n)
      for i, piece in enumerate(self.pieces(slot)):
        at = column + (2 * n + i) * PIECE
        self.plgpu.copy_gmem_to_smem(
          stream_ref.at[rows, pl.ds(at, PIECE)], piece, full
        )


class _Worker(hopper.Warpgroup):
  """A computing warpgroup: 64 candidates of a tile."""

  def __init__(self, ring, wg, bias_smem, bias_full, bias_free, moments_ref):
    super().__init__(ring.plgpu)
    self.kind, self.ring, self.wg = ring.kind, ring, wg
    self.bias_smem, self.moments_ref = bias_smem, moments_ref
    self.bias_full, self.bias_free = bias_full, bias_free

  def row(self, which, n, size=PIECE):
    """Of piece `n`, the bias (0) or the sums of weights (1) in each row."""
    ref = self.bias_smem.at[which, pl.ds(n * size, size)]
    load = functools.partial(self.plgpu.load, layout=self.column_layout)
    return self.across(load(ref, optimized=False))

  def moments(self, first):
    """The means of 64 candidates and one over their deviations."""
    return _norm_of(self, self.moments_ref, first, self.kind.width)

  def product(self, number):
    """The factors' product `[64, 256]`."""
    plgpu, ring = self.plgpu, self.ring
    rows = pl.ds(self.wg * ROWS, ROWS)

    def run(acc):
      @pl.loop(0, ring.deep)
      def _(k):
        slot = ring.wait(number + k)
        plgpu.wgmma(acc, ring.left.at[slot, rows], ring.right.at[slot])
        plgpu.wgmma_wait(1)  # All but this one have been read.

        @pl.when(k > 0)
        def _():
          ring.release(number + k - 1)

      plgpu.wgmma_wait(0)
      ring.release(number + ring.deep - 1)
      return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, COLUMNS), jnp.float32))

  def activation(
    self, number, first, column, out_smem, place_ref, outs, pages_ref
  ):
    """Puts queries, hidden channels or keys and values of the norm into `outs`.

    `outs`: the first column of each and where it goes; with `pages_ref`, pages.
    """
    plgpu, kind = self.plgpu, self.kind
    rows = pl.ds(first, ROWS)
    pages = None
    if pages_ref is not None:
      number_of = ROWS // kind.page
      begin = lax.div(first, jnp.int32(kind.page))
      pages = [pages_ref[begin + i] for i in range(number_of)]
    mean, scale = self.moments(first)
    place = None
    if place_ref is not None:
      place = plgpu.load(
        place_ref.at[rows], layout=self.row_layout, optimized=False
      ).astype(jnp.float32)
      if kind.then == 'keys_values':  # Values are not rotated.
        place *= jnp.where(column < kind.width, 1.0, 0.0)
    turns = self.rotation(place, kind.head_dim)
    if place is not None:  # While the product's factors are on their way.
      turns = lax.optimization_barrier(turns)
    x = self.product(number)
    plgpu.barrier_wait(self.bias_full)
    per = 1 if kind.then == 'hidden' else max(kind.head_dim, PIECE) // PIECE
    for m in range(0, COLUMNS // PIECE, per):
      pieces = []
      for n in range(m, m + per):
        y = x[:, n * PIECE : (n + 1) * PIECE]
        y = y - self.down(mean, PIECE) * self.row(1, n)
        pieces.append(y * self.down(scale, PIECE) + self.row(0, n))
      if kind.then == 'hidden':
        y = hopper.gelu(pieces[0]).astype(jnp.bfloat16)
      else:
        y = hopper.join(self.rotated(hopper.join(pieces), turns, kind.head_dim))
      for n in range(m, m + per):
        out = out_smem.at[n % 2]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        out[...] = y[:, (n - m) * PIECE : (n - m + 1) * PIECE]
        plgpu.commit_smem()
        if pages is None:
          self.copy_out(out, rows, column + n * PIECE, outs)
        else:
          self.copy_to_pages(out, first, pages, column + n * PIECE, outs)
    plgpu.barrier_arrive(self.bias_free)

  def zeros(self, count, at, out_smem, outs):
    """Puts zeros into all of `count` tiles, of which `at` says where."""
    plgpu = self.plgpu
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    zero = jnp.zeros((ROWS, PIECE), jnp.bfloat16)
    out_smem.at[0][...] = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    plgpu.commit_smem()

    @pl.loop(0, count)
    def _(i):
      first, column = at(i)
      rows = pl.ds(first + self.wg * ROWS, ROWS)
      for n in range(0, COLUMNS, PIECE):
        self.copy_out(out_smem.at[0], rows, column + n, outs)

  def copy_out(self, out_smem, rows, column, outs):
    """Starts the copy of a piece to one of `outs`."""

    def copy(begin, ref):
      columns = pl.ds(column - begin, PIECE)
      self.plgpu.copy_smem_to_gmem(out_smem, ref.at[rows, columns])

    if len(outs) == 1:
      copy(*outs[0])
      return
    for begin, ref in outs:
      here = (column >= begin) & (column < begin + ref.shape[1])
      pl.when(here)(functools.partial(copy, begin, ref))

  def copy_to_pages(self, out_smem, first, pages, column, outs):
    """Starts the copies of a piece to the pages of its rows."""
    plgpu, kind = self.plgpu, self.kind
    for i, page in enumerate(pages):
      mine = pl.ds(i * kind.page, kind.page)
      real = first + i * kind.page < kind.rows
      for begin, ref in outs:
        here = (column >= begin) & (column < begin + ref.shape[2])

        @pl.when(here & real & (page >= 0) & (page < kind.num_pages))
        def _(ref=ref, begin=begin, mine=mine, page=page):
          columns = pl.ds(column - begin, PIECE)
          plgpu.copy_smem_to_gmem(
            out_smem.at[mine],
            ref.at[page, :, columns],
            commit_group=False,
          )

    plgpu.commit_smem_to_gmem_group()

  def hidden(self, number, first, column, out_smem, y_ref):
    """Puts hidden channels of the norm into `y_ref`.

    Of a tile's chunks of 128 columns each pair of warpgroups computes every
    other one, so that one pair multiplies while the other finishes its chunk.
    """
    plgpu, ring = self.plgpu, self.ring
    deep = ring.deep
    pair, half = lax.div(self.wg, WORKERS), lax.rem(self.wg, WORKERS)
    mine = pl.ds(half * ROWS, ROWS)
    rows = pl.ds(first + half * ROWS, ROWS)
    mean, scale = self.moments(first + half * ROWS)
    rounds = self.kind.span // (CHUNK * WORKERS)

    @pl.loop(0, rounds)
    def _(i):
      # Hidden from the compiler, which would keep all addresses that follow.
      c = i * WORKERS + lax.optimization_barrier(pair)
      at = lax.optimization_barrier(number + c * deep)

      def run(acc):
        # To find a slot takes as long as a step of so few columns, so they are
        # known.
        @pl.loop(0, deep, step=SLOTS)
        def _(begin):
          # Opaque, or addresses of all slots are kept, and spilled.
          zero = lax.optimization_barrier(jnp.int32(0))
          for slot in range(SLOTS):
            k = begin + slot

            @pl.when(i == 0)
            def _(k=k):
              plgpu.barrier_wait(ring.left_full.at[k])

            plgpu.barrier_wait(ring.full.at[slot + SLOTS * pair])
            plgpu.wgmma(acc, ring.left.at[k, mine], ring.right.at[slot])
            plgpu.wgmma_wait(1)  # All but this one have been read.
            before = (slot - 1) % SLOTS + zero
            release = functools.partial(ring.release, at + k - 1, before)
            release() if slot else pl.when(begin > 0)(release)

        plgpu.wgmma_wait(0)
        ring.release(at + deep - 1, (deep - 1) % SLOTS)
        return acc[...]

      x = pl.run_scoped(run, plgpu.ACC((ROWS, CHUNK), jnp.float32))

      @pl.when(i == 0)
      def _():
        plgpu.barrier_wait(self.bias_full)

      @pl.when(i == rounds - 1)
      def _():
        plgpu.barrier_arrive(ring.left_free)

      for n in range(CHUNK // STRIP):
        m = c * (CHUNK // STRIP) + n
        y = x[:, n * STRIP : (n + 1) * STRIP]
        y = y - self.down(mean, STRIP) * self.row(1, m, STRIP)
        y = y * self.down(scale, STRIP) + self.row(0, m, STRIP)
        y = hopper.gelu(y).astype(jnp.bfloat16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = y
        plgpu.commit_smem()
        columns = pl.ds(column + m * STRIP, STRIP)
        plgpu.copy_smem_to_gmem(out_smem, y_ref.at[rows, columns])

    plgpu.barrier_arrive(self.bias_free)

  def residual(self, number, first, column, moments_smem, out_refs):
    """Adds the product to the residual stream, less its mean."""
    plgpu, ring = self.plgpu, self.ring
    rows = pl.ds(first, ROWS)
    mine = pl.ds(self.wg * ROWS, ROWS)
    stream_ref, moments_ref = out_refs
    mean, _ = self.moments(first)
    x = self.product(number)
    plgpu.barrier_wait(self.bias_full)
    pieces: list[Any] = []
    for m in range(ring.of_stream):
      at = number + ring.deep + m
      refs = [ref.at[mine] for ref in ring.pieces(ring.wait(at))]
      begin = len(pieces)
      for n, ref in enumerate(refs, begin):
        y = x[:, n * PIECE : (n + 1) * PIECE] + self.row(0, n)
        old = plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        pieces.append(y + old - self.down(mean, PIECE))
      plgpu.commit_smem()  # All have loaded before anybody stores.
      for n, ref in enumerate(refs, begin):
        ref[...] = pieces[n].astype(jnp.bfloat16)
      plgpu.commit_smem()
      for n, ref in enumerate(refs, begin):
        columns = pl.ds(column + n * PIECE, PIECE)
        out = stream_ref.at[rows, columns]
        plgpu.copy_smem_to_gmem(ref, out, commit_group=False)
      plgpu.commit_smem_to_gmem_group()
      if m:
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        ring.release(at - 1)
    plgpu.barrier_arrive(self.bias_free)
    moments = _row_moments(pieces)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    ring.release(at)
    part = lax.div(column, jnp.int32(COLUMNS))
    ref = moments_ref.at[part, :, rows]
    _put_moments(plgpu, moments, moments_smem, ref)
