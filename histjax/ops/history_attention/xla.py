"""History attention in plain JAX operations, for any platform.

Online softmax over blocks of keys (Milakov & Gimelshein, arXiv 1805.02867;
Dao et al., arXiv 2205.14135), so that memory grows as `Q + L`. The backward
pass saves the output and the log-sum-exp and recomputes the weights. A block of
keys that no query of a block sees is never read: windowed causal ranges cost
`Q W`, not `Q L`. Small calls run as a single block.

Inside, queries and keys are blocked as `[blocks, B, N, block, H]`: heads before
time, because XLA multiplies matrices fastest when the batch axes come first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops import dispatch
from histjax.types import KeyRange

# Scores in one block, `B N block_q block_k`. A CPU wants them in its cache:
# measured with 2^18 to 2^22 at B N = 4 to 256, L = 100 to 2048. An
# accelerator wants enough of them to be busy; that number is not tuned.
_CPU_SCORES = 1 << 20
_ACCELERATOR_SCORES = 1 << 24
_MIN_BLOCK = 128


class Blocks(NamedTuple):
  """How many queries and keys a block holds."""

  query: int
  key: int


def history_attention(
  query: Float[Array, 'B Q N H'],
  key: Float[Array, 'B L N H'],
  value: Float[Array, 'B L N H'],
  key_range: KeyRange,
  *,
  scale: float,
) -> Float[Array, 'B Q N H']:
  """See `api.history_attention`; first-order gradients in reverse mode only."""
  num_rows, num_queries, num_heads, _ = query.shape
  num_keys = key.shape[1]
  blocks = block_sizes(num_rows * num_heads, num_queries, num_keys)
  start, stop = _clip(key_range, num_keys)
  key, value = (_pad(x, blocks.key) for x in (key, value))
  # Keys outside all ranges of their row may hold anything, NaN included.
  first, last = start.min(axis=1), stop.max(axis=1)  # [B]
  index = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
  seen = (index >= first[:, None]) & (index < last[:, None])  # [B, L]
  seen = seen[:, :, None, None]
  prefix = key_range.structure == 'prefix'
  fill = jnp.zeros_like(key[:, :1])
  if prefix:
    # Copies of a key that all queries see: no mask is needed for the maximum.
    fill = jnp.where((last > 0)[:, None, None, None], key[:, :1], fill)
    if scale < 0:
      query, scale = -query, -scale
  key = jnp.where(seen, key, fill)
  value = jnp.where(seen, value, jnp.zeros_like(value))
  query = _split(query, blocks.query)
  if prefix:
    # One range a row, its start a constant that XLA can see: a cheaper mask.
    shape = (len(query), num_rows, 1)
    start = jnp.zeros(shape, jnp.int32)
    stop = jnp.broadcast_to(stop[None, :, :1], shape)
  else:
    start = _split(start, blocks.query, num_keys)
    stop = _split(stop, blocks.query, 0)
  out = _attend(
    query,
    _split(key, blocks.key),
    _split(value, blocks.key),
    start,
    stop,
    scale,
    prefix,
  )
  return _join(out, num_queries)


def block_sizes(num_matrices: int, num_queries: int, num_keys: int) -> Blocks:
  """The blocks of a call with `num_matrices = B N` score matrices.

  One block if the scores are few, else near-equal blocks of at least 128.
  """
  on_cpu = dispatch.target_of().platform == 'cpu'
  budget = _CPU_SCORES if on_cpu else _ACCELERATOR_SCORES
  if num_matrices * num_queries * num_keys <= budget:
    return Blocks(num_queries, num_keys)
  side = max(_MIN_BLOCK, int((budget / num_matrices) ** 0.5))
  return Blocks(_balanced(num_queries, side), _balanced(num_keys, side))


def block_bounds(
  start: Int[Array, 'blocks B block_or_1'],
  stop: Int[Array, 'blocks B block_or_1'],
  block_key: int,
) -> tuple[Int[Array, 'blocks'], Int[Array, 'blocks']]:
  """The key blocks `[lower, upper)` that any query of a query block sees.

  Args:
    start: first key of each query; at an empty range, L or more.
    stop: its last key plus one; at an empty range, 0.
    block_key: keys in a block.

  Returns:
    int32, per query block; `lower >= upper` where nothing is seen.
  """
  lower = start.min(axis=(1, 2)) // block_key
  upper = -(-stop.max(axis=(1, 2)) // block_key)
  return lower, upper


def _balanced(size: int, limit: int) -> int:
  """A block size up to about `limit` that splits `size` evenly."""
  num_blocks = -(-size // limit)
  block = -(-size // num_blocks)
  return min(size, -(-block // 8) * 8)


def _clip(key_range: KeyRange, num_keys: int):
  """Ranges within `[0, L)`; an empty one becomes `[L, 0)`."""
  start = jnp.clip(key_range.start, 0, num_keys)
  stop = jnp.clip(key_range.stop, 0, num_keys)
  empty = start >= stop
  return jnp.where(empty, num_keys, start), jnp.where(empty, 0, stop)


def _pad(x, block: int, fill: int = 0):
  """`[B, T, ..]` with T rounded up to a multiple of `block`."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, -x.shape[1] % block)
  return jnp.pad(x, pad, constant_values=fill)


def _split(x, block: int, fill: int = 0):
  """`[B, T, ..]` to `[T / block, B, N, block, H]` or `[.., B, block]`."""
  x = _pad(x, block, fill)
  x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
  return x.transpose((1, 0, 3, 2, 4) if x.ndim == 5 else (1, 0, 2))


def _join(x, size: int):
  """`[blocks, B, N, block, H]` to `[B, T, N, H]`."""
  num_blocks, num_rows, num_heads, block, head_dim = x.shape
  x = x.transpose(1, 0, 3, 2, 4)
  x = x.reshape(num_rows, num_blocks * block, num_heads, head_dim)
  return x[:, :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, start, stop, scale, prefix):
  return _forward(query, key, value, start, stop, scale, prefix)[0]


def _forward_rule(query, key, value, start, stop, scale, prefix):
  out, log_total = _forward(query, key, value, start, stop, scale, prefix)
  return out, (query, key, value, start, stop, out, log_total)


def _forward(query, key, value, start, stop, scale, prefix):
  """The output and, unless the range is empty, `log(sum(exp(scores)))`."""
  dtype = _accumulator(query)
  block_key = key.shape[3]

  def query_block(args):
    q, first, last, lower, upper = args

    def key_block(j, carry):
      acc, largest, total = carry
      products = _dot('bnqh,bnkh->bnqk', q, key[j])
      scores = _mask(scale * products, first, last, j * block_key)
      # XLA on CPUs would write masked scores to memory for their maximum.
      top = scale * products.max(axis=-1) if prefix else scores.max(axis=-1)
      new_largest = jnp.maximum(largest, top)
      weights = jnp.exp(scores - new_largest[..., None])  # [B, N, q, k]
      shrink = jnp.exp(largest - new_largest)
      total = shrink * total + weights.sum(axis=-1)
      acc = shrink[..., None] * acc + _dot('bnqk,bnkh->bnqh', weights, value[j])
      return acc, new_largest, total

    acc = jnp.zeros_like(q, dtype)  # [B, N, q, H]
    total = acc[..., 0]
    # Finite, so that masked scores are below it and weigh exp(-inf) = 0.
    largest = jnp.full_like(total, jnp.finfo(dtype).min / 2)
    acc, largest, total = _loop(
      lower, upper, len(key), key_block, (acc, largest, total)
    )
    total = jnp.where(total == 0, 1, total)  # An empty range.
    out = (acc / total[..., None]).astype(q.dtype)
    return out, largest + jnp.log(total)

  bounds = block_bounds(start, stop, block_key)
  return _map(query_block, (query, start, stop, *bounds))


def _backward_rule(scale, prefix, residuals, cotangent):
  """`dS = P (dP - delta)`, `delta = sum(dO O)`; arXiv 2205.14135, B.4."""
  query, key, value, start, stop, out, log_total = residuals
  dtype = _accumulator(query)
  block_key = key.shape[3]
  delta = jnp.sum(cotangent.astype(dtype) * out.astype(dtype), axis=-1)

  def query_block(carry, args):
    q, d_out, delta, log_total, first, last, lower, upper = args
    # XLA's CPU product with the long axis of `weights` transposed is 3x slower.
    q_turned, d_out_turned = q.swapaxes(2, 3), d_out.swapaxes(2, 3)

    def key_block(j, carry):
      d_query, d_key, d_value = carry
      scores = scale * _dot('bnqh,bnkh->bnqk', q, key[j])
      scores = _mask(scores, first, last, j * block_key)
      weights = jnp.exp(scores - log_total[..., None])  # [B, N, q, k]
      d_weights = _dot('bnqh,bnkh->bnqk', d_out, value[j])
      # A huge value outside the range may make d_weights infinite there.
      d_scores = jnp.where(
        jnp.isneginf(scores), 0, weights * (d_weights - delta[..., None])
      )
      d_query += _dot('bnqk,bnkh->bnqh', d_scores, key[j])
      d_key = _add_at(d_key, j, _dot('bnhq,bnqk->bnhk', q_turned, d_scores))
      d_value = _add_at(
        d_value, j, _dot('bnhq,bnqk->bnhk', d_out_turned, weights)
      )
      return d_query, d_key, d_value

    d_query, *carry = _loop(
      lower, upper, len(key), key_block, (jnp.zeros_like(q, dtype), *carry)
    )
    return tuple(carry), (scale * d_query).astype(q.dtype)

  bounds = block_bounds(start, stop, block_key)
  blocks = (query, cotangent, delta, log_total, start, stop, *bounds)
  carry = tuple(jnp.zeros_like(x.swapaxes(3, 4), dtype) for x in (key, value))
  if len(query) == 1:
    carry, d_query = query_block(carry, [x[0] for x in blocks])
    d_query = d_query[None]
  else:
    carry, d_query = jax.lax.scan(query_block, carry, blocks)
  d_key, d_value = (x.swapaxes(3, 4) for x in carry)  # [blocks, B, N, k, H]
  d_key = (scale * d_key).astype(key.dtype)
  return d_query, d_key, d_value.astype(value.dtype), None, None


_attend.defvjp(_forward_rule, _backward_rule)


def _mask(scores, first, last, offset):
  """`[B, N, q, k]`, -inf outside the ranges `[B, q or 1]`."""
  index = offset + jnp.arange(scores.shape[3], dtype=jnp.int32)
  index = index[None, None, None, :]
  first, last = first[:, None, :, None], last[:, None, :, None]
  return jnp.where((index >= first) & (index < last), scores, -jnp.inf)


def _dot(spec: str, x, y):
  """A product whose wider operand is rounded to the inputs' type."""
  dtype = min(x.dtype, y.dtype, key=lambda d: d.itemsize)
  return jnp.einsum(
    spec,
    x.astype(dtype),
    y.astype(dtype),
    preferred_element_type=_accumulator(y),
  )


def _add_at(x, j, update):
  """`x[j] += update`."""
  return jax.lax.dynamic_update_index_in_dim(x, x[j] + update, j, axis=0)


def _accumulator(x) -> jnp.dtype:
  """float32, or float64 for float64 inputs."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _loop(lower, upper, num_blocks: int, body, carry: Any):
  """`fori_loop`; a single block needs no loop, masks say what is seen."""
  if num_blocks == 1:
    return body(0, carry)
  return jax.lax.fori_loop(lower, upper, body, carry)


def _map(body, blocks):
  """`lax.map`; a single block needs no loop."""
  if len(blocks[0]) == 1:
    out = body([x[0] for x in blocks])
    return jax.tree.map(lambda x: x[None], out)
  return jax.lax.map(body, blocks)
