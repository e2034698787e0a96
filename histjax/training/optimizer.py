"""The optimizer: Adam for the network, row-wise Adagrad for the tables."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

TABLES = 'tables'
"""The key of the embedding tables in the parameters."""


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
    clip_norm: the gradient of all parameters is scaled down to this norm;
      None: never.
    warmup_steps: both learning rates grow linearly to their peak over these.
    schedule: 'constant' after the warmup, or down to 0 at the last step,
      'linear' or along a half 'cosine'.
    table_optimizer: 'rowwise_adagrad', or 'adam' (two more floats per
      parameter, and rows that are not in the batch move too).
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
  table_optimizer: Literal['rowwise_adagrad', 'adam'] = 'rowwise_adagrad'
  table_learning_rate: float = 0.02
  table_eps: float = 1e-8
  table_initial: float = 0.0

  def __post_init__(self):
    for field in ('learning_rate', 'eps', 'table_learning_rate', 'table_eps'):
      value = getattr(self, field)
      if not value > 0:
        raise ValueError(f'optimizer.{field}={value} must be positive')
    for field in ('weight_decay', 'warmup_steps', 'table_initial'):
      value = getattr(self, field)
      if not value >= 0:
        raise ValueError(f'optimizer.{field}={value} must be >= 0')
    for field in ('b1', 'b2'):
      value = getattr(self, field)
      if not 0 <= value < 1:
        raise ValueError(f'optimizer.{field}={value} must be in [0, 1)')
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ValueError(
        f'optimizer.clip_norm={self.clip_norm} must be positive, or None'
      )
    _one_of(self, 'schedule', ('constant', 'linear', 'cosine'))
    _one_of(self, 'table_optimizer', ('rowwise_adagrad', 'adam'))


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


def make_optimizer(
  config: OptimizerConfig, num_steps: int | None = None
) -> optax.GradientTransformation:
  """The transformation of the whole parameter tree.

  Parameters under `params['tables']` get the table optimizer, all others
  Adam; see `OptimizerConfig`.

  Args:
    config: the optimizer's.
    num_steps: of the whole training; schedules that decay need it.

  Returns:
    An optax transformation for parameters `{'tables': ..., ...}`; the same
    object for the same arguments.

  Raises:
    ValueError: see `schedule`.
  """
  return _make_optimizer(
    config, None if config.schedule == 'constant' else num_steps
  )


@functools.lru_cache(maxsize=8)
def _make_optimizer(
  config: OptimizerConfig, num_steps: int | None
) -> optax.GradientTransformation:
  rate = schedule(config, config.learning_rate, num_steps)
  table_rate = schedule(config, config.table_learning_rate, num_steps)
  adam = {'b1': config.b1, 'b2': config.b2, 'eps': config.eps}
  network = optax.adamw(
    rate, weight_decay=config.weight_decay, mask=_matrices, **adam
  )
  if config.table_optimizer == 'adam':
    tables = optax.adam(table_rate, **adam)
  else:
    tables = optax.chain(
      scale_by_rowwise_adagrad(
        initial=config.table_initial, eps=config.table_eps
      ),
      optax.scale_by_learning_rate(table_rate),
    )
  parts = optax.partition({'network': network, 'tables': tables}, _labels)
  if config.clip_norm is None:
    return parts
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), parts)


def _labels(params: Any) -> Any:
  """'tables' or 'network' for each parameter, by its place in the tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 'tables' if _key(path[0]) == TABLES else 'network', params
  )


def _matrices(params: Any) -> Any:
  return jax.tree.map(lambda x: x.ndim >= 2, params)


def _key(entry: Any) -> str:
  return str(getattr(entry, 'key', getattr(entry, 'name', entry)))


def _one_of(config: Any, field: str, allowed: tuple[str, ...]) -> None:
  value = getattr(config, field)
  if value not in allowed:
    raise ValueError(f'optimizer.{field}={value!r} must be one of {allowed}')
