"""Times plain, joint and cached scoring over history lengths and candidates.

  python experiments/benchmark.py --workdir=/tmp/synthetic --output=/tmp/scoring
  python experiments/benchmark.py --width=128 --num_layers=4 --bfloat16

The model is that of a training run, or one of random parameters of the given
size. Prints a table; writes <output>.json and the plot <output>.png.
"""

import dataclasses

import jax
from absl import app, flags, logging

from histjax import EncoderConfig, Ranker, RankerConfig, benchmark
from histjax import config as config_lib
from histjax.data import synthetic
from histjax.training import checkpoints
from histjax.training.config import TrainConfig

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a training run, if any.')
_LENGTHS = flags.DEFINE_list('lengths', ['64', '256', '1024'], 'Values of L.')
_CANDIDATES = flags.DEFINE_list('candidates', ['64', '512'], 'Values of C.')
_ROWS = flags.DEFINE_integer('rows', 1, 'Users scored at once.')
_SECONDS = flags.DEFINE_float('seconds', 1.0, 'Least time per measurement.')
_WIDTH = flags.DEFINE_integer('width', 64, 'D, without a workdir.')
_LAYERS = flags.DEFINE_integer('num_layers', 2, 'Layers, without a workdir.')
_HEADS = flags.DEFINE_integer('num_heads', 4, 'N, without a workdir.')
_BFLOAT16 = flags.DEFINE_bool('bfloat16', False, 'Compute in bfloat16.')
_OUTPUT = flags.DEFINE_string('output', None, 'Path without ending, if any.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  if _WORKDIR.value:
    params, values = checkpoints.load_params(_WORKDIR.value)
    config = config_lib.from_dict(TrainConfig, values).model
  else:
    config = RankerConfig(
      schema=synthetic.schema(synthetic.SyntheticConfig()),
      encoder=EncoderConfig(
        num_layers=_LAYERS.value,
        width=_WIDTH.value,
        num_heads=_HEADS.value,
      ),
    )
    batch = benchmark.random_batch(config.schema, 1, 16, 16)
    params = jax.jit(Ranker(config).init)(jax.random.key(0), batch)['params']
  if _BFLOAT16.value:
    config = dataclasses.replace(config, dtype='bfloat16')
  print(benchmark.HEADER)
  report = benchmark.scoring_suite(
    config,
    params,
    [int(n) for n in _LENGTHS.value],
    [int(n) for n in _CANDIDATES.value],
    num_rows=_ROWS.value,
    seconds=_SECONDS.value,
  )
  print(
    f'matmul ceiling {report["ceiling_flops"] / 1e9:.0f} GFLOP/s on '
    f'{report["environment"]["device"]}'
  )
  if _OUTPUT.value:
    print('wrote', *benchmark.write_report(report, _OUTPUT.value))


if __name__ == '__main__':
  app.run(main)
