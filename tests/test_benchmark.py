"""The benchmark reports what it says, in a form that can be read back."""

import json
import os
import tempfile
import time

import numpy as np
from absl.testing import absltest

from histjax import benchmark
from tests import support


class BenchmarkTest(absltest.TestCase):
  def test_measure_sees_the_time_a_call_takes(self):
    def call():
      time.sleep(0.02)
      return np.zeros(1)

    timing = benchmark.measure(call, repeats=3, seconds=0)
    self.assertEqual(timing.calls, 3)
    self.assertGreaterEqual(timing.low, 0.02)
    self.assertLessEqual(timing.low, timing.median)
    self.assertLessEqual(timing.median, timing.high)

  def test_report(self):
    config = support.config()
    _, params = support.init(config)
    lines = []
    report = benchmark.scoring_suite(
      config, params, [8], [4, 8], seconds=0, progress=lines.append
    )
    self.assertLen(lines, 2)
    for entry in report['results']:
      n, m = entry['history_length'], entry['candidates']
      self.assertIn(f'{n:>6} {m:>6}', lines.pop(0))
      for way in ('plain', 'joint', 'cached'):
        self.assertLess(entry[way]['max_difference_from_plain'], 1e-5)
        self.assertGreater(entry[way]['fraction_of_ceiling'], 0)
      self.assertGreater(entry['plain']['flops'], entry['joint']['flops'])
      self.assertGreater(entry['joint']['flops'], entry['cached']['flops'])
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    output = os.path.join(folder.name, 'new', 'scoring')
    paths = benchmark.write_report(report, output)
    with open(paths[0]) as f:
      self.assertEqual(json.load(f), report)
    with open(paths[1], 'rb') as f:
      self.assertEqual(f.read(8), b'\x89PNG\r\n\x1a\n')
