"""A bad batch is caught on the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax.data import batches
from tests import support


def batch():
  return support.batch(np.random.default_rng(0))


def put(values, place, value):
  values = np.array(values)
  values[place] = value
  return values


class ValidateBatchTest(parameterized.TestCase):
  def test_good(self):
    batches.validate_batch(batch(), support.SCHEMA)
    on_device = jax.tree.map(jnp.asarray, batch())
    batches.validate_batch(on_device, support.SCHEMA)

  def test_serving(self):
    good = batch()
    bare = dataclasses.replace(
      good,
      labels={},
      candidates=dataclasses.replace(good.candidates, visible=None, mask=None),
    )
    batches.validate_batch(bare, support.SCHEMA)

  @parameterized.named_parameters(
    (
      'history_id',
      'history',
      'item',
      (1, 2),
      40,
      r"history.features\['item'\]\[1, 2\] = 40; it must lie in \[0, 39\]",
    ),
    (
      'candidate_id',
      'candidates',
      'tag_0',
      (0, 0),
      -1,
      r"candidates.features\['tag_0'\]\[0, 0\] = -1; .* \[0, 6\]",
    ),
    (
      'dense',
      'candidates',
      'duration',
      (2, 1),
      np.nan,
      r"candidates.features\['duration'\]\[2, 1\] = nan; it must be finite",
    ),
  )
  def test_feature(self, part, name, place, value, message):
    bad = batch()
    features = getattr(bad, part).features
    features[name] = put(features[name], place, value)
    with self.assertRaisesRegex(ValueError, message):
      batches.validate_batch(bad, support.SCHEMA)

  def test_context(self):
    bad = batch()
    bad.context['user'] = bad.context['user'] + 50
    with self.assertRaisesRegex(ValueError, r"context\['user'\]\[0\]"):
      batches.validate_batch(bad, support.SCHEMA)

  def test_beyond_the_history(self):
    bad = batch()
    b = int(np.argmin(bad.history.length))
    length = int(bad.history.length[b])
    self.assertLess(length, 9)  # There is padding to run into.
    visible = put(bad.candidates.visible, (b, 3), length + 1)
    bad = dataclasses.replace(
      bad, candidates=dataclasses.replace(bad.candidates, visible=visible)
    )
    with self.assertRaisesRegex(
      ValueError,
      rf'visible\[{b}, 3\] = {length + 1} is beyond the history: '
      rf'history.length\[{b}\] = {length};',
    ):
      batches.validate_batch(bad, support.SCHEMA)

  @parameterized.named_parameters(
    (
      'too_long',
      'length',
      [9, 10, 0],
      r'history.length\[1\] = 10; .* \[0, 9\]',
    ),
    ('float', 'length', [1.0, 2.0, 3.0], 'history.length is float64'),
    ('shape', 'length', [[1], [2], [3]], r'length has shape \(3, 1\)'),
  )
  def test_history(self, field, values, message):
    bad = batch()
    history = dataclasses.replace(bad.history, **{field: np.array(values)})
    with self.assertRaisesRegex(ValueError, message):
      batches.validate_batch(
        dataclasses.replace(bad, history=history), support.SCHEMA
      )

  def test_labels(self):
    bad = batch()
    place = tuple(np.argwhere(bad.candidates.mask)[0])
    padding = tuple(np.argwhere(~bad.candidates.mask)[0])
    bad.labels['like'] = put(bad.labels['like'], padding, 7)
    batches.validate_batch(bad, support.SCHEMA)  # Padding is not read.
    bad.labels['like'] = put(bad.labels['like'], place, 0.5)
    with self.assertRaisesRegex(ValueError, r"labels\['like'\].* 0.5; a label"):
      batches.validate_batch(bad, support.SCHEMA)

  def test_names(self):
    bad = batch()
    bad.candidates.features['rating'] = bad.candidates.features['item']
    with self.assertRaisesRegex(
      ValueError, r"candidates.*unknown \['rating'\]"
    ):
      batches.validate_batch(bad, support.SCHEMA)
    bad = batch()
    del bad.history.features['rating']
    with self.assertRaisesRegex(ValueError, r"history.*lacks \['rating'\]"):
      batches.validate_batch(bad, support.SCHEMA)
    bad = batch()
    bad.labels['clik'] = bad.labels.pop('click')
    with self.assertRaisesRegex(ValueError, r"labels lacks \['click'\]"):
      batches.validate_batch(bad, support.SCHEMA)

  def test_shapes_and_types(self):
    bad = batch()
    bad.history.features['item'] = bad.history.features['item'][:, :-1]
    with self.assertRaisesRegex(ValueError, r'has shape'):
      batches.validate_batch(bad, support.SCHEMA)
    bad = batch()
    bad.context['user'] = bad.context['user'].astype(np.float32)
    with self.assertRaisesRegex(ValueError, r"context\['user'\] is float32"):
      batches.validate_batch(bad, support.SCHEMA)
    bad = batch()
    bad.context['age'] = np.arange(3)
    with self.assertRaisesRegex(ValueError, r"context\['age'\] is int64"):
      batches.validate_batch(bad, support.SCHEMA)
    bad = batch()
    mask = bad.candidates.mask.astype(np.float32)
    bad = dataclasses.replace(
      bad, candidates=dataclasses.replace(bad.candidates, mask=mask)
    )
    with self.assertRaisesRegex(ValueError, 'mask is float32'):
      batches.validate_batch(bad, support.SCHEMA)
    bad = dataclasses.replace(batch(), group=np.zeros((3, 1), np.int32))
    with self.assertRaisesRegex(ValueError, 'batch.group has shape'):
      batches.validate_batch(bad, support.SCHEMA)


if __name__ == '__main__':
  absltest.main()
