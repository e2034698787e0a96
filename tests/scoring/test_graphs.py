"""What can be seen of `scoring.graphs` without a GPU.

The driver is not there, so `Called` calls the program where a graph would be
launched. All else is real: slots, what XLA tells of a program, the foreign
function interface.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax import scoring
from histjax.ops import dependent
from histjax.scoring import cuda, graphs, paged, transport
from histjax.serving.pages import Pages, Shape
from histjax.types import History
from tests import support
from tests.scoring import scorers

_TARGET = 'histjax_test_double'


def _double(stream, operands, results):
  del stream
  source, to = (
    (ctypes.c_float * 3).from_address(x[0]) for x in (operands, results)
  )
  for i in range(3):
    to[i] = 2 * source[i]


class ForeignFunctionTest(absltest.TestCase):
  """XLA itself calls what `cuda.register` makes known."""

  def test_operands_and_results(self):
    for _ in range(2):  # The second time changes nothing.
      cuda.register(_TARGET, _double, platform='cpu')

    @jax.jit
    def call(x):
      return jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((3,), x.dtype))(x)

    found = call(np.array([1.0, 2.0, 4.0], np.float32))
    np.testing.assert_array_equal(found, [2.0, 4.0, 8.0])


class Driver:
  """Of the driver, what `Graph.overlap` asks; nodes are numbers from 1 on."""

  def __init__(self, names, edges):
    """Of names of kernels by node, '' if it is a copy, and edges."""
    self.names, self.edges = names, dict.fromkeys(edges, (0, 0, 0))
    self.cuGraphDestroy = lambda handle: 0

  # Names are the driver's.
  # ruff: disable[N802, N815]

  def cuGraphNodeGetType(self, node, kind):
    kind._obj.value = 0 if self.names[node.value] else 1
    return 0

  def cuGraphKernelNodeGetParams_v2(self, node, found):
    # The driver knows a kernel by one of two handles.
    field = ('function', 'kernel')[node.value % 2]
    setattr(found._obj, field, node.value)
    return 0

  def cuFuncGetName(self, name, function):
    name._obj.value = self.names[function.value].encode()
    return 0

  cuKernelGetName = cuFuncGetName

  def cuGraphGetEdges_v2(self, graph, sources, nodes, edges, number):
    number._obj.value = len(self.edges)
    for i, (source, node) in enumerate(self.edges):
      if sources is not None:
        sources[i], nodes[i] = source, node
    return 0

  def cuGraphRemoveDependencies_v2(self, graph, sources, nodes, edge, number):
    assert number.value == 1
    del self.edges[sources[0], nodes[0]]
    return 0

  def cuGraphAddDependencies_v2(self, graph, sources, nodes, edge, number):
    edge = edge._obj
    assert ctypes.sizeof(edge) == 8  # As in `cuda.h`.
    kind = edge.from_port, edge.to_port, edge.type
    self.edges[sources[0], nodes[0]] = kind
    return 0

  # ruff: enable[N802, N815]


class OverlapTest(absltest.TestCase):
  def test_kernels_that_wait(self):
    ours = f'{dependent.kernel_name("ours")}_mosaic_gpu_kernel'
    names = {1: 'fusion', 2: ours, 3: ours, 4: 'fusion', 5: '', 6: ours}
    driver = Driver(names, [(i, i + 1) for i in range(1, 6)])
    before = dict(driver.edges)
    with mock.patch.object(cuda, '_library', lambda: driver):
      graph = cuda.Graph(cuda.Pointer(7))
      self.assertEqual(graph.overlap(dependent.SUFFIX, most=1), 0)
      self.assertEqual(driver.edges, before)
      self.assertEqual(graph.overlap(dependent.SUFFIX, most=2), 2)
    early = (1, 0, 1)  # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC and the type.
    self.assertEqual(
      driver.edges,
      {
        (1, 2): early,
        (2, 3): early,
        (3, 4): (0, 0, 0),  # It does not wait.
        (4, 5): (0, 0, 0),
        (5, 6): (0, 0, 0),  # Behind a copy.
      },
    )

  def test_an_old_driver(self):
    old = types.SimpleNamespace(cuGraphDestroy=lambda handle: 0)
    with mock.patch.object(cuda, '_library', lambda: old):
      graph = cuda.Graph(cuda.Pointer(7))
      self.assertEqual(graph.overlap(dependent.SUFFIX, most=1), 0)


class ScheduleTest(parameterized.TestCase):
  """Of programs with both marks, compiled for the CPU."""

  def setUp(self):
    super().setUp()
    for name in (graphs._BEGIN, graphs._READY, graphs._END):
      cuda.register(name, lambda *_: None, platform='cpu')

  def text(self, body):
    def program(x):
      x, begun = graphs.MARKS.read(x)
      return body(x, lambda *y: graphs.MARKS.done(begun, *y))

    return jax.jit(program).lower(jnp.ones(8)).compile().as_text()

  def test_all_before_the_last_mark(self):
    text = self.text(lambda x, done: done(jnp.sin(x) @ x, x + 1))
    graphs._check_schedule(text)

  def test_results_of_what_is_not_recorded(self):
    text = self.text(lambda x, done: jnp.sort(done(x)) + 1)
    with self.assertRaisesRegex(graphs.CannotRecordError, 'comes too late'):
      graphs._check_schedule(text)

  def test_loops(self):
    def body(x, done):
      return done(jax.lax.while_loop(lambda y: y[0] < 9, lambda y: y * 2, x))

    with self.assertRaisesRegex(graphs.CannotRecordError, 'may wait'):
      graphs._check_schedule(self.text(body))

  def test_no_marks(self):
    text = jax.jit(jnp.sin).lower(jnp.ones(8)).compile().as_text()
    with self.assertRaisesRegex(graphs.CannotRecordError, 'not in its'):
      graphs._check_schedule(text)


class Called(graphs.Recording):
  """A recording whose launches call the program."""

  def record(self):
    self._compiled = jax.jit(self._program.traced)

  def check(self, longest, new=0, pages=0):
    slot = self.slot()
    graphs._fill(np.random.default_rng(0), slot.views, longest, new, pages)
    assert self._layout.is_good(slot.buffer, slot.views)
    self.seen = {k: v.features.get(k) for k, v in slot.views.items()}

  def launch(self, slot, cached):
    self.pool = cached
    slot.logits[...] = self._call(slot.buffer.copy())
    return (
      (*self.pool, graphs.Replayed(slot))
      if self._donate
      else graphs.Replayed(slot)
    )

  def _new_slot(self):
    buffer = np.zeros(self._layout.size, np.int32)
    views = self._layout.views(buffer)
    shape = (2, *views['candidates'].part.shape)
    logits = np.full(shape, np.nan, np.float32)
    return graphs.Slot(
      None,
      buffer,
      views,
      self._layout.split(views),
      self,
      logits,
      None,
      self,
    )

  def is_ready(self):
    return True

  def wait(self):
    pass

  def fetch(self, replayed):
    assert transport.look(replayed.slot.event.is_ready)
    return replayed.slot.logits.copy()


class MarksTest(parameterized.TestCase):
  """What is recorded between marks, and in which order it is replayed."""

  def setUp(self):
    super().setUp()
    self.stream, self.done = [], []

    def begin(stream):
      del stream
      self.stream.clear()

    def end(stream):
      del stream
      return types.SimpleNamespace(
        kinds=[0] * len(self.stream), of=[*self.stream]
      )

    def launchable(graph):
      return types.SimpleNamespace(
        launch=lambda stream: self.done.extend(graph.of)
      )

    self.driver = types.SimpleNamespace(
      begin=begin, end=end, Launchable=launchable, Pointer=int, Error=OSError,
      use=lambda device: None,
    )  # fmt: skip
    self.enter_context(mock.patch.object(graphs, 'cuda', self.driver))

  def call(self, states, ready=None):
    """As XLA does with a program's marks; returns logits."""
    graphs._before()
    self.stream.append('score')
    graphs._at_begin(7, [1], [2])
    if states if ready is None else ready:
      graphs._at_ready(7, [100], [100])
      self.stream.extend(states)
    graphs._at_end(7, [100], [100])
    return 'logits'

  @parameterized.parameters(([],), (['keys', 'values'],))
  def test_two_graphs(self, states):
    recording = graphs.Recording.__new__(graphs.Recording)
    recording._call = lambda request: self.call(states)
    seen, logits = recording._record(None, 7)
    self.assertEqual((logits, seen.logits, seen.temporary), ('logits', 100, 2))
    # The call that was recorded did what it is to do.
    self.assertEqual(self.done, ['score', *states])
    self.assertEqual([x.of for x in seen.graphs][:1], [['score']])
    self.assertEqual([x.of for x in seen.graphs][1:], [states] * bool(states))

  def test_nothing_behind_the_logits(self):
    """An empty graph is neither kept nor launched."""
    recording = graphs.Recording.__new__(graphs.Recording)
    recording._call = lambda request: self.call([], ready=True)
    seen, _ = recording._record(None, 7)
    self.assertEqual([x.of for x in seen.graphs], [['score']])
    self.assertEqual(self.done, ['score'])

  def test_nobody_waits_for_states(self):
    recording = graphs.Recording.__new__(graphs.Recording)
    recording._device = recording._stream = None
    recording._donate, recording._load = True, lambda cached: True

    def does(name):
      step = functools.partial(self.done.append, name)
      return types.SimpleNamespace(
        launch=lambda stream: step(), record=lambda stream: step()
      )

    recording._after = [does('states')]
    slot = types.SimpleNamespace(graph=does('logits'), event=does('event'))
    found = recording.launch(slot, ('keys', 'values'))
    self.assertEqual(self.done, ['logits', 'event', 'states'])
    self.assertEqual(found[:2], ('keys', 'values'))

  def test_an_error_is_kept(self):
    def end(stream):
      raise OSError('not now')

    recording = graphs.Recording.__new__(graphs.Recording)
    recording._call = lambda request: self.call(['keys'])
    with mock.patch.object(self.driver, 'end', end):
      with self.assertRaisesRegex(graphs.CannotRecordError, 'not now'):
        recording._record(None, 7)
    self.assertIsNone(graphs._seen)


class MemoryTest(absltest.TestCase):
  """What a graph reads is where it reads it, or it is not replayed."""

  def recording(self, cached, copies):
    recording = graphs.Recording.__new__(graphs.Recording)
    recording._copies, recording._stream = copies, None
    recording._addresses = [x.unsafe_buffer_pointer() for x in cached]
    recording._last = [lambda: None] * len(cached)
    return recording

  def setUp(self):
    super().setUp()
    self.copied = []

    def copy(to, source, nbytes, stream):
      del nbytes, stream
      self.copied.append((to, source))

    self.enter_context(mock.patch.object(cuda, 'copy', copy))

  def test_caches_are_copied_once(self):
    held = [jnp.zeros(8), jnp.zeros(8)]
    one, other = [jnp.ones(8), jnp.ones(8)], [jnp.ones(8), jnp.ones(8)]
    recording = self.recording(held, copies=True)
    for cached, number in ((one, 2), (one, 2), (other, 4), (one, 6)):
      self.assertTrue(recording._load(cached))
      self.assertLen(self.copied, number)
    pairs = [
      tuple(x.unsafe_buffer_pointer() for x in pair)
      for pair in zip(held, one, strict=True)
    ]
    self.assertEqual(self.copied[-2:], pairs)
    one[0].delete()  # As `extend` does with the cache that it is given.
    with self.assertRaisesRegex(RuntimeError, 'has been deleted'):
      recording._load(one)

  def test_another_pool(self):
    pool, other = [jnp.zeros(8), jnp.zeros(8)], [jnp.zeros(8), jnp.zeros(8)]
    recording = self.recording(pool, copies=False)
    for _ in range(2):
      self.assertTrue(recording._load(pool))
      self.assertFalse(recording._load(other))
      self.assertFalse(recording._load([pool[0], other[1]]))
    self.assertEmpty(self.copied)
    pool[1].delete()
    with self.assertRaisesRegex(RuntimeError, 'has been deleted'):
      recording._load(pool)


class ReplayTest(absltest.TestCase):
  """A scorer whose programs were recorded answers as one that calls them."""

  def setUp(self):
    super().setUp()
    for name in (graphs._BEGIN, graphs._END):
      cuda.register(name, lambda *_: None, platform='cpu')

    def marked(plan):
      return dataclasses.replace(plan, transport=graphs.MARKS)

    self.enter_context(mock.patch.object(graphs, 'marked', marked))
    self.enter_context(mock.patch.object(graphs, 'Recording', Called))
    self.enter_context(mock.patch.object(cuda, 'use', lambda device: None))
    options = {
      'history_buckets': (24,),
      'row_buckets': (4,),
      'candidate_buckets': (16,),
      'new_event_buckets': (4,),
    }
    self.plain = scorers.scorer('causal', **options, cuda_graphs=False)
    self.scorer = scoring.Scorer(
      self.plain.config,
      self.plain.variables,
      scoring.ScorerConfig(**options),
    )
    self.batch = support.batch(np.random.default_rng(0), 3, 20)
    self.candidates = self.batch.candidates.replace(visible=None)

  def bad(self):
    """Candidates with an id that no table has."""
    features = dict(self.candidates.features)
    name = next(k for k, x in features.items() if x.dtype.kind == 'i')
    features[name] = np.full_like(features[name], 2**30)
    return name, self.candidates.replace(features=features)

  def test_scorer(self):
    self.scorer.warm_up(rows=4, events=24, candidates=16, calls=['score'])
    (recording,) = self.scorer._recordings.values()
    self.assertEqual(
      set(recording.seen), {'length', 'count', 'context', 'candidates'}
    )
    context = self.batch.context
    cache = self.scorer.encode(self.batch.history)
    wanted = self.plain.score(
      self.plain.encode(self.batch.history), self.candidates, context
    )
    pending = [
      self.scorer.score_async(cache, self.candidates, context) for _ in range(2)
    ]
    for found in [
      *pending,
      self.scorer.score_async(cache, self.candidates, context),
    ]:
      np.testing.assert_array_equal(
        scorers.real(found.result(), self.batch),
        scorers.real(wanted, self.batch),
      )
    self.assertLen(recording._free, 3)
    self.assertEqual(  # Looks at the program, and not at its recording.
      self.scorer.backends(cache, self.candidates, context),
      self.plain.backends(
        self.plain.encode(self.batch.history), self.candidates, context
      ),
    )
    self.assertLen(recording._free, 3)
    name, bad = self.bad()
    with self.assertRaisesRegex(ValueError, name):
      self.scorer.score(cache, bad, context)
    self.assertLen(recording._free, 3)  # A refused one's comes back.

  def test_pool(self):
    p = paged.PagedScorer(self.scorer)
    pool = Pages(Shape.of(self.scorer.config, self.scorer.options), 16).pool
    pool, done = p.warm_up(
      pool, rows=4, events=24, candidates=16, new_events=3, visible=False
    )
    self.assertLen(self.scorer._recordings, 3)
    self.assertEqual((done.num_programs, done.num_recorded), (3, 3))
    pages = np.array([[5, 2], [1, 9], [7, 3], [16, 16]], np.int32)
    history, context = self.batch.history, self.batch.context
    place = paged.Place(np.minimum(pages, 15), pages, history.length, 24)
    name, bad = self.bad()
    with self.assertRaisesRegex(ValueError, name):
      p.encode(pool, place, history, bad, context)
    pool, first = p.encode(pool, place, history, self.candidates, context)
    again = p.score(pool, place, self.candidates, context)
    new = History(
      {k: x[:, :3] for k, x in history.features.items()},
      np.minimum(history.length, 3),
    )
    pool, longer = p.extend(pool, place, new, self.candidates, context)
    cache, wanted = self.plain.encode_and_score(
      history, self.candidates, context
    )
    _, after = self.plain.extend_and_score(cache, new, self.candidates, context)
    for found, expected in ((first, wanted), (again, wanted), (longer, after)):
      np.testing.assert_allclose(
        scorers.real(found.result(), self.batch),
        scorers.real(expected, self.batch),
        **scorers.TOLERANCE['float32'],
      )


if __name__ == '__main__':
  absltest.main()
