"""Rotary positions: the one encoding that cached keys and kernels share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from histjax.ops import dispatch

MAX_WAVELENGTH = 10_000.0
"""The largest distance told apart, in events, over 2 pi."""


def frequencies(head_dim: int) -> Float[Array, 'H/2']:
  """Radians per event of each pair of channels, float32 `[H / 2]`."""
  half = head_dim // 2
  exponent = jnp.arange(half, dtype=jnp.float32) / half
  return jnp.power(jnp.float32(MAX_WAVELENGTH), -exponent)


def sin_cos(
  position: Shaped[Array, 'B Q'], head_dim: int
) -> tuple[Float[Array, 'B Q H/2'], Float[Array, 'B Q H/2']]:
  """Sine and cosine of each pair's angle, in float32."""
  angle = (
    position.astype(jnp.float32)[:, :, None]
    * frequencies(head_dim)[None, None, :]
  )
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
  dot product of two rotated vectors depends on their distance alone
  (Su et al., RoFormer, arXiv 2104.09864).

  Args:
    x: queries or keys, H even.
    position: int32 `[B, Q]`, the ordinal of each event.

  Returns:
    `[B, Q, N, H]` in the dtype of `x`; angles are computed in float32.
  """
  sin, cos = (y[:, :, None, :] for y in sin_cos(position, x.shape[-1]))
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
