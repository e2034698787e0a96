"""Whole requests in PyTorch: pinned buffers, CUDA graphs, several in flight.

'torch' is `torch.compile` and, on a GPU, the faster of two CUDA graphs for each
call, with the copies of ids and logits in it or around it; on a CPU it is the
faster of eager and compiled. 'torch:cudnn' takes cuDNN's attention,
'torch:max_autotune' tunes products, which takes minutes; 'torch:eager' is not
compiled.

Shapes are fixed, one graph a call, and ids are not checked. Logits are views of
the buffer that the device wrote, good until its slot is used again.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import attention as attention_lib

from benchmarking import rankers, torch_ranker
from benchmarking.request_calls import Call, Pending
from benchmarking.workloads import Request
from histjax import schema as schema_lib

_KINDS = ('sdpa', 'cudnn', 'max_autotune', 'eager')
_TRIALS = 20  # Calls of each variant, of which the fastest is kept.
_Function = Callable[[torch.Tensor, torch.Tensor], tuple]
"""Of ids and numbers: the logits first, and what must be kept."""


class Contender:
  """See `request_calls.Contender`."""

  def __init__(
    self,
    kind: str,
    workload: Request,
    params: Mapping[str, Any],
    requests: Sequence[rankers.Inputs],
  ):
    """Converts the parameters and caches the first request's history.

    Args:
      kind: what follows 'torch:'; nothing is 'sdpa'.
      workload: what to compute.
      params: of `histjax.Ranker`.
      requests: to serve.

    Raises:
      ValueError: no such kind.
    """
    self._kind = kind or 'sdpa'
    if self._kind not in _KINDS:
      raise ValueError(
        f"contender 'torch:{kind}' is unknown; use 'torch' or one of "
        f'{", ".join(f"torch:{k}" for k in _KINDS)}'
      )
    torch._dynamo.reset()  # Its cache counts programs of other workloads.
    torch.set_grad_enabled(False)  # For good, as in `torch_rivals`.
    self._workload, self._requests = workload, requests
    self._device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    self._model = torch_ranker.Ranker(
      rankers.config(workload),
      jax.tree.map(np.asarray, params),
      workload.num_events,
      self._device,
    ).eval()
    self._keys, self._values = self._cache()
    # The new events' keys and values are written behind the old ones.
    self._growing = tuple(
      [torch.cat([x[:, :, :-n], 0 * x[:, :, -n:]], dim=2) for x in cache]
      for cache in (self._keys, self._values)
      for n in (rankers.NEW_EVENTS,)
    )
    self._chosen: dict[str, str] = {}
    self._slots: list[_Slot] = []  # Of several in flight.
    self._functions: dict[tuple[str, bool], _Function] = {}

  @property
  def runs(self) -> dict[str, str]:
    """By call, the variant that was the fastest."""
    return {'torch': self._kind} | self._chosen

  def call(self, name: str) -> Call:
    """One of `rankers.CALLS`."""
    slot = self._fastest(name)

    def run(index, prepared):
      del prepared
      return slot.run(self._requests[index])

    return Call(run)

  def pipelines(
    self, depth: int
  ) -> Iterable[tuple[str, Callable[[int], Pending]]]:
    """Of 'score': a ring of slots, on one stream and on a stream each."""
    while len(self._slots) < depth:
      self._slots.append(self._slot('score', self._chosen['score']))
    slots = self._slots

    def submit(index, *, shared):
      slot = slots[index % depth]
      stream = slots[0].stream if shared else None
      return slot.submit(self._requests[index % len(self._requests)], stream)

    yield 'one stream', functools.partial(submit, shared=True)
    if depth > 1 and self._device.type == 'cuda':
      yield 'a stream each', functools.partial(submit, shared=False)

  def _cache(self):
    layout = _Layout(self._workload, 'new user', self._device)
    slot = _Slot(layout, lambda *x: self._new_user(layout, *x))
    slot.fill(self._requests[0])
    slot.copy_in()
    _, keys, values = self._new_user(layout, slot.ids, slot.numbers)
    return [x.contiguous() for x in keys], [x.contiguous() for x in values]

  def _fastest(self, name: str) -> _Slot:
    kind, on_gpu = self._kind, self._device.type == 'cuda'
    if on_gpu:
      variants = ['copies in the graph', 'copies around the graph']
    else:
      variants = ['eager'] if kind == 'eager' else ['eager', 'compiled']
    slots: dict[str, _Slot] = {}
    failures: list[Exception] = []
    for variant in variants:
      try:
        slots[variant] = self._slot(name, variant)
      except RuntimeError as e:  # One of them is enough.
        failures.append(e)
    if not slots:
      raise failures[0]
    times = dict.fromkeys(slots, float('inf'))
    for i in range(_TRIALS):
      for variant, slot in slots.items():
        start = time.perf_counter()
        slot.run(self._requests[i % len(self._requests)])
        seconds = time.perf_counter() - start
        times[variant] = min(times[variant], seconds)
    self._chosen[name] = min(times, key=lambda k: times[k])
    return slots[self._chosen[name]]

  def _slot(self, name: str, variant: str) -> _Slot:
    layout = _Layout(self._workload, name, self._device)
    compiled = variant != 'eager' and self._kind != 'eager'
    if (name, compiled) not in self._functions:
      self._functions[name, compiled] = self._function(name, compiled, layout)
    function = self._functions[name, compiled]
    if self._device.type == 'cpu':
      return _Slot(layout, function)
    with self._kernel():
      return _GraphSlot(layout, function, variant == 'copies in the graph')

  def _function(self, name: str, compiled: bool, layout: _Layout) -> _Function:
    model, cache = self._model, (self._keys, self._values)
    if name == 'score':

      def score(ids, numbers, keys, values):
        parts = layout.unpack(ids, numbers)
        return (
          model.score(parts['context'], parts['candidates'], keys, values),
        )

      run = self._compiled(score) if compiled else score
      return lambda ids, numbers: run(ids, numbers, *cache)
    if name == 'new user':
      whole = functools.partial(self._new_user, layout)
      return self._compiled(whole) if compiled else whole

    def extend(ids, numbers, keys, values):
      parts = layout.unpack(ids, numbers)
      return model.read_and_score(
        parts['context'],
        parts['candidates'],
        parts['new_events'],
        (keys, values),
      )[:1]

    longer = self._compiled(extend) if compiled else extend
    return lambda ids, numbers: longer(ids, numbers, *self._growing)

  def _new_user(self, layout: _Layout, ids, numbers):
    parts = layout.unpack(ids, numbers)
    return self._model.read_and_score(
      parts['context'], parts['candidates'], parts['history']
    )

  def _compiled(self, function: Callable) -> Callable:
    mode = None
    if self._kind == 'max_autotune':
      mode = 'max-autotune-no-cudagraphs'
    return torch.compile(function, dynamic=False, mode=mode)

  def _kernel(self):
    """The context in which attention's kernel is chosen."""
    if self._kind == 'cudnn':
      return attention_lib.sdpa_kernel(attention_lib.SDPBackend.CUDNN_ATTENTION)
    return contextlib.nullcontext()


class _Layout:
  """Where each feature of a call lies in one int32 and one float32 buffer."""

  def __init__(self, workload: Request, call: str, device: torch.device):
    self.workload, self.device = workload, device
    rows, schema = workload.num_rows, rankers.SCHEMA
    parts: dict[str, tuple] = {
      'context': (schema.context, (rows,)),
      'candidates': (schema.item_features, (rows, workload.num_candidates)),
    }
    if call == 'new user':
      shape = (rows, workload.num_events)
      parts['history'] = (schema.history_features, shape)
    elif call == 'extend and score':
      shape = (rows, rankers.NEW_EVENTS)
      parts['new_events'] = (schema.history_features, shape)
    self.sizes = [0, 0]
    self.fields: list[tuple[str, str, int, int, tuple[int, ...]]] = []
    for part, (spec, shape) in parts.items():
      for feature in spec:
        buffer = int(isinstance(feature, schema_lib.Dense))
        self.fields.append(
          (part, feature.name, buffer, self.sizes[buffer], shape)
        )
        self.sizes[buffer] += int(np.prod(shape))

  def unpack(self, *buffers) -> dict[str, dict[str, Any]]:
    """Views of the buffers, `{part: {feature: ..}}`."""
    found: dict[str, dict[str, Any]] = {}
    for part, name, buffer, start, shape in self.fields:
      piece = buffers[buffer][start : start + int(np.prod(shape))]
      found.setdefault(part, {})[name] = piece.reshape(shape)
    return found

  def logits_shape(self) -> tuple[int, int, int]:
    """Tasks, B and C."""
    rows, candidates = self.workload.num_rows, self.workload.num_candidates
    return len(rankers.SCHEMA.tasks), rows, candidates


class _Slot:
  """One request's buffers; computes at once, as a CPU does."""

  def __init__(self, layout: _Layout, function: _Function):
    self._function, self._layout = function, layout
    self.stream: Any = None
    pinned = layout.device.type == 'cuda'
    self._host = [
      torch.zeros(size, dtype=dtype, pin_memory=pinned)
      for size, dtype in zip(
        layout.sizes, (torch.int32, torch.float32), strict=True
      )
    ]
    self.ids, self.numbers = (x.to(layout.device) for x in self._host)
    views = layout.unpack(*(x.numpy() for x in self._host))
    self._views = [
      (part, name, view)
      for part, features in views.items()
      for name, view in features.items()
    ]
    self._logits = torch.zeros(layout.logits_shape(), pin_memory=pinned)

  def fill(self, request: rankers.Inputs) -> None:
    """Packs ids and numbers."""
    parts = {
      'context': request.context,
      'candidates': request.candidates.features,
      'history': request.history.features,
      'new_events': request.new_events.features,
    }
    for part, name, view in self._views:
      view[...] = parts[part][name]

  def copy_in(self) -> None:
    """Host to device, a copy each."""
    for device, host in zip((self.ids, self.numbers), self._host, strict=True):
      if device is not host:
        device.copy_(host, non_blocking=True)

  def run(self, request: rankers.Inputs) -> dict[str, np.ndarray]:
    """A request's logits `{task: [B, C]}`."""
    return self.submit(request).result()

  def submit(self, request: rankers.Inputs, stream: Any = None) -> _Slot:
    """Starts a request."""
    del stream
    self.fill(request)
    self._logits, *self._kept = self._function(self.ids, self.numbers)
    return self

  def result(self) -> dict[str, np.ndarray]:
    """Waits for its logits."""
    return self._by_task(self._logits)

  def _by_task(self, logits: torch.Tensor) -> dict[str, np.ndarray]:
    tasks = [task.name for task in rankers.SCHEMA.tasks]
    return dict(zip(tasks, logits.numpy(), strict=True))


class _GraphSlot(_Slot):
  """One request's buffers, its CUDA graph, and the stream that it is of."""

  def __init__(self, layout: _Layout, function: _Function, with_copies: bool):
    super().__init__(layout, function)
    self._with_copies = with_copies
    self._done = torch.cuda.Event()
    # Each has a stream of its own, so that no two share a workspace.
    self.stream = torch.cuda.Stream()
    self.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(self.stream):
      for _ in range(3):
        function(self.ids, self.numbers)
    torch.cuda.synchronize()
    self._graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
      self._graph, stream=self.stream, capture_error_mode='thread_local'
    ):
      if with_copies:
        self.copy_in()
      self._output, *self._kept = function(self.ids, self.numbers)
      if with_copies:
        self._logits.copy_(self._output, non_blocking=True)
    torch.cuda.synchronize()
    self._found = self._by_task(self._logits)

  def run(self, request: rankers.Inputs) -> dict[str, np.ndarray]:
    """See `_Slot`; nothing else is in flight."""
    self.fill(request)
    self._launch(self.stream)
    self.stream.synchronize()
    return self._found

  def submit(self, request: rankers.Inputs, stream: Any = None) -> _Slot:
    """Starts a request, on its own stream if none is given."""
    self.fill(request)
    stream = stream or self.stream
    self._launch(stream)
    self._done.record(stream)
    return self

  def result(self) -> dict[str, np.ndarray]:
    """See `_Slot`."""
    self._done.synchronize()
    return self._found

  def _launch(self, stream: Any) -> None:
    torch.cuda.set_stream(stream)
    if self._with_copies:
      self._graph.replay()
      return
    self.copy_in()
    self._graph.replay()
    self._logits.copy_(self._output, non_blocking=True)
