"""Where arrays are: batches and tables split over a mesh, the rest everywhere.

A mesh has the axes 'data' and 'table'. The rows of a batch are split over both,
so that every device computes. The rows of the tables are split over 'table':
the devices of one position of 'data' have them all, and may be one host's, with
the fastest links. Rules say otherwise, see `specs`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from histjax.types import RankingBatch

T = TypeVar('T')
Rules = tuple[tuple[str, P], ...]
"""`(regular expression, how it is split)` of variables' paths; see `specs`."""
AXES = ('data', 'table')
ROWS = P(AXES)
"""How the rows of a batch are split."""


def data_mesh(
  devices: Sequence[jax.Device] | None = None, *, table: int = 1
) -> Mesh:
  """A mesh with the axes 'data' and 'table'.

  Args:
    devices: None: all devices of all processes.
    table: over how many devices the tables' rows are split.

  Returns:
    The mesh, `[len(devices) / table, table]`.

  Raises:
    ValueError: `table` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if table < 1 or len(devices) % table:
    raise ValueError(
      f'table={table}: tables cannot be split over so many of '
      f'{len(devices)} devices; choose a divisor of {len(devices)}'
    )
  # A slice of 4 x 4 chips has no axis of 8: it may be made of parts of both.
  arranged = mesh_utils.create_device_mesh(
    (len(devices) // table, table), devices, allow_split_physical_axes=True
  )
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def local_mesh(mesh: Mesh) -> Mesh:
  """The part of a mesh that this process can address.

  Raises:
    NotImplementedError: tables are split over devices of several processes.
  """
  if not mesh.is_multi_process:
    return mesh
  local, process = [], jax.process_index()
  for row in mesh.devices:
    processes = {d.process_index for d in row}
    if len(processes) > 1:
      raise NotImplementedError(
        f"the axis 'table' of the mesh spans the processes {processes}: to "
        'evaluate, each must have whole tables. Let it divide the number of '
        f'devices of a process, {len(mesh.local_devices)}'
      )
    if processes == {process}:
      local.append(row)
  return Mesh(np.array(local), mesh.axis_names, axis_types=mesh.axis_types)


def specs(variables: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
  """How each of a model's variables is split over a mesh.

  The first rule whose expression is found in a variable's path, as
  'params/head/logits/kernel' or 'tables/tables/item', says how.

  Args:
    variables: arrays, or their shapes.
    mesh: of `data_mesh`.
    rules: None: tables by rows over 'table', all else is on every device.

  Returns:
    A tree of `PartitionSpec`s.

  Raises:
    ValueError: a rule says nothing of any variable, a variable has no rule, or
      cannot be split as its rule says.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
  paths = [_path(path) for path, _ in leaves]
  if rules is None:
    rules = _default_rules(paths)
  used, found = set(), []
  for path, (_, x) in zip(paths, leaves, strict=True):
    number = next(
      (i for i, (e, _) in enumerate(rules) if re.search(e, path)), None
    )
    if number is None:
      raise ValueError(
        f"no sharding rule is of {path!r}; end them with ('.*', P())"
      )
    used.add(number)
    _check_spec(path, x.shape, rules[number][1], mesh)
    found.append(rules[number][1])
  for i, (expression, _) in enumerate(rules):
    if i not in used:
      raise ValueError(
        f'the sharding rule {expression!r} says nothing of any variable, or '
        f'earlier ones say it; the variables are {paths}'
      )
  return jax.tree.unflatten(tree, found)


def describe(variables: Any, mesh: Mesh, rules: Rules | None = None) -> str:
  """The rules as a table: what is split how, and the bytes on a device."""
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  by_rule: dict[str, list[tuple[str, Any, P]]] = {}
  shapes = [(_path(path), x) for path, x in leaves]
  of_paths = jax.tree.leaves(
    specs(variables, mesh, rules), is_leaf=lambda x: isinstance(x, P)
  )
  if rules is None:
    rules = _default_rules([path for path, _ in shapes])
  for (path, x), spec in zip(shapes, of_paths, strict=True):
    rule = next(e for e, _ in rules if re.search(e, path))
    by_rule.setdefault(rule, []).append((path, x, spec))
  lines = [f'Mesh {dict(mesh.shape)}; variables, without the optimizer:']
  for rule, found in ((e, by_rule[e]) for e, _ in rules):
    here = total = 0
    for _, x, spec in found:
      size = x.size * x.dtype.itemsize
      total += size
      local = NamedSharding(mesh, spec).shard_shape(x.shape)
      here += math.prod(local) * x.dtype.itemsize
    lines.append(
      f'  {rule:16} P{tuple(found[0][2])!s:20} {len(found):4} arrays '
      f'{total / 2**20:10.2f} MiB, {here / 2**20:.2f} on a device'
    )
  return '\n'.join(lines)


def of_state(state: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
  """A tree of `NamedSharding`s for a `TrainState`, of arrays or shapes.

  What belongs to a variable is split as it is; all else is on every device.
  """
  variables = {'params': state.params, 'tables': state.tables}
  found = {
    _path(path): spec
    for path, spec in jax.tree_util.tree_leaves_with_path(
      specs(variables, mesh, rules), is_leaf=lambda x: isinstance(x, P)
    )
  }
  tables = {
    path.rpartition('/')[2]: s
    for path, s in found.items()
    if path.startswith('tables/')
  }
  params = {
    path.removeprefix('params/'): (spec, x.shape)
    for (path, spec), (_, x) in zip(
      found.items(),
      jax.tree_util.tree_leaves_with_path(variables),
      strict=True,
    )
    if path.startswith('params/')
  }

  def spec_of(path, x):
    head, _, rest = _path(path).partition('/')
    if head in ('params', 'average'):
      return params[rest][0]
    if head == 'tables':
      return found[f'{head}/{rest}']
    if head in ('table_state', 'table_average'):
      return P(*tables[rest.partition('/')[0]][:1])
    for name, (spec, shape) in params.items():
      if head == 'opt_state' and rest.endswith('/' + name):
        return spec if shape == x.shape else P()
    return P()

  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec_of(path, x)), state
  )


def table_axes(spec: P, mesh: Mesh) -> tuple[str, ...]:
  """The axes that the rows of a table are split over, if any."""
  names = spec[0] if len(spec) else None
  names = (names,) if isinstance(names, str) else names or ()
  return tuple(n for n in names if mesh.shape[n] > 1)


def _default_rules(paths: Sequence[str]) -> Rules:
  rules = ((r'^tables/', P('table')),)
  rest = (('.*', P()),)
  if not any(p.startswith('tables/') for p in paths):
    return rest
  return rules if all(p.startswith('tables/') for p in paths) else rules + rest


def _check_spec(path: str, shape, spec: P, mesh: Mesh) -> None:
  if len(spec) > (1 if path.startswith('tables/') else len(shape)):
    raise ValueError(
      f'the sharding rule of {path!r}, {list(shape)}, is {spec}: it has more '
      'axes than may be split; of a table, rows may'
    )
  for size, names in zip(shape, spec, strict=False):
    names = (names,) if isinstance(names, str) else names or ()
    if unknown := [n for n in names if n not in mesh.shape]:
      raise ValueError(
        f'the sharding rule of {path!r} has the axes {unknown}; the mesh has '
        f'{list(mesh.shape)}'
      )
    parts = math.prod(mesh.shape[n] for n in names)
    if size % parts:
      raise ValueError(
        f'{path!r}, {list(shape)}, cannot be split over {parts} devices: '
        f'{size} is no multiple. Set model.table_row_multiple={parts}, if it '
        "is a table, or give it a rule of its own, as ('<path>', P())"
      )


def _path(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def replicate(tree: T, mesh: Mesh) -> T:
  """The tree with a copy of each array on every device of the mesh.

  With several processes, each must give the same arrays, of NumPy.
  """
  return _put(tree, NamedSharding(mesh, P()))


def put_batch(batch: RankingBatch, mesh: Mesh) -> RankingBatch:
  """Splits this process's rows over its devices of the mesh.

  Args:
    batch: of NumPy arrays `[B, ...]`, B rows of this process. Every process
      of the mesh must give the same shapes.
    mesh: of `data_mesh`.

  Returns:
    The batch as global arrays `[B * processes, ...]`, sharded by rows.

  Raises:
    ValueError: B is not a multiple of this process's devices in the mesh.
  """
  check_rows(batch, len(mesh.local_devices))
  return _put(batch, NamedSharding(mesh, ROWS))


def put_variables(variables: T, mesh: Mesh, rules: Rules | None = None) -> T:
  """A model's variables on a mesh of this process, as the rules say.

  What is there already stays. Of arrays of several processes each has its own
  devices' parts: nothing is gathered.

  Args:
    variables: on the host, on some device, or of a mesh that `mesh` is the
      `local_mesh` of.
    mesh: of this process's devices alone.
    rules: see `specs`.
  """

  def put(x, spec):
    where = NamedSharding(mesh, spec)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      parts = [s.data for s in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape, where, parts)
    return jax.device_put(x, where)

  return jax.tree.map(put, variables, specs(variables, mesh, rules))


def to_host(tree: Any) -> Any:
  """NumPy arrays of the rows, or replicated values, that this process holds.

  Rows come in the order in which `put_batch` got them.
  """
  return jax.tree.map(_to_host, tree)


def check_rows(batch: RankingBatch, num_devices: int) -> None:
  """Raises ValueError unless the rows can be split evenly over the devices."""
  rows = {x.shape[0] for x in jax.tree.leaves(batch)}
  if len(rows) != 1:
    raise ValueError(
      f'the arrays of a batch have {sorted(rows)} rows; they must agree'
    )
  (num_rows,) = rows
  if num_rows % num_devices:
    raise ValueError(
      f'a batch of {num_rows} rows cannot be split over {num_devices} devices: '
      'pad it to a multiple, as histjax.data.pipeline does with '
      f'row_multiple={num_devices}'
    )


def _put(tree: T, where: NamedSharding) -> T:
  if not where.mesh.is_multi_process:
    return jax.device_put(tree, where)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(where, x), tree
  )


def _to_host(x: jax.Array) -> np.ndarray:
  if x.is_fully_addressable:
    return np.asarray(x)
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0))
  shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
  return np.concatenate([np.asarray(s.data) for s in shards])
