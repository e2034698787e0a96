"""The benchmark reports what it says, in a form that can be read back."""

import dataclasses
import json
import os
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import benchmarking
from benchmarking import (
  contenders,
  cost,
  devices,
  histories,
  machine,
  rankers,
  report,
  suites,
  tables,
  timing,
  train_rows,
  train_steps,
  workloads,
)
from histjax import testing
from histjax.nn import interaction
from histjax.scoring import scorer as scorer_lib
from tests import marks, support

QUICK = {'repeats': 2, 'seconds': 0.0, 'singles': 2}
CEILINGS = {'flops': 1e12, 'bytes': 1e9, 'exponentials': 1e9}


def temporary(test: absltest.TestCase, name: str) -> str:
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return os.path.join(folder.name, 'new', name)


class TimingTest(absltest.TestCase):
  def test_measure_sees_the_time_a_call_takes(self):
    def call():
      time.sleep(0.02)
      return np.zeros(1)

    measured = benchmarking.measure(call, repeats=3, seconds=0)
    self.assertEqual(measured.calls, 3)
    self.assertGreaterEqual(measured.low, 0.02)
    self.assertLessEqual(measured.low, measured.median)
    self.assertLessEqual(measured.median, measured.high)

  def test_calls_depend_on_the_one_before_and_use_every_input(self):
    program = timing.JaxProgram(
      lambda x, rest: (2 * x + rest, (rest,)), 1.0, [10.0, 20.0]
    )
    self.assertEqual([float(y) for y in program.output()], [12.0, 10.0])
    x, others = program._chain(1.0, [10.0, 20.0])
    self.assertEqual(float(x), 2 * 12 + 20)
    self.assertEqual([float(y) for (y,) in others], [10.0, 20.0])
    self.assertGreater(program.enqueue(4), 0)
    self.assertGreater(program.single(3), 0)
    self.assertIsNone(program.kernels())

  def test_programs_take_turns(self):
    log = []

    class Fake:
      def __init__(self, name, seconds):
        self.name, self.seconds = name, seconds

      def enqueue(self, calls):
        log.append((self.name, calls))
        return self.seconds

      def single(self, index):
        return self.seconds * (10 if index == 0 else 1)

      def kernels(self):
        return 3.0

    programs = {'a': Fake('a', 1e-3), 'b': Fake('b', 1e-2)}
    times = timing.time_programs(programs, repeats=3, seconds=0.02, singles=100)
    # 20 ms of calls in each sample, once it is known how many that is; before
    # each as many that are not timed.
    turns = [('a', 20), ('a', 20), ('b', 2), ('b', 2)]
    self.assertEqual(log[-12:], turns * 3)
    self.assertEqual(times['a']['throughput']['median'], 1e-3)
    self.assertEqual(times['a']['throughput']['samples'], 3)
    self.assertEqual(times['b']['latency']['p50'], 1e-2)
    self.assertGreater(times['b']['latency']['p99'], 1e-2)
    self.assertEqual(times['b']['kernels'], 3.0)


class MachineTest(absltest.TestCase):
  def test_environment_and_ceilings(self):
    found = machine.environment()
    self.assertEqual(found['platform'], 'cpu')
    self.assertIn('jax', found)
    for rate in machine.ceilings('float32').values():
      self.assertGreater(rate, 1e6)

  def test_clocks_of_an_nvidia_gpu(self):
    line = '580.1, 1980 MHz, 1980 MHz, 3201 MHz, 700.1 W, 700 W, 60\n'
    done = mock.Mock(stdout=line)
    with mock.patch.object(machine.subprocess, 'run', return_value=done):
      self.assertEqual(machine.clocks()['clocks.sm'], '1980 MHz')
    with mock.patch.object(machine.subprocess, 'run', side_effect=OSError):
      self.assertEqual(machine.clocks(), {})


class ScoringTest(absltest.TestCase):
  @pytest.mark.slow
  def test_report(self):
    config = support.config()
    _, variables = support.init(config)
    lines = []
    result = benchmarking.scoring_suite(
      config, variables, [8], [4, 8], seconds=0, progress=lines.append
    )
    self.assertLen(lines, 2)
    for entry in result['results']:
      n, m = entry['history_length'], entry['candidates']
      self.assertIn(f'{n:>6} {m:>6}', lines.pop(0))
      for way in ('plain', 'joint', 'cached'):
        self.assertLess(entry[way]['max_difference_from_plain'], 1e-5)
        self.assertGreater(entry[way]['fraction_of_ceiling'], 0)
      self.assertGreater(entry['plain']['flops'], entry['joint']['flops'])
      self.assertGreater(entry['joint']['flops'], entry['cached']['flops'])
    paths = benchmarking.write_report(result, temporary(self, 'scoring'))
    with open(paths[0]) as f:
      self.assertEqual(json.load(f), result)
    with open(paths[1], 'rb') as f:
      self.assertEqual(f.read(8), b'\x89PNG\r\n\x1a\n')


TINY_HEAD = interaction.InteractionConfig(kind='mlp', mlp_widths=(1,))


class WrongScoresTest(parameterized.TestCase):
  """What gives other scores is not timed."""

  @parameterized.parameters('score', 'score_joint')
  def test_ways(self, wrong):
    config = support.config()
    _, variables = support.init(config)
    with (
      swapped(wrong),
      self.assertRaisesRegex(ValueError, '(cached|joint), against plain: rel'),
    ):
      benchmarking.scoring_suite(config, variables, [8], [4], seconds=0)

  @pytest.mark.slow
  def test_fusions(self):
    some = {'append_cross': cost.fusion_lib.FUSIONS['append_cross']}
    with (
      mock.patch.object(cost.fusion_lib, 'FUSIONS', some),
      swapped('score'),
      self.assertRaisesRegex(ValueError, 'append_cross, cached against joint'),
    ):
      cost.fusions(support.config(), 16, 8, seconds=0)

  def test_histories(self):
    extend = scorer_lib.Scorer.extend

    def wrong(self, cache, events):
      items = {k: 0 * v for k, v in events.features.items()}
      return extend(self, cache, events.replace(features=items))

    with (
      mock.patch.object(scorer_lib.Scorer, 'extend', wrong),
      self.assertRaisesRegex(ValueError, 'cross_only, extended against enc'),
    ):
      histories.run(
        support.config(), [24], 8, fusions=['cross_only'], seconds=0, repeats=1
      )

  @parameterized.parameters(0, 1)
  def test_nan_is_wrong_wherever_it_is(self, place):
    wanted = [np.array([[1.0, 2.0]]), np.array([[3.0, 5.0]])]
    found = [x.copy() for x in wanted]
    found[place][0, 0] = np.nan
    of_tasks = [dict(enumerate(x)) for x in (found, wanted)]
    self.assertTrue(np.isnan(rankers.difference(*of_tasks)))
    workload = workloads.ATTENTION['full_64_grad']
    self.assertTrue(np.isnan(contenders.difference(workload, found, wanted)))

  def test_difference(self):
    wanted = {'a': np.array([[1.0, 3.0]]), 'b': np.array([[2.0]])}
    found = {'a': np.array([[1.0, 4.0]]), 'b': np.array([[2.5]])}
    self.assertAlmostEqual(rankers.difference(found, wanted), 0.5**0.5)
    # Of a single logit there is no mean to be away from.
    found['a'] = wanted['a']
    self.assertAlmostEqual(rankers.difference(found, wanted), 0.25)
    del found['b']
    self.assertEqual(rankers.difference(found, wanted), np.inf)

  def test_losses(self):
    tables.check_losses({'a': 1.0, 'b': 1.0005})
    for loss in (1.01, np.nan):
      with self.assertRaisesRegex(ValueError, 'b: the loss of the first up'):
        tables.check_losses({'a': 1.0, 'b': loss})


def swapped(name):
  """A method of `Scorer` that gives scores to other candidates."""
  right = getattr(scorer_lib.Scorer, name)

  def wrong(*args):
    return {k: np.roll(v, 1, axis=1) for k, v in right(*args).items()}

  return mock.patch.object(scorer_lib.Scorer, name, wrong)


class CostTest(parameterized.TestCase):
  @marks.slow_unless(lambda fusion: fusion == 'append_isolated')
  @parameterized.parameters('append_cross', 'append_isolated', 'cross_only')
  def test_formulas_are_what_xla_counts(self, fusion):
    config = support.config(
      fusion=fusion,
      encoder__width=64,
      encoder__num_layers=3,
      embedding_dim=1,
      interaction=TINY_HEAD,
    )
    for n, m in ((512, 16), (32, 512)):
      batch = testing.random_batch(config.schema, 1, n, m)
      counted = benchmarking.flops(config, batch)
      for way in cost.WAYS:
        expected = cost.formula_of(way, n, m, config)
        # Norms, softmax, rotations and the head come on top of it.
        self.assertBetween(counted[way] / expected, 1.0, 1.12)
      self.assertGreater(
        cost.formula_of('paper', n, m, config),
        cost.formula_of('joint', n, m, config),
      )

  @pytest.mark.slow
  def test_report(self):
    config = support.config(encoder__width=32, interaction=TINY_HEAD)
    lines = []
    # One fusion, for the time that compiling takes.
    with mock.patch.object(
      cost.fusion_lib, 'amortizable', lambda: ('append_isolated',)
    ):
      result = cost.run(
        config, [16, 128], [16, 64], seconds=0, progress=lines.append
      )
    middle = {'history_length': 128, 'candidates': 64}
    self.assertEqual(result['middle'], middle)
    self.assertEqual(
      [(r['history_length'], r['candidates']) for r in result['results']],
      [(16, 64), (128, 16), (128, 64)],
    )
    for row in result['slopes']:
      for axis in middle:
        self.assertAlmostEqual(
          row[axis]['flops'], row[axis]['formula'], delta=0.1
        )
        self.assertTrue(np.isfinite(row[axis]['seconds']))
    plain, joint, cached = result['slopes']
    self.assertAlmostEqual(plain['candidates']['flops'], 1.0)
    self.assertLess(joint['candidates']['flops'], 0.9)
    self.assertLess(
      cached['history_length']['flops'], plain['history_length']['flops']
    )
    self.assertIn('| append_isolated | cached | ', lines[-1])
    paths = benchmarking.write_report(result, temporary(self, 'cost'))
    with open(paths[0]) as f:
      self.assertEqual(json.load(f), result)
    with open(paths[1], 'rb') as f:
      self.assertEqual(f.read(8), b'\x89PNG\r\n\x1a\n')

  @pytest.mark.slow
  def test_fusions(self):
    names = ('append_cross', 'none')
    some = {name: cost.fusion_lib.FUSIONS[name] for name in names}
    with mock.patch.object(cost.fusion_lib, 'FUSIONS', some):
      result = cost.fusions(support.config(), 16, 8, seconds=0)
    self.assertEqual(tuple(result['fusions']), names)
    for row, way in zip(result['results'], ('cached', 'joint'), strict=True):
      self.assertEqual(row['way'], way)
      self.assertEqual(1e3 * row['median'], result['fusions'][row['fusion']])
    self.assertEqual(result['unit'], 'ms to score 8 candidates, 16 events')
    (path,) = benchmarking.write_report(result, temporary(self, 'fusions'))
    with open(path) as f:
      self.assertEqual(json.load(f), result)

  def test_histories(self):
    found = histories.run(
      support.config(), [24], 8, fusions=['cross_only'], seconds=0, repeats=1
    )
    (row,) = found['results']
    self.assertEqual(row['extend']['calls'], 15)
    # Keys and values, float32, of two layers of 32 events (a bucket).
    self.assertEqual(row['bytes'], 2 * 2 * 32 * 16 * 4)
    self.assertEqual(row['formula']['encode'], 24 * 2 * 4 * 16**2)
    (path,) = benchmarking.write_report(found, temporary(self, 'histories'))
    with open(path) as f:
      self.assertEqual(json.load(f), found)

  @parameterized.parameters(
    (['concat'], [24], "fusions has 'concat'"), ([], [16], 'above 16')
  )
  def test_histories_refused(self, fusions, lengths, message):
    with self.assertRaisesRegex(ValueError, message):
      histories.run(support.config(), lengths, 8, fusions=fusions)

  @parameterized.parameters(([16], [16, 32]), ([16, 32], [32, 16]))
  def test_one_point_has_no_slope(self, lengths, candidates):
    with self.assertRaisesRegex(ValueError, 'must be ascending, and two'):
      cost.run(support.config(), lengths, candidates)


class SuitesTest(parameterized.TestCase):
  @marks.slow_unless(lambda suite, names: suite == 'attention')
  @parameterized.parameters(
    ('attention', ['window_32', 'full_64_grad']),
    ('tower', ['ragged_128', 'joint_batch_128']),
  )
  def test_report(self, suite, names):
    named = {k: suites.SUITES[suite][k].small() for k in names}
    lines = []
    # cuDNN is a rival that cannot run here.
    result = suites.run(
      suite,
      named,
      ['histjax', 'jax:xla', 'jax:cudnn'],
      progress=lines.append,
      **QUICK,
    )
    text = '\n'.join(lines)
    for entry, name in zip(result['results'], names, strict=True):
      self.assertEqual(entry['name'], name)
      self.assertEqual(entry['best_rival'], 'jax:xla')
      self.assertIn('failed', entry['contenders']['jax:cudnn'])
      ours, rival = (entry['contenders'][k] for k in ('histjax', 'jax:xla'))
      self.assertAlmostEqual(
        entry['ratios']['histjax']['throughput'],
        rival['throughput']['median'] / ours['throughput']['median'],
      )
      self.assertTrue(ours['runs'])
      self.assertIn(f'{name}: ', text)
    self.assertIn('  jax:cudnn              failed: ', text)
    paths = benchmarking.write_report(result, temporary(self, suite))
    with open(paths[0]) as f:
      self.assertEqual(json.load(f), result)
    with open(paths[1], 'rb') as f:
      self.assertEqual(f.read(8), b'\x89PNG\r\n\x1a\n')

  def test_wrong_results_are_not_timed(self):
    workload = workloads.ATTENTION['full_32'].small()
    right = contenders.reference

    def wrong(*args):
      return [1.1 * x for x in right(*args)]

    with mock.patch.object(contenders, 'reference', wrong):
      result = suites.run(
        'attention',
        {'full_32': workload},
        ['histjax', 'nobody'],
        progress=lambda line: None,
        **QUICK,
      )
    (entry,) = result['results']
    self.assertRegex(entry['contenders']['histjax']['failed'], '^wrong: .*e-02')
    self.assertIn(
      "'nobody' is unknown", entry['contenders']['nobody']['failed']
    )
    self.assertEqual(entry['ratios'], {})
    self.assertIsNone(entry['best_rival'])
    self.assertIn('failed: wrong', report.table(entry))
    (line,) = report.broken(result)
    self.assertStartsWith(line, 'full_32 histjax: wrong: ')
    self.assertNotEmpty(report.roofline(result).axes)
    entry['contenders']['histjax']['relative_error'] = np.nan
    paths = benchmarking.write_report(result, temporary(self, 'attention'))
    with open(paths[0]) as f:  # JSON has no NaN.
      (entry,) = json.load(f, parse_constant=self.fail)['results']
    self.assertIsNone(entry['contenders']['histjax']['relative_error'])

  def test_ratios_are_to_the_best_rival(self):
    def row(throughput, latency):
      return {
        'throughput': {'median': throughput},
        'latency': {'p50': latency},
      }

    rows = {
      'histjax': row(1.0, 3.0),
      'jax:cudnn': row(2.0, 9.0),
      'torch:sdpa': row(4.0, 6.0),
      'tokamax': {'failed': 'not here'},
    }
    workload = workloads.TOWER['batch_128']
    entry = suites.workload_entry('batch_128', workload, rows, CEILINGS)
    self.assertEqual(entry['best_rival'], 'jax:cudnn')
    self.assertEqual(
      entry['ratios'], {'histjax': {'throughput': 2.0, 'latency': 2.0}}
    )
    self.assertEqual(
      entry['contenders']['histjax']['fraction_of_ceiling'],
      workload.flops() / 1e12,
    )
    self.assertEqual(entry['floor']['bytes'], workload.num_bytes() / 1e9)

  def test_default_contenders(self):
    ragged = workloads.TOWER['ragged_128']
    for platform in ('cpu', 'gpu', 'tpu'):
      names = suites.default_contenders(ragged, platform)
      self.assertEqual(names[0], 'histjax')
      self.assertEqual('torch:varlen' in names, platform == 'gpu')


class TablesTest(absltest.TestCase):
  @pytest.mark.slow  # Its parts below.
  def test_report(self):
    lines = []
    result = tables.run(
      (20, 500),
      tables.Workload(8, 4, 6, 2, 8, 1),
      repeats=2,
      seconds=0,
      progress=lines.append,
    )
    self.assertLen(lines, 4)
    self.assertEqual([x['rows'] for x in result['results']], [20, 500])
    for entry in result['results']:
      self.assertLessEqual(entry['touched'], 32)
      ours, dense = (entry['contenders'][k] for k in ('histjax', 'dense'))
      self.assertLessEqual(ours['p50'], ours['p99'])
      self.assertGreater(dense['calls'], 0)
      self.assertAlmostEqual(ours['loss'], dense['loss'], delta=1e-5)
    few, many = (
      {k: x['temporary_bytes'] for k, x in entry['contenders'].items()}
      for entry in result['results']
    )
    # 12 more rows can be distinct; the dense gradient alone has 480.
    self.assertLess(many['histjax'] - few['histjax'], 12 * 8 * 4 * 10)
    self.assertGreater(many['dense'] - few['dense'], 400 * 8 * 4)
    paths = benchmarking.write_report(result, temporary(self, 'tables'))
    with open(paths[0]) as f:
      self.assertEqual(json.load(f), result)
    self.assertTrue(os.path.getsize(paths[1]))

  def test_unknown_contenders(self):
    with self.assertRaisesRegex(ValueError, r"contenders=\['xla'\] must be"):
      tables.run((20,), contenders=['xla'])

  def test_what_does_not_fit_is_not_run(self):
    with mock.patch.object(tables, 'device_bytes', lambda: 1000):
      result = tables.run(
        (20,),
        tables.Workload(8, 4, 6, 2, 8, 1),
        repeats=2,
        seconds=0,
        progress=lambda line: None,
      )
    found = result['results'][0]['contenders']
    self.assertIn('it needs 0.0 GiB', found['dense']['failed'])
    self.assertLessEqual(found['histjax']['p50'], found['histjax']['p99'])
    self.assertGreater(found['histjax']['argument_bytes'], 20 * 8 * 4)


class DevicesTest(absltest.TestCase):
  @pytest.mark.slow  # It compiles three updates.
  def test_report(self):
    result = devices.run(
      (64,),
      tables.Workload(8, 8, 6, 2, 8, 1),
      repeats=2,
      seconds=0,
      progress=str,
    )
    self.assertEqual(result['devices'], jax.device_count())
    (entry,) = result['results']
    found = entry['contenders']
    self.assertEqual(set(found), set(devices.CONTENDERS))
    for name, row in found.items():
      self.assertLessEqual(row['p50'], row['p99'])
      self.assertGreater(row['update'], 0)
      self.assertLess(entry['ratios'][name]['loss'], 1e-5)
    # A device has its part of the table alone.
    whole, split = (
      found[f'histjax:{x}']['argument_bytes'] for x in ('whole', 'split')
    )
    # Of each row its values and the accumulator.
    of_table = (64 + 10_000) * (8 + 1) * 4
    self.assertLess(split, whole - of_table * 0.8)
    paths = benchmarking.write_report(result, temporary(self, 'devices'))
    with open(paths[0]) as f:
      self.assertEqual(json.load(f), result)
    self.assertTrue(os.path.getsize(paths[1]))

  def test_what_it_cannot_compare(self):
    with self.assertRaisesRegex(ValueError, "'histjax:two'.*must be of"):
      devices.run((64,), contenders=['histjax:two'])
    with mock.patch.object(jax, 'device_count', lambda: 1):
      with self.assertRaisesRegex(ValueError, 'one device'):
        devices.run((64,))


class TrainStepsTest(absltest.TestCase):
  @pytest.mark.slow  # It compiles nine updates.
  def test_rows_of_a_log(self):
    workload = workloads.TRAIN_STEP['cpu_heavy_tailed'].small()
    result = train_steps.run(
      'train_step', {'log': workload}, repeats=1, seconds=0, progress=str
    )
    (entry,) = result['results']
    for name, row in entry['contenders'].items():
      if name.startswith('torch') and 'failed' in row:
        self.assertIn('ImportError', row['failed'])
        continue
      self.assertLess(row['errors']['gradient'], 1e-5)
      self.assertGreater(row['impressions_per_second'], 0)
    paths = benchmarking.write_report(result, temporary(self, 'rows'))
    self.assertLen(paths, 2)

  def test_all_kinds_of_rows_hold_the_log(self):
    workload = workloads.TRAIN_STEP['cpu_heavy_tailed'].small()
    log = train_rows.log_of(workload)
    for kind in train_rows.KINDS:
      grouped = train_rows.group(log, workload, kind)
      self.assertEqual(grouped.rows.candidate_counts.sum(), len(log))
      batch = grouped.batch(0)
      self.assertEqual(kind == 'packed', batch.segments is not None)
      summary = train_rows.summary(grouped, [2.0] * len(grouped.buckets))
      self.assertEqual(
        summary['epoch_seconds'],
        2.0 * sum(b.num_batches for b in grouped.buckets),
      )
      real = batch.candidates.mask.mean()
      if len(grouped.buckets) == 1 and grouped.buckets[0].num_batches == 1:
        self.assertAlmostEqual(summary['padding']['candidates'], 1 - real)
    with self.assertRaisesRegex(ValueError, 'these are not equal updates'):
      train_rows.errors((1.0, np.ones(3)), (1.0, np.array([1.0, 1.0, 1.1])))
    with self.assertRaisesRegex(ValueError, "'torch:packed' is unknown"):
      train_rows.check_contenders(['torch:packed'])

  @pytest.mark.slow
  def test_report(self):
    workload = workloads.TRAIN_STEP['cpu'].small()
    lines = []
    result = train_steps.run(
      'train_step',
      {'cpu': workload},
      ['histjax:xla', 'histjax:cudnn'],
      repeats=2,
      seconds=0,
      progress=lines.append,
    )
    (entry,) = result['results']
    self.assertEqual(entry['workload'], dataclasses.asdict(workload))
    row = entry['contenders']['histjax:xla']
    self.assertIn('xla', row['runs'].values())
    self.assertLessEqual(row['update']['p50'], row['update']['p99'])
    self.assertEqual(row['update']['calls'], 2)
    self.assertIn('update', lines[0])
    self.assertIn('histjax:cudnn          failed: NotImpl', lines[0])
    self.assertEmpty(report.broken(result))
    (path,) = benchmarking.write_report(result, temporary(self, 'train_step'))
    with open(path) as f:
      self.assertEqual(json.load(f), result)


if __name__ == '__main__':
  absltest.main()
