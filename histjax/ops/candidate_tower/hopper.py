"""What the Hopper kernels and their computing warpgroups have in common."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from histjax.ops import rotary

ROWS = 64  # Candidates of a warpgroup: the M of wgmma.
WIDE = 512  # D from which a layer is several kernels.


def mosaic_gpu():
  """The Mosaic GPU module, or a NotImplementedError that says why not."""
  if jax.__version_info__ < (0, 11):
    raise NotImplementedError(
      'pallas_gpu needs the Mosaic GPU of JAX 0.11 or newer, whose arrays in '
      f'registers can be joined, not of {jax.__version__}'
    )
  from jax.experimental.pallas import mosaic_gpu

  return mosaic_gpu


def put(plgpu: Any, ref: Any, value: Any) -> None:
  """`ref[...] = value` where the layout suits no fast transfer.

  From JAX 0.12 on that has to be said; before, it was not asked.
  """
  if hasattr(plgpu, 'store'):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def no_slices(operands: Any) -> Any:
  """The operands of a kernel that writes into others of its operands.

  If one is a slice of another array, XLA fuses that with the kernel, and the
  fusion does not say that its results are its operands: the kernel would write
  elsewhere. So XLA must not see that they are slices.
  """
  return lax.optimization_barrier(operands)


def tiles(rows: int, size: int, live: Any) -> Any:
  """How many tiles of so many rows there are, and which, int32 `[1 + tiles]`.

  All, or those with live rows, of bool `[rows]` or `[B, C]`; the others last.
  """
  number = -(-rows // size)
  if live is None:
    order = jnp.arange(number, dtype=jnp.int32)
    return jnp.concatenate([jnp.full((1,), number, jnp.int32), order])
  live = jnp.pad(live.reshape(rows), (0, number * size - rows))
  dead = jnp.logical_not(live.reshape(number, size).any(axis=1))
  alive = number - dead.sum(dtype=jnp.int32)
  order = jnp.argsort(dead, stable=True).astype(jnp.int32)
  return jnp.concatenate([alive[None], order])


class Warpgroup:
  """Computes some columns of 64 candidates."""

  def __init__(self, plgpu: Any):
    self.plgpu = plgpu
    self.row_layout = plgpu.Layout.WGMMA.reduce(1)
    self.column_layout = plgpu.Layout.WGMMA.reduce(0)

  def down(self, v, columns):
    """`[64]` -> `[64, columns]`."""
    return lax.broadcast_in_dim(v, (ROWS, columns), (0,))

  def across(self, v):
    """`[columns]` -> `[64, columns]`."""
    return lax.broadcast_in_dim(v, (ROWS, v.shape[0]), (1,))

  def rotation(self, place, head_dim, scale=1.0):
    """The sines and cosines of `place`, float32 `[64]`, times a scale.

    `[64, H / 2]` each. If it is None they rotate nothing: None and the scale.
    """
    half = head_dim // 2
    sin, cos = None, scale
    if place is not None:
      channel = self.plgpu.broadcasted_iota(
        jnp.int32, (half,), 0, layout=self.column_layout
      ).astype(jnp.float32)
      frequency = jnp.exp2(channel * (-math.log2(rotary.MAX_WAVELENGTH) / half))
      angle = self.down(place, half) * self.across(frequency)
      # Two-term reduction to [-pi, pi], where the fast sine is accurate.
      turns = lax.round(
        angle * (0.5 / math.pi), lax.RoundingMethod.TO_NEAREST_EVEN
      )
      angle = (angle - turns * 6.28125) - turns * (2 * math.pi - 6.28125)
      sin, cos = (f(angle) * scale for f in (jnp.sin, jnp.cos))
    return sin, cos

  def rotated(self, q, rotation, head_dim):
    """Heads `[64, heads * H]` float32, rotated: a list of bfloat16."""
    half, (sin, cos) = head_dim // 2, rotation
    heads = []
    for at in range(0, q.shape[1], head_dim):
      a, b = q[:, at : at + half], q[:, at + half : at + head_dim]
      if sin is None:
        a, b = a * cos, b * cos
      else:
        a, b = a * cos - b * sin, b * cos + a * sin
      heads.append(lax.concatenate([a, b], 1).astype(jnp.bfloat16))
    return heads


def swizzled(plgpu: Any, shape, dtype=jnp.bfloat16, columns: int | None = None):
  """Shared memory in the form that the matrix units read.

  Blocks of `columns`, which are 128 bytes wide if None.
  """
  columns = columns or 128 // jnp.dtype(dtype).itemsize
  return plgpu.SMEM(shape, dtype, transforms=transforms(plgpu, dtype, columns))


def transforms(plgpu: Any, dtype, columns: int):
  """Of shared memory in that form."""
  return (
    plgpu.TilingTransform((8, columns)),
    plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize),
  )


def join(pieces):
  """Blocks of columns, side by side."""
  pieces = list(pieces)
  return pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, 1)


def gelu(u):
  """`u Phi(u)` with the tanh approximation; one special function."""
  inner = u * (0.7978845608 + 0.0356774081 * (u * u))
  half = 0.5 * u
  return half + half * jnp.tanh(inner)
