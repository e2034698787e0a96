"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax.ops import devices, dispatch, partition
from histjax.ops.interaction_head import numba_cpu, reference
from histjax.ops.interaction_head.weights import HeadWeights


def _over_rows(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """The kernel, run by each device on the rows that it holds."""

  def call(user, features, readout, weights, *, count):
    leaves, tree = jax.tree.flatten((weights, count))
    axes = [None] * len(jax.tree.leaves(weights)) + [0] * (count is not None)

    def on_leaves(user, features, readout, *leaves):
      weights, count = jax.tree.unflatten(tree, leaves)
      return kernel(user, features, readout, weights, count=count)

    return partition.by_rows(on_leaves, [0, 0, 0, *axes], 0)(
      user, features, readout, *leaves
    )

  return call


# The fastest first; 'reference' computes every call on every device.
_BACKENDS = {
  'pallas_gpu': dispatch.Backend(
    _over_rows(dispatch.lazy(f'{__package__}.pallas_gpu', 'interaction_head')),
    devices.check_hopper,
  ),
  'numba_cpu': dispatch.Backend(
    _over_rows(numba_cpu.interaction_head),
    devices.check_numba,
    numba_cpu.suits,
  ),
  'reference': dispatch.Backend(
    reference.interaction_head, dispatch.any_target
  ),
}


def interaction_head(
  user: Float[Array, 'B U'],
  features: Float[Array, 'B C F'],
  readout: Float[Array, 'B C D'],
  weights: HeadWeights,
  *,
  count: Int[Array, 'B'] | None = None,
  implementation: str | None = None,
  kernels_only: bool = False,
) -> Float[Array, 'B C T']:
  """The logits of `nn.interaction.InteractionHead`, from packed parameters.

      x_0     = [user ; features ; readout]
      x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l
      logits  = W [x_L ; MLP(x_0)] + b

  The module is the definition and what trains; this is for scoring where there
  is a kernel, which has no gradients. Sums are in float32, and so is what the
  module rounds between an operation and the next. Works under jit, vmap and
  with `B` sharded.

  Args:
    user: `[B, U]`.
    features: `[B, C, F]`, of the candidates, of the same type.
    readout: `[B, C, D]`, of the same type.
    weights: see `HeadWeights`; its `tiles` are of that type.
    count: int32 `[B]`. Logits of candidates `c >= count[b]` are finite but mean
      nothing, and need not be computed. None: all C count.
    implementation: 'pallas_gpu' (Hopper; bfloat16, D a multiple of 64, at most
      256 channels in the MLP's layers and a rank of at most 128), 'numba_cpu'
      (float32; needs Numba) or 'reference' (float32, everywhere, readable).
      None: the fastest that supports the call.
    kernels_only: 'reference' is not picked; a call without a kernel raises.

  Returns:
    `[B, C, T]` float32.

  Raises:
    ValueError: an argument is malformed, or no such implementation.
    NotImplementedError: the named implementation, or with `kernels_only` any,
      cannot compute this call on this device; the message says why.
  """
  user, features, readout = map(jnp.asarray, (user, features, readout))
  count = None if count is None else jnp.asarray(count)
  _check(user, features, readout, weights, count)
  dispatch.check_implementation(_BACKENDS, implementation)
  if 0 in readout.shape[:2]:
    return jnp.zeros((*readout.shape[:2], weights.shape.tasks), jnp.float32)
  backends = dict(_BACKENDS)
  if kernels_only and implementation is None:
    del backends['reference']
  return dispatch.run(
    'interaction_head',
    backends,
    implementation,
    dispatch.target_of(readout),
    user,
    features,
    readout,
    weights,
    count=count,
  )[1]


def _check(user, features, readout, weights, count):
  """Raises ValueError at a malformed call."""
  if readout.ndim != 3:
    raise ValueError(f'readout has shape {readout.shape}; make it [B, C, D]')
  shape, (num_rows, num_candidates, _) = weights.shape, readout.shape
  dtype = weights.tiles.dtype
  of_candidates = (num_rows, num_candidates)
  expected: dict[str, tuple[Any, str, tuple[int, ...], Any]] = {
    'user': (user, '[B, U]', (num_rows, shape.user), dtype),
    'features': (
      features, '[B, C, F]', (*of_candidates, shape.features), dtype
    ),
    'readout': (readout, '[B, C, D]', (*of_candidates, shape.readout), dtype),
    'count': (count, '[B]', (num_rows,), jnp.int32),
  }  # fmt: skip
  for name, (x, axes, sizes, wanted) in expected.items():
    if x is not None and (x.shape != sizes or x.dtype != wanted):
      raise ValueError(
        f'{name} is {x.dtype} {x.shape}; with the weights and the other '
        f'arguments it must be {jnp.dtype(wanted).name} {axes} = {sizes}'
      )
