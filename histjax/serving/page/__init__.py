"""The page, and what it asks for: items, users, where a candidate looks.

Plain HTML, CSS and JavaScript beside this file; no build step, no other host.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from histjax.data import datasets
from histjax.data.rows import collate
from histjax.scoring import Scorer
from histjax.scoring.attention import last_attention
from histjax.serving import app as app_lib
from histjax.serving import catalogue as catalogue_lib
from histjax.serving import messages

_FOLDER = pathlib.Path(__file__).parent
_TYPES = {'html': 'text/html', 'js': 'text/javascript', 'css': 'text/css'}
_HEADERS = {
  'content-security-policy': (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
  ),
  'x-content-type-options': 'nosniff',
}


def of_run(
  service: app_lib.Service,
  engine: app_lib.RunEngine,
  wanted: str = 'auto',
  titles: str | None = None,
) -> list[Route]:
  """The page's routes for a run whose log can be loaded; else none.

  Args:
    service: of the application.
    engine: of the service.
    wanted: 'auto': for the public and synthetic datasets whose files are here;
      'yes': or an error; 'no'.
    titles: a CSV file with a header and two columns, the item and its title.

  Raises:
    ValueError: the page was asked for, and a column is hashed; a title is
      malformed; or there are titles and no page.
    OSError: it was asked for, and a file is not there.
  """
  run = engine.scorer.run
  source = None if run is None else run.config.data.source
  of_files = isinstance(source, datasets.Events)
  if wanted == 'no' or run is None or (wanted == 'auto' and of_files):
    if titles is not None:
      raise ValueError(
        f'titles={titles!r} are of the page, which is not served; add '
        '--page=yes, or leave them out'
      )
    if wanted == 'auto' and of_files:
      print(
        'without the page: it would show all users and items of a log of your '
        'own; --page=yes serves it, if no column is hashed or has a vocabulary'
      )
    return []
  data = run.config.data
  names = None if titles is None else catalogue_lib.read_titles(titles)
  try:
    log, _ = data.source.load(data.tasks)
    catalogue = catalogue_lib.of_log(
      log, max_items=service.config.limits.candidates, titles=names
    )
  except (ValueError, OSError) as error:
    if wanted == 'yes':
      raise
    print(f'without the page: {error}')
    return []
  return routes(service, catalogue, lambda: engine.scorer)


def routes(
  service: app_lib.Service,
  catalogue: catalogue_lib.Catalogue,
  scorer: Callable[[], Scorer],
) -> list[Route]:
  """The page's routes, for `app.make_app`.

  Args:
    service: of the application.
    catalogue: what to choose from.
    scorer: the one that is served now.
  """
  body = messages.encode(messages.JSON, catalogue)

  async def items(http):
    return Response(body, media_type=messages.JSON)

  async def attention(http: HttpRequest):
    media, message, *spent_s = await service.read(http)
    if message.first or messages.size(message.candidates) != 1:
      raise messages.refusal(
        422,
        'attention is of one candidate over a whole history',
        field='first' if message.first else 'candidates',
        fix='send one candidate, and all events with first=0',
      )
    call = functools.partial(attention_of, scorer(), message)
    done = await service.run(service.aside, http, call, message, sum(spent_s))
    return app_lib.respond(http, media, done.result)

  return [
    *(Route(path, _file(name)) for path, name in _files().items()),
    Route('/v1/catalogue', items),
    Route('/v1/attention', attention, methods=['POST']),
  ]


def attention_of(
  scorer: Scorer, message: messages.ScoreRequest
) -> messages.AttentionReply:
  """The last layer's attention of the one candidate, the mean over heads.

  Raises:
    ValueError: a value is bad, or the model's candidates attend to more than
      events.
  """
  maker = scorer.row_maker()
  context = {**message.context, maker.schema.user: message.user}
  row = scorer.make_row(
    context=context, history=message.events, candidates=message.candidates
  )
  batch = collate([row])
  cache = scorer.encode(batch.history)
  try:
    weights = last_attention(
      scorer.config, scorer.variables, cache, batch.candidates, batch.context
    )
  except NotImplementedError as error:
    raise ValueError(f'{error}; serve another model') from error
  length = int(batch.history.length[0])
  mean = np.asarray(weights, float)[0, :, 0, :length].mean(axis=0)
  # The last events may be unseen: of the candidate's own time or request.
  asked = maker.ask(context, message.candidates)
  past = maker.extend(maker.start(), maker.read(message.events), asked.user)
  return messages.AttentionReply(mean.tolist(), maker.view(past, asked).start)


def _files() -> dict[str, str]:
  names = ('page.js', 'page.css')
  return {'/': 'index.html', **{f'/page/{name}': name for name in names}}


def _file(name: str):
  content = (_FOLDER / name).read_bytes()
  media = _TYPES[name.rpartition('.')[2]]

  async def answer(http):
    return Response(content, media_type=media, headers=_HEADERS)

  return answer
