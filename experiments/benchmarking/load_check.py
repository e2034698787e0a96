"""Whether scores that a server gave are those of the whole history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarking.load import Record, Users
from histjax.data.rows import collate
from histjax.scoring import Scorer

BOUND = 1e-4
"""Of float32 logits: sums run in another order at other batch sizes."""


def check(
  records: Sequence[Record],
  users: Users,
  scorers: Mapping[str, Scorer],
  bound: float = BOUND,
) -> dict[str, Any]:
  """Scores again, each user's whole history from the beginning.

  Args:
    records: that were answered.
    users: whose they are.
    scorers: by fingerprint; a reply is checked against the model that it names.
    bound: of the difference, absolute and relative.

  Returns:
    `scores`, how many there are; `largest` difference over what is allowed;
    `models`, requests of each; `wrong`, a line for each reply that is.
  """
  wrong: list[str] = []
  number, largest, models = 0, 0.0, dict.fromkeys(scorers, 0)
  for i, record in enumerate(records):
    reply = record.reply
    scorer = scorers.get(reply.model)
    if scorer is None:
      wrong.append(f'request {i} was scored by {reply.model[:12]!r}')
      continue
    models[reply.model] += 1
    name = scorer.config.schema.user
    row = scorer.make_row(
      context={name: record.user, **users.context(record.user)},
      history=users.events(record.user, 0, reply.num_events),
      candidates={k: v.tolist() for k, v in record.candidates.items()},
    )
    batch = collate([row])
    cache = scorer.encode(batch.history)
    logits = scorer.score(cache, batch.candidates, batch.context)
    for task, expected in logits.items():
      given = np.array(reply.logits[task])
      expected = expected[0, : len(row.visible)]
      number += expected.size
      if given.shape != expected.shape or reply.num_events < record.stop:
        wrong.append(
          f'request {i}, {task}: {given.size} scores after {reply.num_events} '
          f'events, not {expected.size} after {record.stop}'
        )
        continue
      ratio = np.abs(given - expected) / (bound * (1 + np.abs(expected)))
      largest = max(largest, float(ratio.max()))
      if not ratio.max() <= 1:
        wrong.append(
          f'request {i}, {task}, user {record.user}, {reply.source}: off by '
          f'{ratio.max():.3g} of the bound'
        )
  return {
    'scores': number,
    'bound': bound,
    'largest': largest,
    'models': models,
    'wrong': wrong,
  }
