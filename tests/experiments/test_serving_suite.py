"""Users who come back: what is timed gives the same scores as `Scorer`."""

import pathlib
import tempfile
from typing import Any
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

import benchmarking
from benchmarking import serving, serving_device, serving_report, workloads
from histjax.scoring import graphs, paged

MODEL = workloads.Request(1, 1, 1, 16, num_layers=1, num_heads=2)


class ServingSuiteTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_report(self):
    saved = []
    report = serving.run(
      MODEL,
      (16, 32),
      (4,),
      users=(1, 2),
      seconds=0.0,
      progress=lambda line: None,
      save=lambda report: saved.append(len(report['results'])),
    )
    self.assertEqual(saved, [1, 2])
    self.assertEqual(report['model']['width'], 16)
    for cell, length in zip(report['results'], (16, 32), strict=True):
      self.assertEqual((cell['length'], cell['candidates']), (length, 4))
      self.assertEqual(
        {way: [*cell[way]] for way in ('device', 'in process', 'http')},
        {'device': ['1', '2'], 'in process': ['1', '2'], 'http': ['1']},
      )
      for way in ('in process', 'http'):
        for times in cell[way].values():
          self.assertEqual({*times}, {*serving.KINDS})
          for kind in times.values():
            self.assertLessEqual(kind['p50'], kind['p99'])
      # Layers, keys and values, events, heads, bytes.
      self.assertEqual(cell['state_bytes'], 1 * 2 * length * 16 * 2)
      self.assertLess(max(cell['relative_error'].values()), 5e-2)
      ratio = cell['ratios']['in process']['2']['no cache']
      times = cell['in process']['2']
      self.assertEqual(ratio, times['no cache']['p50'] / times['hit']['p50'])
      lines = serving_report.table(cell).splitlines()
      self.assertLen(lines, 2 + 5 * len(serving.KINDS))
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    paths = benchmarking.write_report(report, str(folder / 'serving'))
    self.assertEqual(sorted(map(str, folder.iterdir())), sorted(paths))

  def test_other_logits_are_no_result(self):
    score = serving.InProcess.score

    def wrong(self, kind, requests):
      found = score(self, kind, requests)
      if kind == 'extend':
        found[0].logits['click'] = np.roll(found[0].logits['click'], 1)
      return found

    with (
      mock.patch.object(serving.InProcess, 'score', wrong),
      self.assertRaisesRegex(
        ValueError, 'extend, against Scorer .*: relative error'
      ),
    ):
      serving.run(MODEL, (16,), (4,), users=(2,), seconds=0.0, http=False)

  @parameterized.parameters(False, True)
  def test_a_graph_is_replayed(self, donates):
    """In the program's place, and the pool stays."""
    out, pool = mock.Mock(), paged.Pool(np.zeros(1), np.zeros(1))
    recording, none = mock.Mock(), mock.Mock()
    recording.launch.side_effect = lambda slot, cached: (
      (*cached, out) if donates else out
    )
    request = np.arange(3, dtype=np.int32)
    slot = graphs.Slot(None, request, {}, [], recording, request, none, none)
    scorer: Any = mock.Mock(
      device=None, _call=lambda _, slot, *pool: recording.launch(slot, pool)
    )
    with serving_device.recorded(scorer) as calls:
      scorer._call(mock.Mock(), slot, *pool)
    (one,) = calls
    np.testing.assert_array_equal(one.request, request)
    kept, times = one.times(1e-3, pool)
    self.assertIs(kept, pool)
    self.assertGreater(times['call'], 0)
    # On a machine that is busy the first of those that are timed is the last.
    self.assertGreater(recording.launch.call_count, 1)
    self.assertEqual(recording.launch.call_args, mock.call(slot, tuple(pool)))
    recording._compiled.assert_not_called()

  def test_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, r'lengths=\[10\] must be above 10'):
      serving.run(MODEL, (10,), (4,))


if __name__ == '__main__':
  absltest.main()
