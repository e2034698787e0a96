"""AUC, GAUC, logloss and normalised entropy: exact, and mergeable.

Nothing is binned or sampled: the accumulator keeps every score, so results do
not depend on how the data was split into batches, devices or hosts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int, Shaped

from histjax.types import Array

METRICS = ('auc', 'gauc', 'logloss', 'ne')
"""What `RankingMetrics.result` computes for each task."""


def higher_is_better(metric: str) -> bool:
  """Whether a larger value of `metric` ('auc' or 'task/auc') is better."""
  return metric.rsplit('/', 1)[-1] in ('auc', 'gauc')


def criterion(
  values: Mapping[str, float], weights: Mapping[str, float]
) -> float:
  """One number to choose by; the larger, the better.

      sum_m w_m s_m value_m,   s_m = 1, or -1 where less is better

  Args:
    values: `{'task/metric': value}`.
    weights: `{'task/metric': w}`; metrics of weight 0 are not read.
  """
  return math.fsum(
    (1 if higher_is_better(name) else -1) * weight * values[name]
    for name, weight in weights.items()
    if weight
  )


def auc(scores: Shaped[Array, 'K'], labels: Shaped[Array, 'K']) -> float:
  """The area under the ROC curve.

      AUC = P(s+ > s-) + P(s+ = s-) / 2
          = (sum of midranks of positives - P (P + 1) / 2) / (P N)

  over P positives and N negatives (Hanley and McNeil 1982,
  doi:10.1148/radiology.143.1.7063747).

  Args:
    scores: finite; any monotone function of the probability.
    labels: 0 or 1.

  Returns:
    In [0, 1]; NaN if the labels have one class only, where no pair exists.

  Raises:
    ValueError: scores that are not finite, or labels other than 0 and 1.
  """
  scores, labels = _check(scores, labels)
  area, _ = auc_by_group(scores, labels, np.zeros(len(scores), np.int64))
  return float(area[0]) if len(area) else math.nan


def gauc(
  scores: Shaped[Array, 'K'],
  labels: Shaped[Array, 'K'],
  group: Int[Array, 'K'],
) -> float:
  """The mean of the users' AUCs, weighted by their impressions.

      GAUC = sum_u n_u AUC_u / sum_u n_u

  over users with both classes (Zhou et al., Deep Interest Network, KDD 2018,
  arXiv 1706.06978); the others have no AUC and are left out.

  Args:
    scores: finite; comparable within a user.
    labels: 0 or 1.
    group: the user of each.

  Returns:
    In [0, 1]; NaN if no user has both classes.

  Raises:
    ValueError: scores that are not finite, or labels other than 0 and 1.
  """
  scores, labels = _check(scores, labels)
  _check_masks('group', group)
  group = np.asarray(group)
  if group.shape != scores.shape or group.dtype.kind not in 'iuUS':
    raise ValueError(
      f'group is {group.dtype} {group.shape}; it must be of integers or texts, '
      f'one for each of the scores, {scores.shape}'
    )
  area, count = auc_by_group(scores, labels, group)
  defined = ~np.isnan(area)
  weight = math.fsum(count[defined])
  if not weight:
    return math.nan
  return math.fsum(area[defined] * count[defined]) / weight


def logloss(logits: Shaped[Array, 'K'], labels: Shaped[Array, 'K']) -> float:
  """The mean of `softplus(logit) - label * logit`, in nats.

  Args:
    logits: finite, `log(p / (1 - p))`.
    labels: 0 or 1.

  Returns:
    At least 0; NaN if there are no labels.

  Raises:
    ValueError: logits that are not finite, or labels other than 0 and 1.
  """
  logits, labels = _check(logits, labels)
  if not len(logits):
    return math.nan
  losses = np.logaddexp(0.0, logits) - labels * logits
  # Exactly rounded, so that the order of the data cannot show.
  return math.fsum(losses) / len(losses)


def normalized_entropy(
  logits: Shaped[Array, 'K'], labels: Shaped[Array, 'K']
) -> float:
  """The logloss over that of always predicting the base rate.

      NE = logloss / -(q log q + (1 - q) log (1 - q)),   q = mean(label)

  (He et al., Practical Lessons from Predicting Clicks on Ads at Facebook,
  ADKDD 2014). Below 1 is better than knowing the base rate alone.

  Args:
    logits: finite, `log(p / (1 - p))`.
    labels: 0 or 1.

  Returns:
    At least 0; NaN if the labels have one class only: the entropy is 0.

  Raises:
    ValueError: logits that are not finite, or labels other than 0 and 1.
  """
  loss = logloss(logits, labels)
  positives = int(np.sum(np.asarray(labels) == 1))
  q = positives / len(labels) if len(labels) else 0.0
  if q in (0.0, 1.0):
    return math.nan
  return loss / -(q * math.log(q) + (1 - q) * math.log1p(-q))


@dataclasses.dataclass
class Predictions:
  """Scored candidates, flat: entry k of each array is one of them.

  Attributes:
    logits: `{task: float32 [K]}`.
    labels: `{task: float32 [K]}`, 0 or 1.
    group: int32 `[K]`, the user.
  """

  logits: dict[str, Float[np.ndarray, 'K']]
  labels: dict[str, Float[np.ndarray, 'K']]
  group: Int[np.ndarray, 'K']


class RankingMetrics:
  """Accumulates scored batches and computes the metrics of each task."""

  def __init__(self, tasks: Sequence[str]):
    """Starts empty, for these tasks."""
    self.tasks = tuple(tasks)
    self._chunks: list[Predictions] = []

  def update(
    self,
    logits: Mapping[str, Float[Array, 'B C']],
    labels: Mapping[str, Float[Array, 'B C']],
    mask: Bool[Array, 'B C'] | None,
    group: Int[Array, 'B ...'],
  ) -> None:
    """Adds a batch.

    Args:
      logits: `{task: [B, C]}`.
      labels: `{task: [B, C]}`, 0 or 1.
      mask: the candidates that count; None: all.
      group: the user of each row `[B]` or candidate `[B, C]`; integers that
        int32 holds.

    Raises:
      ValueError: a task is missing, an argument has another shape or type, a
        logit that counts is not finite, a label that counts is not 0 or 1, or
        a user that counts is no int32.
    """
    shape = self._check_shapes(logits, labels)
    keep = np.ones(shape, bool) if mask is None else np.asarray(mask)
    if keep.dtype != bool or keep.shape != shape:
      raise ValueError(
        f'mask is {keep.dtype} {keep.shape}; it must be bool [B, C] = {shape}'
      )
    chunk = Predictions({}, {}, _groups(np.asarray(group), keep))
    for task in self.tasks:
      chunk.logits[task] = np.asarray(logits[task], np.float32)[keep]
      chunk.labels[task] = np.asarray(labels[task], np.float32)[keep]
      _check(chunk.logits[task], chunk.labels[task], f'task {task!r}: ')
    self._chunks.append(chunk)

  def _check_shapes(self, logits, labels) -> tuple[int, ...]:
    """That of the first task's logits, which all must have."""
    if not self.tasks:
      raise ValueError('tasks is empty; name at least one task')
    shape = None
    for task in self.tasks:
      for name, values in (('logits', logits), ('labels', labels)):
        if task not in values:
          raise ValueError(
            f'{name} of task {task!r} are missing; there are {sorted(values)}'
          )
        _check_masks(f'{name} of task {task!r}', values[task])
        found = np.shape(values[task])
        shape = found if shape is None else shape
        if found != shape or len(found) != 2:
          raise ValueError(
            f'{name} of task {task!r} have shape {found}; they must be [B, C], '
            f'as logits of task {self.tasks[0]!r}, which have {shape}'
          )
    assert shape is not None
    return shape

  def merge(self, other: RankingMetrics) -> RankingMetrics:
    """A new accumulator with the data of both.

    Raises:
      ValueError: the tasks differ.
    """
    if self.tasks != other.tasks:
      raise ValueError(
        f'cannot merge metrics of tasks {self.tasks} and {other.tasks}; '
        'accumulate the same tasks in both'
      )
    merged = RankingMetrics(self.tasks)
    merged._chunks = self._chunks + other._chunks
    return merged

  def gather(self) -> RankingMetrics:
    """A new accumulator with the data of all processes; collective."""
    if jax.process_count() == 1:
      return self
    local = self.predictions()
    arrays = [local.group]
    for task in self.tasks:
      arrays += [local.logits[task], local.labels[task]]
    group, *values = _allgather(arrays)
    gathered = RankingMetrics(self.tasks)
    gathered._chunks = [
      Predictions(
        dict(zip(self.tasks, values[0::2], strict=True)),
        dict(zip(self.tasks, values[1::2], strict=True)),
        group,
      )
    ]
    return gathered

  def predictions(self) -> Predictions:
    """Everything accumulated, in order."""
    return Predictions(
      {t: _join(c.logits[t] for c in self._chunks) for t in self.tasks},
      {t: _join(c.labels[t] for c in self._chunks) for t in self.tasks},
      _join((c.group for c in self._chunks), np.int32),
    )

  def result(self) -> dict[str, float]:
    """`{'task/metric': value}` for every task and each of `METRICS`.

    A metric that the data does not define is NaN: AUC and NE with one class
    only, GAUC if no user has both classes, all of them without data.
    """
    data = self.predictions()
    metrics = {}
    for task in self.tasks:
      logits, labels = data.logits[task], data.labels[task]
      metrics[f'{task}/auc'] = auc(logits, labels)
      metrics[f'{task}/gauc'] = gauc(logits, labels, data.group)
      metrics[f'{task}/logloss'] = logloss(logits, labels)
      metrics[f'{task}/ne'] = normalized_entropy(logits, labels)
    return metrics


def _groups(group: np.ndarray, keep: np.ndarray) -> np.ndarray:
  """Of the candidates that count, int32; ValueError if it cannot be."""
  if group.shape not in (keep.shape[:1], keep.shape):
    raise ValueError(
      f'group has shape {group.shape}; it must be [B] = {keep.shape[:1]} or '
      f'[B, C] = {keep.shape}'
    )
  if not np.issubdtype(group.dtype, np.integer):
    raise ValueError(
      f'group is {group.dtype}; it must be of integers, one for each user'
    )
  group = group[:, None] if group.ndim == 1 else group
  group = np.broadcast_to(group, keep.shape)[keep]
  # Not wider: JAX gathers 32 bits.
  limits = np.iinfo(np.int32)
  bad = (group < limits.min) | (group > limits.max)
  if bad.any():
    raise ValueError(
      f'group {group[bad][0]} is outside int32; number the users from 0, as '
      'by np.unique(.., return_inverse=True)'
    )
  return group.astype(np.int32)


def _check_masks(what: str, values: Array) -> None:
  """Raises ValueError if NumPy's mask hides some: it would be lost."""
  if np.ma.is_masked(values):
    raise ValueError(f'{what} have masked values; leave them out')


def _check(scores, labels, where: str = ''):
  _check_masks(f'{where}scores', scores)
  _check_masks(f'{where}labels', labels)
  scores = np.asarray(scores, np.float64)
  labels = np.asarray(labels, np.float64)
  if scores.shape != labels.shape or scores.ndim != 1:
    raise ValueError(
      f'{where}scores {scores.shape} and labels {labels.shape} must be one-'
      'dimensional and of one length'
    )
  bad = ~np.isfinite(scores)
  if bad.any():
    raise ValueError(
      f'{where}{bad.sum()} of {len(scores)} scores are not finite (the first '
      f'is {scores[bad][0]}); the model has diverged or an input is NaN'
    )
  bad = (labels != 0) & (labels != 1)
  if bad.any():
    raise ValueError(
      f'{where}label {labels[bad][0]} must be 0 or 1; mask candidates that '
      'have no label'
    )
  return scores, labels


def auc_by_group(
  scores: Shaped[np.ndarray, 'K'],
  labels: Shaped[np.ndarray, 'K'],
  group: Int[np.ndarray, 'K'],
) -> tuple[Float[np.ndarray, 'G'], Int[np.ndarray, 'G']]:
  """AUC (NaN with one class only) and count of each distinct group, sorted.

  Every intermediate is an integer held exactly, so the order of the data
  changes nothing. Nothing is checked; see `gauc` for what is expected.

  Args:
    scores: `[K]`, the higher the more likely; ties count half.
    labels: `[K]`, 1 or 0.
    group: int `[K]`.

  Returns:
    float64 `[G]`, the AUC of each group, and `[G]`, how many it has.
  """
  if not len(scores):
    return np.zeros(0), np.zeros(0)
  order = np.lexsort((scores, group))
  scores, group = scores[order], group[order]
  positive = labels[order] == 1
  new_group = np.append(True, group[1:] != group[:-1])
  new_tie = new_group | np.append(True, scores[1:] != scores[:-1])
  index = np.cumsum(new_group) - 1
  group_start = np.flatnonzero(new_group)
  count = np.diff(np.append(group_start, len(scores)))
  # The tie at sorted places a..b-1 has 1-based midrank (a + b + 1) / 2.
  tie_start = np.flatnonzero(new_tie)
  tie_stop = np.append(tie_start[1:], len(scores))
  tie = np.cumsum(new_tie) - 1
  twice_rank = (tie_start + tie_stop + 1)[tie] - 2 * group_start[index]
  num_groups = len(group_start)
  positives = np.bincount(index[positive], minlength=num_groups)
  twice_sum = np.bincount(
    index, weights=np.where(positive, twice_rank, 0), minlength=num_groups
  )
  pairs = positives * (count - positives)
  twice_wins = twice_sum - positives * (positives + 1)
  area = np.full(num_groups, np.nan)
  np.divide(twice_wins, 2 * pairs, out=area, where=pairs > 0)
  return area, count


def _join(chunks: Iterable[np.ndarray], dtype=np.float32) -> np.ndarray:
  return np.concatenate([np.zeros(0, dtype), *chunks])


def _allgather(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Concatenates the arrays (1-D, of one length) of all processes."""
  sizes = multihost_utils.process_allgather(
    np.asarray(len(arrays[0]), np.int32)
  )
  pad = int(sizes.max()) - len(arrays[0])
  gathered = []
  for array in arrays:
    # [processes, longest]
    padded = multihost_utils.process_allgather(np.pad(array, (0, pad)))
    gathered.append(
      np.concatenate([p[:n] for p, n in zip(padded, sizes, strict=True)])
    )
  return gathered
