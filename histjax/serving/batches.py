"""Jobs as the arrays of one program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from histjax.schema import Categorical
from histjax.serving.planning import Job, Model
from histjax.types import Candidates, History


def history(model: Model, jobs: Sequence[Job]) -> History:
  """The events to read, `[B, E]`."""
  parts = [job.events() for job in jobs]
  names = [f.name for f in model.schema.history_features]
  length = np.array([len(part[names[0]]) for part in parts], np.int32)
  return History(_stacked(parts, names, max(1, length.max())), length)


def zeros(model: Model, length: int) -> History:
  """A history of one user, to measure."""
  return History(
    {
      f.name: np.zeros(
        (1, length), np.int32 if isinstance(f, Categorical) else np.float32
      )
      for f in model.schema.history_features
    },
    np.array([length], np.int32),
  )


def candidates(model: Model, jobs: Sequence[Job]) -> Candidates:
  """All candidates, `[B, C]`."""
  if len(jobs) == 1:
    shown, one = jobs[0].candidates, jobs[0].visible
    return Candidates(
      {name: shown[name][None] for name in model.shown},
      None if one is None else one[None].astype(np.int32),
    )
  counts = [len(job.asked) for job in jobs]
  parts = [job.candidates for job in jobs]
  width, visible, mask = max(counts), None, None
  seen = [job.visible for job in jobs]
  if any([x is not None for x in seen]):
    whole = [
      {'': np.full(len(job.asked), job.state.length) if x is None else x}
      for job, x in zip(jobs, seen, strict=True)
    ]
    visible = _stacked(whole, [''], width)[''].astype(np.int32)
  if min(counts) < width:
    mask = np.arange(width)[None] < np.array(counts)[:, None]
  return Candidates(_stacked(parts, model.shown, width), visible, mask)


def context(model: Model, jobs: Sequence[Job]) -> dict[str, np.ndarray]:
  """`{name: [B]}`."""
  given = [job.asked.context for job in jobs]
  return {name: np.array([x[name] for x in given]) for name in model.context}


def _stacked(
  parts: Sequence[Mapping[str, np.ndarray]], names: Sequence[str], width: int
) -> dict[str, np.ndarray]:
  """`{name: [B, width]}`, zeros behind each part's `[n]`."""
  number = len(parts)
  if all([len(part[names[0]]) == width for part in parts]):
    if number == 1:
      return {name: parts[0][name][None] for name in names}
    return {
      name: np.concatenate([part[name] for part in parts]).reshape(number, -1)
      for name in names
    }
  found = {}
  for name in names:
    dtype = parts[0][name].dtype
    found[name] = np.zeros((number, width), dtype)
    for row, part in enumerate(parts):
      found[name][row, : len(part[name])] = part[name]
  return found
