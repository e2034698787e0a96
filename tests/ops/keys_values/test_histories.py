"""Whole histories: what the reference is, and the kernels where they run."""

import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import ops
from histjax.ops import dispatch
from histjax.ops.keys_values import histories
from tests import support
from tests.ops.keys_values import suite

_read = jax.jit(
  ops.read_histories, static_argnames=('num_heads', 'rotate', 'implementation')
)


class HistoriesTest(parameterized.TestCase):
  @parameterized.product(causal=(False, True), ragged=(False, True))
  @support.examples(4)
  @given(seed=st.integers(0, 2**32 - 1))
  def test_reference(self, causal, ragged, seed):
    call = suite.make_histories(
      seed, (3, 7, 2, 8), causal=causal, ragged=ragged, rotate=causal
    )
    with jax.default_matmul_precision('highest'):
      found = _read(**call, implementation='reference')
    suite.assert_equals_plain_layers(found, call)

  @parameterized.parameters(
    ('events', lambda x: x[0], r'events has shape .* make it \[B, L, D\]'),
    ('num_heads', lambda x: 3, 'num_heads=3 must be at least 1 and divide D=8'),
    ('count', lambda x: x[:1], r'count is .*int32 \[B\] = \(2,\)'),
    (
      'keys_values',
      lambda x: x.replace(bias=x.bias[:1]),
      r'weights.bias is .* = \(2, 16\)',
    ),
    (
      'weights',
      lambda x: x.replace(query=x.query[..., :4]),
      r'weights.query is .* = \(2, 8, 8\)',
    ),
  )
  def test_arguments(self, name, change, message):
    call = suite.make_histories(0, (2, 5, 2, 4), ragged=True)
    call[name] = change(call[name])
    with self.assertRaisesRegex(ValueError, message):
      ops.read_histories(**call)

  @parameterized.product(ragged=(False, True))
  def test_pages(self, ragged):
    call = suite.make_histories(0, (3, 24, 2, 8), ragged=ragged)
    call = suite.paged(call, page=8)
    with jax.default_matmul_precision('highest'):
      found = _read(**call, implementation='reference')
    suite.assert_writes_its_pages(found, call)
    call['events'] = call['events'][:, :16]
    with self.assertRaisesRegex(ValueError, r'key_range|keys \(2, 3, 24, 2, 8'):
      ops.read_histories(**call)

  def test_vmap(self):
    call = suite.make_histories(0, (2, 5, 2, 4), ragged=True)
    events = call.pop('events')
    keys, values = jax.vmap(
      lambda x: ops.read_histories(x, **call, implementation='reference')
    )(np.stack([events, 2 * events]))
    self.assertEqual(keys.shape, (2, 2, 2, 5, 2, 4))
    one = ops.read_histories(2 * events, **call, implementation='reference')
    for x, y in zip((keys[1], values[1]), one, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)

  def test_a_named_one_is_never_replaced(self):
    call = suite.make_histories(0, (1, 4, 2, 4))
    with self.assertRaisesRegex(ValueError, "'xla' is unknown; use one of"):
      ops.read_histories(**call, implementation='xla')
    with ops.target_platform('tpu'):
      with self.assertRaisesRegex(NotImplementedError, 'needs an NVIDIA GPU'):
        ops.read_histories(**call, implementation='pallas_gpu')
      with dispatch.record() as used:
        ops.read_histories(**call)
    self.assertEqual(used['read_histories'], {'reference'})

  def test_sizes_of_the_kernels(self):
    for shape in ((1, 8, 4, 64), (1, 12, 8, 64), (1, 8, 16, 32)):
      call = suite.make_histories(0, shape, dtype='bfloat16')
      with ops.target_platform('cuda', compute_capability='9.0'):
        with self.assertRaisesRegex(NotImplementedError, 'L=|needs the Mosaic'):
          ops.read_histories(**call, implementation='pallas_gpu')

  @parameterized.product(
    shape=((3, 136, 8, 64), (2, 200, 4, 128), (5, 64, 12, 64)),
    ragged=(False, True),
    causal=(False, True),
  )
  def test_kernels(self, shape, ragged, causal):
    call = suite.make_histories(
      0, shape, dtype='bfloat16', ragged=ragged, causal=causal, num_layers=3
    )
    run = functools.partial(_read, implementation='pallas_gpu')
    try:
      histories._BACKENDS['pallas_gpu'].check_target(dispatch.target_of())
    except NotImplementedError:
      with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu'):
        run(**call)
      return
    paged = suite.paged(call, page=8)
    suite.assert_writes_its_pages(run(**paged), paged)
    found = run(**call)
    suite.assert_equals_plain_layers(found, call)
    for x, y in zip(found, run(**call), strict=True):
      np.testing.assert_array_equal(x, y)


if __name__ == '__main__':
  absltest.main()
