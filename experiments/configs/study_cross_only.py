"""cross_only against append_cross: self-attention of events, or none.

  python experiments/study.py --workdir=/tmp/study_cross_only \
    --config=experiments/configs/study_cross_only.py

The cells of `study.py` that these two fusions have, with the same rows, trials
and seeds, and differences to append_cross; and both on streaming rows, where
500 events of history are cheap, with five seeds. (On kuairand 50 events are
nearly all of a user's.) 70 cells, for a GPU; the same command goes on where it
was stopped.
"""

from configs import study


def get_config():
  config = study.get_config()
  with config.unlocked():
    config.fusions = {'cross_only': {}, 'append_cross': {}}
    config.baseline = 'append_cross'
    config.ablations = {
      'cross_streaming_ml1m': study.streaming(50, 'cross_only'),
      'streaming_ml1m': study.streaming(50),
      'cross_streaming_500': study.streaming(500, 'cross_only'),
      'streaming_500': study.streaming(500),
      'cross_streaming_kuairand': study.streaming_kuairand('cross_only'),
      'streaming_kuairand': study.streaming_kuairand(),
    }
    config.ablation_seeds = config.seeds
  return config
