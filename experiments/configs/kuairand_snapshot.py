"""KuaiRand-Pure, snapshot rows; protocol `kuairand` (docs/logs.md).

  python experiments/train.py \
    --config=experiments/configs/kuairand_snapshot.py --workdir=/tmp/snapshot

One CPU core: 5 minutes. Expect a test AUC of 0.737 to 0.738, GAUC 0.641 to
0.643. All of a user's candidates of a split have the history as it was when the
split began, up to six days before: less than the protocol allows, and what a
server that reads histories once has. No candidate's score knows the outcome of
another one, so the user's mood, which raises AUC, cannot mislead within the
user (GAUC). What was shown lately, but not what came of it, is in `activity`,
`recent_rates` and `recent_shares`.
"""

from configs import kuairand

# Ids, and anonymous features of so many values that they single users out:
# the model remembers what it saw of them, and its test AUC falls while its
# GAUC still grows.
_WITHOUT = (
  *('user_id', 'video_id', 'author_id'),
  *(f'onehot_feat{i}' for i in (2, 3, 4, 5, 7, 8)),
)
_RATES = (
  *('video_id', 'author_id', 'tab', 'tag_0', 'tag_1', 'hour'),
  *('duration_bucket', 'video_id*tab', 'author_id*tab', 'tab*hour'),
  'tab*duration_bucket',
)
_HISTORY_RATES = (
  *('*', 'tab', 'tag_0', 'author_id', 'duration_bucket', 'hour'),
  *('*@3', '*@10', '*@25', 'tab@5'),
)


def get_config():
  config = kuairand.get_config()
  rows = config.data.rows.copy_and_resolve_references()
  rows.update({'kind': 'snapshot', 'max_candidates': 32})
  config.data.update(
    {
      'tasks': ('click', 'long_view'),
      'without': _WITHOUT,
      'features': (
        *config.data.features,
        {'type': 'rates', 'by': _RATES},
        {'type': 'recent_rates', 'last': 10},
        {'type': 'history_rates', 'by': _HISTORY_RATES},
        {'type': 'activity', 'spans': (600, 3600, 86_400)},
        {'type': 'recent_shares', 'of': ('tab@10', 'tab@3')},
      ),
      'rows': {**rows, 'snapshot_every': 43_200.0},
      'eval_rows': rows,
    }
  )
  config.task_weights = {'click': 1.0, 'long_view': 0.5}
  config.model.update({'embedding_dim': 16, 'embedding_dropout': 0.2})
  config.model.encoder.update({'width': 16, 'window': None, 'dropout': 0.2})
  config.pipeline.update(
    {
      # About 850 candidates: larger batches make too few steps.
      'batch_events': 4096,
      'history_buckets': (8, 24, 56),
      'candidate_buckets': (8, 32),
    }
  )
  config.optimizer.update({'weight_decay': 0.3, 'table_learning_rate': 0.005})
  config.average = 0.998
  config.select = {'auc': 1.0, 'gauc': 1.0}
  config.update({'eval_every': 124, 'num_epochs': 3, 'patience': 6})
  return config
