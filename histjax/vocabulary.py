"""Vocabularies of ids, learnt of training events, and what is counted of ids.

Of a feature with `ids='vocabulary'` a log holds first the digests of its keys,
`data.hashing.digests`, 64 bits that stand for the key. Those of training events
are counted, the frequent ones get a row of the table each, and all others its
last one. The vocabulary belongs to the table: features that share one share it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from histjax.schema import Categorical, Schema, categorical

SPLITS = ('train', 'validation', 'test')

Counted: TypeAlias = dict[str, np.ndarray]
"""Of each feature the distinct digests, `<name>/digests` uint64 `[v]`, and how
many events of each of `SPLITS` have them, `<name>/counts` int64 `[v, 3]`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """Which digests have which rows.

  Attributes:
    digests: uint64 `[v]`, distinct; number i has row i.
  """

  digests: np.ndarray

  @functools.cached_property
  def _order(self) -> np.ndarray:
    return np.argsort(self.digests)

  @functools.cached_property
  def _sorted(self) -> np.ndarray:
    return self.digests[self._order]

  def __len__(self) -> int:
    """How many ids are known."""
    return len(self.digests)

  def known(self, digests: np.ndarray) -> np.ndarray:
    """bool `[n]`, whether digests are in it."""
    if not len(self):
      return np.zeros(len(digests), bool)
    place = np.searchsorted(self._sorted, digests)
    return self._sorted[np.minimum(place, len(self) - 1)] == digests

  def rows(self, digests: np.ndarray, size: int) -> np.ndarray:
    """The rows of digests.

    Args:
      digests: uint64 `[n]`.
      size: of the table; its last row is of what is not known.

    Returns:
      int32 `[n]`.
    """
    if not len(self):
      return np.full(len(digests), size - 1, np.int32)
    place = np.searchsorted(self._sorted, digests)
    place = np.minimum(place, len(self) - 1)
    known = self._sorted[place] == digests
    return np.where(known, self._order[place], size - 1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Unseen:
  """Ids of a split that are not in a vocabulary.

  Attributes:
    ids: distinct ones.
    events: of the split, that have one.
    total: events of the split.
  """

  ids: int
  events: int
  total: int


@dataclasses.dataclass(frozen=True)
class IdCounts:
  """What is known of the ids of a feature.

  Attributes:
    feature: its name.
    ids: 'vocabulary' or 'hash'.
    distinct: with 'vocabulary', the distinct ids of training events; with
      'hash', those of the whole log.
    known: with 'vocabulary', the ids that have a row of their own.
    sharing: with 'hash', the ids that share their row with another one.
    size: rows of the table.
    estimated: with 'hash', these two counts are estimates, see `of_rows`.
    unseen: with 'vocabulary', `{split: ids that are not in it}`.
  """

  feature: str
  ids: str
  distinct: int
  size: int
  known: int | None = None
  sharing: int | None = None
  estimated: bool = False
  unseen: Mapping[str, Unseen] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    """A line for people."""
    if self.ids == 'hash':
      sharing = self.sharing or 0
      about = 'about ' if self.estimated else ''
      return (
        f'{self.feature}: {about}{self.distinct} distinct ids hashed to '
        f'{self.size} rows; {about}{sharing} '
        f'({_share(sharing, self.distinct)}) share theirs with another id'
      )
    unseen = ', '.join(
      f'{split} {x.ids} ids ({_share(x.events, x.total)} of {x.total} events)'
      for split, x in self.unseen.items()
    )
    return (
      f'{self.feature}: a vocabulary of {self.known} of {self.distinct} '
      f'training ids, in {self.size} rows; not in it: {unseen}'
    )


def count(
  schema: Schema,
  features: Mapping[str, np.ndarray],
  masks: Mapping[str, np.ndarray],
) -> Counted:
  """Counts the ids of features with a vocabulary.

  Args:
    schema: of a log, or a part of it.
    features: its features, those with a vocabulary as digests.
    masks: `{split: bool [n]}`.
  """
  found: Counted = {}
  for feature in of(schema):
    digests, place = np.unique(features[feature.name], return_inverse=True)
    counts = [
      np.bincount(place[masks[split]], minlength=len(digests))
      for split in SPLITS
    ]
    found[f'{feature.name}/digests'] = digests
    found[f'{feature.name}/counts'] = np.stack(counts, axis=1)
  return found


def merge(schema: Schema, parts: Sequence[Counted]) -> Counted:
  """As `count`, of what was counted of parts of a log, at least one."""
  if len(parts) == 1:
    return parts[0]
  found: Counted = {}
  for feature in of(schema):
    digests = [part[f'{feature.name}/digests'] for part in parts]
    counts = [part[f'{feature.name}/counts'] for part in parts]
    found |= _summed(feature.name, digests, counts)
  return found


def fit(schema: Schema, counted: Counted) -> dict[str, Vocabulary]:
  """The vocabulary of each table that has one.

  An id gets a row if training events have it at least `min_count` times; the
  most frequent ones first, of equally frequent ones that of the lesser digest,
  until `size - 1` rows are taken.

  Args:
    schema: of the log.
    counted: of `count` or `merge`, of all of it.
  """
  tables: dict[str, list[Categorical]] = {}
  for feature in of(schema):
    tables.setdefault(feature.table, []).append(feature)
  found = {}
  for table, features in tables.items():
    both = _summed(
      '',
      [counted[f'{f.name}/digests'] for f in features],
      [counted[f'{f.name}/counts'] for f in features],
    )
    digests, number = both['/digests'], both['/counts'][:, 0]
    digests = digests[keep := number >= features[0].min_count]
    order = np.argsort(-number[keep], kind='stable')
    found[table] = Vocabulary(digests[order[: features[0].size - 1]])
  return found


def id_counts(
  schema: Schema, counted: Counted, vocabularies: Mapping[str, Vocabulary]
) -> list[IdCounts]:
  """What is said of features with a vocabulary; arguments as `fit`."""
  found = []
  for feature in of(schema):
    counts = counted[f'{feature.name}/counts']
    vocabulary = vocabularies[feature.table]
    outside = ~vocabulary.known(counted[f'{feature.name}/digests'])
    found.append(
      IdCounts(
        feature.name,
        'vocabulary',
        int((counts[:, 0] > 0).sum()),
        feature.size,
        known=len(vocabulary),
        unseen={
          split: Unseen(
            int((outside & (counts[:, i] > 0)).sum()),
            int(counts[outside, i].sum()),
            int(counts[:, i].sum()),
          )
          for i, split in enumerate(SPLITS)
        },
      )
    )
  return found


def of_hash(feature: Categorical, distinct: np.ndarray) -> IdCounts:
  """What is said of a hashed feature, of its distinct digests, uint64 `[k]`."""
  rows = distinct % np.uint64(feature.size)
  _, place, number = np.unique(rows, return_inverse=True, return_counts=True)
  sharing = int((number[place] > 1).sum())
  return IdCounts(
    feature.name, 'hash', len(distinct), feature.size, sharing=sharing
  )


def of_rows(feature: Categorical, occupied: int) -> IdCounts:
  """As `of_hash`, estimated of the rows that some id has.

      distinct = log(1 - occupied / size) / log(1 - 1 / size)
      sharing = distinct (1 - (1 - 1 / size)^(distinct - 1))

  the first is linear counting (Whang, Vander-Zanden and Taylor, TODS 1990), the
  second `data.hashing.collision_rate`. If all rows have an id, half a row is
  taken to have none: there are that many ids or more.

  Args:
    feature: with `ids='hash'`.
    occupied: at most its `size`.
  """
  size = feature.size
  if size == 1:
    number = occupied
  else:
    free = max(size - occupied, 0.5) / size
    number = round(math.log(free) / math.log1p(-1 / size))
  rate = 0.0
  if number > 1:
    rate = (
      1.0 if size == 1 else -math.expm1((number - 1) * math.log1p(-1 / size))
    )
  return IdCounts(
    feature.name,
    'hash',
    number,
    size,
    sharing=round(number * rate),
    estimated=True,
  )


def of(schema: Schema) -> list[Categorical]:
  """The features of a log that have a vocabulary."""
  return [f for f in categorical(schema.logged) if f.ids == 'vocabulary']


def apply(
  schema: Schema,
  features: Mapping[str, np.ndarray],
  vocabularies: Mapping[str, Vocabulary],
) -> dict[str, np.ndarray]:
  """Features with rows in place of digests.

  Args:
    schema: of the features; others than those given may be in it.
    features: `{name: [n]}`.
    vocabularies: `{table: vocabulary}`.

  Raises:
    ValueError: the vocabulary of a table is missing.
  """
  found = dict(features)
  for feature in of(schema):
    if feature.name in found:
      check(feature, vocabularies)
      rows = vocabularies[feature.table].rows
      found[feature.name] = rows(found[feature.name], feature.size)
  return found


def check(feature: Categorical, vocabularies: Mapping[str, Any]) -> None:
  """Raises ValueError if the vocabulary of a feature is missing."""
  if feature.ids == 'vocabulary' and feature.table not in vocabularies:
    raise ValueError(
      f'feature {feature.name!r} has a vocabulary, which is not here (there '
      f'are those of tables {sorted(vocabularies)}); give `features` that '
      'training saved, as `histjax.features.load(workdir)` reads them'
    )


def _summed(
  name: str, digests: Sequence[np.ndarray], counts: Sequence[np.ndarray]
) -> Counted:
  found, place = np.unique(np.concatenate(digests), return_inverse=True)
  total = np.zeros((len(found), len(SPLITS)), np.int64)
  np.add.at(total, place, np.concatenate(counts))
  return {f'{name}/digests': found, f'{name}/counts': total}


def _share(part: int, total: int) -> str:
  return f'{part / max(total, 1):.2%}'
