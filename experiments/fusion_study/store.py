"""The files of a study: of each cell a JSON and the scores on test.

`<workdir>/cells/<name>.json` says what was trained, on what, and what came of
it; the `.npz` beside it has arrays sorted by event: `event`, the index in the
log, `user`, `label` and `logit`. A trial has no test metrics and no scores.
Each file is there whole or not at all, and a cell counts as finished once its
JSON is there.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from histjax.training import report

FOLDER = 'cells'
STUDY_FILE = 'study.json'
"""In the workdir, the `StudyConfig` that ran last."""


def json_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Where the cell `name` is kept."""
  return workdir / FOLDER / f'{name}.json'


def write_cell(
  workdir: pathlib.Path,
  name: str,
  values: Mapping[str, Any],
  scores: Mapping[str, np.ndarray] | None,
) -> None:
  """Writes a finished cell; NaN becomes null."""
  path = json_path(workdir, name)
  path.parent.mkdir(parents=True, exist_ok=True)
  if scores is not None:
    temporary = path.with_suffix(f'.{os.getpid()}.tmp')
    with open(temporary, 'wb') as f:
      np.savez_compressed(f, allow_pickle=False, **scores)
    os.replace(temporary, path.with_suffix('.npz'))
  report.write_json(path, values)


def read_cell(workdir: pathlib.Path, name: str) -> dict[str, Any] | None:
  """The JSON of a finished cell; None if it is not finished."""
  path = json_path(workdir, name)
  return report.read_json(path) if path.exists() else None


def read_scores(workdir: pathlib.Path, name: str) -> dict[str, np.ndarray]:
  """The scores of a finished cell.

  Raises:
    FileNotFoundError: they are not there; the message says what to do.
  """
  path = json_path(workdir, name).with_suffix('.npz')
  if not path.exists():
    raise FileNotFoundError(
      f'{path} is missing, the scores of a finished cell; put it back, or '
      f'delete {path.with_suffix(".json")} to have the cell trained again'
    )
  with np.load(path) as stored:
    return dict(stored)


def finished_names(workdir: pathlib.Path) -> list[str]:
  """The names of all finished cells, of whatever study, sorted."""
  folder = workdir / FOLDER
  return sorted(
    path.relative_to(folder).with_suffix('').as_posix()
    for path in folder.rglob('*.json')
  )
