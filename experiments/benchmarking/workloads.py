"""The named workloads that benchmarks time and tests run small versions of.

workload = workloads.TOWER['batch_128']
workload.flops(), workload.num_bytes()      # counted, not measured
data = workload.inputs(seed=0)              # NumPy, float32
workload.small()                            # for a test
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Attention:
  """One call of `ops.history_attention`.

  Attributes:
    num_rows: B.
    num_queries: Q.
    num_keys: L.
    head_dim: H.
    mask: what query i sees. 'full': all keys. 'causal': the joint pass, keys
      up to i, and all of them where i >= L. 'window': the last `window` of
      those.
    backward: with the gradients of query, key and value.
    num_heads: N.
    window: see `mask`.
    dtype: of the arrays.
  """

  num_rows: int
  num_queries: int
  num_keys: int
  head_dim: int
  mask: Literal['full', 'causal', 'window'] = 'full'
  backward: bool = False
  num_heads: int = 4
  window: int = 128
  dtype: str = 'bfloat16'

  def ranges(self) -> tuple[np.ndarray, np.ndarray]:
    """int32 start and stop, `[B, Q]`."""
    stop = np.full(self.num_queries, self.num_keys)
    if self.mask != 'full':
      stop = np.minimum(np.arange(1, self.num_queries + 1), self.num_keys)
    start = np.zeros_like(stop)
    if self.mask == 'window':
      start = np.maximum(stop - self.window, 0)
    shape = (self.num_rows, self.num_queries)
    start, stop = (
      np.array(np.broadcast_to(x, shape), np.int32) for x in (start, stop)
    )
    return start, stop

  @property
  def structure(self) -> Literal['prefix', 'causal', 'any']:
    """Of the ranges, as `KeyRange.structure`."""
    if self.mask == 'window':
      return 'any'
    return 'prefix' if self.mask == 'full' else 'causal'

  def pairs(self) -> int:
    """Query-key pairs that are seen, over rows and heads."""
    start, stop = self.ranges()
    return self.num_heads * int((stop - start).sum(dtype=np.int64))

  def flops(self) -> float:
    """`4 H` a pair; backward recomputes one product and adds four, `14 H`."""
    return (14 if self.backward else 4) * self.head_dim * self.pairs()

  def exponentials(self) -> float:
    """One a pair, and one more in the backward pass."""
    return (2 if self.backward else 1) * self.pairs()

  def num_bytes(self) -> float:
    """Each array moved once: q, k, v, o; backward those again and four more."""
    query = self.num_rows * self.num_queries * self.num_heads * self.head_dim
    key = self.num_rows * self.num_keys * self.num_heads * self.head_dim
    moved = 2 * query + 2 * key
    if self.backward:
      moved += 4 * query + 4 * key
    return float(moved * _itemsize(self.dtype))

  def inputs(self, seed: int) -> dict[str, np.ndarray]:
    """float32 `query`, `key`, `value` and `cotangent`."""
    rng = np.random.default_rng(seed)
    query = (self.num_rows, self.num_queries, self.num_heads, self.head_dim)
    key = (self.num_rows, self.num_keys, self.num_heads, self.head_dim)
    shapes = {'query': query, 'key': key, 'value': key, 'cotangent': query}
    return {k: _normal(rng, shape) for k, shape in shapes.items()}

  def small(self) -> Attention:
    """The same in a size for tests: odd, and more than one block of nothing."""
    return dataclasses.replace(
      self,
      num_rows=min(self.num_rows, 2),
      num_queries=37 if self.num_queries <= self.num_keys else 60,
      num_keys=23,
      window=5,
    )


@dataclasses.dataclass(frozen=True)
class Tower:
  """Scoring without embeddings and head: tokens in, readouts out.

  Attributes:
    num_rows: B, users.
    num_candidates: C.
    num_events: L.
    width: D; the MLP has `4 D`.
    joint: the history is read as well, causally; False: its keys and values
      are cached.
    ragged: lengths are uniform in `[0, L]`, candidates in `[1, C]`.
    num_heads: N.
    num_layers: of the Transformer.
    dtype: of tokens, keys, values and matrices.
  """

  num_rows: int
  num_candidates: int
  num_events: int
  width: int
  joint: bool = False
  ragged: bool = False
  num_heads: int = 4
  num_layers: int = 4
  dtype: str = 'bfloat16'

  @property
  def head_dim(self) -> int:
    """H."""
    return self.width // self.num_heads

  @property
  def hidden(self) -> int:
    """F, the width of the MLP."""
    return 4 * self.width

  def lengths(self) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[B]` each: events and candidates of every user."""
    length = np.full(self.num_rows, self.num_events, np.int32)
    count = np.full(self.num_rows, self.num_candidates, np.int32)
    if self.ragged:
      rng = np.random.default_rng(7)
      length = rng.integers(0, length + 1, dtype=np.int32)
      count = rng.integers(1, count + 1, dtype=np.int32)
    return length, count

  def pairs(self) -> int:
    """Candidate-event pairs over rows, for one layer and head."""
    length, count = (x.astype(np.int64) for x in self.lengths())
    return int((length * count).sum())

  def flops(self) -> float:
    """Of what must be computed; padding is not counted.

    A token's products take `2 (2 D^2 + 2 D F)` a layer and its attention
    `4 D` a key seen. Joint: an event's also `4 D^2` for key and value, in the
    last layer those alone, and a causal history has `n (n + 1) / 2` pairs.
    """
    layers, width = self.num_layers, self.width
    length, count = (x.astype(np.int64) for x in self.lengths())
    token = 4 * width**2 + 4 * width * self.hidden
    flops = layers * (count.sum() * token + 4 * width * self.pairs())
    if self.joint:
      causal = (length * (length + 1) // 2).sum()
      flops += layers * length.sum() * 4 * width**2
      flops += (layers - 1) * (length.sum() * token + 4 * width * causal)
    return float(flops)

  def exponentials(self) -> float:
    """Of softmax, one a head and pair, and of GELU, one a hidden channel."""
    length, count = (x.astype(np.int64) for x in self.lengths())
    layers, heads = self.num_layers, self.num_heads
    number = layers * (heads * self.pairs() + count.sum() * self.hidden)
    if self.joint:
      causal = (length * (length + 1) // 2).sum()
      number += (layers - 1) * (heads * causal + length.sum() * self.hidden)
    return float(number)

  def num_bytes(self) -> float:
    """Tokens in, readouts out, weights; cached: keys and values, too."""
    length, count = (x.astype(np.int64).sum() for x in self.lengths())
    matrices = 2 * self.width**2 + 2 * self.width * self.hidden
    if self.joint:
      matrices += 2 * self.width**2
    moved = 2 * count * self.width + self.num_layers * matrices
    cached = 1 if self.joint else 2 * self.num_layers
    moved += cached * length * self.width
    return float(moved * _itemsize(self.dtype))

  def inputs(self, seed: int) -> dict[str, np.ndarray]:
    """float32 tokens `candidates`, and `history` or `keys` and `values`."""
    rng = np.random.default_rng(seed)
    rows = self.num_rows
    shapes: dict[str, tuple[int, ...]] = {
      'candidates': (rows, self.num_candidates, self.width)
    }
    if self.joint:
      shapes['history'] = (rows, self.num_events, self.width)
    else:
      cached = (rows, self.num_events, self.num_heads, self.head_dim)
      shapes['keys'] = shapes['values'] = (self.num_layers, *cached)
    return {k: _normal(rng, shape) for k, shape in shapes.items()}

  def weights(self) -> dict[str, np.ndarray]:
    """float32; matrices and biases of all layers, norms folded into them.

    Returns:
      `query`, `key`, `value`, `output` `[layers, D, D]`, `mlp_in`
      `[layers, D, F]`, `mlp_out` `[layers, F, D]`, `output_bias`,
      `mlp_in_bias`, `mlp_out_bias`, `final_scale` and `final_bias` `[D]`.
    """
    rng = np.random.default_rng(1)
    layers, width, hidden = self.num_layers, self.width, self.hidden
    square = (layers, width, width)
    weights: dict[str, Any] = {
      'query': 1.5 * _normal(rng, square) * width**-0.5,
      'key': _normal(rng, square) * width**-0.5,
      'value': _normal(rng, square) * width**-0.5,
      'output': _normal(rng, square) * width**-0.5,
      'mlp_in': _normal(rng, (layers, width, hidden)) * width**-0.5,
      'mlp_out': _normal(rng, (layers, hidden, width)) * hidden**-0.5,
      'output_bias': 0.1 * _normal(rng, (layers, width)),
      'mlp_in_bias': 0.1 * _normal(rng, (layers, hidden)),
      'mlp_out_bias': 0.1 * _normal(rng, (layers, width)),
      'final_scale': 1 + 0.1 * _normal(rng, (width,)),
      'final_bias': 0.1 * _normal(rng, (width,)),
    }
    return {k: np.asarray(v, np.float32) for k, v in weights.items()}

  def small(self) -> Tower:
    """The same in a size for tests."""
    return dataclasses.replace(
      self,
      num_rows=min(self.num_rows, 3),
      num_candidates=13,
      num_events=21,
      width=32,
      num_layers=2,
    )


@dataclasses.dataclass(frozen=True)
class Request:
  """A whole model: ids in, logits out; or one update of its parameters.

  Attributes:
    num_rows: users scored or trained on at once.
    num_candidates: C.
    num_events: L.
    width: D.
    num_layers: of the Transformer.
    num_heads: N.
    dtype: of the computation.
  """

  num_rows: int
  num_candidates: int
  num_events: int
  width: int
  num_layers: int = 4
  num_heads: int = 4
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'

  def small(self) -> Request:
    """The same in a size for tests."""
    return dataclasses.replace(
      self,
      num_rows=min(self.num_rows, 2),
      num_candidates=5,
      num_events=16,
      width=16,
      num_heads=2,
      num_layers=1,
    )


@dataclasses.dataclass(frozen=True)
class TrainRows:
  """Updates on a log of events, all of which are candidates.

  Attributes:
    num_users: users.
    events_per_user: the mean; all have it, or `heavy_tailed`.
    history_length: of a candidate, at most.
    width: D.
    heavy_tailed: users' events are log-normal, with a sigma of 1.3.
    max_candidates: of a streaming row.
    request: events of a request.
    num_items: rows of the largest table.
    batch_events: as `PipelineConfig`.
    auto_buckets: likewise.
    num_layers: of the Transformer.
    num_heads: N.
    dtype: of the computation.
  """

  num_users: int
  events_per_user: int
  history_length: int
  width: int
  heavy_tailed: bool = False
  max_candidates: int = 200
  request: int = 5
  num_items: int = 20_000
  batch_events: int = 8192
  auto_buckets: int = 4
  num_layers: int = 2
  num_heads: int = 4
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def counts(self) -> np.ndarray:
    """int64 `[users]`, the events of each."""
    if not self.heavy_tailed:
      return np.full(self.num_users, self.events_per_user)
    rng = np.random.default_rng(0)
    count = rng.lognormal(0.0, 1.3, self.num_users)
    count *= self.events_per_user / np.exp(1.3**2 / 2)
    return np.maximum(1, count.astype(np.int64))

  def small(self) -> TrainRows:
    """The same in a size for tests."""
    return dataclasses.replace(
      self,
      num_users=12,
      events_per_user=10,
      history_length=4,
      width=16,
      max_candidates=8,
      request=2,
      num_items=50,
      batch_events=256,
      num_heads=2,
    )


def _forward_and_backward(
  forward: dict[str, Attention],
) -> dict[str, Attention]:
  backward = {
    f'{k}_grad': dataclasses.replace(v, backward=True)
    for k, v in forward.items()
    if v.num_rows > 1
  }
  return forward | backward


ATTENTION: dict[str, Attention] = _forward_and_backward(
  {
    'full_32': Attention(32, 512, 512, 32),
    'full_64': Attention(32, 1024, 1024, 64),
    'full_128': Attention(16, 1024, 1024, 128),
    'single_32': Attention(1, 512, 512, 32),
    'single_64': Attention(1, 2048, 1024, 64),
    'causal_32': Attention(32, 1024, 512, 32, 'causal'),
    'causal_64': Attention(32, 2048, 1024, 64, 'causal'),
    'window_32': Attention(32, 1024, 512, 32, 'window'),
    'window_64': Attention(32, 2048, 1024, 64, 'window'),
    'window_128': Attention(16, 2048, 1024, 128, 'window'),
  }
) | {
  'cpu_full': Attention(1, 512, 512, 32, dtype='float32'),
  'cpu_causal': Attention(1, 1024, 512, 32, 'causal', dtype='float32'),
}

TOWER: dict[str, Tower] = {
  'batch_128': Tower(32, 512, 512, 128),
  'batch_256': Tower(32, 1024, 1024, 256),
  'batch_512': Tower(8, 1024, 1024, 512, num_heads=8),
  'batch_512_4_heads': Tower(8, 1024, 1024, 512),
  'single_128': Tower(1, 512, 512, 128),
  'single_256': Tower(1, 2048, 1024, 256),
  'ragged_128': Tower(64, 1024, 1024, 128, ragged=True),
  'joint_batch_128': Tower(32, 512, 512, 128, joint=True),
  'joint_batch_256': Tower(32, 1024, 1024, 256, joint=True),
  'joint_batch_512': Tower(8, 1024, 1024, 512, joint=True, num_heads=8),
  'cpu_cached': Tower(1, 512, 512, 128, num_layers=2, dtype='float32'),
  'cpu_joint': Tower(
    1, 512, 512, 128, joint=True, num_layers=2, dtype='float32'
  ),
}

REQUEST: dict[str, Request] = {
  'single_128': Request(1, 512, 512, 128),
  'single_256': Request(1, 2048, 1024, 256),
  'batch_128': Request(32, 512, 512, 128),
  'single_64': Request(1, 512, 256, 64, num_layers=2),
  'batch_512': Request(8, 1024, 1024, 512, num_heads=8),
  'cpu_128': Request(1, 512, 512, 128, dtype='float32'),
  # Of the size of the models that this repository publishes.
  'cpu_64': Request(1, 512, 256, 64, num_layers=2, dtype='float32'),
}

TRAIN_STEP: dict[str, Request | TrainRows] = {
  'batch_128': Request(32, 512, 512, 128),
  'batch_256': Request(32, 1024, 1024, 256),
  'history_200': TrainRows(
    2000, 400, 200, 128, batch_events=65_536, dtype='bfloat16'
  ),
  'heavy_tailed': TrainRows(
    20_000, 50, 200, 128, True, batch_events=65_536, dtype='bfloat16'
  ),
  'cpu': Request(8, 64, 64, 64, num_layers=2, dtype='float32'),
  'cpu_history_50': TrainRows(500, 400, 50, 64),
  'cpu_history_200': TrainRows(500, 400, 200, 64),
  'cpu_heavy_tailed': TrainRows(6000, 50, 200, 64, True),
}


def select(
  named: dict[str, Any], names: Sequence[str] | None, platform: str
) -> dict[str, Any]:
  """The named workloads, or all for a platform: 'cpu..' are for a CPU.

  Raises:
    ValueError: no workload of that name.
  """
  if names is None:
    on_cpu = platform == 'cpu'
    names = [name for name in named if name.startswith('cpu') == on_cpu]
  for name in names:
    if name not in named:
      raise ValueError(
        f'workload {name!r} is unknown; use some of {", ".join(named)}'
      )
  return {name: named[name] for name in names}


def _itemsize(dtype: str) -> int:
  return {'float32': 4, 'bfloat16': 2}[dtype]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  return rng.standard_normal(shape, np.float32)
