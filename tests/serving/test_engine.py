"""Requests: retries, gaps, bad ones, roll-overs, and states without an end."""

import dataclasses
import threading
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from histjax import scoring
from histjax.data import requests as requests_lib
from histjax.data.row_maker import RowMaker
from histjax.data.rows import RowConfig, collate
from histjax.scoring import paged, transport
from histjax.serving import engine as engine_lib
from histjax.serving import planning
from histjax.serving.cache_store import State, StoreConfig
from histjax.serving.engine import Engine, EngineConfig, Request, part_size
from tests import support
from tests.scoring import scorers
from tests.serving import worlds

USER = 3
MILLION = 10**6


class Panic(BaseException):
  """As those of Rust: no Exception."""


class EngineTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.rng = np.random.default_rng(0)

  def engine(self, variant='strict', derived=True, *, device_bytes=1 << 18,
             **options):  # fmt: skip
    options = {'max_events': 32, 'max_new_events': 2, **options}
    self.variant, self.derived = variant, derived
    return Engine(
      worlds.scorer(variant, derived),
      EngineConfig(
        StoreConfig(device_bytes=device_bytes), max_rows=4, **options
      ),
      maker=worlds.maker(variant, derived),
    )

  def one(self, engine, request, source, history=None, seed=0):
    """The result of one request, compared if its history is given."""
    (result,) = engine.score([request])
    if isinstance(result, Exception):
      raise result
    self.assertEqual(result.source, source)
    if history is not None:
      self.assertEqual(result.num_events, len(history))
      wanted = worlds.expected(
        self.variant, self.derived, request, history, seed
      )
      worlds.check(result, wanted)
    return result

  def request(self, history, first=None, **kwargs):
    return worlds.request(self.rng, USER, history, first, **kwargs)

  def test_sources(self):
    engine = self.engine()
    past = worlds.events(self.rng, 6, USER)
    self.one(engine, self.request(past[:3], 0), 'encoded', past[:3])
    self.one(engine, self.request(past[:3]), 'hit', past[:3])
    self.one(engine, self.request(past[:5], 3), 'extended', past[:5])
    retry = self.request(past, 4)  # Event 4 is known.
    first = self.one(engine, retry, 'extended', past)
    again = self.one(engine, retry, 'hit', past)
    for name, values in first.logits.items():
      np.testing.assert_allclose(again.logits[name], values, rtol=1e-5)
    found = engine.metrics()
    self.assertEqual(
      [found[n] for n in ('hits', 'extends', 'misses')], [2, 2, 1]
    )
    self.assertEqual((found['users'], found['states']), (1, 1))

  def test_a_new_user_without_events(self):
    engine = self.engine()
    past = worlds.events(self.rng, 2, USER)
    self.one(engine, self.request([]), 'encoded', [])
    self.one(engine, self.request([]), 'hit', [])
    self.one(engine, self.request(past, 0), 'extended', past)

  def test_columns_and_keys(self):
    """As a log: columns or records, 3 or '3'."""
    engine = self.engine()
    past = worlds.events(self.rng, 3, USER)
    request = self.request(past, 0)
    self.one(engine, request, 'encoded', past)
    columns = {name: [e[name] for e in past] for name in past[0]}
    shown = {
      name: [c[name] for c in request.candidates]
      for name in request.candidates[0]
    }
    other = Request(str(USER), shown, {'age': USER, 'uid': USER}, columns)
    (result,) = engine.score([other])
    self.assertEqual(result.source, 'hit')
    worlds.check(result, worlds.expected('strict', True, request, past))

  def test_gaps_and_strangers(self):
    engine = self.engine()
    past = worlds.events(self.rng, 5, USER)
    for request, message in (
      (self.request(past, 2), 'first=2, but 0 events'),
      (self.request(past), 'first=5, but 0 events'),
    ):
      with self.assertRaisesRegex(engine_lib.UnknownHistory, message):
        self.one(engine, request, 'hit')
    self.one(engine, self.request(past[:2], 0), 'encoded', past[:2])
    with self.assertRaisesRegex(engine_lib.UnknownHistory, 'first=4, but 2'):
      self.one(engine, self.request(past, 4), 'hit')
    self.assertEqual(engine.metrics()['unknown'], 3)
    self.one(engine, self.request(past, 0), 'encoded', past)

  def test_another_past(self):
    engine = self.engine()
    past = worlds.events(self.rng, 4, USER)
    self.one(engine, self.request(past, 0), 'encoded', past)
    other = [dict(e) for e in past]
    other[2]['item'] = (other[2]['item'] + 1) % 8
    with self.assertRaisesRegex(ValueError, 'event 2 of user 3 differs'):
      self.one(engine, self.request(other, 1), 'hit')
    self.one(engine, self.request(past), 'hit', past)
    self.one(engine, self.request(other, 0), 'encoded', other)
    self.one(engine, self.request(other), 'hit', other)

  def test_another_past_that_is_not_kept(self):
    """Of events that were dropped there is a digest."""
    engine = self.engine('window', False)
    past = worlds.events(self.rng, 31, USER)
    self.one(engine, self.request(past[:30], 0), 'encoded', past[:30])
    self.assertGreater(engine.store.find('3').past.first, 5)
    self.one(engine, self.request(past, 0), 'extended', past)
    other = [dict(e) for e in past]
    other[1]['item'] = (other[1]['item'] + 1) % 8
    self.one(engine, self.request(other, 0), 'encoded', other)

  @parameterized.parameters('window', 'truncated')
  def test_a_shorter_past_that_is_not_kept(self, variant):
    """An account that begins anew has fewer events than are known."""
    engine = self.engine(variant, False)
    past = worlds.events(self.rng, 30, USER)
    self.one(engine, self.request(past, 0), 'encoded', past)
    kept = engine.store.find('3').past.first
    self.assertGreater(kept, 5)
    other = worlds.events(self.rng, 5, USER)
    self.one(engine, self.request(other, 0), 'encoded', other)
    self.one(engine, self.request(other), 'hit', other)
    # Begun like the one before, and not longer.
    self.one(engine, self.request(past, 0), 'encoded', past)
    some = past[: kept + 1]
    self.one(engine, self.request(some, 0), 'encoded', some)

  @parameterized.parameters('window', 'truncated')
  def test_events_of_which_none_are_kept(self, variant):
    engine = self.engine(variant, False)
    past = worlds.events(self.rng, 30, USER)
    self.one(engine, self.request(past, 0), 'encoded', past)
    kept = engine.store.find('3').past.first
    other = dataclasses.replace(
      self.request(past),
      events=worlds.events(self.rng, kept - 1, USER),
      first=1,
    )
    with self.assertRaisesRegex(
      engine_lib.UnknownHistory, f'before {kept} are not kept to compare'
    ):
      self.one(engine, other, 'hit', past)
    # Sent twice: those that are kept are compared.
    self.one(engine, self.request(past, 1), 'hit', past)
    changed = [dict(e) for e in past]
    changed[kept]['item'] = (changed[kept]['item'] + 1) % 8
    with self.assertRaisesRegex(ValueError, f'event {kept} of user 3 differs'):
      self.one(engine, self.request(changed, 1), 'hit')

  def test_an_old_request_comes_back(self):
    """It saw what was before it; what was dropped has to be sent again."""
    schema, features = worlds.fitted(True, request=True)
    maker = RowMaker(schema, RowConfig(history_length=9), features)
    config = support.config(schema=schema, encoder__window=3)
    scorer = scoring.Scorer(config, support.init(config)[1], worlds.BUCKETS)
    engine = Engine(
      scorer, EngineConfig(max_events=32, max_rows=4), maker=maker
    )
    past = worlds.events(self.rng, 30, USER)
    for number, e in enumerate(past):
      e['rid'] = 5 if number == 2 else 100 + number
    (result,) = engine.score([self.request(past, 0)])
    self.assertEqual(result.source, 'encoded')
    self.assertGreater(engine.store.find('3').past.first, 5)
    request = self.request(past)
    for shown in request.candidates:
      shown['rid'] = 5
    (result,) = engine.score([request])
    self.assertIsInstance(result, engine_lib.UnknownHistory)
    self.assertRegex(str(result), 'of so old a request')
    # No events are no whole history, and what is known stays.
    (result,) = engine.score([dataclasses.replace(request, first=0)])
    self.assertIsInstance(result, engine_lib.UnknownHistory)
    (result,) = engine.score([self.request(past)])
    self.assertEqual(result.num_events, 30)
    whole = dataclasses.replace(request, events=past, first=0)
    (result,) = engine.score([whole])
    row = requests_lib.make_row(
      schema,
      context={'uid': USER, **whole.context},
      history=past,
      candidates=whole.candidates,
      config=maker.config,
      features=features,
    )
    self.assertEqual(row.visible.tolist(), [2] * len(row.visible))
    batch = collate([row])
    wanted = scorer.score(
      scorer.encode(batch.history), batch.candidates, batch.context
    )
    worlds.check(result, {k: x[0] for k, x in wanted.items()})

  def test_one_bad_request_fails_alone(self):
    engine = self.engine()
    past = worlds.events(self.rng, 3, USER)
    good = self.request(past, 0)
    bad = [
      dataclasses.replace(good, user=0.5),
      dataclasses.replace(good, first=-1),
      dataclasses.replace(good, user=5, candidates=[]),
      dataclasses.replace(good, user=6, candidates=[{'item': 99}]),
      dataclasses.replace(good, user=7, context={}),
      dataclasses.replace(good, user=8, context={'age': 3, 'uid': 9}),
      dataclasses.replace(good, user=9, events=past[::-1]),
      dataclasses.replace(good, user=9, events=[{'ts': 1}]),
      dataclasses.replace(good, user=10, context=[3]),
      dataclasses.replace(good, user=11, events=past * 20),
      dataclasses.replace(good, user=12, candidates={'item': np.array(1)}),
    ]
    results = engine.score([*bad[:5], good, *bad[5:]])
    for i, result in enumerate(results):
      if i != 5:
        self.assertIsInstance(result, ValueError, i)
    worlds.check(results[5], worlds.expected('strict', True, good, past))
    self.assertEqual(engine.metrics()['users'], 1)
    with mock.patch.object(paged.PagedScorer, 'score') as score:
      self.assertLen(engine.score(bad), len(bad))
    score.assert_not_called()

  def test_odd_values_of_a_hit(self):
    """They are read, or refused, as they are of a whole row."""
    engine = self.engine()
    past = worlds.events(self.rng, 3, USER)
    good = self.request(past, number=3)
    self.one(engine, dataclasses.replace(good, events=past, first=0), 'encoded')
    for column, values in (
      ('item', [1, True, 2]),
      ('item', [1.0, 2.0, 3.0]),
      ('item', [np.int32(1), np.int64(2), 3]),
      ('item', np.array([1, 2, 3], np.uint8)),
      ('item', [1, 2, 99]),
      ('item', [1, -1, 2]),
      ('item', [1, None, 2]),
      ('item', [1, 2**70, 2]),
      ('price', [1, 2.5, 3]),
      ('price', [1.5, np.float32(0.5), 2.5]),
      ('price', [1.5, float('nan'), 2.5]),
      ('price', [1.5, 1e12, 2.5]),
      ('price', [1.5, 'x', 2.5]),
    ):
      shown = {
        name: [c[name] for c in good.candidates] for name in good.candidates[0]
      }
      request = dataclasses.replace(good, candidates={**shown, column: values})
      (found,) = engine.score([request])
      try:
        wanted = worlds.expected('strict', True, request, past)
      except ValueError as error:
        self.assertEqual((type(found), str(found)), (ValueError, str(error)))
        continue
      self.assertEqual(found.source, 'hit')
      worlds.check(found, wanted)

  def test_a_logit_that_is_not_finite(self):
    """Of those who share a program one fails, and not the others."""
    engine = self.engine()
    requests = [
      worlds.request(self.rng, user, [], 0, number=number)
      for user, number in ((3, 3), (4, 2), (5, 3))
    ]
    engine.score(requests)
    original = transport.Transport.fetch

    def fetch(self, logits):
      found = np.array(original(self, logits))
      found[0, 1, 1] = np.nan
      return found

    with mock.patch.object(transport.Transport, 'fetch', fetch):
      results = engine.score(requests)
    self.assertRegex(str(results[1]), 'row 0, candidate 1 is nan')
    for i in (0, 2):
      self.assertEqual(results[i].source, 'hit')
      worlds.check(results[i], worlds.expected('strict', True, requests[i], []))

  def test_too_many_events(self):
    engine = self.engine()
    past = worlds.events(self.rng, 33, USER)
    with self.assertRaisesRegex(ValueError, 'has 33 events, more than max_ev'):
      self.one(engine, self.request(past, 0), 'encoded')

  def test_a_program_that_fails(self):
    """Its requests fail, their states are lost, and nothing else."""
    engine = self.engine()
    past = worlds.events(self.rng, 4, USER)
    self.one(engine, self.request(past[:3], 0), 'encoded', past[:3])
    error = RuntimeError('out of memory')
    with mock.patch.object(paged.PagedScorer, 'extend', side_effect=error):
      with self.assertRaisesRegex(RuntimeError, 'out of memory'):
        self.one(engine, self.request(past, 3), 'extended')
    # What the host keeps is enough to read the events again.
    self.one(engine, self.request(past, 3), 'encoded', past)

  def test_one_user_twice(self):
    engine = self.engine()
    past = worlds.events(self.rng, 5, USER)
    requests = [
      self.request(past[:3], 0),
      worlds.request(self.rng, 4, [], 0),
      self.request(past[:4], 3),
      self.request(past, 4),
    ]
    results = engine.score(requests)
    sources = ['encoded', 'encoded', 'extended', 'extended']
    self.assertEqual([r.source for r in results], sources)
    for request, result, history in zip(
      requests, results, (past[:3], [], past[:4], past), strict=True
    ):
      worlds.check(result, worlds.expected('strict', True, request, history))

  def test_an_evicted_state_is_read_from_the_tail(self):
    page = 2 * 2 * 16 * 2 * 8 * 4
    engine = self.engine(device_bytes=3 * page)
    past = worlds.events(self.rng, 20, USER)
    self.one(engine, self.request(past, 0), 'encoded', past)
    other = worlds.events(self.rng, 20, 4)
    engine.score([worlds.request(self.rng, 4, other, 0)])
    self.assertEqual(engine.metrics()['evictions'], 1)
    self.one(engine, self.request(past), 'encoded', past)

  def test_a_state_that_loses_its_place_in_a_batch(self):
    """Two states where there is room for one: each is made again in turn."""
    page = 2 * 2 * 16 * 2 * 8 * 4
    engine = self.engine(device_bytes=3 * page)
    pasts = {user: worlds.events(self.rng, 20, user) for user in (3, 4)}
    for number in (18, 19, 20):
      requests = [
        worlds.request(
          self.rng, user, past[:number], 0 if number == 18 else number - 1
        )
        for user, past in pasts.items()
      ]
      for request, result in zip(requests, engine.score(requests), strict=True):
        past = pasts[request.user][:number]
        worlds.check(result, worlds.expected('strict', True, request, past))
      self.assertEqual(engine.metrics()['states'], 1)

  def test_a_state_that_is_lost_after_it_was_planned_with(self):
    """The first user's state grows into the second's only page."""
    page = 2 * 2 * 16 * 2 * 8 * 4
    engine = self.engine(device_bytes=3 * page)
    pasts = {
      3: worlds.events(self.rng, 17, 3),
      4: worlds.events(self.rng, 9, 4),
    }
    engine.score(
      [
        worlds.request(self.rng, user, past[:-1], 0)
        for user, past in pasts.items()
      ]
    )
    self.assertEqual(engine.metrics()['states'], 2)
    requests = [
      worlds.request(self.rng, user, past, len(past) - 1)
      for user, past in pasts.items()
    ]
    results = engine.score(requests)
    self.assertEqual([r.source for r in results], ['extended', 'encoded'])
    for request, result in zip(requests, results, strict=True):
      past = pasts[request.user]
      worlds.check(result, worlds.expected('strict', True, request, past))

  @parameterized.parameters('drop', 'forget')
  def test_a_state_that_somebody_drops_before_it_is_used(self, what):
    engine = self.engine()
    pasts = {user: worlds.events(self.rng, 6, user) for user in (3, 4)}
    requests = [
      worlds.request(self.rng, user, past, 0) for user, past in pasts.items()
    ]
    engine.score(requests)
    use, lost = engine.store.use, []

    def late(states, *args):
      if not lost:
        lost.append('4')
        getattr(engine.store, what)('4')
      return use(states, *args)

    requests = [
      worlds.request(self.rng, user, past) for user, past in pasts.items()
    ]
    with mock.patch.object(engine.store, 'use', late):
      results = engine.score(requests)
    self.assertEqual([r.source for r in results], ['hit', 'encoded'])
    for request, result in zip(requests, results, strict=True):
      past = pasts[request.user]
      worlds.check(result, worlds.expected('strict', True, request, past))
    found = engine.metrics()
    self.assertEqual((found['hits'], found['misses']), (1, 3))

  def test_headroom(self):
    engine = self.engine('truncated', headroom=3)
    past = worlds.events(self.rng, 12, USER)
    self.one(engine, self.request(past[:6], 0), 'encoded', past[:6])
    for number in (7, 8, 9):
      result = self.one(
        engine, self.request(past[:number], number - 1), 'extended'
      )
      self.assertEqual(result.num_events, number)
      self.assertEqual(engine.store.find('3').state, State(0, number))
    self.one(engine, self.request(past[:10], 9), 'encoded', past[:10])
    self.assertEqual(engine.store.find('3').state, State(4, 10))

  @parameterized.parameters(
    ('window', False), ('window_strict', True), ('cross_window', False)
  )
  def test_ten_million_events(self, variant, derived):
    """As exact as at the first events; states and tails stay as small."""
    engine = self.engine(variant, derived, max_events=16)
    past = worlds.events(self.rng, 60, USER)
    self.one(engine, self.request(past[:20], 0), 'encoded')
    known = engine.store.find('3')
    moved = dataclasses.replace(
      known.past,
      first=known.past.first + 10 * MILLION,
      visible=known.past.visible + 10 * MILLION,
    )
    engine.store.keep('3', moved, known.digest)
    engine.store.drop('3')
    sources, bytes_kept = set(), 0
    for number in range(20, 60, 2):
      request = dataclasses.replace(
        self.request(past[: number + 2]),
        first=10 * MILLION + number,
        events=past[number : number + 2],
      )
      (result,) = engine.score([request])
      sources.add(result.source)
      self.assertEqual(result.num_events, 10 * MILLION + number + 2)
      # Of the last 40 events, which are all that anything depends on.
      history = past[max(0, number - 38) : number + 2]
      worlds.check(result, worlds.expected(variant, derived, request, history))
      bytes_kept = max(bytes_kept, engine.metrics()['host_bytes'])
      state = engine.store.find('3').state
      self.assertLessEqual(state.length, 16)
    self.assertEqual(sources, {'extended', 'encoded'})
    self.assertLess(bytes_kept, 10_000)

  def test_roll_over(self):
    engine = self.engine()
    past = worlds.events(self.rng, 6, USER)
    self.one(engine, self.request(past[:4], 0), 'encoded', past[:4])
    before = engine.fingerprint
    engine.roll_over(
      worlds.scorer('strict', True, 1), worlds.maker('strict', True)
    )
    self.assertNotEqual(engine.fingerprint, before)
    # New events alone are enough: the others are kept.
    self.one(engine, self.request(past, 4), 'encoded', past, seed=1)
    engine.roll_over(
      worlds.scorer('strict', False), worlds.maker('strict', False)
    )
    self.derived = False
    with self.assertRaises(engine_lib.UnknownHistory):
      self.one(engine, self.request(past), 'hit')
    self.one(engine, self.request(past, 0), 'encoded', past)

  def test_a_roll_over_to_what_reads_events_otherwise(self):
    """Of features that learnt from another log nothing is kept."""
    engine = self.engine()
    past = worlds.events(self.rng, 6, USER)
    self.one(engine, self.request(past, 0), 'encoded', past)
    maker = worlds.maker('strict', True)
    states = [
      {k: v + 1 if v.dtype.kind == 'f' else v for k, v in state.items()}
      for state in maker.features.states
    ]
    other = dataclasses.replace(maker.features, states=tuple(states))
    engine.roll_over(
      worlds.scorer('strict', True, 1),
      RowMaker(maker.schema, maker.config, other),
    )
    with self.assertRaises(engine_lib.UnknownHistory):
      self.one(engine, self.request(past), 'hit')

  def test_a_roll_over_keeps_the_count_of_compilations(self):
    """A counter, of which Prometheus would see a restart."""
    engine = self.engine()
    one, other = engine.scorer, worlds.scorer('strict', True, 1)
    maker = worlds.maker('strict', True)
    numbers = [engine.metrics()['compilations']]
    for scorer, more in ((one, 2), (other, 3), (one, 0), (other, 1)):
      engine.roll_over(scorer, maker)
      scorer._compilations.number += more
      numbers.append(engine.metrics()['compilations'])
    self.assertEqual(np.diff(numbers).tolist(), [2, 3, 0, 1])
    self.assertEqual(numbers[0], 0)

  def test_a_roll_over_that_fails(self):
    """The old model stays; so do states of the same shape, and events."""
    engine = self.engine(
      'causal', False, max_events=16, device_bytes=2 * 4096
    )  # Two pages.
    engine.warm_up(candidates=4)
    past = worlds.events(self.rng, 4, USER)
    maker = worlds.maker('causal', False)
    self.one(engine, self.request(past, 0), 'encoded', past)

    def of(**fields):
      config = support.config(schema=maker.schema, **fields)
      _, variables = support.init(config)
      return scoring.Scorer(config, variables, worlds.BUCKETS)

    few = dataclasses.replace(worlds.BUCKETS, new_event_buckets=(1,))
    old = engine.scorer
    for other, said in (
      (of(encoder__num_layers=4), 'device_bytes=8192 must hold at least two'),
      (scoring.Scorer(old.config, old.variables, few), '2 new events do not'),
    ):
      with self.assertRaisesRegex(ValueError, said):
        engine.roll_over(other, maker)
      self.one(engine, self.request(past), 'hit', past)
    for source, num_layers in (
      ('hit', old.config.encoder.num_layers), ('encoded', 1)
    ):  # fmt: skip
      other = of(fusion='cross_only', encoder__num_layers=num_layers)
      with (
        mock.patch.object(
          paged.PagedScorer, 'warm_up', side_effect=RuntimeError('no program')
        ),
        self.assertRaisesRegex(RuntimeError, 'no program'),
      ):
        engine.roll_over(other, worlds.maker('truncated', False))
      self.assertIs(engine.scorer, old)
      self.one(engine, self.request(past), source, past)
    self.assertEqual(engine.metrics()['roll_overs'], 0)

  def test_a_roll_over_warms_up_what_the_other_model_has(self):
    """States that new events do not extend need fewer programs, and back."""
    engine = self.engine('causal', False, max_events=16)
    engine.warm_up(candidates=4)
    past = worlds.events(self.rng, 4, USER)
    for variant, source in (
      ('bidirectional', 'encoded'),
      ('causal', 'extended'),
    ):
      self.variant = variant
      engine.roll_over(worlds.scorer(variant), worlds.maker(variant, False))
      with scorers.count_compilations() as compiled:
        for request, wanted in (
          (self.request(past[:3], 0), 'encoded'),
          (self.request(past[:3]), 'hit'),
          (self.request(past, 3), source),
        ):
          self.one(engine, request, wanted)
      self.assertEmpty(compiled)

  @parameterized.parameters(False, True)
  def test_what_is_replayed_is_recorded_again(self, replayed):
    """Of new parameters, which nothing else would record."""
    engine = self.engine('causal', False, max_events=16)
    engine.warm_up(candidates=4)
    other = worlds.scorer('causal', False)
    changed = jax.tree.map(lambda x: x + 1, other.variables)
    other = scoring.Scorer(other.config, changed, other.options)
    warmed = []
    with (
      mock.patch.object(
        scoring.Scorer, 'is_replayed', property(lambda scorer: replayed)
      ),
      mock.patch.object(
        paged.PagedScorer,
        'warm_up',
        lambda scorer, pool, **sizes: (warmed.append(scorer), (pool, None))[1],
      ),
    ):
      engine.roll_over(other, worlds.maker('causal', False))
    self.assertLen(warmed, replayed)

  @parameterized.parameters(
    (KeyError('a shop that it does not know'), KeyError),
    (Panic('of Rust'), RuntimeError),
  )
  def test_an_error_of_a_derived_feature_is_of_its_request_alone(
    self, error, kind
  ):
    """Of any type: it is somebody else's code."""
    engine = self.engine()
    past = worlds.events(self.rng, 3, USER)
    good = self.request(past, 0)
    bad = dataclasses.replace(good, user=8)

    def plan(model, user, *args, plan=planning.Model._plan):
      if user == '8':
        raise error
      return plan(model, user, *args)

    with mock.patch.object(planning.Model, '_plan', plan):
      results = engine.score([bad, good, bad])
    worlds.check(results[1], worlds.expected('strict', True, good, past))
    for i in (0, 2):
      self.assertIsInstance(results[i], kind)
      self.assertIn(str(error), str(results[i]))

  @parameterized.parameters(*worlds.VARIANTS)
  def test_a_warm_up_makes_a_row(self, variant):
    """Imports, and the order of vocabularies, wait for no request."""
    engine = self.engine(variant)
    jobs = []

    def plan(model, *args, plan=planning.Model.plan):
      jobs.append(plan(model, *args))
      return jobs[-1]

    with (
      mock.patch.object(planning.Model, 'plan', plan),
      mock.patch.object(Engine, '_warm_up'),
    ):
      engine.warm_up(candidates=4)
      self.assertEqual([job.past.stop for job in jobs], [1])
      engine.roll_over(engine.scorer, worlds.maker(variant, True))
    self.assertLen(jobs, 2)
    self.assertEqual(engine.metrics()['users'], 0)

  def test_a_warm_up_without_a_row(self):
    """Of a feature that does not take what is made up."""
    engine = self.engine()
    with (
      mock.patch.object(planning.Model, 'plan', side_effect=KeyError('0')),
      mock.patch.object(Engine, '_warm_up') as warm_up,
    ):
      engine.warm_up(candidates=4)
    warm_up.assert_called_once()

  @parameterized.parameters('candidates', 'events', 'rows', 'new_events')
  def test_a_warm_up_for_nothing(self, name):
    sizes = {'candidates': 4, name: 0}
    with self.assertRaisesRegex(ValueError, f'{name}=0 must be at least 1'):
      self.engine().warm_up(**sizes)

  def test_a_warm_up_for_states_that_the_store_cannot_hold(self):
    events = 10**11  # Whose programs would take all memory.
    config = worlds.scorer('causal', False).config
    buckets = dataclasses.replace(worlds.BUCKETS, history_buckets=(16, events))
    engine = Engine(
      scoring.Scorer(config, support.init(config)[1], buckets),
      EngineConfig(StoreConfig(device_bytes=1 << 18), max_rows=4),
      maker=worlds.maker('causal', False),
    )
    with self.assertRaisesRegex(
      ValueError, f'a state of {events} events .*--store_mib=[0-9]+'
    ):
      engine.warm_up(candidates=4, events=events)
    engine.warm_up(candidates=4, events=16, rows=1)

  def test_a_warm_up_that_fails_is_not_repeated(self):
    engine = self.engine('causal', False)
    with self.assertRaisesRegex(ValueError, '64 events in a history do not'):
      engine.warm_up(candidates=4, events=64)
    engine.roll_over(
      worlds.scorer('bidirectional'), worlds.maker('bidirectional', False)
    )
    self.assertEqual(engine.metrics()['roll_overs'], 1)

  def test_what_a_window_dropped_another_model_asks_for(self):
    engine = self.engine('window', False)
    past = worlds.events(self.rng, 30, USER)
    self.one(engine, self.request(past, 0), 'encoded', past)
    self.assertGreater(engine.store.find('3').past.first, 5)
    whole = worlds.scorer('causal', False)
    maker = worlds.maker('window', False)  # The same rows.
    engine.roll_over(whole, maker)
    with self.assertRaisesRegex(engine_lib.UnknownHistory, 'from 0 on are ne'):
      self.one(engine, self.request(past), 'hit')
    self.variant = 'causal'
    self.one(engine, self.request(past, 0), 'encoded', past)

  def test_roll_over_under_load(self):
    """No request is dropped, none has scores of two models."""
    engine = self.engine()
    users = range(4)
    pasts = {user: worlds.events(self.rng, 8, user) for user in users}
    requests = {
      user: [
        dataclasses.replace(
          worlds.request(self.rng, user, pasts[user], 0, number=4),
          events=pasts[user][:n],
        )
        for n in range(1, 9)
      ]
      for user in users
    }
    found = {user: [] for user in users}

    def ask(user):
      for _ in range(3):
        for request in requests[user]:
          found[user].append((request, *engine.score([request])))

    threads = [threading.Thread(target=ask, args=[user]) for user in users]
    for thread in threads:
      thread.start()
    for seed in (1, 0, 1, 0):
      engine.roll_over(
        worlds.scorer('strict', True, seed), worlds.maker('strict', True)
      )
    for thread in threads:
      thread.join()
    for user in users:
      self.assertLen(found[user], 24)
      for request, result in found[user]:
        # A history that is shorter than the one known is its beginning.
        history = pasts[user][: result.num_events]
        wanted = [
          worlds.expected('strict', True, request, history, seed)
          for seed in (0, 1)
        ]
        equal = [
          all(
            np.allclose(result.logits[n], x[n], **worlds.TOLERANCE) for n in x
          )
          for x in wanted
        ]
        self.assertIn(equal, ([True, False], [False, True]))
    counts = engine.store.counts
    self.assertEqual(counts.hits + counts.extends + counts.misses, 4 * 24)

  def test_compiles_nothing_new(self):
    engine = self.engine(max_events=16)
    done = engine.warm_up(candidates=4, visible=True)
    self.assertEqual(done.num_programs, 2 * (1 + 1 + 2))
    self.assertIn(engine.store.cheaper(16), ('encode', 'copy'))
    pasts = {user: worlds.events(self.rng, 12, user) for user in range(3)}
    with scorers.count_compilations() as compiled:
      for number in range(1, 13):
        requests = [
          worlds.request(
            self.rng, user, past[:number], max(0, number - 1 - (number > 9))
          )
          for user, past in pasts.items()
        ]
        for result in engine.score(requests):
          self.assertNotIsInstance(result, Exception)
      engine.roll_over(
        worlds.scorer('strict', True, 1), worlds.maker('strict', True)
      )
      for result in engine.score(requests):
        self.assertEqual(result.source, 'encoded')
    self.assertEmpty(compiled)

  def test_compiles_what_rows_of_another_run_need(self):
    """Those of strict ties see less than all, which is another program."""
    engine = self.engine('causal', max_events=16)
    engine.warm_up(candidates=4, events=16)
    engine.roll_over(
      worlds.scorer('strict', True, 1), worlds.maker('strict', True)
    )
    past = worlds.events(self.rng, 5, 1)
    request = worlds.request(self.rng, 1, past, 0)
    for item in request.candidates:
      item['ts'] = past[-1]['ts']
    again = dataclasses.replace(request, events=())
    with scorers.count_compilations() as compiled:
      results = engine.score([request]) + engine.score([again])
    self.assertEmpty(compiled)
    wanted = worlds.expected('strict', True, request, past, seed=1)
    for result in results:
      worlds.check(result, wanted)

  def test_users_are_padded_or_not(self):
    def parts(number, rows, **options):
      config, found = EngineConfig(max_rows=rows[-1], **options), []
      fit = scoring.ScorerConfig(row_buckets=rows).rows
      while number:
        found.append(part_size(number, config, fit))
        number -= found[-1]
      return found

    self.assertEqual(parts(11, (1, 4)), [4, 4, 3])
    self.assertEqual(parts(11, (1, 4), pad_rows=False), [4, 4, 1, 1, 1])
    self.assertEqual(parts(7, (1, 2, 4), pad_rows=False), [4, 2, 1])
    self.assertEqual(parts(3, (2, 4), pad_rows=False), [2, 1])

  def test_refused(self):
    with self.assertRaisesRegex(ValueError, 'max_events=64 is beyond the larg'):
      self.engine(max_events=64)
    with self.assertRaisesRegex(ValueError, 'max_events=4 does not hold the 5'):
      self.engine('window', max_events=4)
    with self.assertRaisesRegex(ValueError, 'headroom=-1'):
      EngineConfig(headroom=-1)
    with self.assertRaisesRegex(ValueError, 'max_rows=0'):
      EngineConfig(max_rows=0)
    with self.assertRaisesRegex(ValueError, 'scorer was made of parameters'):
      Engine(worlds.scorer('strict', True))
    late = support.config(fusion='target_attention')
    _, variables = support.init(late)
    with self.assertRaisesRegex(ValueError, 'cannot score from a cached hist'):
      Engine(scoring.Scorer(late, variables))


if __name__ == '__main__':
  absltest.main()
