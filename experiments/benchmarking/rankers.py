"""The models and requests of the suites `request` and `train_step`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarking.workloads import Request
from histjax import schema as schema_lib
from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn.encoder import EncoderConfig
from histjax.testing import random_batch
from histjax.types import Candidates, History, RankingBatch

SCHEMA = schema_lib.Schema(
  user='user',
  time='time',
  context=(
    schema_lib.Categorical('user', 100_000),
    schema_lib.Dense('age'),
  ),
  item=(
    schema_lib.Categorical('item', 1_000_000),
    schema_lib.Categorical('category', 1000),
    schema_lib.Dense('duration'),
  ),
  action=(schema_lib.Categorical('rating', 5),),
  tasks=(schema_lib.Task('click'), schema_lib.Task('like')),
)
"""Of the models timed: as many features and tables as a small real ranker."""
NEW_EVENTS = 10
"""Of a returning user, in 'extend and score'."""
CALLS = ('score', 'new user', 'extend and score')
"""Of the suite `request`, all from ids to logits in host memory.

'score': the first request's history is cached. 'new user': the history comes
with the request. 'extend and score': all but the last `NEW_EVENTS` events of
the first request's history are cached, and new ones come in their place.
"""

Logits = Mapping[str, np.ndarray]
"""`{task: [B, C]}`, float32."""


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What comes with one request, NumPy arrays all of it."""

  context: dict[str, np.ndarray]
  candidates: Candidates
  history: History
  new_events: History


def config(workload: Request, **implementations: Any) -> RankerConfig:
  """Of a workload's model, implementations as in `EncoderConfig`."""
  return RankerConfig(
    schema=SCHEMA,
    encoder=EncoderConfig(
      num_layers=workload.num_layers,
      width=workload.width,
      num_heads=workload.num_heads,
      **implementations,
    ),
    dtype=workload.dtype,
  )


def batch(workload: Request, seed: int) -> RankingBatch:
  """Full rows of random features."""
  return random_batch(
    SCHEMA,
    workload.num_rows,
    workload.num_events,
    workload.num_candidates,
    seed,
  )


def inputs(workload: Request, seed: int) -> Inputs:
  """The request of a seed."""
  made = batch(workload, seed)
  return Inputs(
    dict(made.context),
    made.candidates,
    made.history,
    _events(made.history, slice(0, NEW_EVENTS)),
  )


def old_events(history: History) -> History:
  """All but the last `NEW_EVENTS`."""
  return _events(history, slice(0, -NEW_EVENTS))


def variables(workload: Request) -> dict[str, Any]:
  """float32 NumPy arrays, drawn as wide as those of trained models.

  As initialized tables are small and biases zero: candidates would differ
  little, and who forgot a bias would be right.
  """
  model = Ranker(config(workload))
  shapes: Any = jax.eval_shape(
    model.init, jax.random.key(0), batch(workload, 0)
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    kind = 'table' if path[0].key == 'tables' else path[-1].key
    scale = {'table': 0.5, 'kernel': leaf.shape[0] ** -0.5}.get(kind, 0.1)
    found = rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)
    return found + np.float32(kind == 'scale')

  return jax.tree_util.tree_map_with_path(draw, shapes)


def expected(
  workload: Request,
  parameters: Mapping[str, Any],
  requests: Sequence[Inputs],
  indices: Sequence[int],
) -> dict[str, list[Logits]]:
  """What calls must give: the joint pass in float32, layer by layer.

  Args:
    workload: of the model.
    parameters: of `variables`.
    requests: all of them.
    indices: which ones of them to score.

  Returns:
    By call, the logits of each index.
  """
  plain = dataclasses.replace(
    config(workload, attention='xla'), dtype='float32'
  )
  joint = jax.jit(Ranker(plain).apply)
  variables = jax.device_put(dict(parameters))
  first = requests[0].history
  found: dict[str, list[Logits]] = {}
  for call in CALLS:
    found[call] = []
    for request in (requests[i] for i in indices):
      history = {
        'score': first,
        'new user': request.history,
        'extend and score': _extended(first, request.new_events),
      }[call]
      rows = RankingBatch(
        request.context,
        history,
        request.candidates,
        {},
        np.zeros(workload.num_rows, np.int32),
      )
      with jax.default_matmul_precision('highest'):
        found[call].append(jax.device_get(joint(variables, rows)))
  return found


def difference(found: Logits, wanted: Logits) -> float:
  """The largest relative error over tasks, of what sets candidates apart.

  That is `|x - y| / |y - mean(y)|`, or of a single one `|x - y| / |y|`; NaN if
  a logit is.
  """
  if found.keys() != wanted.keys():
    return float('inf')
  errors = []
  for task, y in wanted.items():
    scale = np.linalg.norm(y - y.mean()) if y.size > 1 else np.linalg.norm(y)
    error = np.linalg.norm(np.asarray(found[task], np.float64) - y)
    errors.append(float(error / scale))
  return float(np.max(errors))  # Not `max`, which passes over NaN.


def check(what: str, found: Logits, wanted: Logits, dtype: str) -> float:
  """The `difference` of what must be equal but for rounding.

  Args:
    what: is compared with what, for the error.
    found: logits.
    wanted: logits.
    dtype: of the model.

  Raises:
    ValueError: it is beyond `bound`.
  """
  error = difference(found, wanted)
  if not error <= bound(dtype):
    raise ValueError(
      f'{what}: relative error {error:.1e} of the logits, more than '
      f'{bound(dtype):.0e}; wrong results are not timed'
    )
  return error


def bound(dtype: str) -> float:
  """Of `difference`, by a model's type."""
  # Accelerators, by default, multiply float32 with as few bits as bfloat16.
  if dtype == 'float32' and jax.default_backend() == 'cpu':
    return 1e-4
  return 5e-2  # Of 4 layers and the head, 8-bit mantissas between products.


def _events(history: History, part: slice) -> History:
  features = {k: np.array(v[:, part]) for k, v in history.features.items()}
  shape = next(iter(features.values())).shape
  return History(features, np.full(shape[0], shape[1], np.int32))


def _extended(history: History, new: History) -> History:
  """`old_events` of a history and new ones."""
  features = {
    k: np.concatenate([v[:, :-NEW_EVENTS], new.features[k]], axis=1)
    for k, v in history.features.items()
  }
  return History(features, history.length)
