"""What a server does under load: how much, how fast, and whether rightly."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from benchmarking import load, load_check, load_client
from histjax import Scorer

ENGINES = ('store', 'encode', 'plain')
Kind = Literal['store', 'encode', 'plain']
Start = Callable[
  [Any, Kind, 'Suite'], contextlib.AbstractContextManager[load_client.Served]
]
_FIRST = 'histjax_store_'


@dataclasses.dataclass(frozen=True)
class Suite:
  """How servers are loaded.

  Attributes:
    load: what users send.
    limit_ms: of p99.
    seconds: of each rate.
    tries: rates, at most.
    max_batch: requests that a server scores at once.
    store_mib: of states.
    checked: replies that are scored again.
    more: flags of `serve.py`.
  """

  load: load.Load
  limit_ms: float = 50.0
  seconds: float = 12.0
  tries: int = 7
  max_batch: int = 8
  store_mib: int = 256
  checked: int = 150
  more: tuple[str, ...] = ()


@contextlib.contextmanager
def serving(
  workdir: str | os.PathLike[str], kind: Kind, suite: Suite
) -> Iterator[load_client.Served]:
  """`serve.py`, or the same with an engine of `load_engines`."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  sizes = f'{suite.load.longest},{suite.load.candidates}'
  command = [
    'serve.py',
    f'--port={port}',
    f'--store_mib={suite.store_mib}',
    f'--warm_up={sizes}',
    '--page=no',
    *suite.more,
  ]
  if kind != 'store':
    command = ['load.py', f'--serve={port}', f'--engine={kind}']
    command += [f'--longest={suite.load.longest}']
    command += [f'--candidates={suite.load.candidates}']
  command += [f'--workdir={workdir}', f'--max_batch={suite.max_batch}']
  with load_client.server(command, f'http://127.0.0.1:{port}') as found:
    yield found


def compare(
  workdir: str | os.PathLike[str],
  kinds: Sequence[Kind],
  suite: Suite,
  progress: Callable[[str], None],
) -> dict[str, Any]:
  """The highest rate of each kind of server within the limit.

  Args:
    workdir: of a run.
    kinds: of `ENGINES`.
    suite: how.
    progress: told of each rate.

  Returns:
    Part of a report, by kind, and ratios of the first one's rate to others'.
  """
  scorer = Scorer.from_workdir(workdir)
  results: dict[str, Any] = {}
  for kind in kinds:
    with serving(workdir, kind, suite) as server:
      users = load.Users(
        suite.load,
        load_client.schema(server.url),
        scorer.config.schema.time,
        whole=kind != 'store',
      )
      measure = _plain if kind == 'plain' else _loaded
      found, records = measure(server, users, suite, progress)
    answered = [x for x in records if x.latency is not None]
    part = answered[:: max(1, len(answered) // suite.checked)]
    found['check'] = load_check.check(part, users, {scorer.fingerprint: scorer})
    results[kind] = found
    told = (
      f'{found["rate"]:.1f}/s within the limit'
      if found['rate']
      else ('nothing is answered within the limit')
    )
    progress(
      f'{kind}: {told}; {found["capacity"]:.2f}/s without; '
      f'{found["check"]["scores"]} scores checked, the largest difference '
      f'{found["check"]["largest"]:.2f} of the bound'
    )
  first = results[kinds[0]]['rate']
  ratios = {
    kind: first / (results[kind]['rate'] or results[kind]['capacity'])
    for kind in kinds[1:]
  }
  return {'results': results, 'ratios': ratios}


def _loaded(server, users: load.Users, suite: Suite, progress):
  """The highest rate within the limit, of a server whose users were here."""
  records: list[load.Record] = []
  budget: dict[str, float] = {}

  def send(new, **options):
    records.extend(new)
    seconds = load_client.run(server.url, users, new, **options)
    found = load.summary(new, seconds)
    if not users.whole:
      _watch(budget, server)
      pages = load_client.metrics(server.url)[f'{_FIRST}pages']
      found['hit_rate'] = load.hit_rates(records, len(new), int(pages))
    return found

  def try_rate(rate: float):
    found = send(users.schedule(rate, suite.seconds))
    progress(_line(rate, found))
    return found

  if not users.whole:
    send(users.all(), open_loop=False, connections=4, timeout=30)
  alone = send(users.schedule(30, 1), open_loop=False, connections=1)
  best, tried = load.highest_rate(
    try_rate,
    first=500 / alone['p50'],
    limit_ms=suite.limit_ms,
    tries=suite.tries,
  )
  number = max(best, 500 / alone['p50'])
  busy = send(
    users.schedule(number, 4), open_loop=False, connections=suite.max_batch
  )
  found = {
    'rate': best,
    'capacity': busy['rate'],
    'alone': alone,
    'busy': busy,
    'tried': tried,
    'server': load_client.metrics(server.url),
    'budget': budget,
  }
  return found, records


def _plain(server, users: load.Users, suite: Suite, progress):
  """What a server does that takes seconds for a request."""
  records = users.schedule(4, 1) or users.schedule(30, 1)
  records = records[:4]
  seconds = load_client.run(
    server.url, users, records, open_loop=False, connections=1, timeout=120
  )
  found = load.summary(records, seconds)
  progress(_line(found['rate'], found))
  within = found['answered'] and found['p50'] <= suite.limit_ms
  return {
    'rate': found['rate'] if within else 0.0,
    'capacity': found['rate'],
    'alone': found,
    'tried': [],
  }, records


def check(
  workdirs: Sequence[str | os.PathLike[str]],
  link: pathlib.Path,
  rate: float,
  suite: Suite,
  progress: Callable[[str], None],
  start: Start | None = None,
) -> dict[str, Any]:
  """Every score, while states are evicted and extended and models roll over.

  Args:
    workdirs: of runs of one schema, served one after the other.
    link: made, and switched to each.
    rate: requests a second.
    suite: how; `seconds` is the time of all, or longer, until each was served.
    progress: told what came of it.
    start: a server of the link; None: `serving`.

  Returns:
    Part of a report; `check` has what is wrong.
  """
  scorers = [Scorer.from_workdir(x) for x in workdirs]
  _switch(link, workdirs[0])
  suite = dataclasses.replace(suite, more=(*suite.more, '--watch_s=0.2'))
  budget: dict[str, float] = {}
  done = threading.Event()
  with (start or serving)(link, 'store', suite) as server:
    users = load.Users(
      suite.load,
      load_client.schema(server.url),
      scorers[0].config.schema.time,
    )
    records = users.schedule(rate, suite.seconds)

    def watch() -> None:
      while not done.wait(0.5):
        _watch(budget, server)

    def roll_over() -> None:
      for path, scorer in zip(workdirs[1:], scorers[1:], strict=True):
        if done.wait(suite.seconds / len(workdirs)):
          return
        _switch(link, path)
        while load_client.schema(server.url)['model'] != scorer.fingerprint:
          if done.wait(0.1):
            return

    switching = threading.Thread(target=roll_over)
    threads = switching, threading.Thread(target=watch)
    for thread in threads:
      thread.start()
    try:
      load_client.run(server.url, users, records, timeout=60)
      found = load.summary(records, suite.seconds)
      progress(_line(rate, found))
      last = False
      while not last:
        last = not switching.is_alive()
        more = users.schedule(rate, 1)
        load_client.run(server.url, users, more, timeout=60)
        records += more
    finally:
      done.set()
      for thread in threads:
        thread.join()
    metrics = load_client.metrics(server.url)
  answered = [x for x in records if x.latency is not None]
  checked = load_check.check(
    answered, users, {x.fingerprint: x for x in scorers}
  )
  if len(answered) < len(records):
    statuses = {x.status for x in records}
    checked['wrong'].append(f'requests were dropped: {statuses}')
  checked['wrong'] += [
    f'nothing was scored by {model[:12]}'
    for model, number in checked['models'].items()
    if not number
  ]
  for name in ('evictions', 'extends', 'hits', 'misses'):
    if not metrics[f'{_FIRST}{name}']:
      checked['wrong'].append(f'there were no {name}: nothing was tested')
  if budget['used'] > budget['limit']:
    checked['wrong'].append(f'the budget was exceeded: {budget}')
  progress(
    f'{checked["scores"]} scores of {len(scorers)} models, the largest '
    f'difference {checked["largest"]:.2f} of the bound; '
    f'{metrics[f"{_FIRST}evictions"]:.0f} evictions, '
    f'{metrics[f"{_FIRST}extends"]:.0f} extensions, '
    f'{sum(x.sent - 1 for x in records)} histories sent again'
  )
  return {
    'rate': rate,
    'load': found,
    'server': metrics,
    'budget': budget,
    'check': checked,
  }


def _switch(link: pathlib.Path, target: str | os.PathLike[str]) -> None:
  """Makes a link, or changes it; at no time there is none."""
  new = link.with_name(f'{link.name}.new')
  new.symlink_to(os.path.abspath(target))
  os.replace(new, link)


def _watch(budget: dict[str, float], server: load_client.Served) -> None:
  """Adds to the most that was seen."""
  found = load_client.metrics(server.url)
  now = {
    'used': found[f'{_FIRST}used_bytes'],
    'device': found[f'{_FIRST}device_bytes'],
    'host': found[f'{_FIRST}host_bytes'],
    'limit': found[f'{_FIRST}limit_bytes'],
    'process': server.resident_bytes(),
  }
  for name, value in now.items():
    budget[name] = max(value, budget.get(name, 0.0))


def _line(rate: float, found: dict[str, Any]) -> str:
  line = f'  {rate:7.2f}/s: {found["answered"]} of {found["requests"]} answered'
  if 'p99' in found:
    line += (
      f', p50 {found["p50"]:.1f} ms, p99 {found["p99"]:.1f} ms, '
      f'batches of {found["batch_size"]:.1f}, {found["sources"]}'
    )
  if 'hit_rate' in found:
    line += ', hits {measured:.3f}, ideal {ideal:.3f}'.format(
      **found['hit_rate']
    )
  return line
