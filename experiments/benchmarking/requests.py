"""The suite `request`: whole models, ids in and logits out, in host memory."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarking import machine, rankers, report, request_calls
from benchmarking.request_calls import DEPTHS, Call, Contender, Pending
from benchmarking.workloads import REQUEST, Request

SUITES: dict[str, dict[str, Request]] = {'request': REQUEST}
Submit = Callable[[int], Pending]
_RING = 16  # Different requests, in turns.
_CHECKED = (0, 1)  # Of them, against the reference: no graph may hold its ids.
_PATIENCE = 20  # Times `seconds`, until `calls` are no longer waited for.


def run(
  suite: str,
  named: Mapping[str, Request],
  contenders: Sequence[str] | None = None,
  *,
  repeats: int = 15,
  seconds: float = 1.0,
  calls: int | None = None,
  progress: Callable[[str], None] = print,
  save: Callable[[Mapping[str, Any]], Any] | None = None,
) -> dict[str, Any]:
  """Checks contenders against the float32 reference, then times them.

  Args:
    suite: 'request'.
    named: workloads by name.
    contenders: their names, see `request_calls.make`; None: 'histjax', 'torch'
      and 'floor'. A contender or a call of it that fails is reported so.
    repeats: rounds, in which contenders take turns.
    seconds: the least time spent on each call, over all rounds.
    calls: the least number of 'score', within 20 times `seconds`, and a tenth
      of it of the other calls; None: 10,000 on accelerators, 1 on a CPU.
    progress: called with a line at a time.
    save: called with the report so far after each workload, of which one takes
      minutes.

  Returns:
    A JSON-able report: `suite`, `environment` and `results`, one per workload:
    `name`, `workload`, `contenders` and `ratios`. Of a contender `runs`, the
    implementations used, by call `relative_error`, `p50`, `p99`, `calls` and
    `rate`, and `in_flight`, requests a second by their number in flight; or
    `failed`, of all of it or of a call. See `ratios`.
  """
  on_cpu = jax.default_backend() == 'cpu'
  if calls is None:
    calls = 1 if on_cpu else 10_000
  times = _Times(repeats, seconds, calls)
  results: list[dict[str, Any]] = []
  found = {
    'suite': suite,
    'environment': machine.environment() | machine.clocks(),
    'results': results,
  }
  for name, workload in named.items():
    entry = _compare(
      name,
      workload,
      contenders or ('histjax', 'torch', 'floor'),
      times,
      progress,
    )
    results.append(entry)
    progress(report.request_table(entry))
    if save is not None:
      save(found)
  return found


@dataclasses.dataclass(frozen=True)
class _Times:
  repeats: int
  seconds: float
  calls: int


def _compare(name, workload, contenders, times, progress) -> dict[str, Any]:
  variables = rankers.variables(workload)
  requests = [rankers.inputs(workload, seed) for seed in range(_RING)]
  expected = rankers.expected(workload, variables, requests, _CHECKED)
  rows: dict[str, dict[str, Any]] = {}
  calls: dict[tuple[str, str], Call] = {}
  flights: dict[tuple[str, int, str], Submit] = {}
  for contender in contenders:
    start = time.perf_counter()
    row = rows[contender] = {}
    try:
      made = request_calls.make(contender, workload, variables, requests)
    except Exception as e:  # One that is missing is a result.
      row['failed'] = _told(e)
      progress(f'  {name} {contender}: {row["failed"]}')
      continue
    bound = _bound(contender, workload)
    for call in rankers.CALLS:
      try:
        calls[contender, call] = made.call(call)
        row[call] = _check(calls[contender, call], expected[call], bound)
      except Exception as e:
        row[call] = {'failed': _told(e)}
      if 'failed' in row[call]:
        calls.pop((contender, call), None)
        progress(f'  {name} {contender} {call}: {row[call]["failed"]}')
    if (contender, 'score') in calls:
      try:
        found = _flights(made, calls[contender, 'score'], bound)
        flights |= {(contender, *key): submit for key, submit in found.items()}
        row['in_flight'] = {}
      except Exception as e:
        row['in_flight'] = {'failed': _told(e)}
        progress(
          f'  {name} {contender} in flight: {row["in_flight"]["failed"]}'
        )
    row['runs'] = made.runs
    seconds = time.perf_counter() - start
    progress(f'  {name} {contender}: ready after {seconds:.1f} s')
  _time(rows, calls, flights, times)
  return {
    'name': name,
    'workload': dataclasses.asdict(workload),
    'contenders': rows,
    'ratios': ratios(rows),
  }


def _bound(contender: str, workload: Request) -> float:
  if contender == 'floor':
    return np.inf
  in_8_bits = request_calls.CACHE_DTYPES.get(contender.partition(':')[0])
  return rankers.bound('bfloat16' if in_8_bits else workload.dtype)


def _told(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0][:200] if lines else ""}'


def _check(call: Call, expected: list[rankers.Logits], bound: float):
  """The relative error of the first requests, and whether it is too large."""
  errors = [
    rankers.difference(call.run(i, call.prepare(i)), logits)
    for i, logits in zip(_CHECKED, expected, strict=True)
  ]
  error = float(np.max(errors))  # NaN is an error, too.
  row: dict[str, Any] = {}
  if np.isfinite(bound):
    row['relative_error'] = error
    if not error <= bound:
      row['failed'] = f'wrong: relative error {error:.1e}'
  return row


def _flights(made: Contender, call: Call, bound: float):
  """By depth and way, what starts a request; all give what `call` gives."""
  flights: dict[tuple[int, str], Submit] = {}
  expected = [
    {k: np.array(v) for k, v in call.run(i, call.prepare(i)).items()}
    for i in range(_RING)
  ]
  for depth in DEPTHS:
    for way, submit in made.pipelines(depth):
      for i, logits in enumerate(_in_flight(submit, depth, _RING)):
        error = rankers.difference(logits, expected[i])
        if not error <= bound:
          raise ValueError(
            f'wrong: {depth} in flight, {way}: relative error {error:.1e}'
          )
      flights[depth, way] = submit
  return flights


def _in_flight(submit: Submit, depth: int, number: int):
  """Logits of `number` requests, never more than `depth` in flight."""
  pending: collections.deque[Pending] = collections.deque()
  for i in range(number):
    if len(pending) == depth:
      yield pending.popleft().result()
    pending.append(submit(i))
  while pending:
    yield pending.popleft().result()


def _time(rows, calls, flights, times: _Times) -> None:
  """Adds times to rows; contenders take turns."""
  seconds: dict[Any, list[float]] = {key: [] for key in calls}
  rates: dict[Any, list[float]] = {key: [] for key in flights}
  for turn in range(1, times.repeats + 1):
    for key, call in calls.items():
      least = times.calls if key[1] == 'score' else times.calls / 10
      share = turn / times.repeats
      _sample(call, seconds[key], share * times.seconds, share * least)
    for key, submit in flights.items():
      each = float(np.median(seconds[key[0], 'score']))
      number = max(2 * key[1], int(times.seconds / times.repeats / each))
      start = time.perf_counter()
      collections.deque(_in_flight(submit, key[1], number), maxlen=0)
      rates[key].append(number / (time.perf_counter() - start))
  for (contender, call), values in seconds.items():
    rows[contender][call] |= {
      'p50': float(np.percentile(values, 50)),
      'p99': float(np.percentile(values, 99)),
      'rate': 1 / float(np.mean(values)),
      'calls': len(values),
    }
  for (contender, depth, way), values in rates.items():
    found, rate = rows[contender]['in_flight'], float(np.median(values))
    if rate > found.get(str(depth), 0):
      found[str(depth)] = rate
      rows[contender]['runs'][f'{depth} in flight'] = way


def _sample(
  call: Call, found: list[float], seconds: float, calls: float
) -> None:
  """Adds at least a sample, until there are so many seconds and calls."""
  for i in range(2):  # On a CPU, threads of the one before still spin a while.
    call.run(i, call.prepare(i))
  total, first = sum(found), True
  while first or (
    total < _PATIENCE * seconds and (total < seconds or len(found) < calls)
  ):
    index = len(found) % _RING
    prepared = call.prepare(index)
    start = time.perf_counter()
    call.run(index, prepared)
    found.append(time.perf_counter() - start)
    total, first = total + found[-1], False


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """How many times faster the library is than the best rival in each.

  Args:
    rows: contenders of a workload; rivals are PyTorch's.

  Returns:
    By contender of the library and call, of `p50` and `p99`; by number
    `in_flight`, of requests a second; and `extend and score over score`, the
    p50 of the one over that of the other, its own both.
  """
  rivals = [row for name, row in rows.items() if name.startswith('torch')]
  found: dict[str, dict[str, Any]] = {}
  for name, row in rows.items():
    if not name.startswith('histjax') or 'failed' in row:
      continue
    own = found[name] = {}
    for call in rankers.CALLS:
      own[call] = {
        part: min(x[call][part] for x in timed) / row[call][part]
        for part in ('p50', 'p99')
        if part in row[call]
        and (timed := [x for x in rivals if part in x.get(call, {})])
      }
    own['in_flight'] = {
      depth: rate / max(x['in_flight'][depth] for x in timed)
      for depth, rate in row.get('in_flight', {}).items()
      if depth != 'failed'
      and (timed := [x for x in rivals if depth in x.get('in_flight', {})])
    }
    score, extend = (row[call].get('p50') for call in rankers.CALLS[::2])
    if score and extend:
      own['extend and score over score'] = extend / score
  return found
