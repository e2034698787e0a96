"""What a file is that is no CSV in UTF-8, for messages."""

from __future__ import annotations

import codecs
import io
import re
from pathlib import Path

import pyarrow as pa

_MAGIC = {
  rb'\x1f\x8b': 'gzip; end its name in .csv.gz',
  rb'BZh[1-9]1AY&SY': 'bzip2; end its name in .csv.bz2',
  rb'\x28\xb5\x2f\xfd': 'Zstandard; end its name in .csv.zst',
  rb'\xfd7zXZ\0': 'xz; unpack it (xz -d)',
  rb'PK\x03\x04': 'a ZIP archive or a spreadsheet; unpack or export it',
  rb'PAR1\x15': 'Parquet; end its name in .parquet',
}


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


def packed(path: Path) -> str:
  """What a file named CSV is by its first bytes, and what to do; else ''."""
  with pa.input_stream(str(path), compression='detect') as stream:
    head = stream.read(16)
  return next((s for magic, s in _MAGIC.items() if re.match(magic, head)), '')


def is_text(path: Path) -> bool:
  """Whether a file begins as a text does, in UTF-8 and without controls."""
  with open(path, 'rb') as file:
    head = file.read(64)
  text = head.decode('utf-8', 'ignore').replace('\t', '')
  return bool(text) and ''.join(text.splitlines()).isprintable()


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
