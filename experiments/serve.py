"""Serves a trained run over HTTP, and a page that shows it.

  python experiments/serve.py --workdir=runs/demo

See `histjax.serving.app` for the routes. It listens on this machine alone
unless --host says otherwise; with a token (--token_file, or the environment's
HISTJAX_TOKEN) it answers only who has it. SIGTERM drains it. --engine=ray puts
engines into replicas of Ray Serve (the extra `ray`).
"""

import functools
import re
import signal
import time
from typing import Any

from absl import app, flags, logging

import flag_util
from histjax import quantization
from histjax.serving import app as app_lib
from histjax.serving import batcher, cache_store, messages, page, server
from histjax.serving.columns import Columns
from histjax.training import workdir

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the training run.', required=True
)
_ENGINE = flags.DEFINE_enum(
  'engine',
  'local',
  ['local', 'ray'],
  'Where requests are scored: in this process, or in replicas of Ray Serve.',
)
_REPLICAS = flags.DEFINE_integer(
  'replicas',
  2,
  'Processes that score, each with its engine; of --engine=ray.',
  1,
)
_HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'Name or address to listen at; 0.0.0.0: all of this machine.',
)
_PORT = flags.DEFINE_integer(
  'port', 8000, 'Port to listen at; 0: a free one, which is printed.', 0, 65535
)
_TOKEN = flags.DEFINE_string(
  'token_file',
  None,
  'File with the token, at least 8 ASCII characters, that requests must bear; '
  'without it the environment variable HISTJAX_TOKEN, if set.',
)
_BATCH = flags.DEFINE_integer(
  'max_batch', 32, 'Requests that are scored at once, at most.', 1
)
_WAIT = flags.DEFINE_float(
  'max_wait_ms',
  0.0,
  'How long a request waits for others to fill its batch, while nothing is '
  'scored.',
  0,
  60_000,
)
_QUEUE = flags.DEFINE_integer(
  'max_queue', 256, 'Requests that may wait; more are refused with 429.', 1
)
_TIMEOUT = flags.DEFINE_float(
  'timeout_ms',
  2000.0,
  'Requests that wait longer until their batch begins are refused with 504, '
  'if they do not say timeout_ms themselves.',
  1,
  3_600_000,
)
_LIMITS = flags.DEFINE_string(
  'limits',
  '',
  "What a request may be, as 'candidates=100,events=99'; see messages.Limits.",
)
_WARM = flags.DEFINE_list(
  'warm_up',
  ['256'],
  'Lengths of histories and, last, candidates to compile for; what is longer '
  'is refused. Without lengths: what the run needs.',
)
_STORE = flags.DEFINE_integer(
  'store_mib',
  256,
  'MiB of device memory, allocated at once, for the states of users; as much '
  'host memory, beside it, may keep their events.',
  1,
)
_TTL = flags.DEFINE_float(
  'ttl_s',
  None,
  'Seconds after their last request in which users are forgotten; None: when '
  'others need the room.',
)
_DTYPE = flags.DEFINE_enum(
  'cache_dtype',
  None,
  quantization.KINDS,
  "Type in which states are kept; None: the model's.",
)
_CACHE = flags.DEFINE_string(
  'cache_dir',
  None,
  'Folder that keeps compiled programs for the next start; None: as JAX is '
  'configured.',
)
_WATCH = flags.DEFINE_float(
  'watch_s',
  0.0,
  'Seconds between looks for new parameters in the workdir, which are then '
  'served; 0: never looks.',
  0,
)
_DRAIN = flags.DEFINE_float(
  'drain_s',
  1.0,
  'Seconds after SIGTERM in which /health/ready says 503 and requests are '
  'still scored.',
  0,
  3600,
)
_PAGE = flags.DEFINE_enum(
  'page',
  'auto',
  ['auto', 'yes', 'no'],
  'Whether to serve the page that shows the model; auto: of the public and '
  'synthetic datasets.',
)
_TITLES = flags.DEFINE_string(
  'titles', None, 'CSV of items and their titles, for the page.'
)
_LATEST = flags.DEFINE_bool(
  'latest', False, 'The latest parameters, not the best on validation.'
)
_MODULES = flags.DEFINE_list(
  'modules', [], 'Modules to import first, of derived features of your own.'
)


def serve() -> None:
  flag_util.import_modules(_MODULES)
  if _ENGINE.value == 'local':
    flag_util.refuse(['replicas'], 'is of --engine=ray')
  sizes = ','.join(_WARM.value)
  if not re.fullmatch(r'0*[1-9]\d*(,0*[1-9]\d*)*', sizes, re.ASCII):
    raise ValueError(
      f'--warm_up={sizes} must be whole numbers above 0; give lengths of '
      'histories, if any, and last the candidates, as 512,256'
    )
  if _TTL.value is not None and not _TTL.value > 0:
    raise ValueError(
      f'--ttl_s={_TTL.value} must be above 0; leave it out to forget nobody'
    )
  flag_util.finite(_WATCH, _WAIT, _TIMEOUT, _DRAIN)
  if _CACHE.value and '://' not in _CACHE.value:  # JAX takes URLs, too.
    workdir.prepare(_CACHE.value, '--cache_dir')
  try:
    token = app_lib.read_token(_TOKEN.value)
  except OSError as error:
    raise ValueError(
      f'--token_file={_TOKEN.value}: {error.strerror}; name a file that can be '
      'read, with the token in it'
    ) from error
  *events, candidates = map(int, _WARM.value)
  config = app_lib.AppConfig(
    batcher.BatcherConfig(_BATCH.value, _WAIT.value / 1000, _QUEUE.value),
    messages.Limits.parse(_LIMITS.value, candidates),
    _TIMEOUT.value / 1000,
    token,
  )
  try:
    sockets = server.listen(_HOST.value, _PORT.value)
  except OSError as error:
    raise ValueError(
      f'--port={_PORT.value} of --host={_HOST.value}: {error.strerror}; end '
      'what listens there, or give another --port or --host'
    ) from error
  dtype: Any = _DTYPE.value
  path, every_s = str(workdir.resolve(_WORKDIR.value)), _WATCH.value
  which: Any = 'latest' if _LATEST.value else 'best'
  store = cache_store.StoreConfig(
    _STORE.value << 20, _STORE.value << 20, _TTL.value
  )
  make = functools.partial(
    server.make_engine,
    *(path, _BATCH.value, events or None, candidates, _CACHE.value),
    store=store,
    cache_dtype=dtype,
    which=which,
    modules=tuple(_MODULES.value),
  )
  seen = server.listing(path)  # Before the engine reads what is there.
  engine: app_lib.RunEngine
  if _ENGINE.value == 'ray':
    from histjax.serving import cluster

    remote = cluster.RemoteEngine(
      make, path, replicas=_REPLICAS.value, which=which
    )
    engine, warm_up = remote, remote.wait
  else:
    engine, warm_up = make()

  began = time.monotonic()

  def told() -> None:
    print('warms up: compiles, and answers 503 meanwhile', flush=True)
    server.and_settle(warm_up)

  def tell() -> None:
    print(f'ready after {time.monotonic() - began:.0f} s', flush=True)

  service = app_lib.Service(
    engine,
    lambda: Columns.of_scorer(engine.scorer),
    config,
    warm_up=told,
    on_ready=tell,
  )
  application = app_lib.make_app(
    service,
    background=[
      lambda: server.watch(
        service,
        path,
        engine,
        every_s,
        which,
        seen,
        functools.partial(print, flush=True),
      )
    ],
    routes=page.of_run(service, engine, _PAGE.value, _TITLES.value),
  )
  port = sockets[0].getsockname()[1]
  if not config.token and not all(map(server.is_loopback, sockets)):
    print(
      f'warning: --host={_HOST.value} without a token: anyone who reaches port '
      f'{port} can use it; set HISTJAX_TOKEN or --token_file',
      flush=True,
    )
  host = f'[{_HOST.value}]' if ':' in _HOST.value else _HOST.value
  print(f'serves http://{host}:{port}', flush=True)
  # Once all is done they end it at once: handlers of Ray and of Python raise
  # errors, after which it would wait for a warm-up.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
  server.Server(service, application, _HOST.value, port, _DRAIN.value).run(
    sockets
  )
  if (failure := service.failure) is not None:
    raise SystemExit(
      f'the warm-up failed: {type(failure).__name__}: {failure}'
    ) from failure


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    serve()
  except (ValueError, OSError, ImportError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
