"""The optimizer: Adam for the network, row-wise Adagrad for the tables."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from histjax import config as dicts


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How parameters are updated.

  Attributes:
    learning_rate: of the network (all but the embedding tables), at its peak.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    eps: added to Adam's denominator.
    weight_decay: decoupled (AdamW), of the network's matrices alone: biases,
      normalisations and tables are not decayed.
    clip_norm: the gradient, that of the tables included, is scaled down to this
      norm; None: never.
    warmup_steps: both learning rates grow linearly to their peak over these.
    schedule: 'constant' after the warmup, or down to 0, which comes after the
      last step, 'linear' or along a half 'cosine'.
    table_optimizer: 'rowwise_adagrad' (one more float per row), or 'lazy_adam'
      (two more per parameter, with `b1`, `b2` and `eps`). Both move the rows of
      a batch alone.
    table_learning_rate: of the tables, at its peak.
    table_eps: added to row-wise Adagrad's denominator.
    table_initial: the initial accumulator of row-wise Adagrad.
  """

  learning_rate: float = 1e-3
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float | None = None
  warmup_steps: int = 0
  schedule: Literal['constant', 'linear', 'cosine'] = 'constant'
  table_optimizer: Literal['rowwise_adagrad', 'lazy_adam'] = 'rowwise_adagrad'
  table_learning_rate: float = 0.02
  table_eps: float = 1e-8
  table_initial: float = 0.0

  def __post_init__(self):
    dicts.normalize(self)
    for field in ('learning_rate', 'eps', 'table_learning_rate', 'table_eps'):
      value = getattr(self, field)
      if not 0 < value < math.inf:
        raise ValueError(
          f'optimizer.{field}={value} must be positive and finite'
        )
    for field in ('weight_decay', 'warmup_steps', 'table_initial'):
      value = getattr(self, field)
      if not 0 <= value < math.inf:
        raise ValueError(f'optimizer.{field}={value} must be >= 0 and finite')
    for field in ('b1', 'b2'):
      value = getattr(self, field)
      if not 0 <= value < 1:
        raise ValueError(f'optimizer.{field}={value} must be in [0, 1)')
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ValueError(
        f'optimizer.clip_norm={self.clip_norm} must be positive, or None'
      )


class RowwiseAdagradState(NamedTuple):
  """`accumulator`: like the parameters, float32 `[rows, 1]` for `[rows, D]`."""

  accumulator: optax.Updates


def scale_by_rowwise_adagrad(
  *, initial: float = 0.0, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adagrad with one accumulator per row of each table.

      a_r <- a_r + mean_d(g_{r,d}^2)
      u_{r,d} = g_{r,d} / (sqrt(a_r) + eps)

  As in FBGEMM's `EXACT_ROWWISE_ADAGRAD` (the optimizer of DLRM; Naumov et al.
  2019, arXiv 1906.00091): it needs 1/D of the memory of Adagrad (Duchi et al.
  2011). A row without gradient stays as it is.

  Args:
    initial: the accumulators' start, in squared units of the gradient.
    eps: keeps a row without any gradient from dividing 0 by 0.

  Returns:
    An optax transformation; scale its result by minus the learning rate. Its
    `init` raises ValueError for a parameter that is not a matrix.
  """

  def init(params):
    for path, x in jax.tree_util.tree_leaves_with_path(params):
      if x.ndim != 2:
        raise ValueError(
          f'row-wise Adagrad: {jax.tree_util.keystr(path)} has shape '
          f'{x.shape}, but must be a table [rows, dim]'
        )
    return RowwiseAdagradState(
      jax.tree.map(
        lambda x: jnp.full((x.shape[0], 1), initial, jnp.float32), params
      )
    )

  def update(updates, state, params=None):
    del params
    accumulator = jax.tree.map(
      lambda a, g: (
        a + jnp.mean(jnp.square(g.astype(jnp.float32)), axis=1, keepdims=True)
      ),
      state.accumulator,
      updates,
    )
    updates = jax.tree.map(
      lambda a, g: (g / (jnp.sqrt(a) + eps)).astype(g.dtype),
      accumulator,
      updates,
    )
    return updates, RowwiseAdagradState(accumulator)

  return optax.GradientTransformation(init, update)


class LazyAdamState(NamedTuple):
  """Of tables `[R, D]`: `count` int32 `[R, 1]`, moments float32 `[R, D]`."""

  count: optax.Updates
  mu: optax.Updates
  nu: optax.Updates


def scale_by_lazy_adam(
  *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam (Kingma and Ba 2015, arXiv 1412.6980), one for each row of a table.

      m_r <- b1 m_r + (1 - b1) g_r,  v_r <- b2 v_r + (1 - b2) g_r^2,  t_r += 1
      u_r = m_r / (1 - b1^t_r) / (sqrt(v_r / (1 - b2^t_r)) + eps)

  To give it the rows of a batch alone is what makes it lazy: a row's moments
  and its t stand still in the steps that do not touch it. TensorFlow's
  `LazyAdam` and PyTorch's `SparseAdam` correct the bias by the steps of the
  whole training instead, by which the first updates of a row that comes late
  are `(1 - b1) / sqrt(1 - b2)` times as large.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the denominator.

  Returns:
    An optax transformation; scale its result by minus the learning rate.
  """

  def init(params):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    count = jax.tree.map(lambda x: jnp.zeros((len(x), 1), jnp.int32), params)
    return LazyAdamState(count, zeros, zeros)

  def update(updates, state, params=None):
    del params
    count = jax.tree.map(lambda t: t + 1, state.count)
    mu, nu = (
      jax.tree.map(lambda m, g, b=b, k=k: b * m + (1 - b) * g**k, old, updates)
      for old, b, k in ((state.mu, b1, 1), (state.nu, b2, 2))
    )

    def direction(m, v, t):
      t = t.astype(jnp.float32)
      return m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps)

    updates = jax.tree.map(direction, mu, nu, count)
    return updates, LazyAdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def schedule(
  config: OptimizerConfig, peak: float, num_steps: int | None = None
) -> optax.Schedule:
  """The learning rate of step t = 0, 1, ..., `num_steps` - 1.

      peak * min(1, (t + 1) / warmup) * decay((t - warmup) / (T - warmup))

  with `decay(x) = 1`, `1 - x` or `(1 + cos(pi x)) / 2`, x kept in [0, 1].

  Args:
    config: the optimizer's.
    peak: the largest value.
    num_steps: T.

  Returns:
    A function of the step.

  Raises:
    ValueError: the schedule decays, and T is unknown or within the warmup.
  """
  warmup = config.warmup_steps
  decays = config.schedule != 'constant'
  last = num_steps or 0
  if decays and last <= warmup:
    raise ValueError(
      f'optimizer.warmup_steps={warmup} with num_steps={num_steps}: '
      f'optimizer.schedule={config.schedule!r} needs a last step after the '
      "warmup; use fewer warmup_steps, or optimizer.schedule='constant'"
    )

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    value = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
    if decays:
      x = jnp.clip((step - warmup) / (last - warmup), 0.0, 1.0)
      linear = config.schedule == 'linear'
      value *= 1 - x if linear else (1 + jnp.cos(jnp.pi * x)) / 2
    return peak * value

  return rate


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
  """How a step changes the network and the tables.

  Attributes:
    network: of the parameters, but for clipping.
    tables: of rows `[K, D]` of a table. Each array of its state has a row for
      each, `[K, ...]`, and its update of one depends on no other; it returns
      the direction against which to go.
    table_rate: the tables' learning rate of step t.
    clip_norm: of the whole gradient; None: never.
  """

  network: optax.GradientTransformation
  tables: optax.GradientTransformation
  table_rate: optax.Schedule
  clip_norm: float | None = None


def make_optimizer(
  config: OptimizerConfig, num_steps: int | None = None
) -> Optimizer:
  """Adam for the network, the table optimizer for the tables' rows.

  Args:
    config: the optimizer's.
    num_steps: of the whole training; schedules that decay need it.

  Returns:
    The same object for the same arguments.

  Raises:
    ValueError: see `schedule`.
  """
  return _make_optimizer(
    config, None if config.schedule == 'constant' else num_steps
  )


@functools.lru_cache(maxsize=8)
def _make_optimizer(
  config: OptimizerConfig, num_steps: int | None
) -> Optimizer:
  adam = {'b1': config.b1, 'b2': config.b2, 'eps': config.eps}
  network = optax.adamw(
    _in_an_array(schedule(config, config.learning_rate, num_steps)),
    weight_decay=config.weight_decay,
    mask=_matrices,
    **adam,
  )
  if config.table_optimizer == 'lazy_adam':
    tables = scale_by_lazy_adam(**adam)
  else:
    tables = scale_by_rowwise_adagrad(
      initial=config.table_initial, eps=config.table_eps
    )
  rate = schedule(config, config.table_learning_rate, num_steps)
  return Optimizer(network, tables, rate, config.clip_norm)


def _in_an_array(rate: optax.Schedule) -> optax.Schedule:
  """The schedule, whose values XLA reads from an array of two.

  An update is a kernel for each parameter, and takes as long to start as to
  compute. XLA joins those of one size on a GPU if they read an array in common,
  for which a scalar does not count.
  """

  def of_step(step):
    value = jnp.asarray(rate(step))
    return jax.lax.optimization_barrier(jnp.stack([value, value]))[0]

  return of_step


def _matrices(params: Any) -> Any:
  return jax.tree.map(lambda x: x.ndim >= 2, params)
