"""Checkpoints: everything a run needs to go on, or a scorer to start.

A checkpoint is a folder `<workdir>/checkpoints/<step>` of three items:
`variables` (to score with: the average, if one is kept), `state` (optimizer,
step, rng, loss window, and what is in training if `variables` is its average)
and `meta` (JSON: the config, the fingerprint of the data, the place in
it, and what is known of validation), and a list of all its files, see
`integrity`. Orbax writes it under a temporary name and renames it, so a step is
there or it is not. A copy may still be cut off. The rule of reading: the latest
checkpoint that is whole is used, one that lacks files is passed over and left
where it is, and any other error, as of a disk or a network, is raised. Nothing
is renamed or deleted because of what was read.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from histjax.training import integrity, processes, step_folders, trees
from histjax.training import workdir as workdir_lib
from histjax.training.state import TrainState

_USE_LATEST = "take the latest one: --latest, or which='latest' in Python"


class Checkpoints:
  """The checkpoints of a run; use as a context manager.

  Saving continues in the background; leaving the context waits for it.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 2):
    """Opens, or creates, the checkpoints of `workdir`.

    Args:
      workdir: of the run.
      keep: how many of the latest to keep; the best is kept besides.

    Raises:
      ValueError: `keep` is below 1, or `workdir` is no local path.
      OSError: `workdir` cannot be written to.
    """
    if keep < 1:
      raise ValueError(f'keep_checkpoints={keep} must be at least 1')
    self.workdir = workdir_lib.prepare(workdir)
    if jax.process_index() == 0:
      step_folders.finish_replacing(step_folders.of(self.workdir))
    self._preserve = _LatestAndBest(keep)
    self._saving = 0
    self._manager = _manager(
      self.workdir,
      preservation_policy=self._preserve,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._list),
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self.close()

  def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Saves at `state.step`, and then deletes what need not be kept.

    A checkpoint of the same step is replaced; it stays until the new one is
    complete. One that is not whole makes room as `incomplete-<step>`.

    Args:
      state: it may be donated as soon as this returns.
      meta: JSON-able; `meta['best_step']`, a step or None, is kept too.

    Raises:
      OSError: this checkpoint, or the one before, cannot be written, as when
        the disk is full. What was there before still is.
    """
    step = int(state.step)
    with self._writing():
      self._manager.wait_until_finished()
    self._preserve.best_step = meta['best_step']
    self._saving = step
    replaces = step in self._manager.all_steps()
    folder = step_folders.of(self.workdir)
    with self._writing():
      if step in self._preserve.incomplete:
        self._rename(step, step_folders.unused(folder / f'incomplete-{step}'))
        self._preserve.incomplete.remove(step)
        replaces = False
      elif replaces:
        self._rename(step, folder / f'{step_folders.REPLACED}{step}')
      self._manager.save(
        step,
        args=ocp.args.Composite(
          variables=ocp.args.StandardSave(state.scoring_variables),
          state=ocp.args.StandardSave(trees.flatten(state)),
          meta=ocp.args.JsonSave({**meta, 'format': integrity.FORMAT}),
        ),
        force=True,
      )
      if replaces:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
          step_folders.finish_replacing(folder)

  def check(self) -> None:
    """Raises OSError if the last save has failed, without waiting for it."""
    with self._writing():
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says which checkpoint failed, and which one is still good."""
    try:
      yield
    except Exception as e:  # Orbax raises errors of many kinds.
      folder = step_folders.of(self.workdir)
      if jax.process_index() == 0:
        with contextlib.suppress(OSError):
          step_folders.finish_replacing(folder)
      good = step_folders.whole(folder)
      raise OSError(
        f'the checkpoint of step {self._saving} could not be written to '
        f'{folder} ({type(e).__name__}: {_shortened(e)}). '
        + (
          f'The last good one is that of step {good}'
          if good is not None
          else 'There is none yet'
        )
        + ': make room, and run the same again to go on from there'
      ) from e

  def _list(self) -> None:
    """Lists what was written; Orbax renames the folder after it."""
    if jax.process_index() > 0:
      return
    name = f'{self._saving}.orbax-checkpoint-tmp*'
    folders = list(step_folders.of(self.workdir).glob(name))
    if not folders:
      raise RuntimeError(f'Orbax has no folder {name} to write files.json to')
    for folder in folders:
      integrity.write_listing(folder)

  def latest_meta(self) -> dict[str, Any] | None:
    """`meta` of the latest complete checkpoint; None if there is none.

    Raises:
      ValueError: it is of another version of histjax.
      OSError: it cannot be read.
    """
    folder = step_folders.of(self.workdir)
    steps = self._manager.all_steps()
    for _, meta in step_folders.complete_steps(folder, steps):
      return meta
    return None

  def _latest(self) -> int | None:
    """The latest complete step, as process 0 finds it."""
    steps, found = sorted(self._manager.all_steps(), reverse=True), None
    folder = step_folders.of(self.workdir)
    if jax.process_index() == 0:
      lacking: dict[int, str] = {}
      for step, _ in step_folders.complete_steps(
        folder, steps, lacking.__setitem__
      ):
        found = step
        break
      step_folders.report(folder, lacking, found)
      if steps and found is None:
        raise FileNotFoundError(
          f'none of the checkpoints in {folder} is whole '
          f'({lacking[steps[0]]} in that of step {steps[0]}): put the files '
          'back, or train in another workdir'
        )
    # Storage that is shared may not show the same to all at the same time.
    found = json.loads(processes.exchange(json.dumps(found))[0])
    if found is not None:
      self._preserve.incomplete = {step for step in steps if step > found}
    return found

  def restore_variables(self, step: int, template: Any) -> Any:
    """The parameters of one step, on the devices of the template's."""
    self._manager.wait_until_finished()
    folder = step_folders.of(self.workdir) / str(step)
    with integrity.naming(folder):
      integrity.check_opens(folder / 'variables')
      found = self._manager.restore(
        step,
        args=ocp.args.Composite(
          variables=ocp.args.StandardRestore(jax.tree.map(_abstract, template))
        ),
      )
    return found['variables']

  def restore(
    self, template: TrainState
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The latest complete checkpoint, or None if there is none.

    Later ones of which files are missing (a copy that was cut off) are
    reported, and left where they are: they are neither counted nor deleted.

    Args:
      template: a state of the same shapes, on the devices to restore to.

    Returns:
      `(state, meta)`.

    Raises:
      ValueError: the checkpoint is of another model or optimizer, or of
        another version of histjax.
      FileNotFoundError: there are checkpoints, and none is complete, or that
        of the best step is not.
      OSError: it cannot be read.
    """
    self._manager.wait_until_finished()
    step = self._latest()
    if step is None:
      return None
    where = jax.tree.map(_abstract, template.variables)
    rest = jax.tree.map(_abstract, trees.flatten(template))
    folder = step_folders.of(self.workdir) / str(step)
    with integrity.naming(folder):
      meta = integrity.read_meta(folder)
      if meta is None:
        raise FileNotFoundError('meta is missing')
      meta.pop('format')
      for item in ('variables', 'state'):
        integrity.check_opens(folder / item)
      stored = self._manager.item_metadata(step)
      trees_stored = [stored[item].tree for item in ('variables', 'state')]
    self._check_best(step, meta['best_step'])
    for tree, expected in zip(trees_stored, (where, rest), strict=True):
      trees.check_same(f'the checkpoint {folder}', tree, expected)
    with integrity.naming(folder):
      found = self._manager.restore(
        step,
        args=ocp.args.Composite(
          variables=ocp.args.StandardRestore(where),
          state=ocp.args.StandardRestore(rest),
        ),
      )
    return trees.unflatten(template, found['variables'], found['state']), meta

  def close(self) -> None:
    """Waits until everything is on disk.

    Raises:
      OSError: it cannot be written.
    """
    with self._writing():
      self._manager.close()

  def _check_best(self, step: int, best: int | None) -> None:
    """Fails now, not after all the training, if the best are lost."""
    if best is None or best == step:
      return
    folder = step_folders.of(self.workdir) / str(best)
    with integrity.naming(folder):
      lost = integrity.missing(folder)
    if lost is not None:
      raise FileNotFoundError(
        f'{folder}, the best on validation before step {step}, is missing or '
        f'not complete ({lost}), and the run would need it in the end; put it '
        'back from a copy, or train in another workdir'
      )

  def _rename(self, step: int, target: pathlib.Path) -> None:
    if jax.process_index() == 0:
      (step_folders.of(self.workdir) / str(step)).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'histjax_checkpoint_{step}')
    self._manager.reload()


def load_variables(
  workdir: str | os.PathLike[str],
  which: Literal['best', 'latest'] = 'best',
  *,
  template: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The parameters of a run, for scoring; nothing is written.

  Args:
    workdir: of the run.
    which: 'best' on validation, or 'latest'.
    template: parameters (arrays or `jax.ShapeDtypeStruct`s) of the model that
      they are for; None: not checked.

  Returns:
    `(variables, config)`: the parameters on the default device, and the config
    of the run as a dict, for `histjax.config.from_dict`.

  Raises:
    FileNotFoundError: there is no complete checkpoint, or no best one yet.
    ValueError: `which` is neither, the run is of another version of histjax,
      or the template has other parameters; both sets of keys are in the
      message.
    OSError: a checkpoint cannot be read.
  """
  if which not in ('best', 'latest'):
    raise ValueError(f"which={which!r} must be 'best' or 'latest'")
  workdir = workdir_lib.resolve(workdir)
  with _reading(workdir) as manager:
    step, meta = _newest(manager, workdir)
    if which == 'best':
      step = _best(workdir, step, meta)
    folder = step_folders.of(workdir) / str(step)
    with integrity.naming(folder):
      integrity.check_opens(folder / 'variables')
      stored = manager.item_metadata(step)['variables'].tree
    if template is not None:
      trees.check_same(f'the checkpoint {folder}', stored, template)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored
    )
    with integrity.naming(folder):
      found = manager.restore(
        step,
        args=ocp.args.Composite(variables=ocp.args.StandardRestore(target)),
      )
  return found['variables'], meta['config']


def load_meta(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """What the latest complete checkpoint of a run says of it.

  Args:
    workdir: of the run.

  Returns:
    `config`, for `histjax.config.from_dict`; `fingerprint` of its data, see
    `histjax.data.fingerprint`; `features`, the digest of what is derived of it;
    `step`, `best_step`, `progress` and `data`.

  Raises:
    FileNotFoundError, ValueError, OSError: see `load_variables`.
  """
  workdir = workdir_lib.resolve(workdir)
  with _reading(workdir) as manager:
    step, meta = _newest(manager, workdir)
    return {**meta, 'step': step}


class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the last `keep` checkpoints, that of `best_step`, and `incomplete`.

  Those that are not whole do not count: they would take the place of a good
  one. Nor are they deleted, since files may turn up.
  """

  def __init__(self, keep: int):
    self.keep = keep
    self.best_step: int | None = None
    self.incomplete: set[int] = set()

  def should_preserve(self, checkpoints, *, context):
    del context
    whole = sorted({c.step for c in checkpoints} - self.incomplete)
    kept = {*whole[-self.keep :], *self.incomplete, self.best_step}
    return [c.step in kept for c in checkpoints]


def _shortened(error: Exception) -> str:
  """Orbax and TensorStore tell long stories, whose end is the cause."""
  text = str(error).strip().partition('\n')[0]
  return text if len(text) < 400 else f'{text[:150]} .. {text[-200:]}'


def _manager(workdir: pathlib.Path, **options: Any) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    step_folders.of(workdir),
    options=ocp.CheckpointManagerOptions(**options),
    item_handlers={
      'variables': ocp.StandardCheckpointHandler(),
      'state': ocp.StandardCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(filename=integrity.META),
    },
  )


def _reading(workdir: pathlib.Path) -> ocp.CheckpointManager:
  if not step_folders.of(workdir).is_dir():
    is_file = workdir.exists() and not workdir.is_dir()
    lacks = f'has no folder {step_folders.FOLDER!r}'
    raise FileNotFoundError(
      f'workdir={str(workdir)!r} '
      f'{"is a file" if is_file else lacks}: name the workdir of a training '
      'run, or train first'
    )
  logger = logging.get_absl_logger()
  logger.addFilter(_is_news)
  try:
    return _manager(
      workdir, read_only=True, create=False, save_interval_steps=0
    )
  finally:
    logger.removeFilter(_is_news)


def _is_news(record) -> bool:
  """Not so that Orbax has been told only to read, of which it warns."""
  return 'directory is read only' not in record.getMessage()


def _newest(manager, workdir: pathlib.Path) -> tuple[int, dict[str, Any]]:
  for step, meta in step_folders.complete_steps(
    step_folders.of(workdir), manager.all_steps()
  ):
    return step, meta
  raise FileNotFoundError(
    f'{step_folders.of(workdir)} has no complete checkpoint: name the workdir '
    'of a training run, or train first'
  )


def _best(workdir: pathlib.Path, step: int, meta: Mapping[str, Any]) -> int:
  best = meta['best_step']
  if best is None:
    raise FileNotFoundError(
      f'workdir={str(workdir)!r}: the run was not validated yet (it is at '
      f'step {step}), so there is no best checkpoint; {_USE_LATEST}'
    )
  folder = step_folders.of(workdir) / str(best)
  with integrity.naming(folder):
    lost = integrity.missing(folder)
  if lost is not None:
    raise FileNotFoundError(
      f'workdir={str(workdir)!r}: the best checkpoint, of step {best}, is '
      f'missing or not complete ({lost}); {_USE_LATEST}'
    )
  return best


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
