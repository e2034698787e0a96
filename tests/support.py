"""A small schema with every kind of feature, and random ragged batches."""

import functools

import hypothesis
import jax
import numpy as np

from histjax import schema as schema_lib
from histjax.models import ranker
from histjax.nn import encoder, interaction
from histjax.scoring import inputs
from histjax.types import Candidates, History, RankingBatch

SCHEMA = schema_lib.Schema(
  user='user',
  time='time',
  context=(
    schema_lib.Categorical('user', 50),
    schema_lib.Dense('age'),
  ),
  item=(
    schema_lib.Categorical('item', 40),
    schema_lib.Categorical('tag_0', 7, table='tag'),
    schema_lib.Categorical('tag_1', 7, table='tag'),
    schema_lib.Dense('duration'),
  ),
  action=(schema_lib.Categorical('rating', 5),),
  tasks=(schema_lib.Task('click'), schema_lib.Task('like')),
)


def config(**fields) -> ranker.RankerConfig:
  """A small ranker; `encoder__window=3` sets `encoder.window`."""
  encoder_fields = {'num_layers': 2, 'width': 16, 'num_heads': 2}
  for name in list(fields):
    if name.startswith('encoder__'):
      encoder_fields[name.removeprefix('encoder__')] = fields.pop(name)
  fields.setdefault('schema', SCHEMA)
  fields.setdefault('embedding_dim', 8)
  fields.setdefault(
    'interaction',
    interaction.InteractionConfig(cross_rank=8, mlp_widths=(16, 8)),
  )
  return ranker.RankerConfig(
    encoder=encoder.EncoderConfig(**encoder_fields), **fields
  )


def features(rng: np.random.Generator, spec, shape) -> dict:
  """Random values of the features of `spec`."""
  return {
    f.name: rng.integers(0, f.size, shape, dtype=np.int32)
    if isinstance(f, schema_lib.Categorical)
    else rng.normal(size=shape).astype(np.float32)
    for f in spec
  }


def batch(
  rng: np.random.Generator,
  num_rows: int = 3,
  num_events: int = 9,
  num_candidates: int = 5,
  *,
  schema: schema_lib.Schema = SCHEMA,
  shared_visible: bool = False,
) -> RankingBatch:
  """Random rows, some with an empty history, padded with random junk."""
  length = rng.integers(0, num_events + 1, num_rows, dtype=np.int32)
  length[rng.integers(num_rows)] = 0
  length[rng.integers(num_rows)] = num_events
  shape = (num_rows, num_candidates)
  visible = np.broadcast_to(length[:, None], shape).astype(np.int32)
  if not shared_visible:
    visible = rng.integers(0, length[:, None] + 1, shape, dtype=np.int32)
  mask = rng.random(shape) < 0.8
  mask[:, 0] = True
  return RankingBatch(
    context=features(rng, schema.context, (num_rows,)),
    history=History(
      features(rng, schema.history_features, (num_rows, num_events)), length
    ),
    candidates=Candidates(
      features(rng, schema.item_features, shape), visible, mask
    ),
    labels={
      t.name: rng.integers(0, 2, shape).astype(np.float32) for t in schema.tasks
    },
    group=rng.integers(0, 50, num_rows, dtype=np.int32),
  )


def check_batch(batch: RankingBatch, schema: schema_lib.Schema) -> None:
  """Checks that a model can train on the rows."""
  checked = inputs.check_batch(schema, batch)
  for task in schema.tasks:
    labels = batch.labels[task.name]
    assert labels.shape == batch.candidates.shape
    assert np.isin(labels[checked.candidates.mask], (0, 1)).all()


def check_rows_are_zero_at_padding(batch: RankingBatch) -> None:
  """Checks that what stands for nothing is 0."""
  shown = batch.candidates.mask
  events = next(iter(batch.history.features.values()))
  real = np.arange(events.shape[1]) < batch.history.length[:, None]
  for values in (*batch.candidates.features.values(), *batch.labels.values()):
    assert not values[~shown].any()
  assert not batch.candidates.visible[~shown].any()
  for values in batch.history.features.values():
    assert not values[~real].any()


@functools.cache
def _shapes(config):
  """Of the variables; compiling `init` would take longer than most tests."""
  example = batch(
    np.random.default_rng(0), schema=config.schema, shared_visible=True
  )
  model = ranker.Ranker(config)
  return jax.eval_shape(model.init, jax.random.key(0), example)


def init(config, seed: int = 0):
  """A ranker and its variables; none is zero, so that none hides a mistake."""
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    name = path[-1].key
    x = rng.normal(size=shape.shape).astype(shape.dtype)
    if name == 'kernel':  # Keeps activations of order 1.
      return x / np.sqrt(shape.shape[0], dtype=np.float32)
    return 0.1 * x + np.float32(name == 'scale')

  variables = jax.tree_util.tree_map_with_path(draw, _shapes(config))
  return ranker.Ranker(config), variables


def examples(number: int) -> hypothesis.settings:
  """As many random examples, and in `make test-all` as many times more."""
  return hypothesis.settings(
    max_examples=number * hypothesis.settings().max_examples // 15
  )


def norm(tree) -> float:
  """Of all the numbers of a tree; in NumPy, which compiles nothing."""
  squares = [np.square(x, dtype=float).sum() for x in jax.tree.leaves(tree)]
  return float(np.sqrt(sum(squares)))
