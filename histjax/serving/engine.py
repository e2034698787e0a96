"""Scores the requests of users; always reads the whole history."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from histjax.data.requests import Events
from histjax.data.rows import collate
from histjax.scoring import Scorer, ScorerConfig


class UnknownHistory(Exception):  # noqa: N818
  """The events before `first` are not known; send the whole history."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What a user is to be shown, and what the user did.

  Attributes:
    user: the user's key as the log has it.
    candidates: `{column: [values]}` or `[{column: value}]`.
    context: one value a column.
    events: the user's events, oldest first, from number `first` on.
    first: how many events the user had before `events`.
  """

  user: str | int
  candidates: Events
  context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  events: Events = ()
  first: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of one request.

  Attributes:
    logits: `{task: [candidates]}` float32.
    source: the state was used as it was, extended, or made anew.
    num_events: of the user, now in the state.
  """

  logits: Mapping[str, np.ndarray]
  source: Literal['hit', 'extended', 'encoded']
  num_events: int


class Engine:
  """Keeps nothing: each request must have the whole history."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    scorer_config: ScorerConfig | None = None,
  ):
    self._options = scorer_config
    self._lock = threading.Lock()
    self._scorer = Scorer.from_workdir(workdir, scorer_config=scorer_config)
    self._requests = 0

  @property
  def scorer(self) -> Scorer:
    """That of the run that is served now."""
    return self._scorer

  @property
  def fingerprint(self) -> str:
    """Of the model."""
    return self._scorer.fingerprint

  def metrics(self) -> Mapping[str, float]:
    """Counters since the start."""
    return {'encoded': self._requests}

  def warm_up(self, **sizes: Any) -> None:
    """Compiles ahead of time; see `Scorer.warm_up`."""
    self._scorer.warm_up(**sizes)

  def roll_over(self, scorer: str | os.PathLike[str] | Scorer) -> None:
    """Serves another run from the next call of `score` on."""
    if not isinstance(scorer, Scorer):
      scorer = Scorer.from_workdir(scorer, scorer_config=self._options)
    self._scorer = scorer

  def score(self, requests: Sequence[Request]) -> list[Result | Exception]:
    """Scores each; one that is bad fails alone."""
    with self._lock:
      scorer = self._scorer
      return [self._score(scorer, request) for request in requests]

  def _score(self, scorer: Scorer, request: Request) -> Result | Exception:
    if request.first:
      return UnknownHistory(
        f'first={request.first}, but no state of user {request.user!r} is '
        'kept; send the whole history with first=0'
      )
    try:
      row = scorer.make_row(
        context={scorer.config.schema.user: request.user, **request.context},
        history=request.events,
        candidates=request.candidates,
      )
      batch = collate([row])
      cache = scorer.encode(batch.history)
      logits = scorer.score(cache, batch.candidates, batch.context)
    except ValueError as error:
      return error
    self._requests += 1
    num_events = len(request.events)
    if isinstance(request.events, Mapping):
      num_events = len(next(iter(request.events.values()), ()))
    found = {k: v[0, : len(row.visible)] for k, v in logits.items()}
    return Result(found, 'encoded', num_events)
