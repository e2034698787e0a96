"""Requests that were checked, and logits that are being computed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Float

from histjax import schema as schema_lib
from histjax.scoring import graphs, inputs, programs, transport
from histjax.scoring import layout as layout_lib
from histjax.types import Candidates

Logits: TypeAlias = dict[str, Float[np.ndarray, 'B C']]
"""`{task: [B, C]}`, float32 in host memory; at padding they mean nothing."""

Part: TypeAlias = tuple[int, tuple[int, int], np.ndarray | None]
"""Of logits of several requests: the first row, `(B, C)`, and which are real
(bool `[B, C]`; None: all)."""


class Checked(NamedTuple):
  """A request to score, whose shapes are right.

  Attributes:
    length: int32 `[B]`, of the histories.
    candidates: as given.
    context: as given.
    shape: `(B, C)`.
    real: bool `[B, C]`, False at padding; None: there is none.
    visible: int `[B, C]`; None: all events.
  """

  length: np.ndarray
  candidates: Candidates
  context: Mapping[str, Any]
  shape: tuple[int, int]
  real: np.ndarray | None
  visible: np.ndarray | None

  def write(
    self, schema: schema_lib.Schema, views: Mapping[str, layout_lib.View]
  ) -> None:
    """Writes it, but for lengths, for the program."""
    inputs.count(self.shape, self.real, views['count'])
    inputs.context(schema, self.context, self.shape[0], views['context'])
    inputs.candidates(
      schema, self.candidates, self.shape, self.real, views['candidates']
    )
    if 'visible' in views:
      visible = self.visible
      if visible is None:
        length = self.length[: self.shape[0], None]
        visible = np.broadcast_to(length, self.shape)
      inputs.numbers(visible, views['visible'])

  def check(self, schema: schema_lib.Schema) -> None:
    """Raises ValueError for the first value that must not be."""
    inputs.check_context(schema, self.context)
    inputs.check_candidates(schema, self.candidates, self.real)


def write_each(
  schema: schema_lib.Schema,
  requests: Sequence[Checked],
  views: Mapping[str, layout_lib.View],
) -> None:
  """Writes requests, but for lengths, rows of one after those of another."""
  names = ('count', 'context', 'candidates', 'visible')
  written = [views[name] for name in names if name in views]
  first = 0
  for request in requests:
    rows = request.shape[0]
    own = {view.part.name: view.rows(first, rows) for view in written}
    request.write(schema, own)
    first += rows
  for view in written:  # Of nobody, and looked at.
    view.rows(first, view.part.shape[0] - first).clear()


class Flight:
  """One program at work, for one request or several."""

  def __init__(
    self,
    program: programs.Program,
    slot: transport.Slot,
    logits: jax.Array | graphs.Replayed,
    carrier: transport.Transport | graphs.Recording,
  ):
    self._program = program
    self._slot: Any = slot
    self._logits: Any = logits
    self._carrier = carrier
    self._lock = threading.Lock()
    self._found: tuple[np.ndarray, bool] | None = None

  def fetch(self) -> tuple[np.ndarray, bool]:
    """Waits for the logits of all requests.

    Returns:
      The logits `[T, B, C]`, and whether all are finite, padding as well.
    """
    found = self._found
    if found is None:
      with self._lock:
        found = self._found
        if found is None:
          logits = self._carrier.fetch(self._logits)
          good = np.logical_and.reduce(np.isfinite(logits), axis=None)
          found = logits, bool(good)
          self._found = found
          # Once: two requests in one slot would be mixed up.
          self._carrier.release(self._program.layout, self._slot)
          self._logits = self._slot = None
    return found


class Pending:
  """Logits that are being computed; see `Scorer.score_async`."""

  def __init__(
    self,
    flight: Flight,
    first_row: int,
    shape: tuple[int, int],
    real: np.ndarray | None,
    tasks: Sequence[str],
  ):
    self._flight = flight
    self._first_row = first_row
    self._shape, self._real, self._tasks = shape, real, tasks

  def result(self) -> Logits:
    """The logits, waited for.

    Raises:
      ValueError: a logit is not finite.
    """
    rows, columns = self._shape
    first = self._first_row
    logits, is_finite = self._flight.fetch()
    found = logits[:, first : first + rows, :columns]
    if not is_finite:
      self._check(found)
    return dict(zip(self._tasks, found))  # noqa: B905

  def rows(self, first: int, number: int, candidates: int) -> Pending:
    """Those of some rows and their first candidates, checked alone."""
    real = self._real
    if real is not None:
      real = real[first : first + number, :candidates]
    return Pending(
      self._flight,
      self._first_row + first,
      (number, candidates),
      real,
      self._tasks,
    )

  def _check(self, found: np.ndarray) -> None:
    bad = ~np.isfinite(found)
    if self._real is not None:
      bad &= self._real
    if bad.any():
      i, row, column = np.argwhere(bad)[0]
      raise ValueError(
        f'the logit {self._tasks[i]!r} of row {row}, candidate {column} '
        f'is {found[i, row, column]}: a dense value is too large for the '
        'network, or a parameter is not finite; check these'
      )
