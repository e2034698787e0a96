"""Exports a trained ranker as a directory that JAX and NumPy alone can score.

  python experiments/export.py --workdir=/tmp/run --platform=cpu \
    --output=/tmp/model --events=256,1024 --candidates=512
  python /tmp/model/load.py --check

One program a combination of sizes. --platform may be another machine's.
"""

import signal
import sys
from typing import Any

from absl import app, flags, logging

import flag_util
from histjax.serving import export

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the training run.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The directory to make; empty or not there.', required=True
)
_PLATFORM = flags.DEFINE_enum(
  'platform', None, ['cpu', 'cuda', 'tpu'], 'What will run it.', required=True
)
_CAPABILITY = flags.DEFINE_string(
  'compute_capability', None, "Of cuda: '9.0', Hopper, has kernels; '' is any."
)
_SIZES = {
  name: flags.DEFINE_list(name, None, f'Ascending sizes to pad {what} to.')
  for name, what in (
    ('rows', 'requests, in users,'),
    ('events', 'histories'),
    ('candidates', "a user's candidates"),
    ('new_events', 'what extend is given'),
  )
}
_LATEST = flags.DEFINE_bool(
  'latest', False, 'The latest parameters, not the best on validation.'
)
_REPICK = flags.DEFINE_bool(
  'repick', False, 'Pick implementations anew, whatever the run names.'
)
_MODULES = flags.DEFINE_list(
  'modules', [], 'Modules to import first, of derived features of your own.'
)


def run() -> None:
  values: dict[str, Any] = {'platform': _PLATFORM.value}
  for name, flag in _SIZES.items():
    if flag.value is not None:
      if not all(x.isdecimal() for x in flag.value):
        raise ValueError(f'--{name}={flag.value} must be whole numbers')
      values[name] = tuple(map(int, flag.value))
  options = export.ExportConfig(
    compute_capability=_CAPABILITY.value, repick=_REPICK.value, **values
  )
  workdir, output = _WORKDIR.value, _OUTPUT.value
  which: Any = 'latest' if _LATEST.value else 'best'
  manifest = export.export_workdir(workdir, output, options, which, print)
  print(f'{len(manifest["files"]) + 2} files in {output}')
  if not export.runs_here(manifest):
    print(f'not checked here; there run python {output}/load.py --check')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  # As an error ends it, so that nothing is left beside the output.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    flag_util.import_modules(_MODULES)
    run()
  except (ValueError, OSError, ImportError, NotImplementedError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
