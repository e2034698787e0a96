"""KuaiRand-Pure, snapshot rows; protocol `kuairand` (README, Data)."""

from configs import kuairand


def get_config():
  config = kuairand.get_config()
  config.data.update(
    {
      'rates': ('video_id', 'author_id', 'tab', 'tag_0', 'video_id*tab'),
      'without': ('user_id',),
      'eval_rows': {
        **config.data.rows.to_dict(),
        'kind': 'snapshot',
        'max_candidates': 32,
      },
    }
  )
  config.data.rows.update(
    {'kind': 'snapshot', 'max_candidates': 32, 'snapshot_every': 86_400.0}
  )
  config.pipeline.update(
    {
      'batch_events': 16_384,
      'history_buckets': (8, 24, 56),
      'candidate_buckets': (8, 32),
    }
  )
  config.optimizer.table_learning_rate = 0.005
  config.select = {'auc': 1.0, 'gauc': 1.0}
  config.update({'eval_every': 25, 'num_epochs': 3, 'patience': 6})
  return config
