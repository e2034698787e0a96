"""What a request needs of a user's state; no device work.

A state is the keys and values of the user's events `[start, stop)`. Which may
be used for a row is decided here, so that its scores are those of `make_row`
and `Scorer.score` on all events that the user ever had:

* In a causal history an event's keys and values depend on it and earlier
  events alone. So a state that begins where the row begins is right, and is
  extended by new events.
* A row of `RowConfig.history_length` H begins H events before its candidates.
  Once a user has more events every new one moves the beginning, and with it all
  keys and values of the second layer on: the last H events are read again. With
  `headroom` states grow by so many events first, an approximation.
* With `encoder.window` W the rest of the past does not matter. A candidate sees
  the last W keys of each layer, and a key of layer l (from 0) depends on
  `l (W - 1)` events before its own: in all R = layers * (W - 1) + 1 events
  (`RankerConfig.receptive_field`). So a state that begins R events or more
  before the candidates is exact, whatever was before it, if H >= R.
* Positions are relative, and a state's are numbered from its own beginning, so
  they stay below its capacity for ever: at the user's ten millionth event they
  are as exact as at the first. Numbers from the user's first event on would not
  do: at 1e7 an angle in float32 is off by up to half a radian. A full state is
  not shifted either, which would turn its keys once more and round them; the
  last R events, which the host keeps, are read again. With a capacity of 2 R
  that is one pass over R events for each R new ones: as much work as to extend
  by them, and the same programs.
* An impression of an old request saw what was before that. Where it saw less
  than the host keeps, the client is asked for the whole history.
* In a bidirectional history (or with positions 'recency') a state serves just
  its own events; any other number is read again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from histjax import buckets
from histjax.data import columns as columns_lib
from histjax.data import past as past_lib
from histjax.data import values as values_lib
from histjax.data.past import Past
from histjax.data.requests import Events
from histjax.data.row_maker import Asked, RowMaker, View
from histjax.models.ranker import RankerConfig
from histjax.schema import Schema
from histjax.scoring.paged import PagedScorer
from histjax.scoring.scorer import Scorer
from histjax.serving.cache_store import Known, State

Source = Literal['hit', 'extended', 'encoded']


class TooManyEvents(ValueError):  # noqa: N818
  """The history is longer than a state may be."""


class UnknownHistory(LookupError):  # noqa: N818
  """Events before those of a request are not known: send all, with first=0."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What a user is to be shown, and what the user did.

  Attributes:
    user: the user's key as the log has it.
    candidates: `{column: [values]}` or `[{column: value}]`.
    context: one value a column; the user's may be left out.
    events: the user's events, oldest first, from number `first` on.
    first: how many events the user had before `events`; 0: `events` is the
      whole history, unless there are none, which says that none are new.
      Events that are known already are compared, as far back as they are kept,
      and not appended again, so a request may be sent twice.
  """

  user: str | int
  candidates: Events
  context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  events: Events = ()
  first: int = 0


@dataclasses.dataclass(eq=False)  # Frozen ones take long to make.
class Job:
  """A request that was checked, and what is to be done for it.

  Attributes:
    user: the canonical key.
    known: of the user, before the request.
    asked: of the request.
    past: the user's, new events included.
    digest: of all of them.
    view: what the candidates see.
    source: what is done.
    state: that comes of it.
    old: the state that is used; None: none.
    candidates: `{name: [c]}`.
    bucket: what a program pads the state's events and the candidates to.
  """

  user: str
  known: Known | None
  asked: Asked
  past: Past
  digest: hashlib.blake2b
  view: View
  source: Source
  state: State
  old: State | None
  candidates: dict[str, np.ndarray]
  bucket: tuple[int, int]

  @property
  def visible(self) -> np.ndarray | None:
    """Int `[c]`, the state's events that candidates see; None: all."""
    view, stop = self.view, self.state.stop
    if view.least == view.stop == stop:
      return None
    return view.sees - self.state.start

  def events(self) -> dict[str, np.ndarray]:
    """Those to read, `{name: [n]}`: new ones, or all of the state."""
    start = self.state.start if self.old is None else self.old.stop
    return self.past.history(start, self.state.stop)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A scorer with all that is decided by its config.

  Attributes:
    scorer: the model.
    paged: its programs over pages.
    maker: of its rows.
    headroom: as `EngineConfig`.
    max_events: of a state; None: as many as the user has.
    max_new_events: appended at once.
  """

  scorer: Scorer
  paged: PagedScorer
  maker: RowMaker
  headroom: int
  max_events: int | None
  max_new_events: int

  @functools.cached_property
  def schema(self) -> Schema:
    """Of the model."""
    return self.scorer.config.schema

  @functools.cached_property
  def shown(self) -> tuple[str, ...]:
    """Names of the features of candidates."""
    return tuple(f.name for f in self.schema.item_features)

  @functools.cached_property
  def context(self) -> tuple[str, ...]:
    """Names of the features of the context."""
    return tuple(f.name for f in self.schema.context)

  @functools.cached_property
  def reach(self) -> int | None:
    """R, if a state may begin anywhere R events before; None: it may not."""
    return _reach(self.scorer.config, self.maker.config.history_length)

  @functools.cached_property
  def is_extendable(self) -> bool:
    """Whether new events leave the state of old ones as it is."""
    encoder = self.scorer.config.encoder
    return encoder.causal and encoder.positions != 'recency'

  @functools.cached_property
  def _rows_reach(self) -> past_lib.Reach:
    length = self.maker.config.history_length
    return self.maker.reach(length if self.reach is None else self.reach)

  def trimmed(self, past: Past) -> Past:
    """Without the events that no later row can need."""
    needed = self._rows_reach.first_needed(past)
    # A copy of the rest only now and then.
    return past if needed - past.first < len(past) // 4 else past.since(needed)

  def key(self, user: str | int) -> str:
    """See `user_key`."""
    return user_key(self.schema, user)

  def plan(self, user: str, known: Known | None, request: Request) -> Job:
    """Checks a request and decides what is done for it.

    Args:
      user: `key(request.user)`.
      known: what is known of the user.
      request: the request.

    Raises:
      ValueError: the request is bad.
      UnknownHistory: events before its own are needed and not known.
      Exception: of a derived feature.
    """
    try:
      return self._plan(user, known, request)
    except UnknownHistory:
      if known is None or request.first or not _has_events(request):
        raise
      # It has the events that were known once and not kept.
      return self._plan(user, None, request)
    except (Exception, KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:  # A derived feature's: a panic of Rust.
      raise RuntimeError(repr(error)) from error

  def plan_without_state(self, job: Job, request: Request) -> Job:
    """The request's job if the user has no state any more; see `plan`."""
    known = job.known
    if known is not None:
      known = dataclasses.replace(known, state=None)
    return self.plan(job.user, known, request)

  def _plan(self, user: str, known: Known | None, request: Request) -> Job:
    context = self._context(user, request)
    asked = self.maker.ask(context, request.candidates)
    options = self.scorer.options
    # Raises if there is no bucket.
    width = options.candidates(len(asked), options.microbatch)
    past, digest, old = self._advanced(known, request, asked)
    view = self.maker.view(past, asked)
    if past.first:
      self._check_kept(past, view.before, asked.time, asked.request)
    candidates = self.maker.candidates(past, asked, view)
    state = None if old is None else self._after(old, past, view)
    source: Source = 'hit' if state is old or state == old else 'extended'
    if old is None or state is None:
      source, state, old = 'encoded', self._whole(user, past, view), None
    return Job(
      user,
      known,
      asked,
      past,
      digest,
      view,
      source,
      state,
      old,
      candidates,
      (options.events(state.length), width),
    )

  def _whole(self, user: str, past: Past, view: View) -> State:
    """The state of all events that are needed.

    Raises:
      TooManyEvents: the history is longer than a state may be.
      UnknownHistory: events are needed that are not kept.
    """
    start, stop = view.start, past.stop
    if self.reach is not None:
      start = max(start, view.least - self.reach, 0)
    if not self.is_extendable:
      stop = view.stop
    if not self.scorer.config.encoder.causal and view.least < stop:
      raise ValueError(
        'encoder.causal=False: candidates that see different parts of the '
        'history cannot be scored together; send them in several requests'
      )
    if self.max_events is not None and stop - start > self.max_events:
      raise TooManyEvents(
        f'the history has {stop - start} events, more than max_events='
        f'{self.max_events}; train with RowConfig.history_length or '
        'encoder.window, or raise max_events and ScorerConfig.history_buckets'
      )
    if past.first > start:
      raise UnknownHistory(
        f'of user {user!r} the events from {past.first} on are kept, and '
        f'those from {start} on are needed; send the whole history, first=0'
      )
    return State(start, stop)

  def _after(self, old: State, past: Past, view: View) -> State | None:
    """The state after new events; None: it is not the row's."""
    if not self.is_extendable:
      return old if old == State(view.start, view.stop) else None
    state = old
    if past.stop != old.stop:
      state = State(old.start, past.stop)
    if self.max_events is not None and state.length > self.max_events:
      return None
    if state.stop - old.stop > self.max_new_events:
      return None
    if old.start == view.start:
      return state
    if self.reach is not None:
      reached = view.least - self.reach
      return state if old.start <= max(view.start, reached) else None
    length = self.maker.config.history_length
    if length is None or old.start > view.start:
      return None
    return state if state.length <= length + self.headroom else None

  def _context(self, user: str, request: Request) -> Mapping[str, Any]:
    context, name = request.context, self.schema.user
    if type(context) is not dict and not isinstance(context, Mapping):
      raise ValueError(
        f'context is a {type(context).__name__}; give {{column: value}}'
      )
    if name in context and self.key(context[name]) != user:
      raise ValueError(
        f'context has {name!r}: {context[name]!r}, the request is of user '
        f'{request.user!r}; leave one out'
      )
    return {name: request.user, **context}

  def _advanced(
    self, known: Known | None, request: Request, asked: Asked
  ) -> tuple[Past, hashlib.blake2b, State | None]:
    """The user's past with the request's events, and the state so far."""
    first = request.first
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
      raise ValueError(f'first={first!r} must be an integer >= 0')
    count = 0 if known is None else known.past.stop
    if first > count:
      raise UnknownHistory(
        f'first={first}, but {count} events of user {request.user!r} are '
        'known; send the whole history, first=0'
      )
    if known is not None and type(request.events) is tuple:
      if not request.events:  # As below, in no time.
        return known.past, known.digest, known.state
    events = values_lib.read(request.events, 'events')
    if known is not None and not values_lib.length_of(events):
      return known.past, known.digest, known.state
    new = self.maker.read(events)
    if known is not None:
      place = self._first_difference(known, new, first)
      if place is None:
        new = new.since(count - first)
        if not len(new):
          return known.past, known.digest, known.state
        past = self.maker.extend(known.past, new, asked.user)
        visible = past.visible[-len(new) :]
        self._check_kept(known.past, visible, new.time, new.request)
        digest = known.digest.copy()
        new.update(digest)
        return past, digest, known.state
      if first:
        raise ValueError(
          f'event {place} of user {request.user!r} differs from what was sent '
          'before; to replace the history, send all of it with first=0'
        )
    digest = hashlib.blake2b(digest_size=16)
    new.update(digest)
    return self.maker.extend(self.maker.start(), new, asked.user), digest, None

  def _check_kept(self, past: Past, visible, time, request) -> None:
    if self._rows_reach.lacks(past, visible, time, request):
      raise UnknownHistory(
        'an impression is of so old a request, or of so long ago, that events '
        f'before number {past.first}, which is the first one kept, are needed; '
        'send the whole history, first=0'
      )

  def _first_difference(
    self, known: Known, new: Past, first: int
  ) -> int | None:
    """The first event that differs from what is known of it; None: none does.

    Raises:
      UnknownHistory: nothing is kept of what it was sent before.
    """
    count, kept = known.past.stop, known.past.first
    if first and first >= count:  # None of them is known.
      return None
    place = known.past.first_difference(dataclasses.replace(new, first=first))
    if place is not None or first >= kept or not len(new):
      return place
    if first:
      # What a score depends on is kept, so what was compared is enough.
      if first + len(new) > kept:
        return None
      raise UnknownHistory(
        f'the events from {first} to {first + len(new) - 1} were sent before, '
        f'and those before {kept} are not kept to compare them; send the whole '
        'history, first=0'
      )
    if len(new) < count:  # Of the digest's events some are missing.
      return 0
    digest = hashlib.blake2b(digest_size=16)
    new.until(count).update(digest)
    same = digest.digest() == known.digest.digest()
    return None if same else 0


def user_key(schema: Schema, user: str | int) -> str:
  """The user's canonical key: 7 and '7' are one user, as in a log.

  Raises:
    ValueError: it is no key.
  """
  if type(user) is int and 0 <= user < 2**63:  # As below, in no time.
    return str(user)
  name = schema.user
  if type(user) is str and user.isascii() and not schema.column_types:
    if user not in schema.null_values:
      return user
  table = columns_lib.from_mapping(
    {name: [user]}, [name], 'request.user', schema
  )
  _, keys = columns_lib.encode_keys(table, name)
  return columns_lib.canonical_keys(keys)[0]


def longest_state(
  config: RankerConfig, history_length: int | None
) -> int | None:
  """Events of a state at most, with an engine's defaults; None: no bound.

  Args:
    config: of the model.
    history_length: of its rows.
  """
  reach = _reach(config, history_length)
  # Full at 2 R and what a program pads that to; then the last R are read again.
  return history_length if reach is None else buckets.bucket_size(2 * reach)


def _reach(config: RankerConfig, history_length: int | None) -> int | None:
  reach = config.receptive_field
  if reach is None or (history_length is not None and history_length < reach):
    return None
  return reach


def _has_events(request: Request) -> bool:
  return values_lib.length_of(values_lib.read(request.events, 'events')) > 0
