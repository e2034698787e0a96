"""The key ranges that rankers use; every mask of the project is one of these.

| use                    | history query i           | candidate c           |
| ---------------------- | ------------------------- | --------------------- |
| bidirectional          | [0, length)               | [0, visible)          |
| causal                 | [0, min(i+1, length))     | [0, visible)          |
| causal with a window W | the last W of the causal  | the last W of those   |

In packed rows `start` is the first event of the query's own segment.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from histjax.types import KeyRange


def history_range(
  length: Int[Array, 'B'],
  num_events: int,
  *,
  causal: bool,
  window: int | None = None,
  first: Int[Array, 'B L'] | None = None,
) -> KeyRange:
  """What each history event sees of the history.

  Args:
    length: int32 `[B]`, real events in each row.
    num_events: L, real events and padding.
    causal: an event sees itself and earlier ones; else every real event.
    window: with `causal`, at most this many of them, the most recent.
    first: with `causal`, the first event that each may see, as
      `Segments.events`; None: 0.

  Returns:
    Ranges `[B, L]`. Padding events see what the last event sees; none, where
    `first` is the length.

  Raises:
    ValueError: a window, or `first`, without `causal`; a window below 1.
  """
  _check_window(window)
  if first is not None and not causal:
    raise ValueError(
      'first needs causal=True: in a bidirectional history an event would see '
      'the segments after its own'
    )
  if window is not None and not causal:
    raise ValueError(
      f'window={window} needs causal=True: a bidirectional history has no '
      'most recent events to keep; set window=None'
    )
  shape = (length.shape[0], num_events)
  stop = jnp.broadcast_to(length.astype(jnp.int32)[:, None], shape)
  if causal:
    ordinal = jnp.arange(1, num_events + 1, dtype=jnp.int32)[None]
    stop = jnp.minimum(stop, jnp.broadcast_to(ordinal, shape))
  structure = 'causal' if causal else 'prefix'
  return _last(stop, window, structure, first)


def candidate_range(
  visible: Int[Array, 'B C'],
  *,
  window: int | None = None,
  whole_history: bool = False,
  first: Int[Array, 'B C'] | None = None,
) -> KeyRange:
  """What each candidate sees of the history: `[visible - window, visible)`.

  Args:
    visible: int32 `[B, C]`, events before the impression.
    window: at most this many of them, the most recent.
    whole_history: `visible` is known to be the row's history length for all
      of its candidates.
    first: the first event that each may see, as `Segments.candidates`; None: 0.

  Returns:
    Ranges `[B, C]`.

  Raises:
    ValueError: a window below 1.
  """
  _check_window(window)
  structure = 'prefix' if whole_history else 'any'
  return _last(visible.astype(jnp.int32), window, structure, first)


def concatenate(history: KeyRange, candidates: KeyRange) -> KeyRange:
  """The ranges `[B, L + C]` of the joint pass; candidates come second.

  The structure survives where both halves have it and `visible` is the
  history's length, which the structure 'prefix' of the candidates says.

  Args:
    history: `[B, L]`, of the events.
    candidates: `[B, C]`, over the same keys.
  """
  structure = history.structure if candidates.structure == 'prefix' else 'any'
  return KeyRange(
    start=jnp.concatenate([history.start, candidates.start], axis=1),
    stop=jnp.concatenate([history.stop, candidates.stop], axis=1),
    structure=structure,
  )


def mask(key_range: KeyRange, num_keys: int) -> Bool[Array, 'B Q L']:
  """The keys that each query sees, dense.

      mask[b, q, j] = start[b, q] <= j < stop[b, q]

  Args:
    key_range: `[B, Q]`.
    num_keys: `L`.

  Returns:
    bool `[B, Q, L]`.
  """
  index = jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
  return (key_range.start[..., None] <= index) & (
    index < key_range.stop[..., None]
  )


def check_bidirectional(
  visible: np.ndarray, length: np.ndarray, real: np.ndarray | None = None
) -> None:
  """Checks that candidates see all of a bidirectional history, on the host.

  Args:
    visible: `[B, C]`, events that each candidate sees.
    length: `[B]`, of the histories.
    real: bool `[B, C]`, False at padding; None: no padding.

  Raises:
    ValueError: one sees a part only.
  """
  bad = visible != length[:, None]
  if real is not None:
    bad &= real
  if bad.any():
    row, column = np.argwhere(bad)[0]
    raise ValueError(
      f'candidates.visible[{row}, {column}]={visible[row, column]} differs '
      f'from history.length[{row}]={length[row]}, but encoder.causal=False: in '
      'a bidirectional history every event has seen the later ones, so a '
      'candidate that may see only some of them would learn of the rest. Give '
      'such a candidate a row of its own, or use encoder.causal=True'
    )


def _last(stop, window, structure, first) -> KeyRange:
  if window is None and first is None:
    return KeyRange(jnp.zeros_like(stop), stop, structure)
  start = jnp.int32(0) if first is None else first.astype(jnp.int32)
  if window is not None:
    start = jnp.maximum(stop - window, start)
  return KeyRange(start, stop, 'any')


def _check_window(window: int | None) -> None:
  if window is not None and window < 1:
    raise ValueError(f'window={window} must be at least 1, or None for all')
