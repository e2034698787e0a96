"""A log of your own: copy this file, and say what its columns mean.

  python experiments/train.py --config=my_log.py --workdir=/tmp/my_log \
    --config.data.source.paths='("log.parquet",)'

One that is larger than memory goes through prepare.py first, see docs/data.md.
How long it takes and what to expect depend on the log. `histjax.schema`
documents each field, `histjax.features` what can be derived.
"""

import config_util


def get_config():
  return config_util.config_dict(
    {
      'data': {
        'source': {
          'type': 'events',
          'paths': ('log.parquet',),
          'schema': {
            'user': 'user',
            'time': 'time',
            'context': [
              {
                'type': 'categorical',
                'name': 'country',
                'size': 256,
                'ids': 'hash',
              },
            ],
            'item': [
              {
                'type': 'categorical',
                'name': 'item',
                'size': 100_000,
                'ids': 'hash',
              },
              {'type': 'dense', 'name': 'price', 'log': True},
            ],
            'action': [{'type': 'categorical', 'name': 'clicked', 'size': 2}],
            'tasks': [{'name': 'click', 'column': 'clicked'}],
          },
          'split': {'type': 'fraction_split', 'train': 0.8, 'validation': 0.1},
        },
        'features': [{'type': 'time_gap', 'buckets': 24}],
        'rows': {
          'kind': 'streaming',
          'history_length': 200,
          'max_candidates': 200,
        },
      },
      'model': {'encoder': {'window': 100, 'dropout': 0.2}},
      'pipeline': {'batch_events': 8192, 'pack': True},
      'optimizer': {'weight_decay': 0.01, 'clip_norm': 1.0},
      'task_weights': {'click': 1.0},
      'num_epochs': 10,
      'patience': 2,
    }
  )
