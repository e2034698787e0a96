"""Models that score alike have one fingerprint, others not."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized

from histjax import schema
from histjax.scoring.fingerprint import fingerprint
from tests import support


class FingerprintTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.config = support.config()
    self.variables = {
      'b': {'x': np.arange(6, dtype=np.float32), 'y': np.zeros((0, 3))},
      'a': np.ones((2, 3), np.float32),
    }
    self.expected = fingerprint(self.config, self.variables)

  def test_is_the_same_for_the_same_model(self):
    self.assertRegex(self.expected, '^[0-9a-f]{64}$')
    swapped = {
      'a': self.variables['a'],
      'b': dict(reversed(self.variables['b'].items())),
    }
    self.assertEqual(fingerprint(self.config, swapped), self.expected)
    arrays = {**self.variables, 'a': jax.numpy.asarray(self.variables['a'])}
    self.assertEqual(fingerprint(self.config, arrays), self.expected)
    turned = {**self.variables, 'a': np.asfortranarray(self.variables['a'])}
    self.assertEqual(fingerprint(self.config, turned), self.expected)

  def test_tells_parameters_apart(self):
    a, b = self.variables['a'], self.variables['b']
    nearly = a.copy()
    nearly[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    for variables in (
      {'a': nearly, 'b': b},
      {'a': a.reshape(3, 2), 'b': b},
      {'a': a.view(np.int32), 'b': b},
      {'c': a, 'b': b},
      {'a': a, 'b': {**b, 'x': b['x'][::-1]}},
      {'a': a},
      {'a': a.astype(jax.numpy.bfloat16), 'b': b},
    ):
      self.assertNotEqual(fingerprint(self.config, variables), self.expected)

  @parameterized.parameters(
    {'encoder__causal': False}, {'encoder__window': 3}, {'dtype': 'bfloat16'}
  )
  def test_tells_configs_apart(self, **fields):
    config = support.config(**fields)
    self.assertNotEqual(fingerprint(config, self.variables), self.expected)

  def test_does_not_tell_a_whole_number_from_a_float(self):
    def of(scale):
      items = (schema.Dense('price', scale=scale),)
      fields = dataclasses.replace(support.SCHEMA, item=items)
      return fingerprint(support.config(schema=fields), {})

    self.assertEqual(of(2), of(2.0))
    self.assertNotEqual(of(2), of(3))

  def test_does_not_tell_implementations_apart(self):
    config = support.config(
      encoder__attention='xla', encoder__candidate_tower='reference'
    )
    interaction = dataclasses.replace(config.interaction, implementation='xla')
    config = dataclasses.replace(config, interaction=interaction)
    self.assertEqual(fingerprint(config, self.variables), self.expected)
    schema = dataclasses.replace(self.config.schema, user='u')
    config = dataclasses.replace(self.config, schema=schema)
    self.assertNotEqual(fingerprint(config, self.variables), self.expected)


if __name__ == '__main__':
  absltest.main()
