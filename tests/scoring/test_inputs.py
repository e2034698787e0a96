"""What a scorer refuses, and what it takes."""

import re

import jax
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from histjax import schema as schema_lib
from histjax import scoring
from histjax.models import ranker
from histjax.scoring import inputs
from histjax.types import Candidates, History
from tests import support
from tests.scoring import scorers
from tests.scoring.scorers import TOLERANCE, real, rows, scorer

EYE = np.eye(3, 5)
SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 42),
  st.integers(-(2**70), 2**70),
  st.floats(),
  st.text(max_size=3),
)
ANYTHING = st.one_of(
  SCALARS,
  st.lists(SCALARS, max_size=3),
  SCALARS.map(lambda x: [[x] * 5] * 3),
  st.lists(st.lists(SCALARS, min_size=5, max_size=5), min_size=3, max_size=3),
  st.tuples(st.sampled_from('?bhilqBHILQefdFDOSUMm'), st.integers(-2, 9)).map(
    lambda x: np.full((3, 5), x[1]).astype(np.dtype(x[0]))
  ),
)


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
      self.s.encode(history.replace(features=features))

  def test_id_outside_its_table(self):
    items = self.batch.candidates.features['item'].copy()
    items[1, 0] = 40
    with self.assertRaisesRegex(
      ValueError, r"\['item'\]\[1, 0\] is 40; expected an id in \[0, 40\)"
    ):
      self.s.score_joint(self.feature('candidates', 'item', items))

  def test_id_in_a_device_array_that_is_padded(self):
    items = self.batch.candidates.features['item'].copy()
    items[1, 0] = -1
    batch = self.feature('candidates', 'item', jax.numpy.asarray(items))
    with self.assertRaisesRegex(ValueError, r"\['item'\]\[1, 0\] is -1; exp"):
      self.s.score_joint(batch)

  @parameterized.parameters(-1, -(2**31), 50, 2**31 - 1)
  def test_id_in_a_device_array_that_is_not(self, bad):
    batch = support.batch(
      np.random.default_rng(0), 4, 16, 16, shared_visible=True
    )
    batch = batch.replace(
      history=batch.history.replace(length=np.full(4, 16, np.int32)),
      candidates=Candidates(batch.candidates.features),
    )

    def broken(features):
      items = features['item'].copy()
      items[2, 3] = bad
      return {**features, 'item': jax.numpy.asarray(items)}

    def replaced(candidates):
      return batch.replace(candidates=candidates)

    history = batch.history.replace(features=broken(batch.history.features))
    candidates = Candidates(broken(batch.candidates.features))
    context = {**batch.context, 'user': batch.context['user'].copy()}
    context['user'][2] = bad
    context = jax.device_put(context)
    cache = self.s.encode(batch.history)
    for field, call in (
      ('candidates', lambda: self.s.score(cache, candidates, batch.context)),
      ('candidates', lambda: self.s.backends(cache, candidates, batch.context)),
      ('context', lambda: self.s.score(cache, batch.candidates, context)),
      ('history', lambda: self.s.encode(history)),
      ('history', lambda: self.s.extend(cache, history)),
      ('candidates', lambda: self.s.score_joint(replaced(candidates))),
      ('candidates', lambda: self.s.score_plain(replaced(candidates))),
    ):
      at = {'context': r"\['user'\]\[2\]"}.get(field, r"\['item'\]\[2, 3\]")
      with self.assertRaisesRegex(ValueError, rf'^{field}.*{at} is {bad}; exp'):
        call()

  def test_padding_of_device_arrays_is_not_read(self):
    batch = support.batch(
      np.random.default_rng(0), 4, 16, 16, shared_visible=True
    )
    batch = batch.replace(candidates=batch.candidates.replace(visible=None))
    expected = real(self.s.score_joint(batch), batch)
    beyond = np.arange(16) >= batch.history.length[:, None]

    def poisoned(features, where):
      items = np.where(where, -1, features['item'])
      return jax.device_put({**features, 'item': items})

    history = batch.history.replace(
      features=poisoned(batch.history.features, beyond)
    )
    candidates = batch.candidates.replace(
      features=poisoned(batch.candidates.features, ~batch.candidates.mask)
    )
    for other in (
      batch.replace(history=history),
      batch.replace(candidates=candidates),
    ):
      found = real(self.s.score_joint(other), batch)
      np.testing.assert_array_equal(found, expected)
      checked = inputs.check_batch(support.SCHEMA, other)
      for part, padding in (
        (checked.history, beyond),
        (checked.candidates, ~batch.candidates.mask),
      ):
        items = np.asarray(part.features['item'])
        self.assertEqual(set(items[padding]), {0})

  def test_a_parameter_that_is_not_finite(self):
    s, batch = scorers.poisoned(self.s), scorers.without_bad(self.batch)
    s.score_joint(batch)
    batch = batch.replace(candidates=scorers.with_bad(batch.candidates, 1, 0))
    for score in (s.score_joint, s.score_plain):
      with self.assertRaisesRegex(
        ValueError, "logit 'click' of row 1, candidate 0 is .*too large"
      ):
        score(batch)

  @parameterized.parameters(-1e39, 3e38, 1.0001e8, np.nan, -np.inf)
  def test_a_value_that_the_network_cannot_take(self, value):
    values = self.batch.candidates.features['duration'].astype(np.float64)
    for largest in (schema_lib.MAX_DENSE, -schema_lib.MAX_DENSE):
      values[1, 0] = largest
      batch = self.feature('candidates', 'duration', values)
      inputs.check_batch(support.SCHEMA, batch)
    values[1, 0] = value
    batch = self.feature('candidates', 'duration', values)
    said = re.escape(f"['duration'][1, 0] is {value}; expected a finite number")
    for check in (self.s.score_joint, self.s.score_plain):
      with self.assertRaisesRegex(ValueError, f'{said} of at most 1e'):
        check(batch)

  @parameterized.parameters(
    ('item', 'x', r'has shape \(\); expected \(3, 5\)'),
    ('item', 7, r'has shape \(\); expected \(3, 5\)'),
    ('item', None, r'has shape \(\); expected \(3, 5\)'),
    ('item', [[1, 2], [3]], r'is no array: .*inhomogeneous'),
    ('item', [['a'] * 5] * 3, "has dtype <U1, as in 'a'; expected integer ids"),
    ('item', [[2**64] * 5] * 3, 'has dtype object, as in 18446744073709551616'),
    (
      'item',
      [[2**63] * 5] * 3,
      r'\[0, 0\] is 9223372036854775808; expected',
    ),
    ('item', [[1.0] * 5] * 3, 'has dtype float64, as in 1.0; expected integer'),
    ('item', [[True] * 5] * 3, 'has dtype bool, as in True; expected integer'),
    ('item', [[None] * 5] * 3, 'has dtype object, as in None; .*np.int32'),
    ('item', np.zeros((3, 5), 'M8[s]'), r'has dtype datetime64\[s\]'),
    ('item', np.zeros((3, 5), 'm8[s]'), r'has dtype timedelta64\[s\]'),
    ('duration', 'x', r'has shape \(\); expected \(3, 5\)'),
    ('duration', [['1.5'] * 5] * 3, "has dtype <U3, as in '1.5'; .*floating"),
    ('duration', [[1] * 5] * 3, 'has dtype int64, as in 1; .*of np.float32'),
    ('duration', [[True] * 5] * 3, 'has dtype bool, as in True'),
    ('duration', [[None] * 5] * 3, 'has dtype object'),
    ('duration', [[1j] * 5] * 3, 'has dtype complex128'),
    ('item', np.ma.masked_array(np.ones((3, 5), np.int32), EYE), 'has masked'),
    ('duration', np.ma.masked_array(np.ones((3, 5)), EYE), 'has masked values'),
    ('rating', np.zeros((3, 5), np.int32), 'is not in the schema, which asks'),
  )
  def test_what_is_no_feature(self, name, value, message):
    # The first feature decides the shape that the others must have.
    features = dict(self.batch.candidates.features)
    features = {'tag_0': features['tag_0'], **features, name: value}
    candidates = self.batch.candidates.replace(features=features)
    batch = self.batch.replace(candidates=candidates)
    for score in (self.s.score_joint, self.s.score_plain):
      with self.assertRaisesRegex(ValueError, rf"\['{name}'\].* ?{message}"):
        score(batch)

  @parameterized.parameters(
    ({'length': [1, 2]}, r'features have shape \(3, 9\) and length \(2,\)'),
    ({'length': [1.0, 2.0, 3.0]}, 'history.length has dtype float64; expected'),
    ({'length': None}, r'length \(\); they must be \[B, L\] and \[B\]'),
    ({'length': np.ma.masked_equal([0, 2, 3], 0)}, 'length has masked values'),
    ({'length': [-1, 2, 3]}, r'length spans \[-1, 3\]'),
    ({'features': None}, 'history.features is a NoneType; expected a dict of'),
    ({'features': [1]}, 'history.features is a list'),
    ({'features': {}}, r"features\['item'\] is missing; given \[\], the sch"),
  )
  def test_what_is_no_history(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      self.s.encode(self.batch.history.replace(**change))

  @parameterized.parameters(
    ({'mask': np.ones((3, 5), np.int32)}, 'mask has dtype int32; expected bo'),
    ({'mask': [True, False]}, r'mask has shape \(2,\); features have \(3, 5'),
    ({'visible': [[1.0] * 5] * 3}, 'visible has dtype float64; expected int'),
    ({'visible': [[1], [2, 3]]}, 'visible is no array'),
    ({'visible': np.full((3, 5), -1)}, r'visible\[0, 0\]=-1 is outside'),
    ({'features': None}, 'candidates.features is a NoneType'),
  )
  def test_what_are_no_candidates(self, change, message):
    fields = {'mask': None, 'visible': None, **change}
    candidates = self.batch.candidates.replace(**fields)
    with self.assertRaisesRegex(ValueError, message):
      self.s.score_joint(self.batch.replace(candidates=candidates))

  def test_scorers_of_something_else(self):
    config, variables = self.s.config, self.s.variables
    for arguments, message in (
      (({}, variables), 'config is a dict; expected a histjax.RankerConfig'),
      ((config, variables['params']), 'is not of this config'),
      ((config, variables, {}), 'scorer_config is a dict; expected a'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        scoring.Scorer(*arguments)

  def test_what_is_of_another_class(self):
    s, batch = self.s, self.batch
    two = rows(batch.candidates, slice(0, 2))
    cache = s.encode(batch.history)

    def score(context):
      return s.score(cache, batch.candidates, context)

    for function, arguments, message in (
      (score, (None,), 'context is a NoneType; expected a dict'),
      (s.encode, ({},), 'history is a dict; expected a histjax.History'),
      (s.extend, (cache, {}), 'history is a dict; expected a histjax.History'),
      (
        s.score,
        (cache, {}, batch.context),
        'candidates is a dict; expected a histjax.Candidates',
      ),
      (s.score_joint, (None,), 'batch is a NoneType; expected a histjax.Rank'),
      (s.score_plain, (batch.replace(candidates={}),), 'candidates is a dict'),
      (
        score,
        ({**batch.context, 'x': 1},),
        r"context\['x'\] is not in the schema.*leave it out",
      ),
      (score, ({'user': [1, 2, 3]},), r"context\['age'\] is missing"),
      (
        score,
        (rows(batch.context, slice(0, 2)),),
        r"context\['user'\] has shape \(2,\); expected \(3,\)",
      ),
      (
        s.score_joint,
        (batch.replace(candidates=two),),
        'candidates have 2 rows, history 3; make them equal',
      ),
      (
        s.encode_and_score,
        (batch.history, two, batch.context),
        'candidates have 2 rows, history 3; make them equal',
      ),
      (
        s.encode_and_score,
        (batch.history, batch.candidates, {}),
        r"context\['user'\] is missing",
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        function(*arguments)

  def test_lists_and_wide_numbers(self):
    expected = real(self.s.score_joint(self.batch), self.batch)

    def lists(features):
      return {k: v.tolist() for k, v in features.items()}

    batch, candidates = self.batch, self.batch.candidates
    of_lists = batch.replace(
      context=lists(batch.context),
      history=History(
        lists(batch.history.features), batch.history.length.tolist()
      ),
      candidates=Candidates(
        lists(candidates.features),
        candidates.visible.tolist(),
        candidates.mask.tolist(),
      ),
    )
    wide = jax.tree.map(
      lambda x: x.astype({4: x.dtype.kind + '8'}.get(x.itemsize, x.dtype)),
      batch,
    )
    self.assertEqual(wide.context['user'].dtype, np.int64)
    for other in (of_lists, wide):
      found = self.s.score_joint(other)
      np.testing.assert_array_equal(real(found, batch), expected)

  @settings(max_examples=60)
  @given(name=st.sampled_from(('item', 'tag_1', 'duration')), value=ANYTHING)
  def test_anything_is_scored_or_refused_by_name(self, name, value):
    batch = self.feature('candidates', name, value)
    try:
      logits = self.s.score_joint(batch)
    except ValueError as error:
      self.assertRegex(str(error), f"candidates|'{name}'|logit")
    else:
      self.assertTrue(np.isfinite(real(logits, batch)).all())

  def test_check_batch(self):
    checked = inputs.check_batch(support.SCHEMA, self.batch)
    mask = self.batch.candidates.mask
    np.testing.assert_array_equal(checked.candidates.mask, mask)
    np.testing.assert_array_equal(
      checked.candidates.features['item'],
      np.where(mask, self.batch.candidates.features['item'], 0),
    )
    with self.assertRaisesRegex(ValueError, 'encoder.causal=False'):
      inputs.check_batch(support.SCHEMA, self.batch, causal=False)

  def test_check_batch_of_nothing(self):
    empty = support.batch(np.random.default_rng(0), num_events=0)
    candidates = jax.tree.map(lambda x: x[:, :0], empty.candidates)
    checked = inputs.check_batch(
      support.SCHEMA, empty.replace(candidates=candidates)
    )
    self.assertEqual(checked.history.features['rating'].shape, (3, 0))
    self.assertEqual(checked.candidates.shape, (3, 0))

  def test_inputs_are_copied(self):
    # The device may read them when the caller has changed the arrays.
    batch = support.batch(np.random.default_rng(0))
    mask = np.ones((3, 5), bool)
    candidates = batch.candidates.replace(mask=mask)
    checked = inputs.check_batch(
      support.SCHEMA, batch.replace(candidates=candidates)
    )
    for part in ('context', 'history', 'candidates'):
      found = jax.tree.leaves(getattr(checked, part))
      for array in jax.tree.leaves(getattr(batch, part)):
        for copy in found:
          self.assertFalse(np.shares_memory(copy, array))

  def test_nan_feature(self):
    values = np.full((3, 5), np.nan, np.float32)
    with self.assertRaisesRegex(ValueError, 'nan; expected a finite number'):
      self.s.score_plain(self.feature('candidates', 'duration', values))

  def test_wrong_dtype(self):
    values = np.ones((3, 5), np.float32)
    with self.assertRaisesRegex(
      ValueError, 'float32, as in 1.0; expected integer'
    ):
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
    cache = self.s.encode(self.batch.history)
    for score in (
      lambda: self.s.score_joint(self.batch.replace(candidates=candidates)),
      lambda: self.s.score(cache, candidates, self.batch.context),
    ):
      with self.assertRaisesRegex(
        ValueError, r'visible\[2, 0\].* is outside \[0, \d\]'
      ):
        score()

  def test_length_beyond_the_features(self):
    history = self.batch.history.replace(length=np.array([1, 2, 10], np.int32))
    with self.assertRaisesRegex(ValueError, r'length spans \[1, 10\], outside'):
      self.s.encode(history)

  def test_history_beyond_the_largest_bucket(self):
    s = scorer(history_buckets=(4, 8))
    with self.assertRaisesRegex(ValueError, '9 events .* largest bucket, 8'):
      s.encode(self.batch.history)

  def test_candidates_without_a_cached_user(self):
    cache = self.s.encode(rows(self.batch.history, slice(0, 1)))
    with self.assertRaisesRegex(ValueError, '3 rows, the cache 1'):
      self.s.score(cache, self.batch.candidates, self.batch.context)

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
    cache = s.encode(self.batch.history)
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
    _, variables = support.init(config)
    s = scoring.Scorer(config, variables)
    with self.assertRaisesRegex(
      ValueError, f"'{name}' cannot score from a cached.*{obstacle}.*append_cr"
    ):
      s.encode(self.batch.history)
    np.testing.assert_allclose(  # It still scores, and equally.
      real(s.score_plain(self.batch), self.batch),
      real(s.score_joint(self.batch), self.batch),
      **TOLERANCE['float32'],
    )

  @parameterized.parameters(
    ({'microbatch': 0}, 'microbatch=0 must be at least 1'),
    ({'plain_microbatch': 0}, 'plain_microbatch=0 must be at least 1'),
    ({'history_buckets': (8, 4)}, 'strictly ascending'),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      scoring.ScorerConfig(**options)
