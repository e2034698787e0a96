"""Every fusion trains with the one trainer, on streaming rows."""

import dataclasses

import pytest

from histjax.nn import fusion as fusion_lib
from tests.training import runs


@pytest.mark.parametrize(
  'fusion',
  [
    # Blocks, or one layer without any: `make test` trains one of each.
    name
    if name in ('append_cross', 'target_attention')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in fusion_lib.FUSIONS
  ],
)
def test_loss_falls_on_streaming_rows(fusion, tmp_path):
  steps = 18  # Three epochs of 6 batches; a report of the loss for each.
  config = dataclasses.replace(
    runs.CONFIG,
    model=dataclasses.replace(runs.MODEL, fusion=fusion),
    optimizer=dataclasses.replace(runs.CONFIG.optimizer, learning_rate=0.05),
    num_steps=steps,
    eval_every=steps,
    checkpoint_every=steps,
    log_every=6,
  )
  assert config.data.rows.kind == 'streaming'
  history = runs.run(tmp_path, config=config)['history']
  losses = [report['loss'] for report in history if 'loss' in report]
  assert losses[-1] < losses[0] - 0.02
