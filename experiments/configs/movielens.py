"""MovieLens 1M, streaming rows; protocol `ml1m` (docs/logs.md).

  python experiments/train.py --config=experiments/configs/movielens.py \
    --workdir=/tmp/movielens

Two CPU cores: 15 minutes. Expect a test AUC near 0.833, GAUC 0.747. The label
is rating >= 4; the other thresholds are auxiliary tasks. Two layers of a window
of 100 read at most the 199 most recent events.
"""

import config_util


def get_config():
  return config_util.config_dict(
    {
      'data': {
        'source': {'type': 'movielens'},
        'tasks': ('like', 'rating_2', 'rating_3', 'rating_5'),
        'rows': {
          'kind': 'streaming',
          'history_length': 200,
          'max_candidates': 200,
        },
      },
      'model': {
        'encoder': {
          'num_layers': 2,
          'width': 64,
          'num_heads': 4,
          'window': 100,
          'dropout': 0.3,
        },
        'embedding_dim': 32,
        'embedding_dropout': 0.2,
        'interaction': {
          'cross_rank': 32,
          'mlp_widths': (128, 64),
          'dropout': 0.3,
        },
      },
      'pipeline': {'batch_events': 12_288, 'auto_buckets': 3},
      'optimizer': {
        'learning_rate': 2e-3,
        'weight_decay': 0.05,
        'table_learning_rate': 0.1,
        'warmup_steps': 200,
        'clip_norm': 1.0,
      },
      'rank_loss': {'weight': 0.1},
      'average': 0.998,
      'select': {'auc': 1.0, 'gauc': 1.0},
      'num_epochs': 10,
      'patience': 2,
    }
  )
