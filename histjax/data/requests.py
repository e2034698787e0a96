"""One row from plain values, as a server or a file of candidates has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from histjax.data import past as past_lib
from histjax.data import rows as rows_lib
from histjax.data import values as values_lib
from histjax.data.row_maker import RowMaker
from histjax.data.values import Events
from histjax.features import FittedFeatures
from histjax.schema import Schema

__all__ = ['Events', 'make_row']


def make_row(
  schema: Schema,
  *,
  context: Mapping[str, Any],
  history: Events,
  candidates: Events,
  config: rows_lib.RowConfig | None = None,
  features: FittedFeatures | None = None,
  visible: int | None = None,
  as_of: bool = False,
) -> rows_lib.Row:
  """A row to score, checked and encoded as a log would be.

  Keys are the log's columns, as the schema names them. Any of these may be in
  each part, so that a log's own records can be passed; others are refused.

  Args:
    schema: of the model: which columns are read, and what is derived.
    context: one value a column.
    history: the user's events, oldest first, as `[{column: value}]` or
      `{column: [values]}`; may be empty.
    candidates: the items to score, in the same form; at least one. The time
      and the request, where the schema has them, may be in `context` instead.
    config: as the model was trained; only `kind`, `history_length`,
      `on_overflow` and `ties` are read. None: `RowConfig()`.
    features: what computes `schema.derived`, as training saved it.
    visible: the candidates see so many events of the history, and of later
      ones only that they were shown; None: all. So is a snapshot served that
      is older than the request.
    as_of: candidates may be earlier than events of the history, and then each
      sees what was before it (with kind='snapshot' what was before the first
      of them). Needs ties='strict'.

  Returns:
    The row, without labels. Candidates see the whole history but for events
    of their own request, and under ties='strict' those of their own time.

  Raises:
    ValueError: a value is missing or bad, a column unknown, events are out of
      order, a candidate is earlier than one of them, or `features` are not
      given.
  """
  maker = RowMaker(schema, config, features)
  past_columns = values_lib.read(history, 'history')
  shown = values_lib.read(candidates, 'candidates')
  context = values_lib.one(context)
  with_time = maker.needs_time or (
    (schema.time in shown or schema.time in context)
    and (schema.time in past_columns or not values_lib.length_of(past_columns))
  )
  asked = maker.ask(context, shown, with_time=with_time, as_of=as_of)
  past = maker.impressions(
    past_columns,
    with_time=with_time,
    with_request=asked.request is not None or bool(maker.features.configs),
  )
  past = past_lib.place(past, 0, maker.config.ties)
  view = maker.view(past, asked, visible)
  # Of events that nobody sees no outcome is read.
  past = maker.with_outcomes(past, past_columns, view.stop)
  past = maker.derive(past, 0, asked.user)
  history_features = past.history(view.start, view.stop)
  return rows_lib.Row(
    context=asked.context,
    history={f.name: history_features[f.name] for f in schema.history_features},
    candidates=maker.candidates(past, asked, view),
    visible=(view.sees - view.start).astype(np.int32),
    labels={},
  )
