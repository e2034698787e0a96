"""Checkpoints: everything a run needs to go on, or a scorer to start.

A checkpoint is a folder `<workdir>/checkpoints/<step>` of three items:
`variables` (to score with: the average, if one is kept), `state` (optimizer,
step, rng, loss window, and what is in training if `variables` is its average)
and `meta` (JSON: the config, the fingerprint of the data, the place in
it, and what is known of validation), and a list of all its files, see
`integrity`. Orbax writes it under a temporary name and renames it, so a step is
there or it is not. A copy may still be cut off: what is proven to be
incomplete is passed over, any other error is raised, and nothing is deleted.
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
from jax.experimental import multihost_utils

from histjax.training import integrity, trees
from histjax.training import workdir as workdir_lib
from histjax.training.state import TrainState

FOLDER = 'checkpoints'
_REPLACED = 'replaced-'

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
      ValueError: `keep` is below 1, or `workdir` is no local path.
      OSError: `workdir` cannot be written to.
    """
    if keep < 1:
      raise ValueError(f'keep_checkpoints={keep} must be at least 1')
    self.workdir = workdir_lib.prepare(workdir)
    if jax.process_index() == 0:
      _finish_replacing(_folder(self.workdir))
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
    complete.

    Args:
      state: it may be donated as soon as this returns.
      meta: JSON-able; `meta['best_step']`, a step or None, is kept too.
    """
    step = int(state.step)
    self._preserve.best_step = meta['best_step']
    self._manager.wait_until_finished()
    self._saving = step
    replaces = step in self._manager.all_steps()
    if replaces:
      self._rename(step, _folder(self.workdir) / f'{_REPLACED}{step}')
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
        _finish_replacing(_folder(self.workdir))

  def _list(self) -> None:
    """Lists what was written; Orbax renames the folder after it."""
    if jax.process_index() > 0:
      return
    name = f'{self._saving}.orbax-checkpoint-tmp*'
    folders = list(_folder(self.workdir).glob(name))
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
    for _, meta in _complete_steps(self._manager):
      return meta
    return None

  def restore_variables(self, step: int, template: Any) -> Any:
    """The parameters of one step, on the devices of the template's."""
    self._manager.wait_until_finished()
    folder = _folder(self.workdir) / str(step)
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
    reported and renamed to `incomplete-<step>`.

    Args:
      template: a state of the same shapes, on the devices to restore to.

    Returns:
      `(state, meta)`.

    Raises:
      ValueError: the checkpoint is of another model or optimizer, or of
        another version of histjax.
      FileNotFoundError: the checkpoint of the best step is not there, or not
        complete.
      OSError: it cannot be read. No checkpoint is renamed then.
    """
    where = jax.tree.map(_abstract, template.variables)
    rest = jax.tree.map(_abstract, trees.flatten(template))
    for step, meta in _complete_steps(self._manager, self._set_aside):
      folder = _folder(self.workdir) / str(step)
      self._check_best(step, meta['best_step'])
      with integrity.naming(folder):
        for item in ('variables', 'state'):
          integrity.check_opens(folder / item)
        stored = self._manager.item_metadata(step)
        trees_stored = [stored[item].tree for item in ('variables', 'state')]
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
    return None

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.close()

  def _check_best(self, step: int, best: int | None) -> None:
    """Fails now, not after all the training, if the best are lost."""
    if best is None or best == step:
      return
    folder = _folder(self.workdir) / str(best)
    with integrity.naming(folder):
      lost = integrity.missing(folder)
    if lost is not None:
      raise FileNotFoundError(
        f'{folder}, the best on validation before step {step}, is missing or '
        f'not complete ({lost}), and the run would need it in the end; put it '
        'back from a copy, or train in another workdir'
      )

  def _set_aside(self, step: int, lost: str) -> None:
    target = _unused(_folder(self.workdir) / f'incomplete-{step}')
    _log.warning(
      'The checkpoint %s is not complete and is renamed to %s: %s',
      _folder(self.workdir) / str(step),
      target.name,
      lost,
    )
    self._rename(step, target)

  def _rename(self, step: int, target: pathlib.Path) -> None:
    if jax.process_index() == 0:
      (_folder(self.workdir) / str(step)).rename(target)
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
    folder = _folder(workdir) / str(step)
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
    `best_step`, `progress` and `data`.

  Raises:
    FileNotFoundError, ValueError, OSError: see `load_variables`.
  """
  workdir = workdir_lib.resolve(workdir)
  with _reading(workdir) as manager:
    return _newest(manager, workdir)[1]


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


def _unused(path: pathlib.Path) -> pathlib.Path:
  """`path`, or the first of `<path>-2`, `<path>-3`, .. that is not there."""
  number, found = 1, path
  while os.path.lexists(found):
    number += 1
    found = path.with_name(f'{path.name}-{number}')
  return found


def _finish_replacing(folder: pathlib.Path) -> None:
  """Deletes checkpoints that were replaced, or puts them back if not."""
  for old in sorted(folder.glob(f'{_REPLACED}*')):
    new = folder / old.name.removeprefix(_REPLACED)
    if new.exists():
      with integrity.naming(new):
        lost = integrity.missing(new)
      if lost is None:
        shutil.rmtree(old)
        continue
      new.rename(_unused(folder / f'incomplete-{new.name}'))
    old.rename(new)


def _manager(workdir: pathlib.Path, **options: Any) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    _folder(workdir),
    options=ocp.CheckpointManagerOptions(**options),
    item_handlers={
      'variables': ocp.StandardCheckpointHandler(),
      'state': ocp.StandardCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(filename=integrity.META),
    },
  )


def _reading(workdir: pathlib.Path) -> ocp.CheckpointManager:
  if not _folder(workdir).is_dir():
    is_file = workdir.exists() and not workdir.is_dir()
    raise FileNotFoundError(
      f'workdir={str(workdir)!r} '
      f'{"is a file" if is_file else f"has no folder {FOLDER!r}"}: name the '
      'workdir of a training run, or train first'
    )
  return _manager(workdir, read_only=True, create=False, save_interval_steps=0)


def _newest(manager, workdir: pathlib.Path) -> tuple[int, dict[str, Any]]:
  for step, meta in _complete_steps(manager):
    return step, meta
  raise FileNotFoundError(
    f'{_folder(workdir)} has no complete checkpoint: name the workdir of a '
    'training run, or train first'
  )


def _best(workdir: pathlib.Path, step: int, meta: Mapping[str, Any]) -> int:
  best = meta['best_step']
  if best is None:
    raise FileNotFoundError(
      f'workdir={str(workdir)!r}: the run was not validated yet (it is at '
      f"step {step}), so there is no best checkpoint; use which='latest'"
    )
  folder = _folder(workdir) / str(best)
  with integrity.naming(folder):
    lost = integrity.missing(folder)
  if lost is not None:
    raise FileNotFoundError(
      f'workdir={str(workdir)!r}: the best checkpoint, of step {best}, is '
      f"missing or not complete ({lost}); use which='latest'"
    )
  return best


def _complete_steps(
  manager, report=None
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Steps, latest first, with their meta, of those that are complete."""
  for step in sorted(manager.all_steps(), reverse=True):
    folder = pathlib.Path(manager.directory) / str(step)
    with integrity.naming(folder):
      lost = integrity.missing(folder)
      meta = integrity.read_meta(folder)
    if meta is not None:
      # Those without a list are not cut off if they never had one.
      integrity.check_format(folder, meta.pop('format', None))
    if lost is None and meta is None:
      lost = 'meta is missing'
    if lost is not None:
      if report is not None:
        report(step, lost)
      continue
    assert meta is not None
    yield step, meta


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
