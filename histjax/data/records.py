"""Rows as bytes, one record each, and back.

A record is little-endian 32-bit words, one after the other:

    l, c, group, context [K], history [F, l], candidates [G, c]

with the K context features, the F features of history events, and of the
candidates their features, `visible` and the tasks' labels; ids, `visible` and
the first three are int32, the rest float32. All in the schema's order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from histjax.data.rows import Row, Rows
from histjax.schema import Categorical, Feature, Schema

_HEAD = 3
_WORD = np.dtype('<i4')


@dataclasses.dataclass(frozen=True)
class RecordFormat:
  """What a record of rows of a schema holds.

  Attributes:
    schema: of the rows, derived features included.
  """

  schema: Schema

  def encode(self, rows: Rows) -> Iterator[bytes]:
    """The rows' records, in their order.

    Raises:
      ValueError: a derived feature is neither int32 nor float32.
    """
    schema = self.schema
    first = rows.events[rows.offsets[:-1]]
    context = self._words(schema.context, lambda n: rows.features[n][first])
    history = self._words(schema.history_features, lambda n: rows.features[n])
    counts = np.diff(rows.offsets)
    visible = rows.visible - np.repeat(rows.start, counts)
    candidates = np.concatenate(
      [
        self._words(
          schema.item_features, lambda n: rows.of_candidates(n, slice(None))
        ),
        visible.astype(_WORD)[None],
        *(
          rows.log.labels[task.name][rows.events]
          .astype('<f4')
          .view(_WORD)[None]
          for task in schema.tasks
        ),
      ]
    )
    lengths = rows.stop - rows.start
    head = np.stack([lengths, counts, rows.log.user[first]]).astype(_WORD)
    if len(context):
      head = np.concatenate([head, context])
    head = np.ascontiguousarray(head.T)
    for r in range(len(rows)):
      slots = slice(rows.offsets[r], rows.offsets[r + 1])
      yield b''.join(
        [
          head[r].tobytes(),
          history[:, rows.start[r] : rows.stop[r]].tobytes(),
          candidates[:, slots].tobytes(),
        ]
      )

  def decode(self, record: bytes) -> Row:
    """The row of a record; its arrays are views."""
    schema = self.schema
    words = np.frombuffer(record, _WORD)
    length, count, group = words[:_HEAD].tolist()
    stop = _HEAD + len(schema.context)
    context = words[_HEAD:stop]
    middle = stop + len(self._history) * length
    history = words[stop:middle].reshape(len(self._history), length)
    shown = words[middle:].reshape(
      len(self._items) + 1 + len(schema.tasks), count
    )
    num_items = len(self._items)
    labels = shown[num_items + 1 :].view('<f4')
    return Row(
      context={
        name: context[i : i + 1].view(kind)[0]
        for i, (name, kind) in enumerate(self._context)
      },
      history={
        name: history[i].view(kind)
        for i, (name, kind) in enumerate(self._history)
      },
      candidates={
        name: shown[i].view(kind) for i, (name, kind) in enumerate(self._items)
      },
      visible=shown[num_items],
      labels={task.name: labels[i] for i, task in enumerate(self.schema.tasks)},
      group=group,
    )

  @functools.cached_property
  def _context(self) -> list[tuple[str, str]]:
    return _kinds(self.schema.context)

  @functools.cached_property
  def _history(self) -> list[tuple[str, str]]:
    return _kinds(self.schema.history_features)

  @functools.cached_property
  def _items(self) -> list[tuple[str, str]]:
    return _kinds(self.schema.item_features)

  def _words(self, features: Sequence[Feature], values) -> np.ndarray:
    """int32 `[features, n]`, their bits."""
    found = []
    for (name, kind), feature in zip(_kinds(features), features, strict=True):
      array = values(feature.name)
      if array.dtype != np.dtype(kind).newbyteorder('='):
        raise ValueError(
          f'feature {name!r} is {array.dtype}; what `apply` returns must be '
          f'{np.dtype(kind).name}'
        )
      found.append(array.astype(kind, copy=False).view(_WORD))
    return np.stack(found) if found else np.zeros((0, 0), _WORD)


def _kinds(features: Sequence[Feature]) -> list[tuple[str, str]]:
  return [
    (f.name, '<i4' if isinstance(f, Categorical) else '<f4') for f in features
  ]
