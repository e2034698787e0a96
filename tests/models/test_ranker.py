"""The model against its equations, and what training on rows means."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import schema as schema_lib
from histjax.models import ranker
from histjax.training import state
from histjax.types import Candidates, History, RankingBatch
from tests import oracle, support

# Float32 against float64 through two layers; logits are of order 1.
TOLERANCE = {'rtol': 2e-5, 'atol': 2e-5}
VARIANTS = {
  'causal': {},
  'window': {'encoder__window': 2},
  'bidirectional': {'encoder__causal': False},
  'recency': {
    'encoder__causal': False,
    'encoder__positions': 'recency',
    'encoder__num_recency': 4,
  },
  'no_context': {
    'schema': schema_lib.Schema(
      user='user',
      time='time',
      item=(schema_lib.Categorical('item', 40),),
      tasks=(schema_lib.Task('click'),),
    ),
    'encoder__num_layers': 1,
  },
  'concat': {'fusion': 'concat'},
  'cross_window': {'fusion': 'cross_only', 'encoder__window': 2},
  'concat_window': {'fusion': 'concat', 'encoder__window': 2},
  'mlp': {
    'interaction': support.interaction.InteractionConfig(
      kind='mlp', mlp_widths=(8, 4)
    )
  },
}


@functools.cache
def compiled(variant):
  """The configuration of a variant and its compiled joint pass."""
  config = support.config(**VARIANTS[variant])
  return config, jax.jit(ranker.Ranker(config).apply)


def bce(logits, batch):
  """The sum over real candidates of both tasks' cross entropies."""
  total = jnp.zeros(())
  for task, value in logits.items():
    loss = optax.sigmoid_binary_cross_entropy(value, batch.labels[task])
    total += jnp.where(batch.candidates.mask, loss, 0).sum()
  return total


@functools.cache
def gradient_of_loss(window):
  """Parameters of a ranker and its compiled gradient."""
  model, variables = support.init(support.config(encoder__window=window))

  def loss(variables, batch):
    return bce(model.apply(variables, batch), batch)

  return variables, jax.jit(jax.grad(loss))


@functools.cache
def causal():
  """A compiled `apply`, variables and a batch without padding."""
  config = support.config(encoder__num_layers=1)
  model, variables = support.init(config)
  batch = support.batch(np.random.default_rng(0), 3, 4, 4, shared_visible=True)
  return (
    jax.jit(model.apply, static_argnames='method'),
    variables,
    batch.replace(
      history=batch.history.replace(length=np.full(3, 4, np.int32)),
      candidates=Candidates(batch.candidates.features),
    ),
  )


class RankerTest(parameterized.TestCase):
  @parameterized.parameters(*VARIANTS)
  @support.examples(5)
  @given(seed=st.integers(0, 2**32 - 1))
  def test_equals_the_float64_oracle(self, variant, seed):
    config, apply = compiled(variant)
    _, variables = support.init(config, seed)
    batch = support.batch(
      np.random.default_rng(seed),
      num_events=6,
      schema=config.schema,
      shared_visible=not config.encoder.causal,
    )
    found = jax.device_get(apply(variables, batch))
    for b in range(3):
      length = int(batch.history.length[b])
      events = [
        {k: v[b, i] for k, v in batch.history.features.items()}
        for i in range(length)
      ]
      context = {k: v[b] for k, v in batch.context.items()}
      for c in np.flatnonzero(batch.candidates.mask[b]):
        expected = oracle.logits(
          variables,
          config,
          context,
          events,
          {k: v[b, c] for k, v in batch.candidates.features.items()},
          int(batch.candidates.visible[b, c]),
        )
        np.testing.assert_allclose(
          [found[t.name][b, c] for t in config.schema.tasks],
          expected,
          **TOLERANCE,
        )

  @parameterized.parameters(None, 3)
  @support.examples(5)
  @given(seed=st.integers(0, 2**32 - 1))
  def test_streaming_gradients_are_the_sum_of_pointwise_ones(
    self, window, seed
  ):
    variables, grad = gradient_of_loss(window)
    streaming = support.batch(
      np.random.default_rng(seed), 2, num_events=7, num_candidates=4
    )

    def pointwise(batch):
      """A row per candidate, its history cut to what the candidate sees."""
      count = batch.candidates.visible.shape[1]
      repeated = jax.tree.map(lambda x: x.repeat(count, axis=0), batch)
      column = jax.tree.map(
        lambda x: x.reshape(-1, 1), (batch.candidates, batch.labels)
      )
      visible = batch.candidates.visible.reshape(-1)
      return repeated.replace(
        history=repeated.history.replace(length=visible),
        candidates=column[0],
        labels=column[1],
      )

    expected, found = jax.device_get(
      (grad(variables, pointwise(streaming)), grad(variables, streaming))
    )
    # Sums of up to 8 rows' gradients in another order.
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)
    self.assertGreater(support.norm(expected), 1e-2)

  def test_bfloat16_keeps_float32_parameters_and_logits(self):
    model, variables = support.init(support.config(dtype='bfloat16'))
    chex.assert_trees_all_equal_dtypes(
      variables, jax.tree.map(lambda x: x.astype(np.float32), variables)
    )
    batch = support.batch(np.random.default_rng(0))
    logits = jax.jit(model.apply)(variables, batch)
    exact = compiled('causal')[1](variables, batch)
    for task in logits:
      self.assertEqual(logits[task].dtype, jnp.float32)
      mask = batch.candidates.mask
      # 8 bits of mantissa, about 20 roundings deep.
      np.testing.assert_allclose(
        logits[task][mask], exact[task][mask], rtol=0.1, atol=0.1
      )

  def test_parameters_are_float32_with_x64(self):
    config = support.config(encoder__positions='recency')
    with jax.enable_x64(True):
      batch = support.batch(np.random.default_rng(0), shared_visible=True)
      init = ranker.Ranker(config).init
      found = jax.eval_shape(init, jax.random.key(0), batch)
    for path, x in jax.tree_util.tree_leaves_with_path(found):
      self.assertEqual(x.dtype, jnp.float32, path)

  def test_parameters_are_shared_by_every_way_to_score(self):
    config = support.config()
    model, variables = support.init(config)
    batch = support.batch(np.random.default_rng(0), shared_visible=True)
    cached = jax.eval_shape(
      functools.partial(model.init, method='encode'),
      jax.random.key(0),
      batch.history,
    )
    # `encode` alone makes what it needs, and under the same names.
    flat = jax.tree_util.tree_flatten_with_path(cached)[0]
    self.assertEqual(set(cached), {'params', 'tables'})
    joint = dict(jax.tree_util.tree_flatten_with_path(variables)[0])
    for path, value in flat:
      self.assertEqual(joint[path].shape, value.shape)

  def test_features_of_one_table_share_it(self):
    _, variables = support.init(support.config())
    tables = variables['tables']['tables']
    self.assertEqual(set(tables), {'user', 'item', 'tag', 'rating'})
    self.assertEqual(tables['tag'].shape, (7, 8))
    self.assertNotIn('tables', variables['params'])

  def test_intermediates_can_be_captured(self):
    model, variables = support.init(support.config())
    batch = support.batch(np.random.default_rng(0))
    _, state = jax.eval_shape(
      functools.partial(model.apply, mutable=['intermediates']),
      variables,
      batch,
    )
    captured = state['intermediates']
    self.assertEqual(captured['readout'][0].shape, (3, 5, 16))
    blocks = captured['fusion']
    self.assertEqual(blocks['blocks_0']['attention'][0].shape, (3, 9 + 5, 16))
    # Nothing reads the last layer's events, so it has none.
    self.assertEqual(blocks['blocks_1']['attention'][0].shape, (3, 5, 16))

  def test_dropout_is_on_in_training_alone(self):
    config = support.config(encoder__dropout=0.5, embedding_dropout=0.5)
    model, variables = support.init(config)
    batch = support.batch(np.random.default_rng(0))

    @functools.partial(jax.jit, static_argnames='train')
    def apply(seed, train):
      rngs = {'dropout': jax.random.key(seed)}
      return model.apply(variables, batch, rngs=rngs, train=train)

    def run(seed, train=False):
      return np.asarray(apply(seed, train)['click'])

    np.testing.assert_array_equal(run(0), run(1))
    np.testing.assert_array_equal(run(0, train=True), run(0, train=True))
    self.assertFalse(np.array_equal(run(0, train=True), run(1, train=True)))

  @parameterized.parameters(0, 1)
  def test_bidirectional_visible_is_checked_of_constants_in_jit(self, visible):
    # As in `training.state.create_state`, which initialises on one.
    model = ranker.Ranker(support.config(encoder__causal=False))
    batch = state.example_batch(support.SCHEMA)
    batch = batch.replace(
      candidates=batch.candidates.replace(visible=np.full((1, 1), visible))
    )
    self.assertEqual(batch.history.length.tolist(), [1])
    init = jax.jit(lambda key: model.init(key, batch))
    if visible == 1:
      init.lower(jax.random.key(0))
    else:
      with self.assertRaisesRegex(ValueError, 'differs from history.length'):
        init(jax.random.key(0))

  def test_bidirectional_padding_sees_what_it_likes(self):
    """As `collate` pads: with zeros."""
    config = support.config(encoder__causal=False)
    model = ranker.Ranker(config)
    batch = support.batch(np.random.default_rng(1), shared_visible=True)
    mask = batch.candidates.mask
    self.assertFalse(mask.all())
    shown = batch.candidates.replace(visible=batch.candidates.visible * mask)
    model._check_visible(shown, batch.history.length)
    wrong = shown.replace(visible=shown.visible + mask)
    with self.assertRaisesRegex(ValueError, 'differs from history.length'):
      model._check_visible(wrong, batch.history.length)

  @parameterized.parameters(-1, -(2**31), 40, 2**31 - 1)
  def test_an_id_outside_its_table_is_nan(self, bad):
    """And never another id's vector, in every method."""
    apply, variables, batch = causal()
    num_rows, num_events = batch.history.features['item'].shape

    def broken(part):
      items = part.features['item'].copy()
      items[1, 2] = bad
      return part.replace(features={**part.features, 'item': items})

    def nan(logits):
      return np.isnan(logits['click']).tolist()

    one = np.zeros((num_rows, num_events), bool)
    one[1, 2] = True
    row = np.repeat(np.arange(num_rows)[:, None] == 1, num_events, axis=1)
    history, candidates = broken(batch.history), broken(batch.candidates)

    def encode(history):
      return apply(variables, history, method='encode')

    def score(cache, candidates):
      return apply(variables, cache, candidates, batch.context, method='score')

    good = encode(batch.history)
    for logits, expected in (
      (apply(variables, batch.replace(candidates=candidates)), one),
      (score(good, candidates), one),
      (apply(variables, batch.replace(history=history)), row),
      (score(encode(history), batch.candidates), row),
      (score(good, batch.candidates), np.zeros_like(one)),
    ):
      self.assertEqual(nan(logits), expected.tolist())
    longer = apply(
      variables,
      good.replace(length=good.length - num_events),
      history,
      method='extend',
    )
    self.assertEqual(nan(score(longer, batch.candidates)), row.tolist())

  def test_missing_feature(self):
    model, variables = support.init(support.config())
    batch = support.batch(np.random.default_rng(0))
    batch = batch.replace(
      context={k: v for k, v in batch.context.items() if k != 'user'}
    )
    with self.assertRaisesRegex(ValueError, "feature 'user' is missing"):
      jax.eval_shape(model.apply, variables, batch)

  @parameterized.parameters(
    (lambda x: None, r"^variables\['params'\]\['fusion'\].* is missing"),
    (lambda x: x['params'], r"^variables\['fusion'\].* is not of this config"),
    (lambda x: {'params': x['params']}, r"\['tables'\].* is missing"),
    (lambda x: {**x, 'tower': np.ones(1)}, r"\['tower'\] is not of this"),
    (lambda x: jax.tree.map(np.int32, x), 'is int32, no floating type'),
  )
  def test_check_variables(self, change, message):
    config = support.config()
    _, variables = support.init(config)
    ranker.check_variables(config, variables)
    with self.assertRaisesRegex(ValueError, message):
      ranker.check_variables(config, change(variables))

  @parameterized.parameters(
    ({'encoder__num_layers': 1}, r"'blocks_1'.*\] is not of this config"),
    ({'encoder__num_layers': 3}, r"'blocks_2'.*\] is missing"),
    ({'encoder__width': 8}, r'has shape \(16,\), not \(8,\)'),
    (
      {'schema': support.SCHEMA.with_tasks(['like'])},
      r'shape \(2,\), not \(1,',
    ),
    (
      {
        'interaction': support.interaction.InteractionConfig(
          kind='mlp', mlp_widths=(16, 8)
        )
      },
      r"'cross_.*\] is not of this config",
    ),
  )
  def test_check_variables_of_another_config(self, fields, message):
    """Some of which would be scored, as another model's."""
    _, variables = support.init(support.config())
    with self.assertRaisesRegex(ValueError, message):
      ranker.check_variables(support.config(**fields), variables)

  def test_check_variables_of_kernels_that_are_not_here(self):
    config = support.config(
      encoder__attention='pallas_gpu', encoder__candidate_tower='pallas_gpu'
    )
    ranker.check_variables(config, support.init(support.config())[1])

  @parameterized.parameters(
    ({'fusion': 'append'}, "fusion='append' is unknown.*append_cross"),
    ({'dtype': 'float16'}, "dtype='float16' must be"),
    ({'embedding_dim': 0}, 'embedding_dim=0'),
    ({'encoder__width': 15}, 'multiple of encoder.num_heads=2'),
    ({'encoder__width': 6}, 'must be even'),
    ({'encoder__dropout': 1.0}, 'encoder.dropout=1.0'),
    (
      {'fusion': 'append_isolated', 'encoder__candidate_tower': 'xla'},
      "candidate_tower='xla', but fusion='append_isolated' has no tower; set",
    ),
    (
      {'fusion': 'cross_only', 'encoder__causal': False},
      "causal=False, but with fusion='cross_only' events see no",
    ),
    ({'encoder__num_layers': 0}, 'encoder.num_layers=0'),
    ({'encoder__remat': 'dots'}, r"encoder.remat='dots' must be .*dots_saveab"),
    ({'encoder__positions': 'sine'}, "EncoderConfig.positions='sine'"),
    (
      {'encoder__causal': False, 'encoder__window': 4},
      'needs encoder.causal=True',
    ),
  )
  def test_bad_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      support.config(**fields)

  @parameterized.parameters(
    ({'kind': 'fm'}, "kind='fm'"),
    ({'cross_rank': 0}, 'cross_rank=0'),
    ({'mlp_widths': ()}, 'at least one layer'),
  )
  def test_bad_interaction(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      support.interaction.InteractionConfig(**fields)


class CostTest(parameterized.TestCase):
  """Floating-point operations, as XLA counts them, against the design's.

  A layer costs, per history token, keys and values (4 D^2), the query and
  output projections (4 D^2), the MLP (16 D^2) and attention (4 L D); per
  candidate token the same without keys and values. The last layer needs of
  the history keys and values alone. The dense implementation is counted,
  since XLA counts a loop's body once.
  """

  DIM, LAYERS = 128, 3

  def setUp(self):
    super().setUp()
    schema = schema_lib.Schema(
      user='user',
      time='time',
      item=(schema_lib.Categorical('item', 10),),
      action=(schema_lib.Categorical('rating', 5),),
      tasks=(schema_lib.Task('click'),),
    )
    self.config = support.config(
      schema=schema,
      encoder__num_layers=self.LAYERS,
      encoder__width=self.DIM,
      encoder__attention='reference',
      interaction=support.interaction.InteractionConfig(
        kind='mlp', mlp_widths=(4,)
      ),
    )
    self.model, variables = support.init(self.config)
    self.variables = variables

  def flops(self, function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.cost_analysis()['flops']

  def rows(self, n, m):
    rng = np.random.default_rng(0)
    schema = self.config.schema
    return RankingBatch(
      context={},
      history=History(
        support.features(rng, schema.history_features, (1, n)),
        np.full(1, n, np.int32),
      ),
      candidates=Candidates(support.features(rng, schema.item, (1, m))),
      labels={},
      group=np.zeros(1, np.int32),
    )

  def joint(self, n, m):
    return self.flops(self.model.apply, self.variables, self.rows(n, m))

  def cached(self, n, m):
    batch = self.rows(n, m)
    cache = jax.eval_shape(
      lambda v, b: self.model.apply(v, b.history, method='encode'),
      self.variables,
      batch,
    )
    return self.flops(
      lambda v, c, x: self.model.apply(v, c, x, {}, method='score'),
      self.variables,
      cache,
      batch.candidates,
    )

  @parameterized.parameters((128, 128), (512, 128), (128, 512), (512, 512))
  def test_joint(self, n, m):
    d, layers = self.DIM, self.LAYERS
    candidates = layers * m * (20 * d**2 + 4 * n * d)
    history = (layers - 1) * n * (24 * d**2 + 4 * n * d) + n * 4 * d**2
    measured = self.joint(n, m)
    self.assertLess(abs(measured / (history + candidates) - 1), 0.1)
    # Never above `l (n + m) d^2 + l n (n + m) d` with those constants.
    self.assertLess(measured, 1.1 * layers * (n + m) * (24 * d**2 + 4 * n * d))

  def test_cached_is_linear_in_candidates_and_in_events(self):
    base = self.cached(256, 256)
    self.assertLess(abs(self.cached(256, 512) / base - 2), 0.02)
    self.assertLess(abs(self.cached(256, 1024) / base - 4), 0.04)
    costs = [self.cached(n, 256) for n in (256, 512, 768, 1024)]
    steps = np.diff(costs)
    np.testing.assert_allclose(steps, steps[0], rtol=0.01)
    expected = self.LAYERS * 256 * 4 * 256 * self.DIM
    np.testing.assert_allclose(steps, expected, rtol=0.1)
