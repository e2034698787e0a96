"""What the documentation says of sizes is what the script computes."""

import os
import pathlib
import subprocess
import sys

import jax
from absl.testing import absltest, parameterized

from benchmarking import sizing
from histjax import EncoderConfig
from histjax.quantization import Quantized
from histjax.serving import pages

ROOT = pathlib.Path(__file__).parents[2]
DOCS = (ROOT / 'docs/serving.md').read_text(encoding='utf-8')


class SizingTest(parameterized.TestCase):
  @parameterized.parameters(None, 'int8', 'float8_e4m3fn')
  def test_bytes_are_those_of_the_arrays(self, cache_dtype):
    encoder = EncoderConfig(num_layers=3, width=24, num_heads=2)
    shape = pages.Shape(3, 2, 12, 'bfloat16', cache_dtype)
    pool = pages.Pages(shape, 4).pool  # 49 events.
    self.assertIsInstance(pool.keys, Quantized if cache_dtype else jax.Array)
    self.assertEqual(
      sizing.state_bytes(encoder, 49, 'bfloat16', cache_dtype),
      sum(x.nbytes for x in jax.tree.leaves(pool)),
    )

  def test_sizes_in_the_documentation(self):
    self.assertIn(f'\n\n{sizing.states(sizing.MODELS, "bfloat16")}\n\n', DOCS)

  def test_binary(self):
    results = 'benchmarks/results/2026-11-29-request-epyc-cpu.json'
    found = subprocess.run(
      [sys.executable, 'experiments/size.py', f'--results={results}'],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )
    self.assertEqual(found.stdout, '')
    self.assertIn(f"--results={results} is of suite 'request'", found.stderr)
    self.assertEqual(found.returncode, 1)

  def test_states_of_a_run_are_bounded(self):
    self.assertEqual(sizing.capped([8, 64], 64), ([8, 64], None))
    self.assertEqual(sizing.capped([8, 64], None), ([8, 64], None))
    lengths, note = sizing.capped([256, 1024, 4096], 384)
    self.assertEqual(lengths, [256, 384])
    self.assertStartsWith(note, 'L is at most 384: ')

  def test_rates(self):
    times = {'hit': 0.5, 'extend': 0.0125, 'miss': 20.0, 'no cache': 40.0}
    report = {
      'new_events': 10,
      'results': [
        {
          'length': 64,
          'candidates': 8,
          'in process': {
            '1': {kind: {'p50': 1.0} for kind in times},
            '32': {kind: {'p50': p50} for kind, p50 in times.items()},
          },
        }
      ],
    }
    self.assertEqual(
      sizing.rates(report).splitlines(),
      [
        '| L | C | hit | extend by 10 | miss | no cache |',
        '| --- | --- | --- | --- | --- | --- |',
        '| 64 | 8 | 64 | 2,600 | 1 | 0.8 |',
      ],
    )


if __name__ == '__main__':
  absltest.main()
