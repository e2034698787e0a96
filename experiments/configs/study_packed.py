"""Packed streaming rows against pointwise rows: the same model and data.

  python experiments/study.py --config=experiments/configs/study_packed.py \
    --workdir=/tmp/study_packed

Synthetic data, three seeds, about 512 candidates a batch in both; of one layer,
so that an event of a streaming row sees the same past as a pointwise row has.
Two CPU cores: eight minutes.
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    {
      'datasets': {
        'synthetic': {
          'run': {
            'data': {
              'tasks': ('click',),
              'source': {
                'type': 'synthetic',
                'num_users': 2000,
                'requests_per_user': 30,
                'candidates_per_request': 4,
                'num_items': 300,
              },
              'rows': {'kind': 'pointwise', 'ties': 'strict'},
            },
            'model': {
              'encoder': {'num_layers': 1, 'width': 32, 'num_heads': 2},
              'embedding_dim': 16,
            },
            'pipeline': {'batch_events': 512 * 18, 'auto_buckets': 1},
            # A batch of packed rows has the candidates of few users: what that
            # makes of a step does not average out at a constant rate.
            'optimizer': {
              'learning_rate': 3e-3,
              'table_learning_rate': 0.05,
              'schedule': 'linear',
            },
            'num_epochs': 6,
            'eval_every': 376,
            'tensorboard': False,
          },
          'windows': (16,),
        }
      },
      'fusions': {'append_cross': {}},
      'trials': {'only': {}},
      'seeds': (0, 1, 2),
      'ablations': {
        'packed': {
          'fusion': 'append_cross',
          'changes': {
            'data': {'rows': {'kind': 'streaming', 'max_candidates': 64}},
            'pipeline': {'batch_events': 1152, 'pack': True},
          },
        }
      },
      'ablation_seeds': (0, 1, 2),
      'baseline': 'append_cross',
    }
  )
