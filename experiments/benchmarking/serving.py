"""The suite `serving`: users who come back, from values to logits.

Four kinds of requests, each of the same events and candidates in the end:

* hit: the user's state has all events;
* extend: it has all but the last `NEW_EVENTS`, which come with the request;
* miss: nothing is known, all but these come with the request;
* no cache: the whole history comes, to an engine that keeps nothing.

Three ways to ask: the *device* is given the same program again and again
without waiting; *in process* `Engine.score` is called with what a log has; and
through *HTTP*, a server and its client on loopback, one request at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from benchmarking import (
  load_engines,
  machine,
  rankers,
  serving_device,
  serving_report,
)
from benchmarking.workloads import Request as Workload
from histjax.data.row_maker import RowMaker
from histjax.scoring import Scorer, ScorerConfig, pages
from histjax.serving.cache_store import StoreConfig
from histjax.serving.engine import Engine, EngineConfig, Request, Result
from histjax.serving.pages import Shape

KINDS = serving_report.KINDS
LENGTHS = (256, 1024, 4096)
CANDIDATES = (128, 512, 2048)
USERS = (1, 32)
"""At once; through HTTP the first number alone."""
NEW_EVENTS = rankers.NEW_EVENTS
_RING = 4  # Lists of candidates, in turns.
_TURNS = 3
_PATIENCE = 20  # Times `seconds`, after which there are no more turns.
_PARTS = {'device': 'call', 'in process': 'p50', 'http': 'p50'}
_SOURCES = {'hit': 'hit', 'extend': 'extended'}  # Others: 'encoded'.


class Way(Protocol):
  """A way to ask."""

  def score(self, kind: str, requests: Sequence[Request]) -> list[Result]:
    """Scores requests of a kind."""


class InProcess:
  """An engine with a store and one without, in this process."""

  def __init__(self, store: Engine, stateless: load_engines.Stateless):
    self.store, self.stateless = store, stateless

  def score(self, kind: str, requests: Sequence[Request]) -> list[Result]:
    """See `Way`."""
    engine = self.stateless if kind == 'no cache' else self.store
    return [_good(x) for x in engine.score(requests)]


def _good(found: Any) -> Any:
  if isinstance(found, Exception):
    raise found
  return found


def run(
  model: Workload,
  lengths: Sequence[int] = LENGTHS,
  candidates: Sequence[int] = CANDIDATES,
  *,
  users: Sequence[int] = USERS,
  seconds: float = 1.0,
  http: bool = True,
  progress: Callable[[str], None] = print,
  save: Callable[[Mapping[str, Any]], Any] | None = None,
) -> dict[str, Any]:
  """Checks all kinds against `Scorer` on the whole history, then times them.

  Args:
    model: `width`, `num_layers`, `num_heads` and `dtype` are read.
    lengths: L, of the histories.
    candidates: C, of a request.
    users: at once; the first number is that of HTTP, and 1.
    seconds: for each kind, way and number of users, about.
    http: whether to ask through HTTP, too.
    progress: called with a table at a time.
    save: called with the report so far after each L and C.

  Returns:
    A JSON-able report: `suite`, `environment`, `model`, and `results`, one for
    each L and C; see `_cell`.

  Raises:
    ValueError: a kind of request gives other logits than `Scorer`.
  """
  if min(lengths) <= NEW_EVENTS:
    raise ValueError(
      f'lengths={[*lengths]} must be above {NEW_EVENTS}, the new events'
    )
  way, scorer = _in_process(model, lengths, candidates, users)
  found: dict[str, Any] = {
    'suite': 'serving',
    'environment': machine.environment() | machine.clocks(),
    'model': {
      field: getattr(model, field)
      for field in ('width', 'num_layers', 'num_heads', 'dtype')
    },
    'new_events': NEW_EVENTS,
    'results': [],
  }
  ways: dict[str, Way] = {'in process': way}
  with contextlib.ExitStack() as stack:
    if http:  # Its packages are needed only now.
      from benchmarking import serving_http

      ways['http'] = stack.enter_context(serving_http.running(way))
    for length, number in itertools.product(lengths, candidates):
      cell = _cell(way, scorer, ways, length, number, users, seconds)
      found['results'].append(cell)
      progress(serving_report.table(cell))
      if save is not None:
        save(found)
  return found


def _in_process(
  model: Workload,
  lengths: Sequence[int],
  candidates: Sequence[int],
  users: Sequence[int],
) -> tuple[InProcess, Scorer]:
  """Engines with one program for each kind, length and number."""
  config = rankers.config(model)
  options = ScorerConfig(
    microbatch=max(candidates),
    history_buckets=tuple(sorted(lengths)),
    candidate_buckets=tuple(sorted(candidates)),
    row_buckets=tuple(sorted(users)),
    new_event_buckets=(NEW_EVENTS,),
  )
  scorer = Scorer(config, rankers.variables(model), options)
  number = max(users) * pages.number(max(lengths)) + 1
  store = StoreConfig(device_bytes=number * Shape.of(config, options).nbytes)
  maker = RowMaker(config.schema)
  settings = EngineConfig(
    dataclasses.replace(store, host_bytes=1 << 30),
    max_rows=max(users),
    max_new_events=NEW_EVENTS,
  )
  engine = Engine(scorer, settings, maker=maker)
  stateless = load_engines.Stateless(scorer, 'encode', settings, maker)
  return InProcess(engine, stateless), scorer


def _cell(
  way: InProcess,
  scorer: Scorer,
  ways: Mapping[str, Way],
  length: int,
  candidates: int,
  users: Sequence[int],
  seconds: float,
) -> dict[str, Any]:
  """Times all kinds at one L and C.

  Returns:
    `length`, `candidates`, `state_bytes` of a user; `copy_seconds`, of a state
    from host memory to the device; `relative_error`, the largest by kind; and
    `device`, `in process` and `http`: by the number of users and kind, seconds
    of a call, `p50`, `p99` and `calls` or, of the device, `call` and where a
    GPU tells its `kernels`; and `ratios`, how many times as long as 'hit' the
    other kinds take.
  """
  # As a server does: on a GPU programs are replayed from now on.
  way.store.warm_up(
    candidates=candidates,
    events=length,
    rows=max(users),
    new_events=NEW_EVENTS,
  )
  copy = min(way.store.store.measure_copy(length) for _ in range(3))
  cell: dict[str, Any] = {
    'name': f'L {length}, C {candidates}',
    'length': length,
    'candidates': candidates,
    'state_bytes': pages.number(length)
    * Shape.of(scorer.config, scorer.options).nbytes,
    'copy_seconds': copy,
    'relative_error': dict.fromkeys(KINDS, 0.0),
    'device': {},
  }
  for number in users:
    asked = _requests(length, candidates, number)
    for name, one in ways.items():
      if name == 'http' and number != 1:
        continue
      # Compiles as well.
      for kind, error in _errors(way, one, asked, scorer).items():
        worst = cell['relative_error']
        worst[kind] = max(worst[kind], error)
      before = scorer.num_compilations
      times = _times(way, one, asked, seconds)
      if scorer.num_compilations != before:
        raise RuntimeError(f'{name}: a program was compiled while it was timed')
      cell.setdefault(name, {})[str(number)] = times
    cell['device'][str(number)] = _device(way, scorer, asked, seconds)
  cell['ratios'] = _ratios(cell)
  return cell


Asked = Mapping[str, Sequence[Sequence[Request]]]
"""By kind, lists of requests, one a user, to use in turns."""


def _requests(length: int, candidates: int, users: int) -> Asked:
  rng = np.random.default_rng(length + candidates)
  found: dict[str, list[list[Request]]] = {kind: [] for kind in KINDS}
  events = [_values(rng, length, rankers.SCHEMA.action) for _ in range(users)]
  old = length - NEW_EVENTS
  for _ in range(_RING):
    lists: dict[str, list[Request]] = {kind: [] for kind in KINDS}
    for user, history in enumerate(events):
      one = (user, _values(rng, candidates), {'age': 0.5})
      before = {k: x[:old] for k, x in history.items()}
      after = {k: x[old:] for k, x in history.items()}
      lists['hit'].append(Request(*one, first=length))
      lists['extend'].append(Request(*one, after, first=old))
      lists['miss'].append(Request(*one, before))
      lists['no cache'].append(Request(*one, history))
    for kind, requests in lists.items():
      found[kind].append(requests)
  return found


def _values(rng: np.random.Generator, number: int, more=()) -> dict[str, list]:
  """Columns of items, as a log has them."""
  return {
    f.column: rng.integers(0, size, number).tolist()
    if (size := getattr(f, 'size', 0))
    else rng.normal(size=number).tolist()
    for f in (*rankers.SCHEMA.item, *more)
  }


def _forget(way: InProcess, users: int) -> None:
  for user in range(users):
    way.store.store.forget(str(user))


def _checked(kind: str, found: Sequence[Result]) -> Sequence[Result]:
  wanted = _SOURCES.get(kind, 'encoded')
  for result in found:
    if result.source != wanted:
      raise ValueError(f'{kind}: the state was {result.source}, not {wanted}')
  return found


def _errors(
  way: InProcess, one: Way, asked: Asked, scorer: Scorer
) -> dict[str, float]:
  """The largest relative error of each kind, on the first lists."""
  found = {}
  scores = {
    kind: [x.logits for x in way.score('no cache', asked[kind][0])]
    for kind in ('miss', 'no cache')
  }
  _forget(way, len(asked['hit'][0]))
  for kind in ('miss', 'extend', 'hit', 'no cache'):
    wanted = scores['miss' if kind == 'miss' else 'no cache']
    results = _checked(kind, one.score(kind, asked[kind][0]))
    found[kind] = max(
      rankers.check(
        f'{kind}, against Scorer on the whole history',
        {k: np.array(v) for k, v in x.logits.items()},
        y,
        scorer.config.dtype,
      )
      for x, y in zip(results, wanted, strict=True)
    )
  return found


def _times(
  way: InProcess, one: Way, asked: Asked, seconds: float
) -> dict[str, dict[str, float]]:
  """p50 and p99 of each kind, which take turns."""
  users = len(asked['hit'][0])
  times: dict[str, list[float]] = {kind: [] for kind in KINDS}

  def timed(kind: str) -> None:
    requests = asked[kind][len(times[kind]) % _RING]
    begin = time.perf_counter()
    found = one.score(kind, requests)
    times[kind].append(time.perf_counter() - begin)
    _checked(kind, found)

  begin = time.perf_counter()
  for turn in range(1, _TURNS + 1):
    for kinds in (('miss', 'extend'), ('hit',), ('no cache',)):
      first, share = True, turn / _TURNS * seconds
      while first or sum(sum(times[kind]) for kind in kinds) < share:
        if 'miss' in kinds:
          _forget(way, users)
        for kind in kinds:
          timed(kind)
        first = False
    if time.perf_counter() - begin > _PATIENCE * seconds:
      break
  return {
    kind: {
      'p50': float(np.percentile(values, 50)),
      'p99': float(np.percentile(values, 99)),
      'calls': len(values),
    }
    for kind, values in times.items()
  }


def _device(
  way: InProcess, scorer: Scorer, asked: Asked, seconds: float
) -> dict[str, dict[str, float | None]]:
  """Seconds of each kind's program, called again without waiting."""
  found = {}
  _forget(way, len(asked['hit'][0]))
  for kind in ('miss', 'extend', 'hit', 'no cache'):
    with serving_device.recorded(scorer) as calls:
      way.score(kind, asked[kind][0])
    repeated = functools.partial(calls[-1].times, seconds)
    found[kind] = way.store.store.warm_up_programs(repeated)
  return found


def _ratios(cell: Mapping[str, Any]) -> dict[str, Any]:
  """By way and users: other kinds over 'hit', of medians."""
  return {
    way: {
      users: {
        kind: times[kind][part] / times['hit'][part] for kind in KINDS[1:]
      }
      for users, times in cell[way].items()
    }
    for way, part in (
      ('device', 'call'),
      ('in process', 'p50'),
      ('http', 'p50'),
    )
    if way in cell
  }
