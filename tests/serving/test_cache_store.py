"""Budgets, order and age of what is kept; values, whatever happens after."""

import dataclasses
import hashlib
import threading
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from histjax import scoring
from histjax.cache import CacheInfo, HistoryCache, quantize
from histjax.serving import pages
from histjax.serving.cache_store import (
  CacheStore,
  LostStateError,
  State,
  StoreConfig,
  Update,
)
from tests import support
from tests.scoring import scorers
from tests.serving import worlds

CONFIG = support.config()
SHAPE = pages.Shape.of(CONFIG, scoring.ScorerConfig())
MODEL, OTHER = 'a' * 64, 'b' * 64
BUCKETS = scoring.ScorerConfig(history_buckets=(16, 48), row_buckets=(4,))


def cache_of(rng, *lengths, model=MODEL, capacity=48) -> HistoryCache:
  shape = (SHAPE.layers, 4, capacity, SHAPE.heads, SHAPE.head_dim)
  keys, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
  return HistoryCache.of_users(
    jax.numpy.asarray(keys),
    jax.numpy.asarray(values),
    CacheInfo(np.array(lengths, np.int32), model, BUCKETS.row_buckets),
  )


class StoreTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.rng = np.random.default_rng(0)
    self.now = 0.0

  def store(self, num_pages=8, **options):
    options.setdefault('device_bytes', num_pages * SHAPE.nbytes)
    return CacheStore(
      CONFIG,
      MODEL,
      StoreConfig(**options),
      BUCKETS,
      clock=lambda: self.now,
    )

  def put(self, store, users, *lengths, same=None, **kwargs):
    past = worlds.maker('causal', False).start()
    for user in users:
      store.keep(user, past, hashlib.blake2b())
    cache = cache_of(self.rng, *lengths, **kwargs)
    return cache, store.put(users, cache, [0] * len(users), same)

  def check(self, store, users, cache, rows):
    found, copy = store.get(users, MODEL)
    self.assertEqual(found, list(range(len(users))))
    for row, wanted in enumerate(rows):
      length = int(cache.info.length[wanted])
      self.assertEqual(copy.info.length[row], length)
      for a, b in ((copy.keys, cache.keys), (copy.values, cache.values)):
        np.testing.assert_array_equal(a[:, row, :length], b[:, wanted, :length])
    return copy

  def test_get_is_put(self):
    store = self.store(32)
    cache, kept = self.put(store, ['a', 'b', 'c'], 5, 20, 0)
    self.assertEqual(kept, [True] * 3)
    copy = self.check(store, ['b', 'a', 'c'], cache, [1, 0, 2])
    self.assertEqual(copy.keys.shape[1:3], (4, 48))
    self.assertEqual(copy.info.fingerprint, MODEL)
    self.assertEqual(store.find('b').state, State(0, 20))
    self.assertEqual(store.get(['x', 'a'], MODEL)[0], [1])
    self.assertEqual(store.get(['x'], MODEL), ([], None))
    self.assertEqual(store.get(['b'], MODEL, 16), ([], None))
    found, small = store.get(['a'], MODEL, 16)
    self.assertEqual((found, small.capacity), ([0], 16))
    self.assertEqual(store.used_bytes, 3 * SHAPE.nbytes)

  def test_no_one_else_s_events(self):
    """Not even where nobody looks: what is there could be infinite."""
    store = self.store(8)
    self.put(store, ['a'], 48)
    store.forget('a')
    cache, _ = self.put(store, ['b'], 5)
    _, copy = store.get(['b'], MODEL, 48)
    np.testing.assert_array_equal(copy.keys[:, 0, :16], cache.keys[:, 0, :16])
    self.assertEqual(float(abs(copy.keys[:, 0, 16:]).max()), 0)
    self.assertEqual(float(abs(copy.keys[:, 1:]).max()), 0)

  def test_a_state_in_use_is_a_value(self):
    store = self.store(4)
    cache, _ = self.put(store, ['a'], 48)
    _, copy = store.get(['a'], MODEL)
    other, kept = self.put(store, ['b'], 48)
    self.assertEqual(kept, [True])
    self.assertEqual(store.counts.evictions, 1)
    self.assertEqual(store.get(['a'], MODEL), ([], None))
    np.testing.assert_array_equal(copy.keys[:, 0], cache.keys[:, 0])
    self.check(store, ['b'], other, [0])

  def test_growth_writes_new_pages_alone(self):
    store = self.store(8)
    first, _ = self.put(store, ['a'], 20)
    longer, kept = self.put(store, ['a'], 40, same=[20])
    self.assertEqual(kept, [True])
    _, copy = store.get(['a'], MODEL)
    np.testing.assert_array_equal(copy.keys[:, 0, :16], first.keys[:, 0, :16])
    np.testing.assert_array_equal(
      copy.keys[:, 0, 16:40], longer.keys[:, 0, 16:40]
    )
    self.assertEqual(store.used_bytes, 3 * SHAPE.nbytes)
    with self.assertRaisesRegex(ValueError, 'begins with event 0 and not 3'):
      store.put(['a'], longer, [3], [20])
    shorter, _ = self.put(store, ['a'], 4)
    self.check(store, ['a'], shorter, [0])
    self.assertEqual(store.used_bytes, SHAPE.nbytes)

  def test_in_place(self):
    store = self.store(8)
    self.put(store, ['a'], 20)
    old = store._pages.pool.keys
    before = old.unsafe_buffer_pointer()
    self.put(store, ['a'], 20)
    self.assertEqual(store._pages.pool.keys.unsafe_buffer_pointer(), before)
    self.assertTrue(old.is_deleted())

  def test_least_recently_used_goes_first(self):
    store = self.store(5)
    self.put(store, ['a', 'b'], 20, 20)
    store.get(['a'], MODEL)
    self.put(store, ['c'], 20)
    self.assertIsNone(store.find('b').state)
    self.assertIsNotNone(store.find('a').state)
    self.assertEqual(store.counts.evictions, 1)
    _, kept = self.put(store, ['d', 'e', 'f'], 20, 20, 20)
    self.assertEqual(kept, [True, True, False])
    self.assertEqual(store.counts.refused, 1)
    self.assertIsNone(store.find('f').state)
    self.assertEqual(store.num_states, 2)
    self.assertEqual(store.used_bytes, 4 * SHAPE.nbytes)

  def test_what_a_program_reads_was_used(self):
    store = self.store(5)
    self.put(store, ['a', 'b'], 20, 20)
    store.use({'a': State(0, 20)}, 48, lambda pool, place: None)
    self.put(store, ['c'], 20)
    states = store.states(['a', 'b'], MODEL)
    self.assertEqual(states, [State(0, 20), None])

  def test_too_long_evicts_nobody(self):
    store = self.store(3)
    self.put(store, ['a'], 20)
    _, kept = self.put(store, ['b'], 48)
    self.assertEqual(kept, [False])
    self.assertIsNotNone(store.find('a').state)
    self.assertEqual(store.max_events, 32)

  def test_ttl(self):
    store = self.store(8, ttl=10.0)
    self.put(store, ['a', 'b'], 5, 5)
    self.now = 9.0
    self.assertIsNotNone(store.find('a'))
    self.now = 10.0
    self.assertEqual(store.get(['b'], MODEL), ([], None))
    self.assertIsNone(store.find('b'))
    self.assertEqual(store.counts.expirations, 1)
    self.assertEqual(store.counts.evictions, 0)
    self.now = 18.0
    self.assertIsNotNone(store.find('a'))
    self.assertLen(store, 1)

  def test_host_budget(self):
    past = worlds.maker('causal', False).start()
    store = self.store(8, host_bytes=5000)
    self.put(store, ['a', 'b'], 5, 5)
    self.assertLessEqual(store.host_bytes, 5000)
    self.put(store, ['c'], 5)
    self.assertIsNone(store.find('a'))
    self.assertEqual(store.counts.forgotten, 1)
    self.assertEqual(store.used_bytes, 2 * SHAPE.nbytes)
    none = self.store(8, host_bytes=0)
    none.keep('a', past, hashlib.blake2b())
    self.assertEqual((len(none), none.host_bytes), (0, 0))
    cache = cache_of(self.rng, 5)
    self.assertEqual(none.put(['a'], cache, [0]), [False])

  def test_another_model(self):
    store = self.store(8)
    _, kept = self.put(store, ['a'], 5, model=OTHER)
    self.assertEqual(kept, [False])
    self.assertEqual(store.counts.foreign, 1)
    cache, _ = self.put(store, ['a'], 5)
    self.assertEqual(store.get(['a'], OTHER), ([], None))
    self.check(store, ['a'], cache, [0])
    store.roll_over(CONFIG, OTHER, keep_events=True)
    self.assertEqual(store.get(['a'], MODEL), ([], None))
    self.assertEqual(store.get(['a'], OTHER), ([], None))
    self.assertIsNotNone(store.find('a'))
    self.assertEqual(store.used_bytes, 0)
    narrow = support.config(encoder__width=8)
    store.roll_over(narrow, MODEL, keep_events=False)
    self.assertIsNone(store.find('a'))
    self.assertEqual(store.host_bytes, 0)
    self.assertLessEqual(store.device_bytes, store.options.device_bytes)
    self.assertEqual(store.device_bytes, 8 * SHAPE.nbytes)

  def test_a_roll_over_that_fails(self):
    """The store is of the model that it was of, and works."""
    store = self.store(8)
    cache, _ = self.put(store, ['a'], 20)
    store.measured('encode', 16, 1.0)
    wide = support.config(encoder__num_layers=10)

    def fail():
      self.assertNotEqual(store._pages.shape, SHAPE)
      raise RuntimeError('no program')

    with self.assertRaisesRegex(ValueError, 'at least two pages of 20480 byt'):
      store.roll_over(wide, OTHER, keep_events=False, warm_up=fail)
    self.check(store, ['a'], cache, [0])
    with self.assertRaises(ZeroDivisionError):
      store.roll_over(CONFIG, OTHER, keep_events=False, warm_up=lambda: 1 // 0)
    self.check(store, ['a'], cache, [0])

    narrow, made = support.config(encoder__width=8), []

    def zeros(shape, *args, make=pages.Shape.zeros):
      if made and made[-1].shape[0] == SHAPE.layers:
        if shape != SHAPE:
          raise RuntimeError('no memory')
      made.append(make(shape, *args))
      return made[-1]

    with (
      mock.patch.object(pages.Shape, 'zeros', zeros),
      self.assertRaisesRegex(RuntimeError, 'no memory'),
    ):
      store.roll_over(narrow, OTHER, keep_events=False)
    self.assertTrue(made[0].is_deleted())
    self.assertLen(made, 3)
    for _ in range(2):
      self.assertIsNone(store.find('a').state)
      self.assertEqual(store.fingerprint, MODEL)
      self.assertEqual(store.used_bytes, 0)
      cache, kept = self.put(store, ['a'], 20)
      self.assertEqual(kept, [True])
      self.check(store, ['a'], cache, [0])
      with self.assertRaisesRegex(RuntimeError, 'no program'):
        store.roll_over(narrow, OTHER, keep_events=False, warm_up=fail)
    self.assertEqual(store._seconds, {('encode', 16): 1.0})

  def test_another_model_of_other_buckets_and_bytes(self):
    store = self.store(8)
    options = dataclasses.replace(BUCKETS, cache_dtype='int8', row_buckets=(8,))
    store.roll_over(CONFIG, OTHER, keep_events=True, scorer_config=options)
    self.assertEqual(store._pages.shape, pages.Shape.of(CONFIG, options))
    self.assertLessEqual(store.device_bytes, store.options.device_bytes)
    place = store.use({}, 16, lambda pool, place: place)
    self.assertLen(place.read, 8)

  def test_compiles_nothing_new(self):
    store = self.store(8)
    store.warm_up([4], [16, 48])
    caches = {n: cache_of(self.rng, 5, 7, capacity=n) for n in (16, 48)}
    for user in 'abcd':
      store.keep(user, worlds.maker('causal', False).start(), hashlib.blake2b())
    with scorers.count_compilations() as compiled:
      for capacity, cache in caches.items():
        for users in ('ab', 'cd'):
          store.put([*users], cache, [0, 0])
          store.get([*users], MODEL, capacity)
          store.get([users[0]], MODEL, capacity)
    self.assertEmpty(compiled)

  def test_cheaper(self):
    store = self.store(8)
    with self.assertRaisesRegex(ValueError, r'capacity=16: measured were \[\]'):
      store.cheaper(16)
    self.assertGreater(store.measure_copy(16), 0)
    store.measured('encode', 16, 1e-12)
    self.assertEqual(store.cheaper(16), 'encode')
    store.measured('copy', 16, 1e-13)
    store.measured('copy', 16, 1.0)  # The machine was busy.
    self.assertEqual(store.cheaper(16), 'copy')

  def test_a_failed_write(self):
    store = self.store(8)
    first, _ = self.put(store, ['a'], 5)
    store.keep('b', store.find('a').past, hashlib.blake2b())
    bad = cache_of(self.rng, 5)
    bad = bad.replace(keys=bad.keys[..., :3], values=bad.values[..., :3])
    with self.assertRaisesRegex(ValueError, 'must be the same'):
      store.put(['b'], bad, [0])
    self.assertIsNone(store.find('b').state)
    self.check(store, ['a'], first, [0])

    def take_memory(pool):
      pool.keys.delete()
      raise RuntimeError('the device is lost')

    with self.assertRaisesRegex(RuntimeError, 'is lost'):
      store.warm_up_programs(take_memory)
    self.assertEqual(store.used_bytes, 0)
    self.assertIsNone(store.find('a').state)
    cache, kept = self.put(store, ['b'], 5)
    self.assertEqual(kept, [True])
    self.check(store, ['b'], cache, [0])

  def test_counts_wait_for_no_program(self):
    """`/metrics` answers while a server warms up."""
    store, found = self.store(8), []
    self.put(store, ['a', 'b'], 5, 5)
    store.drop('b')

    def program(pool):
      def count():
        found.append((len(store), store.num_states, store.used_bytes))

      thread = threading.Thread(target=count, daemon=True)
      thread.start()
      thread.join(60)
      return pool, None

    store.warm_up_programs(program)
    self.assertEqual(found, [(2, 1, SHAPE.nbytes)])

  @parameterized.parameters(*range(3))
  def test_the_number_of_states(self, seed):
    store = self.store(5, ttl=9, host_bytes=20_000)
    rng = np.random.default_rng(seed)
    for _ in range(60):
      users = rng.permutation([*'abcdefgh'])[:3].tolist()
      match rng.integers(5):
        case 0:
          store.drop(users[0])
        case 1:
          store.forget(users[0])
        case 2:
          store.roll_over(CONFIG, MODEL, keep_events=bool(rng.integers(2)))
        case _:
          self.put(store, users, *rng.integers(1, 40, 3).tolist())
      self.now += int(rng.integers(3))
      known = [store.find(user) for user in 'abcdefgh']
      states = [x.state for x in known if x is not None]
      self.assertEqual(len(store), len(states))
      wanted = sum(x is not None for x in states)
      self.assertEqual(store.num_states, wanted)

  def test_update_of_a_state_that_was_lost(self):
    """Someone else's events took its place: a part alone is not kept."""
    maker = worlds.maker('causal', False)
    user = np.zeros(1, np.uint64)
    past = maker.extend(
      maker.start(), maker.read(worlds.events(self.rng, 40, 3)), user
    )
    size = past.nbytes + 2048
    store = self.store(16, host_bytes=size + 1000)
    self.put(store, ['a', 'b'], 17, 17)
    updates = [
      Update('a', past, hashlib.blake2b(), State(0, 18), 17),
      Update('b', store.find('b').past, hashlib.blake2b(), State(0, 18), 17),
    ]
    place = store.update(updates, 48, lambda pool, place: (pool, place))
    self.assertEqual(store.counts.forgotten, 2)
    self.assertTrue((place.read[:2, :2] > 0).all())  # Of both, as it was.
    none = store._pages.num_pages
    self.assertEqual(place.write[:2].tolist(), [[none] * 3] * 2)
    self.assertIsNone(store.find('b').state)
    self.assertEqual(store.used_bytes, 0)
    encode = dataclasses.replace(updates[1], same=0)
    place = store.update([encode], 48, lambda pool, place: (pool, place))
    self.assertLess(place.write[0, :2].max(), none)
    self.assertEqual(place.write[0, 2], none)
    self.assertEqual(store.find('b').state, State(0, 18))
    place = store.update(
      [dataclasses.replace(updates[1], state=State(0, 19), same=18)],
      48,
      lambda pool, place: (pool, place),
    )
    self.assertEqual(place.write[0, 0], none)
    self.assertLess(place.write[0, 1], none)

  def test_a_state_that_is_not_there_is_not_read(self):
    store = self.store()
    self.put(store, ['a', 'b'], 5, 17)
    held = {'a': State(0, 5), 'b': State(0, 17)}
    place = store.use(held, 48, lambda pool, place: place)
    self.assertEqual(place.length.tolist(), [5, 17])
    self.assertEqual(place.write.size, 0)
    past = store.find('a').past
    program = mock.Mock()
    for state in (State(0, 4), State(1, 5)):
      with self.assertRaisesRegex(LostStateError, "'a' has no state"):
        store.use({'b': State(0, 17), 'a': state}, 48, program)
    for start, same in ((0, 4), (1, 4)):
      update = Update('a', past, hashlib.blake2b(), State(start, 9), same)
      with self.assertRaisesRegex(LostStateError, "'a' has no state"):
        store.update([update], 48, program)
    store.drop('b')
    with self.assertRaisesRegex(LostStateError, "'b' has no state"):
      store.use(held, 48, program)
    store.forget('a')
    with self.assertRaisesRegex(LostStateError, "'a' has no state"):
      store.use(held, 48, program)
    program.assert_not_called()
    self.assertIsNone(store.find('a'))

  def test_quantized(self):
    options = dataclasses.replace(BUCKETS, cache_dtype='int8')
    shape = pages.Shape.of(CONFIG, options)
    store = CacheStore(CONFIG, MODEL, StoreConfig(8 * shape.nbytes), options)
    self.assertEqual(store.device_bytes, 8 * shape.nbytes)
    pool = store._pages.pool
    self.assertEqual(pool.keys.nbytes + pool.values.nbytes, 8 * shape.nbytes)
    store.keep('a', worlds.maker('causal', False).start(), hashlib.blake2b())
    cache = cache_of(self.rng, 20)
    with self.assertRaisesRegex(ValueError, 'quantized and the store is not'):
      store.put(['a'], cache, [0])
    cache = quantize(cache, 'int8')
    store.put(['a'], cache, [0])
    _, copy = store.get(['a'], MODEL)
    np.testing.assert_array_equal(
      copy.keys.codes[:, 0, :20], cache.keys.codes[:, 0, :20]
    )
    np.testing.assert_array_equal(
      copy.values.scale[:, 0, :2], cache.values.scale[:, 0, :2]
    )

  def test_more_than_the_device_has(self):
    with self.assertRaisesRegex(
      ValueError, r'^device_bytes=\d+ are more than the device.*--store_mib'
    ):
      self.store(device_bytes=1 << 56)
    with (
      mock.patch.object(
        pages.Shape, 'zeros', side_effect=RuntimeError('it is lost')
      ),
      self.assertRaisesRegex(RuntimeError, 'it is lost'),
    ):
      self.store()

  def test_refused(self):
    with self.assertRaisesRegex(
      ValueError, r'two pages .* raise it \(--store_mib'
    ):
      self.store(1)
    for field in ('device_bytes', 'host_bytes'):
      with self.assertRaisesRegex(ValueError, f'{field}=-1'):
        StoreConfig(**{field: -1})
    with self.assertRaisesRegex(ValueError, 'ttl=0'):
      StoreConfig(ttl=0)
    store = self.store(8)
    with self.assertRaisesRegex(ValueError, '2 users, 1 of them different'):
      store.put(['a', 'a'], cache_of(self.rng, 5, 5), [0, 0])


if __name__ == '__main__':
  absltest.main()
