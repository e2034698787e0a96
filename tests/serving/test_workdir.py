"""An engine of a trained run."""

import dataclasses

import numpy as np

from histjax import Scorer
from histjax.data.rows import collate
from histjax.serving.engine import Engine, EngineConfig, Request
from tests.serving import worlds
from tests.training.test_run import EVENTS, REQUEST, trained

__all__ = ['trained']


def expected(scorer, events):
  """As the run's evaluation has it: of the last two events."""
  context = {scorer.config.schema.user: 7, **REQUEST['context']}
  batch = collate(
    [
      scorer.make_row(
        context=context,
        history=events,
        candidates=REQUEST['candidates'],
      )
    ]
  )
  cache = scorer.encode(batch.history)
  logits = scorer.score(cache, batch.candidates, batch.context)
  return {name: x[0] for name, x in logits.items()}


def test_scores_of_a_run(trained):
  workdir = trained[0]
  engine = Engine(workdir, EngineConfig(max_rows=1))
  best = Scorer.from_workdir(workdir)
  assert engine.fingerprint == best.fingerprint
  request = Request(
    user=7,
    candidates=REQUEST['candidates'],
    context=REQUEST['context'],
    events=EVENTS[:1],
  )
  for first, stop, source in (
    (0, 1, 'encoded'),
    (1, 2, 'extended'),
    (2, 3, 'encoded'),  # The run reads two events.
    (3, 3, 'hit'),
  ):
    now = dataclasses.replace(request, first=first, events=EVENTS[first:stop])
    (result,) = engine.score([now])
    worlds.check(result, expected(best, EVENTS[:stop]))
    assert result.source == source
    assert result.logits.keys() == {'click', 'like'}
    assert result.logits['click'].dtype == np.float32
  engine.roll_over(Scorer.from_workdir(workdir, 'latest'))
  (result,) = engine.score([now])
  worlds.check(result, expected(engine.scorer, EVENTS))
  assert result.source == 'encoded'
  engine.roll_over(workdir)
  assert engine.fingerprint == best.fingerprint
