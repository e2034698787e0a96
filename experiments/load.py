"""Loads a server with users who come back, and checks every score it gave.

  python experiments/load.py --workdir=runs/demo --output=/tmp/load

It starts `experiments/serve.py` on this machine, finds the highest rate at
which 99 of 100 requests are answered within --limit_ms, and scores everything
again with `Scorer` from the whole history. Each --flag goes to the server.
"""

import functools
import json
import pathlib
import socket
from typing import Any

from absl import app, flags, logging

from benchmarking import load, load_engines, machine
from histjax import Scorer
from histjax.serving import app as app_lib
from histjax.serving import server as server_lib
from histjax.serving.columns import Columns
from histjax.training import workdir

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of the run.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Written with .json.')
_ENGINE = flags.DEFINE_enum(
  'engine',
  'store',
  ['store', 'encode', 'plain'],
  "Behind the server: what serve.py has, or a 'load_engines.Stateless'.",
)
_SERVE = flags.DEFINE_integer('serve', 0, 'Only serve --engine, at this port.')
_FLAGS = flags.DEFINE_multi_string('flag', [], "Of serve.py: 'max_batch=8'.")
_RATE = flags.DEFINE_float('rate', 20.0, 'Requests a second, at first.', 0.1)
_SECONDS = flags.DEFINE_float('seconds', 10.0, 'Of each rate.', 1, 600)
_LIMIT = flags.DEFINE_float('limit_ms', 50.0, 'Of p99.', 0)
_TRIES = flags.DEFINE_integer('tries', 12, 'Rates to try, at most.', 1)
_USERS = flags.DEFINE_integer('users', 2000, "Drawn by Zipf's law.", 1)
_HISTORY = flags.DEFINE_integer('history', 100, 'Events at first.', 0)
_CANDIDATES = flags.DEFINE_integer('candidates', 100, 'Of a request.', 1)
_BOUND = 1e-4
"""Of float32 logits: sums run in another order at other batch sizes."""


def serve() -> None:
  """A stateless engine, as `serve.py` serves the other."""
  sizes = server_lib.buckets(16, 512, _CANDIDATES.value)
  scorer = Scorer.from_workdir(_WORKDIR.value, scorer_config=sizes)
  kind: Any = _ENGINE.value
  engine = load_engines.Stateless(scorer, kind)
  service = app_lib.Service(
    engine,
    lambda: Columns.of_scorer(scorer),
    warm_up=functools.partial(engine.warm_up, 16, 512, _CANDIDATES.value),
  )
  application = app_lib.make_app(service)
  server_lib.Server(service, application, port=_SERVE.value).run()


def run() -> None:
  output = None
  if _OUTPUT.value is not None:
    output = workdir.resolve(_OUTPUT.value, '--output')
    workdir.prepare(output.parent, '--output')
  scorer = Scorer.from_workdir(_WORKDIR.value)
  settings = load.Load(
    users=_USERS.value, history=_HISTORY.value, candidates=_CANDIDATES.value
  )
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  more = [f'--{flag}' for flag in _FLAGS.value]
  command = ['serve.py', f'--port={port}']
  if _ENGINE.value != 'store':
    command = ['load.py', f'--serve={port}', f'--engine={_ENGINE.value}']
    more += [f'--candidates={_CANDIDATES.value}']
  command += [f'--workdir={_WORKDIR.value}', *more]
  with load.server(command, f'http://127.0.0.1:{port}') as url:
    users = load.Users(
      settings,
      load.schema(url),
      scorer.config.schema.time,
      whole=_ENGINE.value != 'store',
    )
    records: list[load.Record] = []

    def try_rate(rate: float):
      new = users.schedule(rate, _SECONDS.value)
      found = load.summary(new, load.run(url, users, new))
      records.extend(new)
      print(f'offered {rate:.1f}/s: {json.dumps(found)}', flush=True)
      return found

    try_rate(_RATE.value)  # Users come for the first time.
    best, tried = load.highest_rate(
      try_rate, first=_RATE.value, limit_ms=_LIMIT.value, tries=_TRIES.value
    )
    metrics = load.metrics(url)
  print(f'{best:.1f} requests/s with p99 <= {_LIMIT.value:g} ms; checking')
  number, worst, wrong = load.wrong(
    records, users, {scorer.fingerprint: scorer}, _BOUND
  )
  print(f'{number} scores, the largest difference {worst:.2f} of the bound')
  report = {
    'suite': 'load',
    'environment': machine.environment(),
    'engine': _ENGINE.value,
    'load': vars(settings),
    'flags': _FLAGS.value,
    'requests/s': best,
    'tried': tried,
    'scores': number,
    'wrong': wrong,
    'server': metrics,
    'ideal_hit_rate': load.ideal_hit_rate(
      records, int(metrics.get('histjax_store_states', 0))
    ),
  }
  if output is not None:
    path = pathlib.Path(f'{output}.json')
    path.write_text(json.dumps(report, indent=2) + '\n')
    print('wrote', path)
  if wrong:
    raise ValueError(f'{len(wrong)} replies are wrong: {wrong[0]}')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    (serve if _SERVE.value else run)()
  except (ValueError, OSError, RuntimeError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
