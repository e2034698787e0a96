"""What a scorer compiles: pure functions, one program for each bucket.

`score_microbatched` and `score_plain` are functions of a model, variables and
inputs. `program` makes what a `Scorer` calls: the same on a request that lies
in one array, with parameters as arguments, kept for the process, so that a
second scorer of a config compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from histjax import ops, quantization
from histjax.cache import HistoryCache
from histjax.models import ranker
from histjax.ops import devices, dispatch
from histjax.scoring import graphs, transport, weights
from histjax.scoring import layout as layout_lib
from histjax.scoring import pages as pages_lib
from histjax.types import Candidates, History, Paged, RankingBatch


def score_microbatched(
  model: ranker.Ranker,
  variables: Mapping[str, Any],
  cache: HistoryCache,
  candidates: Candidates,
  context: Mapping[str, Array],
  count: Int[Array, 'B'] | None = None,
  *,
  microbatch: int,
) -> dict[str, Float[Array, 'B C']]:
  """Scores candidates `microbatch` at a time, so that memory stays bounded.

  The cache is read by every microbatch and made by none (M-FALCON; Zhai et
  al. 2024, arXiv 2402.17152). A pure function; jit it.

  Args:
    model: the ranker.
    variables: its own, and those of `models.ranker.pack`, if any.
    cache: of `model.encode`.
    candidates: `[B, C]`, C at most or a multiple of `microbatch`.
    context: `{name: [B]}`.
    count: int32 `[B]`; logits of candidates from there on mean nothing. None:
      all C count.
    microbatch: candidates per row and step.

  Returns:
    `{task: [B, C]}` float32.
  """

  return _microbatched(
    'score', model, variables, cache, candidates, context, count, microbatch
  )


def score_plain(
  model: ranker.Ranker,
  variables: Mapping[str, Any],
  batch: RankingBatch,
  *,
  microbatch: int,
) -> dict[str, Float[Array, 'B C']]:
  """Scores every candidate as a row of its own, with its own history pass.

  What a ranker costs without amortization, and the definition that the other
  ways must equal. A pure function; jit it.

  Args:
    model: the ranker, of any fusion.
    variables: its own.
    batch: `[B, C]` candidates, C at most or a multiple of `microbatch`.
    microbatch: candidates per row and step: `B * microbatch` passes at once.

  Returns:
    `{task: [B, C]}` float32.
  """
  num_rows = batch.history.length.shape[0]

  def score(chunk: Candidates, first) -> dict[str, jax.Array]:
    del first
    num_candidates = chunk.shape[1]
    # Or XLA would take the history's pass, the same for all chunks, out of
    # their loop.
    chunk, history = jax.lax.optimization_barrier((chunk, batch.history))

    def repeat(x):
      return jnp.repeat(jnp.asarray(x), num_candidates, axis=0)

    rows = RankingBatch(
      context=jax.tree.map(repeat, batch.context),
      history=jax.tree.map(repeat, history),
      candidates=jax.tree.map(lambda x: x.reshape(-1, 1), chunk),
      labels={},
      group=repeat(batch.group),
    )
    logits = model.apply(variables, rows)
    return jax.tree.map(lambda x: x.reshape(num_rows, num_candidates), logits)

  return _in_chunks(score, batch.candidates, microbatch)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all programs of a scorer have in common.

  Attributes:
    config: of the model.
    microbatch: candidates per row scored at once from a cache.
    plain_microbatch: the same for plain scoring.
    spec: how parameters are packed.
    target: to trace for.
    transport: how requests come and logits go, or `graphs.MARKS`.
    cache_dtype: as `ScorerConfig`.
  """

  config: ranker.RankerConfig
  microbatch: int
  plain_microbatch: int
  spec: weights.Spec
  target: devices.Target
  transport: transport.Transport | graphs.Marks
  cache_dtype: quantization.Kind | None = None


class Sizes(NamedTuple):
  """The bucket of a program.

  Attributes:
    rows: B.
    events: L, of the history that is read or of the new events.
    candidates: C.
    visible: whether candidates say what they see.
    capacity: of the cache that comes of `extend`.
    donate: whether it writes into the cache or pool that it is given.
    requests: scored at once, each with its own cache of `rows`.
  """

  rows: int
  events: int = 0
  candidates: int = 0
  visible: bool = False
  capacity: int = 0
  donate: bool = False
  requests: int = 1


Kind: TypeAlias = Literal[
  'encode',
  'extend',
  'score',
  'encode_and_score',
  'extend_and_score',
  'paged_score',
  'paged_encode_and_score',
  'paged_extend_and_score',
  'joint',
  'plain',
]


class Program:
  """A function of a packed request, compiled when it is first called.

  Attributes:
    layout: of the request.
    traced: the function as it is compiled: of packed weights (`weights.pack`),
      the cache's keys and values unless it reads histories (tuples of them if
      there are several requests), or a pool's, and the request.
      It returns logits `[T, B, C]`; if it makes a cache or writes a pool, its
      keys and values before them, and if it scores nothing, a number that is
      there when the request has been read.
    call: the same, compiled.
    backends: the implementations that it runs, once it was traced.
  """

  def __init__(self, plan: Plan, kind: Kind, sizes: Sizes):
    schema, rows = plan.config.schema, sizes.rows * sizes.requests
    events = (rows, sizes.events)
    shape = (rows, sizes.candidates)
    length = layout_lib.numbers('length', (rows,))
    history = layout_lib.features('history', schema.history_features, events)
    context = layout_lib.features('context', schema.context, (rows,))
    candidates = layout_lib.features('candidates', schema.item_features, shape)
    visible: tuple[layout_lib.Part, ...] = ()
    if sizes.visible:
      visible = (layout_lib.numbers('visible', shape),)
    pages = (rows, pages_lib.number(sizes.capacity or sizes.events))
    read = layout_lib.numbers('read', pages)
    write = layout_lib.numbers('write', pages)
    count = layout_lib.numbers('count', (rows,))
    new = layout_lib.numbers('new', (rows,))
    request = (count, context, candidates, *visible)
    parts = {
      'encode': (length, history),
      'extend': (length, new, history),
      'score': (length, *request),
      'encode_and_score': (length, history, *request),
      'extend_and_score': (length, new, history, *request),
      'paged_score': (length, read, *request),
      'paged_encode_and_score': (length, write, history, *request),
      'paged_extend_and_score': (length, new, read, write, history, *request),
      'joint': (length, context, history, candidates, *visible),
      'plain': (length, context, history, candidates, *visible),
    }
    self.layout = layout_lib.Layout(parts[kind], sizes.requests)
    self.backends: dict[str, str] = {}

    def traced(packed, *arguments):
      *cached, request = arguments
      body: Any = _BODIES.get(kind)
      request, begun = plan.transport.read(request)
      with dispatch.on(plan.target), dispatch.record() as used:
        if kind in _WRITE:
          body = functools.partial(
            _WRITE[kind], functools.partial(plan.transport.ready, begun)
          )
        result = body(
          plan,
          sizes,
          plan.spec.variables(packed),
          *cached,
          self.layout.unpack(request),
        )
        if kind.endswith('_and_score'):
          *states, logits = result
          result = (*states, plan.transport.done(begun, logits, *states))
        elif kind in ('score', 'paged_score'):
          result = plan.transport.done(begun, result)
      self.backends = dispatch.names(used)
      return result

    traced.__name__ = kind  # In profiles and logs.
    self.traced = traced
    options: dict[str, Any] = {}
    if plan.transport.options:
      options['compiler_options'] = plan.transport.options
    if kind in ('score', 'paged_score', 'joint', 'plain'):
      options['out_shardings'] = plan.transport.output
    elif kind.endswith('_and_score'):
      options['out_shardings'] = (None, None, plan.transport.output)
    if sizes.donate:
      options['donate_argnums'] = (1, 2)
    self.call: Callable[..., Any] = jax.jit(traced, **options)


@functools.cache
def program(
  plan: Plan,
  kind: Kind,
  sizes: Sizes,
) -> Program:
  """The one program of a kind and bucket in this process."""
  return Program(plan, kind, sizes)


def _encode(plan, sizes, variables, parts):
  del sizes
  history = History(parts['history'], parts['length'])
  cache: Any = ranker.Ranker(plan.config).apply(
    variables, history, method='encode'
  )
  keys, values = cache.keys, cache.values
  if plan.cache_dtype is not None:
    keys, values = (
      quantization.quantize(x, parts['length'], plan.cache_dtype)
      for x in (keys, values)
    )
  return keys, values, parts['length'][:1]


def _score(plan, sizes, variables, keys, values, parts):
  keys, values = _widened(plan, keys, values)
  if sizes.requests > 1:
    keys, values = (jnp.concatenate(x, axis=1) for x in (keys, values))
  logits = _microbatched(
    'score_tasks',
    ranker.Ranker(plan.config),
    variables,
    HistoryCache(keys, values, parts['length']),
    Candidates(parts['candidates'], parts.get('visible')),
    parts['context'],
    parts['count'],
    plan.microbatch,
  )
  return jnp.moveaxis(logits, -1, 0)


def _extend(plan, sizes, variables, keys, values, parts):
  given, length = (keys, values), parts['length']
  keys, values = _widened(plan, keys, values)
  longer: Any = ranker.Ranker(plan.config).apply(
    variables,
    _with_room(sizes, keys, values, length),
    History(parts['history'], parts['new']),
    method='extend',
  )
  keys, values = (
    quantization.extended(before, after, length, length + parts['new'])
    if isinstance(before, quantization.Quantized)
    else after
    for before, after in zip(given, (longer.keys, longer.values), strict=True)
  )
  return keys, values, length[:1]


def _with_room(sizes, keys, values, length):
  """The cache, padded to its new capacity."""
  more = sizes.capacity - keys.shape[2]
  width = [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)]
  return HistoryCache(jnp.pad(keys, width), jnp.pad(values, width), length)


def _widened(plan, *arrays):
  """Keys and values, or tuples of them, in the type that reads them."""
  return jax.tree.map(
    lambda x: quantization.widen(x, plan.config.dtype),
    arrays,
    is_leaf=lambda x: isinstance(x, quantization.Quantized),
  )


def _encode_and_score(plan, sizes, variables, parts, into=None):
  if plan.cache_dtype is None and sizes.candidates <= plan.microbatch:
    both: Any = ranker.Ranker(plan.config).apply(
      variables,
      History(parts['history'], parts['length']),
      Candidates(parts['candidates'], parts.get('visible')),
      parts['context'],
      parts['count'],
      into,
      method='encode_and_score',
    )
    cache, logits = both
    return cache.keys, cache.values, jnp.moveaxis(logits, -1, 0)
  keys, values, _ = _encode(plan, sizes, variables, parts)
  return keys, values, _score(plan, sizes, variables, keys, values, parts)


def _extend_and_score(plan, sizes, variables, keys, values, parts):
  quantized = isinstance(keys, quantization.Quantized)
  # Of a quantized cache candidates read codes of new events, which have read
  # each other before they became codes: in two passes.
  if not quantized and sizes.candidates <= plan.microbatch:
    both: Any = ranker.Ranker(plan.config).apply(
      variables,
      _with_room(sizes, keys, values, parts['length']),
      History(parts['history'], parts['new']),
      Candidates(parts['candidates'], parts.get('visible')),
      parts['context'],
      parts['count'],
      method='extend_and_score',
    )
    longer, logits = both
    return longer.keys, longer.values, jnp.moveaxis(logits, -1, 0)
  keys, values, _ = _extend(plan, sizes, variables, keys, values, parts)
  parts = {**parts, 'length': parts['length'] + parts['new']}
  return keys, values, _score(plan, sizes, variables, keys, values, parts)


def _paged_score(plan, sizes, variables, keys, values, parts):
  if _in_pages(plan, keys):
    keys, values = _paged(plan, parts['read'], keys, values)
  else:
    keys, values = _read(plan, parts, sizes.events, keys, values)
  return _score(plan, sizes, variables, keys, values, parts)


def _paged_encode_and_score(ready, plan, sizes, variables, keys, values, parts):
  into = None
  if _in_pages(plan, keys):
    into = _paged(plan, parts['write'], keys, values)
  *states, logits = _encode_and_score(plan, sizes, variables, parts, into)
  pool = keys, values
  if isinstance(states[0], Paged):  # They are there.
    written = (
      x.pool.reshape(y.shape) for x, y in zip(states, pool, strict=True)
    )
  else:
    logits, pool = ready(logits, pool)
    written = (
      pages_lib.write(y, parts['write'], x)
      for x, y in zip(states, pool, strict=True)
    )
  return (*written, logits)


def _in_pages(plan, pool):
  """Whether kernels read and write states where they are."""
  config = plan.config
  return (
    config.has_tower
    and not isinstance(pool, quantization.Quantized)
    and ops.tower_reads_pages(
      config.dtype,
      config.encoder.width,
      config.encoder.num_heads,
      config.encoder.mlp_width,
      pages_lib.EVENTS,
      implementation=config.encoder.candidate_tower,
    )
  )


def _paged(plan, index, *pool):
  heads = plan.config.encoder.num_heads
  return tuple(pages_lib.paged(x, index, heads) for x in pool)


def _paged_extend_and_score(ready, plan, sizes, variables, keys, values, parts):
  a, b = _read(plan, parts, sizes.capacity, keys, values)
  *states, logits = _extend_and_score(plan, sizes, variables, a, b, parts)
  logits, pool = ready(logits, (keys, values))
  length, new = parts['length'], parts['new']
  written = (
    pages_lib.extended(y, parts['write'], x, length, new, sizes.events)
    for x, y in zip(states, pool, strict=True)
  )
  return (*written, logits)


def _read(plan, parts, capacity, *pool):
  """The states of the request's users."""
  heads = plan.config.encoder.num_heads
  return [pages_lib.read(x, parts['read'], capacity, heads) for x in pool]


def _batch(parts):
  return RankingBatch(
    context=parts['context'],
    history=History(parts['history'], parts['length']),
    candidates=Candidates(parts['candidates'], parts.get('visible')),
    labels={},
    group=jnp.zeros_like(parts['length']),
  )


def _joint(plan, sizes, variables, parts):
  del sizes
  logits: Any = ranker.Ranker(plan.config).apply(variables, _batch(parts))
  return _stacked(plan, logits)


def _plain(plan, sizes, variables, parts):
  del sizes
  logits = score_plain(
    ranker.Ranker(plan.config),
    {k: x for k, x in variables.items() if k != 'tower'},
    _batch(parts),
    microbatch=plan.plain_microbatch,
  )
  return _stacked(plan, logits)


_BODIES = {
  'encode': _encode,
  'score': _score,
  'extend': _extend,
  'encode_and_score': _encode_and_score,
  'extend_and_score': _extend_and_score,
  'paged_score': _paged_score,
  'joint': _joint,
  'plain': _plain,
}
# They are also told what to call when the logits are there.
_WRITE = {
  'paged_encode_and_score': _paged_encode_and_score,
  'paged_extend_and_score': _paged_extend_and_score,
}


def _stacked(plan, logits):
  """`[T, B, C]`."""
  return jnp.stack([logits[task.name] for task in plan.config.schema.tasks])


def _microbatched(
  method, model, variables, cache, candidates, context, count, microbatch
) -> Any:
  def score(chunk: Candidates, first) -> Any:
    here = count
    if count is not None:
      here = jnp.clip(count - first, 0, chunk.shape[1])
    return model.apply(variables, cache, chunk, context, here, method=method)

  return _in_chunks(score, candidates, microbatch)


def _in_chunks(
  score: Callable[[Candidates, Any], Any],
  candidates: Candidates,
  size: int,
) -> Any:
  """Maps `score` over chunks of `size` candidates of each row.

  Args:
    score: of a chunk and the number of its first candidate, arrays of
      `[B, size, ..]`.
    candidates: `[B, C]`, C at most or a multiple of `size`.
    size: of a chunk.

  Returns:
    Arrays of `[B, C, ..]`.
  """
  num_rows, count = candidates.shape
  if count <= size:
    return score(candidates, 0)
  if count % size:
    raise ValueError(
      f'{count} candidates are not a multiple of microbatch={size}; pad them'
    )
  chunks = jax.tree.map(
    lambda x: jnp.asarray(x).reshape(num_rows, -1, size).swapaxes(0, 1),
    candidates,
  )
  first = jnp.arange(0, count, size, dtype=jnp.int32)
  logits = jax.lax.map(lambda x: score(*x), (chunks, first))
  return jax.tree.map(  # [C / size, B, size, ..]
    lambda x: x.swapaxes(0, 1).reshape(num_rows, count, *x.shape[3:]), logits
  )
