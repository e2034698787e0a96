"""Rows of requests, whole or step by step as a user's past grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax import vocabulary
from histjax.data import columns as columns_lib
from histjax.data import past as past_lib
from histjax.data import values as values_lib
from histjax.data.grouping import RowConfig
from histjax.features import FittedFeatures, Impressions
from histjax.schema import Schema

_NOBODY = np.zeros(1, np.uint64)
_NOBODY.setflags(write=False)


@dataclasses.dataclass(eq=False)  # Frozen ones take long to make.
class Asked:
  """What a request says of itself, encoded: its user and c candidates.

  Attributes:
    context: `{name: scalar}`.
    features: `{name: [c]}`, of the items, hidden ones included.
    time: `[c]`; zeros if nothing reads it.
    is_timestamp: the times are timestamps.
    request: uint64 `[c]`, digests; None: not given.
    user: uint64 `[1]`, digest of the user's key; 0 if nothing reads it.
    as_of: as `make_row`.
  """

  context: dict[str, np.generic]
  features: dict[str, np.ndarray]
  time: np.ndarray
  is_timestamp: bool
  request: np.ndarray | None
  user: np.ndarray
  as_of: bool = False

  def __len__(self) -> int:
    """The number of candidates."""
    return len(self.time)


@dataclasses.dataclass(eq=False)
class View:
  """What candidates see, as numbers of events from the user's first on.

  Attributes:
    before: int64 `[c]`, the events before each impression.
    sees: int64 `[c]`, the event after the last one that each sees.
    least: the least of `sees`.
    stop: the largest, the event after the row's last one.
    start: the first event of the row's history.
  """

  before: np.ndarray
  sees: np.ndarray
  least: int
  stop: int
  start: int


class RowMaker:
  """Makes rows of requests, whole or step by step as a user's past grows.

  past = maker.extend(maker.start(), maker.read(events), user)
  asked = maker.ask(context, candidates)
  view = maker.view(past, asked)
  features = maker.candidates(past, asked, view)
  """

  def __init__(
    self,
    schema: Schema,
    config: RowConfig | None = None,
    features: FittedFeatures | None = None,
  ):
    """As `make_row`."""
    self.schema = schema
    self.config = config or RowConfig()
    self.features = _checked_features(schema, features)
    self.needs_time = (
      self.features.needs('time') or self.config.ties == 'strict'
    )
    self._known = frozenset(schema.columns)
    self._needs_user = self.features.needs('user')
    self._items = schema.item + schema.hidden
    self._shown_as_read = (
      not self.features.configs and self._items == schema.item_features
    )

  def reach(self, depth: int | None) -> past_lib.Reach:
    """How far back rows read.

    Args:
      depth: as `Reach`.
    """
    lookback = self.features.lookback(self.config.history_length)
    return past_lib.Reach(
      depth, lookback, self.config.ties, self.schema.time_unit
    )

  def ask(
    self,
    context: Mapping[str, Any],
    candidates: values_lib.Events,
    *,
    with_time: bool | None = None,
    as_of: bool = False,
  ) -> Asked:
    """Encodes a request.

    Args:
      context: one value a column.
      candidates: the items to score, `[{column: value}]` or
        `{column: [values]}`; at least one.
      with_time: whether their time is read; None: if something needs it.
      as_of: as `make_row`.

    Raises:
      ValueError: a value is missing or bad, or a column unknown.
    """
    schema, context = self.schema, values_lib.one(context)
    values_lib.check_known(self._known, context, 'context')
    shown = values_lib.read(candidates, 'candidates')
    values_lib.check_known(self._known, shown, 'candidates')
    number = values_lib.length_of(shown)
    if not number:
      raise ValueError('candidates is empty; give at least one item to score')
    shared = {}
    for name in (schema.time, schema.request):
      if name and name not in shown and name in context:
        shown[name] = [context[name]] * number
        shared[name] = [context[name]]  # Read once.
    if not isinstance(as_of, (bool, np.bool_)):
      raise ValueError(
        f'as_of={as_of!r} must be True or False; the time of the request is '
        f'the column {schema.time!r} of context or candidates'
      )
    if as_of and self.config.ties != 'strict':
      raise ValueError(
        f'as_of=True with ties={self.config.ties!r}: a log does not say which '
        "events of a candidate's own time were before it; train with "
        "ties='strict' (--config.data.rows.ties=strict), or leave as_of out"
      )
    with_time = self.needs_time if with_time is None else with_time
    times = shared if schema.time in shared else shown
    time, is_timestamp = values_lib.times(
      schema,
      times,
      1 if times is shared else number,
      with_time,
      'candidates',
    )
    self._check_clock(is_timestamp, 'candidates')
    if times is shared:
      time = np.repeat(time, number)
    request = None
    if schema.request and schema.request in shown:
      keys = shared if schema.request in shared else shown
      request = values_lib.keys(schema, keys, schema.request, 'candidates')
      if keys is shared:
        request = np.repeat(request, number)
    user = _NOBODY
    if self._needs_user:
      user = values_lib.user_of(schema, context)
    known = self.features.vocabularies
    return Asked(
      context=values_lib.encode_one(
        schema, context, schema.context, 'context', known
      ),
      features=values_lib.encode(
        schema, shown, self._items, number, 'candidates', known
      ),
      time=time,
      is_timestamp=bool(is_timestamp),
      request=request,
      user=user,
      as_of=as_of,
    )

  def _check_order(self, time: np.ndarray, asked: Asked) -> None:
    last = time[-1]
    if asked.as_of or last <= 0 or asked.time[asked.time.argmin()] >= last:
      return
    early = int(np.argmax(asked.time < last))
    also = ', or set as_of=True' if self.config.ties == 'strict' else ''
    raise ValueError(
      f'column {self.schema.time!r}: candidate {early} is earlier than the '
      f"history's last event; drop the events after it{also}"
    )

  def _check_clock(self, is_timestamp: bool | None, source: str) -> None:
    """As in the log that the features were fitted to; None: not read."""
    fitted = self.features.is_timestamp
    if fitted is not None and is_timestamp is not None:
      if fitted != is_timestamp:
        columns_lib.check_clocks(
          self.schema.time, {'the training log': fitted, source: is_timestamp}
        )

  def start(self) -> past_lib.Past:
    """The past of a new user."""
    past = self.with_outcomes(self.impressions({}), {}, 0)
    return self.derive(past, 0, np.zeros(1, np.uint64))

  def read(self, events: values_lib.Events) -> past_lib.Past:
    """Encodes events; what depends on those before them is not there yet.

    Raises:
      ValueError: a value is missing or bad, a column unknown, or they are out
        of order.
    """
    columns = values_lib.read(events, 'events')
    past = self.impressions(columns, source='events')
    return self.with_outcomes(past, columns, len(past), source='events')

  def extend(
    self, past: past_lib.Past, new: past_lib.Past, user: np.ndarray
  ) -> past_lib.Past:
    """Appends events of `read`.

    Args:
      past: of this maker.
      new: the events.
      user: as `Asked.user`.

    Raises:
      ValueError: they are earlier than the past's last one, or of another
        clock, or lack their request.
    """
    if not len(new):
      return past
    schema, old = self.schema, len(past)
    if old:
      _check_clocks(schema, past.is_timestamp, new.is_timestamp, 'events')
      if new.time[0] < past.time[-1]:
        raise ValueError(
          f'column {schema.time!r}: events row 0 is earlier than the last '
          'event known of the user; order events oldest first'
        )
      if (past.request is None) != (new.request is None):
        raise ValueError(
          f'column {schema.request!r}: it is in some events of the user and '
          'not in others; give it in all or in none'
        )
    else:  # Its arrays may be of other types than those of real events.
      past = dataclasses.replace(
        past, request=None if new.request is None else new.request[:0],
        time=new.time[:0],
      )  # fmt: skip
    joined = past_lib.place(past.joined(new), old, self.config.ties)
    return self.derive(joined, old, user, past.derived)

  def view(
    self, past: past_lib.Past, asked: Asked, visible: int | None = None
  ) -> View:
    """What candidates see of the past.

    Args:
      past: of the user.
      asked: of `ask`.
      visible: as `make_row`.

    Raises:
      ValueError: a candidate is earlier than the last event, or the history
        is longer than it may be.
    """
    schema, number, stop = self.schema, len(past.time), past.stop
    if number:
      _check_clocks(schema, past.is_timestamp, asked.is_timestamp, 'candidates')
      self._check_order(past.time, asked)
    before, all_see_all = np.empty(len(asked.time), np.int64), True
    before.fill(stop)
    if self.config.ties == 'strict':
      place = np.searchsorted(past.time, asked.time, 'left')
      before, all_see_all = past.first + place, False
    if asked.request is not None and number:
      if past.request is None:
        raise ValueError(
          f'column {schema.request!r} is not in history, but candidates have '
          'it; give it in both'
        )
      if not _is_new(past.request, asked.request):
        before = _before_requests(
          before, past.request, past.visible, asked.request
        )
        all_see_all = False
    least = most = stop
    if not all_see_all:
      least, most = int(before.min()), int(before.max())
    return _view(before, least, most, self.config, visible, stop)

  def candidates(
    self, past: past_lib.Past, asked: Asked, view: View
  ) -> dict[str, np.ndarray]:
    """All features of the candidates, `{name: [c]}`.

    Args:
      past: of the user.
      asked: of `ask`.
      view: of `view`.
    """
    found = dict(asked.features)
    if self._shown_as_read:
      return found
    if self.features.configs:
      # One clock: whole times and others in one request.
      time = np.concatenate([past.time, asked.time])
      events = dataclasses.replace(
        past.events(self.schema, asked.user),
        time=time[: len(past)],
        is_timestamp=asked.is_timestamp,
      )
      number = len(asked)
      impressions = Impressions(
        user=np.repeat(asked.user, number),
        begin=np.zeros(number, np.int64),
        shown=view.before - past.first,
        start=np.full(number, max(0, view.start - past.first)),
        visible=view.sees - past.first,
        time=time[len(past) :],
        features=asked.features,
      )
      found |= self.features.of_impressions(
        events, impressions, dict(past.derived)
      )
    return {f.name: found[f.name] for f in self.schema.item_features}

  def derive(
    self,
    past: past_lib.Past,
    old: int,
    user: np.ndarray,
    known: Mapping[str, np.ndarray] | None = None,
  ) -> past_lib.Past:
    """Adds the derived features of all events but the `old` first."""
    if not self.features.configs:
      return past
    new = self.features.of_new_events(
      past.events(self.schema, user), self.config.history_length, known or {}
    )
    if known:
      new = {k: np.concatenate([known[k], x]) for k, x in new.items()}
    return dataclasses.replace(past, derived=new)

  def impressions(
    self,
    columns: Mapping[str, Sequence[Any]],
    *,
    with_time: bool | None = None,
    with_request: bool = True,
    source: str = 'history',
  ) -> past_lib.Past:
    """Encodes what was known of events when they were shown.

    Args:
      columns: of `read_columns`.
      with_time: whether their time is read; None: if something needs it.
      with_request: whether their request is, if it is given.
      source: what to call them in messages.
    """
    values_lib.check_known(self._known, columns, source)
    schema, number = self.schema, values_lib.length_of(columns)
    with_time = self.needs_time if with_time is None else with_time
    time, is_timestamp = values_lib.times(
      schema, columns, number, with_time, source
    )
    self._check_clock(is_timestamp, source)
    late = np.flatnonzero(np.diff(time) < 0)
    if late.size:
      raise ValueError(
        f'column {schema.time!r}: {source} row {late[0] + 1} is earlier than '
        f'the row before; order the {source} oldest first'
      )
    request = None
    if schema.request and number and with_request:
      if schema.request in columns or self.features.configs:
        request = values_lib.keys(schema, columns, schema.request, source)
    known = self.features.vocabularies
    return past_lib.Past(
      first=0,
      time=time,
      is_timestamp=is_timestamp,
      request=request,
      dropped=np.zeros(0, np.uint64),
      visible=np.zeros(number, np.int64),
      features=values_lib.encode(
        schema, columns, self._items, number, source, known
      ),
      actions={},
      labels={},
      derived={},
    )

  def with_outcomes(
    self,
    past: past_lib.Past,
    columns: Mapping[str, Sequence[Any]],
    stop: int,
    *,
    source: str = 'history',
  ) -> past_lib.Past:
    """With actions and labels of the first `stop` events."""
    schema = self.schema
    known = columns
    if stop < len(past):
      known = {name: values[:stop] for name, values in columns.items()}
    vocabularies = self.features.vocabularies
    labels = {}
    if self.features.needs('labels'):
      labels = values_lib.labels(schema, known, stop, source)
    return dataclasses.replace(
      past,
      actions=values_lib.encode(
        schema, known, schema.action, stop, source, vocabularies
      ),
      labels=labels,
    )


def _checked_features(
  schema: Schema, features: FittedFeatures | None
) -> FittedFeatures:
  features = features or FittedFeatures()
  for known_by in vocabulary.of(schema):
    vocabulary.check(known_by, features.vocabularies)
  known = {f.name: f for f in features.derived}
  for feature in schema.derived:
    if known.get(feature.name) != feature:
      raise ValueError(
        f'schema.derived has {feature.name!r}, which `features` do not '
        f'compute ({sorted(known)}); give those that training saved, as '
        '`histjax.features.load(workdir)` reads them'
      )
  return features


def _is_new(past: np.ndarray, asked: np.ndarray) -> bool:
  """Whether all candidates are of one request that has no event yet."""
  one = asked[0]
  return bool((asked == one).all()) and not (past == one).any()


def _before_requests(
  before: np.ndarray, past: np.ndarray, visible: np.ndarray, asked: np.ndarray
) -> np.ndarray:
  """`before`, and before the first event of each candidate's own request."""
  values, first = np.unique(past, return_index=True)
  place = np.minimum(np.searchsorted(values, asked), len(values) - 1)
  known = values[place] == asked
  return np.where(known, np.minimum(before, visible[first[place]]), before)


def _view(
  before: np.ndarray,
  least: int,
  most: int,
  config: RowConfig,
  visible: int | None,
  num_events: int,
) -> View:
  """The view of candidates that have `[least, most]` events `before` them."""
  sees = before
  if visible is not None:
    is_count = isinstance(visible, (int, np.integer))
    if (
      not is_count
      or isinstance(visible, bool)
      or not 0 <= visible <= num_events
    ):
      raise ValueError(
        f'visible={visible!r} must be an integer in [0, {num_events}], the '
        'events of the history'
      )
    least, most = min(least, visible), min(most, visible)
    sees = np.minimum(before, visible)
  if config.kind == 'snapshot' and least < most:
    sees, most = np.full_like(before, least), least
  return View(before, sees, least, most, _start(least, config))


def _start(least: int, config: RowConfig) -> int:
  """The first event of the row's history."""
  if config.history_length is None:
    return 0
  if config.on_overflow == 'error' and least > config.history_length:
    raise ValueError(
      f'history has {least} events, more than history_length='
      f"{config.history_length}; shorten it, or set on_overflow='truncate'"
    )
  return max(0, least - config.history_length)


def _check_clocks(
  schema: Schema, past: bool | None, given: bool | None, source: str
) -> None:
  if bool(past) != bool(given):
    columns_lib.check_clocks(
      schema.time, {'history': bool(past), source: bool(given)}
    )
