"""Joint, plain and cached scores are one; nothing but the user matters."""

import functools
from unittest import mock

import chex
import jax
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops, scoring
from histjax.models import ranker
from histjax.ops import dispatch
from histjax.ops.candidate_tower import api
from histjax.types import CacheInfo, Candidates, History
from tests import support
from tests.scoring.scorers import (
  ISOLATED,
  TOLERANCE,
  VARIANTS,
  cached,
  real,
  rows,
  scorer,
)

SEEDS = st.integers(0, 2**32 - 1)


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


def cast(types, tree):
  """The arrays in other types, by the kind of theirs."""
  return jax.tree.map(
    lambda x: x.astype(types.get(x.dtype.kind, x.dtype)), tree
  )


class ProgramsTest(parameterized.TestCase):
  """What is compiled, as XLA counts it."""

  def setUp(self):
    super().setUp()
    self.compiled = 0

    def on_event(event, duration, **kwargs):
      del duration, kwargs
      self.compiled += event == '/jax/core/compile/backend_compile_duration'

    jax.monitoring.register_event_duration_secs_listener(on_event)
    self.addCleanup(jax.monitoring.unregister_event_duration_listener, on_event)

  def new(self, **options):
    config = support.config(encoder__num_layers=1)
    _, params = support.init(config)
    return scoring.Scorer(config, params, scoring.ScorerConfig(**options))

  @pytest.mark.filterwarnings('error')
  def test_one_program_per_bucket(self):
    """No count, mask, length, number type or container makes another."""
    s = self.new()
    rng = np.random.default_rng(0)

    def use(num_rows, num_events, num_candidates, like=lambda x: x):
      batch = support.batch(
        rng, num_rows, num_events, num_candidates, shared_visible=True
      )
      batch = batch.replace(
        context=like(batch.context),
        history=like(batch.history),
        candidates=like(batch.candidates),
      )
      cache = s.encode(batch.context, batch.history)
      logits = s.score(cache, batch.candidates)
      s.score_joint(batch)
      self.assertEqual(logits['click'].shape, (num_rows, num_candidates))
      self.assertIsInstance(logits['click'], np.ndarray)
      self.assertEqual(logits['click'].dtype, np.float32)

    use(4, 9, 5)
    s.score_plain(support.batch(rng, 4, 9, 5, shared_visible=True))
    self.assertEqual(s.num_compilations, 4)  # encode, score, joint, plain
    compiled = self.compiled
    for count in range(1, 17):  # 16 fills the bucket.
      for num_rows in (3, 4):
        use(num_rows, int(rng.integers(1, 17)), count)
    for _ in range(20):  # Other masks.
      use(4, 16, 16)
    for types in ({'i': np.int64, 'f': np.float64}, {'i': np.uint8}):
      use(3, 9, 5, functools.partial(cast, types))
    use(3, 9, 5, jax.device_put)
    self.assertEqual(self.compiled, compiled)
    self.assertEqual(s.num_compilations, 4)
    use(4, 17, 5)  # The next bucket of lengths: one program each.
    self.assertEqual(s.num_compilations, 7)

  def test_new_events_have_small_buckets_of_their_own(self):
    s = self.new(history_buckets=(64,))
    batch = support.batch(np.random.default_rng(0), num_events=20)
    cache = s.encode(batch.context, batch.history)
    for number, size in ((0, 1), (1, 1), (2, 2), (3, 4), (9, 16)):
      events = batch.history.replace(length=np.full(3, number, np.int32))
      with mock.patch.object(s, '_extend', return_value=cache) as extend:
        longer = s.extend(cache, events)
      padded = extend.call_args.args[2]
      self.assertEqual(padded.features['item'].shape, (4, size))
      np.testing.assert_array_equal(
        longer.info.length, batch.history.length + number
      )

  def test_counts_its_own_compilations_alone(self):
    s = self.new()
    jax.jit(lambda x: 2 * x)(np.zeros(3))
    self.assertGreater(self.compiled, 0)
    self.assertEqual(s.num_compilations, 0)


class CacheTest(parameterized.TestCase):
  """A cache knows its users and its model."""

  def setUp(self):
    super().setUp()
    self.s = scorer()
    self.batch = support.batch(np.random.default_rng(0))
    self.cache = self.s.encode(self.batch.context, self.batch.history)

  def other(self, params=None, **fields):
    config = support.config(**fields)
    params = self.s._params['params'] if params is None else params
    return scoring.Scorer(config, params)

  def test_carries_what_the_host_must_know(self):
    info = self.cache.info
    self.assertEqual(info.num_users, 3)
    self.assertEqual(self.cache.num_rows, 4)
    self.assertIsInstance(info.length, np.ndarray)
    np.testing.assert_array_equal(info.length, self.batch.history.length)
    self.assertEqual(info.fingerprint, self.s.fingerprint)

  def test_a_row_beyond_the_last_user(self):
    four = rows(self.batch, np.array([0, 1, 2, 0]))
    for method, argument, what in (
      (self.s.score, four.candidates, 'candidates'),
      (self.s.extend, four.history, 'events'),
      (self.s.backends, four.candidates, 'candidates'),
    ):
      with self.assertRaisesRegex(
        ValueError, f'{what} have 4 rows, the cache 3; encode every user'
      ):
        method(self.cache, argument)

  def test_fewer_rows_than_users(self):
    two = rows(self.batch, slice(0, 2))
    found = real(self.s.score(self.cache, two.candidates), two)
    expected = self.s.score(self.cache, self.batch.candidates)
    np.testing.assert_array_equal(found, real(rows(expected, slice(0, 2)), two))
    longer = self.s.extend(self.cache, two.history)
    length = self.batch.history.length.copy()
    length[:2] *= 2
    np.testing.assert_array_equal(longer.info.length, length)
    np.testing.assert_array_equal(longer.length[:3], length)

  def test_one_of_another_model(self):
    params = self.s._params['params']
    changed = jax.tree.map(lambda x: x, params)
    changed['tables']['item'] = changed['tables']['item'].at[39, 7].add(1e-6)
    for other in (
      self.other(changed),
      self.other(encoder__window=4),
      self.other(encoder__positions='none'),
    ):
      for method, argument in (
        (other.score, self.batch.candidates),
        (other.backends, self.batch.candidates),
        (other.extend, self.batch.history),
      ):
        with self.assertRaisesRegex(
          ValueError, 'cache was made by the model .*; encode the history again'
        ):
          method(self.cache, argument)

  def test_one_of_the_same_model(self):
    """In other containers, by other implementations."""
    params = jax.tree.map(np.array, self.s._params['params'])
    params = dict(reversed(params.items()))
    other = self.other(params, encoder__attention='reference')
    self.assertEqual(other.fingerprint, self.s.fingerprint)
    np.testing.assert_allclose(
      real(other.score(self.cache, self.batch.candidates), self.batch),
      real(self.s.score(self.cache, self.batch.candidates), self.batch),
      **TOLERANCE['float32'],
    )

  def test_one_that_no_scorer_vouches_for(self):
    mapped = jax.tree.map(lambda x: x, self.cache)
    self.assertIsNone(mapped.info)
    for cache in (mapped, None, self.batch.history):
      with self.assertRaisesRegex(ValueError, 'that no Scorer made'):
        self.s.score(cache, self.batch.candidates)

  def test_users_make_no_programs(self):
    traced = []
    length = jax.jit(lambda cache: traced.append(1) or cache.length)
    for n in (1, 2):
      info = CacheInfo(np.zeros(n, np.int32), str(n))
      length(self.cache.replace(info=info))
    self.assertEqual(traced, [1])


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
      s._params, cache, candidates, method='score'
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

  def test_a_named_attention_runs(self):
    batch = support.batch(np.random.default_rng(0))
    config = support.config(encoder__attention='reference')
    s = scoring.Scorer(config, scorer()._params['params'])
    cache = s.encode(batch.context, batch.history)
    self.assertEqual(
      s.backends(cache, batch.candidates), {'history_attention': 'reference'}
    )

  def test_runs_where_its_parameters_are(self):
    batch = support.batch(np.random.default_rng(0))
    _, params = support.init(support.config())
    device = jax.devices()[-1]
    s = scoring.Scorer(support.config(), jax.device_put(params, device))
    with ops.target_platform('tpu'):  # Of somebody else's program.
      cache = s.encode(batch.context, batch.history)
      self.assertEqual(cache.keys.devices(), {device})
      used = s.backends(cache, batch.candidates)
    self.assertNotIn('pallas_tpu', used.values())

  def test_a_tower_does_not_train(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(0))
    with self.assertRaisesRegex(ValueError, "'tower' is for scoring"):
      ranker.Ranker(s.config).apply(
        s._variables,
        batch,
        train=True,
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
    backend = dispatch.Backend(tower, dispatch.any_target)
    s = scoring.Scorer(s.config, s._params['params'], s.options)
    with mock.patch.dict(api._BACKENDS, {'xla': backend}, clear=True):
      s.score(cache, candidates)
    jax.effects_barrier()
    np.testing.assert_array_equal(sum(counts), [2, 0, 5, 0])
