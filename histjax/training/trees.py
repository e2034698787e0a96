"""Training states as flat, named arrays, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from histjax.training.state import TrainState


def check_same(name: str, stored: Any, expected: Any) -> None:
  """Raises ValueError, with both sets of keys, unless the trees agree."""
  a, b = _shapes(stored), _shapes(expected)
  if a == b:
    return
  lines = [f'{name} is of another model or optimizer than this config has.']
  if a.keys() != b.keys():
    lines += [
      f'Keys of the checkpoint: {sorted(a)}',
      f'Keys of the config: {sorted(b)}',
      f'Only in the checkpoint: {sorted(a.keys() - b.keys())}',
      f'Only in the config: {sorted(b.keys() - a.keys())}',
    ]
  lines += [
    f'{key}: {a[key]} in the checkpoint, {b[key]} by the config'
    for key in sorted(a.keys() & b.keys())
    if a[key] != b[key]
  ]
  lines.append(
    'Use the config that the run was trained with (load_variables returns it), '
    'or another workdir.'
  )
  raise ValueError('\n'.join(lines))


def _shapes(tree: Any) -> dict[str, str]:
  return {
    key: f'{np.dtype(x.dtype).name}{list(x.shape)}'
    for key, x in _by_name(tree).items()
  }


def _by_name(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def flatten(state: TrainState) -> dict[str, Any]:
  """All of the state but `scoring_variables`, by name, without typed keys."""
  return _by_name({**_rest(state), 'rng': jax.random.key_data(state.rng)})


def unflatten(
  template: TrainState, variables: Any, flat: Mapping[str, Any]
) -> TrainState:
  """The state that `flatten` was given, with its `scoring_variables`."""
  rest = _rest(template)
  names = list(_by_name(rest))
  rest = jax.tree.unflatten(
    jax.tree.structure(rest), [flat[name] for name in names]
  )
  rng = jax.random.wrap_key_data(
    rest.pop('rng'), impl=jax.random.key_impl(template.rng)
  )
  trained = rest.pop('trained')
  if trained is None:
    trained = {'tables': {}, **variables}
  else:
    trained = {**trained, 'average': variables['params']}
  return TrainState(rng=rng, decay=template.decay, **rest, **trained)


def _rest(state: TrainState) -> dict[str, Any]:
  return {
    'step': state.step,
    'opt_state': state.opt_state,
    'table_state': state.table_state,
    'rng': state.rng,
    'window': state.window,
    # What the optimizer goes on with, if something else is scored with. Tables
    # that are scored with are their averages, caught up with: rounded.
    'trained': None
    if state.decay is None
    else {
      'params': state.params,
      'tables': state.tables,
      'table_average': state.table_average,
    },
  }
