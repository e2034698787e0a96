"""Training on one log, its events grouped into rows in several ways.

'pointwise', 'request' and 'streaming' are kinds of rows, 'packed' streaming
rows that share rows of a batch. The encoder's window is such that a score does
not depend on the kind, so all have one loss and one gradient, which is checked
before anything is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from benchmarking import timing, workloads
from histjax import schema as schema_lib
from histjax.models.ranker import Ranker, RankerConfig
from histjax.nn.encoder import EncoderConfig
from histjax.training import losses
from histjax.training import optimizer as optimizer_lib
from histjax.training import state as state_lib
from histjax.training import step as step_lib
from histjax.types import RankingBatch

if TYPE_CHECKING:  # They need the packages that read data; other suites do not.
  from histjax.data import pipeline
  from histjax.data import rows as rows_lib
  from histjax.data.events import EventLog

KINDS = ('pointwise', 'request', 'streaming', 'packed')
_CHECKED_USERS = 3
# On a GPU XLA tries some dozen kernels for each of 64 products: minutes for a
# shape, of which there are several. So cuBLAS picks them by its own rules.
_UNTUNED: dict[str, Any] = {
  'xla_gpu_autotune_level': 0,
  'xla_gpu_enable_triton_gemm': False,
}
# Float32 sums in another order, through two layers and Adam's input; PyTorch's
# products on a CPU are no less exact.
_LOSS_ERROR, _GRADIENT_ERROR = 1e-5, 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped:
  """A kind of rows, and how they become batches.

  Attributes:
    kind: of `KINDS`.
    rows: of all users.
    buckets: of an epoch.
  """

  kind: str
  rows: rows_lib.Rows
  buckets: list[pipeline.Bucket]

  def batch(self, number: int) -> RankingBatch:
    """The first batch of a bucket."""
    bucket = self.buckets[number]
    units = bucket.units[: bucket.num_rows]
    return bucket.batch(self.rows, units, bucket.num_rows)

  def padding(self) -> dict[str, float]:
    """The shares of slots that are padding, of candidates and of both."""
    shown = sum(
      b.num_batches * b.num_rows * b.num_candidates for b in self.buckets
    )
    events = sum(
      b.num_batches * b.num_rows * b.num_events for b in self.buckets
    )
    real = int(self.rows.candidate_counts.sum())
    past = int(self.rows.history_lengths.sum())
    return {
      'candidates': 1 - real / shown,
      'all': 1 - (real + past) / (shown + events),
    }


def schema(workload: workloads.TrainRows) -> schema_lib.Schema:
  """Of the log: as many features as a small real ranker has."""
  return schema_lib.Schema(
    user='user',
    time='time',
    request='request',
    context=(
      schema_lib.Categorical('user', workload.num_users),
      schema_lib.Dense('age'),
    ),
    item=(
      schema_lib.Categorical('item', workload.num_items),
      schema_lib.Categorical('category', 1000),
      schema_lib.Dense('duration'),
    ),
    action=(schema_lib.Categorical('rating', 5),),
    tasks=(schema_lib.Task('click'), schema_lib.Task('like')),
  )


def config(workload: workloads.TrainRows) -> RankerConfig:
  """Of the model; its window makes all kinds of rows equal."""
  layers = workload.num_layers
  return RankerConfig(
    schema=schema(workload),
    encoder=EncoderConfig(
      num_layers=layers,
      width=workload.width,
      num_heads=workload.num_heads,
      window=(workload.history_length - 1) // layers + 1,
    ),
    dtype=workload.dtype,
  )


def log_of(workload: workloads.TrainRows) -> EventLog:
  """Random features; users in requests of `workload.request` events."""
  from histjax.data.events import EventLog

  rng = np.random.default_rng(0)
  count = workload.counts()
  n, spec = int(count.sum()), schema(workload)
  user = np.repeat(np.arange(len(count), dtype=np.int32), count)
  ordinal = np.arange(n) - np.repeat(np.cumsum(count) - count, count)
  request = ordinal // workload.request
  per_user = rng.normal(size=len(count)).astype(np.float32)
  features: dict[str, np.ndarray] = {'user': user, 'age': per_user[user]}
  for feature in (*spec.item, *spec.action):
    if isinstance(feature, schema_lib.Categorical):
      features[feature.name] = rng.integers(0, feature.size, n, np.int32)
    else:
      features[feature.name] = rng.normal(size=n).astype(np.float32)
  first = np.flatnonzero(np.diff(user.astype(np.int64), prepend=-1))
  return EventLog(
    schema=spec,
    keys=np.arange(len(count)),
    user=user,
    time=request.astype(np.int64),
    is_timestamp=False,
    features=features,
    labels={
      task.name: rng.integers(0, 2, n).astype(np.float32) for task in spec.tasks
    },
    request=request + np.repeat(first, count),
    extra={},
  )


def group(log: EventLog, workload: workloads.TrainRows, kind: str) -> Grouped:
  """All events as candidates, in batches of one kind of rows."""
  from histjax.data import pipeline

  rows = _rows(log, workload, kind, np.ones(len(log), bool))
  options = pipeline.PipelineConfig(
    batch_events=workload.batch_events,
    auto_buckets=workload.auto_buckets,
    pack=kind == 'packed',
  )
  return Grouped(kind, rows, pipeline.make_buckets(rows, options))


def _rows(log, workload, kind, mask) -> rows_lib.Rows:
  from histjax.data import rows as rows_lib

  several = kind in ('streaming', 'packed')
  made: Any = rows_lib.RowConfig(
    kind='streaming' if several else kind,  # type: ignore[arg-type]
    history_length=workload.history_length,
    max_candidates=workload.max_candidates if several else None,
  )
  return rows_lib.make_rows(log, mask, made)


def checked_batches(
  log: EventLog, workload: workloads.TrainRows, kinds: Iterable[str]
) -> dict[str, RankingBatch]:
  """All events of some users, in a batch of each of these kinds."""
  users = np.unique(log.user, return_counts=True)[1].argsort(kind='stable')
  # Short ones, which are what is packed.
  mask = np.isin(log.user, users[len(users) // 4 :][:_CHECKED_USERS])
  found = {}
  for kind in kinds:
    rows = _rows(log, workload, kind, mask)
    length, count = rows.history_lengths, rows.candidate_counts
    pieces = [len(rows)] if kind == 'packed' else None
    found[kind] = rows.batch(
      np.arange(len(rows)),
      num_rows=len(pieces or length),
      num_events=int(length.sum() if pieces else max(1, length.max())),
      num_candidates=int(count.sum() if pieces else count.max()),
      pieces=pieces,
    )
  return found


def gradients(
  workload: workloads.TrainRows, batches: Mapping[str, RankingBatch]
) -> tuple[Any, dict[str, tuple[float, Any]]]:
  """Variables, and of each batch the loss and its gradient, in float32."""
  model = Ranker(dataclasses.replace(config(workload), dtype='float32'))
  some = next(iter(batches.values()))
  jit = functools.partial(jax.jit, compiler_options=_UNTUNED)
  variables = jit(model.init)(jax.random.key(0), some)

  @jit
  def run(variables, batch):
    def loss(variables):
      logits: Any = model.apply(variables, batch)
      return losses.batch_loss(logits, batch)

    return jax.value_and_grad(loss)(variables)

  with jax.default_matmul_precision('highest'):
    found = {
      kind: jax.device_get(run(variables, batch))
      for kind, batch in batches.items()
    }
  return jax.device_get(variables), {
    k: (float(x), g) for k, (x, g) in found.items()
  }


def errors(
  found: tuple[float, Any], wanted: tuple[float, Any]
) -> dict[str, float]:
  """Relative ones of loss and gradient.

  Raises:
    ValueError: they are too large to compare times.
  """
  loss = abs(found[0] - wanted[0]) / abs(wanted[0])
  mine, theirs = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    for tree in (found[1], wanted[1])
  )
  gradient = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
  if not (loss < _LOSS_ERROR and gradient < _GRADIENT_ERROR):
    raise ValueError(
      f'the loss differs by {loss:.1e} and the gradient by {gradient:.1e} from '
      'those of pointwise rows: these are not equal updates'
    )
  return {'loss': loss, 'gradient': gradient}


def updates(
  workload: workloads.TrainRows, grouped: Grouped
) -> list[Callable[[], Any]]:
  """An update by Adam for each bucket, batches copied from the host.

  On a GPU XLA picks products by rules, not by timing them; see `_UNTUNED`.
  """
  model = Ranker(config(workload))
  optimizer = optimizer_lib.make_optimizer(
    optimizer_lib.OptimizerConfig(
      table_optimizer='lazy_adam', table_learning_rate=1e-3
    )
  )
  state = state_lib.create_state(model, optimizer, schema(workload), seed=0)
  step: Any = step_lib.make_train_step(model, optimizer, schema(workload))
  batches = [grouped.batch(i) for i in range(len(grouped.buckets))]
  lowered = [step.lower(state, batch) for batch in batches]
  with futures.ThreadPoolExecutor() as pool:
    steps = list(pool.map(lambda x: x.compile(_UNTUNED), lowered))

  def update(step, batch):
    def call():
      nonlocal state
      state = step(state, batch)
      return state.window.loss

    return call

  return [update(*x) for x in zip(steps, batches, strict=True)]


def time_in_turns(
  calls: Mapping[str, list[Callable[[], Any]]], repeats: int, seconds: float
) -> dict[str, list[float]]:
  """The median seconds of each call, in turns."""
  times: dict[tuple[str, int], list[float]] = {}
  for name, several in calls.items():
    for number, call in enumerate(several):
      timing.samples(call, 0)  # Compiles, and touches memory.
      times[name, number] = []
  for _ in range(repeats):
    for (name, number), found in times.items():
      found.extend(timing.samples(calls[name][number], seconds / repeats))
  return {
    name: [float(np.median(times[name, i])) for i in range(len(several))]
    for name, several in calls.items()
  }


def summary(grouped: Grouped, steps: list[float]) -> dict[str, Any]:
  """An epoch's rate, of the time of a batch of each bucket.

  Returns:
    `impressions_per_second`; `padding`; `input_share`, the time that one
    thread takes to make the batches over that of the steps, which it overlaps;
    `shapes`, by bucket its sizes, batches and seconds.
  """
  makes = []
  for number in range(len(grouped.buckets)):
    start = time.perf_counter()
    for _ in range(3):
      grouped.batch(number)
    makes.append((time.perf_counter() - start) / 3)
  batches = [b.num_batches for b in grouped.buckets]
  epoch = float(np.dot(batches, steps))
  return {
    'impressions_per_second': int(grouped.rows.candidate_counts.sum()) / epoch,
    'epoch_seconds': epoch,
    'input_share': float(np.dot(batches, makes)) / epoch,
    'padding': grouped.padding(),
    'shapes': [
      {
        'num_rows': b.num_rows,
        'num_events': b.num_events,
        'num_candidates': b.num_candidates,
        'num_batches': b.num_batches,
        'seconds': seconds,
      }
      for b, seconds in zip(grouped.buckets, steps, strict=True)
    ],
  }


def check_contenders(contenders: Sequence[str]) -> None:
  """Raises ValueError at a name that nobody has."""
  known = [f'histjax:{kind}' for kind in KINDS]
  known += ['torch:pointwise', 'torch:streaming']
  for name in contenders:
    if name not in known:
      raise ValueError(f'contender {name!r} is unknown; use some of {known}')


def run(
  workload: workloads.TrainRows,
  contenders: list[str],
  *,
  repeats: int,
  seconds: float,
  progress: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
  """By contender, `summary` and the `errors` of its loss and gradient.

  Args:
    workload: the log and the model.
    contenders: 'histjax:<kind>' and 'torch:<kind>', for `KINDS`; PyTorch has
      'pointwise' and 'streaming' alone.
    repeats: rounds.
    seconds: the least time spent on each bucket's update, over all rounds.
    progress: called with a line at a time.

  Raises:
    ValueError: a contender is unknown, or computes something else.
  """
  check_contenders(contenders)
  begin = time.perf_counter()

  def say(what):
    progress(f'  {time.perf_counter() - begin:5.0f} s  {what}')

  log = log_of(workload)
  kinds = ['pointwise', *(name.partition(':')[2] for name in contenders)]
  checked = checked_batches(log, workload, dict.fromkeys(kinds))
  say(f'{len(log)} events; gradients of {", ".join(checked)} rows in float32')
  variables, found = gradients(workload, checked)
  rows: dict[str, dict[str, Any]] = {}
  calls: dict[str, list[Callable[[], Any]]] = {}
  groups: dict[str, Grouped] = {}
  for name in contenders:
    owner, _, kind = name.partition(':')
    if kind not in groups:
      groups[kind] = group(log, workload, kind)
    say(f'{name}: {len(groups[kind].buckets)} shapes')
    if owner == 'histjax':
      computed = found[kind]
      calls[name] = updates(workload, groups[kind])
    else:
      try:
        from benchmarking import torch_training  # Not a dependency.
      except ImportError as error:
        rows[name] = {'failed': f'ImportError: {error}'}
        continue
      computed = torch_training.loss_and_gradient(
        config(workload), variables, checked[kind]
      )
      calls[name] = torch_training.updates(
        config(workload),
        variables,
        [groups[kind].batch(i) for i in range(len(groups[kind].buckets))],
      )
    rows[name] = {'errors': errors(computed, found['pointwise'])}
  say('first updates, then all in turns')
  for name, steps in time_in_turns(calls, repeats, seconds).items():
    rows[name] |= summary(groups[name.partition(':')[2]], steps)
  return rows


def table(entry: Mapping[str, Any]) -> str:
  """A workload's contenders, and how they compare to pointwise rows."""
  rows = entry['contenders']
  base = rows.get('histjax:pointwise', {}).get('impressions_per_second')
  lines = [
    f'{entry["name"]}: {entry["workload"]}',
    f'  {"contender":20} {"impressions/s":>13} {"times":>7} '
    f'{"padding":>8} {"cand.":>6} {"input":>6} {"shapes":>6} {"error":>8}',
  ]
  for name, row in rows.items():
    if 'failed' in row:
      lines.append(f'  {name:20} failed: {row["failed"]}')
      continue
    rate = row['impressions_per_second']
    ratio = '' if base is None else f'{rate / base:.1f}'
    lines.append(
      f'  {name:20} {rate:>13.0f} {ratio:>7} {row["padding"]["all"]:>8.1%} '
      f'{row["padding"]["candidates"]:>6.1%} {row["input_share"]:>6.1%} '
      f'{len(row["shapes"]):>6} {row["errors"]["gradient"]:>8.1e}'
    )
  return '\n'.join(lines)


def plot(report: Mapping[str, Any]):
  """Bars of impressions a second by contender, a panel for each log.

  Returns:
    A matplotlib figure, logarithmic.
  """
  from matplotlib import figure as figure_lib

  results = [r for r in report['results'] if 'num_users' in r['workload']]
  figure = figure_lib.Figure(
    figsize=(4.2 * max(1, len(results)), 3.2), layout='constrained'
  )
  axes = figure.subplots(1, max(1, len(results)), squeeze=False)[0]
  for entry, axis in zip(results, axes, strict=False):
    rows = {k: v for k, v in entry['contenders'].items() if 'failed' not in v}
    rates = [row['impressions_per_second'] for row in rows.values()]
    colors = ['C1' if name.startswith('torch') else 'C0' for name in rows]
    bars = axis.bar(list(rows), rates, color=colors)
    axis.bar_label(bars, [f'{rate:.3g}' for rate in rates], fontsize=7)
    axis.set(yscale='log', ylabel='impressions/s', title=entry['name'])
    axis.tick_params(axis='x', labelrotation=45, labelsize=7)
    axis.grid(alpha=0.3, axis='y')
  figure.suptitle(
    f'{report["suite"]}, {report["environment"]["device"]}', fontsize=10
  )
  return figure
