"""One training run, from its config to the metrics on the test split."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from histjax import metrics
from histjax.data import cold, datasets, pipeline
from histjax.data import fingerprint as fingerprint_lib
from histjax.models.ranker import Ranker
from histjax.training import checkpoints as checkpoints_lib
from histjax.training import config as config_lib
from histjax.training import evaluation, processes, sharding, watchdog
from histjax.training import identity as identity_lib
from histjax.training import optimizer as optimizer_lib
from histjax.training import report as report_lib
from histjax.training import state as state_lib
from histjax.training import step as step_lib
from histjax.training import tables as tables_lib
from histjax.training import workdir as workdir_lib
from histjax.training.config import TrainConfig
from histjax.training.interrupt import Interrupt
from histjax.types import RankingBatch

_PADDING = 0.1
"""Of a batch's rows, above which it is worth a word."""


def train_and_evaluate(
  config: TrainConfig,
  workdir: str | os.PathLike[str],
  *,
  dataset: datasets.Dataset | None = None,
  mesh: Mesh | None = None,
  rules: sharding.Rules | None = None,
) -> dict[str, Any]:
  """Trains a ranker, and tests the parameters that are best on validation.

  A run that was interrupted goes on where it stopped, as if it had not been:
  on CPUs the result is the same to the bit. SIGTERM and SIGINT (Ctrl-C) end
  it between two steps, after saving; this then returns as usual, with
  'interrupted' set. A run that has finished is not repeated.

  Args:
    config: the run.
    workdir: a folder for its checkpoints, scalars, metrics.jsonl (each line an
      entry of `history`, up to the last validation) and metrics.json.
    dataset: what `config.data` describes, if it is loaded already.
    mesh: of `sharding.data_mesh`; None: over all devices of all processes. A
      run may go on on another one.
    rules: how variables are split over it, see `sharding.specs`. They are
      printed at the start.

  Returns:
    `interrupted`, a bool; `step`, the updates made; `best_step`, `validation`
    and `test`: the step that was best, and its metrics (None if interrupted
    before that was known); `ids`: of each feature with a vocabulary or a hash,
    see `vocabulary.IdCounts`; `left_out`: of 'validation' and 'test' what
    `config.leave_out` left out, see `data.cold.Counts`; `history`: for each
    report of the training loss and each validation, a dict with its `step` and
    `loss` or `validation`.
    The same, but for `interrupted`, is in metrics.json once it is finished.

  Raises:
    ValueError: the config does not fit the dataset, a metric to select by is
      undefined on validation or test, a batch has more distinct ids than
      `config.max_unique_ids` says, another process trains in `workdir`, or
      that holds a run of another config (the message names the fields), of
      data that has changed, or of another version of histjax.
    ImportError: `config.tensorboard` without tensorboardX.
    FloatingPointError: the loss, its gradient or the parameters are not
      finite. The checkpoints are those from before.
    OSError: `workdir` cannot be written to, as when the disk is full, or a
      checkpoint cannot be read. The checkpoints are those from before.
  """
  with watchdog.watching():
    return _train_and_evaluate(config, workdir, dataset, mesh, rules)


def _train_and_evaluate(
  config: TrainConfig,
  workdir: str | os.PathLike[str],
  dataset: datasets.Dataset | None,
  mesh: Mesh | None,
  rules: sharding.Rules | None,
) -> dict[str, Any]:
  config_lib.check_kinds(config, dataset)
  workdir = workdir_lib.prepare(workdir)
  processes.check_shared(workdir)
  finished = report_lib.read_metrics(workdir)
  if finished is not None:
    return _finished(config, workdir, dataset, finished)
  if config.tensorboard:
    report_lib.tensorboard_writer()  # Fails now if it is not installed.
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(workdir_lib.alone(workdir))
    checkpoints = stack.enter_context(
      checkpoints_lib.Checkpoints(workdir, keep=config.keep_checkpoints)
    )
    meta = checkpoints.latest_meta()
    if meta is not None:
      identity_lib.check_same_run(config, meta['config'], workdir)
    if dataset is None:
      dataset = datasets.load(config.data)
    config_lib.check_dataset(config, dataset)
    digest = fingerprint_lib.fingerprint(dataset)
    if meta is not None:
      identity_lib.check_fingerprint(digest, meta['fingerprint'], workdir)
    mesh = sharding.data_mesh() if mesh is None else mesh
    # What says of the files of a run which run it is.
    identity = {'config': identity_lib.saved(config), 'fingerprint': digest}
    processes.check_same(
      {
        'the config': identity_lib.of_result(identity_lib.saved(config)),
        'the data': digest,
        'the number of devices': len(mesh.local_devices),
      }
    )
    batches = pipeline.train_batches(
      dataset.splits['train'],
      config.pipeline,
      row_multiple=mesh.size,
      shard_index=jax.process_index(),
      shard_count=jax.process_count(),
    )
    stack.enter_context(contextlib.closing(batches))
    interrupt = stack.enter_context(Interrupt())
    run = _Run(
      config,
      workdir,
      dataset,
      identity,
      mesh,
      rules,
      batches,
      checkpoints,
      interrupt,
    )
    stack.enter_context(run.reporter)
    if jax.process_index() == 0:  # It is the run that was there, if one was.
      dataset.features.save(workdir)
    return run.result() if run.train() else run.interrupted()


def _finished(
  config: TrainConfig,
  workdir: pathlib.Path,
  dataset: datasets.Dataset | None,
  values: dict[str, Any],
) -> dict[str, Any]:
  """The metrics of a finished run, if it is the one that is asked for."""
  identity_lib.check_same_run(config, values.pop('config'), workdir)
  if dataset is None:
    try:
      dataset = datasets.load(config.data)
    except (ValueError, OSError) as e:
      raise ValueError(
        f'workdir={str(workdir)!r} holds this run, finished, but whether its '
        f'data is still the same cannot be checked: {e}. Its metrics are in '
        f'{report_lib.METRICS_FILE}'
      ) from e
  digest = fingerprint_lib.fingerprint(dataset)
  identity_lib.check_fingerprint(digest, values.pop('fingerprint'), workdir)
  if jax.process_index() == 0:
    print(f'{workdir} holds this run, finished; its metrics are returned')
  return {'interrupted': False, **values}


@dataclasses.dataclass
class _Progress:
  """What is known of the run besides the state; it is saved with it."""

  best_step: int | None = None
  best_metrics: dict[str, float] | None = None
  no_better: int = 0
  evaluated_step: int = 0
  stopped: bool = False
  history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class _Run:
  """The loop's variables."""

  def __init__(
    self,
    config: TrainConfig,
    workdir: pathlib.Path,
    dataset: datasets.Dataset,
    identity: dict[str, Any],
    mesh: Mesh,
    rules: sharding.Rules | None,
    batches: pipeline.BatchIterator,
    checkpoints: checkpoints_lib.Checkpoints,
    interrupt: Interrupt,
  ):
    self.config = config
    self.workdir = workdir
    self.splits, self.ids = dataset.splits, dataset.ids
    self.known: cold.Known | None = None
    self.left_out: dict[str, cold.Counts] = {}
    if config.leave_out:
      self.known = cold.Known(config.leave_out, self.splits['train'])
      self.left_out = {
        split: self.known.counts(self.splits[split])
        for split in ('validation', 'test')
      }
    self.identity = identity
    self.features = dataset.features.digest()
    self.mesh, self.rules = mesh, rules
    self.checkpoints = checkpoints
    self.interrupt = interrupt
    self.model = Ranker(config.model)
    self.batches = batches
    epoch = self.batches.batches_per_epoch
    self.num_steps = config.num_steps or epoch * (config.num_epochs or 0)
    self.eval_every = config.eval_every or epoch
    tx = optimizer_lib.make_optimizer(config.optimizer, self.num_steps)
    self.train_step = step_lib.make_train_step(
      self.model,
      tx,
      config.model.schema,
      task_weights=config.task_weights,
      rank_loss=config.rank_loss,
      max_unique=config.max_unique_ids,
      row_dtype=config.model.dtype,
      mesh=mesh,
      rules=rules,
    )
    self.state = state_lib.create_state(
      self.model,
      tx,
      config.model.schema,
      config.seed,
      average=config.average,
      mesh=mesh,
      rules=rules,
    )
    self.progress = _Progress()
    self.shapes: set[tuple[int, ...]] = set()
    self.closed: tuple[int, state_lib.LossWindow] | None = None
    restored = checkpoints.restore(self.state)
    if restored is not None:
      self.state, meta = restored
      self.batches.set_state(meta['data'])
      self.progress = _Progress(**meta['progress'])
    self.step = int(self.state.step)
    self.saved_step = self.step if restored else -1
    self.unsaved = restored is None
    self.reporter = report_lib.Reporter(
      workdir,
      self.num_steps,
      start=self.step,
      tensorboard=config.tensorboard,
      quiet=jax.process_index() > 0,
    )
    count = sum(x.size for x in jax.tree.leaves(self.state.variables))
    self.reporter.message(
      f'{"Resuming" if restored else "Starting"} at step {self.step} of '
      f'{self.num_steps}: {len(self.splits["train"])} rows, {epoch} batches '
      f'an epoch, {count} parameters, {mesh.size} devices'
    )
    if self.batches.padding > _PADDING:
      self.reporter.message(
        f'Up to {self.batches.padding:.0%} of the rows of a batch are padding '
        f'to {mesh.size} devices: set pipeline.row_multiple={mesh.size} in '
        'another run, or a larger pipeline.batch_events'
      )
    if isinstance(config.data.source, datasets.Events) and dataset.log:
      self.reporter.message(dataset.log.period)
    for ids in dataset.ids:
      self.reporter.message(str(ids))
    for split, counts in self.left_out.items():
      self.reporter.message(f'{split}: {counts}')
    if mesh.size > 1:
      self.reporter.message(
        sharding.describe(self.state.variables, mesh, rules)
      )

  def train(self) -> bool:
    """Trains to the end; False if interrupted."""
    while True:
      if self._is_due(self.eval_every) and (
        self.progress.evaluated_step < self.step
      ):
        evaluated = self._validate_safely()
        if not evaluated:
          break
        self._save()
      elif self._is_due(self.config.checkpoint_every):
        self._save()
      if self.progress.stopped or self.step >= self.num_steps:
        return True
      if self.interrupt.requested(self.step):
        break
      self._advance()
    self._save()
    return False

  def interrupted(self) -> dict[str, Any]:
    """What is known when the run is interrupted."""
    reason = self.interrupt.signal
    self.reporter.message(
      f'Stopped at step {self.step} by {reason.name if reason else "request"}; '
      'saved: the same command goes on from there'
    )
    return {'interrupted': True, **self._summary(test=None)}

  def result(self) -> dict[str, Any]:
    """Tests the best parameters and writes metrics.json."""
    best = self.progress.best_step
    if best == self.step:
      variables = self.state.scoring_variables
    else:
      assert best is not None  # The last step is validated.
      variables = self.checkpoints.restore_variables(best, self.state.variables)
    found = evaluation.predict(
      self.model,
      variables,
      self.splits['test'],
      self.config.pipeline,
      self.mesh,
      rules=self.rules,
      should_stop=self.interrupt.received,
      known=self.known,
    )
    if found is None:
      return self.interrupted()
    summary = self._summary(test=found.result())
    if jax.process_index() == 0:
      report_lib.write_metrics(self.workdir, {**summary, **self.identity})
    self.reporter.scalars(
      self.step, {f'test/{k}': v for k, v in summary['test'].items()}
    )
    self.reporter.message(
      f'Test, with the parameters of step {best}:\n'
      f'{report_lib.metrics_table(summary["test"])}'
    )
    return {'interrupted': False, **summary}

  def _summary(self, test: dict[str, float] | None) -> dict[str, Any]:
    return {
      'step': self.step,
      'best_step': self.progress.best_step,
      'validation': self.progress.best_metrics,
      'test': test,
      'ids': [dataclasses.asdict(ids) for ids in self.ids],
      'left_out': {
        split: dataclasses.asdict(counts)
        for split, counts in self.left_out.items()
      },
      'history': self.progress.history,
    }

  def _is_due(self, every: int | None) -> bool:
    if not self.step or not every:
      return False
    return self.step % every == 0 or self.step == self.num_steps

  def _advance(self) -> None:
    batch = next(self.batches)
    events = next(iter(batch.history.features.values()))
    shape = (*events.shape, batch.candidates.shape[1])
    placed = sharding.put_batch(batch, self.mesh)
    if shape in self.shapes:
      self.state = self.train_step(self.state, placed)
    else:
      self._compile(shape, placed)
    self.step += 1
    self.unsaved = True
    self._report()  # Of the steps before this one, which has work to do.
    if self._is_due(self.config.log_every):
      self._close_window()

  def _compile(self, shape: tuple[int, int, int], batch: RankingBatch) -> None:
    """The first step of a shape; its compilation is no training time."""
    self.shapes.add(shape)
    rows, events, candidates = shape
    jax.block_until_ready(self.state.step)  # Earlier steps are training.
    self._report()
    self.reporter.pause()
    self.reporter.message(
      f'Compiling shape {len(self.shapes)} of {len(self.batches.buckets)}: '
      f'{rows} rows of {events} events and {candidates} candidates'
    )
    self.state = self.train_step(self.state, batch)
    self.reporter.resume()

  def _close_window(self) -> None:
    """Begins to fetch the loss; the device goes on with the next window."""
    window = self.state.window
    for x in jax.tree.leaves(window):
      x.copy_to_host_async()
    self.closed = self.step, window
    empty = sharding.replicate(state_lib.LossWindow.empty(), self.mesh)
    self.state = dataclasses.replace(self.state, window=empty)

  def _report(self) -> None:
    """Reports the window that is closed, if there is one."""
    if self.closed is None:
      return
    step, found = self.closed
    self.closed = None
    self.checkpoints.check()
    window = self._check_finite(found)
    steps = int(window.steps)
    loss = float(window.loss) / steps
    self.reporter.progress(
      step,
      loss=loss,
      steps=steps,
      candidates=int(window.candidates),
      shapes=len(self.shapes),
    )
    self.progress.history.append({'step': step, 'loss': loss})

  def _validate_safely(self) -> bool:
    """`_validate`; if it fails, nothing of training is lost."""
    if jax.process_count() > 1:  # One alone may fail, and cannot save alone.
      self._save()
      return self._validate()
    try:
      return self._validate()
    except Exception:
      self._save()
      raise

  def _validate(self) -> bool:
    """Evaluates and notes what follows from it; False if interrupted."""
    self._report()
    self._check_finite()
    self.reporter.pause()
    found = evaluation.predict(
      self.model,
      self.state.scoring_variables,
      self.splits['validation'],
      self.config.pipeline,
      self.mesh,
      rules=self.rules,
      should_stop=self.interrupt.received,
      known=self.known,
    )
    self.reporter.resume()
    if found is None:
      return False
    values = found.result()
    self.reporter.scalars(
      self.step, {f'validation/{k}': v for k, v in values.items()}
    )
    self._note(values)
    return True

  def _note(self, values: dict[str, float]) -> None:
    weights, progress = self.config.criterion, self.progress
    value, best = metrics.criterion(values, weights), progress.best_metrics
    if best is None or value > metrics.criterion(best, weights):
      progress.best_step, progress.best_metrics = self.step, values
      progress.no_better = 0
    else:
      progress.no_better += 1
    assert progress.best_metrics is not None
    said = report_lib.format_validation(values, progress.best_metrics, weights)
    mark = 'best so far'
    if progress.no_better:
      mark = f'not better than step {progress.best_step}'
    self.reporter.message(f'Validation at step {self.step} ({mark}): {said}')
    progress.evaluated_step, self.unsaved = self.step, True
    progress.history.append({'step': self.step, 'validation': values})
    if jax.process_index() == 0:
      report_lib.write_history(self.workdir, progress.history)
    patience = self.config.patience
    if patience is not None and progress.no_better >= patience:
      progress.stopped = True
      self.reporter.message(
        f'{" + ".join(weights)} has not improved for {patience} validations: '
        'stopping early'
      )

  def _save(self) -> None:
    """Saves, if anything has changed."""
    if not self.unsaved:
      return
    self._report()
    self._check_finite()
    self.reporter.pause()
    self.checkpoints.save(
      self.state,
      {
        'best_step': self.progress.best_step,
        **self.identity,
        'features': self.features,
        'progress': dataclasses.asdict(self.progress),
        'data': self.batches.get_state(),
      },
    )
    self.saved_step, self.unsaved = self.step, False
    self.reporter.resume()

  def _check_finite(
    self, window: state_lib.LossWindow | None = None
  ) -> state_lib.LossWindow:
    """The window, or None: the current one, on the host; it waits for it."""
    found: state_lib.LossWindow = sharding.to_host(
      self.state.window if window is None else window
    )
    if found.diverged_at >= 0:
      step, saved = int(found.diverged_at) + 1, self.saved_step
      self._check_unique(step)
      raise FloatingPointError(
        'the loss, its gradient or the parameters were not finite in step '
        f'{step}. Lower optimizer.learning_rate='
        f'{self.config.optimizer.learning_rate} or '
        'optimizer.table_learning_rate='
        f'{self.config.optimizer.table_learning_rate}, set '
        'optimizer.clip_norm, or look for huge feature values. '
        + (
          f'The last good checkpoint is that of step {saved}'
          if saved >= 0
          else 'There is no checkpoint yet'
        )
      )
    return found

  def _check_unique(self, step: int) -> None:
    """Raises ValueError if the step's batch exceeds `max_unique_ids`."""
    bounds = self.config.max_unique_ids
    if not bounds:
      return
    batch = self.batches.whole(step - 1)  # Each step takes the next one.
    found = tables_lib.num_touched(self.config.model.schema, batch)
    for table, bound in bounds.items():
      if found[table] > bound:
        raise ValueError(
          f'max_unique_ids has {table!r}: {bound}, but the batch of step '
          f'{step} has {found[table]} distinct ids of that table, so its loss '
          'is NaN. Raise it, or leave the table out, in another workdir: some '
          'other batch may have more'
        )
