"""Sizes to pad to."""

import numpy as np
from absl.testing import absltest, parameterized

from histjax import buckets


class BucketsTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 16), (16, 16), (17, 32), (64, 64), (65, 96), (97, 128), (129, 192)
  )
  def test_bucket_size(self, n, expected):
    self.assertEqual(buckets.bucket_size(n), expected)

  def test_bucket_size_of_few(self):
    found = [buckets.bucket_size(n, 1) for n in (0, 1, 2, 3, 5, 9, 65)]
    self.assertEqual(found, [1, 1, 2, 4, 8, 16, 96])

  def test_fit(self):
    self.assertEqual(buckets.fit(5, (4, 8), 'rows', 1), 8)
    self.assertEqual(buckets.fit(4, (4, 8), 'rows', 1), 4)
    self.assertEqual(buckets.fit(5, (), 'rows', 1), 8)
    with self.assertRaisesRegex(ValueError, '9 rows do not fit .* bucket, 8'):
      buckets.fit(9, (4, 8), 'rows', 1)

  @parameterized.parameters(
    ([100], 4, (104,)),
    ([1, 1], 4, (1,)),
    (range(1, 101), 4, (16, 32, 56, 104)),
    (range(1, 101), 2, (56, 104)),
    # One in a hundred is too few for a size of its own, 2 in 100 are not.
    ([3] + 99 * [100], 4, (104,)),
    ([3, 3] + 98 * [100], 4, (16, 104)),
  )
  def test_of_data(self, sizes, limit, expected):
    self.assertEqual(buckets.of_data(np.array(sizes), limit), expected)

  @parameterized.parameters(((8, 4),), ((0, 4),), ((4, 4),))
  def test_check(self, sizes):
    with self.assertRaisesRegex(ValueError, r'sizes=\(.*strictly ascending'):
      buckets.check('sizes', sizes)


if __name__ == '__main__':
  absltest.main()
