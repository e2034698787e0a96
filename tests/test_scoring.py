"""Joint, plain and cached scores are one; nothing but the user matters."""

from unittest import mock

import chex
import jax
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops, padding, scoring
from histjax.models import ranker
from histjax.ops import dispatch
from histjax.ops.candidate_tower import api
from histjax.types import Candidates, History
from tests import marks, support

# Sums run in another order in each way of scoring; logits are of order 1.
TOLERANCE = {
  'float32': {'rtol': 1e-5, 'atol': 1e-5},
  # 8 bits of mantissa, about 20 roundings deep.
  'bfloat16': {'rtol': 0.05, 'atol': 0.05},
}
VARIANTS = {
  'causal': {},
  'window': {'encoder__window': 3},
  'bidirectional': {'encoder__causal': False},
  'recency': {
    'encoder__causal': False,
    'encoder__positions': 'recency',
    'encoder__num_recency': 6,
  },
  'no_positions': {'encoder__positions': 'none'},
  'one_layer': {'encoder__num_layers': 1},
  'mlp': {
    'interaction': support.interaction.InteractionConfig(
      kind='mlp', mlp_widths=(8,)
    )
  },
  'bfloat16': {'dtype': 'bfloat16'},
}
ISOLATED = {
  'isolated': {'fusion': 'append_isolated'},
  'isolated_window': {'fusion': 'append_isolated', 'encoder__window': 3},
  'isolated_bidirectional': {
    'fusion': 'append_isolated',
    'encoder__causal': False,
  },
  'isolated_bfloat16': {'fusion': 'append_isolated', 'dtype': 'bfloat16'},
}
SEEDS = st.integers(0, 2**32 - 1)
_SCORERS: dict = {}


def scorer(variant='causal', **options) -> scoring.Scorer:
  """One scorer per variant for the whole file: compiling takes the time."""
  key = (variant, tuple(sorted(options.items())))
  if key not in _SCORERS:
    config = support.config(**{**VARIANTS, **ISOLATED}[variant])
    _, params = support.init(config)
    _SCORERS[key] = scoring.Scorer(
      config, params, scoring.ScorerConfig(**options)
    )
  return _SCORERS[key]


def real(logits, batch):
  """The logits of real candidates, `[number, T]`."""
  mask = batch.candidates.mask
  return np.stack([np.asarray(v)[mask] for v in logits.values()], axis=-1)


def cached(s, batch):
  return s.score(s.encode(batch.context, batch.history), batch.candidates)


def rows(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


class EquivalenceTest(parameterized.TestCase):
  @parameterized.parameters(*VARIANTS, *ISOLATED)
  @given(seed=SEEDS)
  def test_joint_equals_plain_equals_cached(self, variant, seed):
    s = scorer(variant)
    batch = support.batch(
      np.random.default_rng(seed),
      shared_visible=not s.config.encoder.causal,
    )
    tolerance = TOLERANCE[s.config.dtype]
    plain = real(s.score_plain(batch), batch)
    np.testing.assert_array_equal(np.isfinite(plain), True)
    np.testing.assert_allclose(
      real(s.score_joint(batch), batch), plain, **tolerance
    )
    np.testing.assert_allclose(
      real(cached(s, batch), batch), plain, **tolerance
    )

  @parameterized.parameters(
    'causal', 'window', 'bfloat16', 'isolated', 'isolated_window'
  )
  @given(seed=SEEDS)
  def test_extend_event_by_event_equals_encode_at_once(self, variant, seed):
    s = scorer(variant)
    rng = np.random.default_rng(seed)
    batch = support.batch(rng, num_events=6)
    history = batch.history
    cache = s.encode(batch.context, history.replace(length=0 * history.length))
    for i in range(6):
      event = History(
        {k: v[:, i : i + 1] for k, v in history.features.items()},
        (i < history.length).astype(np.int32),
      )
      cache = s.extend(cache, event)
    tolerance = TOLERANCE[s.config.dtype]
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates), batch),
      real(cached(s, batch), batch),
      **tolerance,
    )

  @given(seed=SEEDS)
  def test_extend_by_ragged_blocks(self, seed):
    s = scorer()
    rng = np.random.default_rng(seed)
    batch = support.batch(rng, num_events=20)
    length = batch.history.length
    first = rng.integers(0, length + 1, dtype=np.int32)
    start = batch.history.replace(length=first)
    column = np.minimum(first[:, None] + np.arange(20)[None], 19)
    rest = History(
      {
        k: np.take_along_axis(v, column, axis=1)
        for k, v in batch.history.features.items()
      },
      length - first,
    )
    cache = s.extend(s.encode(batch.context, start), rest)
    np.testing.assert_array_equal(np.asarray(cache.length)[:3], length)
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates), batch),
      real(cached(s, batch), batch),
      **TOLERANCE['float32'],
    )

  def test_extend_grows_past_its_bucket(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(0), num_events=40)
    full = batch.history.replace(length=np.full(3, 40, np.int32))
    batch = batch.replace(
      history=full, candidates=batch.candidates.replace(visible=None)
    )
    cache = s.encode(batch.context, full.replace(length=full.length * 0 + 15))
    self.assertEqual(cache.capacity, 16)
    tail = History(
      {k: v[:, 15:] for k, v in full.features.items()}, full.length - 15
    )
    cache = s.extend(cache, tail)
    self.assertEqual(cache.capacity, 64)
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates), batch),
      real(s.score_plain(batch), batch),
      **TOLERANCE['float32'],
    )

  def test_visible_none_is_the_whole_history(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(1), shared_visible=True)
    without = batch.replace(candidates=batch.candidates.replace(visible=None))
    chex.assert_trees_all_equal(s.score_joint(batch), s.score_joint(without))
    chex.assert_trees_all_equal(cached(s, batch), cached(s, without))

  def test_history_matters_where_it_is_visible_and_nowhere_else(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(2), num_events=8)
    length = np.full(3, 8, np.int32)
    visible = np.full((3, 5), 4, np.int32)
    batch = batch.replace(
      history=batch.history.replace(length=length),
      candidates=batch.candidates.replace(visible=visible),
    )

    def changed(at):
      items = batch.history.features['item'].copy()
      items[:, at] = (items[:, at] + 1) % 40
      history = batch.history.replace(
        features={**batch.history.features, 'item': items}
      )
      return real(s.score_joint(batch.replace(history=history)), batch)

    before = real(s.score_joint(batch), batch)
    for at in range(8):
      if at < 4:
        self.assertGreater(np.abs(changed(at) - before).min(), 1e-6)
      else:
        np.testing.assert_array_equal(changed(at), before)

  @parameterized.parameters(
    ('append_cross', 5),  # Two layers of 3: five events back.
    ('append_isolated', 5),
    ('append_self', 3),
    ('concat', 7),  # The mean reads events, which have seen two windows.
    ('mean_pool', 3),
  )
  def test_window_bounds_the_receptive_field(self, fusion, reach):
    config = support.config(fusion=fusion, encoder__window=3)
    self.assertEqual(config.receptive_field, reach)
    s = scoring.Scorer(config, support.init(config)[1])
    batch = support.batch(np.random.default_rng(3), num_events=8)
    batch = batch.replace(
      history=batch.history.replace(length=np.full(3, 8, np.int32)),
      candidates=batch.candidates.replace(visible=None),
    )
    before = real(s.score_joint(batch), batch)
    for at in range(8):
      items = batch.history.features['item'].copy()
      items[:, at] = (items[:, at] + 1) % 40
      history = batch.history.replace(
        features={**batch.history.features, 'item': items}
      )
      after = real(s.score_joint(batch.replace(history=history)), batch)
      self.assertEqual(bool((after == before).all()), at < 8 - reach)


class InvarianceTest(parameterized.TestCase):
  @marks.slow_unless(lambda variant, way, seed: seed == 0)
  @parameterized.parameters(
    *(
      {'variant': variant, 'way': way, 'seed': seed}
      for variant, num_seeds in (('causal', 3), ('isolated', 1))
      for way in ('joint', 'plain', 'cached')
      for seed in range(num_seeds)
    )
  )
  def test_order_count_neighbours_and_padding_change_nothing(
    self, variant, way, seed
  ):
    s = scorer(variant)
    score = {
      'joint': s.score_joint,
      'plain': s.score_plain,
      'cached': lambda b: cached(s, b),
    }[way]
    rng = np.random.default_rng(seed)
    batch = support.batch(rng)
    expected = score(batch)

    def check(other, columns=slice(None), row=slice(None)):
      found = score(other)
      for task, logits in expected.items():
        mask = batch.candidates.mask[row][:, columns]
        np.testing.assert_allclose(
          np.asarray(found[task])[: mask.shape[0], : mask.shape[1]][mask],
          np.asarray(logits)[row][:, columns][mask],
          **TOLERANCE['float32'],
        )

    order = rng.permutation(5)
    check(
      batch.replace(
        candidates=jax.tree.map(lambda x: x[:, order], batch.candidates)
      ),
      columns=order,
    )
    check(
      batch.replace(
        candidates=jax.tree.map(lambda x: x[:, 2:3], batch.candidates)
      ),
      columns=slice(2, 3),
    )
    order = rng.permutation(3)
    check(rows(batch, order), row=order)
    check(rows(batch, slice(1, 2)), row=slice(1, 2))

    def lengthen(x):  # Another bucket, and padding full of nonsense.
      junk = np.full((3, 33), -7, x.dtype)
      return np.concatenate([x, junk], axis=1)

    check(
      batch.replace(
        history=batch.history.replace(
          features=jax.tree.map(lengthen, batch.history.features)
        ),
        candidates=Candidates(
          jax.tree.map(lengthen, batch.candidates.features),
          lengthen(batch.candidates.visible),
          np.pad(batch.candidates.mask, ((0, 0), (0, 33))),
        ),
      )
    )
    repeated = rows(batch, np.arange(3).repeat(4))
    check(repeated.replace(group=repeated.group), row=np.arange(3).repeat(4))

  @marks.slow_unless(lambda variant, size: size not in (2, 5))
  @parameterized.parameters(
    *(('causal', size) for size in (1, 2, 3, 5, 16)), ('isolated', 3)
  )
  def test_microbatch_size_changes_nothing(self, variant, size):
    batch = support.batch(np.random.default_rng(0), num_candidates=7)
    s = scorer(variant, microbatch=size, plain_microbatch=size)
    expected = real(scorer(variant).score_joint(batch), batch)
    for logits in (cached(s, batch), s.score_plain(batch)):
      np.testing.assert_allclose(
        real(logits, batch), expected, **TOLERANCE['float32']
      )

  @pytest.mark.filterwarnings('error')
  def test_one_program_per_bucket(self):
    config = support.config()
    _, params = support.init(config)
    s = scoring.Scorer(config, params)

    def use(num_events, num_candidates, num_rows):
      batch = support.batch(
        np.random.default_rng(0),
        num_rows,
        num_events,
        num_candidates,
        shared_visible=True,
      )
      cached(s, batch)
      s.score_joint(batch)
      s.score_plain(batch)

    use(9, 5, 4)
    compiled = s.num_compilations
    self.assertEqual(compiled, 4)  # encode, score, joint, plain
    for num_events in (1, 2, 7, 11, 16):
      for num_candidates in (1, 3, 16):
        use(num_events, num_candidates, 3)
    self.assertEqual(s.num_compilations, compiled)
    use(17, 5, 4)  # The next bucket of lengths: one program each.
    self.assertEqual(s.num_compilations, 2 * compiled)

  @parameterized.parameters(
    (1, 16), (16, 16), (17, 32), (64, 64), (65, 96), (97, 128), (129, 192)
  )
  def test_bucket_size(self, n, expected):
    self.assertEqual(padding.bucket_size(n), expected)


class BackendsTest(parameterized.TestCase):
  @parameterized.parameters(*VARIANTS)
  def test_tower_equals_the_blocks_it_was_packed_from(self, variant):
    s = scorer(variant)
    batch = support.batch(
      np.random.default_rng(4), shared_visible=not s.config.encoder.causal
    )
    cache = s.encode(batch.context, batch.history)
    visible = np.pad(
      batch.candidates.visible, ((0, cache.num_rows - 3), (0, 0))
    )
    candidates = Candidates(
      {
        k: np.pad(v, ((0, cache.num_rows - 3), (0, 0)))
        for k, v in batch.candidates.features.items()
      },
      visible,
    )
    blocks = ranker.Ranker(s.config).apply(
      s._variables, cache, candidates, method='score'
    )
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates), batch),
      real(rows(blocks, slice(0, 3)), batch),
      **TOLERANCE[s.config.dtype],
    )

  def test_says_what_runs_and_logs_it_once(self):
    config = support.config()
    _, params = support.init(config)
    s = scoring.Scorer(config, params)
    batch = support.batch(np.random.default_rng(0))
    cache = s.encode(batch.context, batch.history)
    expected = s.backends(cache, batch.candidates)
    self.assertIn('candidate_tower', expected)
    self.assertEqual(s.num_compilations, 1)  # Of `encode` alone.
    with self.assertLogs('absl', level='INFO') as logs:
      for _ in range(2):
        s.score(cache, batch.candidates)
    lines = [r.getMessage() for r in logs.records]
    self.assertEqual(lines, [f'{k} runs as {v!r}' for k, v in expected.items()])
    self.assertEqual(s.backends(cache, batch.candidates), expected)

  def test_a_named_backend_runs(self):
    batch = support.batch(np.random.default_rng(0))
    expected = real(cached(scorer(), batch), batch)
    for name in ('numba_cpu', 'xla', 'reference'):
      s = scorer(candidate_tower=name)
      cache = s.encode(batch.context, batch.history)
      used = s.backends(cache, batch.candidates)
      self.assertEqual(used['candidate_tower'], name)
      np.testing.assert_allclose(
        real(s.score(cache, batch.candidates), batch),
        expected,
        **TOLERANCE['float32'],
      )

  @parameterized.product(kernel=(True, False), dtype=('float32', 'bfloat16'))
  def test_histories_go_through_a_kernel_or_blocks(self, kernel, dtype):
    """On a CPU: `candidate_tower` layer by layer only if it is a kernel."""
    config = support.config(dtype=dtype)
    _, params = support.init(config)
    s = scoring.Scorer(config, params)
    batch = support.batch(np.random.default_rng(0))
    has = ops.has_cpu_kernel(dtype) and kernel
    with (
      mock.patch.object(ops, 'has_cpu_kernel', return_value=has),
      dispatch.record() as used,
    ):
      s.encode(batch.context, batch.history)
    name = 'numba_cpu' if kernel and dtype == 'float32' else None
    self.assertEqual(used.get('candidate_tower'), name and {name})

  def test_a_tower_does_not_train(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(0))
    with self.assertRaisesRegex(ValueError, 'tower is for scoring'):
      ranker.Ranker(s.config).apply(
        s._variables,
        batch,
        train=True,
        tower=s._tower,
        implementation='xla',
        rngs={'dropout': jax.random.key(0)},
      )

  def test_an_unknown_backend(self):
    s = scorer(candidate_tower='cuda')
    batch = support.batch(np.random.default_rng(0))
    cache = scorer().encode(batch.context, batch.history)
    for function, *arguments in (
      (s.encode, batch.context, batch.history),
      (s.score, cache, batch.candidates),
      (s.backends, cache, batch.candidates),
      (s.score_joint, batch),
    ):
      with self.assertRaisesRegex(ValueError, "'cuda' is unknown; use one of"):
        function(*arguments)

  @parameterized.parameters(5, 2)
  def test_candidates_after_the_last_real_one_are_not_computed(self, size):
    s = scorer(microbatch=size)
    batch = support.batch(np.random.default_rng(0))
    mask = np.arange(5)[None, :] < np.array([2, 0, 5])[:, None]
    mask[0, 0] = False
    candidates = batch.candidates.replace(mask=mask)
    counts = []

    def tower(x, *args, count, **kwargs):
      del args, kwargs
      jax.debug.callback(lambda n: counts.append(n), count, ordered=True)
      return x

    cache = s.encode(batch.context, batch.history)
    backend = dispatch.Backend(tower, dispatch.any_device)
    s = scoring.Scorer(s.config, s._variables['params'], s.options)
    with mock.patch.dict(api._BACKENDS, {'xla': backend}, clear=True):
      s.score(cache, candidates)
    jax.effects_barrier()
    np.testing.assert_array_equal(sum(counts), [2, 0, 5, 0])

  def test_inputs_that_fill_their_bucket_are_not_counted(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(0), 4, num_candidates=16)
    candidates = batch.candidates.replace(mask=None)
    cache = s.encode(batch.context, batch.history)
    counted = []

    def tower(x, *args, count, **kwargs):
      del args, kwargs
      counted.append(count is not None)
      return x

    backend = dispatch.Backend(tower, dispatch.any_device)
    with mock.patch.dict(api._BACKENDS, {'xla': backend}, clear=True):
      s.backends(cache, candidates)
      s.backends(cache, rows(candidates, slice(0, 3)))
    self.assertEqual(counted, [False, True])


class BadInputTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.s = scorer()
    self.batch = support.batch(np.random.default_rng(0))

  def feature(self, part, name, value):
    features = dict(getattr(self.batch, part).features)
    features[name] = value
    part_value = getattr(self.batch, part).replace(features=features)
    return self.batch.replace(**{part: part_value})

  def test_missing_feature(self):
    history = self.batch.history
    features = {k: v for k, v in history.features.items() if k != 'rating'}
    with self.assertRaisesRegex(ValueError, r"features\['rating'\] is missing"):
      self.s.encode(self.batch.context, history.replace(features=features))

  def test_id_outside_its_table(self):
    items = self.batch.candidates.features['item'].copy()
    items[1, 0] = 40
    with self.assertRaisesRegex(
      ValueError, r"\['item'\]\[1, 0\] is 40; expected an id in \[0, 40\)"
    ):
      self.s.score_joint(self.feature('candidates', 'item', items))

  def test_id_outside_its_table_on_the_device_gives_nan(self):
    items = self.batch.candidates.features['item'].copy()
    items[1, 0] = 40
    batch = self.feature('candidates', 'item', jax.numpy.asarray(items))
    logits = np.asarray(self.s.score_joint(batch)['click'])
    self.assertTrue(np.isnan(logits[1, 0]))
    self.assertTrue(np.isfinite(logits[0]).all())

  def test_nan_feature(self):
    values = np.full((3, 5), np.nan, np.float32)
    with self.assertRaisesRegex(ValueError, 'nan; expected a finite number'):
      self.s.score_plain(self.feature('candidates', 'duration', values))

  def test_wrong_dtype(self):
    values = np.ones((3, 5), np.float32)
    with self.assertRaisesRegex(ValueError, 'float32; expected integer ids'):
      self.s.score_plain(self.feature('candidates', 'item', values))

  def test_wrong_shape(self):
    values = np.ones((3, 4), np.int32)
    with self.assertRaisesRegex(ValueError, r'shape \(3, 4\); expected \(3, 5'):
      self.s.score_plain(self.feature('candidates', 'tag_0', values))

  def test_visible_beyond_the_history(self):
    candidates = self.batch.candidates
    visible = candidates.visible.copy()
    visible[2, 0] = self.batch.history.length[2] + 1
    candidates = candidates.replace(visible=visible)
    cache = self.s.encode(self.batch.context, self.batch.history)
    for score in (
      lambda: self.s.score_joint(self.batch.replace(candidates=candidates)),
      lambda: self.s.score(cache, candidates),
    ):
      with self.assertRaisesRegex(
        ValueError, r'visible\[2, 0\].* is outside \[0, \d\]'
      ):
        score()

  def test_length_beyond_the_features(self):
    history = self.batch.history.replace(length=np.array([1, 2, 10], np.int32))
    with self.assertRaisesRegex(ValueError, r'length spans \[1, 10\], outside'):
      self.s.encode(self.batch.context, history)

  def test_history_beyond_the_largest_bucket(self):
    s = scorer(history_buckets=(4, 8))
    with self.assertRaisesRegex(ValueError, '9 events .* largest bucket, 8'):
      s.encode(self.batch.context, self.batch.history)

  def test_candidates_without_a_cached_user(self):
    cache = self.s.encode(
      rows(self.batch.context, slice(0, 1)),
      rows(self.batch.history, slice(0, 1)),
    )
    with self.assertRaisesRegex(ValueError, '3 rows, the cache 1'):
      self.s.score(cache, self.batch.candidates)

  def test_bidirectional_history_with_candidates_in_its_middle(self):
    s = scorer('bidirectional')
    with self.assertRaisesRegex(ValueError, 'encoder.causal=False'):
      s.score_joint(self.batch)
    model = ranker.Ranker(s.config)
    with self.assertRaisesRegex(ValueError, 'encoder.causal=False'):
      model.apply(s._variables, self.batch)

  @parameterized.parameters('bidirectional', 'recency')
  def test_extend_what_new_events_would_change(self, variant):
    s = scorer(variant)
    cache = s.encode(self.batch.context, self.batch.history)
    with self.assertRaisesRegex(ValueError, 'call encode on the longer'):
      s.extend(cache, self.batch.history)

  @parameterized.parameters(
    ('concat', "every candidate changes the history's tokens"),
    ('append_self', "every candidate changes the history's tokens"),
    ('target_attention', 'without a Transformer'),
    ('mean_pool', 'without a Transformer'),
    ('none', 'it reads none'),
  )
  def test_fusion_that_is_not_amortizable(self, name, obstacle):
    config = support.config(fusion=name)
    _, params = support.init(config)
    s = scoring.Scorer(config, params)
    with self.assertRaisesRegex(
      ValueError, f"'{name}' cannot score from a cached.*{obstacle}.*append_cr"
    ):
      s.encode(self.batch.context, self.batch.history)
    np.testing.assert_allclose(  # It still scores, and equally.
      real(s.score_plain(self.batch), self.batch),
      real(s.score_joint(self.batch), self.batch),
      **TOLERANCE['float32'],
    )

  def test_candidate_tower_of_a_fusion_that_has_none(self):
    with self.assertRaisesRegex(
      ValueError, "candidate_tower='xla'.*'append_isolated'; set.*None"
    ):
      scorer('isolated', candidate_tower='xla')

  @parameterized.parameters(
    ({'microbatch': 0}, 'microbatch=0 must be at least 1'),
    ({'history_buckets': (8, 4)}, 'strictly ascending'),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      scoring.ScorerConfig(**options)
