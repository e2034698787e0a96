"""Eight fusions on MovieLens 1M and KuaiRand-Pure, tuned alike; ablations.

  python experiments/study.py --config=experiments/configs/study.py \
    --workdir=/tmp/study

196 cells, meant for a GPU; processes can share them, with `--only`. On two CPU
cores one run of kuairand/none takes a minute, one of ml1m/concat hours. Expect
every fusion above the floors of user and item in AUC (ml1m 0.787; kuairand
0.716); the user's running rate alone has 0.734 on kuairand, which only
target_attention reaches (docs/results/fusions.md).

All fusions train on the same pointwise rows, in the same order: the last 50
events, one candidate. Only the fusion differs. Rows of other kinds (streaming)
are an ablation.
"""

import ml_collections

from configs import kuairand, movielens

_POINTWISE = {'kind': 'pointwise', 'max_candidates': None}


def streaming(window, fusion='append_cross'):
  """A fusion on ml1m with streaming rows, 36 of them a batch."""
  return {
    'fusion': fusion,
    'changes': {
      'data': {'rows': {'kind': 'streaming', 'max_candidates': 200}},
      # A row's history: the window, and its own 200 candidates.
      'pipeline': {'batch_events': 36 * (window + 400)},
    },
    'window': window,
    'datasets': ('ml1m',),
  }


def streaming_kuairand(fusion='append_cross', window=50):
  """A fusion on kuairand with streaming rows."""
  return {
    'fusion': fusion,
    'changes': {
      'data': {'rows': {'kind': 'streaming', 'max_candidates': 200}},
      'pipeline': {'batch_events': 4096, 'auto_buckets': 4},
      'eval_every': 73,
    },
    'window': window,
    'datasets': ('kuairand',),
  }


def get_config():
  ml1m = movielens.get_config()
  ml1m.data.rows.update(_POINTWISE)
  del ml1m.data.tasks
  ml1m.task_weights = {'like': 1.0}
  # 57 a row, with padding: 4096 candidates a batch, 195 batches an epoch.
  ml1m.pipeline.update({'batch_events': 57 * 4096, 'auto_buckets': 1})
  ml1m.optimizer.update({'learning_rate': 1e-3, 'table_learning_rate': 0.05})
  ml1m.update({'eval_every': 195, 'num_epochs': 10, 'tensorboard': False})
  ml1m.average = None
  ml1m.rank_loss.weight = 0.0  # One candidate a row has no pairs.
  del ml1m.select.gauc
  kuai = kuairand.get_config()
  kuai.data.rows.update(_POINTWISE)
  kuai.pipeline.update({'batch_events': 57 * 1024, 'auto_buckets': 1})
  kuai.update({'eval_every': 31, 'average': None, 'tensorboard': False})
  append = 'append_cross'
  return ml_collections.ConfigDict(
    {
      'datasets': {
        'ml1m': {
          'run': ml1m,
          'windows': (50,),
          'floors': {'user_item': ('user', 'movie_id')},
        },
        'kuairand': {
          'run': kuai,
          'windows': (50,),
          'floors': {
            'user_item': ('user', 'video_id'),
            'user_item_tab': ('user', 'video_id', 'tab'),
            'running_item_tab': ('history', 'video_id', 'tab'),
          },
        },
      },
      'fusions': {
        'append_cross': {},
        'append_isolated': {},
        'cross_only': {},
        'append_self': {},
        'concat': {},
        'target_attention': {},
        'mean_pool': {},
        'none': {},
      },
      'trials': {
        'base': {},
        'fast': {'optimizer': {'learning_rate': 3e-3}},
        'dropout': {
          'model': {'encoder': {'dropout': 0.5}, 'embedding_dropout': 0.5}
        },
        'tables': {'optimizer': {'table_learning_rate': 0.1}},
      },
      'tuning_seed': 100,
      'criterion': {'auc': 1.0, 'gauc': 1.0},
      'seeds': (0, 1, 2, 3, 4),
      'ablations': {
        'bidirectional': {
          'fusion': append,
          'changes': {'model': {'encoder': {'causal': False}}},
        },
        'recency': {
          'fusion': append,
          'changes': {'model': {'encoder': {'positions': 'recency'}}},
        },
        'layers_1': {
          'fusion': append,
          'changes': {'model': {'encoder': {'num_layers': 1}}},
        },
        'layers_4': {
          'fusion': append,
          'changes': {'model': {'encoder': {'num_layers': 4}}},
        },
        'no_time_gaps': {
          'fusion': append,
          'changes': {'data': {'features': ()}},
          'datasets': ('kuairand',),
        },
        # About as many candidates a batch as the pointwise rows have. Histories
        # beyond 50 are compared in streaming rows, where they are cheap.
        'streaming_ml1m': streaming(50),
        'streaming_200': streaming(200),
        'streaming_500': streaming(500),
        'cross_streaming_ml1m': streaming(50, 'cross_only'),
        'cross_streaming_500': streaming(500, 'cross_only'),
        'streaming_kuairand': streaming_kuairand(),
        'cross_streaming_kuairand': streaming_kuairand('cross_only'),
      },
      'ablation_seeds': (0, 1, 2),
      'baseline': 'concat',
      'margin': 0.002,
      'resamples': 2000,
      'keep_runs': False,
    }
  )
