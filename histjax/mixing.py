"""Mixes integers: a bijection whose values look random."""

from __future__ import annotations

import numpy as np


def mix(values: np.ndarray) -> np.ndarray:
  """The SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014).

  Args:
    values: int64 or uint64 `[n]`.

  Returns:
    uint64 `[n]`.
  """
  with np.errstate(over='ignore'):
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
