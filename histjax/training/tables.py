"""Embedding tables in training: a step reads and writes the rows it touches.

A row is *touched* by a step if its id is that of a real event, of a candidate
that counts or of a row's context that has one; what pads a batch touches
nothing. A step looks the distinct touched rows of each table up, for all
features that share it, puts them in the table's place with ids that count from
0, differentiates the loss with respect to them, and writes them and what the
optimizer keeps of them back in place. So neither its time nor its memory grows
with a table, and every part of it is defined for touched rows:

* The optimizer moves touched rows alone, and knows of each row only the steps
  that touched it. Row-wise Adagrad is that of dense gradients, to the bit.
* `OptimizerConfig.clip_norm` is of the whole gradient. That of a row that is
  not touched is 0, so the norm of touched rows is the tables' norm.
* `OptimizerConfig.weight_decay` leaves tables alone.
* Loss, gradient and what was written have to be finite; other rows were when
  they were written.
* The moving average of a row that is not touched goes on towards a constant,
  which has a closed form, see `remaining`: it is caught up with when the row is
  touched or read, and equals that of all steps up to rounding.

Rows that several devices touch are added up: a step is one of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from histjax import schema as schema_lib
from histjax.types import RankingBatch

NO_ROW = np.iinfo(np.int32).max
"""In place of an id; no table has that many rows."""
_FEW = 64
"""Rows of a table each of which is looked for in a batch; see `unique`."""


class Averages(NamedTuple):
  """The moving average of a table, as far as it was followed.

  Attributes:
    value: float32 `[R, D]`, the average of each row after step `last`.
    last: int32 `[R]`, the number of updates then.
  """

  value: Float[Array, 'R D']
  last: Int[Array, 'R']


class Table(NamedTuple):
  """A table, or the part of it that a device has, with what belongs to it.

  Attributes:
    rows: `[R, D]`, the table.
    state: the optimizer's; each array has `[R, ...]`.
    average: None: none is kept.
  """

  rows: Float[Array, 'R D']
  state: Any
  average: Averages | None


def by_name(collection: Mapping[str, Any]) -> dict[str, Any]:
  """`{table: leaf}` of a collection `tables`, by whatever modules have them.

  Raises:
    ValueError: two of its tables have one name.
  """
  found: dict[str, Any] = {}
  for path, leaf in flax.traverse_util.flatten_dict(dict(collection)).items():
    if path[-1] in found:
      raise ValueError(
        f'two modules have a table {path[-1]!r}, one of them {path}: a table '
        'of the schema can be read by one module alone'
      )
    found[path[-1]] = leaf
  return found


def like(collection: Mapping[str, Any], named: Mapping[str, Any]) -> Any:
  """The collection with the leaves that `by_name` would name so."""
  paths = flax.traverse_util.flatten_dict(dict(collection))
  return flax.traverse_util.unflatten_dict({p: named[p[-1]] for p in paths})


def touch(
  schema: schema_lib.Schema,
  batch: RankingBatch,
  names: Mapping[str, Any],
  max_unique: Mapping[str, int],
  everywhere: Callable[[Array], Array] = lambda ids: ids,
) -> tuple[dict[str, Int[Array, 'K']], RankingBatch]:
  """The rows that a batch touches, and the batch with places among them.

  Args:
    schema: of the batch.
    batch: rows, in a jitted function.
    names: the tables to do it for.
    max_unique: `{table: K}`, an upper bound of the distinct rows of a batch.
      That of others is the number of ids, which never fails.
    everywhere: makes the ids of all devices out of those of one.

  Returns:
    `{table: [K]}`, ascending ids, then `NO_ROW` where there are no more; and
    the batch, whose ids are places in `[0, K)`. An id outside its table has the
    place -1, which gives NaN, as have those that exceed `max_unique`.

  Raises:
    ValueError: a table is none of the schema's, or a feature is missing.
  """
  sizes = schema.tables
  if unknown := sorted(set(names) - set(sizes)):
    raise ValueError(
      f'the model has the tables {unknown}, which the schema has not; it has '
      f'{sorted(sizes)}'
    )
  parts = _parts(schema, batch)
  found = {}
  for table in names:
    flat = [
      everywhere(
        jnp.where(real & _within(ids, sizes[table]), ids, NO_ROW).ravel()
      )
      for features, real, spec in parts
      for f, ids in _of_table(features, spec, table)
    ]
    if not flat:  # Of a feature that the model alone knows.
      continue
    ids = jnp.concatenate(flat)
    bound = min(max_unique.get(table, sizes[table]), sizes[table], ids.size)
    found[table] = unique(ids, bound, sizes[table])
  local: list[dict[str, Array]] = []
  for features, real, spec in parts:
    changed = dict(features)
    for table, ids in found.items():
      for f, value in _of_table(features, spec, table):
        changed[f.name] = _places(ids, value, real, sizes[table])
    local.append(changed)
  context, history, candidates = local
  return found, batch.replace(
    context=context,
    history=batch.history.replace(features=history),
    candidates=batch.candidates.replace(features=candidates),
  )


def num_touched(
  schema: schema_lib.Schema, batch: RankingBatch
) -> dict[str, int]:
  """How many distinct rows of each table a batch touches, on the host."""
  parts = _parts(schema, batch)
  found = {}
  for table, size in schema.tables.items():
    flat = [
      np.asarray(ids)[np.asarray(real & _within(ids, size))]
      for features, real, spec in parts
      for _, ids in _of_table(features, spec, table)
    ]
    found[table] = len(np.unique(np.concatenate(flat)))
  return found


def unique(ids: Int[Array, 'N'], bound: int, size: int) -> Int[Array, 'K']:
  """The `bound` least distinct ids below `size`, ascending, then `NO_ROW`."""
  if size <= min(_FEW, ids.size):  # To look for each takes less than to sort.
    every = jnp.arange(size, dtype=jnp.int32)
    is_there = jnp.any(ids[:, None] == every[None, :], axis=0)
    ids = jnp.where(is_there, every, NO_ROW)
  # Equal ids are all the same: a stable sort would move their places, too.
  ids = jnp.sort(ids, stable=False)
  is_new = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
  place = jnp.where(ids < NO_ROW, jnp.cumsum(is_new) - 1, bound)
  return jnp.full(bound, NO_ROW, jnp.int32).at[place].set(ids, mode='drop')


def lookup(
  table: Float[Array, 'R D'], index: Int[Array, 'K']
) -> Float[Array, 'K D']:
  """Rows of a table; zeros where there is no such row."""
  return table.at[index].get(
    mode='fill', fill_value=0, wrap_negative_indices=False
  )


def update(
  tx: optax.GradientTransformation,
  table: Table,
  index: Int[Array, 'K'],
  gradient: Float[Array, 'K D'],
  *,
  rate: Float[Array, ''],
  step: Int[Array, ''],
  decay: float | None,
) -> tuple[Table, Bool[Array, '']]:
  """One step of the rows `index`; other rows, and places beyond, stay.

  Args:
    tx: see `training.optimizer.Optimizer.tables`.
    table: what to change; donate it.
    index: distinct rows; R or more: none.
    gradient: of them.
    rate: the learning rate.
    step: the number of updates so far.
    decay: of the moving average, if there is one.

  Returns:
    The table, and whether all that was written is finite.
  """
  # Of places beyond the table something, which is not written.
  rows, state, average = jax.tree.map(
    lambda x: x.at[index].get(mode='clip', wrap_negative_indices=False), table
  )
  direction, state = tx.update(gradient, state, rows)
  new = rows - rate * direction
  if average is not None:
    assert decay is not None
    before = caught_up(average, rows, step, decay)
    weight = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    average = Averages(
      before + weight * (new - before),
      # As they are all less, step + 1; but written after they were read, or
      # XLA would copy them all.
      jnp.maximum(average.last, step + 1),
    )

  def written(x, values):
    return x.at[index].set(
      values, mode='drop', unique_indices=True, wrap_negative_indices=False
    )

  found = jax.tree.map(written, table, Table(new, state, average))
  # Squares, as of the network: what overflows soon has diverged.
  squares = jnp.sum(jnp.square(new), axis=1)
  real = index < len(table.rows)
  return found, jnp.isfinite(jnp.sum(jnp.where(real, squares, 0)))


def caught_up(
  average: Averages,
  rows: Float[Array, 'R D'],
  step: Int[Array, ''],
  decay: float,
) -> Float[Array, 'R D']:
  """The average of rows that stayed since `average.last`, after `step`."""
  left = remaining(average.last, step, decay)[:, None]
  return rows + left * (average.value - rows)


def remaining(
  last: Int[Array, 'R'], step: Int[Array, ''], decay: float
) -> Float[Array, 'R']:
  """What is left of the distance between an average and a constant.

      prod_{t = last + 1}^{step} d_t,  d_t = min(d, t / (9 + t))

  of `training.step.averaged`, in closed form: up to the last t at which
  `t / (9 + t)` is less than d, it is `prod_{i = 1}^{9} (last + i) / (t + i)`.

  Args:
    last: int32, before the first factor.
    step: int32, the last factor's t.
    decay: d.
  """
  # Later on d is less, for good.
  warm = min(int(9 * decay / (1 - decay)), 2**30)
  start = last.astype(jnp.float32)
  end = jnp.maximum(jnp.minimum(step, warm), last).astype(jnp.float32)
  found = jnp.ones_like(start)
  for i in range(1, 10):
    found *= (start + i) / (end + i)
  rest = jnp.maximum(step - jnp.maximum(last, warm), 0)
  return found * jnp.power(jnp.float32(decay), rest.astype(jnp.float32))


def _parts(schema: schema_lib.Schema, batch: RankingBatch):
  """Features, which of them are real, and how the schema describes them."""
  candidates, history = batch.candidates, batch.history
  mask = candidates.mask
  if mask is None:
    mask = jnp.ones(candidates.shape, bool)
  num_events = next(iter(history.features.values())).shape[1]
  events = jnp.arange(num_events)[None, :] < history.length[:, None]
  # A row without candidates is no row, or of no use.
  rows = jnp.any(mask, axis=1)
  # Packed rows have a context for each candidate.
  users = rows if batch.segments is None else mask
  return (
    (batch.context, users, schema.context),
    (history.features, events & rows[:, None], schema.history_features),
    (candidates.features, mask, schema.item_features),
  )


def _of_table(features, spec, table):
  for f in schema_lib.categorical(spec):
    if f.table != table:
      continue
    if f.name not in features:
      raise ValueError(
        f'feature {f.name!r} is missing; the batch has {sorted(features)}'
      )
    yield f, features[f.name]


def _within(ids, size: int):
  return (ids >= 0) & (ids < size)


def _places(unique_ids, ids, real, size: int):
  """Where ids are; 0 of those that are not real, whatever is there."""
  place = jnp.searchsorted(unique_ids, ids, method='scan_unrolled')
  place = jnp.minimum(place, len(unique_ids) - 1).astype(jnp.int32)
  is_there = _within(ids, size) & (unique_ids[place] == ids)
  return jnp.where(real, jnp.where(is_there, place, -1), 0)
