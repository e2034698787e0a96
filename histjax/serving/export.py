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
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform as platform_lib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import histjax
from histjax import buckets, features, testing
from histjax import config as config_lib
from histjax.models import ranker
from histjax.ops import devices
from histjax.scoring import fingerprint as fingerprint_lib
from histjax.scoring import programs, scorer, transport, weights
from histjax.serving import load as load_lib
from histjax.training import workdir as workdir_lib

_GOLDEN_ROWS, _GOLDEN_CANDIDATES = 3, 16
_ANY_INTEGER = 2**31
"""The table's size of what is no id."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """What to export.

  Attributes:
    platform: that will run it; this machine need not have it.
    compute_capability: of the NVIDIA GPU: '9.0' is Hopper, which has kernels
      (from JAX 0.11 on), '' any, without kernels. None: '9.0' for 'cuda'.
    rows: users at once, ascending; requests are padded to one of these.
    events: in a history, likewise; the last is how long one can get.
    candidates: of a user, likewise.
    new_events: given to `extend` at once, likewise; none: it is not exported.
    microbatch: as `ScorerConfig`; more candidates must be a multiple.
    repick: pick implementations anew, whatever the model's config names.
  """

  platform: Literal['cpu', 'cuda', 'tpu'] = 'cpu'
  compute_capability: str | None = None
  rows: tuple[int, ...] = (1, 8)
  events: tuple[int, ...] = (64, 256)
  candidates: tuple[int, ...] = (128,)
  new_events: tuple[int, ...] = (1, 16)
  microbatch: int = 1024
  repick: bool = False

  def __post_init__(self):
    if self.platform not in ('cpu', 'cuda', 'tpu'):
      raise ValueError(
        f"platform={self.platform!r} must be 'cpu', 'cuda' or 'tpu'"
      )
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
      sizes = buckets.check(field, getattr(self, field))
      if not sizes and field != 'new_events':
        raise ValueError(f'{field}=() must name at least one size')
      object.__setattr__(self, field, sizes)
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
  log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Exports the best parameters of a trained run; see `export_model`."""
  from histjax.training import run as run_lib  # Reads checkpoints.

  _check_output(output)
  run = run_lib.load(workdir)
  rows = run.config.data.eval_rows or run.config.data.rows
  files = {'rows': config_lib.to_dict(rows)}
  return export_model(
    run.config.model,
    run.params,
    output,
    options,
    described=files,
    fitted=run.features,
    log=log,
  )


def export_model(
  config: ranker.RankerConfig,
  params: Mapping[str, Any],
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
    params: its parameters.
    output: the directory; it must be empty or not be there, its parent be.
    options: for what, and of which sizes.
    described: JSON values beside the model's in `config.json`.
    fitted: the derived features, kept in `features.npz`.
    log: is told of progress, line by line.

  Returns:
    What is in `manifest.json`.

  Raises:
    ValueError: the output has files in it, or the model cannot be scored from
      a cache, or extended where `new_events` are asked for.
    NotImplementedError: a named implementation cannot be exported for the
      platform.
    OSError: it cannot be written; then nothing is left of it.
  """
  output = _check_output(output)
  _check_packages()
  config.require_amortizable()
  if options.new_events:
    config.require_extendable()
  if options.repick:
    config = _without_names(config)
  made, told = _programs(config, params, options, log)
  log('golden outputs')
  golden = _golden(config, params, options)
  manifest = _manifest(config, params, options, told)
  model = {'model': config_lib.to_dict(config), **(described or {})}

  def write(folder: pathlib.Path) -> None:
    from safetensors import numpy as safetensors

    for name, data in made.items():
      (folder / f'{name}.jax').write_bytes(data)
    flat = _flat(params)
    safetensors.save_file(flat, folder / 'parameters.safetensors')
    safetensors.save_file(golden, folder / 'golden.safetensors')
    (folder / 'config.json').write_text(json.dumps(model, indent=1) + '\n')
    (fitted or features.FittedFeatures()).save(folder)
    shutil.copyfile(load_lib.__file__, folder / 'load.py')
    _copy_flatbuffers(folder / 'flatbuffers.zip')
    for path in sorted(folder.iterdir()):
      path.chmod(0o644)
      manifest['files'][path.name] = [path.stat().st_size, _sha256(path)]
    path = folder / 'manifest.json'
    path.write_text(json.dumps(manifest, indent=1) + '\n')
    text = f'{_sha256(path)}  manifest.json\n'
    (folder / 'manifest.sha256').write_text(text)

  _write_whole(output, write)
  log(f'SHA-256 of manifest.json: {_sha256(output / "manifest.json")}')
  return manifest


def _check_output(output: str | os.PathLike[str]) -> pathlib.Path:
  """Its absolute path; raises unless it is empty or not there."""
  found = workdir_lib.resolve(output, 'output')
  if found.is_dir() and not any(found.iterdir()):
    return found
  if found.exists() or found.is_symlink():
    raise ValueError(
      f'output={str(found)!r} is there and no empty directory; name another, '
      'nothing is overwritten'
    )
  if not found.parent.is_dir():
    raise ValueError(
      f'output={str(found)!r}: there is no directory {str(found.parent)!r}; '
      'make it first'
    )
  return found


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


def _flat(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """`{'fusion/..': array}`, in the order of names."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  return {k: np.ascontiguousarray(x) for k, x in sorted(flat.items())}


def _programs(
  config: ranker.RankerConfig,
  params: Mapping[str, Any],
  options: ExportConfig,
  log: Callable[[str], None],
) -> tuple[dict[str, bytes], dict[str, Any]]:
  """All programs, serialized, by name; and what the manifest says of them."""
  spec: Any = None

  def prepare(flat):
    nonlocal spec
    nested = flax.traverse_util.unflatten_dict(flat, sep='/')
    packed, spec = weights.pack(config, nested)
    return jax.tree.leaves(packed)

  made: dict[str, bytes] = {}
  told: dict[str, Any] = {'implementations': {}, 'custom_calls': {}}

  def export(name, function, *arguments):
    exported = jax.export.export(
      jax.jit(function), platforms=[options.platform]
    )(*arguments)
    made[name] = bytes(exported.serialize())
    told['convention'] = exported.calling_convention_version
    calls = re.findall(r'custom_call @"?([\w.$]+)', exported.mlir_module())
    told['custom_calls'][name] = sorted(set(calls))
    log(f'{name}: {len(made[name])} bytes')
    return exported

  shapes = jax.tree.map(_shape, _flat(params))
  tree = jax.tree.structure(
    jax.eval_shape(
      lambda flat: weights.pack(
        config, flax.traverse_util.unflatten_dict(flat, sep='/')
      )[0],
      shapes,
    )
  )
  packed = export('prepare', prepare, shapes).out_avals
  packed = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in packed]
  plan = programs.Plan(
    config,
    options.microbatch,
    options.microbatch,
    spec,
    devices.Target(
      options.platform, options.compute_capability or '', serialized=True
    ),
    transport.Transport(),
  )

  def export_program(kind, sizes, name, *cached):
    program = programs.Program(plan, kind, sizes)
    size = program.layout.size
    request = jax.ShapeDtypeStruct((size,), jnp.int32)

    def traced(leaves, *arguments):
      return program.traced(jax.tree.unflatten(tree, leaves), *arguments)

    traced.__name__ = kind
    exported = export(name, traced, packed, *cached, request)
    told['implementations'][name] = program.backends
    told.setdefault('requests', {})[kind] = {
      part.name: _features_of(part) for part in program.layout.parts
    }
    return exported

  for rows in options.rows:
    for events in options.events:
      sizes = programs.Sizes(rows, events)
      exported = export_program('encode', sizes, f'encode-{rows}x{events}')
      cached = [_shape(x) for x in exported.out_avals[:2]]
      for count in options.candidates:
        sizes = programs.Sizes(rows, events, count)
        name = f'score-{rows}x{events}x{count}'
        export_program('score', sizes, name, *cached)
      for count in options.new_events:
        sizes = programs.Sizes(rows, count, capacity=events)
        name = f'extend-{rows}x{events}x{count}'
        export_program('extend', sizes, name, *cached)
  return made, told


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _features_of(part: Any) -> dict[str, int | None]:
  """`{name: size of the table}`, None of dense ones, in the part's order."""
  sizes = part.sizes or (_ANY_INTEGER,) * len(part.ids)
  found: dict[str, int | None] = dict(zip(part.ids, sizes, strict=True))
  return found | dict.fromkeys(part.dense)


def _golden(
  config: ranker.RankerConfig,
  params: Mapping[str, Any],
  options: ExportConfig,
) -> dict[str, np.ndarray]:
  """Random rows of each length, and their logits by a `Scorer` in float32."""
  precise = dataclasses.replace(_without_names(config), dtype='float32')
  reference = scorer.Scorer(precise, params)
  found: dict[str, np.ndarray] = {}
  for events in options.events:
    batch = testing.random_batch(
      config.schema, _GOLDEN_ROWS, events, _GOLDEN_CANDIDATES
    )
    length = np.asarray([events, 0, events // 2], np.int32)
    history = batch.history.replace(length=length)
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


def _manifest(config, params, options, told) -> dict[str, Any]:
  """All of `manifest.json` but the files."""
  calls = {c for found in told['custom_calls'].values() for c in found}
  has_kernels = any('mosaic_gpu' in c for c in calls)
  versions = {
    name: importlib.metadata.version(name)
    for name in ('jax', 'jaxlib', 'flax', 'numpy')
  }
  return {
    'format': 1,
    'model': fingerprint_lib.fingerprint(config, params),
    'platform': options.platform,
    'compute_capability': options.compute_capability if has_kernels else '',
    'versions': {
      'histjax': histjax.__version__,
      'python': platform_lib.python_version(),
      **versions,
    },
    'calling_convention': told['convention'],
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
    'requests': told['requests'],
    'tolerance': _tolerance(config, options.platform),
    'implementations': told['implementations'],
    'custom_calls': told['custom_calls'],
    'files': {},
  }


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _copy_flatbuffers(path: pathlib.Path) -> None:
  """What `jax.export` reads programs with, and JAX does not install."""
  found: Any = importlib.util.find_spec('flatbuffers')
  folder = pathlib.Path(found.submodule_search_locations[0])
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for source in sorted(folder.glob('*.py')):
      name = zipfile.ZipInfo(f'flatbuffers/{source.name}')  # Without a date.
      archive.writestr(name, source.read_bytes(), zipfile.ZIP_DEFLATED)


def _write_whole(
  output: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Writes a directory beside its place, then puts it there."""
  import safetensors

  folder = None
  try:
    folder = pathlib.Path(
      tempfile.mkdtemp('.tmp', f'.{output.name}.', output.parent)
    )
    write(folder)
    for path in folder.iterdir():
      _sync(path)
    folder.chmod(0o755)
    _sync(folder)
    os.rename(folder, output)  # An empty directory is replaced.
    _sync(output.parent)
  except (OSError, safetensors.SafetensorError) as error:
    number = getattr(error, 'errno', None)
    raise OSError(
      number,
      f'output={str(output)!r} cannot be written, nothing is left of '
      f'it ({error}); make room there, or name another directory',
    ) from error
  finally:
    if folder is not None:
      shutil.rmtree(folder, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)
