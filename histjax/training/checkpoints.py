"""Checkpoints: everything a run needs to go on, or a scorer to start.

A checkpoint is a folder `<workdir>/checkpoints/<step>` of three items:
`params` (to score with: the average, if one is kept), `state` (optimizer,
step, rng, loss window, and the parameters in training if `params` is their
average) and `meta` (JSON: the config, the place in the data, and what is known
of validation). Orbax writes it under a temporary name and renames it, so a
step is there or it is not.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from histjax.training import trees
from histjax.training.state import TrainState

FOLDER = 'checkpoints'
_REPLACED = 'replaced-'
_UNREADABLE = (KeyError, ValueError, OSError)
"""What Orbax raises for a checkpoint of which some files are missing."""

_log = logging.getLogger(__name__)


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
      ValueError: `keep` is below 1.
      OSError: `workdir` cannot be written to.
    """
    if keep < 1:
      raise ValueError(f'keep_checkpoints={keep} must be at least 1')
    self.workdir = prepare_workdir(workdir)
    _finish_replacing(_folder(self.workdir))
    self._preserve = _LatestAndBest(keep)
    self._manager = _manager(
      self.workdir,
      preservation_policy=self._preserve,
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self.close()

  def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Saves at `state.step`, and then deletes what need not be kept.

    A checkpoint of the same step is replaced; it stays until the new one is
    complete.

    Args:
      state: it may be donated as soon as this returns.
      meta: JSON-able; `meta['best_step']`, a step or None, is kept too.
    """
    step = int(state.step)
    self._preserve.best_step = meta['best_step']
    self._manager.wait_until_finished()
    replaces = step in self._manager.all_steps()
    if replaces:
      self._rename(step, f'{_REPLACED}{step}')
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.scoring_params),
        state=ocp.args.StandardSave(trees.flatten(state)),
        meta=ocp.args.JsonSave(dict(meta)),
      ),
      force=True,
    )
    if replaces:
      self._manager.wait_until_finished()
      _finish_replacing(_folder(self.workdir))

  def latest_meta(self) -> dict[str, Any] | None:
    """`meta` of the latest complete checkpoint; None if there is none."""
    for _, meta in _complete_steps(self._manager):
      return meta
    return None

  def restore_params(self, step: int, template: Any) -> Any:
    """The parameters of one step, on the devices of the template's."""
    self._manager.wait_until_finished()
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(jax.tree.map(_abstract, template))
      ),
    )
    return found['params']

  def restore(
    self, template: TrainState
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The latest complete checkpoint, or None if there is none.

    Later ones that are not complete (a copy that was cut off, a full disk) are
    reported and renamed to `incomplete-<step>`.

    Args:
      template: a state of the same shapes, on the devices to restore to.

    Returns:
      `(state, meta)`.

    Raises:
      ValueError: the checkpoint is of another model or optimizer.
    """
    where = jax.tree.map(_abstract, template.scoring_params)
    rest = jax.tree.map(_abstract, trees.flatten(template))
    for step, meta in _complete_steps(self._manager, self._set_aside):
      name = f'the checkpoint {_folder(self.workdir) / str(step)}'
      stored = self._manager.item_metadata(step)
      trees.check_same(name, stored['params'].tree, where)
      trees.check_same(name, stored['state'].tree, rest)
      try:
        found = self._manager.restore(
          step,
          args=ocp.args.Composite(
            params=ocp.args.StandardRestore(where),
            state=ocp.args.StandardRestore(rest),
          ),
        )
      except _UNREADABLE as e:
        self._set_aside(step, e)
        continue
      return trees.unflatten(template, found['params'], found['state']), meta
    return None

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.close()

  def _set_aside(self, step: int, error: Exception) -> None:
    name = f'incomplete-{step}'
    _log.warning(
      'The checkpoint %s is not complete and is renamed to %s: %s',
      _folder(self.workdir) / str(step),
      name,
      error,
    )
    self._rename(step, name)

  def _rename(self, step: int, name: str) -> None:
    target = _folder(self.workdir) / name
    if jax.process_index() == 0:
      shutil.rmtree(target, ignore_errors=True)
      (_folder(self.workdir) / str(step)).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'histjax_checkpoint_{name}')
    self._manager.reload()


def load_params(
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
    `(params, config)`: the parameters on the default device, and the config
    of the run as a dict, for `histjax.config.from_dict`.

  Raises:
    FileNotFoundError: there is no complete checkpoint, or no best one yet.
    ValueError: `which` is neither, or the template has other parameters; both
      sets of keys are in the message.
  """
  if which not in ('best', 'latest'):
    raise ValueError(f"which={which!r} must be 'best' or 'latest'")
  workdir = pathlib.Path(os.path.abspath(workdir))
  with _reading(workdir) as manager:
    step, meta = _newest(manager, workdir)
    if which == 'best':
      if meta['best_step'] is None:
        raise FileNotFoundError(
          f'workdir={str(workdir)!r}: the run was not validated yet (it is at '
          f"step {step}), so there is no best checkpoint; use which='latest'"
        )
      step = meta['best_step']
    try:
      _check_step_opens(manager, step)
    except _UNREADABLE as e:
      raise FileNotFoundError(
        f'workdir={str(workdir)!r}: the best checkpoint, of step {step}, is '
        f"missing or not complete ({e}); use which='latest'"
      ) from e
    stored = manager.item_metadata(step)['params'].tree
    if template is not None:
      name = f'the checkpoint {_folder(workdir) / str(step)}'
      trees.check_same(name, stored, template)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored
    )
    found = manager.restore(
      step,
      args=ocp.args.Composite(params=ocp.args.StandardRestore(target)),
    )
  return found['params'], meta['config']


def prepare_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Creates the folder, and checks that it can be written to.

  Returns:
    Its absolute path.

  Raises:
    OSError: it cannot; PermissionError, NotADirectoryError, ... as the system
      says. The message names the folder.
  """
  path = pathlib.Path(os.path.abspath(workdir))
  probe = path / f'.probe-{os.getpid()}'
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.touch()
    probe.unlink()
  except OSError as e:
    raise type(e)(
      e.errno,
      f'workdir={str(path)!r} cannot be written to ({e.strerror}); name a '
      'folder on a disk that you may write to',
    ) from e
  return path


class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the last `keep` checkpoints and the one of `best_step`."""

  def __init__(self, keep: int):
    self.keep = keep
    self.best_step: int | None = None

  def should_preserve(self, checkpoints, *, context):
    del context
    first = len(checkpoints) - self.keep
    return [
      i >= first or c.step == self.best_step for i, c in enumerate(checkpoints)
    ]


def _folder(workdir: pathlib.Path) -> pathlib.Path:
  return workdir / FOLDER


def _finish_replacing(folder: pathlib.Path) -> None:
  """Deletes checkpoints that were replaced, or puts them back if not."""
  if jax.process_index() > 0:
    return
  for old in folder.glob(f'{_REPLACED}*'):
    new = folder / old.name.removeprefix(_REPLACED)
    if new.exists():
      shutil.rmtree(old)
    else:
      old.rename(new)


def _manager(workdir: pathlib.Path, **options: Any) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    _folder(workdir),
    options=ocp.CheckpointManagerOptions(**options),
    item_handlers={
      'params': ocp.StandardCheckpointHandler(),
      'state': ocp.StandardCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(),
    },
  )


def _reading(workdir: pathlib.Path) -> ocp.CheckpointManager:
  if not _folder(workdir).is_dir():
    raise FileNotFoundError(
      f'workdir={str(workdir)!r} has no folder {FOLDER!r}: name the workdir of '
      'a training run, or train first'
    )
  return _manager(workdir, read_only=True, create=False, save_interval_steps=0)


def _newest(manager, workdir: pathlib.Path) -> tuple[int, dict[str, Any]]:
  for step, meta in _complete_steps(manager):
    return step, meta
  raise FileNotFoundError(
    f'{_folder(workdir)} has no complete checkpoint: name the workdir of a '
    'training run, or train first'
  )


def _complete_steps(
  manager, report=None
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Steps, latest first, with their meta, of those whose items all open."""
  for step in sorted(manager.all_steps(), reverse=True):
    try:
      _check_step_opens(manager, step)
      found = manager.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
      )
    except _UNREADABLE as e:
      if report is not None:
        report(step, e)
      continue
    yield step, found['meta']


def _check_step_opens(manager: ocp.CheckpointManager, step: int) -> None:
  for item in ('params', 'state'):
    _check_opens(pathlib.Path(manager.directory) / str(step) / item)


def _check_opens(folder: pathlib.Path) -> None:
  """Raises one of `_UNREADABLE` if the arrays in `folder` are not all listed.

  Orbax would find out as well, but while reading many of them at once, and
  each of the others then complains on stderr that its event loop is closed.
  """
  if not folder.is_dir():
    raise FileNotFoundError(f'{folder} is missing')
  if (folder / 'manifest.ocdbt').exists():
    base = {'driver': 'file', 'path': f'{folder}/'}
    store = ts.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
    store.list().result()


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
