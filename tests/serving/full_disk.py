"""The system's own refusal to write more, as of a full disk; as a program."""

import contextlib
import pathlib
import resource
import sys

from histjax.serving import batch, export
from tests import support
from tests.serving import exports, many_users

REFUSED = 'File too large'
"""What it says: EFBIG, where a full disk has ENOSPC."""


@contextlib.contextmanager
def files_of_at_most(size):
  """No file of this process grows beyond so many bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Full(batch.Local):
  """Shards are scored as always, and their parts refused."""

  def run(self, *args):
    with files_of_at_most(1000):
      super().run(*args)


def export_model(folder):
  config = support.config()
  export.export_model(
    config,
    support.init(config)[1],
    folder / 'model',
    export.ExportConfig('cpu', **exports.SIZES),
  )


def rank(folder, engine=None):
  batch.rank_files(
    many_users.model,
    [str(folder / 'log.parquet')],
    [str(folder / 'shown.parquet')],
    folder / 'ranked.csv',
    many_users.OPTIONS,
    engine=engine,
  )


def main(what, folder, *sizes):
  """Tries with each size of files, says what is left, and ends without one.

  The size 'parts' refuses the parts of scores alone.
  """
  run = {'export': export_model, 'rank': rank}[what]
  folder = pathlib.Path(folder)
  for size in sizes:
    try:
      if size == 'parts':
        rank(folder, Full())
      else:
        with files_of_at_most(int(size)):
          run(folder)
    except OSError as error:
      print('refused:', str(error).replace('\n', ' '))
    left = (x.relative_to(folder) for x in folder.rglob('*') if x.is_file())
    print('left:', *sorted(map(str, left)), flush=True)
  run(folder)
  print('done')


if __name__ == '__main__':
  main(*sys.argv[1:])
