"""Where the official files of a public dataset come from.

In this order: the extracted files in TFDS's `manual_dir`, the archive in
`manual_dir`, the archive from its official address. Archives must have the
checksum of `checksums.tsv`; extracted files are taken as they are, and their
own checksums are kept with the prepared data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager

DATA_DIR_VARIABLE = 'HISTJAX_DATA_DIR'
"""Names a folder of official files to use where no `manual_dir` is given."""

_WrongChecksum = download_manager.NonMatchingChecksumError
_UNREADABLE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)


@dataclasses.dataclass(frozen=True)
class Source:
  """The official files of one dataset.

  Attributes:
    url: the archive's address, as in `checksums.tsv`.
    folder: the folder in the archive, and in `manual_dir`.
    files: those that must be there, relative to `folder`.
    optional: those that are read if they are there.
  """

  url: str
  folder: str
  files: tuple[str, ...]
  optional: tuple[str, ...] = ()

  @property
  def archive(self) -> str:
    """The archive's file name."""
    return self.url.rsplit('/', 1)[-1]

  @property
  def instructions(self) -> str:
    """How to fill `manual_dir` by hand, for people."""
    return (
      f'Put {self.archive} from {self.url}, or the folder {self.folder}/ '
      'extracted from it, into manual_dir.'
    )

  def extracted(self, manual_dir: Path) -> Path | None:
    """The folder of extracted files in `manual_dir`, if there is one."""
    folder = manual_dir / self.folder
    return folder if folder.is_dir() else None

  def read(self, manager: tfds.download.DownloadManager) -> dict[str, bytes]:
    """The files' contents by name.

    Raises:
      ValueError: a file is missing, or the archive is corrupt.
    """
    try:
      manual_dir = Path(manager.manual_dir)
      folder = self.extracted(manual_dir)
    except AssertionError:  # How TFDS says that there is no such folder.
      folder = None
    if folder is not None:
      return self.read_folder(folder)
    return self.read_archive(Path(manager.download(self.url)))

  def read_folder(self, folder: Path) -> dict[str, bytes]:
    """The files in a folder; see `read`."""
    names = [n for n in self.optional if (folder / n).is_file()]
    contents = {}
    for name in (*self.files, *names):
      if not (folder / name).is_file():
        raise ValueError(
          f'{folder / name} is missing; extract {self.archive} again, whole '
          f'({self.url})'
        )
      contents[name] = (folder / name).read_bytes()
    return contents

  def read_archive(self, path: Path) -> dict[str, bytes]:
    """The files in the archive at `path`; see `read`."""
    wanted = {
      f'{self.folder}/{name}': name for name in (*self.files, *self.optional)
    }
    contents = {}
    try:
      if self.archive.endswith('.zip'):
        with zipfile.ZipFile(path) as archive:
          for member in set(archive.namelist()) & set(wanted):
            contents[wanted[member]] = archive.read(member)
      else:
        with tarfile.open(path) as archive:
          for info in archive:
            file = archive.extractfile(info) if info.name in wanted else None
            if file is not None:
              contents[wanted[info.name]] = file.read()
    except _UNREADABLE as error:
      raise ValueError(
        f'{path} is corrupt ({error}); delete it, then download it again '
        f'from {self.url}'
      ) from error
    for name in self.files:
      if name not in contents:
        raise ValueError(
          f'{path} lacks {self.folder}/{name}; get it from {self.url}'
        )
    return contents


def fingerprint(contents: dict[str, bytes]) -> dict[str, str]:
  """The SHA-256 of each file."""
  return {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()}


def prepare(
  builder_class: type[tfds.core.GeneratorBasedBuilder],
  source: Source,
  *,
  data_dir: str = '',
  manual_dir: str = '',
) -> tfds.core.DatasetBuilder:
  """The builder of a dataset that is prepared, now if it was not before.

  Args:
    builder_class: a builder without configs.
    source: its files.
    data_dir: where prepared data is kept; TFDS's own default if empty.
    manual_dir: a folder with official files; if empty, the one that the
      environment's HISTJAX_DATA_DIR names; if that is not set, the archive is
      downloaded.

  Raises:
    ValueError: files are missing, corrupt, of a wrong checksum, not to be
      had, or not those that the prepared data was made of; or `data_dir`
      cannot be written.
  """
  manual_dir = manual_dir or os.environ.get(DATA_DIR_VARIABLE, '')
  folder = None
  if manual_dir:
    folder = _check_manual_dir(source, Path(manual_dir).expanduser())

  def create():
    return builder_class(data_dir=data_dir or None, file_format='array_record')

  try:
    builder = create()
    if not builder.is_prepared():
      config = tfds.download.DownloadConfig(
        manual_dir=manual_dir or None, force_checksums_validation=True
      )
      try:
        builder.download_and_prepare(download_config=config)
      except OSError:
        builder = create()  # Another process may have prepared it meanwhile.
        if not builder.is_prepared():
          raise
  except (tfds.download.DownloadError, _WrongChecksum) as error:
    raise ValueError(
      f'{source.archive} is not to be had: {error}\n{source.instructions}'
    ) from error
  except OSError as error:
    raise ValueError(
      f'{builder_class.name} could not be prepared in '
      f'data_dir={data_dir or "the default of TFDS"!r} ({error}). It must be '
      f'writable; if the download failed: {source.instructions}'
    ) from error
  if folder is not None:
    made_of = dict(builder.info.metadata or {}).get('files')
    if made_of != fingerprint(source.read_folder(folder)):
      raise ValueError(
        f'{builder.data_path} was prepared from other files than those in '
        f'{folder}; delete it, or set another data_dir'
      )
  return builder


def _check_manual_dir(source: Source, path: Path) -> Path | None:
  if not path.is_dir():
    raise ValueError(
      f'manual_dir={str(path)!r} is no folder; create it, or leave it empty '
      f'to download. {source.instructions}'
    )
  folder = source.extracted(path)
  if folder is None and not (path / source.archive).is_file():
    raise ValueError(
      f'manual_dir={str(path)!r} holds neither {source.folder}/ nor '
      f'{source.archive}; leave it empty to download. {source.instructions}'
    )
  return folder


def examples(builder: tfds.core.DatasetBuilder) -> list[dict]:
  """The examples of the split 'events' of a prepared dataset."""
  source = builder.as_data_source(split='events')
  return list(source.__getitems__(range(len(source))))  # Reads them at once.


def columns_of(builder: tfds.core.DatasetBuilder) -> dict[str, np.ndarray]:
  """The events of a prepared dataset, one column a feature.

  Features of a user are repeated for each of the user's events.
  """
  users = examples(builder)
  features = builder.info.features.items()
  ragged = [name for name, f in features if f.shape[:1] == (None,)]
  lengths = [len(user[ragged[0]]) for user in users]
  return {
    name: np.concatenate([user[name] for user in users])
    if name in ragged
    else np.repeat([_plain(user[name]) for user in users], lengths)
    for name, _ in features
  }


def _plain(value):
  return value.decode() if isinstance(value, bytes) else value
