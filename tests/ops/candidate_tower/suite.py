"""Random calls of the candidate tower and its float64 oracle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from histjax import ops
from histjax.types import KeyRange, Paged

# Absolute, of outputs of order 1 after two or three layers of inputs that are
# already rounded: the rounding of the computation, some 20 of them deep.
TOLERANCE = {
  # 2^-24, times the terms, and the angles, hundreds of radians: with 333 keys
  # 'reference' errs by 2.1e-5. exp and tanh differ by ulps.
  'float32': 3e-5,
  'float16': 2e-2,  # 2^-11: products are rounded to it.
  'bfloat16': 1e-1,  # 2^-8: likewise.
}


@dataclasses.dataclass(frozen=True)
class Call:
  """Arguments of one call, in NumPy."""

  candidates: np.ndarray
  position: np.ndarray | None
  keys: np.ndarray
  values: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  structure: str
  weights: ops.TowerWeights
  num_heads: int
  count: np.ndarray | None
  final_norm: bool
  layer: int | None = None

  @property
  def dtype(self) -> str:
    return str(self.keys.dtype)

  @property
  def key_range(self) -> KeyRange:
    return KeyRange(self.start, self.stop, self.structure)

  @property
  def counts(self) -> np.ndarray:
    """Which candidates count, `[B, C]`."""
    num_rows, num_candidates = self.candidates.shape[:2]
    count = np.full(num_rows, num_candidates)
    count = count if self.count is None else self.count
    return np.arange(num_candidates)[None, :] < count[:, None]

  @property
  def positional(self) -> tuple:
    return (
      self.candidates,
      self.position,
      self.keys,
      self.values,
      self.key_range,
      self.weights,
    )

  def replace(self, **fields) -> Call:
    return dataclasses.replace(self, **fields)

  def candidates_at(self, index) -> Call:
    """A call with the candidates `index` of each row, in that order."""
    return self.replace(
      candidates=self.candidates[:, index],
      position=None if self.position is None else self.position[:, index],
      start=self.start[:, index],
      stop=self.stop[:, index],
    )

  def rows_at(self, index) -> Call:
    """A call with the rows `index`, in that order."""
    return self.replace(
      candidates=self.candidates[index],
      position=None if self.position is None else self.position[index],
      keys=self.keys[:, index],
      values=self.values[:, index],
      start=self.start[index],
      stop=self.stop[index],
      count=None if self.count is None else self.count[index],
    )


def make_call(
  seed: int,
  shape: tuple[int, int, int, int, int],
  *,
  num_layers: int = 2,
  structure: str = 'any',
  dtype: str = 'float32',
  rotate: bool = True,
  ragged: bool = False,
  mlp_width: int | None = None,
  residual: bool = False,
) -> Call:
  """A random call of shape (B, C, L, N, H); some of its ranges are empty.

  Args:
    seed: of everything.
    shape: B, C, L, N and H.
    num_layers: at least 1.
    structure: of the key range: 'any' or 'prefix'.
    dtype: of arrays and matrices.
    rotate: whether there are positions.
    ragged: whether there is a count.
    mlp_width: F; None: 4 D.
    residual: whether the call takes and gives a float32 residual stream.
  """
  num_rows, num_candidates, num_keys, num_heads, head_dim = shape
  rng = np.random.default_rng(seed)
  width = num_heads * head_dim
  cached = (num_layers, num_rows, num_keys, num_heads, head_dim)

  def normal(*shape):
    return rng.normal(size=shape).astype(jnp.dtype(dtype))

  of_candidates = (num_rows, num_candidates)
  if structure == 'any':
    start, stop = rng.integers(
      -2, num_keys + 3, (2, *of_candidates), dtype=np.int32
    )
  else:
    length = rng.integers(0, num_keys + 1, num_rows, dtype=np.int32)
    length[rng.integers(num_rows)] = num_keys
    start = np.zeros(of_candidates, np.int32)
    stop = np.repeat(length[:, None], num_candidates, axis=1)
  position = rng.integers(0, 2 * num_keys + 1, of_candidates, dtype=np.int32)
  count = rng.integers(0, num_candidates + 1, num_rows, dtype=np.int32)
  candidates = normal(*of_candidates, width)
  return Call(
    candidates=candidates.astype(np.float32) if residual else candidates,
    position=position if rotate else None,
    keys=normal(*cached),
    values=normal(*cached),
    start=start,
    stop=stop,
    structure=structure,
    weights=make_weights(rng, num_layers, width, mlp_width, dtype),
    num_heads=num_heads,
    count=count if ragged else None,
    final_norm=not residual,
  )


def make_weights(
  rng: np.random.Generator,
  num_layers: int,
  width: int,
  mlp_width: int | None = None,
  dtype: str = 'float32',
) -> ops.TowerWeights:
  """Weights that keep activations of order 1; no bias is zero."""
  hidden = mlp_width or 4 * width

  def matrix(rows, columns, gain=1.0):
    x = rng.normal(size=(num_layers, rows, columns)) * gain / math.sqrt(rows)
    return x.astype(jnp.dtype(dtype))

  def vector(*shape):
    return (0.1 * rng.normal(size=shape)).astype(np.float32)

  return ops.TowerWeights(
    query=matrix(width, width, gain=1.5),
    output=matrix(width, width),
    mlp_in=matrix(width, hidden),
    mlp_out=matrix(hidden, width),
    bias=vector(num_layers, 3 * width + hidden),
    final_scale=1 + vector(width),
    final_bias=vector(width),
  )


def poisoned(call: Call, poison: float) -> Call:
  """Writes `poison` before and after all ranges of each row."""
  keys, values = call.keys.copy(), call.values.copy()
  for b in range(call.candidates.shape[0]):
    some = call.start[b] < call.stop[b]
    first = max(call.start[b][some].min(initial=keys.shape[2]), 0)
    last = max(call.stop[b][some].max(initial=0), 0)
    for x in (keys, values):
      x[:, b, :first] = poison
      x[:, b, last:] = poison
  return call.replace(keys=keys, values=values)


def paged(call: Call, seed: int = 0, page: int = 16) -> Call:
  """The same call with keys and values in pages of a pool, in any order.

  What is behind a row's last key, and pages of nobody, is NaN; a row's last
  entries may name pages that do not exist, if none of its keys are there.
  """
  rng = np.random.default_rng(seed)
  layers, rows, events, *heads = call.keys.shape
  per_row = -(-events // page)
  number = rows * per_row + 3
  index = rng.permutation(number)[: rows * per_row].astype(np.int32)
  index = index.reshape(rows, per_row)

  def pool(x):
    after = per_row * page - events
    x = np.pad(x, [(0, after if i == 2 else 0) for i in range(5)])
    x[:, :, events:] = np.nan
    pages = np.full((layers, number, page, *heads), np.nan, x.dtype)
    pages[:, index] = x.reshape(layers, rows, per_row, page, *heads)
    return pages

  pools = pool(call.keys), pool(call.values)
  last = np.where(call.start < call.stop, call.stop, 0).max(axis=1)
  unused = np.arange(per_row)[None] * page >= last[:, None]
  index = np.where(unused, number + 5, index)
  keys, values = (Paged(x, index) for x in pools)
  stop = np.minimum(call.stop, events)  # L is that of all pages.
  return call.replace(keys=keys, values=values, stop=stop)


def oracle(call: Call) -> np.ndarray:
  """The result in float64, one candidate at a time."""
  weights = jax.tree.map(lambda x: np.asarray(x, np.float64), call.weights)
  out = np.zeros(call.candidates.shape)
  for b, c in np.argwhere(call.counts):
    x = np.asarray(call.candidates[b, c], np.float64)
    for layer in range(len(weights.query)):
      x = _layer(call, weights, layer, b, c, x)
    if call.final_norm:
      x = _norm(x) * weights.final_scale + weights.final_bias
    out[b, c] = x
  return out


def _layer(call, weights, layer, b, c, x):
  width, hidden = weights.mlp_in.shape[1:]
  head_dim = width // call.num_heads
  bias = weights.bias[layer]
  query = _norm(x) @ weights.query[layer] + bias[:width]
  query = query.reshape(call.num_heads, head_dim)
  if call.position is not None:
    query = _turn(query, call.position[b, c])
  first = max(call.start[b, c], 0)
  seen = slice(first, max(call.stop[b, c], first))
  keys = np.asarray(call.keys[layer, b, seen], np.float64)
  values = np.asarray(call.values[layer, b, seen], np.float64)
  attended = np.zeros_like(query)
  for n in range(call.num_heads if len(keys) else 0):
    score = keys[:, n] @ query[n] / math.sqrt(head_dim)
    weight = np.exp(score - score.max())
    attended[n] = weight @ values[:, n] / weight.sum()
  x = x + attended.reshape(-1) @ weights.output[layer] + bias[width : 2 * width]
  u = _norm(x) @ weights.mlp_in[layer] + bias[2 * width : 2 * width + hidden]
  # The tanh form of GELU.
  u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
  return x + u @ weights.mlp_out[layer] + bias[2 * width + hidden :]


def _norm(x):
  return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def _turn(query, position):
  half = query.shape[1] // 2
  out = np.empty_like(query)
  for i in range(half):
    angle = position * 10_000.0 ** (-i / half)
    a, b = query[:, i], query[:, i + half]
    out[:, i] = a * math.cos(angle) - b * math.sin(angle)
    out[:, i + half] = b * math.cos(angle) + a * math.sin(angle)
  return out


def run(call: Call, implementation: str | None) -> np.ndarray:
  """The result through the public function, jitted."""
  return np.asarray(
    _tower(
      *call.positional,
      num_heads=call.num_heads,
      count=call.count,
      layer=call.layer,
      final_norm=call.final_norm,
      implementation=implementation,
    )
  )


def layer_by_layer(call: Call, way: str, tower: Tower) -> np.ndarray:
  """As `tower(call)`, one layer after the other.

  `way`: a layer's weights and its keys and values 'sliced' for it; these
  'alone'; or all of them, 'of all', where it must not read those of others.
  """
  x, num_layers = call.candidates, len(call.keys)
  for i in range(num_layers):
    last = i == num_layers - 1
    layer = call.replace(candidates=x, final_norm=last, layer=i)
    if way == 'of all':
      other = (np.arange(num_layers) != i)[:, None, None, None, None]
      keys, values = (
        np.where(other, np.nan, y).astype(y.dtype)
        for y in (call.keys, call.values)
      )
    else:
      keys, values = call.keys[i][None], call.values[i][None]
    layer = layer.replace(keys=keys, values=values)
    if way == 'sliced':
      layer = layer.replace(weights=call.weights.layer(i), layer=None)
    x = tower(layer)
  return x


# One function, so that a call of a shape is compiled once for all tests.
_tower = jax.jit(
  ops.candidate_tower,
  static_argnames=('num_heads', 'layer', 'final_norm', 'implementation'),
)

Tower = Callable[[Call], np.ndarray]


def assert_equals_oracle(tower: Tower, call: Call) -> None:
  """Compares with the oracle; checks the type and the zeros.

  `tower` may be given the call in another form.
  """
  found = tower(call)
  dtype = call.dtype if call.final_norm else 'float32'
  assert found.dtype == dtype, found.dtype
  np.testing.assert_array_equal(found[~call.counts], 0)
  # A norm divides by the deviation, which few channels may make small.
  narrow = max(1, 8 / found.shape[-1])
  np.testing.assert_allclose(
    found.astype(np.float64),
    oracle(call),
    rtol=0,
    atol=narrow * TOLERANCE[call.dtype],
  )


def assert_same(found, expected, call: Call) -> None:
  """Compares results of one computation that was cut in another way."""
  np.testing.assert_allclose(
    np.asarray(found, np.float64),
    np.asarray(expected, np.float64),
    rtol=0,
    atol=TOLERANCE[call.dtype],
  )
