"""What the server tells Prometheus."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import core
from prometheus_client.registry import Collector

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (
  *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
  *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)


class Metrics:
  """Counters and histograms of one application."""

  def __init__(
    self,
    store: Callable[[], Mapping[str, Any]],
    waiting: Callable[[], int],
    ready: Callable[[], bool],
    fingerprint: Callable[[], str],
  ):
    """Makes a registry of its own.

    Args:
      store: the engine's counters, `Engine.metrics`; of engines in several
        processes `{'replicas': {name: counters}}` besides.
      waiting: the length of the queue.
      ready: whether requests are scored.
      fingerprint: of the model that is served.
    """
    self._registry = registry = prometheus_client.CollectorRegistry()
    self._requests = prometheus_client.Counter(
      'histjax_requests', 'By path and status.', ('path', 'status'),
      registry=registry,
    )  # fmt: skip
    self._seconds = prometheus_client.Histogram(
      'histjax_request_seconds', 'Of a whole request.', ('path',),
      buckets=_SECONDS, registry=registry,
    )  # fmt: skip
    self._phases = prometheus_client.Histogram(
      'histjax_phase_seconds',
      'read: the body; decode: its checks; queue: of a request; rows: of a '
      'batch, made on the host; score: states and scores; reply: of a request.',
      ('phase',), buckets=_SECONDS, registry=registry,
    )  # fmt: skip
    self._batches = prometheus_client.Histogram(
      'histjax_batch_size', 'Requests scored together.',
      buckets=[2**i for i in range(11)], registry=registry,
    )  # fmt: skip
    self._sources = prometheus_client.Counter(
      'histjax_states', 'Requests by what was done with the state.',
      ('source',), registry=registry,
    )  # fmt: skip
    self.roll_overs = prometheus_client.Counter(
      'histjax_roll_overs', 'To new parameters, by outcome.', ('outcome',),
      registry=registry,
    )  # fmt: skip
    prometheus_client.Gauge(
      'histjax_queue_length', 'Requests that wait.', registry=registry
    ).set_function(waiting)
    prometheus_client.Gauge(
      'histjax_ready', '1 if requests are scored.', registry=registry
    ).set_function(lambda: float(ready()))
    registry.register(_Store(store, fingerprint))
    # To look up a child takes as long as to add to it; there are few.
    self._of_phase = functools.cache(self._phases.labels)
    self._of_source = functools.cache(self._sources.labels)
    self._of_path = functools.cache(self._seconds.labels)
    self._of_status = functools.cache(self._requests.labels)

  def observe_request(self, path: str, status: int, seconds: float) -> None:
    """Of each response."""
    self._of_status(path, status).inc()
    self._of_path(path).observe(seconds)

  def observe_phase(self, phase: str, seconds: float) -> None:
    """Of a request."""
    self._of_phase(phase).observe(seconds)

  def observe_batch(
    self, queue_s: Sequence[float], seconds: float, results: Sequence[Any]
  ) -> None:
    """Of a batch: how long each of its requests waited, and its own time."""
    self._batches.observe(len(queue_s))
    rows_s = max(getattr(x, 'rows_s', 0.0) for x in results)
    self.observe_phase('rows', rows_s)
    self.observe_phase('score', seconds - rows_s)
    for seconds in queue_s:
      self.observe_phase('queue', seconds)

  def observe_source(self, source: str) -> None:
    """Of a scored request."""
    self._of_source(source).inc()

  def text(self) -> bytes:
    """In Prometheus's text format."""
    return prometheus_client.generate_latest(self._registry)


class _Store(Collector):
  def __init__(self, store, fingerprint):
    self._store, self._fingerprint = store, fingerprint

  def collect(self):
    """What the store counts, as it names it."""
    counts = dict(self._store())
    replicas = counts.pop('replicas', {})
    for name, value in _flat('histjax_store', counts):
      yield core.UnknownMetricFamily(name, 'Of the engine.', value)
    families: dict[str, core.UnknownMetricFamily] = {}
    for replica, its in replicas.items():
      for name, value in _flat('histjax_replica', its):
        family = families.setdefault(
          name,
          core.UnknownMetricFamily(
            name, 'Of the engine of a replica.', labels=['replica']
          ),
        )
        family.add_metric([replica], value)
    yield from families.values()
    info = core.InfoMetricFamily('histjax_model', 'What is served.')
    info.add_metric([], {'fingerprint': self._fingerprint()})
    yield info


def _flat(
  prefix: str, values: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _flat(f'{prefix}_{name}', value)
    elif isinstance(value, numbers.Real):
      yield f'{prefix}_{name}', float(value)
