"""Scoring from states in pages: to read, extend, score and write is one launch.

A program is given a pool's keys and values (`scoring.pages`) and which pages to
read and to write. To start a program costs a GPU's host 100 to 250 us, as much
as a program of a request computes, so there is one and not four.
"""

from __future__ import annotations

import functools
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
    options = scorer.options
    # Looked up in less time than computed.
    self._new_events = functools.cache(options.new_events)
    self._candidates = functools.cache(
      lambda number: options.candidates(number, options.microbatch)
    )
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
    program, slot = self._score_slot(
      place, request.shape[1], request.visible is not None
    )
    request.write(self._scorer.config.schema, slot.views)
    logits = self._scorer._checked_call(program, slot, pool, [request])
    return self._scorer._one_pending(program, slot, logits, request)

  def score_many(
    self,
    pool: Pool,
    place: Place,
    requests: Sequence[tuple[Candidates, Mapping[str, Any]]],
  ) -> list[Pending]:
    """As `score` of each, in one program that they share.

    Args:
      pool: is read.
      place: of all, those of a request after those of the one before it, B of
        `length` in all.
      requests: `(candidates, context)`, each of some of the B rows: features
        `[rows, C]`, of each its own C, and `{name: [rows]}`. Those of int32
        and float32 arrays of one shape take the least time.

    Returns:
      The logits of each, `[rows, C]`, which are checked alone.

    Raises:
      ValueError: one that `score` would refuse, or they have not B rows; then
        the logits of none are returned.
    """
    if not requests:
      inputs.check_rows(0, len(place.length))
      return []
    shape = inputs.alike(requests)
    if shape is not None:
      found = self._score_alike(pool, place, requests, shape)
      if found is not None:
        return found
    scorer = self._scorer
    checked: list[flight.Checked] = []
    parts: list[flight.Part] = []
    first = 0
    for candidates, context in requests:
      request = scorer._check_candidates(
        candidates, context, place.length[first:]
      )
      checked.append(request)
      parts.append((first, request.shape, request.real))
      first += request.shape[0]
    inputs.check_rows(first, len(place.length))
    columns = max([x.shape[1] for x in checked])
    visible = not all([x.visible is None for x in checked])
    program, slot = self._score_slot(place, columns, visible)
    flight.write_each(scorer.config.schema, checked, slot.views)
    logits = scorer._checked_call(program, slot, pool, checked)
    return scorer._pending(program, slot, logits, parts)

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

    The capacity must hold the new events, too. Pages that hold no new event are
    not written, whatever `place.write` has there.
    """
    schema = self._scorer.config.schema
    new, _ = inputs.lengths(schema, events)
    length = place.length[: len(new)] + new
    request = self._checked(candidates, context, length)
    program, slot = self._slot(
      'paged_extend_and_score',
      request,
      len(place.read),
      self._new_events(max(new.tolist(), default=0)),
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
    recorded = self._scorer._num_recorded(todo)
    return pool, ahead.WarmUp(len(todo), compiled, seconds, recorded)

  def _score_alike(
    self, pool: Pool, place: Place, requests, shape: tuple[int, int]
  ) -> list[Pending] | None:
    """`score_many` of requests of this shape; None: they are not.

    It checks no request by itself, which costs more than to write it.
    """
    rows, length = shape[0], place.length
    total = rows * len(requests)
    if total != len(length):
      return None
    program, slot = self._score_slot(place, shape[1], False)
    scorer, views = self._scorer, slot.views
    features = [x.features for x, _ in requests]
    contexts = [x for _, x in requests]
    if not (
      inputs.write_together(features, shape, views['candidates'])
      and inputs.write_together(contexts, shape[:1], views['context'])
    ):
      scorer._carrier(slot).release(program.layout, slot)
      return None
    inputs.count((total, shape[1]), None, views['count'])
    firsts = range(0, total, rows) if rows else [0] * len(requests)
    checked = (  # Made if a value is bad.
      flight.Checked(length[i : i + rows], value, context, shape, None, None)
      for i, (value, context) in zip(firsts, requests, strict=True)
    )
    logits = scorer._checked_call(program, slot, pool, checked)
    parts = [(first, shape, None) for first in firsts]
    return scorer._pending(program, slot, logits, parts)

  def _score_slot(
    self, place: Place, candidates: int, visible: bool
  ) -> tuple[programs.Program, transport.Slot]:
    """The program of 'score' and a slot, in which the place is."""
    program, slot = self._new_slot(
      'paged_score', candidates, visible, len(place.read), place.capacity
    )
    inputs.numbers(place.length, slot.views['length'])
    inputs.numbers(place.read, slot.views['read'])
    return program, slot

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
    program, slot = self._new_slot(
      kind,
      request.shape[1],
      request.visible is not None,
      rows,
      events,
      capacity,
    )
    request.write(self._scorer.config.schema, slot.views)
    return program, slot

  def _new_slot(
    self,
    kind: programs.Kind,
    candidates: int,
    visible: bool,
    rows: int,
    events: int,
    capacity: int = 0,
  ) -> tuple[programs.Program, transport.Slot]:
    """The program of a bucket, and a slot."""
    scorer, candidates = self._scorer, self._candidates(candidates)
    key = (kind, rows, events, candidates, visible, capacity)
    program = self._programs.get(key)
    if program is None:
      sizes = programs.Sizes(*key[1:], donate=kind != 'paged_score')
      program = self._programs[key] = scorer._program(kind, sizes)
    return program, scorer._new_slot(program)

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
      view.clear()
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
