"""What docs/training.md says to type, typed."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from histjax import config
from tests import children
from tests.training import members, runs

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'docs' / 'training.md').read_text()
SMALL = [
  '--config.data.source.num_users=40',
  '--config.num_steps=2',
  '--config.eval_every=None',
  '--config.optimizer.warmup_steps=0',
  '--config.tensorboard=False',
]


def commands():
  return [
    block.replace('\\\n', ' ')
    for block in re.findall(r'```sh\n(.*?)```', TEXT, re.DOTALL)
  ]


def test_flags_are_there():
  source = (ROOT / 'experiments' / 'train.py').read_text()
  known = {*re.findall(r"DEFINE_\w+\(\s*'(\w+)'", source), 'config'}
  used = []
  for command in commands():
    _, _, arguments = command.partition('experiments/train.py')
    used += re.findall(r'--(\w+)', arguments)
  assert len(used) > 15 and set(used) <= known, set(used) - known


@pytest.mark.slow
def test_commands(tmp_path):
  one, *two = commands()[:3]
  assert two[0].replace('process_id=0', 'process_id=1') == two[1]

  def start(command):
    address = 'localhost:8476'
    command = command.replace('/tmp/', f'{tmp_path}/').replace(address, port)
    python, *words = command.split()
    assert python == 'python'
    return children.start(
      [sys.executable, *words, *SMALL],
      cwd=ROOT,
      env=members.environment(1),
      stdout=subprocess.PIPE,
      text=True,
    )

  port = members.free_address()
  for started in ([start(one)], [start(command) for command in two]):
    outputs = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    assert 'Test, with the parameters of step' in outputs[0]
    assert not any('Test' in output for output in outputs[1:])
  again = start(one)
  assert 'its metrics are returned' in again.communicate()[0]


@pytest.mark.slow
def test_ray_train(tmp_path):
  """On workers without accelerators; its own process, since Ray forks."""
  (snippet,) = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
  # Workers that are not joined would each train the whole run.
  joined = '  assert jax.process_count() == 2\n  train_and_evaluate('
  assert snippet.count('\n  train_and_evaluate(') == 1
  snippet = snippet.replace('  train_and_evaluate(', joined)
  values = {'config': config.to_dict(runs.CONFIG)}
  (tmp_path / 'values.json').write_text(json.dumps(values))
  code = f"""{snippet}
import json, pathlib, ray
ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False)
folder = pathlib.Path({str(tmp_path)!r})
values = json.loads((folder / 'values.json').read_text())
trainer({{**values, 'workdir': str(folder / 'run')}}, num_workers=2).fit()
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env={**members.environment(1), 'HOME': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert (tmp_path / 'run' / 'metrics.json').exists()
