"""Two processes of one device do what one process of two devices does."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from histjax.training import checkpoints
from tests.training import runs

CHANGES = {'num_steps': 4, 'eval_every': 2, 'log_every': 2}
CODE = textwrap.dedent("""
  import os, sys
  os.environ['XLA_FLAGS'] = sys.argv[6]
  sys.path.insert(0, sys.argv[1])
  import jax
  jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
  assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
  from tests.training import runs
  result = runs.run(sys.argv[4], num_devices=2, **eval(sys.argv[5]))
  import json
  print('RESULT', json.dumps(result))
""")


def free_address():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return f'localhost:{s.getsockname()[1]}'


@pytest.mark.slow
def test_two_processes(tmp_path):
  address = free_address()
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        '-c',
        CODE,
        str(pathlib.Path.cwd()),
        address,
        str(index),
        str(tmp_path / 'two'),
        repr(CHANGES),
        # One device each.
        os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1'),
      ],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [p.communicate()[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0]
  results = [
    json.loads(line.removeprefix('RESULT '))
    for output in outputs
    for line in output.splitlines()
    if line.startswith('RESULT ')
  ]
  np.testing.assert_equal(results[0], results[1])
  assert 'Validation at step 2' in outputs[0]
  assert 'Validation' not in outputs[1]  # One of them reports.

  expected = runs.run(tmp_path / 'one', num_devices=2, **CHANGES)
  assert results[0]['best_step'] == expected['best_step']
  for split in ('validation', 'test'):
    for name, value in expected[split].items():
      # Gradients are summed in another order.
      np.testing.assert_allclose(results[0][split][name], value, rtol=1e-4)
  found, _ = checkpoints.load_variables(tmp_path / 'two')
  one, _ = checkpoints.load_variables(tmp_path / 'one')
  np.testing.assert_allclose(
    found['tables']['tables']['item'],
    one['tables']['tables']['item'],
    atol=1e-5,
  )
