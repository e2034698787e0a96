"""Reads the Parquet and CSV files of a log."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from absl import logging

from histjax.data import encodings
from histjax.data.parts import Columns, check_names
from histjax.schema import Schema

_CSV = ('.csv', '.csv.gz', '.csv.bz2', '.csv.zst')
_PARQUET = ('.parquet', '.pq')
_NO_PARTITION = '__HIVE_DEFAULT_PARTITION__'
_BLOCK = 2**20
_SAMPLE = 2**20
"""Bytes of a CSV file whose lines tell how many it has."""
_READ_AHEAD = 2**16
"""Of a packed file, what is read at once."""
_MAX_BLOCK = 2**31 - 1
_SCAN = 2**20
"""Bytes that are looked through for quotes at once."""
_SIMPLE = re.compile(rb'(?:[^"]*[,\r\n]"[^"\n]*"(?=[,\r\n]))*')
"""Values of one line, to pass over them in no time."""
_OPENING = re.compile(rb'[,\r\n]"')
_QUOTED = re.compile(rb'[^"]*(?:""[^"]*)*"(?!")')
"""To the quote that closes a value; others are doubled."""


class NoEvents(ValueError):  # noqa: N818
  """Files have no rows."""


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
  tables = []
  for path in with_header(paths):
    table = _read(path, list(wanted))
    if table.num_rows:
      tables.append((table, str(path)))
  if not tables:
    raise no_events(paths)
  parts, sources = zip(*tables, strict=True)
  return Columns(parts, sources, schema)


def stream(
  paths: Sequence[str],
  wanted: Sequence[str],
  schema: Schema,
  *,
  max_rows: int = 2**18,
  tell: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Columns]:
  """As `read`, piece by piece, for files that are larger than memory.

  A row group of a Parquet file is decoded a piece at a time; what is stored of
  its columns is in memory at once.

  Args:
    paths: files or folders of files, as `read` takes them.
    wanted: the columns to read.
    schema: says what counts as missing.
    max_rows: of a piece.
    tell: is told how many bytes of how many have been read.

  Yields:
    Columns of one part, some rows of one file, never none.

  Raises:
    ValueError: as `read`, when it comes to that file.
  """
  files = with_header(paths)
  sizes = [path.stat().st_size for path in files]
  empty = True
  for i, path in enumerate(files):
    before, first = sum(sizes[:i]), 0
    for table, position in _pieces(path, list(wanted), max_rows):
      if table.num_rows:
        empty = False
        yield Columns((table,), (str(path),), schema, (first,))
        first += table.num_rows
      tell(before + position, sum(sizes))
  if empty:
    raise no_events(paths)


def num_rows(paths: Sequence[Path]) -> int:
  """How many rows files have; of CSV files a guess from their beginnings."""
  total = 0
  for path in paths:
    with _readable(path):
      if _format(path) == 'parquet':
        total += pq.read_metadata(path).num_rows
      else:
        total += _guess_rows(path)
  return total


def _guess_rows(path: Path) -> int:
  """Of a CSV file, as if all of it had lines as its beginning has."""
  size, lines, unpacked = path.stat().st_size, 0, 0
  with contextlib.closing(pa.OSFile(str(path))) as raw:
    source = _unpacked(path, raw)
    while raw.tell() < _SAMPLE and unpacked < 4 * _SAMPLE:
      block = source.read(_READ_AHEAD)
      if not block:
        return lines + 1  # The last may lack its end.
      lines += block.count(b'\n')
      unpacked += len(block)
    read = raw.tell()
  if source is not raw and read > _READ_AHEAD:
    read -= _READ_AHEAD  # It may not be unpacked yet: rather more rows.
  return max(lines, 1) * size // read


def _unpacked(path: Path, raw: pa.NativeFile) -> pa.NativeFile:
  if path.suffix.lower() == '.csv':
    return raw
  codec = {'gz': 'gzip', 'bz2': 'bz2', 'zst': 'zstd'}
  return pa.CompressedInputStream(raw, codec[path.suffix.lower().lstrip('.')])


def digest(
  paths: Sequence[str],
  wanted: Sequence[str] = (),
  *,
  tell: Callable[[int, int], None] = lambda done, total: None,
) -> str:
  """SHA-256, in hex, of what files hold, one after the other.

  Args:
    paths: as `read`.
    wanted: columns to read; those that folders give are in it.
    tell: as `stream`.
  """
  files = [path for path, _ in _expand(paths)]
  size, done, total = sum(p.stat().st_size for p in files), 0, hashlib.sha256()
  for path in files:
    own = hashlib.sha256()
    with open(path, 'rb') as file:
      while block := file.read(2**22):
        own.update(block)
        done += len(block)
        tell(done, size)
    total.update(own.digest())
    values = partition(path, wanted)
    if values:
      total.update(json.dumps(values).encode())
  return total.hexdigest()


def with_header(paths: Sequence[str], field: str = 'paths') -> list[Path]:
  """The files, without the empty ones that Spark writes of empty partitions.

  Args:
    paths: as `read`.

  Raises:
    ValueError: a file is missing, of another format or given twice.
  """
  return [
    path
    for path, is_part in _expand(paths, field)
    if not is_part or path.stat().st_size or _format(path) != 'csv'
  ]


def no_events(paths: Sequence[str]) -> NoEvents:
  """What to raise if files hold no events."""
  names = [str(path) for path, _ in _expand(paths)]
  more = f' and {len(names) - 1} more' if len(names) > 1 else ''
  return NoEvents(f'{names[0]}{more} holds no rows; name files with some')


def _expand(
  paths: Sequence[str], field: str = 'paths'
) -> list[tuple[Path, bool]]:
  """The files, and whether each was found in a folder."""
  if isinstance(paths, (str, Path)):
    paths = [str(paths)]
  if not paths:
    raise ValueError(f'{field} is empty; name at least one Parquet or CSV file')
  files: list[tuple[Path, bool]] = []
  for name in paths:
    if not str(name) or '://' in str(name):
      raise ValueError(
        f'{field} has {str(name)!r}, which is no local file or folder; copy it '
        'here and name it'
      )
    path = Path(name).expanduser()
    if path.is_dir():
      files += [(file, True) for file in _files_in(path)]
    elif not path.exists():
      fix = f'check {field}'
      if '*' in str(name) or '?' in str(name):
        fix = 'patterns are not expanded: name files, or their folder'
      raise ValueError(f'{path} does not exist; {fix}')
    elif not _format(path):
      raise ValueError(
        f'{path} is neither Parquet nor CSV by its name; convert it to one of '
        f'these, whose name ends in {", ".join(_PARQUET + _CSV)}'
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
  with _readable(path):
    names, stored, partition = _names(path, wanted)
    if _format(path) == 'parquet':
      table = pq.ParquetFile(path).read(columns=stored)
    else:
      table = _read_csv(path, names, stored)
    return _with_partition(table, wanted, partition)


def _pieces(
  path: Path, wanted: list[str], max_rows: int
) -> Iterator[tuple[pa.Table, int]]:
  """Pieces of a file, and how many of its bytes have been read."""
  with _readable(path):
    names, stored, partition = _names(path, wanted)
    read = _stream_parquet if _format(path) == 'parquet' else _stream_csv
    for table, position in read(path, names, stored, max_rows):
      for start in range(0, table.num_rows or 1, max_rows):
        piece = table.slice(start, max_rows)
        yield _with_partition(piece, wanted, partition), position


@contextlib.contextmanager
def _readable(path: Path):
  """Says which file cannot be read, and why."""
  kind = _format(path)
  try:
    yield
  except (pa.ArrowException, csv.Error, OSError, UnicodeError) as error:
    raise ValueError(
      f'{path} cannot be read as {kind}: {error}; {_cause(path, kind, error)}'
    ) from error


def partition(path: Path, wanted: Sequence[str]) -> dict[str, str | None]:
  """`{column: value}` of those that a file's folders give it; None is null.

  Args:
    path: a file.
    wanted: the columns to read.

  Raises:
    ValueError: the file cannot be read.
  """
  found = _partition(path)
  found = {name: found[name] for name in wanted if name in found}
  if not found or not path.stat().st_size:
    return found
  with _readable(path):
    own = _own_names(path)
  return {name: value for name, value in found.items() if name not in own}


def _names(path: Path, wanted: list[str]):
  """The file's columns, those wanted of them, and those of its folders."""
  names = _own_names(path)
  partition = {k: v for k, v in _partition(path).items() if k not in names}
  check_names([*names, *partition], wanted, str(path))
  return names, [name for name in wanted if name not in partition], partition


def _own_names(path: Path) -> list[str]:
  is_parquet = _format(path) == 'parquet'
  return _parquet_names(path) if is_parquet else _csv_names(path)


def _with_partition(table: pa.Table, wanted, partition) -> pa.Table:
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
  packed = encodings.packed(path)
  if packed:
    raise ValueError(f'{path} is no text of CSV, but {packed}')
  wide = encodings.wide(path)
  if wide:
    raise ValueError(
      f'{path} is in {wide}, not in UTF-8; convert it, as by '
      f"'iconv -f {wide.lower()} -t utf-8 {path.name}'"
    )
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


def _stream_parquet(path: Path, names, stored, max_rows: int):
  del names
  file = pq.ParquetFile(path, memory_map=True)
  size, done = path.stat().st_size, 0
  for batch in file.iter_batches(batch_size=max_rows, columns=stored):
    done += batch.num_rows
    position = size * done // max(file.metadata.num_rows, 1)
    yield pa.Table.from_batches([batch]), position


def _read_csv(path: Path, names: list[str], wanted: list[str]) -> pa.Table:
  """The columns as text, as it is written."""
  options = _csv_options(names, wanted)
  block = _BLOCK
  while True:
    try:
      table = pa_csv.read_csv(
        path, pa_csv.ReadOptions(block_size=block), **options
      )
      break
    except pa.ArrowInvalid as error:
      if _is_headless(error):
        return _no_rows(wanted)
      block = _larger_block(block, error)
  _check_closed(path, table, names[-1], table.num_rows)
  _check_quotes(path, table.num_rows)
  return table


def _stream_csv(path: Path, names: list[str], wanted: list[str], max_rows: int):
  """As `_read_csv`, in pieces, each with the file's position after it."""
  options = _csv_options(names, wanted)
  block, done, table = _BLOCK, 0, None
  while True:
    skip, held = done, []
    try:
      with contextlib.closing(pa.OSFile(str(path))) as raw:
        source = _unpacked(path, raw)
        read = pa_csv.ReadOptions(block_size=block)
        for batch in pa_csv.open_csv(source, read, **options):
          batch, skip = batch.slice(skip), max(skip - batch.num_rows, 0)
          if batch.num_rows:
            held.append(batch)
          if sum(b.num_rows for b in held) >= max_rows:
            table, held = pa.Table.from_batches(held), []
            done += table.num_rows
            yield table, raw.tell()
      break
    except pa.ArrowInvalid as error:
      if _is_headless(error):
        yield _no_rows(wanted), 0
        return
      block = _larger_block(block, error)
  if held:
    table = pa.Table.from_batches(held)
    done += table.num_rows
    yield table, path.stat().st_size
  if table is not None:
    _check_closed(path, table, names[-1], done)
    _check_quotes(path, done)


def _csv_options(names: list[str], wanted: list[str]):
  columns = list(dict.fromkeys([*wanted, names[-1]]))
  if names.count(names[-1]) > 1:
    columns = wanted
  return {
    'parse_options': pa_csv.ParseOptions(newlines_in_values=True),
    'convert_options': pa_csv.ConvertOptions(
      include_columns=columns,
      column_types={name: pa.large_string() for name in columns},
      null_values=[],
      strings_can_be_null=False,
    ),
  }


def _is_headless(error: pa.ArrowInvalid) -> bool:
  """Whether there is nothing below the header."""
  return 'cannot infer number of columns' in str(error)


def _no_rows(wanted: list[str]) -> pa.Table:
  return pa.table({name: pa.array([], pa.large_string()) for name in wanted})


def _larger_block(block: int, error: pa.ArrowInvalid) -> int:
  """For one event that is larger than a block; else raises the error."""
  if 'block' not in str(error) or block >= _MAX_BLOCK:
    raise error
  return min(block * 8, _MAX_BLOCK)


def _check_closed(
  path: Path, table: pa.Table, last: str, num_rows: int
) -> None:
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
      f'{path} row {num_rows - 1}: column {last!r} begins with a quote '
      'that nothing closes; close it, or double it if it is part of the value'
    )


def _check_quotes(path: Path, num_rows: int) -> None:
  """Looks for quotes that the next one, which opens a value, has closed.

  Such a one is followed by that value, where a comma or a line's end should be.
  """
  lines, last = 0, b''
  for block in _blocks(path):
    lines, last = lines + block.count(b'\n'), block
  if lines + (not last.endswith(b'\n')) <= num_rows + 1:
    return  # No value is of several lines; looking at each takes its time.
  line, begun, several, rest = 0, 0, False, b'\n'  # `begun`: 0 outside of one.
  for block in _blocks(path, end=True):
    text, at = rest + block, 0
    while True:
      simple = None if begun else _SIMPLE.match(text, at)
      if simple:
        line, at = line + simple[0].count(b'\n'), simple.end()
      found = (_QUOTED.match if begun else _OPENING.search)(text, at)
      if not found or (begun and block and found.end() == len(text)):
        break  # In the next block, if there is one.
      stop = found.end()
      passed = text.count(b'\n', at, stop)
      line, at = line + passed, stop
      if not begun:
        begun, several = line, False
        continue
      if (several or passed) and text[at : at + 1] not in b',\r\n':
        raise ValueError(
          f'{path} line {begun}: a value begins with a quote that nothing '
          f'closes before line {line}, where another value begins with one; '
          'close it, or double it if it is part of the value'
        )
      begun = 0
    # What may be the beginning of what is looked for.
    kept = len(text.rstrip(b'"')) if begun else len(text) - 1
    kept = max(kept, at)
    passed = text.count(b'\n', at, kept)
    line, several, rest = line + passed, several or passed > 0, text[kept:]


def _blocks(path: Path, *, end: bool = False) -> Iterator[bytes]:
  """What a CSV file holds; at the `end`, nothing."""
  with pa.input_stream(str(path), compression='detect') as stream:
    while block := stream.read(_SCAN):
      yield block
  if end:
    yield b''


def _cause(path: Path, kind: str, error: Exception) -> str:
  if isinstance(error, UnicodeError) or 'UTF8' in str(error):
    return (
      f'it is not in UTF-8{encodings.first_foreign(path)}; convert it, as by '
      f"'iconv -f windows-1252 -t utf-8 {path.name}'"
    )
  if kind == 'csv' and 'Expected' in str(error):
    return 'every line must have a value for every column of the header'
  if kind == 'parquet' and encodings.is_text(path):
    return 'it is a text; if it is CSV, end its name in .csv'
  return 'it is empty, cut short or of another format'
