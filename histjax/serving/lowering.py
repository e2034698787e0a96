"""The programs of a scorer, lowered for a platform and serialized."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from histjax.models import ranker
from histjax.ops import devices, dispatch
from histjax.scoring import layout, programs, transport, weights

_ANY_INTEGER = 2**31
"""In place of a table's size, for what is no id."""


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """`{'params/fusion/..': array}`, in the order of names."""
  found = flax.traverse_util.flatten_dict(variables, sep='/')
  return {k: np.ascontiguousarray(x) for k, x in sorted(found.items())}


class Lowered:
  """Programs of one model and platform.

  `prepare` is a function of `flat(variables)`. What it returns, a list, is the
  first argument of `encode`, `extend` and `score`, which otherwise are those of
  `scoring.programs`.

  Attributes:
    files: the serialized programs, by name.
    implementations: `{program: {operation: implementation}}`.
    custom_calls: `{program: names}`.
    requests: `{kind: {part: {feature: size}}}`, in the order in which they lie
      in a request; the size of an id's table, None of a dense feature.
    convention: the version of `jax.export`'s calling convention.
  """

  def __init__(
    self,
    config: ranker.RankerConfig,
    variables: Mapping[str, Any],
    target: devices.Target,
    microbatch: int,
    log: Callable[[str], None],
  ):
    """Lowers `prepare`.

    Args:
      config: of the model.
      variables: its parameters and tables; their shapes count.
      target: that will run it.
      microbatch: as `ScorerConfig`.
      log: is told of each program.
    """
    self.files: dict[str, bytes] = {}
    self.implementations: dict[str, dict[str, str]] = {}
    self.custom_calls: dict[str, list[str]] = {}
    self.requests: dict[str, dict[str, dict[str, int | None]]] = {}
    self.convention = 0
    self._platform, self._log = target.platform, log
    spec: Any = None

    def prepare(arrays):
      nonlocal spec
      nested = flax.traverse_util.unflatten_dict(arrays, sep='/')
      packed, spec = weights.pack(config, nested)
      return list(packed)

    arrays = jax.tree.map(_shape, flat(variables))
    self._packed = self._lower('prepare', prepare, arrays)
    self._plan = programs.Plan(
      config, microbatch, microbatch, spec, target, transport.Transport()
    )

  def add(
    self,
    kind: Literal['encode', 'extend', 'score'],
    name: str,
    sizes: programs.Sizes,
    *cached: jax.ShapeDtypeStruct,
  ) -> list[jax.ShapeDtypeStruct]:
    """Lowers the program of a kind and bucket; returns its results' shapes."""
    program = programs.Program(self._plan, kind, sizes)
    request = jax.ShapeDtypeStruct((program.layout.size,), jnp.int32)
    found = self._lower(name, program.traced, self._packed, *cached, request)
    self.implementations[name] = program.backends
    self.requests[kind] = {x.name: _features(x) for x in program.layout.parts}
    return found

  def used(self, kind: str) -> dict[str, str]:
    """`{operation: implementations}` of all programs of a kind."""
    found: dict[str, set[str]] = {}
    for name, implementations in self.implementations.items():
      if name.startswith(f'{kind}-'):
        for operation, implementation in implementations.items():
          found.setdefault(operation, set()).add(implementation)
    return dispatch.names(found)

  def _lower(self, name, function, *arguments) -> list[jax.ShapeDtypeStruct]:
    lower = jax.export.export(jax.jit(function), platforms=[self._platform])
    with _without_paths():
      exported = lower(*arguments)
    data = bytes(exported.serialize())
    self.files[name] = data
    self.convention = exported.calling_convention_version
    calls = re.findall(r'custom_call @"?([\w.$]+)', exported.mlir_module())
    self.custom_calls[name] = sorted(set(calls))
    self._log(f'{name}: {len(data)} bytes')
    return [_shape(x) for x in exported.out_avals]


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
  """Programs do not keep where on this machine their source was."""
  config: Any = jax.config
  wanted = {
    'jax_traceback_in_locations_limit': 0,
    'jax_hlo_source_file_canonicalization_regex': '.*/',
  }
  before = {name: getattr(config, name) for name in wanted}
  for name, value in wanted.items():
    config.update(name, value)
  try:
    yield
  finally:
    for name, value in before.items():
      config.update(name, value)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _features(part: layout.Part) -> dict[str, int | None]:
  sizes = part.sizes or (_ANY_INTEGER,) * len(part.ids)
  found: dict[str, int | None] = dict(zip(part.ids, sizes, strict=True))
  return found | dict.fromkeys(part.dense)
