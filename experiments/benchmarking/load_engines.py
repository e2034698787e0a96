"""Engines to compare the store with, behind the same server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from histjax import Scorer, collate
from histjax.data import requests as requests_lib
from histjax.data.row_maker import RowMaker
from histjax.data.rows import Row
from histjax.serving.engine import Request, Result, UnknownHistory
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
    maker: RowMaker | None = None,
  ):
    """Makes an engine.

    Args:
      scorer: the model.
      kind: see above.
      maker: of rows; None: that of the scorer's run.
    """
    self.scorer, self._kind = scorer, kind
    self._maker = maker or scorer.row_maker()

  @property
  def fingerprint(self) -> str:
    """Of the model."""
    return self.scorer.fingerprint

  def metrics(self) -> Mapping[str, Any]:
    """Programs compiled so far."""
    return {'compilations': self.scorer.num_compilations}

  def score(self, requests: Sequence[Request]) -> list[Result | Exception]:
    """Scores all that are good as one batch."""
    found: dict[int, Result | Exception] = {}
    rows: dict[int, Row] = {}
    for i, request in enumerate(requests):
      try:
        rows[i] = self._row(request)
      except (ValueError, UnknownHistory) as error:
        found[i] = error
    if rows:
      logits = self._scored(collate(list(rows.values())))
      for place, (i, row) in enumerate(rows.items()):
        size = len(row.visible)
        found[i] = Result(
          {k: x[place, :size] for k, x in logits.items()},
          'encoded',
          _number(requests[i].events),
          self.fingerprint,
        )
    return [found[i] for i in range(len(requests))]

  def warm_up(self, rows: int, events: int, candidates: int) -> None:
    """Compiles what so many users and such requests need."""
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
    for number in (1, 2, 4, 8, 16, 32):
      if number <= rows:
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
