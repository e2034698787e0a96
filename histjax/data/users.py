"""The distinct users of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from histjax.data import columns as columns_lib
from histjax.data import files, hashing
from histjax.data.parts import Columns
from histjax.schema import Schema


class Users:
  """The distinct users of the candidates, in the order of the output.

  Attributes:
    keys: `[users]`, as `columns.encode_keys` has them.
  """

  def __init__(self, keys: np.ndarray):
    self.keys = keys
    digests = hashing.digests(keys)
    self._order = np.argsort(digests)
    self._digests = digests[self._order]
    twice = np.flatnonzero(self._digests[1:] == self._digests[:-1])
    if twice.size:
      self._fail(keys[self._order[twice[0]]])

  def __len__(self) -> int:
    return len(self.keys)

  def find(self, columns: Columns, name: str) -> np.ndarray:
    """int64 `[n]`, the user of each row, an index into `keys`; -1: none."""
    codes, keys = columns_lib.encode_keys(columns, name)
    digests = hashing.digests(keys)
    place = np.searchsorted(self._digests, digests)
    place = np.minimum(place, len(self._digests) - 1)
    user = self._order[place]
    known = self._digests[place] == digests
    if 'O' in (keys.dtype.kind, self.keys.dtype.kind):
      mine = columns_lib.canonical_keys(self.keys[user[known]])
      for key, own in zip(
        columns_lib.canonical_keys(keys[known]), mine, strict=True
      ):
        if key != own:
          self._fail(own)
    return np.where(known, user, -1)[codes]

  def _fail(self, key) -> None:
    raise ValueError(
      f'user {key!r} and another have the same 64-bit digest; rename one'
    )

  @classmethod
  def of_files(
    cls,
    paths: Sequence[str],
    schema: Schema,
    tell: Callable[[int, int], None],
    max_rows: int,
  ) -> Users:
    """Reads the column of users; see `files.stream`."""
    found: list[pa.Array] = []
    limit = max_rows
    for columns in files.stream(
      paths, [schema.user], schema, max_rows=max_rows, tell=tell
    ):
      keys = pa.array(columns_lib.encode_keys(columns, schema.user)[1])
      found.append(keys)
      if sum(map(len, found)) > limit:
        found = [_distinct(found)]
        limit = max(max_rows, 2 * len(found[0]))
    keys = _distinct(found)
    values = keys.to_numpy(zero_copy_only=False)
    if not pa.types.is_integer(keys.type):
      values = values.astype(object)
    return cls(values[columns_lib.order_of_keys(values)])


def _distinct(found: list[pa.Array]) -> pa.Array:
  kinds = {keys.type for keys in found}
  kind = kinds.pop() if len(kinds) == 1 else pa.large_string()
  if not pa.types.is_integer(kind):
    kind = pa.large_string()
  return pc.unique(pa.chunked_array([keys.cast(kind) for keys in found], kind))
