"""Reads the Parquet and CSV files of a log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from histjax.data.columns import Columns, check_names

_CSV = ('.csv', '.csv.gz', '.csv.bz2', '.csv.zst')
_PARQUET = ('.parquet', '.pq')


def read(paths: Sequence[str], wanted: Sequence[str]) -> Columns:
  """Reads Parquet and CSV files, one after the other, in the order given.

  Args:
    paths: files ending in .parquet, .pq, .csv or .csv.gz (.bz2, .zst); or
      folders, which stand for such files in them, by name.
    wanted: the columns to read.

  Raises:
    ValueError: a file is missing, empty, unreadable, of another format, given
      twice, or lacks a column; or two files disagree on a column's type.
  """
  files = _expand(paths)
  tables = [_read(path, list(wanted)) for path in files]
  starts = [0]
  for table in tables:
    starts.append(starts[-1] + table.num_rows)
  try:
    table = pa.concat_tables(tables, promote_options='permissive')
  except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
    raise ValueError(
      f'{[str(f) for f in files]} disagree on the type of a column: {error}; '
      'write them with one type'
    ) from error
  return Columns(table, tuple(map(str, files)), tuple(starts[:-1]))


def _expand(paths: Sequence[str]) -> list[Path]:
  if isinstance(paths, (str, Path)):
    paths = [str(paths)]
  if not paths:
    raise ValueError('paths is empty; name at least one Parquet or CSV file')
  files: list[Path] = []
  for path in map(Path, paths):
    if path.is_dir():
      found = sorted(p for p in path.iterdir() if _format(p))
      if not found:
        raise ValueError(f'{path} holds no {", ".join(_PARQUET + _CSV)} file')
      files += found
    else:
      files.append(path)
  seen: set[Path] = set()
  for file in files:
    if not file.is_file():
      raise ValueError(f'{file} does not exist; check `paths`')
    if not _format(file):
      raise ValueError(
        f'{file} is neither Parquet nor CSV by its name; it must end in one '
        f'of {", ".join(_PARQUET + _CSV)}'
      )
    if file.resolve() in seen:
      raise ValueError(f'{file} is given twice; its events would count twice')
    seen.add(file.resolve())
  return files


def _format(path: Path) -> str:
  if path.name.startswith(('.', '_')):
    return ''
  if path.name.endswith(_PARQUET):
    return 'parquet'
  return 'csv' if path.name.endswith(_CSV) else ''


def _read(path: Path, wanted: list[str]) -> pa.Table:
  try:
    if _format(path) == 'parquet':
      # The schema first: asking for an unknown column gives no message.
      check_names(pq.read_schema(path).names, wanted, str(path))
      table = pq.ParquetFile(path).read(columns=wanted)
    else:
      with pa_csv.open_csv(path) as reader:
        check_names(reader.schema.names, wanted, str(path))
      table = pa_csv.read_csv(
        path, convert_options=pa_csv.ConvertOptions(include_columns=wanted)
      )
  except (pa.ArrowInvalid, OSError) as error:
    raise ValueError(
      f'{path} cannot be read as {_format(path)}: {error}; it is empty, cut '
      'short or of another format'
    ) from error
  if not table.num_rows:
    raise ValueError(f'{path} holds no events')
  return table
