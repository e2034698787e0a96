"""Variables as a program's arguments, as few as pays.

To start a program costs up to a microsecond an argument, which for the dozens
of small matrices of a head is as long as they take to multiply. So the small
ones are kept in one array, which the program cuts; XLA reads them in place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from histjax.models import ranker

_SMALL = 2**16
"""Elements; a slice of a larger one that had to be copied would be felt."""


@dataclasses.dataclass(frozen=True)
class Spec:
  """How to get variables back; equal for all variables of a config.

  Attributes:
    tree: of the variables.
    shapes: of each leaf, in the tree's order.
    small: whether each is kept in the one array.
    collections: the tree of what follows them.
  """

  tree: Any
  shapes: tuple[tuple[int, ...], ...]
  small: tuple[bool, ...]
  collections: Any

  def variables(self, packed: Sequence[jax.Array]) -> dict[str, Any]:
    """The variables of a `Ranker` of what `pack` made; in a program."""
    joined, *rest = packed
    number = self.small.count(False)
    offset, large, leaves = 0, iter(rest[:number]), []
    for shape, small in zip(self.shapes, self.small, strict=True):
      if not small:
        leaves.append(next(large))
        continue
      size = math.prod(shape)
      leaves.append(joined[offset : offset + size].reshape(shape))
      offset += size
    collections = jax.tree.unflatten(self.collections, rest[number:])
    return {**jax.tree.unflatten(self.tree, leaves), **collections}


def pack(
  config: ranker.RankerConfig, variables: Mapping[str, Any]
) -> tuple[tuple[jax.Array, ...], Spec]:
  """What to score with, and how programs read it.

  Args:
    config: of the model.
    variables: its variables, on a device.

  Returns:
    The small parameters, float32 `[P]`, the others, and the arrays of
    `models.ranker.pack`, all in a tuple, which is an argument that takes JAX no
    time to look through; and how to read it.
  """
  paths, tree = jax.tree_util.tree_flatten_with_path(variables)
  leaves = [x for _, x in paths]
  small = tuple(
    x.size <= _SMALL and x.dtype == jnp.float32 and path[0].key != 'tables'
    for path, x in paths
  )
  collections, joined = _prepare(config, small, variables)
  packed, of_collections = jax.tree.flatten(collections)
  shapes = tuple(x.shape for x in leaves)
  large = [x for x, s in zip(leaves, small, strict=True) if not s]
  return (joined, *large, *packed), Spec(tree, shapes, small, of_collections)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepare(config, small, variables):
  leaves = jax.tree.leaves(variables)
  chosen = [x.reshape(-1) for x, s in zip(leaves, small, strict=True) if s]
  joined = jnp.concatenate(chosen) if chosen else jnp.zeros(0, jnp.float32)
  return ranker.pack(config, variables), joined
