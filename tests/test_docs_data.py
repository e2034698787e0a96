"""What docs/data.md says can be done, and what it says was measured."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarking import preparing, spilling

ROOT = pathlib.Path(__file__).parents[1]
DOCS = (ROOT / 'docs/data.md').read_text(encoding='utf-8')


@pytest.mark.slow  # Four processes, and a model to compile.
def test_commands(tmp_path):
  (code,) = re.findall(r'```sh\n(.*?)```', DOCS, re.DOTALL)
  assert '/tmp/data' in code
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  binaries = pathlib.Path(sys.executable).parent
  done = subprocess.run(
    ['bash', '-ec', code.replace('/tmp/data', str(tmp_path))],
    cwd=ROOT,
    env={
      **environment,
      'PYTHONPATH': str(ROOT),
      'PATH': f'{binaries}{os.pathsep}{environment["PATH"]}',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert '20,000 events of' in done.stdout
  assert 'click/auc' in done.stdout


def test_figures():
  names = re.findall(r'\.\./(benchmarks/results/\S+?\.json)', DOCS)
  reports = [json.loads((ROOT / name).read_text()) for name in names]
  tables = {'prepare': preparing.table, 'spill': spilling.table}
  assert 'prepare' in [report['suite'] for report in reports]
  for report in reports:
    assert f'\n\n{tables[report["suite"]](report)}\n\n' in f'{DOCS}\n'
    if report['suite'] == 'prepare':
      made = report['prepare']
      assert made['peak_bytes'] <= made['memory_bound']
      assert report['feed']['ratio'] >= 3
