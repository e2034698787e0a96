"""A run to load a server with: random users, parameters of a single step.

What a score costs does not depend on what the parameters are.
"""

from __future__ import annotations

import dataclasses
import os

from histjax import EncoderConfig, InteractionConfig, RankerConfig
from histjax.data import datasets, pipeline, synthetic
from histjax.training import config as config_lib
from histjax.training import loop


@dataclasses.dataclass(frozen=True)
class Size:
  """Of a model, and how many items it ranks.

  Attributes:
    width: D.
    layers: of the encoder.
    heads: likewise.
    items: of the catalogue.
  """

  width: int = 64
  layers: int = 4
  heads: int = 4
  items: int = 2000


def make(workdir: str | os.PathLike[str], size: Size, seed: int = 0) -> None:
  """Writes a workdir.

  Args:
    workdir: that does not exist.
    size: of the model.
    seed: of the parameters; runs of several seeds have one schema.
  """
  source = datasets.Synthetic(
    num_users=16, requests_per_user=4, num_items=size.items
  )
  data = datasets.DataConfig(source)
  config = config_lib.TrainConfig(
    model=RankerConfig(
      schema=synthetic.schema(source),
      encoder=EncoderConfig(
        num_layers=size.layers, width=size.width, num_heads=size.heads
      ),
      interaction=InteractionConfig(kind='mlp', mlp_widths=(size.width,)),
      embedding_dim=size.width // 2,
    ),
    data=data,
    pipeline=pipeline.PipelineConfig(
      batch_events=64, history_buckets=(16,), candidate_buckets=(16,)
    ),
    num_steps=1,
    eval_every=1,
    checkpoint_every=1,
    seed=seed,
    tensorboard=False,
  )
  loop.train_and_evaluate(config, workdir, dataset=datasets.load(data))
