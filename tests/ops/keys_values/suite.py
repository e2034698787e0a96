"""Random calls of the keys and values."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from histjax.ops.keys_values import reference
from histjax.ops.keys_values.reference import KeyValueWeights
from histjax.types import KeyRange, Paged, dense
from tests.ops.candidate_tower import suite as candidate_tower


def make_call(
  seed: int,
  of_events: tuple[int, int],
  width: int,
  num_heads: int,
  *,
  capacity: int | None = None,
  dtype: str = 'bfloat16',
  stream: str = 'float32',
  ragged: bool = False,
  rotate: bool = True,
  layers: int = 3,
) -> dict:
  """The arguments of a random call of the layer before the last.

  With a capacity events go behind those that are there. The first row of a
  ragged call is empty.
  """
  rng = np.random.default_rng(seed)
  num_rows, num_events = of_events
  placed = capacity is not None
  cached = (
    layers,
    num_rows,
    capacity if placed else num_events,
    num_heads,
    width // num_heads,
  )

  def normal(*shape, dtype=dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)

  def integers(below):
    return rng.integers(0, below, num_rows, dtype=np.int32)

  count = integers(num_events + 1)
  count[:1] = 0
  matrix = rng.normal(size=(layers, width, 2 * width)) / math.sqrt(width)
  return dict(
    events=3 * normal(num_rows, num_events, width, dtype=stream) + 1,
    keys=normal(*cached),
    values=normal(*cached),
    weights=KeyValueWeights(
      matrix=jnp.asarray(matrix, dtype),
      bias=normal(layers, 2 * width, dtype='float32'),
    ),
    layer=layers - 2,
    rotate=rotate,
    start=jnp.asarray(integers(capacity)) if placed else None,
    count=jnp.asarray(count) if ragged else None,
  )


def assert_equals_reference(found, call: dict) -> None:
  """Compares what means something; all else must be finite."""
  expected = reference.keys_values(**call)
  meaning = np.ones(call['keys'].shape[:3], bool)
  if call['start'] is None and call['count'] is not None:
    index = np.arange(call['keys'].shape[2])[None]
    meaning[call['layer']] = index < np.asarray(call['count'])[:, None]
  for name, x, y in zip(('keys', 'values'), found, expected, strict=True):
    np.testing.assert_equal((x.dtype, x.shape), (y.dtype, y.shape))
    x, y = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
    np.testing.assert_array_equal(np.isfinite(x), True, name)
    # Of a result of order 1 to 4, 2^-9 from its rounding and a tenth of the
    # norm's, of which it averages dozens.
    np.testing.assert_allclose(
      x[meaning], y[meaning], rtol=2**-8, atol=0.02, err_msg=name
    )
    others = np.delete(np.arange(len(x)), call['layer'])
    np.testing.assert_array_equal(
      x[others], np.asarray(call[name].astype(jnp.float32))[others], name
    )


def make_histories(
  seed: int, shape: tuple[int, int, int, int], *, causal: bool = True, **fields
) -> dict:
  """The arguments of a random call of `read_histories`.

  Of shape (B, L, N, H); `fields` as `candidate_tower.suite.make_call` takes
  them. Some histories are empty if they are ragged.
  """
  num_rows, num_events, *heads = shape
  tower = candidate_tower.make_call(
    seed, (num_rows, num_events, num_events, *heads), **fields
  )
  event = np.arange(num_events, dtype=np.int32)
  count = np.full(num_rows, num_events, np.int32)
  if tower.count is not None:
    count = np.asarray(tower.count)
  stop = count[:, None] + np.zeros(num_events, np.int32)[None]
  if causal:
    stop = np.minimum(stop, 1 + event[None])
  width, layers = heads[0] * heads[1], len(tower.weights.query)
  call = make_call(
    seed, (1, 1), width, heads[0], dtype=tower.dtype, layers=layers
  )
  return dict(
    events=jnp.asarray(tower.candidates),
    key_range=KeyRange(
      jnp.zeros_like(stop), jnp.asarray(stop), 'causal' if causal else 'prefix'
    ),
    weights=jax.tree.map(jnp.asarray, tower.weights),
    keys_values=call['weights'],
    num_heads=heads[0],
    rotate=tower.position is not None,
    count=None if tower.count is None else jnp.asarray(count),
  )


def paged(call: dict, seed: int = 0, page: int = 16) -> dict:
  """The call, to write into pages of a pool that others have pages of, too.

  Pages without an event that counts are none, as of rows that are padding.
  """
  rng = np.random.default_rng(seed)
  num_rows, num_events, width = call['events'].shape
  layers, heads = len(call['weights'].query), call['num_heads']
  per_row = num_events // page
  number = num_rows * per_row + 3
  index = rng.permutation(number)[: num_rows * per_row].astype(np.int32)
  index = index.reshape(num_rows, per_row)
  if call['count'] is not None:
    begin = np.arange(per_row)[None] * page
    index = np.where(begin < np.asarray(call['count'])[:, None], index, number)
  shape = (layers, number, page, heads, width // heads)
  pool = jnp.full(shape, -7, call['weights'].query.dtype)
  cache = tuple(Paged(pool, jnp.asarray(index)) for _ in range(2))
  return {**call, 'cache': cache}


def assert_writes_its_pages(found, call: dict) -> None:
  """Compares what is in a call's pages; others are as they were."""
  for x, given in zip(found, call['cache'], strict=True):
    np.testing.assert_array_equal(x.index, given.index)
    mine = np.isin(np.arange(x.pool.shape[1]), x.index)
    others = np.asarray(x.pool.astype(jnp.float32))[:, ~mine]
    np.testing.assert_array_equal(others, -7)
  assert_equals_plain_layers([dense(x) for x in found], call)


def assert_equals_plain_layers(found, call: dict) -> None:
  """Compares what means something with dense layers, written for themselves."""
  weights, kv = call['weights'], call['keys_values']
  heads, rotate = call['num_heads'], call['rotate']
  x = np.asarray(call['events'], np.float32)
  num_rows, num_events, width = x.shape
  seen = (
    np.arange(num_events)[None, None]
    < np.asarray(call['key_range'].stop)[..., None]
  )

  def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)

  def split(x):
    return x.reshape(num_rows, num_events, heads, -1)

  def turned(x):
    if not rotate:
      return x
    half = x.shape[-1] // 2
    angle = np.arange(num_events)[:, None] * 10_000.0 ** (
      -np.arange(half) / half
    )
    sin, cos = np.sin(angle)[None, :, None], np.cos(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def gelu(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))

  meaning = np.ones((num_rows, num_events), bool)
  if call['count'] is not None:
    count = np.asarray(call['count'])
    meaning = np.arange(num_events)[None] < count[:, None]
  for i in range(len(weights.query)):
    wq, wo, w1, w2, bias, wkv, bkv = (
      np.asarray(y[i], np.float32)
      for y in (
        weights.query, weights.output, weights.mlp_in, weights.mlp_out,
        weights.bias, kv.matrix, kv.bias,
      )
    )  # fmt: skip
    bq, bo, b1, b2 = np.split(bias, [width, 2 * width, len(bias) - width])
    key, value = np.split(norm(x) @ wkv + bkv, 2, -1)
    key, value = turned(split(key)), split(value)
    for name, y, expected in zip(
      ('keys', 'values'), found, (key, value), strict=True
    ):
      y = np.asarray(y[i].astype(jnp.float32))
      np.testing.assert_array_equal(np.isfinite(y), True, name)
      # As of one layer, and what bfloat16 makes of the layers before.
      np.testing.assert_allclose(
        y[meaning], expected[meaning], rtol=2**-7, atol=0.06, err_msg=name
      )
    query = turned(split(norm(x) @ wq + bq))
    scores = np.einsum('bqnh,bknh->bqkn', query, key) / np.sqrt(width / heads)
    scores = np.where(seen[..., None], scores, -np.inf)
    top = np.maximum(scores.max(2, keepdims=True), -1e30)
    p = np.exp(scores - top)
    p = p / np.maximum(p.sum(2, keepdims=True), 1e-30)
    attended = np.einsum('bqkn,bknh->bqnh', p, value).reshape(x.shape)
    x = x + attended @ wo + bo
    x = x + gelu(norm(x) @ w1 + b1) @ w2 + b2
