"""What training minimises: the log loss, and pairs in the wrong order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from histjax import config as dicts
from histjax.types import Array, RankingBatch

Labelled = Mapping[str, Float[Array, 'B C']]


@dataclasses.dataclass(frozen=True)
class RankLossConfig:
  """The loss of pairs, beside the log loss; see `rank_loss_sum`.

  Attributes:
    weight: of it, the log loss weighing 1; 0: it is not computed.
    span: pairs count of which one impression has seen fewer than this many
      events more than the other; None: all pairs of a row. In streaming rows
      a pair that is far apart compares a user's moods rather than items.
  """

  weight: float = 0.0
  span: int | None = None

  def __post_init__(self):
    dicts.normalize(self)
    if not 0 <= self.weight < float('inf'):
      raise ValueError(
        f'rank_loss.weight={self.weight} must be >= 0 and finite'
      )
    if self.span is not None and self.span < 1:
      raise ValueError(
        f'rank_loss.span={self.span} must be at least 1 (impressions that saw '
        'the same events), or None'
      )


def loss_sum(
  logits: Labelled,
  labels: Labelled,
  mask: Bool[Array, 'B C'] | None,
  task_weights: Mapping[str, float] | None = None,
) -> tuple[Float[jax.Array, ''], Float[jax.Array, '']]:
  """The binary cross-entropy summed over tasks and candidates, and its weight.

      sum   = sum_t w_t sum_{b,c} mask (softplus(z_t) - y_t z_t)
      loss  = sum / weight,    weight = sum_t w_t sum_{b,c} mask

  Args:
    logits: `{task: [B, C]}`; what stands at padding has no influence, NaN
      included.
    labels: `{task: [B, C]}`, 0 or 1.
    mask: the candidates that count; None: all.
    task_weights: `{task: w_t}`; tasks left out, and None, mean 1.

  Returns:
    `(sum, weight)`, float32 scalars. They add up over parts of a batch.
  """

  def task_sum(z, y, keep):
    loss = optax.sigmoid_binary_cross_entropy(z, y)
    total = jnp.sum(jnp.where(keep, loss, 0.0))
    return total, jnp.sum(keep, dtype=jnp.float32)

  return _over_tasks(task_sum, logits, labels, mask, task_weights)


def rank_loss_sum(
  logits: Labelled,
  labels: Labelled,
  mask: Bool[Array, 'B C'] | None,
  visible: Int[Array, 'B C'] | None = None,
  *,
  span: int | None = None,
  segment: Int[Array, 'B C'] | None = None,
  task_weights: Mapping[str, float] | None = None,
) -> tuple[Float[jax.Array, ''], Float[jax.Array, '']]:
  """The loss of pairs with different labels in a row, and its weight.

      sum_b   = n_b / (P_b N_b) sum_{i,j} softplus(z_j - z_i)
      loss    = sum_b sum_b / sum_b n_b,    n_b = P_b + N_b

  over the rows b with P_b > 0 positives and N_b > 0 negatives, and pairs of a
  positive i and a negative j with |visible_i - visible_j| < span; summed over
  tasks as in `loss_sum`. A pair's loss is RankNet's (Burges et al., Learning
  to rank using gradient descent, ICML 2005, doi:10.1145/1102351.1102363);
  adding it to the log loss, which keeps the logits calibrated, follows JRC
  (Sheng et al., KDD 2023, arXiv 2208.06164). A pair weighs the same whatever
  the span is.

  Args:
    logits: `{task: [B, C]}`; padding has no influence, NaN included.
    labels: `{task: [B, C]}`, 0 or 1.
    mask: the candidates that count; None: all.
    visible: int32, how many events came before each; None: the same number.
    span: see `RankLossConfig`; None: all pairs of a row.
    segment: of packed rows, `Segments.index`; each segment is a row b.
    task_weights: `{task: w_t}`; tasks left out, and None, mean 1.

  Returns:
    `(sum, weight)`, float32 scalars. They add up over parts of a batch.
  """
  near = None
  if span is not None and visible is not None:
    near = jnp.abs(visible[:, :, None] - visible[:, None, :]) < span
  same = None
  if segment is not None:
    same = segment[:, :, None] == segment[:, None, :]

  def task_sum(z, y, keep):
    positive, negative = keep & (y == 1), keep & (y != 1)
    pair = positive[:, :, None] & negative[:, None, :]
    if near is not None:
      pair &= near
    if same is not None:
      pair &= same
    loss = jax.nn.softplus(z[:, None, :] - z[:, :, None])  # [B, i, j]
    loss = jnp.where(pair, loss, 0.0)
    if same is not None:  # What rows sum up, each candidate has for its own.
      p, n = (
        jnp.sum(same & x[:, None, :], axis=2, dtype=jnp.float32)
        for x in (positive, negative)
      )
      weight = (p + n) / jnp.maximum(p * n, 1.0)
      total = jnp.sum(weight * jnp.sum(loss, axis=2))
      return total, jnp.sum(keep & (p * n > 0), dtype=jnp.float32)
    loss = jnp.sum(loss, axis=(1, 2))
    p = jnp.sum(positive, axis=1, dtype=jnp.float32)
    n = jnp.sum(negative, axis=1, dtype=jnp.float32)
    count = jnp.where(p * n > 0, p + n, 0.0)
    total = jnp.sum(count / jnp.maximum(p * n, 1.0) * loss)
    return total, jnp.sum(count)

  return _over_tasks(task_sum, logits, labels, mask, task_weights)


def batch_loss(
  logits: Labelled,
  batch: RankingBatch,
  *,
  task_weights: Mapping[str, float] | None = None,
  rank_loss: RankLossConfig | None = None,
  over_devices: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Float[jax.Array, '']:
  """The log loss, and the weighted rank loss, of a batch.

  Args:
    logits: `{task: [B, C]}`.
    batch: with labels.
    task_weights: see `loss_sum`.
    rank_loss: None: the log loss alone.
    over_devices: sums over the devices that share the batch.

  Returns:
    This device's part; it is summed over devices by the caller. A batch
    without candidates has loss 0, not 0 / 0; likewise one without pairs.
  """
  mask, visible = batch.candidates.mask, batch.candidates.visible

  def mean(total, weight):
    weight = over_devices(weight)
    return total / jnp.where(weight > 0, weight, 1.0)

  loss = mean(*loss_sum(logits, batch.labels, mask, task_weights))
  if rank_loss is None or not rank_loss.weight:
    return loss
  parts = rank_loss_sum(
    logits,
    batch.labels,
    mask,
    visible,
    span=rank_loss.span,
    segment=None if batch.segments is None else batch.segments.index,
    task_weights=task_weights,
  )
  return loss + rank_loss.weight * mean(*parts)


def _over_tasks(task_sum, logits, labels, mask, task_weights):
  """Weighted sums of both results of `task_sum(logits, labels, keep)`."""
  total = weight = jnp.zeros((), jnp.float32)
  for task, z in logits.items():
    w = 1.0 if task_weights is None else task_weights.get(task, 1.0)
    keep = jnp.ones(z.shape, bool) if mask is None else mask
    # Before the loss as well as in it: the gradient of a NaN that `where`
    # drops is still NaN.
    z = jnp.where(keep, z, 0.0).astype(jnp.float32)
    y = jnp.where(keep, labels[task], 0.0)
    part, count = task_sum(z, y, keep)
    total += w * part
    weight += w * count
  return total, weight
