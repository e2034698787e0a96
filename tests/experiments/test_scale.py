"""Tests for experiments/scale.py and what it computes."""

import json
import pathlib
import shlex
import subprocess
import sys

import numpy as np
from absl.testing import absltest, parameterized

from benchmarking import scaling

ROOT = pathlib.Path(__file__).parents[2]


class TouchedTest(parameterized.TestCase):
  @parameterized.parameters((1, 5, 1.0), (50, 400, 1.0), (9_000, 700, 1.3))
  def test_is_the_mean_of_draws(self, items, ids, exponent):
    rng = np.random.default_rng(0)
    share = np.arange(1, items + 1) ** -exponent
    share /= share.sum()
    drawn = [
      len(np.unique(rng.choice(items, ids, p=share))) for _ in range(200)
    ]
    # Of 200 draws; their deviation is below sqrt(ids) / 2.
    np.testing.assert_allclose(
      scaling.touched(items, ids, exponent),
      np.mean(drawn),
      atol=4 * np.sqrt(ids) / 2 / np.sqrt(200),
    )

  def test_ranks_as_an_integral(self):
    items, ids = 60_000, 100_000
    share = 1 / np.arange(1, items + 1)
    share /= share.sum()
    np.testing.assert_allclose(
      scaling.touched(items, ids),
      np.sum(-np.expm1(ids * np.log1p(-share))),
      rtol=1e-4,
    )


class StepTest(absltest.TestCase):
  def test_one_chip_sends_nothing(self):
    found = scaling.step(scaling.Job(num_chips=1, table_axis=1))
    self.assertEqual(set(found['sent'].values()), {0.0})
    self.assertFalse(found['fits'])

  def test_more_items_send_more_by_what_is_touched_alone(self):
    few, many = (
      scaling.step(scaling.Job(items=n, zipf=0.5)) for n in (10**8, 10**10)
    )
    self.assertLess(
      many['sent']['rows of the table'],
      1.2 * few['sent']['rows of the table'],
    )

  def test_what_cannot_be(self):
    for fields, message in (
      ({'chip': 'v9'}, "chip='v9' must be one of"),
      ({'table_axis': 3}, 'table_axis=3 must divide num_chips=256'),
      ({'rows': 0}, 'rows=0 must be at least 1'),
      ({'efficiency': 1.5}, 'efficiency=1.5'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        scaling.Job(**fields)


class PageTest(absltest.TestCase):
  def test_has_what_the_script_prints(self):
    page = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
    command = page.split('```sh\n')[1].split('```')[0]
    _, script, *flags = shlex.split(command.replace('\\\n', ' '))
    done = subprocess.run(
      [sys.executable, script, *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    lines = done.stdout.splitlines()
    self.assertGreater(len(lines), 20)
    for line in lines:
      self.assertIn(line, page)

  def test_measured_times_are_those_of_the_results(self):
    page = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')

    def results(name):
      path = ROOT / 'benchmarks' / 'results' / f'{name}.json'
      return json.loads(path.read_text(encoding='utf-8'))['results']

    cpu = results('2026-11-28-tables-epyc-cpu')
    times = [1e3 * r['contenders']['histjax']['p50'] for r in cpu]
    self.assertIn(
      f'{times[0]:.0f} ms\nwith a table of 1e4 rows of 64 and {times[2]:.0f} '
      'with 1e7',
      page,
    )
    for entry in results('2026-11-30-tables-h200'):
      cells = [f'1e{len(str(entry["rows"])) - 1}']
      for name in ('histjax', 'dense'):
        found = entry['contenders'][name]
        cells += [
          f'{1e3 * found["p50"]:.2f}',
          f'{found["temporary_bytes"] / 2**20:.0f} MiB',
        ]
      self.assertIn(f'| {" | ".join(cells)} |', page)


if __name__ == '__main__':
  absltest.main()
