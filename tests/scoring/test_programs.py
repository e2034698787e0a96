"""What a scorer compiles, and which implementations that runs."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from histjax import ops, scoring
from histjax.models import ranker
from histjax.nn import interaction
from histjax.ops import dispatch
from histjax.ops.candidate_tower import api
from histjax.scoring import programs
from histjax.types import Candidates
from tests import marks, support
from tests.scoring.scorers import (
  TOLERANCE,
  VARIANTS,
  cached,
  count_compilations,
  real,
  rows,
  scorer,
)


def cast(types, tree):
  """The arrays in other types, by the kind of theirs."""
  return jax.tree.map(
    lambda x: x.astype(types.get(x.dtype.kind, x.dtype)), tree
  )


def own_programs():
  """For scorers that are made and used within: nobody compiled them before."""
  return mock.patch.object(programs, 'program', programs.Program)


class ProgramsTest(parameterized.TestCase):
  """What is compiled, as XLA counts it."""

  def setUp(self):
    super().setUp()
    self.enter_context(own_programs())
    self.compilations = self.enter_context(count_compilations())

  @property
  def compiled(self):
    return len(self.compilations)

  def new(self, seed=0, **options):
    config = support.config(encoder__num_layers=1)
    _, variables = support.init(config, seed)
    return scoring.Scorer(config, variables, scoring.ScorerConfig(**options))

  @pytest.mark.filterwarnings('error')
  def test_one_program_per_bucket(self):
    """No count, mask, length, number type or container makes another."""
    s = self.new()
    rng = np.random.default_rng(0)

    def use(num_rows, num_events, num_candidates, like=lambda x: x):
      batch = support.batch(
        rng, num_rows, num_events, num_candidates, shared_visible=True
      )
      if num_candidates % 2:  # Which all of the history is.
        visible_none = batch.candidates.replace(visible=None)
        batch = batch.replace(candidates=visible_none)
      batch = batch.replace(
        context=like(batch.context),
        history=like(batch.history),
        candidates=like(batch.candidates),
      )
      cache = s.encode(batch.history)
      logits = s.score(cache, batch.candidates, batch.context)
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
    for size in (5, 16):
      use(4, 16, size, lambda x: jax.device_put(cast({'i': np.uint8}, x)))
    self.assertEqual(self.compiled, compiled)
    self.assertEqual(s.num_compilations, 4)
    use(4, 17, 5)  # The next bucket of lengths: one program each.
    self.assertEqual(s.num_compilations, 7)

  def test_new_events_have_small_buckets_of_their_own(self):
    s = self.new(history_buckets=(64,))
    batch = support.batch(np.random.default_rng(0), num_events=20)
    cache = s.encode(batch.history)
    found = []
    for number in (0, 1, 2, 3, 4, 9):
      events = batch.history.replace(length=np.full(3, number, np.int32))
      longer = s.extend(cache, events, donate=False)
      np.testing.assert_array_equal(
        longer.info.length, batch.history.length + number
      )
      found.append(s.num_compilations)
    # Of 1, 2, 4 and 16 events.
    self.assertEqual(found, [2, 2, 3, 4, 4, 5])

  def test_every_axis_has_its_buckets(self):
    s = self.new(
      row_buckets=(5,),
      history_buckets=(10,),
      candidate_buckets=(7,),
      plain_microbatch=3,
    )
    batch = support.batch(np.random.default_rng(0))
    mask = np.ones((3, 5), bool)
    mask[1, 2] = False
    batch = batch.replace(candidates=batch.candidates.replace(mask=mask))
    cache = s.encode(batch.history)
    for name, columns in (('joint', 7), ('plain', 6), ('score', 7)):
      # What is no candidate may have any logit.
      logits = np.zeros((5, columns, 2), np.float32)
      logits[1, 2] = logits[3:] = logits[:, 5:] = np.nan
      made = []

      def program(plan, kind, sizes, made=made, logits=logits):
        made.append(programs.Program(plan, kind, sizes))
        by_task = np.moveaxis(logits, -1, 0)
        made[0].call = lambda *arguments: jax.numpy.asarray(by_task)
        return made[0]

      with mock.patch.object(programs, 'program', program):
        if name == 'score':
          s.score(cache, batch.candidates, batch.context)
        else:
          getattr(s, f'score_{name}')(batch)
      shapes = {part.name: part.shape for part in made[0].layout.parts}
      self.assertEqual(shapes['candidates'], (5, columns))
      self.assertEqual(shapes.get('history', (5, 10)), (5, 10))
      self.assertEqual(shapes['context'], (5,))
    with self.assertRaisesRegex(ValueError, '6 rows do not fit the largest'):
      s.score_joint(rows(batch, np.arange(6) % 3))
    with self.assertRaisesRegex(ValueError, '8 candidates do not fit the lar'):
      s.score_joint(support.batch(np.random.default_rng(0), num_candidates=8))

  def test_counts_its_own_compilations_alone(self):
    s = self.new()
    jax.jit(lambda x: 2 * x)(np.zeros(3))
    self.assertGreater(self.compiled, 0)
    self.assertEqual(s.num_compilations, 0)


class SharedProgramsTest(absltest.TestCase):
  def test_other_parameters_compile_nothing(self):
    config = support.config(encoder__num_layers=1)
    batch = support.batch(np.random.default_rng(0))
    event = batch.history.replace(length=np.ones(3, np.int32))

    def use(seed):
      s = scoring.Scorer(config, support.init(config, seed)[1])
      found = [cached(s, batch), s.score_joint(batch), s.score_plain(batch)]
      cache = s.extend(s.encode(batch.history), event)
      s.score(cache, batch.candidates, batch.context)
      return s, [real(x, batch) for x in found]

    first, expected = use(0)
    with count_compilations() as compiled:
      second, found = use(1)
    self.assertEmpty(compiled)
    self.assertEqual(second.num_compilations, 0)
    self.assertNotEqual(first.fingerprint, second.fingerprint)
    for x in found[1:]:
      np.testing.assert_allclose(x, found[0], **TOLERANCE['float32'])
    self.assertGreater(np.abs(found[0] - expected[0]).max(), 0.01)
    # Parameters are not in the programs: the first still has its own.
    again = real(cached(first, batch), batch)
    np.testing.assert_array_equal(again, expected[0])


class BackendsTest(parameterized.TestCase):
  @marks.slow_unless(lambda variant: variant in ('causal', 'window', 'mlp'))
  @parameterized.parameters(*VARIANTS)
  def test_tower_equals_the_blocks_it_was_packed_from(self, variant):
    s = scorer(variant)
    batch = support.batch(
      np.random.default_rng(4), shared_visible=not s.config.encoder.causal
    )
    cache = s.encode(batch.history)
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
      s._variables,
      cache,
      candidates,
      {k: np.pad(v, (0, cache.num_rows - 3)) for k, v in batch.context.items()},
      method='score',
    )
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates, batch.context), batch),
      real(rows(blocks, slice(0, 3)), batch),
      **TOLERANCE[s.config.dtype],
    )

  def test_says_what_runs_and_logs_it_once(self):
    self.enter_context(own_programs())
    config = support.config()
    _, variables = support.init(config)
    s = scoring.Scorer(config, variables)
    batch = support.batch(np.random.default_rng(0))
    cache = s.encode(batch.history)
    expected = s.backends(cache, batch.candidates, batch.context)
    self.assertIn('candidate_tower', expected)
    self.assertEqual(s.num_compilations, 1)  # Of `encode` alone.
    with self.assertLogs('absl', level='INFO') as logs:
      for _ in range(2):
        s.score(cache, batch.candidates, batch.context)
    lines = [r.getMessage() for r in logs.records]
    self.assertEqual(lines, [f'{k} runs as {v!r}' for k, v in expected.items()])
    self.assertEqual(
      s.backends(cache, batch.candidates, batch.context), expected
    )

  def test_a_named_backend_runs(self):
    batch = support.batch(np.random.default_rng(0))
    expected = real(cached(scorer(), batch), batch)
    for name in ('numba_cpu', 'xla', 'reference'):
      s = scorer(candidate_tower=name)
      cache = s.encode(batch.history)
      used = s.backends(cache, batch.candidates, batch.context)
      self.assertEqual(used['candidate_tower'], name)
      np.testing.assert_allclose(
        real(s.score(cache, batch.candidates, batch.context), batch),
        expected,
        **TOLERANCE['float32'],
      )

  def test_a_named_head_is_never_replaced(self):
    """Not even where a head without a name would have no kernel."""
    self.enter_context(own_programs())
    self.enter_context(mock.patch.object(ops, 'has_cpu_kernel', lambda _: 0))
    head = interaction.InteractionConfig(
      cross_rank=8, mlp_widths=(16, 8), implementation='pallas_gpu'
    )
    config = support.config(encoder__num_layers=1, interaction=head)
    s = scoring.Scorer(config, support.init(config)[1])
    batch = support.batch(np.random.default_rng(0))
    request = batch.candidates, batch.context
    cache = s.encode(batch.history)
    for call in (
      lambda: s.score(cache, *request),
      lambda: s.encode_and_score(batch.history, *request),
      lambda: s.score_joint(batch),
    ):
      with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu needs'):
        call()

  @parameterized.product(kernel=(True, False), dtype=('float32', 'bfloat16'))
  def test_histories_go_through_a_kernel_or_blocks(self, kernel, dtype):
    """On a CPU: `candidate_tower` layer by layer only if it is a kernel."""
    config = support.config(dtype=dtype)
    _, variables = support.init(config)
    s = scoring.Scorer(config, variables)
    batch = support.batch(np.random.default_rng(0))
    has = ops.has_cpu_kernel(dtype) and kernel
    with (
      mock.patch.object(ops, 'has_cpu_kernel', return_value=has),
      own_programs(),
      dispatch.record() as used,
    ):
      s.encode(batch.history)
    name = 'numba_cpu' if kernel and dtype == 'float32' else None
    self.assertEqual(used.get('candidate_tower'), name and {name})

  def test_a_named_attention_runs(self):
    batch = support.batch(np.random.default_rng(0))
    config = support.config(encoder__attention='reference')
    s = scoring.Scorer(config, scorer()._variables)
    cache = s.encode(batch.history)
    self.assertEqual(
      s.backends(cache, batch.candidates, batch.context),
      {'history_attention': 'reference', 'interaction_head': 'numba_cpu'},
    )

  def test_a_program_for_another_platform_has_its_kernel(self):
    config = support.config(
      encoder__width=128,
      encoder__num_heads=4,
      encoder__num_layers=1,
      dtype='bfloat16',
    )
    model = ranker.Ranker(config)
    batch = support.batch(np.random.default_rng(0), shared_visible=True)
    batch = batch.replace(candidates=batch.candidates.replace(visible=None))
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)

    def joint(variables):
      variables = {**variables, **ranker.pack(config, variables)}
      return model.apply(variables, batch)

    for platform, number in (('tpu', 1), ('cpu', 0)):
      with ops.target_platform(platform):
        exported = jax.export.export(jax.jit(joint), platforms=[platform])
        program = exported(variables).mlir_module()
      self.assertEqual(program.count('@tpu_custom_call'), number)

  def test_a_program_for_hopper_has_the_heads_kernel(self):
    config = support.config(
      fusion='append_isolated',
      encoder__width=64,
      encoder__num_layers=1,
      encoder__attention='xla',
      dtype='bfloat16',
    )
    model = ranker.Ranker(config)
    batch = support.batch(np.random.default_rng(0))
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)

    def joint(variables):
      variables = {**variables, **ranker.pack(config, variables)}
      return model.apply(variables, batch)

    can = jax.__version_info__ >= (0, 11)  # Whose Mosaic GPU it needs.
    for capability, number in (('9.0', int(can)), ('8.0', 0)):
      with ops.target_platform('cuda', compute_capability=capability):
        traced = jax.jit(joint).trace(variables)
        program = traced.lower(lowering_platforms=('cuda',)).as_text()
      self.assertEqual(program.count('@mosaic_gpu_v2('), number)

  @parameterized.parameters('extend', 'extend_and_score')
  def test_a_donated_cache_is_not_copied(self, kind):
    s, capacity = scorer(), 8192
    sizes = programs.Sizes(1, 16, 16, capacity=capacity, donate=True)
    program = programs.Program(s._plan, kind, sizes)
    encoder = s.config.encoder
    shape = (encoder.num_layers, 1, capacity, encoder.num_heads)
    cache = jax.ShapeDtypeStruct((*shape, encoder.head_dim), np.float32)
    request = jax.ShapeDtypeStruct((program.layout.size,), np.int32)
    compiled = program.call.lower(s._weights, cache, cache, request).compile()
    memory = compiled.memory_analysis()
    one_layer = 4 * cache.size // encoder.num_layers
    self.assertGreaterEqual(memory.alias_size_in_bytes, 2 * 4 * cache.size)
    self.assertLess(memory.temp_size_in_bytes, one_layer)

  def test_runs_where_its_parameters_are(self):
    batch = support.batch(np.random.default_rng(0))
    _, variables = support.init(support.config())
    device = jax.devices()[-1]
    s = scoring.Scorer(support.config(), jax.device_put(variables, device))
    with ops.target_platform('tpu'):  # Of somebody else's program.
      cache = s.encode(batch.history)
      self.assertEqual(cache.keys.devices(), {device})
      used = s.backends(cache, batch.candidates, batch.context)
    self.assertNotIn('pallas_tpu', used.values())

  def test_a_tower_does_not_train(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(0))
    with self.assertRaisesRegex(ValueError, "'tower' is for scoring"):
      ranker.Ranker(s.config).apply(
        {**s._variables, **ranker.pack(s.config, s._variables)},
        batch,
        train=True,
        rngs={'dropout': jax.random.key(0)},
      )

  def test_a_backend_of_another_device(self):
    s = scorer(candidate_tower='pallas_tpu')
    batch = support.batch(np.random.default_rng(0))
    cache = scorer().encode(batch.history)
    for function, *arguments in (
      (s.encode, batch.history),
      (s.score, cache, batch.candidates, batch.context),
      (s.backends, cache, batch.candidates, batch.context),
      (s.score_joint, batch),
    ):
      with self.assertRaisesRegex(NotImplementedError, 'tpu needs a TPU'):
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

    cache = s.encode(batch.history)
    backend = dispatch.Backend(tower, dispatch.any_target)
    s = scoring.Scorer(s.config, s._variables, s.options)
    with (
      mock.patch.dict(api._BACKENDS, {'xla': backend}, clear=True),
      own_programs(),
    ):
      s.score(cache, candidates, batch.context)
    jax.effects_barrier()
    np.testing.assert_array_equal(sum(counts), [2, 0, 5, 0])
