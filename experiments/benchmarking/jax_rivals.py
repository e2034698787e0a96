"""What a JAX user would write: a plain stack around a fused attention.

Activations and products are of the workload's type and norms in float32, which
is as lean as this gets without a kernel for all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarking.workloads import Attention, Tower
from histjax.ops.rotary import rotary

Attend = Callable[..., jax.Array]


def attention(workload: Attention, dot_product: Attend) -> Attend:
  """Without the ranges: each mask as the rival takes it, and fastest.

  Args:
    workload: what to compute.
    dot_product: has the signature of `jax.nn.dot_product_attention`.

  Returns:
    `(query, key, value, start, stop) -> out`, all `[B, T, N, H]`.
  """
  num_keys, window = workload.num_keys, workload.window

  def attend(query, key, value, start, stop):
    del start, stop
    if workload.mask != 'window':
      causal = workload.mask == 'causal'
      return dot_product(query, key, value, is_causal=causal)
    # Events lie on a diagonal band, candidates all see the last keys.
    parts = [
      dot_product(
        query[:, :num_keys],
        key,
        value,
        is_causal=True,
        local_window_size=(window - 1, 0),
      )
    ]
    if workload.num_queries > num_keys:
      last = slice(max(0, num_keys - window), num_keys)
      parts.append(
        dot_product(query[:, num_keys:], key[:, last], value[:, last])
      )
    return jnp.concatenate(parts, axis=1)

  return attend


def weights(workload: Tower) -> dict[str, Any]:
  """`workload.weights()` as lists over layers, of the workload's type."""
  return {
    k: [jnp.asarray(x, workload.dtype) for x in v]
    if v.ndim > 1
    else jnp.asarray(v)
    for k, v in workload.weights().items()
  }


def tower(workload: Tower, dot_product: Attend, x, rest):
  """A `timing.Step`, cached or joint; `rest` has the inputs and `weights`."""
  step = _joint if workload.joint else _cached
  return step(workload, dot_product, x, rest)


def _cached(workload: Tower, dot_product: Attend, x, rest):
  length = rest['length']
  position = jnp.broadcast_to(length[:, None], x.shape[:2])

  def attend(query, key, value):
    if not workload.ragged:
      return dot_product(query, key, value)
    out = dot_product(
      query, key, value, key_value_seq_lengths=jnp.maximum(length, 1)
    )
    return jnp.where((length > 0)[:, None, None, None], out, 0)

  for i in range(workload.num_layers):
    x = _layer(
      workload,
      rest['weights'],
      i,
      x,
      _norm(x),
      position,
      functools.partial(attend, key=rest['keys'][i], value=rest['values'][i]),
    )
  return _final_norm(x, rest['weights']), ()


def _joint(workload: Tower, dot_product: Attend, x, rest):
  weights, length = rest['weights'], rest['length']
  num_rows, num_events = workload.num_rows, workload.num_events
  event = jnp.arange(num_events, dtype=jnp.int32)
  event = jnp.broadcast_to(event[None], (num_rows, num_events))
  candidate = jnp.broadcast_to(length[:, None], x.shape[:2])
  position = jnp.concatenate([event, candidate], axis=1)
  x = jnp.concatenate([rest['history'], x], axis=1)
  for i in range(workload.num_layers):
    last = i + 1 == workload.num_layers
    normed = _norm(x)
    key = _heads(workload, normed[:, :num_events] @ weights['key'][i])
    value = _heads(workload, normed[:, :num_events] @ weights['value'][i])
    if last:  # Nothing reads the history's last layer.
      x, normed, position = (y[:, num_events:] for y in (x, normed, position))
    x = _layer(
      workload,
      weights,
      i,
      x,
      normed,
      position,
      functools.partial(
        dot_product, key=rotary(key, event), value=value, is_causal=not last
      ),
    )
  return _final_norm(x, weights), ()


def _layer(workload, weights, i, x, normed, position, attend):
  query = rotary(_heads(workload, normed @ weights['query'][i]), position)
  attended = attend(query).reshape(x.shape)
  x = x + attended @ weights['output'][i] + _wide(weights['output_bias'][i])
  hidden = _norm(x) @ weights['mlp_in'][i] + _wide(weights['mlp_in_bias'][i])
  hidden = jax.nn.gelu(hidden) @ weights['mlp_out'][i]
  return x + hidden + _wide(weights['mlp_out_bias'][i])


def _norm(x):
  z = x.astype(jnp.float32)
  z = z - z.mean(axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.square(z).mean(axis=-1, keepdims=True) + 1e-6)
  return (z * scale).astype(x.dtype)


def _final_norm(x, weights):
  y = _norm(x.astype(jnp.float32)) * _wide(weights['final_scale'])
  return (y + _wide(weights['final_bias'])).astype(x.dtype)


def _heads(workload: Tower, x):
  return x.reshape(*x.shape[:2], workload.num_heads, workload.head_dim)


def _wide(x):
  return x[None, None, :]
