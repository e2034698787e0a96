"""Data parallelism: batches split over a mesh, parameters on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from histjax.types import RankingBatch

T = TypeVar('T')


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the one axis 'data'.

  Args:
    devices: None: all devices of all processes.

  Returns:
    The mesh.
  """
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(
    (len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices
  )


def local_mesh(mesh: Mesh) -> Mesh:
  """The part of a mesh that this process can address."""
  return data_mesh(list(mesh.local_devices))


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
    The batch as global arrays `[B * processes, ...]`, sharded over 'data'.

  Raises:
    ValueError: B is not a multiple of this process's devices in the mesh.
  """
  check_rows(batch, len(mesh.local_devices))
  return _put(batch, NamedSharding(mesh, P('data')))


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
