"""Dynamic batching: requests that wait together are scored together.

A batch starts as soon as nothing is scored: while one is, in a thread of its
own, the next gathers, so that under load batches are as large as they can be,
and nobody waits for company while the device is idle. `max_wait_s` makes them
wait, as in Triton and Ray Serve; that pays only where a larger batch takes no
longer, and each request pays for it.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from histjax import config as dicts


class QueueFullError(Exception):
  """As many requests wait as may; `retry_after_s` until there is room."""

  def __init__(self, waiting: int, retry_after_s: float):
    super().__init__(waiting, retry_after_s)
    self.waiting = waiting
    self.retry_after_s = retry_after_s

  def __str__(self) -> str:
    return f'{self.waiting} requests are waiting'


class DeadlineError(Exception):
  """The request's turn had not come when its time was over."""


class UnavailableError(Exception):
  """What would score is not there; it may be in a while."""


class StoppedError(UnavailableError):
  """The batcher takes no more requests."""


@dataclasses.dataclass(frozen=True)
class BatcherConfig:
  """How requests are gathered.

  Attributes:
    max_batch: requests scored together.
    max_wait_s: how long the oldest waits for others, at most, while nothing is
      scored.
    max_queue: requests that wait; one more is refused.
  """

  max_batch: int = 32
  max_wait_s: float = 0.0
  max_queue: int = 256

  def __post_init__(self):
    dicts.normalize(self)
    for field in ('max_batch', 'max_queue'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be at least 1')
    if not 0 <= self.max_wait_s <= 60:
      raise ValueError(
        f'max_wait_s={self.max_wait_s} must be in [0, 60] seconds'
      )


@dataclasses.dataclass(frozen=True)
class Scored:
  """What became of a request.

  Attributes:
    result: what the function returned for it.
    queue_s: it waited so long.
    score_s: the call took so long.
    batch_size: requests in it.
  """

  result: Any
  queue_s: float
  score_s: float
  batch_size: int


def call(
  score: Callable[[Sequence[Any]], Sequence[Any]], requests: Sequence[Any]
) -> list[Any]:
  """The results of requests; what the call raises is the result of each.

  So nothing is raised, and every error is one that a future takes.
  """
  try:
    results = list(score(requests))
    if len(results) != len(requests):
      raise RuntimeError(f'{len(results)} results of {len(requests)} requests')
  except BaseException as error:  # As SystemExit in others' code.
    results = [error] * len(requests)
  return [_settled(x) for x in results]


def _settled(result: Any) -> Any:
  if not isinstance(result, BaseException):
    return result
  if isinstance(result, Exception) and not isinstance(result, StopIteration):
    return result
  error = RuntimeError(repr(result))
  error.__cause__ = result
  return error


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:.7g} ms'  # Less than one is not 0.


@dataclasses.dataclass(eq=False)
class _Waiting:
  request: Any
  arrival: float
  future: asyncio.Future
  timer: asyncio.TimerHandle


class Batcher:
  """Gathers requests of one event loop into calls in one thread."""

  def __init__(
    self,
    score: Callable[[Sequence[Any]], Sequence[Any]],
    config: BatcherConfig | None = None,
    *,
    observe: Callable[
      [Sequence[float], float, Sequence[Any]], None
    ] = lambda *_: None,
  ):
    """Makes a batcher; `start` it in the event loop.

    Args:
      score: as many results as requests, in order; runs in the thread. What
        it raises, all of the batch raise.
      config: of batches and queue.
      observe: told of each batch, `(queue_s of each, score_s, results)`.
    """
    self.config = config or BatcherConfig()
    self._score = score
    self._observe = observe
    self._queue: collections.deque[_Waiting] = collections.deque()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'score')
    self._batch_s = max(self.config.max_wait_s, 1e-3)  # A moving average.
    self._task: asyncio.Task | None = None
    self._stopping = False

  @property
  def waiting(self) -> int:
    """Requests in the queue whose time is not over."""
    return sum(not item.future.done() for item in [*self._queue])

  def start(self) -> None:
    """Begins to score, in the running event loop."""
    self._wake = asyncio.Event()
    self._task = asyncio.create_task(self._run())

  async def stop(self) -> None:
    """Takes no more requests, and returns when all others are scored."""
    self._stopping = True
    if self._task is not None:
      self._wake.set()
      await self._task
    self._thread.shutdown()

  async def score(
    self, request: Any, timeout_s: float, spent_s: float = 0.0
  ) -> Scored:
    """The request's result.

    Args:
      request: what `score` takes.
      timeout_s: its batch must have begun by then.
      spent_s: of `timeout_s`, what is over already.

    Raises:
      QueueFullError, StoppedError: at once.
      DeadlineError: its time is over; at once if that is so already.
      Exception: of the function.
    """
    if self._stopping:
      raise StoppedError('the server stops')
    if spent_s >= timeout_s:
      raise DeadlineError(
        f'{_ms(timeout_s)} were over before it was queued, after {_ms(spent_s)}'
      )
    if len(self._queue) >= self.config.max_queue:
      self._drop_done()
    if len(self._queue) >= self.config.max_queue:
      batches = len(self._queue) / self.config.max_batch
      raise QueueFullError(len(self._queue), batches * self._batch_s)
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    item = _Waiting(
      request,
      time.monotonic(),
      future,
      loop.call_later(timeout_s - spent_s, self._expire, future, timeout_s),
    )
    self._queue.append(item)
    self._wake.set()
    try:
      return await future
    finally:
      item.timer.cancel()  # Of a client that is gone, too.

  @staticmethod
  def _expire(future: asyncio.Future, timeout_s: float) -> None:
    if not future.done():
      future.set_exception(DeadlineError(f'not begun within {_ms(timeout_s)}'))

  async def _run(self) -> None:
    loop = asyncio.get_running_loop()
    while batch := await self._gather():
      begun = time.monotonic()
      for item in batch:
        item.timer.cancel()
      results = await loop.run_in_executor(
        self._thread, call, self._score, [item.request for item in batch]
      )
      took = time.monotonic() - begun
      self._batch_s += 0.1 * (took - self._batch_s)
      queued = [begun - item.arrival for item in batch]
      self._observe(queued, took, results)
      for item, result, queue_s in zip(batch, results, queued, strict=True):
        if item.future.done():  # Its client is gone.
          continue
        if isinstance(result, Exception):
          item.future.set_exception(result)
        else:
          item.future.set_result(Scored(result, queue_s, took, len(batch)))

  async def _gather(self) -> list[_Waiting]:
    """The next batch; none once it is to stop and the queue is empty."""
    while True:
      self._drop_done()
      if self._queue:
        left = self._queue[0].arrival + self.config.max_wait_s
        left -= time.monotonic()
        full = len(self._queue) >= self.config.max_batch
        if full or left <= 0 or self._stopping:
          number = min(len(self._queue), self.config.max_batch)
          return [self._queue.popleft() for _ in range(number)]
      elif self._stopping:
        return []
      else:
        left = None
      self._wake.clear()
      try:
        await asyncio.wait_for(self._wake.wait(), left)
      except TimeoutError:
        pass

  def _drop_done(self) -> None:
    """Drops those whose time is over or whose client is gone, before work."""
    if any(item.future.done() for item in self._queue):
      self._queue = collections.deque(
        item for item in self._queue if not item.future.done()
      )
