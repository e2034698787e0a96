"""What the tests of every backend share: oracles, calls, tolerances."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from histjax import ops
from histjax.types import KeyRange

IMPLEMENTATIONS = ('reference', 'xla', 'cudnn', 'pallas_gpu', 'pallas_tpu')
STRUCTURES = ('any', 'prefix', 'causal')

# {dtype: (of outputs, of gradients)}, relative and absolute. Inputs are of
# order 1 and already rounded, so this is the rounding of the computation. A
# gradient is a sum of up to a few hundred terms of order 1.
TOLERANCE = {
  'float64': (1e-12, 1e-11),  # 2^-53, times the terms.
  'float32': (5e-6, 5e-5),  # 2^-24, times the terms; exp differs by ulps.
  'float16': (4e-3, 2e-2),  # 2^-11: weights and outputs are rounded to it.
  'bfloat16': (2e-2, 1e-1),  # 2^-8: likewise.
}


@dataclasses.dataclass(frozen=True)
class Call:
  """Arguments of one call, in NumPy; `cotangent` is the output's."""

  query: np.ndarray
  key: np.ndarray
  value: np.ndarray
  cotangent: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  structure: str

  @property
  def key_range(self) -> KeyRange:
    return KeyRange(
      jnp.asarray(self.start), jnp.asarray(self.stop), self.structure
    )

  def replace(self, **fields) -> Call:
    return dataclasses.replace(self, **fields)

  def edit(self, **functions) -> Call:
    """A copy whose named arrays went through in-place functions."""
    fields = {}
    for name, function in functions.items():
      fields[name] = getattr(self, name).copy()
      function(fields[name])
    return self.replace(**fields)


def make_call(
  seed: int,
  shape: tuple[int, int, int, int, int],
  structure: str = 'any',
  dtype: str = 'float32',
) -> Call:
  """A random call of shape (B, Q, L, N, H); some of its ranges are empty."""
  num_rows, num_queries, num_keys, num_heads, head_dim = shape
  rng = np.random.default_rng(seed)

  def normal(length):
    x = rng.normal(size=(num_rows, length, num_heads, head_dim))
    return x.astype(jnp.dtype(dtype))

  if structure == 'any':
    start, stop = rng.integers(
      -2, num_keys + 3, (2, num_rows, num_queries), dtype=np.int32
    )
  else:
    length = rng.integers(0, num_keys + 1, num_rows, dtype=np.int32)
    length[rng.integers(num_rows)] = num_keys
    start, stop = structured(length, num_queries, num_keys, structure)
  arrays = [normal(t) for t in (num_queries, num_keys, num_keys, num_queries)]
  return Call(*arrays, start, stop, structure)


def structured(length, num_queries: int, num_keys: int, structure: str):
  """The ranges that `KeyRange.structure` promises, query by query."""
  stop = np.zeros((len(length), num_queries), np.int32)
  for b, n in enumerate(length):
    for q in range(num_queries):
      sees_past_only = structure == 'causal' and q < num_keys
      stop[b, q] = min(q + 1, n) if sees_past_only else n
  return np.zeros_like(stop), stop


def ranges(num_rows: int, num_queries: int, num_keys: int):
  """A hypothesis strategy of any `start` or `stop`."""
  return hypothesis_numpy.arrays(
    np.int32,
    (num_rows, num_queries),
    elements=st.integers(-2, num_keys + 2),
  )


def visible(call: Call, b: int, q: int) -> slice:
  """The keys that a query sees."""
  start = max(int(call.start[b, q]), 0)
  return slice(start, max(min(int(call.stop[b, q]), call.key.shape[1]), start))


def oracle(call: Call, scale: float | None = None):
  """Output and gradients in float64, one query and head at a time."""
  query, key, value, cotangent = (
    np.asarray(x, np.float64)
    for x in (call.query, call.key, call.value, call.cotangent)
  )
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  out, d_query = np.zeros_like(query), np.zeros_like(query)
  d_key, d_value = np.zeros_like(key), np.zeros_like(value)
  for b, q, n in np.ndindex(*query.shape[:3]):
    seen = visible(call, b, q)
    if seen.start == seen.stop:
      continue
    k, v, g = key[b, seen, n], value[b, seen, n], cotangent[b, q, n]
    scores = scale * (k @ query[b, q, n])
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    out[b, q, n] = weights @ v
    d_scores = weights * (v @ g - out[b, q, n] @ g)
    d_query[b, q, n] = scale * (d_scores @ k)
    d_key[b, seen, n] += scale * np.outer(d_scores, query[b, q, n])
    d_value[b, seen, n] += np.outer(weights, g)
  return out, (d_query, d_key, d_value)


def attend(call: Call, implementation: str | None, scale=None):
  """The output, jitted."""
  return _attend(
    call.query,
    call.key,
    call.value,
    call.key_range,
    scale=scale,
    implementation=implementation,
  )


def attend_with_gradients(call: Call, implementation: str | None, scale=None):
  """The output and the gradients of query, key and value, jitted."""
  return _attend_with_gradients(
    call.query,
    call.key,
    call.value,
    call.cotangent,
    call.key_range,
    scale=scale,
    implementation=implementation,
  )


def gradients(
  query,
  key,
  value,
  cotangent,
  key_range: KeyRange,
  *,
  implementation,
  scale=None,
  wrap=lambda f: f,
):
  """The output and the gradients, of `wrap`ped attention."""

  def function(query, key, value):
    return ops.history_attention(
      query, key, value, key_range, scale=scale, implementation=implementation
    )

  out, pull = jax.vjp(wrap(function), query, key, value)
  return out, pull(cotangent)


# One function each, so that a call of a shape is compiled once for all tests.
_STATIC = ('scale', 'implementation')
_attend = jax.jit(ops.history_attention, static_argnames=_STATIC)
_attend_with_gradients = jax.jit(gradients, static_argnames=_STATIC)


def refusal(call: Call, implementation: str) -> str | None:
  """What NotImplementedError must say of this call here; None: it runs."""
  if implementation == 'pallas_tpu':
    if jax.devices()[0].platform != 'tpu':
      return 'needs a TPU'
    narrow_or_wide = call.query.dtype not in (jnp.bfloat16, jnp.float32)
    return 'bfloat16 or float32' if narrow_or_wide else None
  if implementation not in ('cudnn', 'pallas_gpu'):
    return None
  device = jax.devices()[0]
  if 'cuda' not in device.client.platform_version.lower():
    return 'needs an NVIDIA GPU'
  if implementation == 'pallas_gpu' and device.compute_capability != '9.0':
    return 'written for NVIDIA Hopper'
  if implementation == 'pallas_gpu' and jax.__version_info__ < (0, 11):
    return 'needs the Mosaic GPU of JAX'
  if implementation == 'cudnn' and call.structure == 'any':
    return "structure='any'"
  if call.query.dtype.itemsize != 2:
    return '16 bits'
  if implementation == 'cudnn' and call.query.shape[-1] % 8:
    return 'multiple of 8'
  return None


class BackendTestCase(parameterized.TestCase):
  """Computes products in the inputs' precision on every platform."""

  def setUp(self):
    super().setUp()
    # GPUs and TPUs round float32 factors unless told not to.
    self.enter_context(jax.default_matmul_precision('highest'))

  def runs(self, call: Call, implementation: str) -> bool:
    """Whether the backend takes the call; asserts its refusal if not."""
    reason = refusal(call, implementation)
    if reason is None:
      return True
    with self.assertRaisesRegex(NotImplementedError, reason):
      attend(call, implementation)
    return False

  def assert_close(self, actual, expected, dtype, *, gradient=False):
    """Compares trees leaf by leaf and checks the dtype of `actual`."""
    tolerance = TOLERANCE[dtype][gradient]
    for a, e in zip(
      jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
      self.assertEqual(a.dtype, jnp.dtype(dtype))
      np.testing.assert_allclose(
        np.asarray(a, np.float64),
        np.asarray(e, np.float64),
        rtol=tolerance,
        atol=tolerance,
      )

  def assert_same(self, actual, expected, implementation):
    """Compares an output and its gradients bit by bit.

    cuDNN adds up a gradient in an order that changes from run to run.
    """
    np.testing.assert_array_equal(actual[0], expected[0])
    if implementation == 'cudnn':
      dtype = str(actual[0].dtype)
      self.assert_close(actual[1], expected[1], dtype, gradient=True)
    else:
      for a, e in zip(actual[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, e)


def double_precision(dtype: str):
  """A context in which float64 arrays stay float64."""
  if dtype == 'float64':
    return jax.enable_x64(True)
  return contextlib.nullcontext()
