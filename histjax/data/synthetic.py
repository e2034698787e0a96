"""A log with planted preferences, whose best possible AUC is known.

Each item has a category and a quality, each user a segment and, for every
category, a liking that starts at zero and drifts with what happens to the
user. When item i of category k is shown to user u in request r,

  click ~ Bernoulli(sigmoid(bias + segment_u + quality_i + strength liking_uk))
  like | click ~ Bernoulli(sigmoid(like_bias + strength liking_uk / 2))

and after the request

  liking_uk <- decay liking_uk + sum of the signs of the shown items of k

where the sign is -1 without a click, 1 with one and 2 with a like. Everything
but the items' qualities and the segments' biases, which training sees often,
follows from the user's history: the probabilities above are those of the
best predictor (Bayes), and its AUC is the best to be had.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from histjax import config as dicts
from histjax import metrics
from histjax.data.events import EventLog
from histjax.data.rows import Rows
from histjax.data.splits import FractionSplit
from histjax.schema import Categorical, Schema, Task

SPLIT = FractionSplit(train=0.8, validation=0.1)
TASKS = ('click', 'like')
NUM_SEGMENTS = 4


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
  """The size of the log and what is planted in it.

  Attributes:
    seed: of everything drawn.
    num_users: users.
    requests_per_user: requests, one after the other.
    candidates_per_request: items shown at once.
    num_items: items.
    num_categories: categories.
    quality_scale: standard deviation of the items' qualities, in logits.
    segment_scale: standard deviation of the users' segments, in logits.
    strength: logits per unit of liking.
    decay: of liking, a request; in [0, 1).
    bias: logit of a click on an average item without history.
    like_bias: logit of a like, given the click.
  """

  seed: int = 0
  num_users: int = 8000
  requests_per_user: int = 20
  candidates_per_request: int = 4
  num_items: int = 200
  num_categories: int = 6
  quality_scale: float = 0.5
  segment_scale: float = 0.3
  strength: float = 0.4
  decay: float = 0.85
  bias: float = -0.2
  like_bias: float = -0.5

  def __post_init__(self):
    dicts.normalize(self)
    for field in (
      'num_users',
      'requests_per_user',
      'candidates_per_request',
      'num_items',
      'num_categories',
    ):
      if getattr(self, field) < 1:
        raise ValueError(
          f'synthetic: {field}={getattr(self, field)} must be >= 1'
        )
    for field in ('seed', 'quality_scale', 'segment_scale'):
      if not 0 <= getattr(self, field) < math.inf:
        raise ValueError(
          f'synthetic: {field}={getattr(self, field)} must be >= 0 and finite'
        )
    for field in ('strength', 'bias', 'like_bias'):
      if not math.isfinite(getattr(self, field)):
        raise ValueError(
          f'synthetic: {field}={getattr(self, field)} must be finite'
        )
    if not 0 <= self.decay < 1:
      raise ValueError(f'synthetic: decay={self.decay} must be in [0, 1)')


def schema(config: SyntheticConfig) -> Schema:
  """The schema of the log that `generate` makes."""
  return Schema(
    user='user',
    time='time',
    request='request',
    context=(Categorical('segment', NUM_SEGMENTS),),
    item=(
      Categorical('item', config.num_items),
      Categorical('category', config.num_categories),
    ),
    action=(Categorical('click', 2), Categorical('like', 2)),
    tasks=tuple(Task(name) for name in TASKS),
  )


def generate(config: SyntheticConfig) -> EventLog:
  """Draws the log, the same one for the same config everywhere.

  Returns:
    The log; `extra['bayes_click']` and `extra['bayes_like']` are each event's
    probabilities given the user's history.
  """
  columns = draw(config)
  extra = [f'bayes_{task}' for task in TASKS]
  return EventLog.from_columns(columns, schema(config), extra=extra)


def draw(config: SyntheticConfig) -> dict[str, np.ndarray]:
  """The columns of `generate`, `[n]` each, in the order of time."""
  rng = np.random.default_rng(config.seed)
  users, shown = config.num_users, config.candidates_per_request
  shape = (config.requests_per_user, users, shown)
  category = rng.permutation(config.num_items) % config.num_categories
  quality = config.quality_scale * rng.normal(size=config.num_items)
  bias = config.segment_scale * rng.normal(size=NUM_SEGMENTS)
  segment = rng.integers(NUM_SEGMENTS, size=users)
  item = rng.integers(config.num_items, size=shape)
  time = np.cumsum(rng.integers(60, 86_400, size=shape[:2]), axis=0)
  chance = rng.random((len(TASKS), *shape))
  events = {name: np.zeros(shape) for name in ('bayes_click', 'bayes_like')}
  signs = np.zeros(shape, np.int64)
  liking = np.zeros((users, config.num_categories))
  user = np.broadcast_to(np.arange(users)[:, None], shape[1:])
  for r in range(config.requests_per_user):
    kind = category[item[r]]
    drive = config.strength * np.take_along_axis(liking, kind, axis=1)
    click = _sigmoid(
      config.bias + bias[segment][:, None] + quality[item[r]] + drive
    )
    like = _sigmoid(config.like_bias + drive / 2)
    events['bayes_click'][r] = click
    events['bayes_like'][r] = click * like
    clicked = chance[0, r] < click
    liked = clicked & (chance[1, r] < like)
    signs[r] = np.where(clicked, 1, -1) + liked
    liking *= config.decay
    np.add.at(liking, (user, kind), signs[r])
  request = np.arange(shape[0] * users).reshape(shape[:2])
  wide = {
    'user': user,
    'time': time[..., None],
    'request': request[..., None],
    'segment': segment[:, None],
    'item': item,
    'category': category[item],
    'click': (signs > 0).astype(np.int64),
    'like': (signs == 2).astype(np.int64),
    **events,
  }
  return {k: np.broadcast_to(v, shape).reshape(-1) for k, v in wide.items()}


def bayes_auc(rows: Rows) -> dict[str, float]:
  """The best AUC that a model can have: that of the planted probabilities.

  Args:
    rows: of a synthetic log.

  Returns:
    `{task: AUC}`.
  """
  return {
    task: metrics.auc(
      rows.log.extra[f'bayes_{task}'][rows.events],
      rows.log.labels[task][rows.events],
    )
    for task in rows.log.labels
  }


def no_history_auc(splits: Mapping[str, Rows]) -> dict[str, float]:
  """The AUC on 'test' of the best model that does not read histories.

  It predicts the mean probability of the item (in the segment, if training
  shows the two together) over the training events.

  Args:
    splits: rows of a synthetic log's 'train' and 'test'.

  Returns:
    `{task: AUC}`.
  """
  train, test = splits['train'], splits['test']
  scores = {}
  log = test.log
  size = int(log.features['item'].max()) + 1
  for task in log.labels:
    truth = log.extra[f'bayes_{task}']
    pair = log.features['segment'].astype(np.int64) * size
    pair += log.features['item']
    cells = NUM_SEGMENTS * size
    count = np.bincount(pair[train.events], minlength=cells)
    total = np.bincount(
      pair[train.events], weights=truth[train.events], minlength=cells
    )
    mean = np.where(
      count > 0, total / np.maximum(count, 1), truth[train.events].mean()
    )
    scores[task] = metrics.auc(
      mean[pair[test.events]], log.labels[task][test.events]
    )
  return scores


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))
