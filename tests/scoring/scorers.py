"""Scorers of small models, one of each for all tests of a process."""

import contextlib
from unittest import mock

import jax
import numpy as np

from histjax import scoring
from histjax.scoring import transport
from tests import support

# Sums run in another order in each way of scoring; logits are of order 1.
TOLERANCE = {
  'float32': {'rtol': 1e-5, 'atol': 1e-5},
  # 8 bits of mantissa, about 20 roundings deep.
  'bfloat16': {'rtol': 0.05, 'atol': 0.05},
}
VARIANTS = {
  'causal': {},
  'window': {'encoder__window': 3},
  'bidirectional': {'encoder__causal': False},
  'recency': {
    'encoder__causal': False,
    'encoder__positions': 'recency',
    'encoder__num_recency': 6,
  },
  'no_positions': {'encoder__positions': 'none'},
  'one_layer': {'encoder__num_layers': 1},
  'mlp': {
    'interaction': support.interaction.InteractionConfig(
      kind='mlp', mlp_widths=(8,)
    )
  },
  'bfloat16': {'dtype': 'bfloat16'},
}
ISOLATED = {
  'isolated': {'fusion': 'append_isolated'},
  'isolated_window': {'fusion': 'append_isolated', 'encoder__window': 3},
  'isolated_bidirectional': {
    'fusion': 'append_isolated',
    'encoder__causal': False,
  },
  'isolated_bfloat16': {'fusion': 'append_isolated', 'dtype': 'bfloat16'},
}
CROSS_ONLY = {
  'cross': {'fusion': 'cross_only'},
  'cross_window': {'fusion': 'cross_only', 'encoder__window': 3},
}
_SCORERS: dict = {}


def scorer(variant='causal', **options) -> scoring.Scorer:
  """One scorer per variant for the whole file: compiling takes the time."""
  key = (variant, tuple(sorted(options.items())))
  if key not in _SCORERS:
    fields = dict({**VARIANTS, **ISOLATED, **CROSS_ONLY}[variant])
    if 'candidate_tower' in options:
      fields['encoder__candidate_tower'] = options.pop('candidate_tower')
    config = support.config(**fields)
    _, variables = support.init(config)
    _SCORERS[key] = scoring.Scorer(
      config, variables, scoring.ScorerConfig(**options)
    )
  return _SCORERS[key]


BAD_ITEM = 39
"""What `poisoned` scores of it, or of who did it, is not finite."""


def poisoned(s: scoring.Scorer) -> scoring.Scorer:
  """A scorer as `s`, one of whose embeddings is not finite."""
  variables = jax.tree.map(np.array, support.init(s.config)[1])
  variables['tables']['tables']['item'][BAD_ITEM] = np.nan
  with mock.patch.object(transport, 'of_device', return_value=s._transport):
    return scoring.Scorer(s.config, variables, s.options)


def without_bad(batch):
  """A batch with another item in its place."""

  def part(x):
    item = np.where(x.features['item'] == BAD_ITEM, 0, x.features['item'])
    return x.replace(features={**x.features, 'item': item})

  return batch.replace(
    history=part(batch.history), candidates=part(batch.candidates)
  )


def with_bad(candidates, *where):
  """Candidates of which some are that item."""
  item = candidates.features['item'].copy()
  item[where] = BAD_ITEM
  return candidates.replace(features={**candidates.features, 'item': item})


@contextlib.contextmanager
def count_compilations():
  """A list that grows by one for each program that XLA compiles."""
  found = []

  def on_event(name, duration, **kwargs):
    del duration, kwargs
    if name == '/jax/core/compile/backend_compile_duration':
      found.append(name)

  jax.monitoring.register_event_duration_secs_listener(on_event)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(on_event)


def real(logits, batch):
  """The logits of real candidates, `[number, T]`."""
  mask = batch.candidates.mask
  return np.stack([np.asarray(v)[mask] for v in logits.values()], axis=-1)


def cached(s, batch):
  return s.score(s.encode(batch.history), batch.candidates, batch.context)


def rows(tree, index):
  return jax.tree.map(lambda x: x[index], tree)
