"""KuaiRand-Pure, snapshot rows; protocol `kuairand` (README, Data).

  python experiments/train.py \
    --config=experiments/configs/kuairand_snapshot.py --workdir=/tmp/snapshot

One CPU core: 7 minutes. Expect a test AUC near 0.728, GAUC 0.638. All of
a user's candidates of a split have the history as it was when the split began,
up to six days before: less than the protocol allows, and what a server that
reads histories once has. Training sees snapshots of each day. No candidate's
score knows the outcome of another one, so the user's mood, which raises AUC,
cannot mislead within the user (GAUC).
"""

from configs import kuairand


def get_config():
  config = kuairand.get_config()
  rows = config.data.rows.copy_and_resolve_references()
  rows.update({'kind': 'snapshot', 'max_candidates': 32})
  config.data.update(
    {
      'rates': ('video_id', 'author_id', 'tab', 'tag_0', 'video_id*tab'),
      'without': ('user_id',),
      'rows': {**rows, 'snapshot_every': 86_400.0},
      'eval_rows': rows,
    }
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
