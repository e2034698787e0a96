"""The folders that checkpoints are, without what is in them."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from histjax.training import integrity

FOLDER = 'checkpoints'
REPLACED = 'replaced-'

_log = logging.getLogger(__name__)


def of(workdir: pathlib.Path) -> pathlib.Path:
  """Where a run has its checkpoints."""
  return workdir / FOLDER


def unused(path: pathlib.Path) -> pathlib.Path:
  """`path`, or the first of `<path>-2`, `<path>-3`, .. that is not there."""
  number, found = 1, path
  while os.path.lexists(found):
    number += 1
    found = path.with_name(f'{path.name}-{number}')
  return found


def finish_replacing(folder: pathlib.Path) -> None:
  """Deletes checkpoints that were replaced, or puts them back if not."""
  for old in sorted(folder.glob(f'{REPLACED}*')):
    new = folder / old.name.removeprefix(REPLACED)
    if not new.exists():
      old.rename(new)
      continue
    with integrity.naming(new):
      lost = integrity.missing(new)
    if lost is None:
      shutil.rmtree(old)
      continue
    with integrity.naming(old):
      if integrity.missing(old) is not None:
        continue  # Neither is whole; both are left.
    # A copy that was cut off. The old one is whole and takes its place.
    new.rename(unused(folder / f'incomplete-{new.name}'))
    old.rename(new)


def complete_steps(
  folder: pathlib.Path,
  steps: Iterable[int],
  report: Callable[[int, str], Any] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Steps, latest first, with their meta, of those that are complete.

  Args:
    folder: of the checkpoints.
    steps: that are there.
    report: is called with each step that is not complete, and what it lacks.

  Raises:
    ValueError: one is of another version of histjax.
    OSError: one cannot be read.
  """
  for step in sorted(steps, reverse=True):
    found = folder / str(step)
    with integrity.naming(found):
      lost = integrity.missing(found)
      meta = integrity.read_meta(found)
    if meta is not None:
      # Those without a list are not cut off if they never had one.
      integrity.check_format(found, meta.pop('format', None))
    if lost is None and meta is None:
      lost = 'meta is missing'
    if lost is not None:
      if report is not None:
        report(step, lost)
      continue
    assert meta is not None
    yield step, meta


def whole(folder: pathlib.Path) -> int | None:
  """The latest step that is proven to be whole, if it can be told."""
  with contextlib.suppress(OSError):
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
    for step in sorted(steps, reverse=True):
      if integrity.missing(folder / str(step)) is None:
        return step
  return None


def report(
  folder: pathlib.Path, lacking: Mapping[int, str], used: int | None
) -> None:
  """Says which checkpoints are passed over, and why."""
  for step, lost in lacking.items():
    # An error, not a warning, which is not shown by default.
    _log.error(
      'The checkpoint %s is not complete (%s). It is left there, and %s is '
      'used instead',
      folder / str(step),
      lost,
      'none' if used is None else f'that of step {used}',
    )
