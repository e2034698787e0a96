"""Whole programs compiled for TPUs that are not there, and what they need.

libtpu compiles for a described topology on any x86-64 Linux machine. It refuses
what a TPU lacks, kernels that do not fit its memories, and kernels that it
would have to partition. Each test prints what its program needs.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from histjax import schema
from histjax.models import ranker
from histjax.nn import interaction
from histjax.ops import history_attention_backend
from histjax.scoring import pages
from histjax.training import optimizer, sharding, state, step
from histjax.types import KeyRange
from tests import marks, support
from tests.ops.history_attention import suite
from tests.tpu import TOPOLOGIES, devices

MIB = 1 << 20
FORWARD = 'history_attention_forward'
BACKWARD = (
  'history_attention_query_gradient',
  'history_attention_key_gradients',
)
# What a kernel may use of the smallest TPU's vector memory unless it asks.
VMEM = 16 * MIB

_every_chip = parameterized.parameters(*TOPOLOGIES)


def on_every_chip(test):
  """One of them in `make test`."""
  return marks.slow_unless(lambda topology: topology == TOPOLOGIES[0])(
    _every_chip(test)
  )


def shapes(tree, where):
  """The arrays' shapes, with a sharding."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
  )


class CompileTestCase(parameterized.TestCase):
  def compile(self, topology, function, *arguments):
    """Compiles for a device, which makes it the one to choose kernels for."""
    with jax.default_device(devices(topology)[0]):
      program = function.lower(*arguments).compile()
    memory = program.memory_analysis()
    print(
      f'{self.id()} {topology}: arguments {memory.argument_size_in_bytes}, '
      f'temporary {memory.temp_size_in_bytes} bytes of HBM; bytes of VMEM: '
      f'{kernels(program)}'
    )
    return program

  def assert_kernels(self, program, **expected):
    """The program has so many calls of each kernel, and they fit."""
    found = kernels(program)
    self.assertEqual({k: len(sizes) for k, sizes in found.items()}, expected)
    for sizes in found.values():
      self.assertLess(max(sizes), VMEM / 2)


def kernels(program) -> dict[str, list[int]]:
  """The bytes of VMEM of each call of each kernel."""
  found: dict[str, list[int]] = {}
  for line in program.as_text().splitlines():
    name = re.search(
      r'%(history_attention_\w+?|candidate_tower)[.\d]* = .*tpu_custom_call',
      line,
    )
    if name:
      size = re.search(
        r'"used_scoped_memory_configs":\[{"memory_space":"1",[^}]*'
        r'"size":"(\d+)"',
        line,
      )
      found.setdefault(name[1], []).append(int(size[1]))
  return found


class AttentionTest(CompileTestCase):
  def arguments(self, shape, dtype, where):
    num_rows, num_queries, num_keys, num_heads, head_dim = shape
    query, key = (
      jax.ShapeDtypeStruct(
        (num_rows, t, num_heads, head_dim), dtype, sharding=where
      )
      for t in (num_queries, num_keys)
    )
    bound = jax.ShapeDtypeStruct(
      (num_rows, num_queries), jnp.int32, sharding=where
    )
    return query, key, key, query, KeyRange(bound, bound)

  def compile_attention(self, topology, shape, dtype, implementation=None):
    where = jax.sharding.SingleDeviceSharding(devices(topology)[0])
    run = functools.partial(suite.gradients, implementation=implementation)
    return self.compile(
      topology, jax.jit(run), *self.arguments(shape, dtype, where)
    )

  @marks.slow_unless(lambda topology, shape, dtype: shape[-1] == 64)
  @parameterized.parameters(
    *(
      # Histories of 512 with 512 candidates: one block, two tiles.
      (topology, (4, 1024, 512, 4, head_dim), dtype)
      for topology in TOPOLOGIES
      for head_dim, dtype in ((32, 'bfloat16'), (128, 'float32'))
    ),
    ('v5e:2x2', (4, 1024, 512, 4, 64), 'bfloat16'),
    ('v5e:2x2', (3, 13, 1100, 3, 40), 'bfloat16'),  # Nothing fits.
  )
  def test_forward_and_backward(self, topology, shape, dtype):
    program = self.compile_attention(topology, shape, dtype)
    self.assert_kernels(program, **dict.fromkeys((FORWARD, *BACKWARD), 1))

  @pytest.mark.slow
  def test_highest_precision(self):
    for dtype in ('float32', 'bfloat16'):
      with jax.default_matmul_precision('highest'):
        program = self.compile_attention(
          'v5e:2x2', (2, 128, 640, 2, 64), dtype, 'pallas_tpu'
        )
      self.assert_kernels(program, **dict.fromkeys((FORWARD, *BACKWARD), 1))

  @marks.slow_unless(lambda *lengths: min(lengths) == 1 << 16)
  @parameterized.parameters(
    (1 << 16, 1 << 12), (1 << 12, 1 << 16), (1 << 16, 1 << 16)
  )
  def test_memory_is_linear(self, num_queries, num_keys):
    shape = (1, num_queries, num_keys, 1, 128)
    # The chip whose compiler keeps all intermediate arrays in HBM.
    program = self.compile_attention('v5p:2x2x1', shape, 'bfloat16')
    temporary = program.memory_analysis().temp_size_in_bytes
    tokens = 2 * 128 * (num_queries + num_keys)  # bfloat16 [1, Q + L, 1, 128]
    self.assertLess(temporary, 4 * tokens)
    self.assertLess(temporary, 2 * num_queries * num_keys / 8)

  def test_rows_over_chips(self):
    mesh = sharding.data_mesh(devices('v5e:2x2'))
    rows = jax.NamedSharding(mesh, jax.P('data'))
    arguments = self.arguments((8, 384, 256, 4, 32), 'bfloat16', rows)
    run = functools.partial(suite.gradients, implementation='pallas_tpu')
    with jax.set_mesh(mesh):
      program = self.compile('v5e:2x2', jax.jit(run), *arguments)
    self.assert_kernels(program, **dict.fromkeys((FORWARD, *BACKWARD), 1))
    self.assertNotRegex(program.as_text(), 'all-gather|all-to-all|all-reduce')
    for out in jax.tree.leaves(program.output_shardings):
      self.assertTrue(out.is_equivalent_to(rows, 4))

  @on_every_chip
  def test_is_the_default(self, topology):
    arguments = self.arguments((2, 9, 9, 2, 8), 'bfloat16', None)
    query, key, value, _, key_range = arguments
    with jax.default_device(devices(topology)[0]):
      found = history_attention_backend(query, key, value, key_range)
    self.assertEqual(found, 'pallas_tpu')


# As few features as can be: what is looked at here is the encoder.
SCHEMA = schema.Schema(
  user='user',
  time='time',
  context=(),
  item=(schema.Categorical('item', 40),),
  action=(),
  tasks=(schema.Task('click'),),
)
CONFIG = support.config(
  schema=SCHEMA,
  encoder__width=128,
  encoder__num_heads=4,
  encoder__attention='pallas_tpu',
  interaction=interaction.InteractionConfig(kind='mlp', mlp_widths=(8,)),
  dtype='bfloat16',
)
MODEL = ranker.Ranker(CONFIG)
TX = optimizer.make_optimizer(optimizer.OptimizerConfig())
NUM_ROWS, NUM_EVENTS, NUM_CANDIDATES = 8, 128, 100  # Quick to compile.


class RankerTest(CompileTestCase):
  """Two layers: one of events and candidates, one of candidates."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.batch = support.batch(
      rng, NUM_ROWS, NUM_EVENTS, NUM_CANDIDATES, schema=SCHEMA
    )

  def program(self, topology, method, *arguments):
    where = jax.sharding.SingleDeviceSharding(devices(topology)[0])

    def run(variables, *args):
      return MODEL.apply(variables, *args, method=method)

    return self.compile(topology, jax.jit(run), *shapes(arguments, where))

  def eval_shape(self, function, *arguments):
    with jax.default_device(devices(TOPOLOGIES[0])[0]):
      return jax.eval_shape(function, *arguments)

  @functools.cached_property
  def variables(self):
    return self.variables_of(MODEL)

  def variables_of(self, model):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return self.eval_shape(lambda k: model.init(k, self.batch), key)

  @on_every_chip
  def test_joint_pass(self, topology):
    program = self.program(topology, None, self.variables, self.batch)
    self.assert_kernels(program, **{FORWARD: 2})

  @on_every_chip
  def test_cached_scoring(self, topology):
    cache = self.eval_shape(
      lambda variables, batch: MODEL.apply(
        variables, batch.history, method='encode'
      ),
      self.variables,
      self.batch,
    )
    program = self.program(
      topology,
      'score',
      self.variables,
      cache,
      self.batch.candidates,
      self.batch.context,
    )
    self.assert_kernels(program, **{FORWARD: 2})

  @marks.slow_unless(
    lambda topology, width, method: (
      topology == TOPOLOGIES[0] and width == 64 and method == 'score'
    )
  )
  @parameterized.product(
    topology=TOPOLOGIES, width=(64, 128), method=(None, 'encode', 'score')
  )
  def test_layers_in_one_kernel(self, topology, width, method):
    """What `Scorer` runs on a TPU: each layer, or all of them, by the tower."""
    encoder = dataclasses.replace(
      CONFIG.encoder, width=width, attention=None, candidate_tower=None
    )
    config = dataclasses.replace(CONFIG, encoder=encoder)
    model = ranker.Ranker(config)
    variables = self.variables_of(model)
    packed = self.eval_shape(lambda p: ranker.pack(config, p), variables)
    batch = self.batch

    def run(variables, *args):
      return model.apply(variables, *args, method=method)

    encode = functools.partial(model.apply, method='encode')
    arguments: tuple = (batch,)
    if method == 'encode':
      arguments = (batch.history,)
    elif method == 'score':
      cache = self.eval_shape(encode, variables, batch.history)
      arguments = (cache, batch.candidates, batch.context)
    where = jax.sharding.SingleDeviceSharding(devices(topology)[0])
    program = self.compile(
      topology,
      jax.jit(run),
      *shapes(({**variables, **packed}, *arguments), where),
    )
    calls = {None: 2, 'encode': 1, 'score': 1}[method]
    self.assert_kernels(program, candidate_tower=calls)

  @parameterized.product(
    heads=((4, 32), (4, 16), (8, 64)), dtype=('bfloat16', 'float32', 'int8')
  )
  def test_few_pages_of_many(self, heads, dtype):
    """No program that reads or writes a few copies the others."""
    where = jax.sharding.SingleDeviceSharding(devices(TOPOLOGIES[0])[0])
    num_pages, capacity = 6400, 64
    shape = (2, num_pages, *pages.shape(*heads))
    pool, states, index, length = shapes(
      (
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((2, 1, capacity, *heads), dtype),
        jax.ShapeDtypeStruct((1, pages.number(capacity)), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
      ),
      where,
    )
    functions = (
      (lambda p, i, s, n: pages.read(p, i, capacity, heads[0]), ()),
      (lambda p, i, s, n: pages.write(p, i, s), (0,)),
      (lambda p, i, s, n: pages.extended(p, i, s, n, n, 10), (0,)),
    )
    for function, donated in functions:
      program = self.compile(
        TOPOLOGIES[0],
        jax.jit(function, donate_argnums=donated),
        *(pool, index, states, length),
      )
      memory = program.memory_analysis()
      size = math.prod(shape) * jnp.dtype(dtype).itemsize
      self.assertEqual(memory.alias_size_in_bytes, size * len(donated))
      self.assertLess(memory.temp_size_in_bytes, size / 20)
      self.assertNotRegex(program.as_text(), rf'{num_pages},[^ ]* copy\(')

  @on_every_chip
  def test_training_step_over_four_chips(self, topology):
    mesh = sharding.data_mesh(devices(topology))
    train_state = self.eval_shape(
      lambda: state.create_state(MODEL, TX, SCHEMA, 0)
    )
    program = self.compile(
      topology,
      step.make_train_step(MODEL, TX, SCHEMA, mesh=mesh),
      shapes(train_state, jax.NamedSharding(mesh, jax.P())),
      shapes(self.batch, jax.NamedSharding(mesh, sharding.ROWS)),
    )
    self.assert_kernels(program, **dict.fromkeys((FORWARD, *BACKWARD), 2))
    # Gradients are added up over the chips; no chip fetches others' rows.
    self.assertIn('all-reduce', program.as_text())
    # But for ids, by which the chips know the rows that all of them touch.
    self.assert_gathers_less_than(program, 64 * NUM_ROWS * NUM_EVENTS)

  def assert_gathers_less_than(self, program, limit):
    """No collective but a sum has a result of so many elements."""
    found = re.findall(
      r'= \(?\w+\[([\d,]*)\][^=]* (?:all-gather|all-to-all|'
      r'collective-permute)(?:-start)?\(',
      program.as_text(),
    )
    sizes = [math.prod(map(int, dims.split(','))) for dims in found if dims]
    self.assertNotEmpty(sizes)
    self.assertLess(max(sizes), limit)

  @marks.slow_unless(lambda topology: topology == 'v5e:4x4')
  @parameterized.parameters('v5e:4x4', 'v6e:4x4')
  def test_tables_split_over_sixteen_chips(self, topology):
    mesh = sharding.data_mesh(devices(topology), table=8)
    items, dim = 1_000_000, 128  # Rows of 64 would be padded, in a copy.
    item = dataclasses.replace(SCHEMA.item[0], size=items)
    big = dataclasses.replace(SCHEMA, item=(item, *SCHEMA.item[1:]))
    model = ranker.Ranker(
      dataclasses.replace(
        CONFIG, schema=big, embedding_dim=dim, table_row_multiple=16
      )
    )
    batch = support.batch(
      np.random.default_rng(0), 16, NUM_EVENTS, NUM_CANDIDATES, schema=big
    )
    train_state = self.eval_shape(lambda: state.create_state(model, TX, big, 0))
    program = self.compile(
      topology,
      step.make_train_step(model, TX, big, mesh=mesh),
      jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        train_state,
        sharding.of_state(train_state, mesh),
      ),
      shapes(batch, jax.NamedSharding(mesh, sharding.ROWS)),
    )
    # A part of the table is on each chip, and no more in any operation.
    self.assertIn(f'f32[{items // 8},{dim}]', program.as_text())
    self.assertNotIn(f'f32[{items},', program.as_text())
    self.assert_gathers_less_than(program, 64 * 16 * NUM_EVENTS)
    memory = program.memory_analysis()
    part = items // 8 * dim * 4
    self.assertLess(memory.temp_size_in_bytes, part / 2)
    self.assertGreaterEqual(memory.alias_size_in_bytes, part)


if __name__ == '__main__':
  absltest.main()
