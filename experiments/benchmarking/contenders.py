"""Who computes a workload: this library, and its rivals written in JAX.

A contender is a name. 'histjax' is the library as it picks by itself and
'histjax:xla' with an implementation named. Rivals: 'jax:cudnn' and 'jax:xla'
are `jax.nn.dot_product_attention`, 'tokamax' is its namesake there, in a plain
stack of layers that holds the workload's type between products; 'torch:..' are
of `torch_rivals`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking import jax_rivals, timing
from benchmarking.workloads import Attention, Tower
from histjax import ops
from histjax.nn import fusion
from histjax.nn.encoder import EncoderConfig
from histjax.types import KeyRange


def program(
  name: str, workload: Attention | Tower, inputs: list[dict[str, np.ndarray]]
) -> timing.JaxProgram:
  """Compiles a contender.

  Args:
    name: 'histjax', 'histjax:..', 'jax:cudnn', 'jax:xla' or 'tokamax'.
    workload: what to compute.
    inputs: of `workload.inputs`, several seeds.

  Raises:
    ValueError: no such contender.
    NotImplementedError: an implementation cannot compute it here.
  """
  owner, _, implementation = name.partition(':')
  if owner == 'histjax':
    if isinstance(workload, Attention):
      attend = _our_attention(workload, implementation or None)
      return _attention_program(workload, inputs, attend)
    return _our_tower(workload, inputs, implementation or None)
  if name in ('jax:cudnn', 'jax:xla'):
    attend = functools.partial(
      jax.nn.dot_product_attention, implementation=implementation
    )
  elif name == 'tokamax':
    import tokamax

    attend = tokamax.dot_product_attention
  else:
    raise ValueError(
      f"contender {name!r} is unknown; use 'histjax', 'histjax:<name of an "
      "implementation>', 'jax:cudnn', 'jax:xla', 'tokamax' or 'torch:..'"
    )
  if isinstance(workload, Attention):
    attend = jax_rivals.attention(workload, attend)
    return _attention_program(workload, inputs, attend)
  return _rival_tower(workload, inputs, attend)


def attention_backend(workload: Attention, implementation: str | None) -> str:
  """What `ops.history_attention` runs, `implementation` given."""
  rows, heads, dim = workload.num_rows, workload.num_heads, workload.head_dim
  dtype = jnp.dtype(workload.dtype)
  query, key = (
    jax.ShapeDtypeStruct((rows, tokens, heads, dim), dtype)
    for tokens in (workload.num_queries, workload.num_keys)
  )
  ends = jax.ShapeDtypeStruct((rows, workload.num_queries), jnp.int32)
  return ops.history_attention_backend(
    query,
    key,
    key,
    KeyRange(ends, ends, workload.structure),
    implementation=implementation,
  )


def reference(
  workload: Attention | Tower, inputs: dict[str, np.ndarray]
) -> list[np.ndarray]:
  """What a contender's `output()` should be: float32, of rounded inputs."""
  rounded = {k: _rounded(x, workload.dtype) for k, x in inputs.items()}
  with jax.default_matmul_precision('highest'):
    if isinstance(workload, Attention):
      attend = _our_attention(workload, 'reference')
      rest = _attention_rest(workload, rounded)
      step = _attention_step(workload, attend)
      out = jax.jit(step)(_attention_x(workload, rounded), rest)
      return [np.asarray(x) for x in jax.tree.leaves(out)]
    weights = _rounded_weights(workload)
    length, count = map(jnp.asarray, workload.lengths())
    module = _fusion(workload, 'float32', attention='reference')
    params = {'params': _flax_params(weights)}
    x = rounded['candidates']
    if workload.joint:
      out = jax.jit(module.apply)(params, rounded['history'], x, length, None)
    else:
      out = jax.jit(functools.partial(module.apply, method='score'))(
        params, rounded['keys'], rounded['values'], length, x, None
      )
    return [_drop_padding(np.asarray(out), np.asarray(count))]


def difference(
  workload: Attention | Tower,
  output: list[np.ndarray],
  expected: list[np.ndarray],
) -> float:
  """The largest relative difference, `|x - y| / |y|`; NaN if a result is."""
  if isinstance(workload, Tower):
    output = [_drop_padding(output[0], workload.lengths()[1])]
  errors = [
    float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(y)), 1e-30)
    for x, y in zip(output, expected, strict=True)
  ]
  return float(np.max(errors))  # Not `max`, which passes over NaN.


def _our_attention(workload: Attention, implementation) -> jax_rivals.Attend:
  def attend(query, key, value, start, stop):
    key_range = KeyRange(start, stop, workload.structure)
    return ops.history_attention(
      query, key, value, key_range, implementation=implementation
    )

  return attend


def _attention_x(workload: Attention, arrays):
  return arrays['cotangent' if workload.backward else 'query']


def _attention_rest(workload: Attention, arrays):
  start, stop = map(jnp.asarray, workload.ranges())
  rest = {'key': arrays['key'], 'value': arrays['value']}
  if workload.backward:
    rest['query'] = arrays['query']
  return rest | {'start': start, 'stop': stop}


def _attention_step(
  workload: Attention, attend: jax_rivals.Attend
) -> timing.Step:
  def forward(query, rest):
    return attend(query, **rest), ()

  def backward(cotangent, rest):
    # The forward pass, too, must wait for the call before.
    rest, cotangent = jax.lax.optimization_barrier((rest, cotangent))
    arrays = [rest[k] for k in ('query', 'key', 'value')]
    out, vjp = jax.vjp(
      lambda *arrays: attend(*arrays, rest['start'], rest['stop']), *arrays
    )
    query, key, value = vjp(cotangent)
    return query, (out, key, value)

  return backward if workload.backward else forward


def _attention_program(workload: Attention, inputs, attend: jax_rivals.Attend):
  sets = [
    {k: jnp.asarray(x, workload.dtype) for k, x in arrays.items()}
    for arrays in inputs
  ]
  return timing.JaxProgram(
    _attention_step(workload, attend),
    _attention_x(workload, sets[0]),
    [_attention_rest(workload, arrays) for arrays in sets],
  )


def _our_tower(workload: Tower, inputs, implementation: str | None):
  weights = workload.weights()
  length, count = map(jnp.asarray, workload.lengths())
  module = _fusion(workload, workload.dtype, candidate_tower=implementation)
  tower = jax.jit(module.pack, static_argnames='dtype')(
    _flax_params(weights), dtype=workload.dtype
  )
  params = {'params': jax.tree.map(jnp.asarray, _flax_params(weights))}
  # As `Scorer` does: all candidates count unless some are padding.
  shared = {'tower': tower, 'length': length}
  if workload.ragged:
    shared['count'] = count
  if workload.joint:
    shared['params'] = params

  def cached(x, rest):
    return module.apply(
      params | {'tower': rest['tower']},
      rest['keys'],
      rest['values'],
      rest['length'],
      x,
      None,
      count=rest.get('count'),
      method='score',
    ), ()

  def joint(x, rest):
    # Reading the history, too, must wait for the call before.
    history, x = jax.lax.optimization_barrier((rest['history'], x))
    variables = rest['params'] | {'tower': rest['tower']}
    return module.apply(variables, history, x, rest['length'], None), ()

  step = joint if workload.joint else cached
  return _tower_program(workload, inputs, step, shared)


def _rival_tower(workload: Tower, inputs, dot_product: jax_rivals.Attend):
  shared = {
    'weights': jax_rivals.weights(workload),
    'length': jnp.asarray(workload.lengths()[0]),
  }
  step = functools.partial(jax_rivals.tower, workload, dot_product)
  return _tower_program(workload, inputs, step, shared)


def _tower_program(workload: Tower, inputs, step, shared):
  rests = [
    {k: jnp.asarray(x, workload.dtype) for k, x in arrays.items()} | shared
    for arrays in inputs
  ]
  candidates = [rest.pop('candidates') for rest in rests]
  return timing.JaxProgram(step, candidates[0], rests)


def _fusion(workload: Tower, dtype, **implementations: Any):
  config = EncoderConfig(
    num_layers=workload.num_layers,
    width=workload.width,
    num_heads=workload.num_heads,
    **implementations,
  )
  return fusion.AppendCross(config, jnp.dtype(dtype))


def _flax_params(weights):
  """Of `AppendCross`, whose norms have folded scales of 1 and biases of 0."""
  width = weights['query'].shape[1]
  norm = {
    'scale': np.ones(width, np.float32),
    'bias': np.zeros(width, np.float32),
  }
  params: dict[str, Any] = {
    'final_norm': {
      'scale': weights['final_scale'],
      'bias': weights['final_bias'],
    }
  }
  for i in range(len(weights['query'])):
    block = {'attention_norm': norm, 'mlp_norm': norm}
    for name in ('query', 'key', 'value', 'output', 'mlp_in', 'mlp_out'):
      block[name] = {'kernel': weights[name][i]}
    for name in ('output', 'mlp_in', 'mlp_out'):
      block[name]['bias'] = weights[f'{name}_bias'][i]
    params[f'blocks_{i}'] = block
  return params


def _rounded_weights(workload: Tower):
  return {
    k: _rounded(x, workload.dtype) if x.ndim == 3 else jnp.asarray(x)
    for k, x in workload.weights().items()
  }


def _rounded(x, dtype):
  return jnp.asarray(x, dtype).astype(jnp.float32)


def _drop_padding(x: np.ndarray, count: np.ndarray) -> np.ndarray:
  real = np.arange(x.shape[1])[None, :] < count[:, None]
  return np.where(real[..., None], x, 0)
