"""The same workloads in PyTorch, compiled, and captured as CUDA graphs.

'torch:sdpa' is scaled_dot_product_attention with its own choice of a kernel,
'torch:cudnn' with cuDNN's, 'torch:flex' FlexAttention, whose blocks that no
query sees are skipped, 'torch:varlen' packs ragged rows without padding. All
run under torch.compile; 'torch:max_autotune' is 'torch:sdpa' with products
tuned, which takes minutes. 'torch:eager' is not compiled.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import attention as attention_lib
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from benchmarking.workloads import Attention, Tower

_KINDS = ('eager', 'sdpa', 'cudnn', 'flex', 'varlen', 'max_autotune')


def program(
  name: str, workload: Attention | Tower, inputs: list[dict[str, np.ndarray]]
) -> TorchProgram:
  """Compiles a contender; see `contenders.program`.

  Raises:
    ValueError: no such contender.
    NotImplementedError: it cannot compute this workload.
  """
  kind = name.partition(':')[2]
  if kind not in _KINDS:
    raise ValueError(
      f'contender {name!r} is unknown; use one of '
      f'{", ".join(f"torch:{k}" for k in _KINDS)}'
    )
  if kind == 'varlen' and not (isinstance(workload, Tower) and workload.ragged):
    raise NotImplementedError('torch:varlen is for ragged workloads alone')
  torch._dynamo.reset()  # Its cache counts programs of other workloads.
  # For good: a compiled program is compiled again when this changes.
  torch.set_grad_enabled(isinstance(workload, Attention) and workload.backward)
  if isinstance(workload, Attention):
    return _attention_program(kind, workload, inputs)
  return _Tower(kind, workload, inputs).program()


class TorchProgram:
  """See `timing.Program`; on a GPU every call is a replay of a CUDA graph."""

  def __init__(
    self,
    step: Callable,
    x: torch.Tensor,
    rests: Sequence[Any],
    restore: Callable[[np.ndarray], np.ndarray],
  ):
    """Runs `step` until it is compiled, and captures it.

    Args:
      step: `(x, rest) -> (x of the next call, other results)`.
      x: of the first call.
      rests: second arguments.
      restore: makes results comparable to the reference's.
    """
    self._step, self._x, self._rests = step, x, list(rests)
    self._restore = restore
    self._on_gpu = x.is_cuda
    if self._on_gpu:
      side = torch.cuda.Stream()
      side.wait_stream(torch.cuda.current_stream())
      with torch.cuda.stream(side):
        for _ in range(3):
          self._run_chain(x)
      torch.cuda.current_stream().wait_stream(side)
      self._graphs = [self._capture([rest]) for rest in self._rests]
      self._chain = self._capture(self._rests)[0]
    else:
      self._run_chain(x)

  def output(self) -> list[np.ndarray]:
    """The results of the first call, x first."""
    if self._on_gpu:
      graph, (x, others) = self._graphs[0]
      graph.replay()
      torch.cuda.synchronize()
    else:
      x, others = self._step(self._x, self._rests[0])
    return [
      self._restore(y.detach().float().cpu().numpy()) for y in (x, *others)
    ]

  def enqueue(self, calls: int) -> float:
    """See `timing.Program`; a chain over all inputs is one graph."""
    rounds = max(1, round(calls / len(self._rests)))
    self._wait()
    start = time.perf_counter()
    x = self._x
    for _ in range(rounds):
      if self._on_gpu:
        self._chain.replay()
      else:
        x, _ = self._run_chain(x)
    self._wait()
    elapsed = time.perf_counter() - start
    return elapsed / (rounds * len(self._rests))

  def single(self, index: int) -> float:
    """See `timing.Program`."""
    index %= len(self._rests)
    start = time.perf_counter()
    if self._on_gpu:
      self._graphs[index][0].replay()
    else:
      self._step(self._x, self._rests[index])
    self._wait()
    return time.perf_counter() - start

  def kernels(self) -> None:
    """Not measured."""

  def _wait(self):
    if self._on_gpu:
      torch.cuda.synchronize()

  def _run_chain(self, x, rests=None):
    others: Any = ()
    for rest in self._rests if rests is None else rests:
      x, others = self._step(x, rest)
    return x, others

  def _capture(self, rests):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      out = self._run_chain(self._x, rests)
    return graph, out


def _device() -> torch.device:
  return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def _tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(x)).to(
    _device(), getattr(torch, dtype)
  )


def _compiled(function: Callable, kind: str) -> Callable:
  if kind == 'eager':
    return function
  mode = 'max-autotune-no-cudagraphs' if kind == 'max_autotune' else None
  return torch.compile(function, dynamic=False, mode=mode)


def _kernel(kind: str):
  """The context in which a kernel is chosen."""
  if kind == 'cudnn':
    return attention_lib.sdpa_kernel(attention_lib.SDPBackend.CUDNN_ATTENTION)
  return contextlib.nullcontext()


def _attention_program(kind: str, workload: Attention, inputs):
  """Arrays are `[B, N, T, H]`, as PyTorch likes them."""
  sets = [
    {k: _tensor(x.swapaxes(1, 2), workload.dtype) for k, x in arrays.items()}
    for arrays in inputs
  ]
  attend = _compiled(_masked_attention(kind, workload), kind)

  def forward(query, rest):
    return attend(query, rest['key'], rest['value']), ()

  def backward(cotangent, rest):
    arrays = [rest[k] for k in ('query', 'key', 'value')]
    out = attend(*arrays)
    query, key, value = torch.autograd.grad(out, arrays, cotangent)
    return query, (out, key, value)

  if workload.backward:
    for arrays in sets:
      for name in ('query', 'key', 'value'):
        arrays[name].requires_grad_()
  with _kernel(kind):
    return TorchProgram(
      backward if workload.backward else forward,
      sets[0]['cotangent' if workload.backward else 'query'],
      sets,
      lambda x: x.swapaxes(1, 2),
    )


def _masked_attention(kind: str, workload: Attention) -> Callable:
  num_keys, window = workload.num_keys, workload.window
  if kind == 'flex':
    if workload.mask == 'full':
      return flex.flex_attention
    span = window if workload.mask == 'window' else num_keys

    def seen(b, h, q, k):
      stop = torch.clamp(q + 1, max=num_keys)
      return (k < stop) & (k >= stop - span)

    block_mask = flex.create_block_mask(
      seen, None, None, workload.num_queries, num_keys, device=_device()
    )
    return lambda q, k, v: flex.flex_attention(q, k, v, block_mask=block_mask)
  if workload.mask == 'full':
    return functional.scaled_dot_product_attention
  if workload.mask == 'causal':
    return lambda q, k, v: _causal(q, k, v, num_keys)
  # Events lie on a diagonal band, candidates all see the last keys.
  key = torch.arange(num_keys, device=_device())
  query = key[:, None]
  band = (key <= query) & (key > query - window)

  def windowed(q, k, v):
    events = functional.scaled_dot_product_attention(
      q[:, :, :num_keys], k, v, attn_mask=band
    )
    if q.shape[2] == num_keys:
      return events
    last = slice(max(0, num_keys - window), num_keys)
    candidates = functional.scaled_dot_product_attention(
      q[:, :, num_keys:], k[:, :, last], v[:, :, last]
    )
    return torch.cat([events, candidates], dim=2)

  return windowed


def _causal(q, k, v, num_events: int):
  """A causal square of events, and candidates that see all of them."""
  events = functional.scaled_dot_product_attention(
    q[:, :, :num_events], k, v, is_causal=True
  )
  if q.shape[2] == num_events:
    return events
  candidates = functional.scaled_dot_product_attention(
    q[:, :, num_events:], k, v
  )
  return torch.cat([events, candidates], dim=2)


class _Tower:
  """A plain stack of layers; tokens are `[B, T, D]`, or `[1, T, D]` packed."""

  def __init__(self, kind: str, workload: Tower, inputs):
    self.kind, self.workload, self.inputs = kind, workload, inputs
    dtype = workload.dtype
    # `linear` takes matrices as [out, in].
    self.weights: dict[str, Any] = {
      k: list(_tensor(x.swapaxes(1, 2) if x.ndim == 3 else x, dtype))
      if x.ndim > 1
      else _tensor(x, dtype)
      for k, x in workload.weights().items()
    }
    length, count = workload.lengths()
    self.real_candidates = (
      np.arange(workload.num_candidates)[None, :] < count[:, None]
    )
    self.real_events = np.arange(workload.num_events)[None] < length[:, None]
    self.length = torch.from_numpy(length).to(_device())
    self.count = torch.from_numpy(count).to(_device())
    self.packed = kind == 'varlen'
    events = np.arange(workload.num_events)[None]
    self.event_turn = self._turn(events)
    position = np.broadcast_to(length[:, None], self.real_candidates.shape)
    self.turn = self._turn(self._pack(position, self.real_candidates))
    self.attend = self._attention()

  def program(self) -> TorchProgram:
    """Compiled."""
    rests: list[dict[str, Any]] = []
    dtype = self.workload.dtype
    for arrays in self.inputs:
      if self.workload.joint:
        rests.append({'history': _tensor(arrays['history'], dtype)})
        continue
      rest = {}
      for name in ('keys', 'values'):
        layers = list(arrays[name])
        if self.packed:
          layers = [x[self.real_events] for x in layers]  # [events, N, H]
        else:
          layers = [x.swapaxes(1, 2) for x in layers]  # [B, N, L, H]
        rest[name] = [_tensor(x, dtype) for x in layers]
      rests.append(rest)
    candidates = self.inputs[0]['candidates']
    x = _tensor(self._pack(candidates, self.real_candidates), dtype)
    step = _compiled(
      self._joint if self.workload.joint else self._cached, self.kind
    )
    with _kernel(self.kind):
      return TorchProgram(step, x, rests, self._unpack)

  def _cached(self, x, rest):
    for i in range(self.workload.num_layers):
      attend = functools.partial(
        _with, self.attend, rest['keys'][i], rest['values'][i]
      )
      x = self._layer(i, x, self._norm(x), self.turn, attend)
    return self._final(x), ()

  def _joint(self, x, rest):
    num_events = self.workload.num_events
    x = torch.cat([rest['history'], x], dim=1)
    turn = tuple(
      torch.cat([a.expand(b.shape[0], -1, -1, -1), b], dim=2)
      for a, b in zip(self.event_turn, self.turn, strict=True)
    )
    for i in range(self.workload.num_layers):
      normed = self._norm(x)
      history = normed[:, :num_events]
      key = self._heads(functional.linear(history, self.weights['key'][i]))
      value = self._heads(functional.linear(history, self.weights['value'][i]))
      key = _rotate(key, self.event_turn)
      if i + 1 == self.workload.num_layers:
        x, normed, turn = x[:, num_events:], normed[:, num_events:], self.turn
        attend: Any = functional.scaled_dot_product_attention
        if self.kind == 'flex':
          attend = flex.flex_attention
      else:
        attend = self.attend
      attend = functools.partial(_with, attend, key, value)
      x = self._layer(i, x, normed, turn, attend)
    return self._final(x), ()

  def _layer(self, i, x, normed, turn, attend):
    weights = {k: v[i] for k, v in self.weights.items() if isinstance(v, list)}
    query = self._heads(functional.linear(normed, weights['query']))
    attended = attend(_rotate(query, turn)).transpose(1, 2).reshape(x.shape)
    x = x + functional.linear(
      attended, weights['output'], weights['output_bias']
    )
    hidden = functional.linear(
      self._norm(x), weights['mlp_in'], weights['mlp_in_bias']
    )
    hidden = functional.gelu(hidden, approximate='tanh')
    return x + functional.linear(
      hidden, weights['mlp_out'], weights['mlp_out_bias']
    )

  def _attention(self) -> Callable:
    """Of queries `[B, N, T, H]`."""
    workload, length, count = self.workload, self.length, self.count
    num_events = workload.num_events
    if self.kind == 'varlen':
      return self._varlen()
    if self.kind == 'flex':
      if not (workload.joint or workload.ragged):
        return flex.flex_attention

      def seen(b, h, q, k):
        if workload.joint:
          return (k <= q) | (q >= num_events)
        return (k < length[b]) & (q < count[b])

      queries = workload.num_candidates + num_events * workload.joint
      rows = None if workload.joint else workload.num_rows
      block_mask = flex.create_block_mask(
        seen, rows, None, queries, num_events, device=_device()
      )
      return lambda q, k, v: flex.flex_attention(q, k, v, block_mask=block_mask)
    if workload.joint:
      return lambda q, k, v: _causal(q, k, v, num_events)
    if not workload.ragged:
      return functional.scaled_dot_product_attention
    index = torch.arange(num_events, device=_device())
    mask = index[None] < length.clamp(min=1)[:, None]
    mask = mask[:, None, None, :]
    some = (length > 0)[:, None, None, None]
    shape = (-1, -1, workload.num_candidates, -1)

    def masked(q, k, v):
      out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.expand(shape)
      )
      return torch.where(some, out, 0)

    return masked

  def _varlen(self) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    def ends(x):
      return functional.pad(x.cumsum(0), (1, 0)).to(torch.int32)

    query_ends, key_ends = ends(self.count), ends(self.length)
    longest = int(self.count.max()), int(self.length.max())

    def attend(q, k, v):  # [1, N, T, H], [events, N, H]
      q = q[0].transpose(0, 1)
      out: Any = varlen_attn(q, k, v, query_ends, key_ends, *longest)
      return out.transpose(0, 1)[None]

    return attend

  def _turn(self, position):
    """Cosine and sine `[B or 1, 1, T, H / 2]` of rotary positions."""
    half = self.workload.head_dim // 2
    frequency = 1e4 ** -(np.arange(half) / half)
    angle = position[:, None, :, None] * frequency
    return tuple(_tensor(f(angle), 'float32') for f in (np.cos, np.sin))

  def _heads(self, x):
    shape = (*x.shape[:2], self.workload.num_heads, self.workload.head_dim)
    return x.view(shape).transpose(1, 2)

  def _norm(self, x):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)

  def _final(self, x):
    scale, bias = self.weights['final_scale'], self.weights['final_bias']
    return functional.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-6)

  def _pack(self, x: np.ndarray, real: np.ndarray) -> np.ndarray:
    return x[real][None] if self.packed else x

  def _unpack(self, x: np.ndarray) -> np.ndarray:
    if not self.packed:
      return x
    full = np.zeros((*self.real_candidates.shape, x.shape[-1]), x.dtype)
    full[self.real_candidates] = x[0]
    return full


def _with(attend, key, value, query):
  return attend(query, key, value)


def _rotate(x, turn):
  cos, sin = turn
  a, b = x.float().chunk(2, dim=-1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
