"""One update: what it computes, and that devices do not change it."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from histjax.models import ranker
from histjax.nn import interaction
from histjax.training import losses, optimizer, sharding, state, step
from tests import support


class Tables(nn.Module):
  @nn.compact
  def __call__(self, index):
    table = self.variable(
      'tables',
      'item',
      lambda: nn.initializers.normal(0.1)(self.make_rng('params'), (40, 4)),
    )
    return table.value.at[index].get(mode='fill', wrap_negative_indices=False)


class TinyModel(nn.Module):
  """As quick to compile as can be, where the model does not matter."""

  dropout: float = 0.0

  @nn.compact
  def __call__(self, batch, *, train=False):
    features = batch.candidates.features
    x = Tables(name='tables')(features['item'])
    x = jnp.concatenate([x, features['duration'][..., None]], axis=-1)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    x = nn.Dense(2)(x)
    return {'click': x[..., 0], 'like': x[..., 1]}


# The real one, for what depends on how it is partitioned.
RANKER = ranker.Ranker(
  support.config(
    encoder__num_layers=1,
    encoder__width=8,
    embedding_dim=4,
    interaction=interaction.InteractionConfig(kind='mlp', mlp_widths=(8,)),
  )
)
TINY = TinyModel()
TX = optimizer.make_optimizer(
  optimizer.OptimizerConfig(weight_decay=0.1, clip_norm=1.0)
)


def new_state(model=TINY, **options):
  return state.create_state(model, TX, support.SCHEMA, seed=3, **options)


def batches(n, num_rows=16):
  rng = np.random.default_rng(1)
  found = [support.batch(rng, num_rows) for _ in range(n)]
  # A whole device's share without a single candidate, as eval has at its end.
  found[-1].candidates.mask[-2:] = False
  return found


class TrainStepTest(parameterized.TestCase):
  def test_equals_an_update_written_out(self):
    (batch,) = batches(1, 4)
    train_step = step.make_train_step(TINY, TX, support.SCHEMA)
    found = train_step(new_state(), batch)

    start = new_state()

    def loss(variables):
      logits = TINY.apply(variables, batch)
      losses = [
        optax.sigmoid_binary_cross_entropy(logits[t], batch.labels[t])[
          batch.candidates.mask
        ]
        for t in logits
      ]
      return jnp.mean(jnp.stack(losses))

    # Of all rows; it is 0 of those that the batch does not touch.
    value, grads = jax.jit(jax.value_and_grad(loss))(start.variables)
    grads, _ = optax.clip_by_global_norm(1.0).update(grads, None)
    updates, _ = TX.network.update(
      grads['params'], start.opt_state, start.params
    )
    expected = optax.apply_updates(start.params, updates)
    chex.assert_trees_all_close(found.params, expected, atol=1e-5)
    direction, table_state = TX.tables.update(
      grads['tables']['tables']['item'], start.table_state['item']
    )
    expected = start.tables['tables']['item'] - 0.02 * direction
    np.testing.assert_allclose(
      found.tables['tables']['item'], expected, atol=1e-5
    )
    chex.assert_trees_all_close(
      found.table_state['item'], table_state, rtol=1e-4
    )
    np.testing.assert_allclose(found.window.loss, value, rtol=1e-5)
    self.assertEqual(found.window.candidates, batch.candidates.mask.sum())
    self.assertEqual(found.window.steps, 1)
    self.assertEqual(found.step, 1)
    self.assertEqual(found.window.diverged_at, -1)

  def test_learns(self):
    (batch,) = batches(1)
    train_step = step.make_train_step(TINY, TX, support.SCHEMA)
    current = new_state()
    losses = []
    for _ in range(200):
      current = train_step(current, batch)
      losses.append(float(current.window.loss))
    losses = np.diff([0.0, *losses])
    self.assertLess(losses[-1], 0.8 * losses[0])

  def test_dropout_is_a_function_of_seed_and_step(self):
    model = TinyModel(dropout=0.5)
    train_step = step.make_train_step(model, TX, support.SCHEMA)
    (batch,) = batches(1)

    def loss(at):
      start = new_state(model)
      start = start.replace(step=jnp.asarray(at, jnp.int32))
      return float(train_step(start, batch).window.loss)

    self.assertEqual(loss(0), loss(0))
    self.assertNotEqual(loss(0), loss(1))

  def test_remembers_the_first_step_that_diverged(self):
    (batch,) = batches(1)
    train_step = step.make_train_step(TINY, TX, support.SCHEMA)
    current = train_step(new_state(), batch)
    bad = support.batch(np.random.default_rng(0), 16)
    bad.candidates.features['duration'][:] = np.nan
    for _ in range(2):
      current = train_step(current, bad)
    self.assertEqual(current.window.diverged_at, 1)

  @parameterized.parameters('params', 'tables')
  def test_values_that_overflow_count_as_diverged(self, which):
    (batch,) = batches(1)
    start = new_state()
    tx = optimizer.make_optimizer(
      optimizer.OptimizerConfig(
        **{
          'params': {'learning_rate': 1e38},
          'tables': {
            'table_learning_rate': 1e38,
            'table_optimizer': 'lazy_adam',
          },
        }[which],
        eps=1e-30,
      )
    )
    start = state.create_state(TINY, tx, support.SCHEMA, 3)
    step_of = step.make_train_step(TINY, tx, support.SCHEMA)
    found = step_of(start, batch)
    self.assertTrue(np.isfinite(found.window.loss))
    self.assertEqual(found.window.diverged_at, 0)

  def test_a_batch_of_padding_alone_has_no_loss(self):
    (batch,) = batches(1)
    batch.candidates.mask[:] = False
    found = step.make_train_step(TINY, TX, support.SCHEMA)(new_state(), batch)
    self.assertEqual(found.window.loss, 0)
    self.assertEqual(found.window.diverged_at, -1)


class AverageTest(parameterized.TestCase):
  def test_equals_numpy(self):
    decay = 0.3  # From the fourth step on; a shorter memory before.
    train_step = step.make_train_step(TINY, TX, support.SCHEMA)
    current = new_state(average=decay)
    plain = new_state()
    expected = jax.device_get(current.variables)
    for t, batch in enumerate(batches(5), 1):
      current = train_step(current, batch)
      plain = step.make_train_step(TINY, TX, support.SCHEMA)(plain, batch)
      d = min(decay, t / (9 + t))
      expected = jax.tree.map(
        lambda a, p, d=d: d * a + (1 - d) * np.asarray(p, np.float64),
        expected,
        current.variables,
      )
    chex.assert_trees_all_close(
      current.scoring_variables, expected, rtol=1e-5, atol=1e-7
    )
    # Training itself goes on from the parameters.
    chex.assert_trees_all_equal(current.variables, plain.variables)
    self.assertIsNone(plain.average)
    chex.assert_trees_all_equal(plain.scoring_variables, plain.variables)


@functools.cache
def on_one_device():
  """The state after `batches(3)`."""
  train_step = step.make_train_step(RANKER, TX, support.SCHEMA)
  current = new_state(RANKER)
  for batch in batches(3):
    current = train_step(current, batch)
  return current


class ParallelTest(parameterized.TestCase):
  """Eight fake devices; the suite's conftest makes them."""

  def setUp(self):
    super().setUp()
    self.assertLen(jax.devices(), 8)
    self.data = batches(3)
    self.expected = on_one_device()

  def assert_same(self, found):
    # Eight partial sums in place of one change the last bits of a gradient;
    # Adam's first steps are near its sign, which makes most of small ones.
    found, expected = jax.device_get((found, self.expected))
    chex.assert_trees_all_close(found.variables, expected.variables, atol=1e-5)
    chex.assert_trees_all_close(
      found.window, expected.window, rtol=1e-6, atol=1e-6
    )
    self.assertEqual(found.step, expected.step)

  def test_mesh_equals_one_device(self):
    mesh = sharding.data_mesh()
    train_step = step.make_train_step(RANKER, TX, support.SCHEMA, mesh=mesh)
    found = sharding.replicate(new_state(RANKER), mesh)
    for batch in self.data:
      placed = sharding.put_batch(batch, mesh)
      self.assertLen(placed.group.sharding.device_set, 8)
      self.assertEqual(placed.group.addressable_shards[0].data.shape, (2,))
      found = train_step(found, placed)
    self.assertTrue(found.tables['tables']['item'].is_fully_replicated)
    self.assert_same(found)

  @pytest.mark.slow  # With a tiny model below.
  def test_pmap_equals_jit(self):
    train_step = step.make_pmap_train_step(RANKER, TX, support.SCHEMA)
    found = jax.tree.map(lambda x: jnp.stack([x] * 8), new_state(RANKER))
    for batch in self.data:
      found = train_step(found, step.split_for_pmap(batch, 8))
    for i in (0, 7):
      self.assert_same(jax.tree.map(lambda x, i=i: x[i], found))

  def test_eval_step_on_a_mesh(self):
    mesh = sharding.data_mesh()
    eval_step = step.make_eval_step(RANKER, mesh=mesh)
    variables = sharding.put_variables(self.expected.variables, mesh)
    batch = self.data[-1]
    found = eval_step(variables, sharding.put_batch(batch, mesh))
    expected = step.make_eval_step(RANKER)(self.expected.variables, batch)
    chex.assert_trees_all_close(
      sharding.to_host(found), jax.device_get(expected), atol=1e-5
    )

  @parameterized.parameters('mesh', 'pmap')
  def test_rank_loss_and_average(self, which):
    options = {'rank_loss': losses.RankLossConfig(0.5, 4)}
    one = step.make_train_step(TINY, TX, support.SCHEMA, **options)
    start, found = (new_state(average=0.5) for _ in range(2))
    if which == 'mesh':
      mesh = sharding.data_mesh()
      found = sharding.replicate(found, mesh)
      many = step.make_train_step(
        TINY, TX, support.SCHEMA, **options, mesh=mesh
      )
    else:
      found = jax.tree.map(lambda x: jnp.stack([x] * 8), found)
      many = step.make_pmap_train_step(TINY, TX, support.SCHEMA, **options)
    for batch in self.data:
      start = one(start, batch)
      found = many(
        found,
        sharding.put_batch(batch, mesh)
        if which == 'mesh'
        else step.split_for_pmap(batch, 8),
      )
    if which == 'pmap':
      found = jax.tree.map(lambda x: x[7], found)
    found, start = jax.device_get((found, start))
    # As in `assert_same`.
    for x, y in (
      (found.average, start.average),
      (found.table_average, start.table_average),
    ):
      chex.assert_trees_all_close(x, y, atol=1e-5)
    np.testing.assert_allclose(found.window.loss, start.window.loss, rtol=1e-6)

  @parameterized.parameters('mesh', 'pmap')
  def test_rows_must_divide(self, which):
    (batch,) = batches(1, num_rows=12)
    with self.assertRaisesRegex(
      ValueError, '12 rows cannot be split over 8 devices: pad it'
    ):
      if which == 'mesh':
        sharding.put_batch(batch, sharding.data_mesh())
      else:
        step.split_for_pmap(batch, 8)

  def test_rows_must_agree(self):
    (batch,) = batches(1)
    batch = batch.replace(group=batch.group[:8])
    with self.assertRaisesRegex(ValueError, r'have \[8, 16\] rows'):
      sharding.put_batch(batch, sharding.data_mesh())


if __name__ == '__main__':
  absltest.main()
