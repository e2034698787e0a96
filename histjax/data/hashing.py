"""A fixed hash from integers and strings to table rows.

The same key gets the same row on every platform, in every process and in
every version of this library, because tables are trained against it:

* an integer `k` is taken modulo 2**64 and mixed by the finaliser of SplitMix64
  (Steele, Lea and Flood, OOPSLA 2014),
* a string is read as an integer if it is one of 64 bits, signed or not, in
  canonical decimal form (so that `7` and `'7'` agree, CSV files not telling
  them apart, and `'007'` is another), else as the
  little-endian integer of its 8-byte BLAKE2b digest (RFC 7693) of its UTF-8
  bytes, and then mixed likewise,

and the row is the mixed value modulo the table's size. How many keys share
their row is `collision_rate`: 1 % in a table of 100 rows a key, 10 % in one of
9.5, 63 % in one of 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from histjax.mixing import mix

_DECIMAL = re.compile(r'0|-?[1-9][0-9]{0,19}')


def collision_rate(num_keys: int, size: int) -> float:
  """The share of keys, in expectation, that have their row with another one.

      1 - (1 - 1 / size)^(num_keys - 1)

  of distinct keys, whose rows are as good as uniform and independent.
  """
  others = max(num_keys - 1, 0)
  if size == 1:
    return float(others > 0)
  return -float(np.expm1(others * np.log1p(-1 / size)))


def hash_integers(values: np.ndarray, size: int) -> np.ndarray:
  """Rows in `[0, size)` of int64 or uint64 keys `[n]`, as int32 `[n]`."""
  return rows(mix(values), size)


def hash_strings(values: Iterable[str], size: int) -> np.ndarray:
  """Rows in `[0, size)` of string keys, as int32 `[n]`."""
  keys = [key(v) for v in values]
  return hash_integers(np.array(keys, np.uint64), size)


def rows(digests: np.ndarray, size: int) -> np.ndarray:
  """Rows in `[0, size)` of uint64 digests `[n]`, as int32 `[n]`."""
  return (digests % np.uint64(size)).astype(np.int32)


def digests(keys: np.ndarray) -> np.ndarray:
  """The mixed values of distinct keys `[n]`, uint64 `[n]`.

  Args:
    keys: integers, or strings; '7' and 7 have one value.
  """
  if keys.dtype.kind in 'iu':
    return mix(keys)
  return mix(np.array([key(k) for k in keys.tolist()], np.uint64))


def as_integer(text: str) -> int | None:
  """The integer in `[-2**63, 2**64)` that `text` is the decimal form of.

  Canonical form alone: `7` is one; `007`, `+7`, `7.0`, `-0` and ` 7` are not.
  """
  if _DECIMAL.fullmatch(text) and -(2**63) <= int(text) < 2**64:
    return int(text)
  return None


def key(value: str) -> int:
  """The integer in `[0, 2**64)` that a text is mixed as."""
  integer = as_integer(value)
  if integer is not None:
    return integer % 2**64
  digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little')
