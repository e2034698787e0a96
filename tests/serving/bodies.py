"""Requests of the synthetic log's columns."""

import numpy as np

CONTEXT = {'segment': 2}
EVENT = {'item': 3, 'category': 1, 'click': 1, 'like': 0}


def body(num_candidates=3, num_events=2, **changes):
  """A request; `changes` of its fields."""
  rng = np.random.default_rng(num_candidates + 1000 * num_events)
  found = {
    'user': 7,
    'context': CONTEXT,
    'candidates': {
      'item': rng.integers(0, 20, num_candidates).tolist(),
      'category': rng.integers(0, 6, num_candidates).tolist(),
    },
    'events': {
      'item': rng.integers(0, 20, num_events).tolist(),
      'category': rng.integers(0, 6, num_events).tolist(),
      'click': rng.integers(0, 2, num_events).tolist(),
      'like': rng.integers(0, 2, num_events).tolist(),
    },
  }
  return {**found, **changes}
