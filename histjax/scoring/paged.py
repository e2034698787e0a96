"""Scoring from states in pages: to read, extend, score and write is one launch.

A program is given a pool's keys and values (`scoring.pages`) and which pages to
read and to write. To start a program costs a GPU's host 100 to 250 us, as much
as a program of a request computes, so there is one and not four.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from histjax.quantization import Quantized
from histjax.scoring import ahead, flight, inputs, programs, transport
from histjax.scoring.flight import Pending
from histjax.scoring.scorer import Scorer
from histjax.types import Candidates, History

CALLS: tuple[Literal['score', 'encode', 'extend'], ...] = (
  'score',
  'encode',
  'extend',
)


class Pool(NamedTuple):
  """Keys and values of pages; see `scoring.pages`."""

  keys: jax.Array | Quantized
  values: jax.Array | Quantized


class Place(NamedTuple):
  """Where the states of a batch are.

  Attributes:
    read: int32 `[B, P]`, the pages of each state.
    write: int32 `[B, P]`, those to write; beyond the last page: none. `[0, 0]`
      of a program that writes none.
    length: int32 `[B]`, the events of each state that is read.
    capacity: of the states, P pages hold it.
  """

  read: np.ndarray
  write: np.ndarray
  length: np.ndarray
  capacity: int


class PagedScorer:
  """A scorer's programs over a pool. They write in place, into the same memory.

  Rows of `Place` are padded to a bucket of rows, with pages that are read as
  zeros and none that are written; requests have the real rows.
  """

  def __init__(self, scorer: Scorer):
    """Of this scorer, whose options hold."""
    self._scorer = scorer
    # By what tells them apart: a `Sizes` takes longer to make.
    self._programs: dict[tuple, programs.Program] = {}

  def score(
    self,
    pool: Pool,
    place: Place,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> Pending:
    """As `Scorer.score_async`, of the states in the pages."""
    request = self._checked(candidates, context, place.length)
    program, slot = self._slot(
      'paged_score', request, len(place.read), place.capacity
    )
    inputs.numbers(place.length, slot.views['length'])
    inputs.numbers(place.read, slot.views['read'])
    logits = self._scorer._checked_call(program, slot, pool, [request])
    return self._scorer._one_pending(program, slot, logits, request)

  def encode(
    self,
    pool: Pool,
    place: Place,
    history: History,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> tuple[Pool, Pending]:
    """As `Scorer.encode_and_score_async`, into donated pages."""
    schema = self._scorer.config.schema
    length, _ = inputs.lengths(schema, history)
    request = self._checked(candidates, context, length)
    program, slot = self._slot(
      'paged_encode_and_score', request, len(place.write), place.capacity
    )
    inputs.numbers(length, slot.views['length'])
    inputs.numbers(place.write, slot.views['write'])
    inputs.history(schema, history, length, slot.views['history'])
    keys, values, logits = self._scorer._checked_call(
      program, slot, pool, [request], history, length
    )
    return Pool(keys, values), self._scorer._one_pending(
      program, slot, logits, request
    )

  def extend(
    self,
    pool: Pool,
    place: Place,
    events: History,
    candidates: Candidates,
    context: Mapping[str, Any],
  ) -> tuple[Pool, Pending]:
    """As `Scorer.extend_and_score_async`, in donated pages.

    The capacity must hold the new events, too.
    """
    schema = self._scorer.config.schema
    new, _ = inputs.lengths(schema, events)
    length = place.length[: len(new)] + new
    request = self._checked(candidates, context, length)
    program, slot = self._slot(
      'paged_extend_and_score',
      request,
      len(place.read),
      self._scorer.options.new_events(max(new.tolist(), default=0)),
      place.capacity,
    )
    inputs.numbers(place.length, slot.views['length'])
    inputs.numbers(new, slot.views['new'])
    inputs.numbers(place.read, slot.views['read'])
    inputs.numbers(place.write, slot.views['write'])
    inputs.history(schema, events, new, slot.views['history'])
    keys, values, logits = self._scorer._checked_call(
      program, slot, pool, [request], events, new
    )
    return Pool(keys, values), self._scorer._one_pending(
      program, slot, logits, request
    )

  def warm_up(
    self,
    pool: Pool,
    *,
    rows: int,
    events: int,
    candidates: int,
    new_events: int,
    visible: bool,
    calls: Collection[Literal['score', 'encode', 'extend']] = CALLS,
  ) -> tuple[Pool, ahead.WarmUp]:
    """Compiles what requests up to these sizes need; see `Scorer.warm_up`.

    Args:
      pool: is donated; what its pages hold stays.
      rows: users at once.
      events: of a state.
      candidates: of a request.
      new_events: of a request; 0: states are not extended.
      visible: whether candidates may say what they see.
      calls: of this scorer that will be made.

    Returns:
      The pool, and what was done.
    """
    options, before = self._scorer.options, self._scorer.num_compilations
    todo = [
      job
      for number in ahead.up_to(rows, options.rows)
      for length in ahead.up_to(events, options.events)
      for count in ahead.up_to(
        candidates, lambda n: options.candidates(n, options.microbatch)
      )
      for seen in (False, True)[: 1 + visible]
      for job in _jobs(
        programs.Sizes(number, candidates=count, visible=seen),
        length,
        ahead.up_to(min(new_events, length), options.new_events),
      )
      if _KINDS[job.kind] in calls
    ]

    def compile_one(job: ahead.Job) -> None:
      nonlocal pool
      pool = self._compile(pool, job)

    seconds = ahead.run(todo, compile_one)
    compiled = self._scorer.num_compilations - before
    return pool, ahead.WarmUp(len(todo), compiled, seconds)

  def _checked(self, candidates, context, length) -> flight.Checked:
    request = self._scorer._check_candidates(candidates, context, length)
    inputs.check_rows(request.shape[0], len(length))
    return request

  def _slot(
    self,
    kind: programs.Kind,
    request: flight.Checked,
    rows: int,
    events: int,
    capacity: int = 0,
  ) -> tuple[programs.Program, transport.Slot]:
    """The program and its slot, in which the request is."""
    scorer, options = self._scorer, self._scorer.options
    candidates = options.candidates(request.shape[1], options.microbatch)
    visible = request.visible is not None
    key = (kind, rows, events, candidates, visible, capacity)
    program = self._programs.get(key)
    if program is None:
      sizes = programs.Sizes(*key[1:], donate=kind != 'paged_score')
      program = self._programs[key] = scorer._program(kind, sizes)
    slot = scorer._new_slot(program)
    request.write(scorer.config.schema, slot.views)
    return program, slot

  def _compile(self, pool: Pool, job: ahead.Job) -> Pool:
    """Makes a program ready; returns the pool, which may be donated."""
    scorer = self._scorer
    program = scorer._program(job.kind, job.sizes)
    pages = pool.keys.shape[1]
    recorded, states = scorer._record(program, job, pool, pages)
    pool = Pool(*states)
    if recorded:
      return pool
    slot = scorer._transport.slot(program.layout)
    for view in slot.views.values():  # Something may be left over.
      view.ids.fill(0)
      view.dense.fill(0)
    if 'write' in slot.views:
      slot.views['write'].ids.fill(pages)
    result = scorer._call(program, slot, *pool)
    jax.block_until_ready(result)
    scorer._transport.release(program.layout, slot)
    scorer._log(program)
    return Pool(*result[:2]) if job.sizes.donate else pool


_KINDS: dict[programs.Kind, str] = {
  'paged_score': 'score',
  'paged_encode_and_score': 'encode',
  'paged_extend_and_score': 'extend',
}


def _jobs(
  sizes: programs.Sizes, length: int, new_events: Sequence[int]
) -> Iterator[ahead.Job]:
  """The programs of a bucket."""
  yield ahead.Job('paged_score', sizes._replace(events=length), length)
  sizes = sizes._replace(donate=True)
  yield ahead.Job(
    'paged_encode_and_score', sizes._replace(events=length), length
  )
  for new in new_events:
    extend = sizes._replace(events=new, capacity=length)
    yield ahead.Job('paged_extend_and_score', extend, length)
