"""Timing: of ways to score, of operations against rivals, of whole requests.

`scoring` compares the ways to score, `cost` says how they grow. `workloads`
names what is timed, `suites` and `requests` time it, `contenders`
and `torch_rivals` are who is compared, `machine` what the device can do.
"""

from histjax.benchmark.machine import environment, matmul_ceiling
from histjax.benchmark.report import write_report
from histjax.benchmark.scoring import (
  HEADER,
  flops,
  plot,
  random_batch,
  scoring_suite,
)
from histjax.benchmark.timing import Timing, measure

__all__ = [
  'HEADER',
  'Timing',
  'environment',
  'flops',
  'matmul_ceiling',
  'measure',
  'plot',
  'random_batch',
  'scoring_suite',
  'write_report',
]
