"""The weights that are shown are those that the model takes."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.models import ranker
from histjax.scoring import Scorer, ScorerConfig
from histjax.scoring.attention import last_attention
from histjax.types import KeyRange
from tests import support


class WeightsTest(parameterized.TestCase):
  def test_weigh_the_values(self):
    """Of the operation: its output is weights times values."""
    rng = np.random.default_rng(0)
    query, key, value = (
      rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 7, 7)
    )
    start = rng.integers(0, 4, (2, 5)).astype(np.int32)
    stop = start + rng.integers(0, 4, (2, 5)).astype(np.int32)  # Some empty.
    key_range = KeyRange(start, stop)
    weights = ops.attention_weights(query, key, key_range)
    out = ops.history_attention(
      query, key, value, key_range, implementation='reference'
    )
    np.testing.assert_allclose(
      np.einsum('bnql,blnh->bqnh', weights, value), out, atol=1e-6
    )
    empty = (start == stop)[:, None].repeat(3, axis=1)
    total = np.asarray(weights.sum(axis=-1))
    np.testing.assert_allclose(total, np.where(empty, 0, 1), atol=1e-6)

  @parameterized.parameters(
    {}, {'encoder__window': 3}, {'encoder__num_layers': 1},
    {'encoder__causal': False}, {'fusion': 'cross_only'},
  )  # fmt: skip
  def test_of_the_last_layer(self, **fields):
    """Weights times cached values is what the last block attended to."""
    config = support.config(**fields)
    model, variables = support.init(config)
    batch = support.batch(np.random.default_rng(1), shared_visible=True)
    scorer = Scorer(config, variables)
    cache = scorer.encode(batch.history)
    rows = len(batch.history.length)
    cache = cache.replace(  # Without the rows of padding.
      keys=cache.keys[:, :rows],
      values=cache.values[:, :rows],
      length=cache.length[:rows],
    )
    weights = last_attention(
      config, variables, cache, batch.candidates, batch.context
    )
    _, sown = jax.jit(
      lambda x: model.apply(variables, x, mutable=['intermediates'])
    )(batch)
    last = sown['intermediates']['fusion'][
      f'blocks_{config.encoder.num_layers - 1}'
    ]['attention'][0]
    found = np.einsum('bncl,blnh->bcnh', weights, cache.values[-1])
    real = batch.candidates.mask
    np.testing.assert_allclose(
      found.reshape(last.shape)[real],
      np.asarray(last)[real],
      atol=1e-5,  # Float32, of order 1.
    )

  def test_of_states_in_8_bits(self):
    config = support.config()
    _, variables = support.init(config)
    batch = support.batch(np.random.default_rng(1), shared_visible=True)
    found = []
    for kind in (None, 'int8'):
      scorer = Scorer(config, variables, ScorerConfig(cache_dtype=kind))
      cache = scorer.encode(batch.history)
      rows = cache.num_rows - len(batch.history.length)
      padded = jax.tree.map(
        lambda x, rows=rows: np.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1)),
        (batch.candidates, batch.context),
      )
      found.append(last_attention(config, variables, cache, *padded))
    self.assertGreater(found[0].max(), 0)
    # Of 8 bits.
    np.testing.assert_allclose(found[1], found[0], atol=0.02)

  def test_other_fusions(self):
    for fusion, error in (
      ('append_isolated', NotImplementedError), ('concat', ValueError)
    ):  # fmt: skip
      config = support.config(fusion=fusion)
      with self.assertRaisesRegex(error, fusion):
        last_attention(config, {}, None, None, {})

  def test_nothing_is_sown_unasked(self):
    config = support.config()
    batch = support.batch(np.random.default_rng(1), shared_visible=True)
    shapes = jax.eval_shape(
      ranker.Ranker(config).init, jax.random.key(0), batch
    )
    self.assertEqual(set(shapes), {'params', 'tables'})


if __name__ == '__main__':
  absltest.main()
