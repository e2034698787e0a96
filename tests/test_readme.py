"""README's first snippet runs as it is printed."""

import pathlib
import re

import numpy as np

import config_util
from configs import synthetic
from histjax.training import train_and_evaluate
from tests.training import runs

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_quickstart(tmp_path):
  (code,) = re.findall(
    r'```python\n(import histjax\n.*?)```', README.read_text(), re.DOTALL
  )
  assert len([line for line in code.splitlines() if line]) == 10
  # As `make demo` trains, with fewer users and steps.
  values = synthetic.get_config().to_dict()
  values['data']['source']['num_users'] = 40
  values |= {'num_steps': 1, 'eval_every': None, 'tensorboard': False}
  values['optimizer']['warmup_steps'] = 0
  config, dataset = config_util.load(values)
  train_and_evaluate(config, tmp_path, dataset=dataset, mesh=runs.mesh())
  assert "'runs/demo'" in code
  found: dict = {}
  exec(code.replace('runs/demo', str(tmp_path)), found)
  assert found['logits']['click'].shape == (1, 200)
  assert found['cache'].info.length.tolist() == [2]
  scorer, cache, batch = (found[n] for n in ('scorer', 'cache', 'batch'))
  before = scorer.encode(batch.history)
  again = scorer.score(before, batch.candidates, batch.context)['click']
  np.testing.assert_allclose(again, found['logits']['click'], atol=1e-5)
  # Attention averages: of two equal events it reads what one says.
  twice = scorer.score(cache, batch.candidates, batch.context)['click']
  np.testing.assert_allclose(twice, again, atol=1e-5)
