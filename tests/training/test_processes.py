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
from tests.training import runs, test_sharding

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


TABLES = textwrap.dedent("""
  import os, sys
  os.environ['XLA_FLAGS'] = sys.argv[5]
  sys.path.insert(0, sys.argv[1])
  import jax, numpy as np
  jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
  assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
  from histjax.training import checkpoints, sharding
  from tests.training import test_sharding as t
  on = sharding.data_mesh(table=4)
  own = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
  found = t.train(t.create(on), on, rows=own)
  item = found.tables['tables']['item']
  assert item.addressable_shards[0].data.shape == (10, 4)
  with checkpoints.Checkpoints(sys.argv[4]) as manager:
    manager.save(found, {'best_step': None, 'config': {}})
  local = sharding.local_mesh(on)
  assert dict(local.shape) == {'data': 1, 'table': 4}
  variables = sharding.put_variables(found.variables, local)
  mine = variables['tables']['tables']['item']
  np.testing.assert_array_equal(np.asarray(mine), sharding.to_host(item))
""")


@pytest.mark.slow
def test_tables_split_in_each_of_two_processes(tmp_path):
  address = free_address()
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=4')
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        '-c',
        TABLES,
        str(pathlib.Path.cwd()),
        address,
        str(index),
        str(tmp_path),
        flags,
      ],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    for index in range(2)
  ]
  assert [p.wait() for p in processes] == [0, 0]
  two = test_sharding.mesh(2, 2)
  with checkpoints.Checkpoints(tmp_path) as manager:
    found, _ = manager.restore(test_sharding.create(two))
  test_sharding.assert_close(
    test_sharding.everything(found), test_sharding.on_one()[0]
  )
