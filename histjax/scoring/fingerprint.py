"""Which model a cache belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from histjax import config as dicts
from histjax.models.ranker import RankerConfig


def fingerprint(config: RankerConfig, variables: Mapping[str, Any]) -> str:
  """SHA-256 of a model: all of its config and every byte of its parameters.

  Which implementations are named is left out: it changes no meaning, so caches
  may go from one to another.

  Args:
    config: of the model.
    variables: its parameters and tables, read back one after another.

  Returns:
    64 hexadecimal digits, equal on every machine.
  """
  encoder = dataclasses.replace(
    config.encoder, attention=None, candidate_tower=None
  )
  interaction = dataclasses.replace(config.interaction, implementation=None)
  described = dicts.to_dict(
    dataclasses.replace(config, encoder=encoder, interaction=interaction)
  )
  digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
  leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
  for path, leaf in sorted(leaves, key=lambda x: jax.tree_util.keystr(x[0])):
    value = np.asarray(leaf)
    name = f'{jax.tree_util.keystr(path)} {value.dtype} {value.shape}\n'
    digest.update(name.encode())
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    digest.update(data.data)
  return digest.hexdigest()
