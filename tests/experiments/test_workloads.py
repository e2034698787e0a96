"""Workloads count what they say, and all contenders compute the same."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from benchmarking import contenders, workloads

# Relative errors: 2 layers with 8-bit mantissas; float32 sums in another order.
BOUNDS = {'bfloat16': 2e-2, 'float32': 1e-5}
# Some are the same when small.
NAMED = {
  workload.small(): f'{suite}_{name}'
  for suite, named in (
    ('attention', workloads.ATTENTION),
    ('tower', workloads.TOWER),
  )
  for name, workload in named.items()
}


class CountsTest(parameterized.TestCase):
  @parameterized.parameters('full', 'causal', 'window')
  def test_attention(self, mask):
    workload = workloads.Attention(2, 7, 5, 8, mask, num_heads=3, window=2)
    start, stop = workload.ranges()
    seen = 0
    for i in range(7):
      keys = [
        j
        for j in range(5)
        if mask == 'full'
        or ((j <= i) and (mask == 'causal' or j > min(i, 4) - 2))
      ]
      seen += len(keys)
      self.assertEqual((start[0, i], stop[0, i]), (keys[0], keys[-1] + 1))
    self.assertEqual(workload.pairs(), 2 * 3 * seen)
    self.assertEqual(workload.flops(), 4 * 8 * 2 * 3 * seen)
    self.assertEqual(workload.exponentials(), 2 * 3 * seen)
    self.assertEqual(workload.num_bytes(), 2 * (2 * 7 + 2 * 5) * 2 * 3 * 8)
    backward = dataclasses.replace(workload, backward=True)
    self.assertEqual(backward.flops(), 3.5 * workload.flops())
    self.assertEqual(backward.num_bytes(), 3 * workload.num_bytes())

  def test_tower(self):
    # 2 users, 3 candidates, 5 events, D 8, F 32, 3 layers.
    cached = workloads.Tower(2, 3, 5, 8, num_heads=2, num_layers=3)
    token = 2 * (2 * 8 * 8 + 2 * 8 * 32)
    expected = 3 * 2 * 3 * (token + 5 * 4 * 8)
    self.assertEqual(cached.flops(), expected)
    self.assertEqual(cached.exponentials(), 3 * 2 * 3 * (2 * 5 + 32))
    weights = 3 * (2 * 8 * 8 + 2 * 8 * 32)
    self.assertEqual(
      cached.num_bytes(), 2 * (2 * 2 * 3 * 8 + 2 * 3 * 2 * 5 * 8 + weights)
    )
    joint = dataclasses.replace(cached, joint=True)
    keys_values = 3 * 2 * 5 * 2 * (2 * 8 * 8)
    history = 2 * 2 * (5 * token + (1 + 2 + 3 + 4 + 5) * 4 * 8)
    self.assertEqual(joint.flops(), expected + keys_values + history)

  def test_ragged(self):
    workload = workloads.TOWER['ragged_128']
    length, count = workload.lengths()
    self.assertBetween(length.max(), 900, 1024)
    self.assertLess(length.min(), 100)
    self.assertBetween(count.min(), 1, 100)
    self.assertEqual(
      workload.pairs(),
      sum(map(int.__mul__, *map(lambda x: x.tolist(), (length, count)))),
    )
    full = dataclasses.replace(workload, ragged=False)
    self.assertLess(workload.flops(), full.flops())

  def test_select(self):
    named = workloads.TOWER
    self.assertEqual(
      list(workloads.select(named, None, 'cpu')), ['cpu_cached', 'cpu_joint']
    )
    self.assertIn('ragged_128', workloads.select(named, None, 'gpu'))
    self.assertEqual(
      list(workloads.select(named, ['batch_256'], 'cpu')), ['batch_256']
    )
    with self.assertRaisesRegex(ValueError, "'batch' is unknown; use some of"):
      workloads.select(named, ['batch'], 'cpu')


class NamedTest(parameterized.TestCase):
  @parameterized.named_parameters((v, k) for k, v in NAMED.items())
  def test_all_compute_the_same(self, workload):
    inputs = [workload.inputs(seed) for seed in range(2)]
    self.assertFalse(np.array_equal(*(next(iter(x.values())) for x in inputs)))
    expected = contenders.reference(workload, inputs[0])
    for name in ('histjax', 'jax:xla'):
      output = contenders.program(name, workload, inputs).output()
      difference = contenders.difference(workload, output, expected)
      self.assertLess(difference, BOUNDS[workload.dtype], name)


if __name__ == '__main__':
  absltest.main()
