"""A digest of what a run is trained and tested on, wherever its files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from histjax.data.datasets import Dataset
  from histjax.data.rows import Rows

_WIDE = 256
"""Characters of a text that all others are padded to, at most."""
_TEXTS = 2**12
"""That are padded at once."""


def fingerprint(dataset: Dataset) -> str:
  """SHA-256, in hex, of all values that the rows of a dataset are made of.

  Users, times, requests, labels, the features that the model reads and, of
  each split, which events are candidates and what they may see. Neither paths
  nor file formats are in it. A million events take less than a second.

  Args:
    dataset: of `datasets.load`.
  """
  if dataset.fingerprint:
    return dataset.fingerprint
  total = hashlib.sha256()
  known: dict[int, bytes] = {}  # Splits share most of their arrays.
  for split in sorted(dataset.splits):
    rows = dataset.in_memory(split)
    for name, values in _arrays(rows):
      if id(values) not in known:
        known[id(values)] = _digest(values)
      total.update(f'{split}/{name}\n'.encode() + known[id(values)])
  return total.hexdigest()


def _arrays(rows: Rows) -> Iterator[tuple[str, np.ndarray]]:
  log, schema = rows.log, rows.schema
  yield from (('keys', log.keys), ('user', log.user), ('time', log.time))
  if log.request is not None:
    yield 'request', log.request
  for name, values in sorted(log.labels.items()):
    yield f'labels/{name}', values
  for name in ('events', 'offsets', 'start', 'stop', 'visible'):
    yield name, getattr(rows, name)
  for name, values in sorted(rows.derived.items()):
    yield f'derived/{name}', values
  groups = (schema.context, schema.history_features, schema.item_features)
  read = {feature.name for group in groups for feature in group}
  for name in sorted(read & rows.features.keys()):
    yield f'features/{name}', rows.features[name]


def _digest(values: np.ndarray) -> bytes:
  if values.dtype == object:
    return _digest_texts([str(v) for v in values.tolist()])
  little = values.dtype.newbyteorder('<')  # Whatever machine this is.
  values = np.ascontiguousarray(values, dtype=little)
  digest = hashlib.sha256(f'{little.str} {values.shape}\n'.encode())
  digest.update(values.tobytes() if not values.size else values.data.cast('B'))
  return digest.digest()


def _digest_texts(texts: list[str]) -> bytes:
  width = max([1, *map(len, texts)])
  if width > _WIDE or any(text.endswith('\0') for text in texts):
    # NumPy pads all to the longest, by zeros, and takes off a text's own.
    encoded = [text.encode() for text in texts]
    digest = hashlib.sha256(f'utf8 ({len(texts)},)\n'.encode())
    digest.update(np.array([len(text) for text in encoded], '<i8').tobytes())
    for text in encoded:
      digest.update(text)
    return digest.digest()
  digest = hashlib.sha256(f'<U{width} ({len(texts)},)\n'.encode())
  for start in range(0, len(texts), _TEXTS):
    some = np.array(texts[start : start + _TEXTS], f'<U{width}')
    digest.update(some.tobytes())
  return digest.digest()
