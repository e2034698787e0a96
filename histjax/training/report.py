"""The progress line, TensorBoard scalars and files of metrics of a run."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from histjax import metrics
from histjax.training import integrity

METRICS_FILE = 'metrics.json'
HISTORY_FILE = 'metrics.jsonl'


class Reporter:
  """Tells the user how a run is going; use as a context manager.

  On a terminal the progress line is overwritten in place; elsewhere each is
  a line of its own.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    num_steps: int,
    *,
    start: int = 0,
    tensorboard: bool = True,
    stream: TextIO | None = None,
    quiet: bool = False,
  ):
    """Starts the clock.

    Args:
      workdir: of the run; scalars go to its folder 'tensorboard'.
      num_steps: of the whole run.
      start: the step that the run goes on from; later scalars of an earlier
        attempt are hidden.
      tensorboard: whether to write scalars.
      stream: where lines go; None: stdout.
      quiet: write nothing at all, as all processes but the first do.

    Raises:
      ImportError: `tensorboard` without tensorboardX.
    """
    self._num_steps = num_steps
    self._reported = start
    self._stream = sys.stdout if stream is None else stream
    self._quiet = quiet
    self._open_line = False
    self._writer: Any = None
    if tensorboard and not quiet:
      self._writer = tensorboard_writer()(
        str(workdir / 'tensorboard'), purge_step=start + 1
      )
    self._busy = 0.0
    self._since = time.monotonic()

  def __enter__(self) -> Reporter:
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self._end_line()
    if self._writer is not None:
      self._writer.close()

  def pause(self) -> None:
    """Stops the clock; what follows is not training."""
    self._busy += time.monotonic() - self._since

  def resume(self) -> None:
    """Starts the clock again."""
    self._since = time.monotonic()

  def progress(
    self, step: int, *, loss: float, steps: int, candidates: int, shapes: int
  ) -> None:
    """Reports the training since the last time.

    Args:
      step: updates made so far.
      loss: the mean over these steps.
      steps: how many; some may be of before the run went on, whose time is
        not known.
      candidates: how many were trained on.
      shapes: batch shapes seen, each of which was compiled.
    """
    self.pause()
    seconds, self._busy = max(self._busy, 1e-9), 0.0
    self.resume()
    steps_rate = (step - self._reported) / seconds
    candidates_rate = candidates / steps * steps_rate
    self._reported = step
    left = (self._num_steps - step) / steps_rate
    share = step / self._num_steps
    self._line(
      f'step {step}/{self._num_steps} ({share:.0%})  loss {loss:.4f}  '
      f'{_si(candidates_rate)} candidates/s  {_si(steps_rate)} '
      f'steps/s  {shapes} shapes  ETA {clock(left)}',
      last=step >= self._num_steps,
    )
    self.scalars(
      step,
      {
        'train/loss': loss,
        'train/candidates_per_second': candidates_rate,
        'train/steps_per_second': steps_rate,
      },
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes values, named `<what>/<name>`, to TensorBoard."""
    if self._writer is not None:
      for name, value in values.items():
        if math.isfinite(value):
          self._writer.add_scalar(name, value, step)
      self._writer.flush()

  def message(self, text: str) -> None:
    """Writes a line that stays."""
    self._end_line()
    if not self._quiet:
      print(text, file=self._stream, flush=True)

  def _line(self, text: str, *, last: bool) -> None:
    if self._quiet:
      return
    if self._stream.isatty():
      print(f'\r\x1b[K{text}', end='', file=self._stream, flush=True)
      self._open_line = True
      if last:
        self._end_line()
    else:
      print(text, file=self._stream, flush=True)

  def _end_line(self) -> None:
    if self._open_line:
      print(file=self._stream, flush=True)
      self._open_line = False


def tensorboard_writer() -> Any:
  """The class `tensorboardX.SummaryWriter`.

  Raises:
    ImportError: it is not installed; the message says how to.
  """
  try:
    import tensorboardX  # Of the extra `experiments`, so not at the top.
  except ImportError as e:
    raise ImportError(
      'tensorboard=True needs tensorboardX: pip install '
      "'histjax[experiments]', or set tensorboard=False"
    ) from e
  return tensorboardX.SummaryWriter


def format_metrics(values: Mapping[str, float]) -> str:
  """`name value` of each, for a line."""
  return '  '.join(f'{name} {value:.4f}' for name, value in values.items())


def format_validation(
  values: Mapping[str, float],
  best: Mapping[str, float],
  weights: Mapping[str, float],
) -> str:
  """The metrics that decide, the best values of these, and log losses.

  What is said of a task is what decides and its AUC and log loss; tasks that
  do not decide are in `HISTORY_FILE` alone, as all metrics are.

  Args:
    values: of this validation, `{'task/metric': value}`.
    best: of the best one so far.
    weights: what decides, see `metrics.criterion`.
  """
  deciding = [
    f'{name} {values[name]:.4f}'
    + (f' (best {best[name]:.4f})' if best is not values else '')
    for name in weights
  ]
  tasks = dict.fromkeys(name.rsplit('/', 1)[0] for name in weights)
  others = {
    name: values[name]
    for name in (f'{t}/{m}' for t in tasks for m in ('auc', 'logloss'))
    if name not in weights
  }
  if len(weights) > 1:
    total = metrics.criterion(values, weights)
    deciding.append(f'weighted {total:.4f}')
    if best is not values:
      deciding[-1] += f' (best {metrics.criterion(best, weights):.4f})'
  text = f'by {"  ".join(deciding)}'
  return f'{text}; {format_metrics(others)}' if others else text


def metrics_table(values: Mapping[str, float]) -> str:
  """A line for each task, a column for each metric."""
  rows: dict[str, dict[str, float]] = {}
  for name, value in values.items():
    task, metric = name.rsplit('/', 1)
    rows.setdefault(task, {})[metric] = value
  width = max(map(len, rows), default=0)
  return '\n'.join(
    f'  {task:<{width}}  {format_metrics(row)}' for task, row in rows.items()
  )


def write_history(
  workdir: pathlib.Path, history: Sequence[Mapping[str, Any]]
) -> None:
  """Writes metrics.jsonl, a line for each entry; NaN becomes null."""
  lines = [
    json.dumps(_without_nan(entry), allow_nan=False) for entry in history
  ]
  _write(workdir / HISTORY_FILE, ''.join(f'{line}\n' for line in lines))


def write_metrics(workdir: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes metrics.json; see `write_json`."""
  write_json(workdir / METRICS_FILE, {**values, 'format': integrity.FORMAT})


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes a JSON file, whole or not at all; NaN becomes null."""
  text = json.dumps(_without_nan(values), indent=2, allow_nan=False)
  _write(path, text + '\n')


def _write(path: pathlib.Path, text: str) -> None:
  temporary = path.with_suffix(f'.{os.getpid()}.tmp')
  try:
    temporary.write_text(text)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)  # As when the disk is full.


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """What `write_json` wrote; null stays None.

  Raises:
    ValueError: it is no JSON, or no dict; the message names the file.
  """
  try:
    values = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(
      f'{path} is no JSON ({e}); it was changed or cut off: put it back, or '
      'delete it'
    ) from e
  if not isinstance(values, dict):
    raise ValueError(f'{path} has no dict, but {type(values).__name__}')
  return values


def read_metrics(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What `write_metrics` wrote; null becomes NaN in metrics. None: nothing.

  Raises:
    ValueError: the file is not one of ours, or of another version.
  """
  path = workdir / METRICS_FILE
  if not path.exists():
    return None
  try:
    values = read_json(path)
    found = values.pop('format', None)
    for split in ('validation', 'test'):
      values[split] = _with_nan(values[split])
    for entry in values['history']:
      if 'validation' in entry:
        entry['validation'] = _with_nan(entry['validation'])
    if found is not None:  # Older ones have no fingerprint.
      values['config'], values['fingerprint']  # They tell runs apart.
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(
      f'{path} was not written by this version of histjax ({e!r}); name '
      'another workdir, or delete the file to train again'
    ) from e
  integrity.check_format(path, found)
  return values


def _without_nan(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _without_nan(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_without_nan(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _with_nan(values: Mapping[str, float | None]) -> dict[str, float]:
  return {k: math.nan if v is None else v for k, v in values.items()}


def _si(value: float) -> str:
  for unit in ('', 'k', 'M', 'G'):
    if value < 1000 or unit == 'G':
      break
    value /= 1000
  return f'{value:.3g}{unit}'


def clock(seconds: float) -> str:
  """As `1:02:03`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
