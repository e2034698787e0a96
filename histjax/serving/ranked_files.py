"""The files of ranked candidates: parts, their manifest, and one of all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from histjax.data import atomic, locks
from histjax.schema import Schema
from histjax.training import workdir as workdir_lib

MANIFEST = '_manifest.json'
"""Readers of folders pass over what begins with '_'."""
_WORK = '_work'
_KEY = b'histjax.scores'


def check_columns(schema: Schema, keep: Sequence[str] = ()) -> None:
  """Raises a ValueError if the output would have a column twice.

  Args:
    schema: of the model.
    keep: as `joins.Join`.
  """
  taken = ['rank', 'row', *(f'score_{t.name}' for t in schema.tasks)]
  if schema.user in taken:
    raise ValueError(
      f'the column of users is named {schema.user!r}, as one of the output, '
      f'{taken}; train with another name of it'
    )
  taken.append(schema.user)
  for name in keep:
    if name in taken:
      raise ValueError(
        f'--keep={",".join(keep)}: the output has a column {name!r} already, '
        f'of {taken}; leave it out, or rename it in the candidates'
      )
    taken.append(name)


def ranked(
  name: str,
  keys: np.ndarray,
  user: np.ndarray,
  row: np.ndarray,
  scores: Mapping[str, np.ndarray],
  by: np.ndarray,
  top_k: int,
  *,
  kept: Mapping[str, pa.Array] | None = None,
) -> pa.Table:
  """The best `top_k` of each user, best first.

  Args:
    name: of the column of users.
    keys: `[users]`.
    user: `[c]`, of each candidate, an index into `keys`.
    row: `[c]`, of each candidate in its files; the earlier wins a tie.
    scores: `{task: [c]}`, to write.
    by: float32 `[c]`, to rank by.
    top_k: of a user.
    kept: `{column: [c]}`, to write, too.
  """
  some = _candidates_of(user, by, top_k)
  best = some[np.lexsort((row[some], -by[some], user[some]))]
  user = user[best]
  rank = np.arange(len(best)) - np.searchsorted(user, user)
  best, user, rank = (x[rank < top_k] for x in (best, user, rank))
  return pa.table(
    {
      name: keys[user],
      'rank': rank + 1,
      'row': row[best],
      **{name: values.take(best) for name, values in (kept or {}).items()},
      **{f'score_{name}': values[best] for name, values in scores.items()},
    }
  )


def _candidates_of(user, score, top_k: int) -> np.ndarray:
  """Those that are among a user's best, and others of the last one's score.

  Sorting values takes a tenth of the time of sorting what goes with them.
  """
  score = score.astype(np.float32) + np.float32(0)  # No -0.0.
  bits = score.view(np.int32).astype(np.int64)
  # Whole numbers in the order of the scores, the best first.
  bits = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
  place = (user.astype(np.int64) << 32) + (2**31 - 1 - bits)
  ordered = np.sort(place)
  first = np.searchsorted(ordered, np.arange(user.max(initial=0) + 1) << 32)
  last = np.minimum(first + top_k, np.append(first[1:], len(user))) - 1
  return np.flatnonzero(place <= ordered[np.maximum(last, 0)][user])


@dataclasses.dataclass(frozen=True)
class Target:
  """What is written in the end, and the folder of parts until then.

  Attributes:
    file: a .csv or .parquet; None: the parts themselves.
    folder: of the parts, without links.
  """

  file: pathlib.Path | None
  folder: pathlib.Path

  @classmethod
  def of(cls, output: str | os.PathLike[str], inputs: Sequence[str]) -> Target:
    """Checks the output's path.

    Raises:
      ValueError: it cannot be written, is an input, or is a file already.
    """
    path = workdir_lib.resolve(output, '--output')
    sources = [pathlib.Path(name).expanduser().resolve() for name in inputs]
    if path.suffix in ('.csv', '.parquet'):
      if path.is_dir():
        raise ValueError(f'--output={path} is a folder; name a file in it')
      if path.exists() and path.resolve() not in sources:
        raise ValueError(f'--output={path} exists; delete it, or name another')
      target = cls(path, path.with_name(f'{path.name}.parts'))
    elif path.suffix and not path.is_dir():
      raise ValueError(
        f'--output={path} must end in .csv or .parquet, or be a folder'
      )
    elif path.exists() and not path.is_dir():
      raise ValueError(f'--output={path} is a file; name a folder')
    else:
      target = cls(None, path)
    # A link to a folder can be filled, and not be deleted as one.
    folder = pathlib.Path(os.path.realpath(target.folder))
    target = dataclasses.replace(target, folder=folder)
    for parent in dict.fromkeys((path.parent, folder.parent)):
      if not parent.is_dir():
        raise ValueError(f'--output={path}: {parent} is no folder; make it')
      if not os.access(parent, os.W_OK):
        raise ValueError(
          f'--output={path}: {parent} cannot be written to; name another'
        )
    for name, source in zip(inputs, sources, strict=True):
      for mine in (path.resolve(), folder):
        among = source in (mine, *mine.parents) or mine in source.parents
        if among and source.exists():
          raise ValueError(
            f'--output={path} would be among the inputs, {name}; name another'
          )
    return target

  def finish(self, parts: Parts, lock: locks.FolderLock) -> int:
    """Makes the output of the parts; returns its number of rows.

    Args:
      parts: all of them.
      lock: of their folder, which is emptied if the output is a file.
    """
    paths = [parts.path(i) for i in range(parts.num_shards)]
    num_rows = sum(parquet.read_metadata(path).num_rows for path in paths)
    if self.file is None:
      parts.close()
      return num_rows
    schema = parquet.read_schema(paths[0]).remove_metadata()
    is_csv = self.file.suffix == '.csv'
    writer = csv.CSVWriter if is_csv else parquet.ParquetWriter

    def write(temporary: pathlib.Path) -> None:
      with writer(str(temporary), schema) as file:
        for path in paths:
          file.write_table(parquet.read_table(path).cast(schema))

    atomic.write(self.file, write)
    lock.clear()
    return num_rows


class Parts:
  """Parquet files, one a shard, and what they are scores of.

  Attributes:
    folder: of them.
    num_shards: how many there will be; 0: not known yet.
    num_resumed: how many there were when it was opened.
  """

  def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any]):
    """Of a folder as it is; see `open`."""
    self.folder = folder
    self._identity = dict(identity)
    text = json.dumps(self._identity, sort_keys=True)
    self._key = hashlib.sha256(text.encode()).hexdigest().encode()
    self.num_shards = self.num_resumed = 0

  @classmethod
  def open(cls, lock: locks.FolderLock, identity: Mapping[str, Any]) -> Parts:
    """Begins, or goes on with what was begun.

    Args:
      lock: of the folder of the parts.
      identity: what scores depend on, by what it is called.

    Raises:
      ValueError: the folder has scores of something else, or other files.
    """
    folder = lock.folder
    parts = cls(folder, identity)
    for path in folder.glob('.*.tmp'):  # Of a process that was killed.
      path.unlink()
    if lock.names():
      before = parts._manifest()
      begun = any(folder.glob('part-*.parquet'))
      wanted = json.loads(json.dumps(parts._identity))
      other = [
        name
        for name in wanted.keys() | before['identity'].keys()
        if wanted.get(name) != before['identity'].get(name)
      ]
      if other and begun:
        raise ValueError(
          f'{folder} has scores with other {", ".join(sorted(other))}; name '
          'another output, delete that, or go on as it was begun: '
          f'{_changes(before["identity"], wanted, other)}'
        )
      if not other:
        parts.num_shards = before['num_shards']
        parts.num_resumed = int(parts.done().sum())
        return parts
      lock.clear()
    parts.plan(0)
    return parts

  @property
  def work(self) -> pathlib.Path:
    """A folder for what is needed until all parts are written."""
    return self.folder / _WORK

  @property
  def complete(self) -> bool:
    """Whether all parts are written."""
    return bool(self.num_shards and self.done().all())

  def plan(self, num_shards: int) -> None:
    """Writes the manifest."""
    self.num_shards = num_shards
    values = {'identity': self._identity, 'num_shards': num_shards}
    atomic.write_json(self.folder / MANIFEST, values)

  def path(self, shard: int) -> pathlib.Path:
    """Of a part."""
    return self.folder / f'part-{shard:06d}.parquet'

  def done(self) -> np.ndarray:
    """bool `[num_shards]`, whether each is written.

    Raises:
      ValueError: a file there is none of these parts.
    """
    return np.array([self._is_done(i) for i in range(self.num_shards)], bool)

  def write(self, shard: int, table: pa.Table) -> None:
    """Writes a part, whole or not at all."""
    table = table.replace_schema_metadata({_KEY: self._key})
    path = self.path(shard)
    atomic.write(path, lambda temporary: parquet.write_table(table, temporary))

  def close(self) -> None:
    """Deletes what is no longer needed."""
    shutil.rmtree(self.work, ignore_errors=True)

  def discard(self, lock: locks.FolderLock) -> None:
    """Deletes all that can be, unless a part has been written."""
    if not any(self.folder.glob('part-*.parquet')):
      with contextlib.suppress(OSError):  # What went wrong before says more.
        lock.clear()

  def _manifest(self) -> dict[str, Any]:
    path = self.folder / MANIFEST
    try:
      found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
      raise ValueError(
        f'{self.folder} holds files and no {MANIFEST} of scores ({error}); '
        'name another output, or empty it'
      ) from error
    return found

  def _is_done(self, shard: int) -> bool:
    path = self.path(shard)
    if not path.exists():
      return False
    try:
      meta = parquet.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
      raise ValueError(
        f'{path} cannot be read ({error}); delete it, and run again'
      ) from error
    if meta.get(_KEY) != self._key:
      raise ValueError(
        f'{path} is none of the parts that {MANIFEST} tells of; delete it, and '
        'run again'
      )
    return True


def _changes(before, wanted, names) -> str:
  """What differs, of what people set."""
  said = []
  for name in sorted(names):
    old, new = before.get(name), wanted.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      said += [
        f'{key}={old.get(key)} then, {new.get(key)} now'
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
      ]
    else:
      said.append(f'{name}: {str(old)[:12]} then, {str(new)[:12]} now')
  return '; '.join(said)
