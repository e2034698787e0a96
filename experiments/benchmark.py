"""Times the library: ways to score, operations, whole requests, updates.

  python experiments/benchmark.py --workdir=/tmp/synthetic --output=/tmp/scoring
  python experiments/benchmark.py --suite=attention --output=/tmp/attention
  python experiments/benchmark.py --suite=tower --workloads=batch_128,ragged_128
  python experiments/benchmark.py --suite=request --output=/tmp/request
  python experiments/benchmark.py --suite=train_step
  python experiments/benchmark.py --suite=tables --rows=10000,1000000,10000000
  python experiments/benchmark.py --suite=devices --rows=1000000
  python experiments/benchmark.py --suite=serving --output=/tmp/serving
  python experiments/benchmark.py --suite=prepare --folder=/tmp/prepare \
    --config=experiments/configs/events.py --events=1000000

'scoring' compares plain, joint and cached scoring of one model, that of a
training run or one of random parameters; 'cost' says with which powers of L and
C their FLOPs and times grow, for each amortizable fusion; 'fusions' times all
fusions at one L and C, for `study.py --cost`; 'histories' times encode, score
and extend of amortizable ones at long L and one C. 'serving' times users who
come back: hit, extend, miss and no cache, on the device, in process and through
HTTP. 'prepare' makes a log (`generate`) and shards of it, within --memory, and
says how fast a training step is fed from these; 'spill' times its first step
beside DuckDB and Polars, if they are installed. 'tables' times updates by the
rows of a table, beside those with gradients of whole tables; 'devices' on one
device and on all, and says what they send. 'train_step' times
updates, on a log in pointwise, request, streaming and packed rows beside
PyTorch; freed memory stays with the process, as in `train.py`. The other suites
time the named workloads of `benchmarking.workloads` against rivals that are
installed. Prints tables; writes <output>.json and, but for 'fusions',
'histories', 'prepare', 'spill' and full rows of 'train_step', the plot
<output>.png.
"""

import dataclasses
import sys
from typing import Any

from histjax.training import host_memory

if 'train_step' in [x.rpartition('=')[2] for x in sys.argv]:
  host_memory.keep_freed()  # As `train.py`: before other imports start threads.

import jax
from absl import app, flags, logging

import benchmarking
import config_util
import flag_util
from benchmarking import (
  cost,
  devices,
  histories,
  requests,
  suites,
  tables,
  train_steps,
  workloads,
)
from benchmarking import report as report_lib
from histjax import EncoderConfig, Ranker, RankerConfig, testing
from histjax.training import workdir
from histjax.training.config import TrainConfig

_SUITES = {
  name: module
  for module in (suites, requests, train_steps)
  for name in module.SUITES
}
_OF_ONE_MODEL = ('scoring', 'cost', 'fusions', 'histories')
_SERVING = 'serving'
_OF_A_LOG = ('prepare', 'spill')
_TABLES = 'tables'
_DEVICES = 'devices'
_SUITE = flags.DEFINE_enum(
  'suite',
  'scoring',
  [*_OF_ONE_MODEL, _SERVING, *_OF_A_LOG, _TABLES, _DEVICES, *_SUITES],
  'What to time.',
)
_OUTPUT = flags.DEFINE_string('output', None, 'Path without ending, if any.')
_SECONDS = flags.DEFINE_float(
  'seconds',
  None,
  'Least time per measurement or sample, if not the default.',
  0,
)
_WORKLOADS = flags.DEFINE_list('workloads', None, 'Names; None: all for here.')
_CONTENDERS = flags.DEFINE_list(
  'contenders', None, 'Names; None: all for here.'
)
_CALLS = flags.DEFINE_integer(
  'calls', None, "Of request: the least of 'score', within 20 x --seconds.", 1
)
_REPEATS = flags.DEFINE_integer('repeats', 15, 'Samples, taken in turns.', 1)
_FUSIONS = flags.DEFINE_list(
  'fusions', [], 'Of histories: amortizable ones; empty: all.'
)
# Of the suites scoring, cost, fusions, histories and, but for the first, of
# serving.
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of a training run, whose model is timed, if any.'
)
_LENGTHS = flags.DEFINE_list(
  'lengths',
  None,
  'L; 64,256,1024, of histories 1000,10000, of serving 256,1024,4096.',
)
_CANDIDATES = flags.DEFINE_list(
  'candidates', None, 'C; 64,512, of histories 512, of serving 128,512,2048.'
)
_ROWS = flags.DEFINE_list(
  'rows', None, 'Users at once, 1; of tables and devices: rows of a table.'
)
_WIDTH = flags.DEFINE_integer('width', 64, 'Without a workdir: D.')
_LAYERS = flags.DEFINE_integer('num_layers', 2, 'Without a workdir: layers.')
_HEADS = flags.DEFINE_integer('num_heads', 4, 'Without a workdir: N.')
_BFLOAT16 = flags.DEFINE_bool(
  'bfloat16', False, 'Whether the model computes in bfloat16.'
)
_USERS = flags.DEFINE_list('users', ['1', '32'], 'Of serving: users at once.')
_HTTP = flags.DEFINE_bool(
  'http', True, 'Of serving: whether through HTTP, too.'
)
# Of the suites prepare and spill.
_CONFIG = config_util.Config(
  TrainConfig, 'The run of prepare and spill.', required=False
)
_FOLDER = flags.DEFINE_string(
  'folder', None, 'Folder to work in, of prepare and spill.'
)
_EVENTS = flags.DEFINE_integer(
  'events', 1_000_000, 'Events of the log of prepare and spill.', 1
)
_MEMORY = flags.DEFINE_float('memory', 4.0, 'GiB that prepare may take.')
_WORKERS = flags.DEFINE_integer(
  'workers', 2, 'Processes of prepare and spill.', 1
)
_OF_A_MODEL = (*_OF_ONE_MODEL, _SERVING)
_ONLY_OF = {
  'calls': ('request',),
  'fusions': ('histories',),
  'folder': _OF_A_LOG,
  'events': _OF_A_LOG,
  'memory': _OF_A_LOG,
  'workers': _OF_A_LOG,
  'config': _OF_A_LOG,
  'workdir': _OF_ONE_MODEL,
  'lengths': _OF_A_MODEL,
  'candidates': _OF_A_MODEL,
  'width': _OF_A_MODEL,
  'num_layers': _OF_A_MODEL,
  'num_heads': _OF_A_MODEL,
  'bfloat16': _OF_A_MODEL,
  'rows': (*_OF_ONE_MODEL, _TABLES, _DEVICES),
  'users': (_SERVING,),
  'http': (_SERVING,),
  'workloads': tuple(_SUITES),
  'contenders': (*_SUITES, _TABLES, _DEVICES),
  'repeats': (*_SUITES, _TABLES, _DEVICES),
  'seconds': (*_OF_A_MODEL, *_SUITES, _TABLES, _DEVICES),
}
"""Flags that other suites would ignore."""


def one_model(suite):
  variables = None
  if _WORKDIR.value is not None:
    flag_util.refuse(
      ('width', 'num_layers', 'num_heads'), 'is of a model without --workdir'
    )
    # These need the packages that read data; the other suites do not.
    from histjax.training import checkpoints, identity

    variables, values = checkpoints.load_variables(_WORKDIR.value)
    config = identity.of_run(values, _WORKDIR.value).model
  else:
    from histjax.data import synthetic  # Likewise.

    config = RankerConfig(
      schema=synthetic.schema(synthetic.SyntheticConfig()),
      encoder=EncoderConfig(
        num_layers=_LAYERS.value,
        width=_WIDTH.value,
        num_heads=_HEADS.value,
      ),
    )
  if _BFLOAT16.value:
    config = dataclasses.replace(config, dtype='bfloat16')
  rows = flag_util.sizes(_ROWS, (1,))
  if len(rows) > 1:
    raise app.UsageError(f'suite={suite} takes one of --rows={rows}')
  options: dict[str, Any] = {
    'num_rows': rows[0],
    'seconds': 1.0 if _SECONDS.value is None else _SECONDS.value,
  }
  if suite == 'histories':
    candidates = flag_util.sizes(_CANDIDATES, (512,))
    if len(candidates) > 1:
      raise app.UsageError(
        f'suite=histories takes one of --candidates={candidates}'
      )
    return histories.run(
      config,
      flag_util.sizes(_LENGTHS, (1000, 10_000)),
      candidates[0],
      fusions=_FUSIONS.value,
      **options,
    )
  sizes = [
    flag_util.sizes(_LENGTHS, (64, 256, 1024)),
    flag_util.sizes(_CANDIDATES, (64, 512)),
  ]
  if suite == 'cost':
    return cost.run(config, *sizes, **options)
  if suite == 'fusions':
    if len(sizes[0]) != 1 or len(sizes[1]) != 1:
      raise app.UsageError(
        f'suite=fusions takes one of --lengths={sizes[0]} and one of '
        f'--candidates={sizes[1]}'
      )
    return cost.fusions(config, sizes[0][0], sizes[1][0], **options)
  if variables is None:
    batch = testing.random_batch(config.schema, 1, 16, 16)
    variables = jax.jit(Ranker(config).init)(jax.random.key(0), batch)
  print(benchmarking.HEADER)
  report = benchmarking.scoring_suite(config, variables, *sizes, **options)
  print(
    f'matmul ceiling {report["ceiling_flops"] / 1e9:.0f} GFLOP/s on '
    f'{report["environment"]["device"]}'
  )
  return report


def serving_suite(save=None):
  # It needs the packages that read data, and those of a server.
  from benchmarking import serving

  options = {} if _SECONDS.value is None else {'seconds': _SECONDS.value}
  return serving.run(
    workloads.Request(
      *(1, 1, 1, _WIDTH.value, _LAYERS.value, _HEADS.value),
      dtype='bfloat16' if _BFLOAT16.value else 'float32',
    ),
    flag_util.sizes(_LENGTHS, serving.LENGTHS),
    flag_util.sizes(_CANDIDATES, serving.CANDIDATES),
    users=flag_util.sizes(_USERS, serving.USERS),
    http=_HTTP.value,
    progress=lambda line: print(line, flush=True),
    save=save,
    **options,
  )


def log_suite(suite):
  import event_log
  from benchmarking import preparing, spilling

  if _FOLDER.value is None:
    raise ValueError(f'--suite={suite} needs --folder, to work in')
  log = event_log.LogConfig(
    num_events=_EVENTS.value,
    num_users=max(1, _EVENTS.value // 100),
    num_items=1_000_000,
    num_files=max(1, _EVENTS.value // 1_000_000),
  )
  folder = workdir.prepare(_FOLDER.value, '--folder')
  if suite == 'spill':
    return spilling.run(
      _CONFIG.values(), log, folder, num_workers=_WORKERS.value
    )
  return preparing.run(
    _CONFIG.values(),
    log,
    folder,
    gibibytes=_MEMORY.value,
    num_workers=_WORKERS.value,
    progress=lambda line: print(line, flush=True),
  )


def tables_suite(module: Any):
  options: dict[str, Any] = {}
  if _SECONDS.value is not None:
    options['seconds'] = _SECONDS.value
  return module.run(
    flag_util.sizes(_ROWS, module.ROWS),
    contenders=_CONTENDERS.value,
    repeats=_REPEATS.value,
    **options,
    progress=lambda line: print(line, flush=True),
  )


def named_suite(name, save=None):
  module: Any = _SUITES[name]
  options: dict[str, Any] = {}
  if _SECONDS.value is not None:
    options['seconds'] = _SECONDS.value
  if _CALLS.value is not None:
    options['calls'] = _CALLS.value
  if module is requests:
    options['save'] = save
  return module.run(
    name,
    workloads.select(
      module.SUITES[name], _WORKLOADS.value, jax.default_backend()
    ),
    _CONTENDERS.value,
    repeats=_REPEATS.value,
    **options,
    progress=lambda line: print(line, flush=True),
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  suite, output = _SUITE.value, None
  for name, suites_of_it in _ONLY_OF.items():
    if flags.FLAGS[name].present and suite not in suites_of_it:
      raise app.UsageError(
        f'--{name} is of --suite={" or ".join(suites_of_it)}, not of {suite}'
      )
  try:
    flag_util.finite(_SECONDS, _MEMORY)
    if _OUTPUT.value is not None:  # Fails before the work, not after it.
      output = workdir.resolve(_OUTPUT.value, '--output')
      workdir.prepare(output.parent, '--output')
    save = output and (lambda x: benchmarking.write_report(x, str(output)))
    if suite in _OF_ONE_MODEL:
      report = one_model(suite)
    elif suite in _OF_A_LOG:
      report = log_suite(suite)
    elif suite == _SERVING:
      report = serving_suite(save)
    elif suite in (_TABLES, _DEVICES):
      report = tables_suite(tables if suite == _TABLES else devices)
    else:
      report = named_suite(suite, save)
  except (ValueError, OSError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error
  if output is not None:
    print('wrote', *benchmarking.write_report(report, str(output)))
  if broken := report_lib.broken(report):
    raise SystemExit('\n'.join(['failed:', *broken]))


if __name__ == '__main__':
  app.run(main, flags_parser=_CONFIG.parse)
