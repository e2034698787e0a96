"""The small run on a disk that fills, as a program; see `serving.full_disk`.

  python -m tests.training.full_disk <folder> [<step> <size>]..

Before so many updates are made, files may not grow beyond a size any more. Says
how each run, in `<folder>/<step>`, ended.
"""

import pathlib
import sys

from histjax.training import loop
from tests import conftest  # noqa: F401  The same flags give the same bits.
from tests.serving import full_disk
from tests.training import runs

_make = loop.step_lib.make_train_step


def main(folder, *steps_and_sizes):
  cases = zip(steps_and_sizes[::2], steps_and_sizes[1::2], strict=True)
  for step, size in cases:
    disk = full_disk.files_of_at_most(int(size))

    def make(*args, step=int(step), disk=disk, **kwargs):
      update = _make(*args, **kwargs)

      def wrapped(state, batch):
        if int(state.step) == step:
          disk.__enter__()
        return update(state, batch)

      return wrapped

    loop.step_lib.make_train_step = make
    try:
      runs.run(pathlib.Path(folder, step))
    except OSError as error:
      print(f'refused {step}: {error}', flush=True)
    disk.__exit__(None, None, None)


if __name__ == '__main__':
  main(*sys.argv[1:])
