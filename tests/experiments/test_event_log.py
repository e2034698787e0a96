"""The synthetic log: the same from any number of workers, whole files alone."""

import dataclasses
import math
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from pyarrow import parquet

import event_log
from histjax.progress import Progress

QUIET = Progress(say=lambda line: None)
CONFIG = event_log.LogConfig(
  num_events=20_000, num_users=400, num_items=5000, num_files=7, days=3
)


def contents(folder) -> dict[str, bytes]:
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(folder.rglob('*.parquet'))
  }


class EventLogTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def test_goes_on(self):
    event_log.write(self.folder, CONFIG, progress=QUIET)
    first = contents(self.folder)
    self.assertLen(first, 7)
    (self.folder / 'events-000003.parquet').unlink()
    (self.folder / '.events-000003.parquet.tmp').write_bytes(b'PAR1')
    self.assertEqual(event_log.write(self.folder, CONFIG, progress=QUIET), 6)
    self.assertEqual(contents(self.folder), first)
    other = dataclasses.replace(CONFIG, seed=1)
    with self.assertRaisesRegex(ValueError, 'of a log with another config'):
      event_log.write(self.folder, other, progress=QUIET)
    (self.folder / 'mine.parquet').write_bytes(b'PAR1')
    with self.assertRaisesRegex(ValueError, 'mine.parquet is no file of this'):
      event_log.write(self.folder, CONFIG, progress=QUIET)

  def test_what_is_drawn(self):
    config = dataclasses.replace(CONFIG, hive=True, num_events=100_000)
    event_log.write(self.folder, config, progress=QUIET)
    days = {p.parent.name for p in self.folder.rglob('*.parquet')}
    self.assertEqual(
      days, {'day=2026-01-01', 'day=2026-01-02', 'day=2026-01-03'}
    )
    log = parquet.read_table(self.folder)
    self.assertLen(log, 100_000)
    for name, least in (('item', 0.02), ('user', 0.02)):
      values, counts = np.unique(log[name].to_numpy(), return_counts=True)
      most = {'item': config.num_items, 'user': config.num_users}[name]
      self.assertLessEqual(len(values), most)
      # Zipf: the most frequent has 1 / ln(n), or 1 / (2 sqrt(n)).
      share = {'item': 1 / np.log(5001), 'user': 1 / 40}[name]
      self.assertBetween(counts.max() / 100_000, least, share)
    country = log['country'].to_numpy() * 2**32 + log['user'].to_numpy()
    self.assertLen(np.unique(country), len(np.unique(log['user'].to_numpy())))
    clicked = log['clicked'].to_numpy()
    self.assertBetween(clicked.mean(), 0.2, 0.4)
    self.assertGreater(log['price'].to_numpy().min(), 0)

  def test_time_goes_on_over_files(self):
    times = [
      event_log.draw(CONFIG, file)['time'].cast('int64').to_numpy()
      for file in range(CONFIG.num_files)
    ]
    joined = np.concatenate(times)
    self.assertLen(joined, CONFIG.num_events)
    self.assertTrue((np.diff(joined) >= 0).all())

  @parameterized.parameters(
    ({'num_users': 0}, 'num_users=0 must be >= 1'),
    ({'num_items': 2**32}, 'must be below'),
    ({'num_files': 30_000}, 'a file has an event'),
    ({'user_exponent': -1.0}, 'user_exponent=-1.0 must be >= 0'),
    ({'user_exponent': math.inf}, 'user_exponent=inf must be >= 0 and finite'),
    ({'item_exponent': math.nan}, 'item_exponent=nan must be >= 0 and finite'),
  )
  def test_bad_sizes(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(CONFIG, **fields)


if __name__ == '__main__':
  absltest.main()
