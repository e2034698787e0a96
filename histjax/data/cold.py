"""Users and items that training has not seen, left out of metrics."""

from __future__ import annotations

import dataclasses

import numpy as np

from histjax.data.rows import LabelSummary, RowSource
from histjax.schema import Schema, categorical
from histjax.types import RankingBatch


@dataclasses.dataclass(frozen=True)
class LeaveOut:
  """Which candidates validation and test do not count.

  A *user* is cold if none of the candidates of the training split is theirs.
  An *item* is cold if its id is that of no candidate of the training split, or
  is out of vocabulary. Ids are compared as the model reads them: with
  `ids='hash'` two keys in one row of the table are one item. Every candidate is
  scored, in the row that it is in anyway, so that those that count have the
  scores that they have without these options; cold events stay in histories.

  Attributes:
    cold_users: leave out the candidates of cold users.
    cold_items: leave out cold items, told apart by this feature, a categorical
      one in `Schema.item`; empty: they count.
  """

  cold_users: bool = False
  cold_items: str = ''

  def __bool__(self) -> bool:
    """Whether anything is left out."""
    return self.cold_users or bool(self.cold_items)

  def check(self, schema: Schema) -> None:
    """Raises ValueError unless `cold_items` is such a feature."""
    known = [f.name for f in categorical(schema.item)]
    if self.cold_items and self.cold_items not in known:
      raise ValueError(
        f'leave_out.cold_items={self.cold_items!r} must be one of the '
        f'categorical features of items, {known}, or empty'
      )


@dataclasses.dataclass(frozen=True)
class Counts:
  """How many candidates a split has, and how many do not count.

  Attributes:
    candidates: of the split, all of them.
    cold_users: those of cold users; None: these are not left out.
    cold_items: those that are cold items; None: likewise. One of both kinds is
      counted in both.
    left_out: those of either kind.
  """

  candidates: int
  cold_users: int | None
  cold_items: int | None
  left_out: int

  def __str__(self) -> str:
    """As in 'counted 80 of 100 candidates: 20 left out (15 of cold users)'."""
    parts = [
      f'{number} {what}'
      for number, what in (
        (self.cold_users, 'of cold users'),
        (self.cold_items, 'of cold items'),
      )
      if number is not None
    ]
    return (
      f'{self.candidates - self.left_out} of {self.candidates} candidates '
      f'count; {self.left_out} left out ({", ".join(parts)})'
    )


class Known:
  """What the training split has seen."""

  def __init__(self, leave_out: LeaveOut, train: RowSource):
    """Looks at the training split.

    Args:
      leave_out: what is left out, something.
      train: the rows of the training split.

    Raises:
      ValueError: `leave_out` has no such feature.
    """
    leave_out.check(train.schema)
    self._name = leave_out.cold_items
    self._users: np.ndarray | None = None
    self._ids: np.ndarray | None = None
    if leave_out.cold_users:
      self._users = train.seen_users()
    if self._name:
      (feature,) = (
        f for f in categorical(train.schema.item) if f.name == self._name
      )
      ids = train.seen_ids(self._name)
      if feature.has_unknown:
        ids = ids[ids != feature.size - 1]
      self._ids = ids

  def mask(self, batch: RankingBatch) -> np.ndarray:
    """bool `[B, C]`, the candidates of a batch that count."""
    mask = np.asarray(batch.candidates.mask)
    group = np.asarray(batch.group)
    group = group[:, None] if group.ndim == 1 else group
    ids = None
    if self._name:
      ids = np.asarray(batch.candidates.features[self._name])
    cold_users, cold_items = self._cold(group, ids)
    return mask & ~cold_users & ~cold_items

  def candidates(self, rows: RowSource) -> np.ndarray:
    """bool `[candidates]`, those of a split that count, row after row."""
    found = [np.zeros(0, bool)]
    for group, features, _ in rows.flat(self._features):
      cold_users, cold_items = self._cold(group, features.get(self._name))
      found.append(~cold_users & ~cold_items)
    return np.concatenate(found)

  def counts(self, rows: RowSource) -> Counts:
    """How many candidates of a split count."""
    total = left_out = of_users = of_items = 0
    for group, features, _ in rows.flat(self._features):
      cold_users, cold_items = self._cold(group, features.get(self._name))
      total += len(group)
      of_users += int(cold_users.sum())
      of_items += int(cold_items.sum())
      left_out += int((cold_users | cold_items).sum())
    return Counts(
      total,
      of_users if self._users is not None else None,
      of_items if self._name else None,
      left_out,
    )

  def label_summary(self, rows: RowSource, task: str) -> LabelSummary:
    """As `RowSource.label_summary`, of the candidates that count."""
    groups, labels = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for group, features, label in rows.flat(self._features):
      cold_users, cold_items = self._cold(group, features.get(self._name))
      keep = ~cold_users & ~cold_items
      groups.append(group[keep])
      labels.append(label[task][keep] == 1)
    return LabelSummary.of(np.concatenate(groups), np.concatenate(labels))

  @property
  def _features(self) -> tuple[str, ...]:
    return (self._name,) if self._name else ()

  def _cold(
    self, group: np.ndarray, ids: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Which are of cold users, and which cold items, of one shape."""
    shape = group.shape if ids is None else ids.shape
    cold_users = np.zeros(shape, bool)
    cold_items = np.zeros(shape, bool)
    if self._users is not None:
      cold_users |= ~self._users[group]
    if ids is not None and self._ids is not None:
      cold_items |= ~np.isin(ids, self._ids)
    return cold_users, cold_items
