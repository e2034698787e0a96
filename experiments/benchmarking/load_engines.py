"""Engines to compare the store with, behind the same server."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from histjax import Scorer, collate
from histjax.data import requests as requests_lib
from histjax.data.row_maker import RowMaker
from histjax.data.rows import Row
from histjax.serving.engine import (
  EngineConfig,
  Request,
  Result,
  UnknownHistory,
  part_size,
)
from histjax.types import RankingBatch


class Stateless:
  """Keeps nothing: each request must have the whole history.

  'encode' reads each history once for all of its candidates; 'plain' once for
  each candidate, as a ranker without amortization does.
  """

  def __init__(
    self,
    scorer: Scorer,
    kind: Literal['encode', 'plain'],
    config: EngineConfig,
    maker: RowMaker | None = None,
  ):
    """Makes an engine.

    Args:
      scorer: the model.
      kind: see above.
      config: of the other engine.
      maker: of rows; None: that of the scorer's run.
    """
    self.scorer, self._kind, self._config = scorer, kind, config
    self._maker = maker or scorer.row_maker()

  @property
  def fingerprint(self) -> str:
    """Of the model."""
    return self.scorer.fingerprint

  def metrics(self) -> Mapping[str, Any]:
    """Programs compiled so far."""
    return {'compilations': self.scorer.num_compilations}

  def score(self, requests: Sequence[Request]) -> list[Result | Exception]:
    """Scores all that are good, in programs of so many as the store's."""
    found: dict[int, Result | Exception] = {}
    rows: dict[int, Row] = {}
    begin = time.perf_counter()
    for i, request in enumerate(requests):
      try:
        rows[i] = self._row(request)
      except (ValueError, UnknownHistory) as error:
        found[i] = error
    rows_s = time.perf_counter() - begin
    left = [*rows]
    while left:
      size = part_size(len(left), self._config, self.scorer.options.rows)
      part, left = left[:size], left[size:]
      logits = self._scored(collate([rows[i] for i in part]))
      for place, i in enumerate(part):
        found[i] = Result(
          {k: x[place, : len(rows[i].visible)] for k, x in logits.items()},
          'encoded',
          _number(requests[i].events),
          self.fingerprint,
          rows_s,
        )
    return [found[i] for i in range(len(requests))]

  def warm_up(self, events: int, candidates: int) -> None:
    """Compiles what requests up to this size need."""
    request = {
      'context': _zeros(self.scorer.config.schema.context, 1),
      'candidates': _zeros(self.scorer.config.schema.item, candidates),
      'history': _zeros(
        self.scorer.config.schema.item + self.scorer.config.schema.action,
        events,
      ),
    }
    context = {k: v[0] for k, v in request.pop('context').items()}
    row = self._made(context=context, **request)
    for number in self.scorer.options.row_buckets:
      self._scored(collate([row] * number))

  def _row(self, request: Request) -> Row:
    if request.first:
      raise UnknownHistory('nothing is kept; send the whole history')
    name = self.scorer.config.schema.user
    return self._made(
      context={name: request.user, **request.context},
      history=request.events,
      candidates=request.candidates,
    )

  def _made(self, **request: Any) -> Row:
    maker = self._maker
    return requests_lib.make_row(
      maker.schema, config=maker.config, features=maker.features, **request
    )

  def _scored(self, batch: RankingBatch):
    if self._kind == 'plain':
      return self.scorer.score_plain(batch)
    return self.scorer.encode_and_score(
      batch.history, batch.candidates, batch.context
    )[1]


def _number(events: Any) -> int:
  if isinstance(events, Mapping):
    return len(next(iter(events.values()), ()))
  return len(events)


def _zeros(features, number: int) -> dict[str, list[int]]:
  return {f.column: [0] * number for f in features}
