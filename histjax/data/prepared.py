"""Rows that `prepare` wrote, read by random access: never a whole log.

A folder holds, of each of n shards of users, `train-i-of-n.array_record` and
those of validation and test, `index-i-of-n.npz` and, written last,
`shard-i-of-n.json`, which has the others' sizes and checksums; `features.npz`;
and `dataset.json`, which makes it whole. In memory are 8 bytes a row, besides
the users' keys if they are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from histjax import config as config_lib
from histjax import features as features_lib
from histjax.data import rows as rows_lib
from histjax.data.records import RecordFormat
from histjax.data.rows import Flat, LabelSummary, Row, RowConfig, RowSource
from histjax.features import FittedFeatures
from histjax.schema import Schema
from histjax.types import RankingBatch
from histjax.vocabulary import IdCounts

DATASET = 'dataset.json'
SPLITS = ('train', 'validation', 'test')
VERSION = 2
"""Of the folder's layout."""
_ROWS = 4096
"""That `PreparedRows.flat` reads at once."""


def name(what: str, shard: int, num_shards: int, ending: str) -> str:
  """Of a file."""
  return f'{what}-{shard:05d}-of-{num_shards:05d}.{ending}'


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """What a folder holds.

  Attributes:
    config: `to_dict` of the data's config that it was made with.
    schema: of the rows.
    splits: `{'train', 'validation', 'test'}`.
    features: what is derived.
    fingerprint: SHA-256 of all of it.
    ids: as `Dataset.ids`.
  """

  config: dict[str, Any]
  schema: Schema
  splits: dict[str, PreparedRows]
  features: FittedFeatures
  fingerprint: str
  ids: tuple[IdCounts, ...]


def load(folder: pathlib.Path) -> Prepared:
  """Opens a folder; no rows are read.

  Raises:
    ValueError: it is not whole, or a file is missing, cut off or changed.
  """
  try:
    values = json.loads((folder / DATASET).read_text())
  except FileNotFoundError as error:
    raise ValueError(
      f'{folder} holds no {DATASET}: it was not prepared, or not to the end; '
      'run prepare.py, which goes on where it stopped'
    ) from error
  except ValueError as error:
    raise ValueError(f'{folder / DATASET} is damaged: {error}') from error
  if values.get('version') != VERSION:
    raise ValueError(
      f'{folder} is of version {values.get("version")}, this library reads '
      f'{VERSION}; prepare it again'
    )
  for entry in values['shards']:
    for file, told in entry['files'].items():
      path = folder / file
      size = path.stat().st_size if path.exists() else None
      if size != told['size']:
        raise ValueError(
          f'{path} has {size} bytes, not {told["size"]}: it was deleted, cut '
          'off or changed; put it back, or prepare the log again'
        )
  schema = config_lib.from_dict(Schema, values['schema'])
  fitted = features_lib.load(folder)
  if fitted.digest() != values['features']:
    raise ValueError(
      f'{folder}: features.npz is of another log; prepare it again'
    )
  indices = [_Index(folder, entry) for entry in values['shards']]
  splits = {
    split: PreparedRows(
      folder,
      split,
      schema,
      config_lib.from_dict(RowConfig, values['rows'][split]),
      indices,
    )
    for split in SPLITS
  }
  ids = tuple(config_lib.from_dict(IdCounts, x) for x in values['ids'])
  return Prepared(
    values['config'], schema, splits, fitted, fingerprint(values), ids
  )


def fingerprint(values: Mapping[str, Any]) -> str:
  """SHA-256, in hex, of all that rows and features of a folder hold.

  Args:
    values: of dataset.json.
  """
  known = {
    'schema': values['schema'],
    'features': values['features'],
    'rows': values['rows'],
    'files': [
      {file: told['sha256'] for file, told in entry['files'].items()}
      for entry in values['shards']
    ],
  }
  return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class _Index:
  """What is known of a shard's rows without reading them."""

  def __init__(self, folder: pathlib.Path, entry: Mapping[str, Any]):
    self.entry = entry
    (file,) = (f for f in entry['files'] if f.startswith('index-'))
    self.path = folder / file
    if _sha256(self.path) != entry['files'][file]['sha256']:
      raise ValueError(
        f'{self.path} does not have its checksum; put it back, or prepare the '
        'log again'
      )

  def read(self, what: str) -> np.ndarray:
    with np.load(self.path) as archive:
      return archive[what]

  def keys(self) -> np.ndarray:
    """Of `pack_keys`."""
    with np.load(self.path) as archive:
      if 'keys' in archive:
        return archive['keys']
      stops, utf8 = archive['keys/stops'].tolist(), archive['keys/utf8']
    text = utf8.tobytes()
    return _objects(
      text[start:stop].decode()
      for start, stop in zip([0, *stops], stops, strict=False)
    )


def pack_keys(keys: np.ndarray) -> dict[str, np.ndarray]:
  """Keys of `EventLog.keys` as arrays of an index.

  Returns:
    'keys', integers; or of texts 'keys/utf8', uint8, all of them joined, and
    'keys/stops', int64 `[users]`, where each ends. NumPy's own texts would each
    be as long as the longest.
  """
  if keys.dtype.kind in 'iu':
    return {'keys': keys}
  texts = [str(key).encode() for key in keys.tolist()]
  return {
    'keys/utf8': np.frombuffer(b''.join(texts), np.uint8),
    'keys/stops': np.cumsum([len(text) for text in texts], dtype=np.int64),
  }


def _objects(texts: Iterable[str]) -> np.ndarray:
  return np.array([*texts, None], object)[:-1]


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@dataclasses.dataclass(frozen=True)
class _File:
  """Which records a file has, so that it need not be opened to know."""

  filename: str
  examples_in_shard: int
  skip: int = 0

  @property
  def take(self) -> int:
    return self.examples_in_shard


class PreparedRows(RowSource):
  """Rows of one split, shard after shard."""

  def __init__(
    self,
    folder: pathlib.Path,
    split: str,
    schema: Schema,
    config: RowConfig,
    indices: Sequence[_Index],
  ):
    """Reads the index.

    Args:
      folder: of the shards.
      split: of the rows.
      schema: of the rows.
      config: how they were made.
      indices: of the shards.
    """
    import grain  # A server need not have it.

    self.config = config
    self._schema, self._indices, self._split = schema, indices, split
    self._name = str(folder / split)
    self._format = RecordFormat(schema)
    self._sizes = {
      what: np.concatenate(
        [np.zeros(0, np.int32), *(i.read(f'{split}/{what}') for i in indices)]
      )
      for what in ('lengths', 'counts')
    }
    entries = [index.entry for index in indices]
    self._labels = [entry['labels'][split] for entry in entries]
    files = [
      (file, entry['files'][file]['rows'])
      for entry in entries
      for file in entry['files']
      if file.startswith(f'{split}-')
    ]
    self._starts = np.cumsum([0, *(rows for _, rows in files)])
    self._users = np.cumsum([0, *(entry['users'] for entry in entries)])
    # A source without a file is refused.
    self._records = grain.sources.ArrayRecordDataSource(
      [_File(str(folder / file), rows) for file, rows in files if rows]
      or [_File('', 0)]
    )

  @property
  def schema(self) -> Schema:
    """See `RowSource`."""
    return self._schema

  @functools.cached_property
  def keys(self) -> np.ndarray:
    """See `RowSource`; read when it is asked for."""
    keys = [index.keys() for index in self._indices]
    # Those of a shard without users are of some type or other.
    keys = [k for k in keys if len(k)] or keys[:1]
    if len({k.dtype.kind for k in keys}) > 1:  # '7' here, a text there.
      keys = [_objects(map(str, k.tolist())) for k in keys]
    return np.concatenate(keys)

  @property
  def history_lengths(self) -> np.ndarray:
    """int32 `[rows]`."""
    return self._sizes['lengths']

  @property
  def candidate_counts(self) -> np.ndarray:
    """int32 `[rows]`."""
    return self._sizes['counts']

  def __len__(self) -> int:
    return len(self.history_lengths)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self._read(np.arange(*index.indices(len(self))))
    r = range(len(self))[index]  # Negative indices, and IndexError.
    return self._read(np.array([r]))[0]

  def batch(
    self,
    indices: Sequence[int] | np.ndarray,
    *,
    num_rows: int,
    num_events: int,
    num_candidates: int,
    pieces: Sequence[int] | np.ndarray | None = None,
  ) -> RankingBatch:
    """See `RowSource.batch`."""
    shape = {
      'num_rows': num_rows,
      'num_events': num_events,
      'num_candidates': num_candidates,
    }
    rows = self._read(np.asarray(indices, np.int64))
    if not rows:  # All of a batch that are left may be other hosts'.
      return rows_lib.empty_batch(
        self.schema, **shape, packed=pieces is not None
      )
    return rows_lib.collate(rows, **shape, pieces=pieces)

  def order(self) -> Iterator[np.ndarray]:
    """See `RowSource.order`; what the rows hold is in the fingerprint."""
    yield from (self.history_lengths, self.candidate_counts)

  def label_summary(self, task: str) -> LabelSummary:
    """See `RowSource.label_summary`."""
    parts = [labels[task] for labels in self._labels]
    return LabelSummary(*(sum(x) for x in zip(*parts, strict=True)))

  def seen_users(self) -> np.ndarray:
    """See `RowSource.seen_users`."""
    found = [i.read(f'{self._split}/users') for i in self._indices]
    return np.concatenate([np.zeros(0, bool), *found])

  def seen_ids(self, name: str) -> np.ndarray:
    """See `RowSource.seen_ids`."""
    found = [i.read(f'{self._split}/ids/{name}') for i in self._indices]
    return np.unique(np.concatenate([np.zeros(0, np.int32), *found]))

  def flat(self, names: Sequence[str]) -> Iterator[Flat]:
    """See `RowSource.flat`; reads all records."""
    for start in range(0, len(self), _ROWS):
      stop = min(start + _ROWS, len(self))
      rows = self._read(np.arange(start, stop))
      counts = self.candidate_counts[start:stop]
      yield (
        np.repeat([row.group for row in rows], counts),
        {n: np.concatenate([r.candidates[n] for r in rows]) for n in names},
        {
          t.name: np.concatenate([row.labels[t.name] for row in rows])
          for t in self.schema.tasks
        },
      )

  def _read(self, indices: np.ndarray) -> list[Row]:
    if not len(indices):
      return []
    try:
      records = self._records.__getitems__(indices.tolist())
    except RuntimeError as error:  # What Riegeli raises of a bad checksum.
      raise ValueError(
        f'{self._name} cannot be read ({error}); put the file back, or prepare '
        'the log again'
      ) from error
    shards = np.searchsorted(self._starts, indices, 'right') - 1
    rows = [self._format.decode(record) for record in records]
    return [
      dataclasses.replace(row, group=row.group + int(self._users[shard]))
      for row, shard in zip(rows, shards.tolist(), strict=True)
    ]
