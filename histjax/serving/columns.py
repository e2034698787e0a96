"""The columns that a request has, as the schema of a run names them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from histjax.data.rows import RowConfig
from histjax.features import FittedFeatures
from histjax.schema import Categorical, Dense, Schema
from histjax.scoring import Scorer

_EXAMPLES: dict[str, int | str] = {
  'integer': 0,
  'number': 0,
  'integer or text': '0',
  'ISO 8601 text': '2000-01-01',
  'number or ISO 8601 text': 0,
}


@dataclasses.dataclass(frozen=True)
class Columns:
  """What `histjax.make_row` reads, by part of the request.

  Attributes:
    known: `{part: columns}` that may be sent.
    needed: `{part: {column: what it is}}` that must be.
  """

  known: dict[str, frozenset[str]]
  needed: dict[str, dict[str, Any]]

  @classmethod
  def of_scorer(cls, scorer: Scorer) -> Columns:
    """Those of the run that `Scorer.from_workdir` loaded."""
    return _of_scorer(scorer)

  @classmethod
  def of_run(
    cls, schema: Schema, rows: RowConfig, features: FittedFeatures
  ) -> Columns:
    """Those of a run.

    Args:
      schema: of the model.
      rows: as validation made its rows.
      features: what is derived.
    """
    item = {f.column: _describe(f) for f in schema.item + schema.hidden}
    action = {f.column: _describe(f) for f in schema.action}
    labels = {
      t.column: {'type': 'number', 'task': t.name, 'threshold': t.threshold}
      for t in schema.tasks
    }
    kinds: dict[bool | None, str] = {
      None: 'number or ISO 8601 text',
      True: 'ISO 8601 text',
      False: 'number',
    }
    clock = {schema.time: {'type': kinds[features.is_timestamp]}}
    key = {'type': 'integer or text'}
    needed: dict[str, dict[str, Any]] = {
      'context': {f.column: _describe(f) for f in schema.context},
      'candidates': dict(item),
      'events': {**item, **action},
    }
    if features.needs('labels'):
      needed['events'] = {**labels, **needed['events']}
    if features.needs('time') or rows.ties == 'strict':
      needed['candidates'] |= clock
      needed['events'] |= clock
    may = {schema.time, schema.user}
    if schema.request:
      may.add(schema.request)
      if features.configs:
        needed['events'][schema.request] = key
    known = {part: frozenset(may | set(x)) for part, x in needed.items()}
    # A log's own records can be sent, outcomes and all.
    known['events'] |= set(labels)
    return cls(known, needed)

  def example(self) -> dict[str, dict[str, Any]]:
    """By part one value of each column that is needed, made up."""
    return {
      part: {name: _EXAMPLES[what['type']] for name, what in columns.items()}
      for part, columns in self.needed.items()
    }

  def changes(self, before: Columns) -> str:
    """How these differ from others, in words; empty: they do not."""
    found = []
    for part, now in self.needed.items():
      old = before.needed[part]
      found += [f'{part}.{name} is new' for name in sorted(now.keys() - old)]
      found += [f'{part}.{name} is gone' for name in sorted(old.keys() - now)]
      found += [
        f'{part}.{name} is {_words(now[name])}, was {_words(old[name])}'
        for name in sorted(now.keys() & old)
        if now[name] != old[name]
      ]
    return ', '.join(found)


def _words(what: dict[str, Any]) -> str:
  return ' '.join(f'{k} {v}' for k, v in what.items())


@functools.lru_cache(maxsize=1)  # Asked for with every request.
def _of_scorer(scorer: Scorer) -> Columns:
  run = scorer.run
  if run is None:
    raise ValueError('this scorer knows no columns; use Scorer.from_workdir')
  data = run.config.data
  return Columns.of_run(
    scorer.config.schema, data.eval_rows or data.rows, run.features
  )


def _describe(feature: Categorical | Dense) -> dict[str, Any]:
  if isinstance(feature, Categorical):
    if feature.ids != 'index':
      return {'type': 'integer or text', 'feature': feature.name}
    return {
      'type': 'integer',
      'feature': feature.name,
      'minimum': 0,
      'maximum': feature.size - 1,
    }
  found = {'type': 'number', 'feature': feature.name}
  return {**found, 'minimum': 0} if feature.log else found
