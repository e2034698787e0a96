"""What states take, and what a device answers: tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from histjax.nn.encoder import EncoderConfig
from histjax.quantization import Kind
from histjax.scoring import pages
from histjax.serving.pages import Shape

MODELS = (
  (EncoderConfig(num_layers=2, width=64, num_heads=2), 256),
  (EncoderConfig(num_layers=4, width=128, num_heads=4), 512),
  (EncoderConfig(num_layers=4, width=256, num_heads=8), 1024),
)
"""Of the table without names of a model: heads of 32."""
_GB = 10**9
_TYPES: tuple[tuple[str, Kind | None], ...] = (
  ('bfloat16', None),
  ('int8 or float8', 'int8'),
)
_KINDS = (
  ('hit', 'hit'),
  ('extend', 'extend by {}'),
  ('miss', 'miss'),
  ('no cache', 'no cache'),
)


def state_bytes(
  encoder: EncoderConfig, length: int, dtype: str, cache_dtype: Kind | None
) -> int:
  """Of a user's state: its pages, the last one whole."""
  shape = Shape(
    encoder.num_layers,
    encoder.num_heads,
    encoder.head_dim,
    dtype,
    cache_dtype,
  )
  return pages.number(length) * shape.nbytes


def capped(
  lengths: Sequence[int], longest: int | None
) -> tuple[list[int], str | None]:
  """Lengths that states may have, and what to say of those that they may not.

  Args:
    lengths: of histories.
    longest: `planning.longest_state`.
  """
  if longest is None or max(lengths) <= longest:
    return list(lengths), None
  found = list(dict.fromkeys(min(n, longest) for n in lengths))
  return found, (
    f'L is at most {longest}: a state of this run holds no more, however long '
    'the history is'
  )


def states(models: Iterable[tuple[EncoderConfig, int]], dtype: str) -> str:
  """Bytes of a user and users in a GB, by model and L, as Markdown.

  Args:
    models: encoders, and lengths of histories.
    dtype: of the model, and of states that are not in 8 bits.
  """
  names = [name if cache else dtype for name, cache in _TYPES]
  rows = [['model', 'L', *names, *(f'users in 1 GB, {x}' for x in names)]]
  for encoder, length in models:
    sizes = [state_bytes(encoder, length, dtype, cache) for _, cache in _TYPES]
    rows.append(
      [
        f'{encoder.num_layers} layers, D {encoder.width}',
        str(length),
        *(_bytes(size) for size in sizes),
        *(f'{_GB // size:,}' for size in sizes),
      ]
    )
  return _markdown(rows)


def rates(report: Mapping[str, Any]) -> str:
  """Requests a second of `benchmark.py --suite=serving`, as Markdown.

  Those of a device, in process, with as many users at once as were timed.

  Args:
    report: of the suite.
  """
  names = [name.format(report['new_events']) for _, name in _KINDS]
  rows = [['L', 'C', *names]]
  for cell in report['results']:
    users, times = max(cell['in process'].items(), key=lambda x: int(x[0]))
    found = [int(users) / times[kind]['p50'] for kind, _ in _KINDS]
    rows.append(
      [
        str(cell['length']),
        str(cell['candidates']),
        *(f'{_rounded(rate):,}' for rate in found),
      ]
    )
  return _markdown(rows)


def _rounded(rate: float) -> float | int:
  """Two digits, which are all that such a rate has."""
  found = float(f'{rate:.2g}')
  return int(found) if found >= 1 else found


def _bytes(size: int) -> str:
  unit, factor = ('KiB', 1 << 10) if size < 1 << 20 else ('MiB', 1 << 20)
  return f'{round(size / factor, 2):g} {unit}'


def _markdown(rows: Sequence[Sequence[str]]) -> str:
  lines = [f'| {" | ".join(row)} |' for row in rows]
  return '\n'.join([lines[0], '| --- ' * len(rows[0]) + '|', *lines[1:]])
