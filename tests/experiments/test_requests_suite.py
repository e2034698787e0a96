"""Whole requests: contenders compute the same; the report says what was."""

import dataclasses
import importlib.util
import json
import os
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

import benchmarking
from benchmarking import rankers, report, request_calls, requests, workloads

TINY = workloads.REQUEST['cpu_128'].small()
HAS_TORCH = importlib.util.find_spec('torch') is not None


def logits_of(index):
  """What a request should give here: it tells requests and tasks apart."""
  row = np.arange(5, dtype=np.float32)[None]
  return {'click': row + index, 'like': np.sin(row * (index + 1))}


class Clock:
  """Stands for `time`: passes as fakes say, and a little with each look."""

  now = 0.0

  def perf_counter(self):
    self.now += 1e-6
    return self.now

  def sleep(self, seconds):
    self.now += seconds


CLOCK = Clock()


class Fake:
  """Knows the logits; `wrong` names a call, or 'in flight', that is not so."""

  def __init__(self, seconds=0.0, wrong=None):
    self.seconds, self.wrong, self.flying, self.most = seconds, wrong, 0, 0
    self.runs = {'fake': 'yes'}

  def call(self, name):
    if self.wrong == f'{name} raises':
      raise RuntimeError('no such graph\\nand more')

    def run(index, prepared):
      assert prepared == index
      CLOCK.sleep(self.seconds)
      # As a graph that holds the ids it was captured with.
      return logits_of(0 if self.wrong == name else index)

    return request_calls.Call(run, prepare=lambda index: index)

  def pipelines(self, depth):
    for way in ('slow', 'fast'):

      def submit(index, way=way):
        self.flying += 1
        self.most = max(self.most, self.flying)
        shift = self.wrong == 'in flight' and depth == 4
        return Landing(self, index + shift, way)

      yield way, submit


class Landing:
  def __init__(self, fake, index, way):
    self.fake, self.index, self.way = fake, index, way

  def result(self):
    self.fake.flying -= 1
    CLOCK.sleep(self.fake.seconds * (4 if self.way == 'slow' else 1))
    return logits_of(self.index % 16)


def expected(workload, variables, inputs, indices):
  del workload, variables, inputs
  return {call: [logits_of(i) for i in indices] for call in rankers.CALLS}


def run(contenders, **options):
  """The suite with fakes, `{name: Fake or an exception}`."""

  def make(name, *args):
    if isinstance(contenders[name], Exception):
      raise contenders[name]
    return contenders[name]

  with (
    mock.patch.object(requests, 'time', CLOCK),
    mock.patch.object(request_calls, 'make', make),
    mock.patch.object(rankers, 'variables', lambda workload: {}),
    mock.patch.object(rankers, 'expected', expected),
  ):
    return requests.run(
      'request',
      {'tiny': TINY},
      list(contenders),
      **{'repeats': 2, 'seconds': 0.0, 'progress': lambda line: None} | options,
    )


class ReportTest(parameterized.TestCase):
  def test_times_rates_and_ratios(self):
    ours, lines = Fake(), []
    result = run(
      {'histjax': ours, 'torch': Fake(0.002), 'floor': Fake()},
      calls=70,
      seconds=0.02,
      progress=lines.append,
    )
    (entry,) = result['results']
    self.assertEqual(entry['workload'], dataclasses.asdict(TINY))
    row, rival = (entry['contenders'][k] for k in ('histjax', 'torch'))
    for call in rankers.CALLS:
      self.assertEqual(row[call]['relative_error'], 0)
      self.assertLessEqual(row[call]['p50'], row[call]['p99'])
      self.assertGreater(row[call]['rate'], 0)
      self.assertGreaterEqual(row[call]['calls'], 7)  # A tenth.
      self.assertGreaterEqual(rival[call]['p50'], 0.002)
      self.assertEqual(
        entry['ratios']['histjax'][call],
        {k: rival[call][k] / row[call][k] for k in ('p50', 'p99')},
      )
    self.assertGreaterEqual(row['score']['calls'], 70)
    self.assertEqual(ours.most, 8)
    self.assertEqual(list(rival['in_flight']), ['1', '2', '4', '8'])
    self.assertEqual(rival['runs']['8 in flight'], 'fast')
    self.assertEqual(rival['runs']['fake'], 'yes')
    self.assertEqual(
      entry['ratios']['histjax']['in_flight']['8'],
      row['in_flight']['8'] / rival['in_flight']['8'],
    )
    self.assertEqual(list(entry['ratios']), ['histjax'])
    table = lines[-1]
    for text in ('extend and score', 'requests/s  1: ', 'as fast as PyTorch'):
      self.assertIn(text, table)
    with tempfile.TemporaryDirectory() as folder:
      paths = benchmarking.write_report(result, os.path.join(folder, 'request'))
      with open(paths[0]) as f:
        self.assertEqual(json.load(f), result)
      with open(paths[1], 'rb') as f:
        self.assertEqual(f.read(8), b'\x89PNG\r\n\x1a\n')

  def test_ratios_are_to_the_best_rival_of_each(self):
    def row(p50, rate):
      times = {'p50': p50, 'p99': 2 * p50}
      return dict.fromkeys(rankers.CALLS, times) | {'in_flight': {'8': rate}}

    rows = {
      'histjax': row(1.0, 10.0) | {'extend and score': {'p50': 1.5, 'p99': 2}},
      'torch': row(3.0, 5.0),
      'torch:cudnn': row(2.0, 4.0) | {'in_flight': {'failed': 'no'}},
      'torch:flex': {'failed': 'is unknown'},
      'floor': row(0.1, 1000.0),
      'histjax:xla': {'failed': 'NotImplementedError: here'},
    }
    found = requests.ratios(rows)
    self.assertEqual(list(found), ['histjax'])
    self.assertEqual(found['histjax']['score'], {'p50': 2.0, 'p99': 2.0})
    self.assertEqual(found['histjax']['in_flight'], {'8': 2.0})
    self.assertEqual(found['histjax']['extend and score over score'], 1.5)

  @parameterized.parameters(
    ('score', 'score', 'wrong: relative error'),
    ('new user', 'new user', 'wrong: relative error'),
    ('in flight', 'in_flight', 'ValueError: wrong: 4 in flight, slow'),
    ('score raises', 'score', 'RuntimeError: no such graph'),
  )
  def test_a_wrong_call_is_not_timed(self, wrong, part, message):
    lines = []
    result = run(
      {'histjax': Fake(wrong=wrong), 'torch': Fake(wrong=wrong)},
      calls=1,
      progress=lines.append,
    )
    (entry,) = result['results']
    row = entry['contenders']['torch']
    self.assertStartsWith(row[part]['failed'], message)
    self.assertNotIn('p50', row[part])
    self.assertIn('p50', row['extend and score'])
    self.assertIn(f'failed: {message}', lines[-1])
    self.assertIn('extend and score', entry['ratios']['histjax'])
    (line,) = report.broken(result)  # A rival's failure is a result.
    self.assertStartsWith(line, f'tiny histjax {part}: {message}')
    self.assertLen(report.requests_plot(result).axes, 2)

  def test_one_that_cannot_be_made(self):
    result = run(
      {
        'torch': ModuleNotFoundError("No module named 'torch'"),
        'histjax:pallas_gpu': NotImplementedError('needs a Hopper GPU'),
      }
    )
    rows = result['results'][0]['contenders']
    self.assertEqual(
      rows['torch'],
      {'failed': "ModuleNotFoundError: No module named 'torch'"},
    )
    self.assertEqual(result['results'][0]['ratios'], {})
    self.assertEmpty(report.broken(result))

  def test_patience_has_an_end(self):
    result = run({'histjax': Fake(0.001)}, calls=10**6, seconds=1e-3)
    calls = result['results'][0]['contenders']['histjax']['score']['calls']
    self.assertBetween(calls, 2, 20)  # 20 times a millisecond.

  def test_unknown_names(self):
    with self.assertRaisesRegex(ValueError, "'tensorflow' is unknown; use "):
      request_calls.make('tensorflow', TINY, {}, [])

  def test_all_calls_are_different_work(self):
    first, second = (rankers.inputs(TINY, seed) for seed in (0, 1))
    self.assertEqual(list(first.new_events.length), [rankers.NEW_EVENTS])
    self.assertEqual(list(rankers.old_events(first.history).length), [6])
    for part in ('candidates', 'history', 'new_events'):
      ids = [getattr(x, part).features['item'] for x in (first, second)]
      self.assertFalse(np.array_equal(*ids))


class ContendersTest(absltest.TestCase):
  @pytest.mark.slow
  def test_equal_logits(self):
    # PyTorch is no requirement: without it, that is what the report must say.
    result = requests.run(
      'request',
      {'tiny': TINY},
      ['histjax', 'torch:eager', 'floor'],
      repeats=2,
      seconds=0,
      progress=lambda line: None,
    )
    self.assertEmpty(report.broken(result))
    (entry,) = result['results']
    ours, rival, floor = entry['contenders'].values()
    self.assertTrue(ours['runs']['candidate_tower'])
    rows = [ours, rival] if HAS_TORCH else [ours]
    for call in rankers.CALLS:
      for row in rows:
        # float32 sums in another order.
        self.assertLess(row[call]['relative_error'], 1e-5)
      self.assertNotIn('relative_error', floor[call])
      self.assertEqual('p50' in entry['ratios']['histjax'][call], HAS_TORCH)
    if HAS_TORCH:
      self.assertEqual(rival['runs']['score'], 'eager')
      self.assertEqual(rival['runs']['8 in flight'], 'one stream')
    else:
      self.assertStartsWith(rival['failed'], 'ModuleNotFoundError')


if __name__ == '__main__':
  absltest.main()
