"""A model as a directory that JAX and NumPy alone can score with.

    export.export_workdir('/tmp/run', '/tmp/model', ExportConfig('cuda'))
    $ python /tmp/model/load.py --check

`encode`, `extend` and `score` are those of a `Scorer`, traced for a named
platform, one program for each combination of sizes, since kernels and the
blocks of attention are chosen by size. They are serialized by `jax.export`,
which keeps them for JAX versions up to 6 months newer and 3 weeks older; so
they call only what it guarantees to keep, which Pallas kernels for Hopper and
TPUs are, and cuDNN and the CPU kernel are not.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import platform as platform_lib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.export
import numpy as np

from histjax import buckets, features, testing
from histjax import config as config_lib
from histjax.models import ranker
from histjax.ops import devices
from histjax.scoring import fingerprint as fingerprint_lib
from histjax.scoring import programs, scorer
from histjax.serving import directory, exported, lowering
from histjax.serving import load as load_lib

_GOLDEN_ROWS, _GOLDEN_CANDIDATES = 3, 16


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """What to export.

  Attributes:
    platform: that will run it; this machine need not have it.
    compute_capability: of the NVIDIA GPU: '9.0' is Hopper, which has kernels
      (from JAX 0.11 on), '' any, without kernels. None: '9.0' for 'cuda'.
    rows: users at once, ascending; requests are padded to one of these.
    events: sizes to pad histories to; the last is how long one can get.
    candidates: sizes to pad a user's candidates to.
    new_events: sizes to pad what is given to `extend` to; (): it is not
      exported. None: 1 and 16, where the model's histories can be extended.
    microbatch: candidates per row scored at once; more candidates must be a
      multiple.
    repick: pick implementations anew, whatever the model's config names.
  """

  platform: Literal['cpu', 'cuda', 'tpu'] = 'cpu'
  compute_capability: str | None = None
  rows: tuple[int, ...] = (1, 8)
  events: tuple[int, ...] = (64, 256)
  candidates: tuple[int, ...] = (128,)
  new_events: tuple[int, ...] | None = None
  microbatch: int = 1024
  repick: bool = False

  def __post_init__(self):
    config_lib.normalize(self)
    if self.compute_capability is None:
      capability = '9.0' if self.platform == 'cuda' else ''
      object.__setattr__(self, 'compute_capability', capability)
    if self.compute_capability and (
      self.platform != 'cuda'
      or not re.fullmatch(r'\d+\.\d+', self.compute_capability)
    ):
      raise ValueError(
        f'compute_capability={self.compute_capability!r} with platform='
        f"{self.platform!r}: it must be as '9.0', and of 'cuda' alone"
      )
    for field in ('rows', 'events', 'candidates', 'new_events'):
      sizes = getattr(self, field)
      if sizes is None:
        continue
      buckets.check(field, sizes)
      if not sizes and field != 'new_events':
        raise ValueError(f'{field}=() must name at least one size')
    if self.new_events and self.new_events[-1] > self.events[0]:
      raise ValueError(
        f'new_events={self.new_events} must be at most the smallest of '
        f'events={self.events}'
      )
    if self.microbatch < 1:
      raise ValueError(f'microbatch={self.microbatch} must be at least 1')
    for size in self.candidates:
      if size > self.microbatch and size % self.microbatch:
        raise ValueError(
          f'candidates={self.candidates}: {size} is beyond '
          f'microbatch={self.microbatch} and no multiple of it'
        )


def export_workdir(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  options: ExportConfig,
  which: Literal['best', 'latest'] = 'best',
  log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Exports a trained run, with its features and rows; see `export_model`.

  Args:
    workdir: of the run.
    output: the directory to make.
    options: for what, and of which sizes.
    which: the parameters that are best on validation, or the latest.
    log: is told of progress, line by line.

  Returns:
    As `export_model`.

  Raises:
    FileNotFoundError: there is no such run; see `training.run.load`.
    ValueError: the model or the options cannot be exported, or the run is
      damaged.
    NotImplementedError: an implementation that the config names cannot run on
      the platform.
    OSError: the directory cannot be written.
  """
  directory.check_output(output)
  from histjax.training import run as run_lib  # Reads checkpoints.

  run = run_lib.load(workdir, which)
  rows = run.config.data.eval_rows or run.config.data.rows
  files = {'rows': config_lib.to_dict(rows)}
  return export_model(
    run.config.model,
    run.variables,
    output,
    options,
    described=files,
    fitted=run.features,
    log=log,
  )


def export_model(
  config: ranker.RankerConfig,
  variables: Mapping[str, Any],
  output: str | os.PathLike[str],
  options: ExportConfig,
  *,
  described: Mapping[str, Any] | None = None,
  fitted: features.FittedFeatures | None = None,
  log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Writes a model as a directory, whole or not at all.

  Args:
    config: of the model.
    variables: its parameters and tables.
    output: the directory; it must be empty or not be there, its parent be.
    options: for what, and of which sizes.
    described: JSON values beside the model's in `config.json`.
    fitted: the derived features, kept in `features.npz`.
    log: is told of progress, line by line.

  Returns:
    What is in `manifest.json`. Where this machine can run the programs, all of
    them have been run on the golden inputs, by the directory's own loader.

  Raises:
    ValueError: the output has files in it, or the model cannot be scored from
      a cache, or extended where `new_events` are asked for, or a program does
      not give the golden outputs.
    NotImplementedError: a named implementation cannot be exported for the
      platform.
    OSError: it cannot be written; then nothing is left of it.
  """
  output = directory.check_output(output)
  _check_packages()
  options = _with_new_events(config, options)
  ranker.check_variables(config, variables)
  if options.repick:
    config = _without_names(config)
  try:
    lowered = _lowered(config, variables, options, log)
  except NotImplementedError as error:
    raise NotImplementedError(
      f'{error}; to let the platform pick, export with repick=True'
    ) from error
  for kind in ('encode', 'extend', 'score'):
    used = lowered.used(kind)
    log(f'{kind} runs {used or "plain JAX alone"}')
  log('golden outputs')
  golden = _golden(config, variables, options)
  manifest = _manifest(config, variables, options, lowered)
  model = {'model': config_lib.to_dict(config), **(described or {})}

  def write(folder: pathlib.Path) -> None:
    from safetensors import numpy as safetensors

    for name, data in lowered.files.items():
      (folder / f'{name}.jax').write_bytes(data)
    arrays = lowering.flat(variables)
    safetensors.save_file(arrays, folder / 'parameters.safetensors')
    safetensors.save_file(golden, folder / 'golden.safetensors')
    (folder / 'config.json').write_text(json.dumps(model, indent=1) + '\n')
    (fitted or features.FittedFeatures()).save(folder)
    shutil.copyfile(load_lib.__file__, folder / 'load.py')
    shutil.copyfile(exported.__file__, folder / 'exported.py')
    directory.copy_flatbuffers(folder / 'flatbuffers.zip')
    for path in sorted(folder.iterdir()):
      path.chmod(0o644)
      found = path.stat().st_size, directory.sha256(path)
      manifest['files'][path.name] = list(found)
    path = folder / 'manifest.json'
    path.write_text(json.dumps(manifest, indent=1) + '\n')
    text = f'{directory.sha256(path)}  manifest.json\n'
    (folder / 'manifest.sha256').write_text(text)
    if runs_here(manifest):
      load_lib.check(folder, log)

  directory.write_whole(output, write)
  log(f'SHA-256 of manifest.json: {directory.sha256(output / "manifest.json")}')
  return manifest


def _with_new_events(
  config: ranker.RankerConfig, options: ExportConfig
) -> ExportConfig:
  """The options with sizes of `new_events` that suit the model."""
  config.require_amortizable()
  if options.new_events is None:
    try:
      config.require_extendable()
    except ValueError:
      return dataclasses.replace(options, new_events=())
    sizes = tuple(x for x in (1, 16) if x <= options.events[0])
    return dataclasses.replace(options, new_events=sizes)
  if options.new_events:
    config.require_extendable()
  return options


def runs_here(manifest: Mapping[str, Any]) -> bool:
  """Whether this machine is of the kind that a model was exported for."""
  if jax.export.default_export_platform() != manifest['platform']:
    return False
  found = getattr(jax.devices()[0], 'compute_capability', '')
  return manifest['compute_capability'] in ('', str(found))


def _check_packages() -> None:
  for name in ('flatbuffers', 'safetensors'):
    if importlib.util.find_spec(name) is None:
      raise ImportError(
        f"an export needs {name}: pip install 'histjax[serving]'"
      )


def _without_names(config: ranker.RankerConfig) -> ranker.RankerConfig:
  return dataclasses.replace(
    config,
    encoder=dataclasses.replace(
      config.encoder, attention=None, candidate_tower=None
    ),
    interaction=dataclasses.replace(config.interaction, implementation=None),
  )


def _lowered(
  config: ranker.RankerConfig,
  variables: Mapping[str, Any],
  options: ExportConfig,
  log: Callable[[str], None],
) -> lowering.Lowered:
  """A program for each combination of sizes."""
  target = devices.Target(
    options.platform, options.compute_capability or '', serialized=True
  )
  found = lowering.Lowered(config, variables, target, options.microbatch, log)
  for rows, events in itertools.product(options.rows, options.events):
    at = f'{rows}x{events}'
    encode = programs.Sizes(rows, events)
    cached = found.add('encode', f'encode-{at}', encode)[:2]
    for number in options.candidates:
      score = programs.Sizes(rows, events, number)
      found.add('score', f'score-{at}x{number}', score, *cached)
    for number in options.new_events or ():
      extend = programs.Sizes(rows, number, capacity=events)
      found.add('extend', f'extend-{at}x{number}', extend, *cached)
  return found


def _golden(
  config: ranker.RankerConfig,
  variables: Mapping[str, Any],
  options: ExportConfig,
) -> dict[str, np.ndarray]:
  """Random rows of each length, and their logits by a `Scorer` in float32."""
  precise = dataclasses.replace(_without_names(config), dtype='float32')
  reference = scorer.Scorer(precise, variables)
  found: dict[str, np.ndarray] = {}
  for events in options.events:
    batch = testing.random_batch(
      config.schema, _GOLDEN_ROWS, events, _GOLDEN_CANDIDATES
    )
    length = np.asarray([events, 0, events // 2], np.int32)
    history = batch.history.replace(length=length)
    with jax.default_matmul_precision('highest'):
      cache = reference.encode(history)
      logits = reference.score(cache, batch.candidates, batch.context)
    parts = {
      'history': batch.history.features,
      'length': {'length': length},
      'candidates': batch.candidates.features,
      'context': batch.context,
      'logits': logits,
    }
    for part, arrays in parts.items():
      for name, x in arrays.items():
        found[f'{events}/{part}/{name}'] = np.ascontiguousarray(x)
  return found


def _tolerance(config: ranker.RankerConfig, platform: str) -> float:
  """Of `|found - golden| / (1 + |golden|)`."""
  if config.dtype == 'bfloat16':
    return 0.05  # 8 bits of mantissa, about 20 roundings deep.
  # Sums in another order; elsewhere factors are rounded to 10 or 8 bits, too.
  return {'cpu': 1e-4, 'cuda': 0.02, 'tpu': 0.05}[platform]


def _manifest(config, variables, options, lowered) -> dict[str, Any]:
  """All of `manifest.json` but the files."""
  calls = {c for found in lowered.custom_calls.values() for c in found}
  has_kernels = any('mosaic_gpu' in c for c in calls)
  package = importlib.import_module('histjax')  # All of it stands above.
  versions = {
    name: importlib.metadata.version(name)
    for name in ('jax', 'jaxlib', 'flax', 'numpy')
  }
  return {
    'format': 1,
    'model': fingerprint_lib.fingerprint(config, variables),
    'platform': options.platform,
    'compute_capability': options.compute_capability if has_kernels else '',
    'versions': {
      'histjax': package.__version__,
      'python': platform_lib.python_version(),
      **versions,
    },
    'calling_convention': lowered.convention,
    'stability': (
      f'jax.export keeps programs of JAX {versions["jax"]} for versions of JAX '
      'and jaxlib built up to 6 months later and up to 3 weeks earlier; after '
      'that, export again'
    ),
    'sizes': {
      name: list(getattr(options, name))
      for name in ('rows', 'events', 'candidates', 'new_events')
    },
    'tasks': [task.name for task in config.schema.tasks],
    'requests': lowered.requests,
    'tolerance': _tolerance(config, options.platform),
    'implementations': lowered.implementations,
    'custom_calls': lowered.custom_calls,
    'files': {},
  }
