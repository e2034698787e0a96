"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops import cpu, devices, dispatch, partition
from histjax.ops.candidate_tower import numba_cpu, reference, xla
from histjax.types import STRUCTURES, KeyRange, Paged, dense


def _over_rows(
  kernel: Callable[..., jax.Array], *, mesh_in_context: bool = False
) -> Callable[..., jax.Array]:
  """The kernel, run by each device on the rows that it holds."""

  def call(*arrays, num_heads, count, final_norm, **options):
    # As in `Call`; weights have no rows, and pools none.
    axes_of: list[Any] = [0, 0, 1, 1, 0, None, 0]
    parts = (*arrays, count)
    axes = []
    for part, axis in zip(parts, axes_of, strict=True):
      if isinstance(part, Paged):
        axes += [None, 0]
      else:
        axes += [axis] * len(jax.tree.leaves(part))
    leaves, tree = jax.tree.flatten(parts)

    def on_leaves(*leaves):
      *arrays, count = jax.tree.unflatten(tree, leaves)
      return kernel(
        *arrays,
        num_heads=num_heads,
        count=count,
        final_norm=final_norm,
        **options,
      )

    return partition.by_rows(
      on_leaves, axes, 0, mesh_in_context=mesh_in_context
    )(*leaves)

  return call


def _of_layer(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A kernel of all layers that is given one of them."""

  def call(candidates, position, keys, values, *rest, layer=None, **options):
    key_range, weights = rest
    keys, values, weights = reference.of_layer(keys, values, weights, layer)
    return kernel(
      candidates, position, keys, values, key_range, weights, **options
    )

  return call


def _of_arrays(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A kernel that does not read pages, given what they hold."""

  def call(candidates, position, keys, values, *rest, **options):
    arrays = dense(keys), dense(values)
    return kernel(candidates, position, *arrays, *rest, **options)

  return call


def _lazy(name: str):
  return dispatch.lazy(f'{__package__}.{name}', 'candidate_tower')


_reads_pages = dispatch.lazy(f'{__package__}.pallas_gpu', 'reads_pages')

# The fastest first; 'xla' computes every call on every device.
_BACKENDS = {
  'pallas_gpu': dispatch.Backend(
    _over_rows(_lazy('pallas_gpu')), devices.check_hopper
  ),
  'pallas_tpu': dispatch.Backend(
    _of_arrays(
      _of_layer(_over_rows(_lazy('pallas_tpu'), mesh_in_context=True))
    ),
    devices.check_tpu,
  ),
  'numba_cpu': dispatch.Backend(
    _of_arrays(_over_rows(numba_cpu.candidate_tower)),
    devices.check_numba,
    numba_cpu.suits,
  ),
  'xla': dispatch.Backend(
    _of_arrays(_of_layer(xla.candidate_tower)), dispatch.any_target
  ),
  'reference': dispatch.Backend(
    _of_arrays(_of_layer(reference.candidate_tower)), dispatch.any_target
  ),
}


def check_name(implementation: str | None, field: str) -> None:
  """Raises ValueError, of this field, at a name that no backend has."""
  dispatch.check_implementation(_BACKENDS, implementation, field)


class Call(NamedTuple):
  """The arrays of a call, or their shapes; see `candidate_tower`."""

  candidates: Any
  position: Any
  keys: Any
  values: Any
  key_range: KeyRange
  weights: reference.TowerWeights
  count: Any


def candidate_tower(
  candidates: Float[Array, 'B C D'],
  position: Int[Array, 'B C'] | None,
  keys: Float[Array, 'layers B L N H'] | Paged,
  values: Float[Array, 'layers B L N H'] | Paged,
  key_range: KeyRange,
  weights: reference.TowerWeights,
  *,
  num_heads: int,
  count: Int[Array, 'B'] | None = None,
  layer: int | None = None,
  final_norm: bool = True,
  implementation: str | None = None,
) -> Float[Array, 'B C D']:
  """Every layer of the candidate path, from the cached keys and values.

      x += Attention(norm(x) W_q + b_q, keys, values) W_o + b_o
      x += gelu(norm(x) W_1 + b_1) W_2 + b_2

  in every layer; the result is the last norm's, or x itself. The attention is
  `ops.history_attention`: each candidate sees one range of the history's keys
  and no other candidate (arXiv 2412.06924), so its result depends on nothing
  but itself and its row's history. Sums are in float32. Works under jit, vmap
  and with `B` sharded; it is for scoring: kernels have no gradients.

  Args:
    candidates: tokens `[B, C, D]`, of the matrices' type or float32.
    position: int32 `[B, C]`, the rotary positions of the queries; None: they
      are not rotated.
    keys: `[layers, B, L, N, H]`, of the matrices' type, rotated already, or
      pages of them, which 'pallas_gpu' reads where they are from D 512 on.
    values: likewise, in the same pages.
    key_range: int32 `[B, C]` each. Its `structure` opens faster paths. Keys
      and values before or after all ranges of their row may hold anything,
      NaN included, unless 'xla' runs with an attention that needs them finite,
      as cuDNN's does; those between must be finite.
    weights: see `TowerWeights`; the matrices are float16, bfloat16 or float32.
    num_heads: N, with `N H = D`.
    count: int32 `[B]`. The result of candidates `c >= count[b]` is zeros, and
      a kernel does not compute it. None: all C count.
    layer: of the weights, the one to compute; keys and values are those of all
      layers, of which 'numba_cpu' and, from D 512 on, 'pallas_gpu' copy none,
      or of this one. None: all.
    final_norm: False: the result is the residual stream, float32, to go on
      with; so a history is read layer by layer, its events as candidates.
    implementation: 'pallas_gpu' (Hopper; bfloat16; D 64 with H 16 or 32 or D
      128 or 256 with H 32 or 64, F a multiple of D; D and F multiples of 256
      from D 512 on, with H 64 or 128), 'pallas_tpu' (bfloat16 or float32; H 4,
      8, 16, 32, 64 or a multiple of 128), 'numba_cpu' (float32; needs
      `histjax[cpu]`), 'xla' (everything, everywhere) or 'reference' (float32,
      readable). None: the fastest that supports the call.

  Returns:
    `[B, C, D]`, of the matrices' type, or float32 without `final_norm`.

  Raises:
    ValueError: an argument is malformed, or no such implementation.
    NotImplementedError: the named implementation cannot compute this call on
      this device; the message says why.
  """
  call = Call(candidates, position, keys, values, key_range, weights, count)
  call = jax.tree.map(jnp.asarray, call)
  dispatch.check_implementation(_BACKENDS, implementation)
  check(call, num_heads, layer)
  if 0 in call.candidates.shape:
    return call.candidates.astype(
      call.weights.query.dtype if final_norm else jnp.float32
    )
  target = dispatch.target_of(call.candidates)
  return _run(call, num_heads, layer, final_norm, implementation, target)[1]


def candidate_tower_backend(
  candidates: Any,
  position: Any,
  keys: Any,
  values: Any,
  key_range: KeyRange,
  weights: reference.TowerWeights,
  *,
  num_heads: int,
  count: Any = None,
  layer: int | None = None,
  final_norm: bool = True,
  implementation: str | None = None,
) -> str:
  """The name of the backend that `candidate_tower` would run.

  Computes nothing. It answers "is the kernel used?"; to learn why not, name it
  as `implementation` and read the error.

  Args:
    candidates: tokens `[B, C, D]`; as all arrays here, or a
      `jax.ShapeDtypeStruct`.
    position: int32 `[B, C]`, or None: queries are not rotated.
    keys: `[layers, B, L, N, H]`, or paged.
    values: as the keys.
    key_range: int32 `[B, C]` each.
    weights: see `TowerWeights`.
    num_heads: N, with `N H = D`.
    count: int32 `[B]`, or None: all C candidates count.
    layer: the one to compute; None: all.
    final_norm: whether the result is the last norm's, or the residual stream.
    implementation: the name of a backend; None: the fastest that supports the
      call.

  Returns:
    'pallas_gpu', 'pallas_tpu', 'numba_cpu', 'xla' or 'reference'.

  Raises:
    ValueError: an argument is malformed, or no such implementation.
    NotImplementedError: the named implementation cannot compute this call on
      this device; the message says why.
  """
  call = Call(candidates, position, keys, values, key_range, weights, count)
  dispatch.check_implementation(_BACKENDS, implementation)
  check(call, num_heads, layer)
  target = dispatch.target_of(candidates)
  name = ''

  def trace(call):
    nonlocal name
    name, out = _run(call, num_heads, layer, final_norm, implementation, target)
    return out

  jax.eval_shape(trace, call)
  return name


def has_cpu_kernel(dtype: Any) -> bool:
  """Whether 'numba_cpu' computes in this type on the target."""
  try:
    devices.check_numba(dispatch.target_of())
    cpu.check_dtype(dtype)
  except NotImplementedError:
    return False
  return True


def tower_reads_pages(
  dtype: Any,
  width: int,
  num_heads: int,
  hidden: int | None,
  page: int,
  *,
  implementation: str | None = None,
) -> bool:
  """Whether the tower of such a model reads pages where they are.

  So does `ops.read_histories` write them. Others copy them first.

  Args:
    dtype: of the matrices.
    width: D.
    num_heads: N.
    hidden: F; None: 4 D.
    page: events of a page.
    implementation: as `candidate_tower`.
  """
  if implementation not in (None, 'pallas_gpu') or dtype != 'bfloat16':
    return False
  try:
    devices.check_hopper(dispatch.target_of())
    return bool(_reads_pages(width, hidden or 4 * width, num_heads, page))
  except NotImplementedError:
    return False


def _run(call: Call, num_heads, layer, final_norm, implementation, target):
  """Runs the named backend, or the first that can; returns its name too."""
  keys, values, key_range = call.keys, call.values, call.key_range
  if not keys.shape[2]:  # One key that nobody sees, instead of none.
    keys, values = dense(keys), dense(values)
    one = [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0)]
    keys, values = jnp.pad(keys, one), jnp.pad(values, one)
    nothing = jnp.zeros_like(key_range.stop)
    key_range = KeyRange(nothing, nothing, 'prefix')
  return dispatch.run(
    'candidate_tower',
    _BACKENDS,
    implementation,
    target,
    call.candidates,
    call.position,
    keys,
    values,
    key_range,
    call.weights,
    num_heads=num_heads,
    count=call.count,
    layer=layer,
    final_norm=final_norm,
  )


def check(call: Call, num_heads: int, layer: int | None) -> None:
  """Raises ValueError at a malformed call."""
  shape, dtype = call.candidates.shape, call.weights.query.dtype
  if len(shape) != 3:
    raise ValueError(f'candidates has shape {shape}; make it [B, C, D]')
  if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
    raise ValueError(
      f'weights.query is {dtype}; cast it to float16, bfloat16 or float32'
    )
  if call.candidates.dtype not in (dtype, jnp.float32):
    raise ValueError(
      f'candidates is {call.candidates.dtype}; cast it to {dtype}, the type of '
      'weights.query, or to float32'
    )
  num_rows, num_candidates, width = shape
  if num_heads < 1 or width < 1 or width % num_heads:
    raise ValueError(
      f'num_heads={num_heads} must be at least 1 and divide D={width}'
    )
  head_dim = width // num_heads
  num_keys = call.keys.shape[2] if len(call.keys.shape) == 5 else 0
  num_layers = len(call.weights.query)
  if layer is not None:
    if not 0 <= layer < num_layers:
      raise ValueError(
        f'layer={layer} must be in [0, {num_layers}), the layers of weights'
      )
    if len(call.keys) == 1:
      num_layers = 1
  cached = (num_layers, num_rows, num_keys, num_heads, head_dim)
  if isinstance(call.keys, Paged) != isinstance(call.values, Paged):
    raise ValueError('keys and values must both be arrays, or both be paged')
  for name, x in (('keys', call.keys), ('values', call.values)):
    _check_array(name, x, '[layers, B, L, N, H]', cached, dtype)
  if call.position is not None and head_dim % 2:
    raise ValueError(
      f'position rotates pairs of channels, and H={head_dim} is odd; pass '
      'None, or make D / num_heads even'
    )
  _check_weights(call.weights, width, dtype)
  for name, x in (
    ('key_range.start', call.key_range.start),
    ('key_range.stop', call.key_range.stop),
    ('position', call.position),
  ):
    if x is not None:
      _check_array(name, x, '[B, C]', (num_rows, num_candidates), jnp.int32)
  if call.count is not None:
    _check_array('count', call.count, '[B]', (num_rows,), jnp.int32)
  if call.key_range.structure not in STRUCTURES:
    raise ValueError(
      f'key_range.structure={call.key_range.structure!r} is unknown; use '
      f"one of {STRUCTURES} that is true; 'any' always is"
    )


def _check_weights(weights, width, dtype):
  shape = weights.mlp_in.shape
  hidden = shape[2] if len(shape) == 3 else 0
  layers, bias = len(weights.query), 3 * width + hidden
  square, vector = (layers, width, width), (width,)
  expected: dict[str, tuple[str, tuple[int, ...], Any]] = {
    'query': ('[layers, D, D]', square, dtype),
    'output': ('[layers, D, D]', square, dtype),
    'mlp_in': ('[layers, D, F]', (layers, width, hidden), dtype),
    'mlp_out': ('[layers, F, D]', (layers, hidden, width), dtype),
    'bias': ('[layers, 3 D + F]', (layers, bias), jnp.float32),
    'final_scale': ('[D]', vector, jnp.float32),
    'final_bias': ('[D]', vector, jnp.float32),
  }
  if weights.sums is not None:
    expected['sums'] = (
      '[layers, D + F]',
      (layers, width + hidden),
      jnp.float32,
    )
  for name, (axes, shape, dtype) in expected.items():
    _check_array(f'weights.{name}', getattr(weights, name), axes, shape, dtype)


def _check_array(name, x, axes, shape, dtype):
  if x.shape != shape or x.dtype != dtype:
    raise ValueError(
      f'{name} is {x.dtype} {x.shape}; with the other arguments it must be '
      f'{jnp.dtype(dtype).name} {axes} = {shape}'
    )
