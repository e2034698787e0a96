"""Reads the Parquet and CSV files of a log."""

from __future__ import annotations

import csv
import io
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from absl import logging

from histjax.data.parts import Columns, check_names
from histjax.schema import Schema

_CSV = ('.csv', '.csv.gz', '.csv.bz2', '.csv.zst')
_PARQUET = ('.parquet', '.pq')
_NO_PARTITION = '__HIVE_DEFAULT_PARTITION__'
_MAX_BLOCK = 2**31 - 1


def read(
  paths: Sequence[str], wanted: Sequence[str], schema: Schema
) -> Columns:
  """Reads Parquet and CSV files, one after the other, in the order given.

  A folder stands for all such files in it and in its subfolders, by name.
  Others in it are named in a warning; what begins with '.' or '_', such as
  `_SUCCESS`, is passed over, as Spark and Hive do. A folder named
  `column=value` gives its files that column, unless they have their own. Parts
  without rows are fine, if some part has any.

  A CSV file is in UTF-8, separated by commas, with a header; values are read as
  they are written, and quotes may hold newlines.

  Args:
    paths: files ending in .parquet, .pq, .csv or .csv.gz (.bz2, .zst), or
      folders.
    wanted: the columns to read.
    schema: says what counts as missing.

  Raises:
    ValueError: a file is missing, unreadable, of another format, given twice,
      or lacks a column; or none has events.
  """
  files = _expand(paths)
  tables = []
  for path, is_part in files:
    if is_part and not path.stat().st_size and _format(path) == 'csv':
      continue  # Spark writes such files of empty partitions.
    table = _read(path, list(wanted))
    if table.num_rows:
      tables.append((table, str(path)))
  if not tables:
    names = [str(path) for path, _ in files]
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    raise ValueError(f'{names[0]}{more} holds no events; name files with some')
  parts, sources = zip(*tables, strict=True)
  return Columns(parts, sources, schema)


def _expand(paths: Sequence[str]) -> list[tuple[Path, bool]]:
  """The files, and whether each was found in a folder."""
  if isinstance(paths, (str, Path)):
    paths = [str(paths)]
  if not paths:
    raise ValueError('paths is empty; name at least one Parquet or CSV file')
  files: list[tuple[Path, bool]] = []
  for name in paths:
    if not str(name) or '://' in str(name):
      raise ValueError(
        f'paths has {str(name)!r}, which is no local file or folder; copy it '
        'here and name it'
      )
    path = Path(name).expanduser()
    if path.is_dir():
      files += [(file, True) for file in _files_in(path)]
    elif not path.exists():
      raise ValueError(f'{path} does not exist; check `paths`')
    elif not _format(path):
      raise ValueError(
        f'{path} is neither Parquet nor CSV by its name; it must end in one '
        f'of {", ".join(_PARQUET + _CSV)}'
      )
    else:
      files.append((path, False))
  seen: set[Path] = set()
  for file, _ in files:
    if file.resolve() in seen:
      raise ValueError(f'{file} is given twice; its events would count twice')
    seen.add(file.resolve())
  return files


def _files_in(folder: Path) -> list[Path]:
  found = list(_walk(folder, ()))
  others = [str(p.relative_to(folder)) for p in found if not _format(p)]
  if others:
    more = f' and {len(others) - 5} more' if len(others) > 5 else ''
    logging.warning(
      '%s: not read, being neither Parquet nor CSV by name: %s%s',
      folder,
      ', '.join(others[:5]),
      more,
    )
  files = [p for p in found if _format(p)]
  if not files:
    raise ValueError(f'{folder} holds no {", ".join(_PARQUET + _CSV)} file')
  return files


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
  if folder.resolve() in above:
    raise ValueError(f'{folder} links to a folder that it is in; remove it')
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      # Hive's rule: a partition's column may begin with '_'.
      if not _hidden(path) or '=' in path.name:
        yield from _walk(path, (*above, folder.resolve()))
    elif not _hidden(path):
      yield path


def _hidden(path: Path) -> bool:
  return path.name.startswith(('.', '_'))


def _format(path: Path) -> str:
  name = path.name.lower()
  if name.endswith(_PARQUET):
    return 'parquet'
  return 'csv' if name.endswith(_CSV) else ''


def _read(path: Path, wanted: list[str]) -> pa.Table:
  kind = _format(path)
  try:
    names = _parquet_names(path) if kind == 'parquet' else _csv_names(path)
    partition = {k: v for k, v in _partition(path).items() if k not in names}
    check_names([*names, *partition], wanted, str(path))
    stored = [name for name in wanted if name not in partition]
    if kind == 'parquet':
      table = pq.ParquetFile(path).read(columns=stored)
    else:
      table = _read_csv(path, names, stored)
  except (pa.ArrowException, csv.Error, OSError, UnicodeError) as error:
    raise ValueError(
      f'{path} cannot be read as {kind}: {error}; {_cause(path, kind, error)}'
    ) from error
  for name in wanted:
    if name in partition:
      value = pa.scalar(partition[name], pa.large_string())
      table = table.append_column(name, pa.repeat(value, table.num_rows))
  return table.select(wanted)


def _partition(path: Path) -> dict[str, str | None]:
  """`{column: value}` of the folders that the file is in; None is null."""
  found: dict[str, str | None] = {}
  for folder in path.parts[:-1]:
    name, equals, value = folder.partition('=')
    if name and equals:
      value = urllib.parse.unquote(value)
      found[urllib.parse.unquote(name)] = (
        None if value == _NO_PARTITION else value
      )
  return found


def _parquet_names(path: Path) -> list[str]:
  return pq.read_schema(path).names


def _csv_names(path: Path) -> list[str]:
  with pa.input_stream(str(path), compression='detect') as stream:
    text = io.TextIOWrapper(stream, 'utf-8-sig', newline='')
    names = next((line for line in csv.reader(text) if line), [])
    text.detach()
  if not names:
    raise pa.ArrowInvalid('Empty CSV file')
  if len(names) == 1 and any(c in names[0] for c in ';\t|'):
    raise ValueError(
      f'{path}: its header {names[0]!r} is one column; separate by commas'
    )
  return names


def _read_csv(path: Path, names: list[str], wanted: list[str]) -> pa.Table:
  """The columns as text, as it is written."""
  columns = list(dict.fromkeys([*wanted, names[-1]]))
  if names.count(names[-1]) > 1:
    columns = wanted
  block = 2**20
  while True:
    try:
      table = pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=block),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
          include_columns=columns,
          column_types={name: pa.large_string() for name in columns},
          null_values=[],
          strings_can_be_null=False,
        ),
      )
      break
    except pa.ArrowInvalid as error:
      if 'cannot infer number of columns' in str(error):
        return pa.table(
          {name: pa.array([], pa.large_string()) for name in wanted}
        )
      # One event that is larger than a block.
      if 'block' not in str(error) or block >= _MAX_BLOCK:
        raise
      block = min(block * 8, _MAX_BLOCK)
  _check_closed(path, table, names[-1])
  return table


def _check_closed(path: Path, table: pa.Table, last: str) -> None:
  """A quote that nothing closes swallows all events after it."""
  if not table.num_rows or last not in table.column_names:
    return
  value = table[last][-1].as_py()
  if '\n' not in value:
    return
  with pa.input_stream(str(path), compression='detect') as stream:
    end = b''
    while block := stream.read(2**20):
      end = (end + block)[-64:]
  if not end.rstrip(b'\r\n').endswith(b'"'):
    raise ValueError(
      f'{path} row {table.num_rows - 1}: column {last!r} begins with a quote '
      'that nothing closes; close it, or double it if it is part of the value'
    )


def _cause(path: Path, kind: str, error: Exception) -> str:
  if isinstance(error, UnicodeError) or 'UTF8' in str(error):
    return (
      'it is not in UTF-8; convert it, as by '
      f"'iconv -f latin1 -t utf-8 {path.name}'"
    )
  if kind == 'csv' and 'Expected' in str(error):
    return 'every line must have a value for every column of the header'
  return 'it is empty, cut short or of another format'
