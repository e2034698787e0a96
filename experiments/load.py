"""Loads servers with users who come back, and checks the scores they give.

  python experiments/load.py --output=/tmp/load
  python experiments/load.py --check --output=/tmp/load-check

It starts `experiments/serve.py` on this machine and finds the highest rate at
which 99 of 100 requests are answered within --limit_ms: with the store; with
the history read on each request ('encode'); and, one request at a time, with
the model that reads the history for each candidate ('plain'). With --check it
scores everything again with `Scorer` from the whole history, while states are
evicted and extended, and three models are served one after the other.
Writes <output>.json and, but for --check, the plot <output>.png.
"""

import functools
import pathlib
import tempfile
from typing import Any

from absl import app, flags, logging

import benchmarking
import flag_util
from benchmarking import (
  load,
  load_engines,
  load_run,
  load_suite,
  machine,
)
from histjax import Scorer
from histjax.serving import app as app_lib
from histjax.serving import batcher
from histjax.serving import server as server_lib
from histjax.serving.columns import Columns
from histjax.serving.engine import EngineConfig
from histjax.training import workdir

_CHECK = flags.DEFINE_bool(
  'check',
  False,
  'Compare every score with Scorer, over roll-overs, in place of rates.',
)
_WORKDIR = flags.DEFINE_multi_string(
  'workdir', [], 'Of a run, with --check of several; none: runs are made.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Path without ending, if any.')
_ENGINES = flags.DEFINE_multi_enum(
  'engine', load_suite.ENGINES, load_suite.ENGINES, 'Engines to compare.'
)
_SERVE = flags.DEFINE_integer('serve', 0, 'Only serve --engine, at this port.')
_FLAGS = flags.DEFINE_multi_string(
  'flag', [], "Flags for serve.py, as 'ttl_s=60'."
)
_BATCH = flags.DEFINE_integer('max_batch', 8, 'Requests scored at once.', 1)
_LIMIT = flags.DEFINE_float(
  'limit_ms', 50.0, 'Milliseconds that the p99 of a good rate has at most.', 0
)
_TRIES = flags.DEFINE_integer('tries', 7, 'Rates to try, at most.', 1)
_RATE = flags.DEFINE_float('rate', 40.0, 'Requests a second of --check.', 0.1)
_SECONDS = flags.DEFINE_float(
  'seconds', None, 'Seconds of each rate; 10, or 36 with --check.', 1
)
_STORE = flags.DEFINE_integer(
  'store_mib', None, 'MiB for states; 768, or 2 with --check.', 1
)
_USERS = flags.DEFINE_integer(
  'users', None, "Users, by Zipf's law; 500, or 400 with --check.", 1
)
_HISTORY = flags.DEFINE_integer(
  'history', None, 'Events of a user at first; 900, or 60 with --check.', 1
)
_LONGEST = flags.DEFINE_integer(
  'longest',
  None,
  'Events of a user later, at most; 1024, or 128 with --check.',
  1,
)
_CANDIDATES = flags.DEFINE_integer(
  'candidates', None, 'Candidates of a request; 100, or 20 with --check.', 1
)
_WIDTH = flags.DEFINE_integer(
  'width', None, 'D of runs made; 64, or 32 with --check.', 8
)
_LAYERS = flags.DEFINE_integer(
  'layers', None, 'Layers of runs made; 4, or 2 with --check.', 1
)
_DEFAULTS = {
  'seconds': (10.0, 36.0),
  'store_mib': (768, 2),
  'users': (500, 400),
  'history': (900, 60),
  'longest': (1024, 128),
  'candidates': (100, 20),
  'width': (64, 32),
  'layers': (4, 2),
}


def value(flag: flags.FlagHolder) -> Any:
  given: Any = flag.value
  return _DEFAULTS[flag.name][_CHECK.value] if given is None else given


def check_flags() -> None:
  """Raises a ValueError of a flag that would do nothing, or for ever."""
  flag_util.finite(_LIMIT, _RATE, _SECONDS)
  if _SERVE.value:
    others = {*_DEFAULTS} - {'longest', 'candidates'}
    others |= {'check', 'output', 'flag', 'limit_ms', 'tries', 'rate'}
    flag_util.refuse(sorted(others), 'is not of --serve')
    return
  if _CHECK.value:
    flag_util.refuse(('engine', 'limit_ms', 'tries'), 'is not of --check')
  else:
    flag_util.refuse(['rate'], 'is of --check')
    if 'store' not in _ENGINES.value:
      flag_util.refuse(('store_mib', 'flag'), 'is of --engine=store')
  if _WORKDIR.value:
    flag_util.refuse(('width', 'layers'), 'is of runs made, without --workdir')


def serve() -> None:
  """A stateless engine, as `serve.py` serves the other."""
  kind: Any
  (kind,), (path,) = _ENGINES.value, _WORKDIR.value
  events, candidates = value(_LONGEST), value(_CANDIDATES)
  rows = min(_BATCH.value, 8)
  scorer = Scorer.from_workdir(
    path, scorer_config=server_lib.buckets(rows, [events], candidates)
  )
  engine = load_engines.Stateless(
    scorer, kind, EngineConfig(max_rows=rows, pad_rows=False)
  )
  warm_up = functools.partial(engine.warm_up, events, candidates)
  service = app_lib.Service(
    engine,
    lambda: Columns.of_scorer(scorer),
    app_lib.AppConfig(batcher.BatcherConfig(_BATCH.value)),
    warm_up=functools.partial(server_lib.and_settle, warm_up),
  )
  application = app_lib.make_app(service)
  server_lib.Server(service, application, port=_SERVE.value).run()


def run() -> None:
  output = None
  if _OUTPUT.value is not None:  # Fails before the work, not after it.
    output = workdir.resolve(_OUTPUT.value, '--output')
    workdir.prepare(output.parent, '--output')
  suite = load_suite.Suite(
    load.Load(
      users=value(_USERS),
      history=value(_HISTORY),
      longest=value(_LONGEST),
      candidates=value(_CANDIDATES),
    ),
    limit_ms=_LIMIT.value,
    seconds=value(_SECONDS),
    tries=_TRIES.value,
    max_batch=_BATCH.value,
    store_mib=value(_STORE),
    more=tuple(f'--{flag}' for flag in _FLAGS.value),
  )
  size = load_run.Size(width=value(_WIDTH), layers=value(_LAYERS))
  progress = functools.partial(print, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    paths = [*_WORKDIR.value]
    for seed in range(0 if paths else 3 if _CHECK.value else 1):
      paths.append(f'{folder}/{seed}')
      load_run.make(paths[-1], size, seed)
    if _CHECK.value:
      link = pathlib.Path(folder, 'served')
      found = load_suite.check(paths, link, _RATE.value, suite, progress)
      checks = [found['check']]
    else:
      if len(paths) != 1:
        raise ValueError(f'--workdir={paths}: give one, or --check')
      kinds: Any = list(dict.fromkeys(_ENGINES.value))
      found = load_suite.compare(paths[0], kinds, suite, progress)
      checks = [x['check'] for x in found['results'].values()]
  report = {
    'suite': 'load-check' if _CHECK.value else 'load',
    'environment': machine.environment(),
    'model': None if _WORKDIR.value else vars(size),
    'load': vars(suite.load),
    'settings': {k: v for k, v in vars(suite).items() if k != 'load'},
    **found,
  }
  for kind, ratio in found.get('ratios', {}).items():
    print(f'{kinds[0]}: {ratio:.1f} times the requests of {kind}')
  if output is not None:
    print('wrote', *benchmarking.write_report(report, str(output)))
  if wrong := [line for x in checks for line in x['wrong']]:
    raise ValueError('\n'.join([f'{len(wrong)} are wrong:', *wrong[:10]]))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    check_flags()
    (serve if _SERVE.value else run)()
  except (ValueError, OSError, RuntimeError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
