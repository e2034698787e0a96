"""Updates of touched rows equal those of whole tables, and cost less."""

import functools

import chex
import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from hypothesis import given

from histjax import schema as schema_lib
from histjax.nn import embedding
from histjax.training import losses, optimizer, state, step, tables
from tests import marks, support

OPTIMIZERS = ('rowwise_adagrad', 'lazy_adam')


class TinyModel(nn.Module):
  """Reads a shared table in three places; quick to compile."""

  schema: schema_lib.Schema = support.SCHEMA
  dim: int = 4
  row_multiple: int = 1
  dtype: str = 'float32'  # Of the vectors that it reads.

  @nn.compact
  def __call__(self, batch, *, train=False):
    del train
    schema = self.schema
    read = embedding.EmbeddingTables(
      schema.tables, self.dim, self.dtype, self.row_multiple, name='tables'
    )
    history, candidates = batch.history, batch.candidates
    events = read(history.features, schema.history_features)
    number = jnp.arange(events.shape[1])[None, :]
    real = (number < history.length[:, None])[..., None]
    mean = jnp.sum(jnp.where(real, events, 0), 1) / 8
    user = jnp.concatenate([mean, read(batch.context, schema.context)], 1)
    item = read(candidates.features, schema.item_features)
    found = nn.Dense(2)(jnp.tanh(item))
    found += nn.Dense(2)(jnp.tanh(user))[:, None, :]
    return {'click': found[..., 0], 'like': found[..., 1]}


@functools.cache
def make(name, **options):
  """A model, its optimizer and the two compiled ways to update it."""
  model = TinyModel(**options)
  tx = optimizer.make_optimizer(
    optimizer.OptimizerConfig(
      learning_rate=0.01,
      table_optimizer=name,
      table_learning_rate=0.05,
      clip_norm=0.1,
      warmup_steps=2,
    )
  )
  return (
    model,
    tx,
    step.make_train_step(model, tx, support.SCHEMA),
    jax.jit(functools.partial(dense_step, model, tx)),
  )


def create(name, seed=0, average=None, **options):
  model, tx, _, _ = make(name, **options)
  return state.create_state(model, tx, support.SCHEMA, seed, average=average)


def dense_step(model, tx, current, batch, touched):
  """The update with gradients, norms and states of whole tables.

  `touched` says of each row whether it is; others keep all that they have.
  """

  def loss(params, collection):
    logits = model.apply({'params': params, 'tables': collection}, batch)
    return losses.batch_loss(logits, batch)

  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(
    current.params, current.tables
  )
  clip = optax.clip_by_global_norm(tx.clip_norm)
  (of_params, of_tables), _ = clip.update(grads, clip.init(grads))
  updates, opt_state = tx.network.update(
    of_params, current.opt_state, current.params
  )
  rate = tx.table_rate(current.step)
  rows, states = {}, {}
  for name, table in current.tables['tables'].items():
    direction, after = tx.tables.update(
      of_tables['tables'][name], current.table_state[name]
    )
    where = touched[name][:, None]
    rows[name] = jnp.where(where, table - rate * direction, table)
    states[name] = jax.tree.map(
      lambda new, old, where=where: jnp.where(where, new, old),
      after,
      current.table_state[name],
    )
  params = optax.apply_updates(current.params, updates)
  average = current.average
  if average is not None:  # Of tables: in the place of what is in closed form.
    average, of_tables = step.averaged(
      (average, {k: x.value for k, x in current.table_average.items()}),
      (params, rows),
      current.step,
      current.decay,
    )
    current = current.replace(
      average=average,
      table_average={
        k: tables.Averages(x, current.table_average[k].last + 1)
        for k, x in of_tables.items()
      },
    )
  return current.replace(
    step=current.step + 1,
    params=params,
    tables={'tables': rows},
    opt_state=opt_state,
    table_state=states,
    window=current.window.replace(loss=current.window.loss + value),
  )


def touched_rows(batch):
  """By NumPy: ids of real events and candidates, and of rows that have any."""
  schema, mask = support.SCHEMA, batch.candidates.mask
  num_events = batch.history.features['item'].shape[1]
  rows = mask.any(axis=1)
  events = np.arange(num_events) < batch.history.length[:, None]
  found = {k: np.zeros(size, bool) for k, size in schema.tables.items()}
  for spec, features, real in (
    (schema.context, batch.context, rows),
    (schema.history_features, batch.history.features, events & rows[:, None]),
    (schema.item_features, batch.candidates.features, mask),
  ):
    for f in schema_lib.categorical(spec):
      found[f.table][features[f.name][real]] = True
  return found


def random_batches(seed, number=4):
  """Many duplicates; padding, whose ids are random, too."""
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(number):
    batch = support.batch(rng, num_rows=4, num_events=6, num_candidates=3)
    batch.history.features['item'][:] %= rng.integers(1, 40)
    batch.candidates.mask[:] &= rng.random(batch.candidates.shape) < 0.7
    batch.candidates.mask[rng.integers(4)] = False
    found.append(batch)
  return found


def every_way(test):
  """With each optimizer, with an average and without."""
  return marks.slow_unless(
    lambda name, average: (average is None) == (name == 'lazy_adam')
  )(parameterized.product(name=OPTIMIZERS, average=(None, 0.3))(test))


class UpdateTest(parameterized.TestCase):
  @every_way
  @support.examples(6)
  @given(seed=st.integers(0, 2**32 - 1))
  def test_equals_that_of_dense_gradients(self, name, average, seed):
    _, _, train_step, dense = make(name)
    found, expected = (create(name, seed % 7, average) for _ in range(2))
    for batch in random_batches(seed):
      found = train_step(found, batch)
      touched = touched_rows(batch)
      expected = dense(expected, batch, touched)
    self.assertEqual(found.window.diverged_at, -1)
    expected_average = None if average is None else expected.table_average
    found_average = found.scoring_variables
    found, expected = (
      x.replace(rng=None, window=x.window.loss, table_average=None)
      for x in (found, expected)
    )
    # Sums over duplicates in another order. Adam's first steps are near the
    # gradient's sign, which makes most of a small one.
    tolerance = 1e-6 if name == 'rowwise_adagrad' else 2e-5
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=tolerance)
    if average is not None:
      chex.assert_trees_all_close(
        found_average['tables']['tables'],
        {k: x.value for k, x in expected_average.items()},
        rtol=1e-4,
        atol=tolerance,
      )

  @parameterized.parameters(*OPTIMIZERS)
  def test_other_rows_keep_every_bit(self, name):
    (batch,) = random_batches(3, 1)
    start = create(name)
    before = jax.device_get((start.tables, start.table_state))
    found = make(name)[2](start, batch)
    after = jax.device_get((found.tables, found.table_state))
    touched = touched_rows(batch)
    for table, is_touched in touched.items():
      leaves = (
        jax.tree.leaves((of_tables['tables'][table], states[table]))
        for of_tables, states in (before, after)
      )
      for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a[~is_touched], b[~is_touched])
      self.assertFalse(
        np.array_equal(before[0]['tables'][table], after[0]['tables'][table])
      )

  @parameterized.parameters(-1, 40, 45, 2**31 - 1)
  def test_an_id_outside_its_table_is_nan_and_writes_no_row(self, bad):
    # Tables have 48 rows, 40 of them of ids.
    _, _, train_step, _ = make('rowwise_adagrad', row_multiple=48)
    start = create('rowwise_adagrad', row_multiple=48)
    self.assertEqual(start.tables['tables']['item'].shape, (48, 4))
    (batch,) = random_batches(0, 1)
    touched = touched_rows(batch)['item']
    batch.history.features['item'][:, -1] = bad  # Padding: read by nobody.
    batch.history.length[:] = 5
    found = train_step(start, batch)
    self.assertTrue(np.isfinite(found.window.loss))
    before = np.asarray(found.tables['tables']['item'])
    batch.candidates.mask[0, 0] = True
    batch.candidates.features['item'][0, 0] = bad
    batch.candidates.features['item'][0, 0] = 0
    touched = touched_rows(batch)['item']
    batch.candidates.features['item'][0, 0] = bad
    found = train_step(found, batch)
    self.assertTrue(np.isnan(found.window.loss))
    self.assertEqual(found.window.diverged_at, 1)
    after = np.asarray(found.tables['tables']['item'])
    np.testing.assert_array_equal(after[:40][~touched], before[:40][~touched])
    np.testing.assert_array_equal(after[40:], before[40:])

  def test_more_distinct_ids_than_said_are_nan(self):
    model, tx, _, _ = make('rowwise_adagrad')
    (batch,) = random_batches(0, 1)
    number = int(touched_rows(batch)['item'].sum())
    self.assertGreater(number, 5)
    train_step = step.make_train_step(
      model, tx, support.SCHEMA, max_unique={'item': number}
    )
    found = train_step(create('rowwise_adagrad'), batch)
    expected = make('rowwise_adagrad')[2](create('rowwise_adagrad'), batch)
    self.assertEqual(found.window.loss, expected.window.loss)
    # One more, in the place of an id that is there elsewhere, too.
    values = batch.candidates.features['item']
    (b, c), (other_b, other_c) = np.argwhere(batch.candidates.mask)[:2]
    values[b, c] = values[other_b, other_c]
    fewer = int(touched_rows(batch)['item'].sum())
    self.assertLessEqual(fewer, number)
    absent = np.flatnonzero(~touched_rows(batch)['item'])
    batch.candidates.mask[:] = True
    values.flat[: number + 1 - fewer] = absent[: number + 1 - fewer]
    more = touched_rows(batch)['item'].sum()
    self.assertGreater(more, number)
    counts = tables.num_touched(support.SCHEMA, batch)
    self.assertEqual(counts['item'], more)
    self.assertTrue(np.isnan(train_step(found, batch).window.loss))

  def test_a_table_that_the_schema_has_not(self):
    model, tx, train_step, _ = make('rowwise_adagrad')
    small = schema_lib.Schema(
      user='user',
      time='time',
      item=(schema_lib.Categorical('item', 40),),
      tasks=support.SCHEMA.tasks,
    )
    train_step = step.make_train_step(model, tx, small)
    with self.assertRaisesRegex(ValueError, r"the tables \['rating', 'tag'"):
      train_step(create('rowwise_adagrad'), random_batches(0, 1)[0])

  def test_a_row_that_is_not_touched_may_be_nan(self):
    """Places beyond the table have the values of some row, and write none."""
    rows = np.ones((3, 2), np.float32)
    rows[2] = np.nan
    tx = optimizer.scale_by_rowwise_adagrad()
    table = tables.Table(jnp.array(rows), tx.init(rows), None)
    index = np.array([0, tables.NO_ROW], np.int32)
    gradient = np.array([[1.0, 1.0], [0.0, 0.0]], np.float32)
    found, finite = tables.update(
      tx, table, index, gradient, rate=1.0, step=0, decay=None
    )
    self.assertTrue(finite)
    np.testing.assert_allclose(found.rows[0], 0, atol=1e-6)
    np.testing.assert_array_equal(found.rows[1:], rows[1:])


class UniqueTest(parameterized.TestCase):
  @parameterized.product(
    # Few rows are looked for one by one, many are sorted; so are few ids.
    size_number=((1, 8), (5, 100), (64, 64), (64, 63), (65, 100), (300, 100)),
    bound=(1, 40, 300),
  )
  def test_equals_numpy(self, size_number, bound):
    size, number = size_number
    rng = np.random.default_rng(7)
    for share in (0, 0.5, 1):
      ids = rng.integers(0, size, number).astype(np.int32)
      ids[rng.random(number) >= share] = tables.NO_ROW
      expected = np.unique(ids[ids < tables.NO_ROW])[:bound]
      expected = np.append(
        expected, np.full(bound - len(expected), tables.NO_ROW)
      )
      found = tables.unique(jnp.asarray(ids), bound, size)
      self.assertEqual(found.dtype, jnp.int32)
      np.testing.assert_array_equal(found, expected)


class CostTest(parameterized.TestCase):
  @every_way
  def test_nothing_of_a_step_has_the_size_of_a_table(self, name, average):
    """In what XLA compiled: nothing is allocated, and tables stay in place."""
    (batch,) = random_batches(0, 1)
    temporary, rows = [], 10_000_000
    for size in (1000, rows):
      schema = schema_lib.Schema(
        user='user',
        time='time',
        context=(schema_lib.Categorical('user', size),),
        item=(
          schema_lib.Categorical('item', size),
          schema_lib.Dense('duration'),
        ),
        tasks=support.SCHEMA.tasks,
      )
      _, tx, _, _ = make(name)
      model = TinyModel(schema)
      shapes = jax.eval_shape(
        functools.partial(
          state.create_state, model, tx, schema, 0, average=average
        )
      )
      train_step = step.make_train_step(model, tx, schema)
      program = train_step.lower(shapes, batch).compile()
      memory = program.memory_analysis()
      temporary.append(memory.temp_size_in_bytes)
      of_tables = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(
          (shapes.tables, shapes.table_state, shapes.table_average)
        )
      )
      self.assertGreaterEqual(memory.alias_size_in_bytes, of_tables)
    self.assertEqual(temporary[0], temporary[1])
    for line in program.as_text().splitlines():
      if f'[{rows}' in line.partition('=')[2].partition('(')[0]:
        self.assertRegex(
          line,
          r' (parameter|get-tuple-element|scatter|fusion|bitcast|tuple|while|'
          r'conditional|call|dynamic-update-slice)\(|HloModule|ENTRY',
        )


class AverageTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.3, 0.9, 0.998)
  def test_what_remains_of_a_distance(self, decay):
    t = np.arange(1, 6001)
    factors = np.minimum(decay, t / (9 + t))
    last = np.array([0, 0, 1, 3, 10, 80, 81, 500, 4490, 5000, 5990, 6000])
    for end in (6000, 80, 1):
      start = np.minimum(last, end)
      expected = [np.prod(factors[s:end]) for s in start]
      found = tables.remaining(jnp.asarray(start), jnp.asarray(end), decay)
      # Powers of up to 6000, each bit of a logarithm times as much.
      np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-30)


class ByNameTest(parameterized.TestCase):
  def test_two_of_one_name(self):
    with self.assertRaisesRegex(ValueError, "two modules have a table 'item'"):
      tables.by_name({'a': {'item': 1}, 'b': {'item': 2}})

  def test_round_trip(self):
    tree = {'a': {'item': 1}, 'b': {'c': {'user': 2}}}
    named = tables.by_name(tree)
    self.assertEqual(named, {'item': 1, 'user': 2})
    self.assertEqual(tables.like(tree, named), tree)


if __name__ == '__main__':
  absltest.main()
