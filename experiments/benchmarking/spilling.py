"""Ways to cut a log by user on disk: the library's, DuckDB's and Polars'."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import multiprocessing
import pathlib
import shutil
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import event_log
from benchmarking import machine, memory, preparing
from histjax import config as config_lib
from histjax.data import datasets, files, workers
from histjax.data.prepare import stages
from histjax.data.prepare.job import Job


def run(
  values: dict[str, Any],
  log: event_log.LogConfig,
  folder: pathlib.Path,
  *,
  partitions: int = 64,
  num_workers: int = 2,
) -> dict[str, Any]:
  """Times each in a process of its own, on a log that is written if need be.

  The library's checks and encodes what it reads; the others copy columns as
  they are. One that is not installed is reported with its error.

  Args:
    values: of a config, whose log has the columns of `event_log`.
    log: to cut.
    folder: to work in; `log/` is left there.
    partitions: of users.
    num_workers: processes, or threads.

  Returns:
    A JSON-able report: `suite`, `environment`, `log`, `partitions`, `workers`
    and `contenders`, of each `seconds`, `cpu_seconds` of all cores,
    `peak_bytes` and `spill_bytes`.
  """
  event_log.write(folder / 'log', log, num_workers=num_workers)
  found: dict[str, Any] = {}
  contenders: dict[str, Callable[..., None]] = {
    'histjax': functools.partial(_histjax, values['data']),
    'duckdb': _duckdb,
    'polars': _polars,
  }
  for name, function in contenders.items():
    out = folder / 'spill'
    shutil.rmtree(out, ignore_errors=True)
    context = multiprocessing.get_context('spawn')
    with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
      task = pool.submit(
        _timed, function, folder / 'log', out, partitions, num_workers
      )
      try:
        found[name] = task.result()
      except Exception as error:  # One that is missing is a result.
        found[name] = {'failed': f'{type(error).__name__}: {error}'}
        continue
    if name != 'histjax':
      found[name]['version'] = importlib.metadata.version(name)
    paths = [p for p in out.rglob('*') if p.is_file()]
    found[name]['spill_bytes'] = sum(p.stat().st_size for p in paths)
    shutil.rmtree(out)
  return {
    'suite': 'spill',
    'environment': machine.environment(),
    'log': dataclasses.asdict(log),
    'partitions': partitions,
    'workers': num_workers,
    'contenders': found,
    'results': [],
  }


def table(report: dict[str, Any]) -> str:
  """Who cuts a log by user, for what time and memory, as Markdown."""
  lines = [
    '| | events a second of CPU time | peak memory |',
    '| --- | --- | --- |',
  ]
  for name, told in report['contenders'].items():
    if 'failed' not in told:
      events = report['log']['num_events']
      cells = [
        f'{name} {told["version"]}' if 'version' in told else name,
        preparing.rounded(events / told['cpu_seconds']),
        f'{told["peak_bytes"] / 2**30:.2f} GiB',
      ]
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _timed(function, log, out, partitions, num_workers) -> dict[str, Any]:
  start, spent = time.perf_counter(), memory.cpu_seconds()
  with memory.PeakMemory(0.5) as peak:
    function(log, out, partitions, num_workers)
  return {
    'seconds': time.perf_counter() - start,
    'cpu_seconds': memory.cpu_seconds() - spent,
    'peak_bytes': peak.bytes,
  }


def _histjax(data, log, out, partitions: int, num_workers: int) -> None:
  data = {**data, 'source': {**data['source'], 'paths': [str(log)]}}
  paths = tuple(map(str, files.with_header([str(log)])))
  job = Job(
    folder=out,
    data=config_lib.from_dict(datasets.DataConfig, data),
    files=paths,
    num_shards=partitions,
    num_ranges=1,
    run_bytes=2**26,
  )
  step = functools.partial(stages.spill, job)
  with workers.Pool(num_workers) as pool:
    for _ in pool.each(step, range(len(paths))):
      pass


def _duckdb(log, out, partitions: int, num_workers: int) -> None:
  import duckdb

  connection = duckdb.connect()
  connection.execute(f"SET threads={num_workers}; SET memory_limit='2GB'")
  connection.execute('SET preserve_insertion_order=false')
  connection.execute(
    f'COPY (SELECT *, hash("user") % {partitions} AS shard FROM '
    f"read_parquet('{log}/**/*.parquet', filename=true, file_row_number=true))"
    f" TO '{out}' (FORMAT parquet, PARTITION_BY (shard))"
  )


def _polars(log, out, partitions: int, num_workers: int) -> None:
  import os

  os.environ['POLARS_MAX_THREADS'] = str(num_workers)
  import polars as pl

  shard = (pl.col('user').hash() % partitions).alias('shard')
  rows = pl.scan_parquet(f'{log}/**/*.parquet', row_index_name='row')
  rows.with_columns(shard).sink_parquet(
    pl.PartitionBy(str(out), key='shard', include_key=False),
    mkdir=True,
    engine='streaming',
  )
