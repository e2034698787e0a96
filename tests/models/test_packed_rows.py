"""Packed rows train exactly what the users' own rows do."""

import functools

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import Scorer
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.models import ranker
from histjax.nn import fusion
from histjax.scoring import inputs
from histjax.training import losses, tables
from tests import marks, support

# Float32 sums in another order; logits and gradients are of order 1.
TOLERANCE = {'rtol': 1e-5, 'atol': 1e-5}
VARIANTS = {
  'append_cross': {},
  'window': {'encoder__window': 3},
  'no_positions': {'encoder__positions': 'none'},
  'append_isolated': {'fusion': 'append_isolated', 'encoder__window': 4},
  'target_attention': {'fusion': 'target_attention', 'encoder__window': 4},
  'mean_pool': {'fusion': 'mean_pool'},
  'none': {'fusion': 'none'},
  'cross_only': {'fusion': 'cross_only', 'encoder__window': 4},
}
RANK_LOSS = losses.RankLossConfig(weight=1.0, span=4)
USERS, LONGEST = 6, 9


def log_of(seed: int) -> EventLog:
  """Ragged users, some with a single event."""
  rng = np.random.default_rng(seed)
  count = rng.integers(1, LONGEST + 1, USERS)
  count[0] = 1
  n = int(count.sum())
  columns = support.features(
    rng, support.SCHEMA.item + support.SCHEMA.action, (n,)
  )
  columns['age'] = np.repeat(rng.normal(size=USERS), count)
  columns['user'] = np.repeat(np.arange(USERS), count)
  columns['time'] = np.arange(n)
  columns |= {k: rng.integers(0, 2, n) for k in ('click', 'like')}
  return EventLog.from_columns(columns, support.SCHEMA)


@functools.cache
def compiled(variant):
  """Variables; logits, loss and gradient of a batch, pairs weighing `w`."""
  model, variables = support.init(support.config(**VARIANTS[variant]))

  @jax.jit
  def run(variables, batch, w):
    def loss(variables):
      logits = model.apply(variables, batch)
      alone = losses.batch_loss(logits, batch)
      both = losses.batch_loss(logits, batch, rank_loss=RANK_LOSS)
      return alone + w * (both - alone), logits

    return jax.value_and_grad(loss, has_aux=True)(variables)

  return variables, run


def by_event(batch, logits, events) -> dict[str, np.ndarray]:
  """Logits of each event of the log, NaN where it is no candidate."""
  mask = batch.candidates.mask
  found = {}
  for task, values in logits.items():
    found[task] = np.full(USERS * LONGEST, np.nan, np.float32)
    found[task][events] = np.asarray(values)[mask]
  return found


class PackedRowsTest(parameterized.TestCase):
  @marks.slow_unless(lambda variant: variant == 'window')
  @parameterized.parameters(*VARIANTS)
  @support.examples(4)
  @given(seed=st.integers(0, 2**32 - 1))
  def test_equal_the_users_own(self, variant, seed):
    variables, run = compiled(variant)
    rng = np.random.default_rng(seed)
    log = log_of(seed)
    mask = rng.random(len(log)) < 0.8
    mask[rng.integers(len(log))] = True
    # Pieces of one user may share a row with each other, too.
    rows = make_rows(log, mask, RowConfig(max_candidates=5))
    order = rng.permutation(len(rows))
    cut = int(rng.integers(0, len(rows) + 1))
    total = USERS * LONGEST
    packed = rows.batch(
      order,
      num_rows=3,
      num_events=2 * total,
      num_candidates=total,
      pieces=[cut, len(rows) - cut],
    )
    own = rows.batch(
      order,
      num_rows=2 * USERS,
      num_events=LONGEST,
      num_candidates=5,
    )
    events = np.concatenate([rows.candidate_events(r) for r in order])
    for weight in (0.0, 1.0):
      (loss, logits), grads = run(variables, packed, weight)
      (own_loss, own_logits), own_grads = run(variables, own, weight)
      chex.assert_trees_all_close(
        by_event(packed, logits, events),
        by_event(own, own_logits, events),
        **TOLERANCE,
      )
      np.testing.assert_allclose(loss, own_loss, **TOLERANCE)
      chex.assert_trees_all_close(grads, own_grads, **TOLERANCE)
    single = make_rows(log, mask, RowConfig('pointwise'))
    pointwise = single.batch(
      np.arange(len(single)),
      num_rows=total,
      num_events=LONGEST,
      num_candidates=1,
    )
    (loss, logits), grads = run(variables, packed, 0.0)
    (own_loss, own_logits), own_grads = run(variables, pointwise, 0.0)
    chex.assert_trees_all_close(
      by_event(packed, logits, events),
      by_event(pointwise, own_logits, single.events),
      **TOLERANCE,
    )
    np.testing.assert_allclose(loss, own_loss, **TOLERANCE)
    chex.assert_trees_all_close(grads, own_grads, **TOLERANCE)

  def test_neighbours_do_not_matter(self):
    variables, run = compiled('window')
    rows = make_rows(log_of(0), log_of(0).user >= 0, RowConfig())
    total = USERS * LONGEST
    size = {'num_rows': 3, 'num_events': 2 * total, 'num_candidates': total}
    count = rows.candidate_counts

    def logits(order):
      batch = rows.batch(order, **size, pieces=[len(order)])
      found = np.asarray(run(variables, batch, 0.0)[0][1]['click'])[0]
      cuts = np.cumsum(count[order])
      return np.split(found, cuts)[: len(order)]

    alone = logits([3])[0]
    np.testing.assert_allclose(logits([5, 3, 0])[1], alone, **TOLERANCE)
    np.testing.assert_allclose(logits([0, 1, 2, 3])[3], alone, **TOLERANCE)

  def test_touches_the_rows_of_tables_that_the_users_own_do(self):
    schema = support.SCHEMA
    rows = make_rows(log_of(1), log_of(1).user >= 0, RowConfig())
    total = USERS * LONGEST
    size = {'num_events': total, 'num_candidates': total}
    order = np.arange(len(rows))
    packed = rows.batch(order, num_rows=2, **size, pieces=[2, len(rows) - 2])
    own = rows.batch(order, num_rows=USERS + 1, **size)
    touch = functools.partial(
      tables.touch, schema, names=schema.tables, max_unique={}
    )
    (found, placed), (expected, _) = touch(packed), touch(own)
    for name, ids in found.items():
      ids = ids[ids != tables.NO_ROW]
      np.testing.assert_array_equal(
        ids, expected[name][expected[name] != tables.NO_ROW]
      )
    for name, ids in placed.context.items():
      chex.assert_shape(ids, packed.context[name].shape)

  @parameterized.parameters(
    ({'fusion': 'append_self'}, "fusion='append_self' cannot take packed rows"),
    ({'fusion': 'concat'}, "fusion='concat' cannot take packed rows"),
    ({'encoder__causal': False}, 'encoder.causal=False cannot take packed'),
    ({'encoder__positions': 'recency'}, "positions='recency' cannot take"),
  )
  def test_models_that_cannot(self, fields, message):
    model, variables = support.init(support.config(**fields))
    rows = make_rows(log_of(0), log_of(0).user >= 0, RowConfig())
    batch = rows.batch(
      [0, 1], num_rows=1, num_events=30, num_candidates=30, pieces=[2]
    )
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(model.apply, variables, batch)

  def test_scoring_takes_none(self):
    model, variables = support.init(support.config())
    rows = make_rows(log_of(0), log_of(0).user >= 0, RowConfig())
    batch = rows.batch(
      [0, 1], num_rows=1, num_events=30, num_candidates=30, pieces=[2]
    )
    with self.assertRaisesRegex(ValueError, 'rows are packed, which is for tr'):
      inputs.check_batch(support.SCHEMA, batch)
    scorer = Scorer(model.config, variables)
    for score in (scorer.score_joint, scorer.score_plain):
      with self.assertRaisesRegex(ValueError, 'rows are packed, which is for'):
        score(batch)
    variables |= ranker.pack(model.config, variables)
    with self.assertRaisesRegex(ValueError, "collection 'tower' is for scor"):
      jax.eval_shape(model.apply, variables, batch)

  def test_every_fusion_is_tested(self):
    tested = {VARIANTS[k].get('fusion', 'append_cross') for k in VARIANTS}
    self.assertEqual(tested, set(fusion.packable()))


if __name__ == '__main__':
  absltest.main()
