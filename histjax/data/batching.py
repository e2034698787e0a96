"""Padded batches of ragged rows, one or several in each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from histjax.types import Candidates, History, RankingBatch, Segments


class Grid:
  """Where each slot `[num_rows, width]` of a batch is in flat arrays.

  A row of the batch holds one piece of them, or if it is packed several.

  Attributes:
    count: int32 `[num_rows]`, the real slots of each row.
    real: bool `[num_rows, width]`.
    index: int64 `[num_rows, width]`; 0 where not real.
    place: int64 `[pieces]`, the slot of its row where each piece begins.
    piece: of packed rows, int64 `[num_rows, width]`, the piece of each slot,
      0 where not real; else None.
    number: of packed rows, int64 `[pieces]`, the piece's number in its row.
  """

  piece: np.ndarray | None

  def __init__(
    self, begin, end, num_rows: int, width: int, what: str, pieces=None
  ):
    packs = np.ones(len(begin), np.int64) if pieces is None else pieces
    packs = np.asarray(packs, np.int64)
    check_fits('rows', len(packs), num_rows, 'num_rows')
    sizes = end - begin
    self.count = fill(sums(sizes, packs), num_rows).astype(np.int32)
    longest = int(self.count.max(initial=0))
    check_fits(what, longest, width, f'num_{what}')
    offset = np.arange(width)[None]
    self.real = offset < self.count[:, None]
    if pieces is None:
      self.place = np.zeros(len(sizes), np.int64)
      self.piece = None
      begin = fill(begin, num_rows)[:, None]
      self.index = np.where(self.real, begin + offset, 0)
      return
    before = np.cumsum(sizes) - sizes  # Slots of the pieces before.
    rows = np.cumsum(self.count) - self.count  # Of the rows before.
    self.place = before - np.repeat(rows[: len(packs)], packs)
    self.piece = np.zeros(self.real.shape, np.int64)
    self.index = np.zeros(self.real.shape, np.int64)
    # Row by row, so the real slots are all of the pieces' in order.
    self.piece[self.real] = np.repeat(np.arange(len(sizes)), sizes)
    shift = np.repeat(begin - before, sizes)
    self.index[self.real] = shift + np.arange(len(shift))
    row = np.repeat(np.arange(len(packs)), packs)
    self.number = np.arange(len(row)) - np.searchsorted(row, row)

  def of_piece(self, values: np.ndarray) -> np.ndarray:
    """The value `[pieces]` of each slot's piece, to broadcast over slots."""
    if self.piece is None:
      return fill(values, len(self.count))[:, None]
    if not len(values):
      return np.zeros(self.piece.shape, values.dtype)
    return values[self.piece]


def sums(
  sizes: Sequence[int] | np.ndarray, packs: Sequence[int] | np.ndarray
) -> np.ndarray:
  """The sum of the sizes of the pieces of each row."""
  total = np.append(0, np.cumsum(sizes))
  ends = np.append(0, np.cumsum(packs)).astype(np.int64)
  if ends[-1] != len(total) - 1:
    raise ValueError(
      f'pieces are {ends[-1]} rows, but there are {len(total) - 1}; they must '
      'say for each row of the batch how many it packs'
    )
  return np.diff(total[ends])


def fill(values: np.ndarray, size: int) -> np.ndarray:
  """Zeros behind the values, up to `size`."""
  return np.pad(values, (0, size - len(values)))


def take(source: np.ndarray, grid: Grid) -> np.ndarray:
  """The values of the slots, anything where not real."""
  if not len(source):
    return np.zeros(grid.index.shape, source.dtype)
  return source[grid.index]


def batch(
  *,
  context: Mapping[str, np.ndarray],
  history: Grid,
  history_features: Mapping[str, np.ndarray],
  shown: Grid,
  candidates: Mapping[str, np.ndarray],
  visible: np.ndarray,
  labels: Mapping[str, np.ndarray],
  group: np.ndarray,
  packed: bool,
) -> RankingBatch:
  """A batch of the rows that the grids describe, zeros where nothing is real.

  Args:
    context: `[pieces]`.
    history: of the events.
    history_features: flat.
    shown: of the candidates.
    candidates: `[num_rows, width]`, anything where not real.
    visible: `[num_rows, width]`, anything where not real.
    labels: of each task, `[num_rows, width]`, anything where not real.
    group: `[pieces]`.
    packed: whether rows may hold several pieces.
  """
  num_rows = len(history.count)

  def keep(values, real):
    return np.where(real, values, values.dtype.type(0))

  def of_user(values):
    if not packed:
      return fill(values, num_rows)
    return keep(shown.of_piece(values), shown.real)

  segments = None
  if packed:
    # Events at padding see none, not those of whoever is last.
    length = history.count[:, None]
    events = np.where(history.real, history.of_piece(history.place), length)
    segments = Segments(
      events=events.astype(np.int32),
      candidates=of_user(history.place).astype(np.int32),
      index=of_user(shown.number).astype(np.int32),
    )
  return RankingBatch(
    context={name: of_user(x) for name, x in context.items()},
    history=History(
      features={
        name: keep(take(x, history), history.real)
        for name, x in history_features.items()
      },
      length=history.count,
    ),
    candidates=Candidates(
      features={name: keep(x, shown.real) for name, x in candidates.items()},
      visible=keep(visible, shown.real).astype(np.int32),
      mask=shown.real,
    ),
    labels={name: keep(x, shown.real) for name, x in labels.items()},
    group=of_user(group),
    segments=segments,
  )


def check_fits(what: str, size, room: int, argument: str) -> None:
  """Raises a ValueError if `size` things do not fit into `room`."""
  if size > room:
    raise ValueError(
      f'{size} {what} do not fit into {argument}={room}; raise it, or '
      'shorten the row'
    )
