"""Updates by hand, and who gets which."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from histjax.training import optimizer

PARAMS = {
  'tables': {'item': jnp.ones((3, 2))},
  'mlp': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
}


def update(config, grads, num_steps=None, params=PARAMS):
  """The updates of a sequence of gradients."""
  tx = optimizer.make_optimizer(config, num_steps)
  network = {'mlp': params['mlp']}
  states = [tx.network.init(network), tx.tables.init(params['tables'])]
  found = []
  for number, g in enumerate(grads):
    if tx.clip_norm is not None:
      g, _ = optax.clip_by_global_norm(tx.clip_norm).update(g, None)
    updates, states[0] = tx.network.update(
      {'mlp': g['mlp']}, states[0], network
    )
    network = optax.apply_updates(network, updates)
    rows, states[1] = tx.tables.update(g['tables'], states[1])
    rate = tx.table_rate(number)
    updates['tables'] = jax.tree.map(lambda x, rate=rate: -rate * x, rows)
    found.append(jax.device_get(updates))
  return found, jax.device_get(states)


def grads(table, network=0.0):
  return {
    'tables': {'item': jnp.asarray(table, jnp.float32)},
    'mlp': {
      'kernel': jnp.full((2, 2), network),
      'bias': jnp.full(2, network),
    },
  }


class RowwiseAdagradTest(parameterized.TestCase):
  def test_by_hand(self):
    config = optimizer.OptimizerConfig(
      table_learning_rate=0.1, table_initial=0.5
    )
    g = [[3.0, 4.0], [0.0, 0.0], [1.0, -1.0]]
    (first, second), _ = update(config, [grads(g), grads(g)])
    # a = 0.5 + (9 + 16) / 2 = 13, then 25.5; 0.5; 0.5 + 1 = 1.5, then 2.5.
    expected = np.array(g) / np.sqrt([[13.0], [0.5], [1.5]])
    np.testing.assert_allclose(
      first['tables']['item'], -0.1 * expected, rtol=1e-6
    )
    expected = np.array(g) / np.sqrt([[25.5], [0.5], [2.5]])
    np.testing.assert_allclose(
      second['tables']['item'], -0.1 * expected, rtol=1e-6
    )

  def test_one_number_per_row_and_rows_without_gradient_stay(self):
    tx = optimizer.scale_by_rowwise_adagrad()
    params = {'item': jnp.ones((3, 8))}
    state = tx.init(params)
    chex.assert_shape(state.accumulator['item'], (3, 1))
    g = jnp.zeros((3, 8)).at[1].set(2.0)
    updates, state = tx.update({'item': g}, state, params)
    np.testing.assert_array_equal(updates['item'][0], np.zeros(8))
    np.testing.assert_allclose(updates['item'][1], np.ones(8), rtol=1e-6)
    np.testing.assert_allclose(state.accumulator['item'], [[0.0], [4.0], [0.0]])

  def test_refuses_a_parameter_without_rows(self):
    with self.assertRaisesRegex(ValueError, r"\['bias'\] has shape \(4,\)"):
      optimizer.scale_by_rowwise_adagrad().init({'bias': jnp.ones(4)})


class PartitionTest(parameterized.TestCase):
  def test_network_has_adam(self):
    config = optimizer.OptimizerConfig(learning_rate=0.01)
    (first, second), _ = update(
      config, [grads(np.zeros((3, 2)), 5.0), grads(np.zeros((3, 2)), 1.0)]
    )
    # m / sqrt(v) of the first step is the gradient's sign.
    np.testing.assert_allclose(first['mlp']['bias'], -0.01, rtol=1e-4)
    m = (0.9 * 0.1 * 5 + 0.1 * 1) / (1 - 0.9**2)
    v = (0.999 * 0.001 * 25 + 0.001 * 1) / (1 - 0.999**2)
    np.testing.assert_allclose(
      second['mlp']['kernel'], -0.01 * m / np.sqrt(v), rtol=1e-3
    )
    np.testing.assert_array_equal(first['tables']['item'], np.zeros((3, 2)))

  @parameterized.parameters('rowwise_adagrad', 'lazy_adam')
  def test_only_matrices_of_the_network_decay(self, table_optimizer):
    config = optimizer.OptimizerConfig(
      learning_rate=0.1, weight_decay=0.5, table_optimizer=table_optimizer
    )
    (first,), _ = update(config, [grads(np.zeros((3, 2)))])
    np.testing.assert_allclose(first['mlp']['kernel'], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(first['mlp']['bias'], np.zeros(2))
    np.testing.assert_array_equal(first['tables']['item'], np.zeros((3, 2)))

  def test_tables_may_have_adam_for_each_row(self):
    tx = optimizer.scale_by_lazy_adam(b1=0.8, b2=0.9, eps=0.01)
    adam = optax.scale_by_adam(b1=0.8, b2=0.9, eps=0.01)
    rng = np.random.default_rng(0)
    table = jnp.zeros((3, 2))
    states = [tx.init(table)] + [adam.init(table[r]) for r in range(3)]
    for rows in map(np.array, ([0, 1, 2], [1], [0, 1], [2, 1])):
      g = jnp.asarray(rng.normal(size=(len(rows), 2)), jnp.float32)
      picked = jax.tree.map(lambda x, rows=rows: x[rows], states[0])
      found, after = tx.update(g, picked)
      states[0] = jax.tree.map(
        lambda x, y, rows=rows: x.at[rows].set(y), states[0], after
      )
      for i, r in enumerate(rows):
        expected, states[1 + r] = adam.update(g[i], states[1 + r])
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)
    np.testing.assert_array_equal(states[0].count, [[2], [4], [2]])

  def test_clips_the_norm_of_all_gradients(self):
    config = optimizer.OptimizerConfig(clip_norm=1.0, table_initial=1.0)
    g = grads(np.full((3, 2), 3.0), 4.0)
    norm = np.sqrt(6 * 9 + 6 * 16)
    (first,), _ = update(config, [g])
    clipped = 3 / norm
    np.testing.assert_allclose(
      first['tables']['item'],
      -0.02 * clipped / np.sqrt(1 + clipped**2),
      rtol=1e-5,
    )


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters(
    ('constant', [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ('linear', [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ('cosine', [0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
  )
  def test_values(self, name, expected):
    config = optimizer.OptimizerConfig(schedule=name, warmup_steps=2)
    rate = optimizer.schedule(config, 2.0, 6)
    np.testing.assert_allclose(
      [rate(t) / 2 for t in range(6)], expected, rtol=1e-5
    )

  def test_scales_both(self):
    config = optimizer.OptimizerConfig(warmup_steps=4, table_initial=0.0)
    (first,), _ = update(config, [grads(np.ones((3, 2)), 1.0)])
    np.testing.assert_allclose(first['mlp']['bias'], -1e-3 / 4, rtol=1e-4)
    np.testing.assert_allclose(first['tables']['item'], -0.02 / 4, rtol=1e-4)

  def test_refusals(self):
    config = optimizer.OptimizerConfig(schedule='cosine', warmup_steps=5)
    with self.assertRaisesRegex(ValueError, 'num_steps=None'):
      optimizer.make_optimizer(config)
    with self.assertRaisesRegex(ValueError, 'warmup_steps=5 with num_steps=5'):
      optimizer.make_optimizer(config, 5)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ('learning_rate', 0.0),
    ('learning_rate', float('nan')),
    ('learning_rate', float('inf')),
    ('table_learning_rate', -1.0),
    ('weight_decay', -0.1),
    ('weight_decay', float('inf')),
    ('b1', 1.0),
    ('clip_norm', 0.0),
    ('schedule', 'cosin'),
    ('table_optimizer', 'sgd'),
  )
  def test_refuses(self, field, value):
    with self.assertRaisesRegex(ValueError, f'{field}='):
      dataclasses.replace(optimizer.OptimizerConfig(), **{field: value})


if __name__ == '__main__':
  absltest.main()
