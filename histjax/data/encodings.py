"""Which other encoding than UTF-8 a text file is in, for messages."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

import pyarrow as pa


def wide(path: Path) -> str:
  """The encoding of a file whose characters have 2 or 4 bytes; else ''."""
  with pa.input_stream(str(path), compression='detect') as stream:
    head = stream.read(64)
  for mark, name in (
    (codecs.BOM_UTF32_LE, 'UTF-32'),  # Begins as UTF-16's.
    (codecs.BOM_UTF32_BE, 'UTF-32'),
    (codecs.BOM_UTF16_LE, 'UTF-16'),
    (codecs.BOM_UTF16_BE, 'UTF-16'),
  ):
    if head.startswith(mark):
      return name
  if head[1:2] == b'\0' and head[:1] != b'\0':
    return 'UTF-32LE' if head[2:4] == b'\0\0' else 'UTF-16LE'
  if head[:1] == b'\0':
    return 'UTF-32BE' if head[1:2] == b'\0' else 'UTF-16BE'
  return ''


def first_foreign(path: Path) -> str:
  """The first line that is not in UTF-8, as it may have been meant."""
  with pa.input_stream(str(path), compression='detect') as stream:
    for number, line in enumerate(io.BufferedReader(stream), 1):
      try:
        line.decode()
      except UnicodeDecodeError as error:
        near = line[max(0, error.start - 20) : error.start + 20].strip()
        return f' (line {number}: {near.decode("cp1252", "replace")!r}?)'
  return ''
