"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from histjax.ops import devices, dispatch
from histjax.ops.history_attention import cudnn, reference, xla
from histjax.types import STRUCTURES, KeyRange


def _lazy(name: str):
  return dispatch.lazy(f'{__package__}.{name}', 'history_attention')


# The fastest first; 'xla' computes every call everywhere.
_BACKENDS = {
  'pallas_gpu': dispatch.Backend(_lazy('pallas_gpu'), devices.check_hopper),
  'cudnn': dispatch.Backend(cudnn.history_attention, cudnn.check_target),
  'pallas_tpu': dispatch.Backend(_lazy('pallas_tpu'), devices.check_tpu),
  'xla': dispatch.Backend(xla.history_attention, dispatch.any_target),
  'reference': dispatch.Backend(
    reference.history_attention, dispatch.any_target
  ),
}


def check_name(implementation: str | None, field: str) -> None:
  """Raises ValueError, of this field, at a name that no backend has."""
  dispatch.check_implementation(_BACKENDS, implementation, field)


def history_attention(
  query: Float[Array, 'B Q N H'],
  key: Float[Array, 'B L N H'],
  value: Float[Array, 'B L N H'],
  key_range: KeyRange,
  *,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, 'B Q N H']:
  """Attention of each query to a contiguous range of the history's keys.

      out[q] = sum_j softmax_j(scale query[q] . key[j]) value[j],
      start[q] <= j < stop[q],

  per row and head; zeros, with zero gradients, where the range is empty. A
  range is cut to `[0, L)`.

  This is the cross-attention of arXiv 2412.06924: `Q = W_q [H_1..H_n, C]` may
  hold history and candidates, `K = W_k [H_1..H_n]` and `V = W_v [H_1..H_n]`
  are of the history alone, so nothing ever attends to a candidate.

  Accumulates in float32 (float64 for float64 inputs). First-order gradients
  in reverse mode work in every backend; forward mode and second order only in
  'reference'. Works under jit, vmap, checkpoint and with `B` sharded.

  Args:
    query: `[B, Q, N, H]`, float16, bfloat16, float32 or float64.
    key: `[B, L, N, H]`, of the same type.
    value: `[B, L, N, H]`, of the same type.
    key_range: int32 `[B, Q]` each. Its `structure` opens faster backends.
    scale: a Python number, of the products; None: `1 / sqrt(H)`.
    implementation: 'pallas_gpu' (NVIDIA Hopper; 16-bit, `H <= 128`; keys and
      values must all be finite), 'cudnn' (NVIDIA GPUs; 16-bit, 'prefix' or
      'causal' ranges; keys and values must all be finite), 'pallas_tpu' (TPUs;
      bfloat16 and float32; to shard `B` under jit, put the mesh in context, as
      by `jax.set_mesh`), 'xla' (everything, everywhere) or 'reference'
      (readable; memory `B N Q L`). None: the fastest that supports the
      call.
      In 'pallas_tpu', 'xla' and 'reference', keys and values that lie before or
      after all ranges of their row may hold anything, NaN included; those
      between must be finite.

  Returns:
    `[B, Q, N, H]`, of the query's type.

  Raises:
    ValueError: an argument is malformed, or no such implementation.
    NotImplementedError: the named implementation cannot compute this call on
      this device; the message says why.
  """
  query, key, value = (jnp.asarray(x) for x in (query, key, value))
  _check(query, key, value, key_range, implementation)
  scale = _check_scale(scale, query.shape[-1])
  if 0 in query.shape or 0 in key.shape:
    return jnp.zeros_like(query)
  target = dispatch.target_of(query)
  return _dispatch(query, key, value, key_range, scale, implementation, target)[
    1
  ]


def history_attention_backend(
  query: Any,
  key: Any,
  value: Any,
  key_range: KeyRange,
  *,
  implementation: str | None = None,
) -> str:
  """The name of the backend that `history_attention` would run.

  Computes nothing. It answers "are the kernels used?"; to learn why one is
  not, name it as `implementation` and read the error. Of a call without rows,
  queries or keys, which runs none, it is that of one.

  Args:
    query: `[B, Q, N, H]`; as all arrays here, or a `jax.ShapeDtypeStruct`.
    key: `[B, L, N, H]`, of the same type.
    value: `[B, L, N, H]`, of the same type.
    key_range: int32 `[B, Q]` each.
    implementation: the name of a backend; None: the fastest that supports the
      call.

  Returns:
    'pallas_gpu', 'cudnn', 'pallas_tpu', 'xla' or 'reference'.

  Raises:
    ValueError: an argument is malformed, or no such implementation.
    NotImplementedError: the named implementation cannot compute this call on
      this device; the message says why.
  """
  _check(query, key, value, key_range, implementation)
  target = dispatch.target_of(query)
  name = ''

  def trace(query, key, value, key_range):
    nonlocal name
    name, out = _dispatch(
      query, key, value, key_range, 1.0, implementation, target
    )
    return out

  def some(x):
    if 0 not in x.shape:
      return x
    return jax.ShapeDtypeStruct([max(n, 1) for n in x.shape], x.dtype)

  call = query, key, value, key_range
  jax.eval_shape(trace, *jax.tree.map(some, call))
  return name


def _dispatch(query, key, value, key_range, scale, implementation, target):
  """Runs the named backend, or the first that can; returns its name too."""
  return dispatch.run(
    'history_attention',
    _BACKENDS,
    implementation,
    target,
    query,
    key,
    value,
    key_range,
    scale=scale,
  )


def _check(query, key, value, key_range, implementation):
  """Raises ValueError at a malformed call."""
  dispatch.check_implementation(_BACKENDS, implementation)
  for name, x, axes in (
    ('query', query, '[B, Q, N, H]'),
    ('key', key, '[B, L, N, H]'),
    ('value', value, '[B, L, N, H]'),
  ):
    if len(x.shape) != 4:
      raise ValueError(f'{name} has shape {x.shape}; make it {axes}')
    if x.dtype != query.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f'{name} is {x.dtype} and query is {query.dtype}; cast query, key '
        'and value to one float type'
      )
  num_rows, num_queries, num_heads, head_dim = query.shape
  expected = (num_rows, key.shape[1], num_heads, head_dim)
  for name, x in (('key', key), ('value', value)):
    if x.shape != expected:
      raise ValueError(
        f'{name} has shape {x.shape}; with query {query.shape} and key '
        f'{key.shape} it must be [B, L, N, H] = {expected}'
      )
  if not head_dim:
    raise ValueError(f'query has shape {query.shape}; H must be at least 1')
  for name in ('start', 'stop'):
    x = getattr(key_range, name)
    if x.shape != (num_rows, num_queries) or x.dtype != jnp.int32:
      raise ValueError(
        f'key_range.{name} is {x.dtype} {x.shape}; with query {query.shape} '
        f'it must be int32 [B, Q] = {(num_rows, num_queries)}'
      )
  if key_range.structure not in STRUCTURES:
    raise ValueError(
      f'key_range.structure={key_range.structure!r} is unknown; use '
      f"one of {STRUCTURES} that is true; 'any' always is"
    )


def _check_scale(scale, head_dim: int) -> float:
  if scale is None:
    return head_dim**-0.5
  if isinstance(scale, jax.core.Tracer) or not math.isfinite(scale):
    raise ValueError(
      f'scale={scale} must be a finite Python number; to learn a scale, '
      'multiply query by it'
    )
  return float(scale)
