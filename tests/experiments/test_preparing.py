"""The suite `prepare`, on a small log."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest
from absl.testing import absltest

import config_util
import event_log
from benchmarking import memory, preparing, spilling
from configs import events


@pytest.mark.slow  # Processes, and a model to compile.
def test_report(tmp_path):
  log = event_log.LogConfig(60_000, 300, 1000, 3)
  values = events.get_config().to_dict()
  values['model']['encoder'] |= {'num_layers': 1, 'width': 8, 'num_heads': 1}
  values['pipeline']['batch_events'] = 2048
  before = memory.tree_bytes(os.getpid())  # Of the tests that came first.
  report = preparing.run(
    config_util.config_dict(values).to_dict(),
    log,
    tmp_path,
    gibibytes=3.0,
    num_workers=2,
    num_batches=4,
    progress=lambda line: None,
  )
  assert json.loads(json.dumps(report)) == report
  assert report['log'] == dataclasses.asdict(log)
  assert report['rows']['train'] >= 290
  assert 20 < report['bytes']['spill'] < 60
  assert 0 < report['prepare']['peak_bytes'] < before + 3 * 2**30
  assert report['feed']['ratio'] > 0
  assert '| events, users | 60,000, ' in preparing.table(report)
  report = spilling.run(values, log, tmp_path, partitions=4)
  assert report['contenders']['histjax']['spill_bytes'] > 60_000 * 30
  assert '| histjax | ' in spilling.table(report)
  with pytest.raises(ValueError, match='shards is there already'):
    preparing.run(values, log, tmp_path, gibibytes=3.0, num_workers=2)


def test_peak_memory():
  before = memory.tree_bytes(os.getpid())
  some = np.ones(2**25)
  with memory.PeakMemory(every=0.01) as peak:
    while not peak.bytes:
      time.sleep(0.01)
  assert before > 0
  assert peak.bytes >= some.nbytes


if __name__ == '__main__':
  absltest.main()
