"""Joint, plain and cached scores are one; nothing but the user matters."""

from unittest import mock

import chex
import jax
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import scoring
from histjax.nn import fusion
from histjax.types import Candidates, History
from tests import marks, support
from tests.scoring.scorers import (
  CROSS_ONLY,
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
  @marks.slow_unless(
    lambda variant: variant in ('causal', 'window', 'mlp', 'isolated', 'cross')
  )
  @parameterized.parameters(*VARIANTS, *ISOLATED, *CROSS_ONLY)
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
    'causal', 'window', 'bfloat16', 'isolated', 'isolated_window', *CROSS_ONLY
  )
  @given(seed=SEEDS)
  def test_extend_event_by_event_equals_encode_at_once(self, variant, seed):
    s = scorer(variant)
    rng = np.random.default_rng(seed)
    batch = support.batch(rng, num_events=6)
    history = batch.history
    cache = s.encode(history.replace(length=0 * history.length))
    for i in range(6):
      event = History(
        {k: v[:, i : i + 1] for k, v in history.features.items()},
        (i < history.length).astype(np.int32),
      )
      cache = s.extend(cache, event)
    tolerance = TOLERANCE[s.config.dtype]
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates, batch.context), batch),
      real(cached(s, batch), batch),
      **tolerance,
    )

  @pytest.mark.slow  # Another is one event after the other.
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
    cache = s.extend(s.encode(start), rest)
    np.testing.assert_array_equal(np.asarray(cache.length)[:3], length)
    expected = real(cached(s, batch), batch)
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates, batch.context), batch),
      expected,
      **TOLERANCE['float32'],
    )
    again, logits = s.extend_and_score(
      s.encode(start), rest, batch.candidates, batch.context
    )
    np.testing.assert_array_equal(again.info.length, length)
    np.testing.assert_allclose(
      real(logits, batch), expected, **TOLERANCE['float32']
    )
    np.testing.assert_allclose(again.keys, cache.keys, **TOLERANCE['float32'])

  @marks.slow_unless(
    lambda variant, visible: (
      (variant == 'causal') == visible and variant in ('causal', 'cross_window')
    )
  )
  @parameterized.product(
    variant=('causal', 'window', 'no_positions', 'one_layer', 'cross_window'),
    visible=(False, True),
  )
  @given(seed=SEEDS)
  def test_extend_and_score_are_the_two(self, variant, visible, seed):
    """In one pass over the layers, whether it pays or not."""
    self.enter_context(
      mock.patch.object(
        fusion.AppendCross,
        '_one_pass_pays',
        lambda fusion, *sizes: fusion.events_attend,
      )
    )
    s = scorer(variant, candidate_tower='reference')
    rng = np.random.default_rng(seed)
    batch = support.batch(rng, num_events=14)
    length = rng.integers(0, 11, 3, dtype=np.int32)
    new = rng.integers(0, 5, 3, dtype=np.int32)
    new[rng.integers(3)] = 0
    mask = batch.candidates.mask.copy()
    mask[rng.integers(3)] = False  # Nothing to score for this one.
    seen = None
    if visible:
      seen = rng.integers(0, (length + new)[:, None] + 1, mask.shape)
      seen = seen.astype(np.int32)
    batch = batch.replace(
      candidates=batch.candidates.replace(visible=seen, mask=mask)
    )
    request = batch.candidates, batch.context
    events = History(
      {k: v[:, 10:] for k, v in batch.history.features.items()}, new
    )
    cache = s.encode(batch.history.replace(length=length))
    longer, logits = s.extend_and_score(cache, events, *request, donate=False)
    expected = s.extend(cache, events, donate=False)
    np.testing.assert_array_equal(longer.info.length, length + new)
    np.testing.assert_allclose(
      real(logits, batch),
      real(s.score(expected, *request), batch),
      **TOLERANCE['float32'],
    )
    written = np.arange(longer.capacity) < longer.length[:, None]
    for x, y in (
      (longer.keys, expected.keys),
      (longer.values, expected.values),
    ):
      np.testing.assert_allclose(
        np.asarray(x)[:, written],
        np.asarray(y)[:, written],
        **TOLERANCE['float32'],
      )

  @parameterized.parameters(
    'causal', 'bidirectional', 'bfloat16', 'isolated', 'cross'
  )
  @given(seed=SEEDS)
  def test_encode_and_score_are_the_two(self, variant, seed):
    s = scorer(variant)
    batch = support.batch(
      np.random.default_rng(seed), shared_visible=not s.config.encoder.causal
    )
    cache, logits = s.encode_and_score(
      batch.history, batch.candidates, batch.context
    )
    expected = s.encode(batch.history)
    tolerance = TOLERANCE[s.config.dtype]
    np.testing.assert_array_equal(cache.info.length, expected.info.length)
    self.assertEqual(cache.info.fingerprint, s.fingerprint)
    for x, y in ((cache.keys, expected.keys), (cache.values, expected.values)):
      np.testing.assert_allclose(
        np.asarray(x, np.float32), np.asarray(y, np.float32), **tolerance
      )
    np.testing.assert_allclose(
      real(logits, batch),
      real(s.score(cache, batch.candidates, batch.context), batch),
      **tolerance,
    )

  def test_extend_grows_past_its_bucket(self):
    s = scorer()
    batch = support.batch(np.random.default_rng(0), num_events=40)
    full = batch.history.replace(length=np.full(3, 40, np.int32))
    batch = batch.replace(
      history=full, candidates=batch.candidates.replace(visible=None)
    )
    cache = s.encode(full.replace(length=full.length * 0 + 15))
    self.assertEqual(cache.capacity, 16)
    tail = History(
      {k: v[:, 15:] for k, v in full.features.items()}, full.length - 15
    )
    cache = s.extend(cache, tail)
    self.assertEqual(cache.capacity, 64)
    np.testing.assert_allclose(
      real(s.score(cache, batch.candidates, batch.context), batch),
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
    ('cross_only', 3),  # Events have seen nothing.
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
      for variant, num_seeds in (('causal', 3), ('isolated', 1), ('cross', 1))
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
