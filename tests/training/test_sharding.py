"""Tables split over eight fake devices train as on one."""

import functools
import tempfile
from unittest import mock

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from histjax.training import checkpoints, optimizer, sharding, state, step
from tests import support
from tests.training import test_tables

BOTH = (('^tables/', P(('data', 'table'))), ('.*', P()))
OF_NETWORK = (
  ('^tables/', P('table')), ('Dense_0/bias', P('table')), ('.*', P())
)  # fmt: skip
MODEL = test_tables.TinyModel(row_multiple=8)
TX = optimizer.make_optimizer(
  optimizer.OptimizerConfig(table_learning_rate=0.1, clip_norm=1.0)
)
STEPS = 50


def mesh(num_devices, table):
  return sharding.data_mesh(jax.devices()[:num_devices], table=table)


@functools.cache
def batches():
  rng = np.random.default_rng(5)
  found = [support.batch(rng, num_rows=8, num_events=4) for _ in range(STEPS)]
  found[-1].candidates.mask[2:] = False
  return found


def create(on, rules=None):
  return state.create_state(
    MODEL, TX, support.SCHEMA, 0, average=0.9, mesh=on, rules=rules
  )


def train(current, on, rules=None, *, start=0, stop=STEPS, rows=None):
  train_step = step.make_train_step(
    MODEL, TX, support.SCHEMA, mesh=on, rules=rules
  )
  for batch in batches()[start:stop]:
    if rows is not None:  # Those of this process.
      batch = jax.tree.map(lambda x: x[rows], batch)
    current = train_step(current, sharding.put_batch(batch, on))
  return current


@functools.cache
def on_one():
  """The state after all steps, on the host, and the logits after them."""
  found = train(create(mesh(1, 1)), mesh(1, 1))
  logits = step.make_eval_step(MODEL)(found.scoring_variables, batches()[0])
  return everything(found), jax.device_get(logits)


def everything(current):
  return jax.device_get(
    (
      current.variables,
      current.scoring_variables,
      current.opt_state,
      current.table_state,
      current.window,
    )
  )


def assert_close(found, expected):
  # Eight partial sums in place of one change the last bits of a gradient.
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


class ShardedTest(parameterized.TestCase):
  @parameterized.parameters(
    (8, 8, None, (5, 4)),
    (8, 4, None, (10, 4)),
    (8, 4, BOTH, (5, 4)),
    (8, 2, OF_NETWORK, (20, 4)),
  )
  def test_steps_equal_those_of_one_device(self, number, table, rules, shape):
    on = mesh(number, table)
    found = train(create(on, rules), on, rules)
    for x in (
      found.tables['tables']['item'],
      found.table_average['item'].value,
    ):
      self.assertEqual(x.shape, (40, 4))
      self.assertEqual(x.addressable_shards[0].data.shape, shape)
    expected, logits = on_one()
    assert_close(everything(found), expected)
    evaluate = step.make_eval_step(
      MODEL, schema=support.SCHEMA, mesh=on, rules=rules
    )
    batch = sharding.put_batch(batches()[0], on)
    mask = batches()[0].candidates.mask
    logits_found = sharding.to_host(evaluate(found.scoring_variables, batch))
    for task, value in logits_found.items():
      assert_close(value[mask], logits[task][mask])

  def test_rows_sent_in_the_type_that_they_are_read_in(self):
    self.enterContext(mock.patch.object(step, '_SMALL', 0))
    model = test_tables.TinyModel(row_multiple=8, dtype='bfloat16')
    found = []
    for number, dtype in (1, 'float32'), (8, 'bfloat16'):
      on = mesh(number, number)
      train_step = step.make_train_step(
        model, TX, support.SCHEMA, row_dtype=dtype, mesh=on
      )
      current = state.create_state(model, TX, support.SCHEMA, 0, mesh=on)
      placed = [sharding.put_batch(batch, on) for batch in batches()[:3]]
      program = train_step.lower(current, placed[0]).as_text()
      for batch in placed:
        current = train_step(current, batch)
      found.append(everything(current))
    self.assertRegex(program, r'\}\) : \(tensor<40x4xbf16>\)')  # Is summed.
    assert_close(found[1], found[0])

  def test_a_checkpoint_goes_on_on_other_devices(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    eight, two = mesh(8, 8), mesh(2, 2)
    half = train(create(eight), eight, stop=STEPS // 2)
    with checkpoints.Checkpoints(folder) as manager:
      manager.save(half, {'best_step': None, 'config': {}})
      found, _ = manager.restore(create(two))
    item = found.tables['tables']['item']
    self.assertEqual(item.addressable_shards[0].data.shape, (20, 4))
    self.assertLen(item.sharding.device_set, 2)
    found = train(found, two, start=STEPS // 2)
    assert_close(everything(found), on_one()[0])


class RulesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.variables = jax.eval_shape(
      lambda: state.create_state(MODEL, TX, support.SCHEMA, 0).variables
    )

  def test_the_first_rule_that_matches(self):
    rules = (('tables/rating', P()), *BOTH)
    found = sharding.specs(self.variables, mesh(8, 4), rules)
    self.assertEqual(found['tables']['tables']['rating'], P())
    self.assertEqual(found['tables']['tables']['item'], P(('data', 'table')))
    self.assertEqual(
      set(jax.tree.leaves(found['params'], is_leaf=lambda x: isinstance(x, P))),
      {P()},
    )

  def test_what_is_printed(self):
    lines = sharding.describe(self.variables, mesh(8, 4)).splitlines()
    self.assertIn("'data': 2, 'table': 4", lines[0])
    self.assertRegex(lines[1], r"^  \^tables/ +P\('table',\) +4 arrays")
    self.assertRegex(lines[2], r'^  \.\* +P\(\) +4 arrays')

  @parameterized.parameters(
    ((('.*', P()), ('tabels/', P('table'))), "'tabels/' says nothing"),
    ((('^tables/', P()),), "no sharding rule is of 'params/Dense_0/bias'"),
    ((('.*', P('tables')),), r"has the axes \['tables'\]; the mesh has"),
    ((('item', P(None, 'table')), ('.*', P())), 'of a table, rows may'),
  )
  def test_refuses(self, rules, message):
    with self.assertRaisesRegex(ValueError, message):
      sharding.specs(self.variables, mesh(8, 4), rules)

  def test_rows_that_cannot_be_split(self):
    with self.assertRaisesRegex(
      ValueError, r"tables/item', \[40, 4\].*model.table_row_multiple=7"
    ):
      sharding.specs(self.variables, mesh(7, 7))

  @parameterized.parameters(0, 3)
  def test_a_mesh_that_cannot_be(self, table):
    with self.assertRaisesRegex(ValueError, f'table={table}: .*8 devices'):
      sharding.data_mesh(table=table)


if __name__ == '__main__':
  absltest.main()
