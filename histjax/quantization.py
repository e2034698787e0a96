"""Keys and values in 8 bits: half the memory of a user's state, or a quarter.

    x ~ scale * code,  scale = max |x| / largest code

with a scale for each layer, user, head and block of `BLOCK` events. What scores
widens them first, in the same program: no kernel reads codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

Kind: TypeAlias = Literal['int8', 'float8_e4m3fn']
KINDS: tuple[Kind, ...] = ('int8', 'float8_e4m3fn')
BLOCK = 16
"""Events that share a scale. They are quantized again when one is added."""


@dataclasses.dataclass(frozen=True)
class Quantized:
  """Keys or values as codes with scales; a pytree of both.

  Attributes:
    codes: `[layers, B, L, N, H]`, of a type in `KINDS`.
    scale: float32 `[layers, B, ceil(L / BLOCK), N]`.
  """

  codes: Shaped[Array, 'layers B L N H']
  scale: Float[Array, 'layers B blocks N']

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the codes."""
    return self.codes.shape

  @property
  def nbytes(self) -> int:
    """Of codes and scales."""
    return self.codes.nbytes + self.scale.nbytes

  def is_deleted(self) -> bool:
    """Whether the memory was donated."""
    return self.codes.is_deleted()


def quantize(
  x: Float[Array, 'layers B L N H'], length: Int[Array, 'B'], kind: Kind
) -> Quantized:
  """The codes nearest to `x / scale`; of events from `length[b]` on, zeros.

  The error is at most `scale / 2` for int8, and `|x| / 16` for float8_e4m3fn,
  or `scale / 1024` if that is more.

  Args:
    x: `[layers, B, L, N, H]`. A block with a value that is not finite becomes
      NaN.
    length: int32 `[B]`, real events.
    kind: of codes.

  Raises:
    ValueError: no such kind.
  """
  check(kind)
  layers, rows, events, heads, size = x.shape
  real = jnp.arange(events)[None] < length[:, None]
  x = jnp.where(real[None, :, :, None, None], x.astype(jnp.float32), 0)
  blocks = -(-events // BLOCK)
  after = ((0, 0), (0, 0), (0, blocks * BLOCK - events), (0, 0), (0, 0))
  parts = jnp.pad(x, after).reshape(layers, rows, blocks, BLOCK, heads, size)
  largest = jnp.max(jnp.abs(parts), axis=(3, 5))
  limit = 127.0 if kind == 'int8' else float(jnp.finfo(kind).max)
  scale = largest / limit
  scale = jnp.where(scale < jnp.finfo(scale.dtype).tiny, 1, scale)
  codes = x / _of_events(scale, events)
  if kind == 'int8':
    codes = jnp.clip(jnp.round(codes), -limit, limit)
  # Or int8 would have no NaN to tell of.
  scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan)
  return Quantized(codes.astype(kind), scale)


def widen(x: Any, dtype: DTypeLike) -> Any:
  """`scale * codes`, of a `Quantized`; anything else as it is."""
  if not isinstance(x, Quantized):
    return x
  scale = _of_events(x.scale, x.shape[2])
  return (x.codes.astype(jnp.float32) * scale).astype(dtype)


def extended(
  before: Quantized,
  after: Float[Array, 'layers B L N H'],
  start: Int[Array, 'B'],
  length: Int[Array, 'B'],
) -> Quantized:
  """`quantize(after, length)`, but blocks without a new event as they were.

  Args:
    before: of at most L events.
    after: `[layers, B, L, N, H]`, equal to `before` up to `start[b]`.
    start: int32 `[B]`, the first new event.
    length: int32 `[B]`, the event after the last one.
  """
  kind: Any = before.codes.dtype.name
  found = quantize(after, length, kind)
  more = after.shape[2] - before.shape[2]
  blocks = found.scale.shape[2]
  codes = jnp.pad(before.codes, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))
  added = ((0, 0), (0, 0), (0, blocks - before.scale.shape[2]), (0, 0))
  scale = jnp.pad(before.scale, added)
  same = jnp.arange(blocks)[None] < start[:, None] // BLOCK
  same |= (start == length)[:, None]  # It would come back to within rounding.
  of_events = jnp.repeat(same, BLOCK, axis=1)[:, : after.shape[2]]
  return Quantized(
    jnp.where(of_events[None, :, :, None, None], codes, found.codes),
    jnp.where(same[None, :, :, None], scale, found.scale),
  )


def check(kind: Any) -> None:
  """Raises ValueError unless it is one of `KINDS`."""
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r} must be one of {KINDS}')


def _of_events(scale, events: int):
  """The scale of each event, `[layers, B, L, N, 1]`."""
  return jnp.repeat(scale, BLOCK, axis=2)[:, :, :events, :, None]


jax.tree_util.register_dataclass(
  Quantized, data_fields=['codes', 'scale'], meta_fields=[]
)
