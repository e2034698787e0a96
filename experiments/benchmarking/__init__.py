"""Timing: of ways to score, of operations against rivals, of whole requests.

`scoring` compares the ways to score, `cost` says how they grow. `workloads`
names what is timed; `suites`, `requests` and `train_steps` time it.
`contenders`, `request_calls` and their rivals are who is compared, `machine` is
what the device can do.
"""

from benchmarking.machine import environment, matmul_ceiling
from benchmarking.report import write_report
from benchmarking.scoring import (
  HEADER,
  flops,
  plot,
  scoring_suite,
)
from benchmarking.timing import Timing, measure

__all__ = [
  'HEADER',
  'Timing',
  'environment',
  'flops',
  'matmul_ceiling',
  'measure',
  'plot',
  'scoring_suite',
  'write_report',
]
