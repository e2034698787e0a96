"""Programs read the parameters that a scorer was given."""

import chex
import numpy as np
from absl.testing import absltest, parameterized

from histjax.models import ranker
from histjax.nn import interaction
from histjax.scoring import weights
from tests import support


class WeightsTest(parameterized.TestCase):
  @parameterized.parameters(
    {}, {'fusion': 'concat'}, {'dtype': 'bfloat16'}, {'encoder__num_layers': 1}
  )
  def test_round_trip(self, **fields):
    config = support.config(**fields)
    _, variables = support.init(config)
    packed, spec = weights.pack(config, variables)
    found = spec.variables(packed)
    expected = {**variables, **ranker.pack(config, variables)}
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)
    # Tables, one array of all others, and the tower's.
    self.assertEqual(
      spec.small.count(False), len(variables['tables']['tables'])
    )
    self.assertLess(len(packed), 20)

  def test_spec_is_of_the_config_alone(self):
    config = support.config()
    specs = [
      weights.pack(config, support.init(config, i)[1])[1] for i in (0, 1)
    ]
    self.assertEqual(*specs)
    self.assertEqual(*map(hash, specs))
    other = support.config(embedding_dim=9)
    spec = weights.pack(other, support.init(other)[1])[1]
    self.assertNotEqual(spec, specs[0])

  def test_large_ones_are_not_joined(self):
    large = np.zeros((weights._SMALL + 1,), np.float32)
    packed, spec = weights.pack(
      support.config(
        fusion='concat',
        interaction=interaction.InteractionConfig(implementation='xla'),
      ),
      {
        'params': {'a': large, 'b': np.ones(3, np.float32)},
        'state': {'c': np.ones(3, np.int32)},
        'tables': {'d': np.ones(3, np.float32)},  # As many as there are ids.
      },
    )
    self.assertEqual(spec.small, (False, True, False, False))
    self.assertEqual(
      [x.shape for x in packed[:4]], [(3,), large.shape, (3,), (3,)]
    )


if __name__ == '__main__':
  absltest.main()
