"""Says what users' states take, and what a device answers.

  python experiments/size.py
  python experiments/size.py --workdir=/tmp/run --lengths=256,1024
  python experiments/size.py --num_layers=4 --width=128 --num_heads=4
  python experiments/size.py --results=benchmarks/results/..-serving-h200.json

Prints bytes a user and users a GB, of the table in docs/serving.md unless a
model is named; and with --results, of `benchmark.py --suite=serving`, the
requests a second that a device was measured to answer.
"""

from absl import app, flags, logging

import flag_util
from benchmarking import sizing
from histjax import EncoderConfig

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a run, whose model it is.')
_LAYERS = flags.DEFINE_integer(
  'num_layers', None, 'Layers of a model without a run.'
)
_WIDTH = flags.DEFINE_integer('width', None, 'D of a model without a run.')
_HEADS = flags.DEFINE_integer('num_heads', None, 'N of a model without a run.')
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['bfloat16', 'float32'], "The model's; bfloat16, or the run's."
)
_LENGTHS = flags.DEFINE_list('lengths', ['256', '1024', '4096'], 'L.')
_RESULTS = flags.DEFINE_string('results', None, 'JSON of the suite serving.')


def models():
  """Encoders with lengths, the model's type, and what to say of them."""
  layers, width, heads = _LAYERS.value, _WIDTH.value, _HEADS.value
  lengths, note = flag_util.sizes(_LENGTHS), None
  if _WORKDIR.value is not None:
    if layers or width or heads:
      raise ValueError(
        f'--workdir={_WORKDIR.value} is of one model; leave --num_layers, '
        '--width and --num_heads out'
      )
    # These need the packages that read data.
    from histjax.serving import planning
    from histjax.training import run

    config = run.load(_WORKDIR.value).config
    encoder, dtype = config.model.encoder, config.model.dtype
    rows = config.data.eval_rows or config.data.rows
    longest = planning.longest_state(config.model, rows.history_length)
    lengths, note = sizing.capped(lengths, longest)
  elif layers and width and heads:
    encoder = EncoderConfig(num_layers=layers, width=width, num_heads=heads)
    dtype = 'bfloat16'
  elif layers or width or heads:
    raise ValueError(
      f'--num_layers={layers} --width={width} --num_heads={heads}: give all or '
      'none'
    )
  else:
    flag_util.refuse(['lengths'], 'is of a model that is named, and none is')
    return sizing.MODELS, _DTYPE.value or 'bfloat16', None
  found = [(encoder, length) for length in lengths]
  return found, _DTYPE.value or dtype, note


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every file.
  try:
    results = flag_util.report(_RESULTS, 'serving')
    found, dtype, note = models()
    print(sizing.states(found, dtype))
    if note is not None:
      print(f'\n{note}')
    if results is not None:
      print(f'\n{sizing.rates(results)}')
  except (ValueError, OSError) as error:
    raise SystemExit(f'{type(error).__name__}: {error}') from error


if __name__ == '__main__':
  app.run(main)
