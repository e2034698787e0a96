"""History attention by cuDNN's fused kernels, through `jax.nn`.

cuDNN masks by a length per row and by a causal diagonal that starts at the
first query and the first key, whatever their numbers. With a history's queries
first and candidates' behind, that is the structure 'causal'; without the
diagonal it is 'prefix'. It has no other ranges.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from histjax.ops import devices
from histjax.types import KeyRange


def check_target(target: devices.Target) -> None:
  """Raises NotImplementedError unless cuDNN attention runs there."""
  devices.check_cuda(target, 'cudnn', 8.0)
  devices.check_not_serialized(target, 'cudnn', "cuDNN's own program")


def history_attention(
  query: Float[Array, 'B Q N H'],
  key: Float[Array, 'B L N H'],
  value: Float[Array, 'B L N H'],
  key_range: KeyRange,
  *,
  scale: float,
) -> Float[Array, 'B Q N H']:
  """See `api.history_attention`; keys and values must all be finite."""
  if key_range.structure not in ('prefix', 'causal'):
    raise NotImplementedError(
      f'cudnn cannot take key_range.structure={key_range.structure!r}: it '
      "masks by 'prefix' or 'causal' only"
    )
  if query.dtype not in (jnp.float16, jnp.bfloat16):
    raise NotImplementedError(
      f'cudnn computes in 16 bits, and query is {query.dtype}'
    )
  if query.shape[-1] % 8:
    raise NotImplementedError(
      f'cudnn needs a head dimension that is a multiple of 8, not '
      f'H={query.shape[-1]}'
    )
  # The last query's stop: the length, or in a 'causal' call with Q < L the
  # number of keys that the diagonal lets anyone see.
  length = jnp.clip(key_range.stop[:, -1], 0, key.shape[1])
  try:
    out = jax.nn.dot_product_attention(
      *map(_to_even, (query, key, value)),
      scale=scale,
      is_causal=key_range.structure == 'causal',
      key_value_seq_lengths=jnp.maximum(length, 1),
      implementation='cudnn',
    )[:, : query.shape[1]]
  except RuntimeError as error:  # JAX asks the library for its version.
    if 'cuDNN' not in str(error):
      raise
    raise NotImplementedError(
      f'cudnn must be installed where the program is traced: {error}'
    ) from error
  # A length of 0 has no softmax; it attended one key, which this undoes.
  some = (length > 0)[:, None, None, None]
  return jnp.where(some, out, jnp.zeros_like(out))


def _to_even(x: Float[Array, 'B T N H']) -> Float[Array, 'B T N H']:
  """Pads T to an even number: JAX differentiates this call for no other."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
