"""The hash is fixed: tables are trained against it."""

import hashlib

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import mixing
from histjax.data import hashing

_MASK = 2**64 - 1


def splitmix(k: int) -> int:
  """In Python's own integers, from the definition."""
  z = (k + 0x9E3779B97F4A7C15) & _MASK
  z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
  z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
  return z ^ (z >> 31)


class HashingTest(parameterized.TestCase):
  def test_published_values(self):
    # The first outputs of SplitMix64 seeded with 0 and with 1234567.
    state = np.array([0, 0x9E3779B97F4A7C15, 1234567], np.uint64)
    self.assertEqual(
      mixing.mix(state).tolist(),
      [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 6457827717110365317],
    )

  def test_pinned(self):
    # Changing any of these breaks every saved table.
    self.assertEqual(
      hashing.hash_integers(np.array([0, 1, -1, 2**62]), 1000).tolist(),
      [splitmix(k & _MASK) % 1000 for k in (0, 1, -1, 2**62)],
    )
    self.assertEqual(
      hashing.hash_strings(['', 'item', 'é', '日本'], 10**6).tolist(),
      [PINNED[v] for v in ('', 'item', 'é', '日本')],
    )

  @given(st.text(max_size=8), st.integers(1, 2**31 - 1))
  def test_strings(self, value, size):
    (row,) = hashing.hash_strings([value], size)
    self.assertBetween(row, 0, size - 1)
    if not value.lstrip('-').isdigit():
      digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
      self.assertEqual(row, splitmix(int.from_bytes(digest, 'little')) % size)

  @given(st.integers(-(2**63), 2**64 - 1), st.integers(1, 2**31 - 1))
  def test_integers_and_their_decimals_agree(self, value, size):
    dtype = np.int64 if value < 2**63 else np.uint64
    (row,) = hashing.hash_integers(np.array([value], dtype), size)
    self.assertEqual(row, splitmix(value & _MASK) % size)
    self.assertEqual(hashing.hash_strings([str(value)], size)[0], row)

  def test_decimals_of_every_length_are_integers(self):
    largest = [10**n - 1 for n in range(1, 20)] + [2**64 - 1]
    smallest = [-(10**n) + 1 for n in range(1, 19)] + [-(2**63)]
    edges = [0, 10**18, 10**19, 2**63 - 1, 2**63, 2**64 - 1]
    for value in (*largest, *smallest, *edges):
      self.assertEqual(hashing.as_integer(str(value)), value)
      (row,) = hashing.hash_strings([str(value)], 2**31 - 1)
      self.assertEqual(row, splitmix(value & _MASK) % (2**31 - 1), value)

  def test_decimals_beyond_64_bits_are_texts(self):
    for value in (2**64, -(2**63) - 1, 10**20, 10**30):
      self.assertIsNone(hashing.as_integer(str(value)))
      digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
      (row,) = hashing.hash_strings([str(value)], 10**6)
      self.assertEqual(row, splitmix(int.from_bytes(digest, 'little')) % 10**6)

  def test_other_spellings_are_other_strings(self):
    rows = hashing.hash_strings(
      ['7', '07', '7.0', ' 7', '+7', '\u0667'], 2**31 - 1
    )
    self.assertLen(set(rows.tolist()), 6)

  @parameterized.parameters(1, 10, 100)
  def test_as_many_collide_as_is_said(self, rows_per_key):
    num_keys = 50_000
    size = num_keys * rows_per_key
    rows = hashing.hash_integers(np.arange(num_keys), size)
    shared = np.mean(np.bincount(rows)[rows] > 1)
    expected = hashing.collision_rate(num_keys, size)
    self.assertLess(abs(shared - expected), 0.01)  # 5 standard deviations.
    self.assertAlmostEqual(expected, -np.expm1(-1 / rows_per_key), delta=1e-4)

  @parameterized.parameters((0, 10, 0.0), (1, 1, 0.0), (2, 1, 1.0))
  def test_few_keys_and_one_row(self, num_keys, size, expected):
    self.assertEqual(hashing.collision_rate(num_keys, size), expected)

  def test_spreads(self):
    rows = hashing.hash_integers(np.arange(100_000), 100)
    count = np.bincount(rows, minlength=100)
    self.assertLess(abs(count - 1000).max(), 150)  # 5 standard deviations.


PINNED = {'': 881792, 'item': 526414, 'é': 194044, '日本': 619552}

if __name__ == '__main__':
  absltest.main()
