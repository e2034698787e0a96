"""Where the shards of a batch job are scored: here, or on a Ray cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from histjax.data import ray_tasks, shards
from histjax.progress import Progress
from histjax.serving import ranked_files
from histjax.serving.batch_worker import Load, Model, Options, Worker


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What an engine needs.

  Attributes:
    parts: to write.
    data: to score.
    options: how.
    model: that scores.
    load: makes it again, elsewhere.
  """

  parts: ranked_files.Parts
  data: shards.Shards
  options: Options
  model: Model
  load: Load


@dataclasses.dataclass(frozen=True)
class Local:
  """In this process, shard after shard."""

  def check(self) -> None:
    """Nothing can be missing."""

  def start(self) -> None:
    """Nothing has to be there."""

  def run(self, job: Job, progress: Progress, stop: Callable[[], None]) -> None:
    """Scores the shards that are missing."""
    users = np.diff(job.data.bounds)
    done = job.parts.done()
    before = int(users[done].sum())
    finished = before

    def tell(some: int) -> None:
      stop()
      progress.tell(
        'scoring', finished + some, int(users.sum()), 'users', before
      )

    tell(0)
    worker = Worker(job.model, job.parts, job.data, job.options)
    for shard in np.flatnonzero(~done).tolist():
      worker.score(shard, tell)
      finished += int(users[shard])


@dataclasses.dataclass(frozen=True)
class Ray:
  """On a Ray cluster, through Ray Data: shards are its rows.

  All nodes must see the inputs, the output and the model by the same paths.

  Attributes:
    num_workers: each with a model of its own.
    num_gpus: of each worker.
    num_cpus: of each worker.
  """

  num_workers: int = 1
  num_gpus: float = 0
  num_cpus: float = 1

  def check(self) -> None:
    """Raises ImportError if Ray is not installed."""
    try:
      import ray.data  # noqa: F401
    except ImportError as error:
      raise ImportError(
        f"engine 'ray' needs Ray, which cannot be imported ({error}); install "
        "the extra: pip install 'histjax[ray]'"
      ) from error

  def start(self) -> None:
    """Joins the cluster: before handlers of signals, which Ray replaces."""
    import ray

    if not ray.is_initialized():
      ray.init()

  def run(self, job: Job, progress: Progress, stop: Callable[[], None]) -> None:
    """Scores the shards that are missing."""
    import ray

    users = np.diff(job.data.bounds)
    done = job.parts.done()
    missing = np.flatnonzero(~done).tolist()
    before = finished = int(users[done].sum())
    progress.tell('scoring', before, int(users.sum()), 'users', before)
    found = (
      ray.data.from_items(
        [{'number': shard} for shard in missing],
        override_num_blocks=len(missing),
      )
      .map_batches(
        _RayWorker,
        fn_constructor_args=(
          job.load,
          job.parts,
          job.options,
          ray_tasks.count_tries(),
        ),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
          size=min(self.num_workers, len(missing))
        ),
        num_gpus=self.num_gpus,
        num_cpus=self.num_cpus,
      )
      .iter_rows()
    )
    for row in found:
      stop()
      finished += int(users[ray_tasks.finished(row)])
      progress.tell('scoring', finished, int(users.sum()), 'users', before)


class _RayWorker:
  """A model in a process of Ray."""

  def __init__(
    self,
    load: Load,
    parts: ranked_files.Parts,
    options: Options,
    tries: Any,
  ):
    data = shards.Shards.load(parts.work)
    self._worker = Worker(load(), parts, data, options)
    self._tries = tries

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return ray_tasks.take(self._worker.score, batch, self._tries)
