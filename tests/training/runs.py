"""A small run on the synthetic data, shared by the tests of whole runs."""

import dataclasses
import functools

import chex
import jax
import numpy as np

from histjax.data import datasets, pipeline, synthetic
from histjax.models import ranker
from histjax.nn import encoder, interaction
from histjax.training import checkpoints, loop, sharding
from histjax.training import config as config_lib
from histjax.training import optimizer as optimizer_lib
from histjax.training import state as state_lib

DATA = datasets.DataConfig(
  datasets.Synthetic(
    num_users=40, requests_per_user=10, candidates_per_request=2, num_items=20
  )
)
MODEL = ranker.RankerConfig(
  schema=synthetic.schema(DATA.source),
  encoder=encoder.EncoderConfig(
    num_layers=1, width=8, num_heads=2, dropout=0.1
  ),
  interaction=interaction.InteractionConfig(kind='mlp', mlp_widths=(8,)),
  embedding_dim=4,
)
CONFIG = config_lib.TrainConfig(
  model=MODEL,
  data=DATA,
  pipeline=pipeline.PipelineConfig(
    batch_events=256, history_buckets=(20,), candidate_buckets=(16,)
  ),
  num_steps=12,
  eval_every=5,
  checkpoint_every=4,
  log_every=3,
  tensorboard=False,
)


@functools.cache
def dataset():
  return datasets.load(DATA)


def mesh(num_devices=1):
  """One device by default: a program for eight takes longer to compile."""
  return sharding.data_mesh(jax.devices()[:num_devices])


def run(workdir, *, num_devices=1, config=CONFIG, data_of=None, **changes):
  return loop.train_and_evaluate(
    dataclasses.replace(config, **changes),
    workdir,
    dataset=data_of or dataset(),
    mesh=mesh(num_devices),
  )


def saved(workdir, *, average=None):
  """Everything in the latest checkpoint."""
  tx = optimizer_lib.make_optimizer(CONFIG.optimizer, CONFIG.num_steps)
  template = state_lib.create_state(
    ranker.Ranker(CONFIG.model), tx, CONFIG.model.schema, 0, average=average
  )
  with checkpoints.Checkpoints(workdir) as manager:
    state, meta = manager.restore(template)
  return jax.device_get(
    dataclasses.replace(state, rng=jax.random.key_data(state.rng))
  ), meta


def assert_same_run(workdir, other, *, average=None):
  """Parameters, optimizer, position, history and metrics, to the bit."""
  state, meta = saved(workdir, average=average)
  other_state, other_meta = saved(other, average=average)
  chex.assert_trees_all_equal(state, other_state)
  np.testing.assert_equal(meta, other_meta)
  assert (workdir / 'metrics.json').read_text() == (
    other / 'metrics.json'
  ).read_text()
