"""Checkpoints: everything a run needs to go on, or a scorer to start.

A checkpoint is a folder `<workdir>/checkpoints/<step>` of three items:
`params`, `state` (optimizer, step, rng, loss window) and `meta` (JSON: the
config, the place in the data, and what is known of validation). Orbax writes
it under a temporary name and renames it, so a step is there or it is not.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from histjax.training.state import TrainState

FOLDER = 'checkpoints'
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

    Args:
      state: it may be donated as soon as this returns.
      meta: JSON-able; `meta['best_step']`, a step or None, is kept too.
    """
    self._preserve.best_step = meta['best_step']
    self._manager.save(
      int(state.step),
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        state=ocp.args.StandardSave(_flatten(state)),
        meta=ocp.args.JsonSave(dict(meta)),
      ),
      force=True,
    )

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
    where = jax.tree.map(_abstract, template.params)
    rest = jax.tree.map(_abstract, _flatten(template))
    for step, meta in _complete_steps(self._manager, self._set_aside):
      name = f'the checkpoint {_folder(self.workdir) / str(step)}'
      stored = self._manager.item_metadata(step)
      _check_same(name, stored['params'].tree, where)
      _check_same(name, stored['state'].tree, rest)
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
      return _unflatten(template, found['params'], found['state']), meta
    return None

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.close()

  def _set_aside(self, step: int, error: Exception) -> None:
    folder = _folder(self.workdir)
    target = folder / f'incomplete-{step}'
    _log.warning(
      'The checkpoint %s is not complete and is renamed to %s: %s',
      folder / str(step),
      target.name,
      error,
    )
    if jax.process_index() == 0:
      shutil.rmtree(target, ignore_errors=True)
      (folder / str(step)).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('histjax_incomplete_checkpoint')
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
    if step not in manager.all_steps():
      raise FileNotFoundError(
        f'workdir={str(workdir)!r}: the best checkpoint, of step {step}, is '
        "missing; use which='latest'"
      )
    stored = manager.item_metadata(step)['params'].tree
    if template is not None:
      name = f'the checkpoint {_folder(workdir) / str(step)}'
      _check_same(name, stored, template)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored
    )
    found = manager.restore(
      step,
      args=ocp.args.Composite(params=ocp.args.StandardRestore(target)),
    )
  return found['params'], meta['config']


def load_meta(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """`meta` of the latest complete checkpoint; None if there is none."""
  workdir = pathlib.Path(os.path.abspath(workdir))
  if not _folder(workdir).is_dir():
    return None
  with _reading(workdir) as manager:
    for _, meta in _complete_steps(manager):
      return meta
  return None


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
  return _manager(
    workdir, read_only=True, create=False, save_interval_steps=0
  )


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
      items = manager.item_metadata(step)
      if items['params'] is None or items['state'] is None:
        raise ValueError('params or state are missing')
      found = manager.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
      )
    except _UNREADABLE as e:
      if report is not None:
        report(step, e)
      continue
    yield step, found['meta']


def _check_same(name: str, stored: Any, expected: Any) -> None:
  """Raises ValueError, with both sets of keys, unless the trees agree."""
  a, b = _shapes(stored), _shapes(expected)
  if a == b:
    return
  lines = [f'{name} is of another model or optimizer than this config has.']
  if a.keys() != b.keys():
    lines += [
      f'Keys of the checkpoint: {sorted(a)}',
      f'Keys of the config: {sorted(b)}',
      f'Only in the checkpoint: {sorted(a.keys() - b.keys())}',
      f'Only in the config: {sorted(b.keys() - a.keys())}',
    ]
  lines += [
    f'{key}: {a[key]} in the checkpoint, {b[key]} by the config'
    for key in sorted(a.keys() & b.keys())
    if a[key] != b[key]
  ]
  lines.append(
    'Use the config that the run was trained with (load_params returns it), '
    'or another workdir.'
  )
  raise ValueError('\n'.join(lines))


def _shapes(tree: Any) -> dict[str, str]:
  return {
    key: f'{np.dtype(x.dtype).name}{list(x.shape)}'
    for key, x in _by_name(tree).items()
  }


def _by_name(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _flatten(state: TrainState) -> dict[str, Any]:
  """All of the state but the parameters, by name, without typed keys."""
  return _by_name(
    {
      'step': state.step,
      'opt_state': state.opt_state,
      'rng': jax.random.key_data(state.rng),
      'window': state.window,
    }
  )


def _unflatten(
  template: TrainState, params: Any, flat: Mapping[str, Any]
) -> TrainState:
  rest = {
    'step': template.step,
    'opt_state': template.opt_state,
    'rng': template.rng,
    'window': template.window,
  }
  names = list(_by_name(rest))
  rest = jax.tree.unflatten(
    jax.tree.structure(rest), [flat[name] for name in names]
  )
  rng = jax.random.wrap_key_data(
    rest.pop('rng'), impl=jax.random.key_impl(template.rng)
  )
  return TrainState(params=params, rng=rng, **rest)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
