"""What `prepare` refuses, and how it goes on."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized
from pyarrow import parquet

from histjax import features
from histjax.data import datasets, locks, prepare
from histjax.data import splits as splits_lib
from histjax.data.prepare import plan
from histjax.data.prepare import run as run_lib
from histjax.data.prepare import stages as stages_lib
from histjax.data.rows import RowConfig
from histjax.schema import Categorical
from tests import children
from tests.data import prepared_rows, test_prepare
from tests.marks import slow_unless

ROOT = pathlib.Path(__file__).parents[2]


class ErrorsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def _log(self, **columns):
    data = {**test_prepare.some_columns(200), **columns}
    return test_prepare.write(self.folder, data, (0.5,))

  def _same_error(self, data_config, *, begun: bool):
    """As in memory; `begun`: work has been spent before."""
    with self.assertRaises(ValueError) as wanted:
      datasets.load(data_config)
    with self.assertRaises(ValueError) as told:
      test_prepare.run(data_config, self.folder / 'out', num_shards=3)
    self.assertEqual(str(told.exception), str(wanted.exception))
    self.assertEqual((self.folder / 'out').exists(), begun)
    return str(told.exception)

  def test_values(self):
    stars = np.ones(200)
    stars[190] = np.nan
    said = self._same_error(
      test_prepare.config(self._log(stars=stars)), begun=True
    )
    self.assertRegex(said, 'day=1/part-0.parquet row 90 holds nan')

  @parameterized.named_parameters(
    ('column', {'item_id': None}, {}, "column 'item_id' is not in"),
    ('type', {'ts': np.array(['soon'] * 200)}, {}, "column 'ts'.*'soon'"),
    (
      'split',
      {},
      {'split': splits_lib.TimeSplit('2024-01-01', '2024-01-02')},
      'write it as|holds numbers',
    ),
    ('rows', {}, {'rows': RowConfig('request')}, "ties='strict'"),
    (
      'feature',
      {},
      {'features': (features.RecentRates(2),)},
      'RecentRates needs Rates',
    ),
    ('task', {}, {'tasks': ('buy',)}, "task 'buy'"),
    (
      'without',
      {},
      {'without': ('time_gap', 'prise')},
      "without='prise' must be one of .*'time_gap'",
    ),
  )
  def test_before_work_is_spent(self, columns, fields, message):
    data = {**test_prepare.some_columns(200), **columns}
    data = {k: v for k, v in data.items() if v is not None}
    paths = (
      test_prepare.write(self.folder, data, (0.5,))
      if 'item_id' in data
      else None
    )
    if paths is None:
      data['item_id'] = np.arange(200) % 60
      paths = test_prepare.write(self.folder, data, (0.5,))
      last = pathlib.Path(paths[0]) / 'day=1' / 'part-0.parquet'
      parquet.write_table(parquet.read_table(last).drop(['item_id']), last)
    said = self._same_error(test_prepare.config(paths, **fields), begun=False)
    self.assertRegex(said, message)

  def test_files(self):
    (log,) = self._log()
    first = f'{log}/day=0/part-0.parquet'
    self.assertRegex(
      self._same_error(test_prepare.config((log, first)), begun=False),
      'is given twice',
    )
    self.assertRegex(
      self._same_error(test_prepare.config((f'{log}/none',)), begun=False),
      'does not exist',
    )

  def test_unsorted(self):
    ts = np.arange(200)
    ts[120] = 0
    uid = np.array(['u1'] * 200)
    data_config = test_prepare.config(
      self._log(ts=ts, uid=uid), source={'require_sorted': True}
    )
    said = self._same_error(data_config, begun=True)
    self.assertRegex(said, 'day=1/part-0.parquet row 20 holds 0: earlier')

  def test_a_log_in_memory(self):
    with self.assertRaisesRegex(ValueError, 'Synthetic, which is made in mem'):
      test_prepare.run(
        datasets.DataConfig(datasets.Synthetic()), self.folder / 'out'
      )

  def test_features_of_a_whole_log(self):
    data = test_prepare.config(self._log(), features=(_Mean(),))
    with self.assertRaisesRegex(ValueError, '_Mean.fit reads a whole log'):
      test_prepare.run(data, self.folder / 'out')
    data = test_prepare.config(self._log_again(), features=(_Shuffled(),))
    with self.assertRaisesRegex(ValueError, 'give _Shuffled.counted'):
      test_prepare.run(data, self.folder / 'out')

  def test_a_feature_that_other_processes_cannot_import(self):
    """As one in a config file, which is code without a name."""
    data = test_prepare.config(self._log())
    engine = prepare.Local(2)
    with (
      mock.patch.object(type(data.features[0]), '__module__', 'config_config'),
      self.assertRaisesRegex(ValueError, "is defined in 'config_config', whic"),
    ):
      test_prepare.run(data, self.folder / 'out', engine=engine)
    self.assertFalse((self.folder / 'out').exists())

  def _log_again(self):
    return (str(self.folder / 'log'),)

  def test_too_little_memory(self):
    with self.assertRaisesRegex(ValueError, 'too little for 1 workers: give'):
      test_prepare.run(
        test_prepare.config(self._log()), self.folder / 'out', memory=2.0**28
      )
    data = test_prepare.config(self._log_again())
    with mock.patch.object(plan, '_EVENT', 2.0**24):
      with self.assertRaisesRegex(ValueError, 'a shard of 2 has .* raise mem'):
        test_prepare.run(
          data, self.folder / 'out', memory=2.0**29, num_shards=2
        )


class ResumeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.config = test_prepare.config(
      test_prepare.write(self.folder, test_prepare.some_columns(200), (0.5,)),
      vocabulary=True,
    )

  @slow_unless(lambda stages: len(stages) == 2)
  @parameterized.parameters(
    (('reading', 'writing'),), (('learning', 'counting', 'writing'),)
  )
  def test_killed(self, stages):
    """Really killed; ends as if it had not been."""
    for where in stages:
      process = children.start(
        [
          *(sys.executable, '-m', 'tests.data.prepare_process'),
          *(str(self.folder), where),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
      )
      self.assertEqual(process.stdout.readline(), 'pause\n')
      process.send_signal(signal.SIGKILL)
      self.assertEqual(process.wait(), -signal.SIGKILL)
      process.stdout.close()
      with self.assertRaisesRegex(ValueError, 'not to the end; run prepare'):
        test_prepare.prepared(self.config, self.folder / 'out')
    out = self.folder / 'out'
    self.assertLen(list(out.glob('shard-*.json')), 1)
    self.assertNotEmpty(list(out.glob('.*.tmp')))
    done = test_prepare.run(self.config, out)
    self.assertEqual((done.num_shards, done.num_resumed), (4, 1))
    test_prepare.run(self.config, self.folder / 'at_once', num_shards=4)
    self.assertEqual(
      test_prepare.contents(out), test_prepare.contents(self.folder / 'at_once')
    )
    again = test_prepare.run(self.config, out)
    self.assertEqual((again.num_resumed, again.seconds), (4, {}))
    found = test_prepare.prepared(self.config, out)
    prepared_rows.check_same(self, found, datasets.load(self.config))

  def test_finished_is_not_written_to(self):
    out = self.folder / 'out'
    test_prepare.run(self.config, out, num_shards=2)
    with mock.patch.object(locks, 'FolderLock', side_effect=PermissionError):
      again = test_prepare.run(self.config, out)
      self.assertEqual((again.num_shards, again.num_resumed), (2, 2))
      with self.assertRaisesRegex(ValueError, 'num_shards: 2 there, 3 asked'):
        test_prepare.run(self.config, out, num_shards=3)

  def test_killed_at_the_very_end(self):
    out = self.folder / 'out'
    with mock.patch.object(run_lib, 'shutil') as shutil:
      shutil.rmtree.side_effect = SystemError
      with self.assertRaises(SystemError):
        test_prepare.run(self.config, out, num_shards=2)
    self.assertTrue((out / 'dataset.json').exists())
    self.assertTrue((out / '_work').exists())
    again = test_prepare.run(self.config, out)
    self.assertEqual(again.num_resumed, 2)
    self.assertFalse((out / '_work').exists())

  def test_a_step_may_be_taken_again(self):
    """As where a machine is lost that has not told that it was through."""

    def twice(step):
      return lambda *args: (step(*args), step(*args))

    for name in ('spill', 'count_ids', 'collect', 'write_shard'):
      step = twice(getattr(stages_lib, name))
      self.enterContext(mock.patch.object(stages_lib, name, step))
    out = self.folder / 'out'
    test_prepare.run(self.config, out, num_shards=2)
    found = test_prepare.prepared(self.config, out)
    prepared_rows.check_same(self, found, datasets.load(self.config))

  def test_a_second_start_meanwhile(self):
    out = self.folder / 'out'
    with locks.FolderLock(out):
      (out / '.index.npz.1.tmp').touch()
      with self.assertRaisesRegex(ValueError, 'another process is at work'):
        test_prepare.run(self.config, out, num_shards=2)
      self.assertTrue((out / '.index.npz.1.tmp').exists())

  def test_what_the_system_refuses_to_write(self):
    """As on a full disk."""
    path = self.folder / 'gone' / 'rows.array_record'
    with self.assertRaisesRegex(OSError, f'^{path} cannot be .*; make room'):
      stages_lib._write_records(path, None)

  def test_other_configs_and_logs(self):
    out = self.folder / 'out'
    test_prepare.run(self.config, out, num_shards=2)
    before = test_prepare.contents(out)
    (log,) = self.config.source.paths
    rows = dataclasses.replace(self.config, rows=RowConfig(history_length=9))
    seen = []
    for data_config, options, message in (
      (rows, {}, r'rows\.history_length: None'),
      (self.config, {'num_shards': 3}, 'num_shards: 2 there, 3 asked for'),
      (
        test_prepare.config((f'{log}/day=0',)),
        {},
        'files of the log: 2 there, 1 asked for',
      ),
    ):
      with self.assertRaisesRegex(ValueError, message) as told:
        test_prepare.run(data_config, out, **options)
      seen.append(str(told.exception))
    with self.assertRaisesRegex(ValueError, 'made with another config') as told:
      test_prepare.prepared(rows, out)
    self.assertIn('rows.history_length', str(told.exception))
    last = pathlib.Path(log) / 'day=1' / 'part-0.parquet'
    os.utime(last, ns=(0, 0))  # Written again, and the same.
    test_prepare.run(self.config, out)
    table = parquet.read_table(last)
    clicks = pa.array(1 - table['click'].to_numpy())
    place = table.column_names.index('click')
    parquet.write_table(table.set_column(place, 'click', clicks), last)
    with self.assertRaisesRegex(ValueError, 'day=1/part-0.parquet has changed'):
      test_prepare.run(self.config, out)
    self.assertEqual(test_prepare.contents(out), before)

  def test_another_name_of_a_folder(self):
    out = self.folder / 'out'
    source = self.config.source
    day = Categorical('day', 10)
    log_schema = dataclasses.replace(
      source.schema, item=(*source.schema.item, day)
    )
    data_config = dataclasses.replace(
      self.config, source=dataclasses.replace(source, schema=log_schema)
    )
    test_prepare.run(data_config, out, num_shards=2)
    (log,) = map(pathlib.Path, source.paths)
    moved = log.rename(self.folder / 'moved')
    moved_config = dataclasses.replace(
      data_config,
      source=dataclasses.replace(data_config.source, paths=(str(moved),)),
    )
    test_prepare.run(moved_config, out)
    (moved / 'day=1').rename(moved / 'day=7')
    with self.assertRaisesRegex(
      ValueError, r"day=7/part-0.parquet: its folders say {'day': '7'}, they"
    ):
      test_prepare.run(moved_config, out)
    # Where no column is of a folder, its name says nothing.
    other = dataclasses.replace(
      moved_config, source=dataclasses.replace(source, paths=(str(moved),))
    )
    test_prepare.run(other, self.folder / 'other', num_shards=2)
    (moved / 'day=7').rename(moved / 'day=8')
    test_prepare.run(other, self.folder / 'other')

  def test_killed_while_it_began(self):
    out = self.folder / 'out'
    out.mkdir()
    for name in ('.manifest.json.17.tmp', '.probe-17'):
      (out / name).write_text('{')
    other = out / '.manifest.json'
    other.write_text('{')
    with self.assertRaisesRegex(ValueError, 'holds files and no manifest.json'):
      test_prepare.run(self.config, out, num_shards=2)
    other.unlink()
    test_prepare.run(self.config, out, num_shards=2)
    self.assertEmpty(list(out.glob('.*')))

  def test_damage(self):
    out = self.folder / 'out'
    test_prepare.run(self.config, out, num_shards=2)
    records = out / 'train-00001-of-00002.array_record'
    index = out / 'index-00000-of-00002.npz'
    for path, change, message in (
      (records, lambda b: b[:-1], 'cut off or changed'),
      (index, lambda b: b[:-1] + b'x', 'does not have its checksum'),
      (out / 'features.npz', lambda b: b[:-9], 'damaged'),
    ):
      whole = path.read_bytes()
      path.write_bytes(change(whole))
      with self.assertRaisesRegex(ValueError, message):
        test_prepare.prepared(self.config, out)
      path.write_bytes(whole)
    whole = (out / 'features.npz').read_bytes()
    features.FittedFeatures().save(out)  # Whole, and of another log.
    with self.assertRaisesRegex(ValueError, 'features.npz is of another log'):
      test_prepare.prepared(self.config, out)
    (out / 'features.npz').write_bytes(whole)
    whole = records.read_bytes()
    records.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with self.assertRaisesRegex(ValueError, 'out/train cannot be read .*hash'):
      list(test_prepare.prepared(self.config, out).splits['train'])
    records.write_bytes(whole)
    list(test_prepare.prepared(self.config, out).splits['train'])
    (self.folder / 'letter').mkdir()
    (self.folder / 'letter' / 'letter.txt').write_text('Dear')
    with self.assertRaisesRegex(ValueError, 'holds files and no manifest.json'):
      test_prepare.run(self.config, self.folder / 'letter')


@dataclasses.dataclass(frozen=True)
class _Mean(features.DerivedFeature):
  def fit(self, events, train):
    return {'mean': np.mean(events.features['price'])}

  def features(self, schema, state):
    return ()

  def apply(self, events, impressions, state):
    return {}


@dataclasses.dataclass(frozen=True)
class _Shuffled(features.DerivedFeature):
  def features(self, schema, state):
    return ()

  def apply(self, events, impressions, state):
    return {}

  def apply_training(self, events, history_length, state, train):
    return {}


if __name__ == '__main__':
  absltest.main()
