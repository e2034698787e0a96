"""Rotary positions: the one encoding that cached keys and kernels share."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from histjax.ops import dispatch

MAX_WAVELENGTH = 10_000.0
"""The largest distance told apart, in events, over 2 pi."""


def frequencies(head_dim: int) -> Int[Array, 'H/2']:
  """Turns per event of each pair of channels, int32 `[H / 2]`.

  In units of `2^-32` turns, so that products with a position, whole turns of
  which are what overflows, are exact: angles of float32 would be rounded by
  ever more, the further from a history's begin.
  """
  half = head_dim // 2
  unit = math.tau / 2**32
  turns = [round(MAX_WAVELENGTH ** (-i / half) / unit) for i in range(half)]
  # Of numbers: no kernel that is split over devices may hold an array.
  return jnp.stack([jnp.full((), x, jnp.int32) for x in turns])


def radians(
  position: Int[Array, '...'], frequency: Int[Array, '...']
) -> Float[Array, '...']:
  """Angles in [-pi, pi), float32, of positions and `frequencies`, int32."""
  return (position * frequency).astype(jnp.float32) * (math.tau / 2**32)


def sin_cos(
  position: Shaped[Array, 'B Q'], head_dim: int
) -> tuple[Float[Array, 'B Q H/2'], Float[Array, 'B Q H/2']]:
  """Sine and cosine of each pair's angle, in float32."""
  frequency = frequencies(head_dim)[None, None, :]
  angle = radians(position.astype(jnp.int32)[:, :, None], frequency)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  if dispatch.target_of(position).platform == 'cpu':
    # XLA would fuse the sines with the products and compute them once more for
    # every head and half. It fuses no remainder, and this one changes nothing.
    sin, cos = jnp.fmod(sin, 2.0), jnp.fmod(cos, 2.0)
  return sin, cos


def rotary(
  x: Float[Array, 'B Q N H'], position: Shaped[Array, 'B Q']
) -> Float[Array, 'B Q N H']:
  """Rotates pairs of channels by angles proportional to the position.

  `(x_i, x_{i+H/2})` turns by `position * max_wavelength^(-2i/H)`, so that a
  dot product of two rotated vectors depends on their distance alone, wherever
  they are (Su et al., RoFormer, arXiv 2104.09864).

  Args:
    x: queries or keys, H even.
    position: int32 `[B, Q]`, the ordinal of each event.

  Returns:
    `[B, Q, N, H]` in the dtype of `x`; sines are computed in float32.
  """
  sin, cos = (y[:, :, None, :] for y in sin_cos(position, x.shape[-1]))
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
