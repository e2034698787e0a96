"""A ranker that reads histories with packed weights, in kernels.

These are played by the operations' references.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import ops
from histjax.models import ranker
from histjax.ops import devices, dispatch
from histjax.ops.candidate_tower import api as tower_api
from histjax.ops.candidate_tower import reference as tower_reference
from histjax.ops.interaction_head import api as head_api
from histjax.ops.interaction_head import reference as head_reference
from histjax.ops.keys_values import api, reference
from histjax.types import History
from tests import support

ROWS, EVENTS, NEW = 3, 24, 5
ENCODERS = {
  'causal': {},
  'window': {'window': 3},
  'bidirectional': {'causal': False},
  'recency': {'causal': False, 'positions': 'recency', 'num_recency': 4},
  'cross_only': {'window': 3},
}


@functools.cache
def make(encoder):
  """A model, its variables without and with packed weights, and a batch."""
  fusion = 'cross_only' if encoder == 'cross_only' else 'append_cross'
  config = support.config(dtype='bfloat16', fusion=fusion)
  config = dataclasses.replace(
    config, encoder=dataclasses.replace(config.encoder, **ENCODERS[encoder])
  )
  _, variables = support.init(config)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: x + rng.normal(scale=0.1, size=x.shape).astype(x.dtype), variables
  )
  packed = {**variables, **ranker.pack(config, variables)}
  batch = support.batch(rng, ROWS, EVENTS, 4)
  return ranker.Ranker(config), variables, packed, batch


class PackedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for module, call in (
      (api, reference.keys_values),
      (tower_api, tower_api._of_layer(tower_reference.candidate_tower)),
      (head_api, head_reference.interaction_head),
    ):
      kernel = dispatch.Backend(call, devices.check_hopper)
      self.enter_context(
        mock.patch.dict(module._BACKENDS, {'pallas_gpu': kernel})
      )

  def run_packed(self, model, variables, *args, method):
    """On the target that has the kernels."""
    with (
      ops.target_platform('cuda', compute_capability='9.0'),
      dispatch.record() as used,
    ):
      out = model.apply(variables, *args, method=method)
    self.assertEqual(used['keys_values'], {'pallas_gpu'})
    return out

  def assert_near(self, found, expected, real):
    """Compares real events; all else must be finite."""
    for x, y in zip(
      (found.keys, found.values), (expected.keys, expected.values), strict=True
    ):
      x, y = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
      self.assertTrue(np.isfinite(x).all())
      real = np.broadcast_to(real, x.shape[:3])
      # Values of order 1, rounded to 8 bits a dozen times in two layers.
      np.testing.assert_allclose(x[real], y[real], rtol=0.05, atol=0.05)
    np.testing.assert_array_equal(found.length, expected.length)

  @parameterized.parameters(*ENCODERS)
  def test_encode(self, encoder):
    model, variables, packed, batch = make(encoder)
    found = self.run_packed(model, packed, batch.history, method='encode')
    expected = model.apply(variables, batch.history, method='encode')
    real = np.arange(EVENTS) < np.asarray(batch.history.length)[:, None]
    self.assert_near(found, expected, real)

  @parameterized.parameters('causal', 'window', 'cross_only')
  def test_extend(self, encoder):
    model, variables, packed, batch = make(encoder)
    events = batch.history
    cache = model.apply(variables, events, method='encode')
    length = np.array([0, EVENTS - 2, 7], np.int32)  # One is full after it.
    cache = cache.replace(length=length)
    count = np.array([NEW, 4, 0], np.int32)
    new = History({k: v[:, :NEW] for k, v in events.features.items()}, count)
    found = self.run_packed(model, packed, cache, new, method='extend')
    expected = model.apply(variables, cache, new, method='extend')
    slot = np.arange(EVENTS)[None]
    self.assert_near(found, expected, np.ones((ROWS, EVENTS), bool))
    old = (slot < length[:, None]) | (slot >= (length + count)[:, None])
    np.testing.assert_array_equal(
      np.asarray(found.keys)[:, old], np.asarray(cache.keys)[:, old]
    )

  @parameterized.product(
    encoder=('causal', 'window', 'cross_only'), visible=(False, True)
  )
  def test_extend_and_score(self, encoder, visible):
    model, variables, packed, batch = make(encoder)
    events = batch.history
    cache = model.apply(variables, events, method='encode')
    length = np.array([0, EVENTS - 2, 7], np.int32)  # One is full after it.
    cache = cache.replace(length=length)
    new = np.array([NEW, 2, 0], np.int32)
    new = History({k: v[:, :NEW] for k, v in events.features.items()}, new)
    seen = np.array([[5, 0, 3, 1], [24, 23, 22, 2], [7, 1, 0, 6]], np.int32)
    candidates = batch.candidates.replace(visible=seen if visible else None)
    count = np.array([4, 0, 3], np.int32)
    with mock.patch.object(
      ops, 'candidate_tower', wraps=ops.candidate_tower
    ) as tower:
      found, logits = self.run_packed(
        model,
        packed,
        cache,
        new,
        candidates,
        batch.context,
        count,
        method='extend_and_score',
      )
    self.assert_one_pass(encoder, tower)
    # The two steps with the same weights: as blocks, logits may be further off.
    longer = self.run_packed(model, packed, cache, new, method='extend')
    self.assert_near(found, longer, np.ones((ROWS, EVENTS), bool))
    slot = np.arange(EVENTS)[None]
    old = (slot < length[:, None]) | (slot >= found.length[:, None])
    np.testing.assert_array_equal(
      np.asarray(found.keys)[:, old], np.asarray(cache.keys)[:, old]
    )
    with ops.target_platform('cuda', compute_capability='9.0'):
      expected = model.apply(
        packed, longer, candidates, batch.context, count, method='score_tasks'
      )
    self.assert_logits(logits, expected, count)

  @parameterized.product(encoder=tuple(ENCODERS), visible=(False, True))
  def test_encode_and_score(self, encoder, visible):
    model, _, packed, batch = make(encoder)
    history = batch.history
    history = history.replace(length=np.array([0, EVENTS, 7], np.int32))
    seen = np.array([[0, 0, 0, 0], [24, 23, 22, 2], [7, 1, 0, 6]], np.int32)
    if not model.config.encoder.causal:
      seen = np.broadcast_to(history.length[:, None], (ROWS, 4))
    candidates = batch.candidates.replace(visible=seen if visible else None)
    count = np.array([4, 0, 3], np.int32)
    request = candidates, batch.context, count
    with mock.patch.object(
      ops, 'candidate_tower', wraps=ops.candidate_tower
    ) as tower:
      found, logits = self.run_packed(
        model, packed, history, *request, method='encode_and_score'
      )
    self.assert_one_pass(encoder, tower)
    expected = self.run_packed(model, packed, history, method='encode')
    real = np.arange(EVENTS) < history.length[:, None]
    self.assert_near(found, expected, real)
    with ops.target_platform('cuda', compute_capability='9.0'):
      expected = model.apply(packed, expected, *request, method='score_tasks')
    self.assert_logits(logits, expected, count)

  def assert_one_pass(self, encoder, tower):
    """Events and candidates as a whole block, then candidates alone."""
    queries = [call.args[0].shape[1] for call in tower.call_args_list]
    self.assertEqual(queries, [4] if encoder == 'cross_only' else [64, 4])

  def assert_logits(self, found, expected, count):
    counts = np.arange(4) < count[:, None]
    # A readout may be rounded to another bfloat16, which has 8 bits.
    np.testing.assert_allclose(
      found[counts], expected[counts], rtol=0.02, atol=0.02
    )

  def test_another_tower_has_no_kernel(self):
    model, _, packed, batch = make('causal')
    config = dataclasses.replace(
      model.config,
      encoder=dataclasses.replace(model.config.encoder, candidate_tower='xla'),
    )
    with (
      ops.target_platform('cuda', compute_capability='9.0'),
      dispatch.record() as used,
    ):
      jax.eval_shape(
        lambda history: ranker.Ranker(config).apply(
          packed, history, method='encode'
        ),
        batch.history,
      )
    self.assertNotIn('keys_values', used)

  @parameterized.parameters(
    (None, 'cuda', {'pallas_gpu'}),
    ('pallas_gpu', 'cuda', {'pallas_gpu'}),
    ('xla', 'cuda', None),
    (None, 'cpu', None),
    ('pallas_gpu', 'cpu', NotImplementedError),
  )
  def test_the_named_head(self, name, platform, expected):
    model, _, packed, batch = make('causal')
    config = dataclasses.replace(
      model.config,
      interaction=dataclasses.replace(
        model.config.interaction, implementation=name
      ),
    )
    target = {'compute_capability': '9.0'} if platform == 'cuda' else {}
    with ops.target_platform(platform, **target), dispatch.record() as used:
      run = functools.partial(
        jax.eval_shape, ranker.Ranker(config).apply, packed, batch
      )
      if expected is NotImplementedError:
        with self.assertRaisesRegex(NotImplementedError, 'NVIDIA GPU'):
          run()
        return
      run()
    self.assertEqual(used.get('interaction_head'), expected)


if __name__ == '__main__':
  absltest.main()
