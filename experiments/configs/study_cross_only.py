"""cross_only against append_cross: self-attention of events, or none.

  python experiments/study.py --workdir=/tmp/study_cross_only \
    --config=experiments/configs/study_cross_only.py

Streaming rows, where 500 events of history are cheap, on both datasets at
windows 50 and 500, five seeds, each against append_cross of the same window;
and both on the pointwise rows of `study.py`. (Few users of kuairand have more
than 50 events.) Both are trained with the values that `study.py` chose for
append_cross on both datasets. 60 cells; on two CPU cores one of kuairand takes
one to five minutes, with pointwise rows six to thirteen, one of ml1m at window
50 half an hour; on an H200 the 20 streaming cells of ml1m take seven minutes,
all at once (--only). The same command goes on where it was stopped.
"""

from configs import study

_PAIRS = {
  'ml1m': lambda fusion: study.streaming(50, fusion),
  '500': lambda fusion: study.streaming(500, fusion),
  'kuairand': study.streaming_kuairand,
  'kuairand_500': lambda fusion: study.streaming_kuairand(fusion, 500),
}


def get_config():
  config = study.get_config()
  with config.unlocked():
    config.fusions = {'cross_only': {}, 'append_cross': {}}
    config.baseline = 'append_cross'
    config.trials = {'fast': config.trials.fast}
    config.ablations = {}
    for name, ablation in _PAIRS.items():
      config.ablations[f'streaming_{name}'] = ablation('append_cross')
      config.ablations[f'cross_streaming_{name}'] = {
        **ablation('cross_only'),
        'baseline': f'streaming_{name}',
      }
    config.ablation_seeds = config.seeds
  return config
