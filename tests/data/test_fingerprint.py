"""The fingerprint is of contents: all of them, and nothing else."""

import dataclasses
import tracemalloc

import numpy as np
from absl.testing import absltest, parameterized

from histjax.data import datasets
from histjax.data.events import EventLog
from histjax.data.fingerprint import fingerprint
from histjax.data.rows import RowConfig, make_rows
from histjax.data.splits import FractionSplit
from histjax.features import TimeGap
from histjax.schema import Categorical, Dense, Schema, Task
from tests.data import logs

SCHEMA = Schema(
  user='user',
  time='time',
  request='request',
  context=(Categorical('country', 8),),
  item=(Categorical('item', 50), Dense('price')),
  action=(Categorical('clicked', 2),),
  tasks=(Task('click', column='clicked'),),
)


SPLIT = FractionSplit()
ROWS = RowConfig()


def columns():
  rng = np.random.default_rng(0)
  size = 60
  user = np.sort(rng.integers(0, 6, size))
  return {
    'user': user,
    'time': np.arange(size),
    'request': np.arange(size) // 2,
    'country': user % 3,
    'item': rng.integers(0, 40, size),
    'price': rng.random(size),
    'clicked': rng.integers(0, 2, size),
  }


def of(values, *, split=SPLIT, rows=ROWS):
  log = EventLog.from_columns(values, SCHEMA)
  log, gaps = logs.derive(log, TimeGap(8))
  masks = split.masks(log).items()
  splits = {k: make_rows(log, mask, rows, gaps) for k, mask in masks}
  return fingerprint(datasets.Dataset(log.schema, splits, log))


class FingerprintTest(parameterized.TestCase):
  def test_the_same(self):
    self.assertEqual(of(columns()), of(columns()))
    self.assertLen(of(columns()), 64)
    # Lists, and a column that is not read.
    lists = {k: v.tolist() for k, v in columns().items()}
    self.assertEqual(of({**lists, 'other': [0] * 60}), of(columns()))

  @parameterized.parameters(*columns())
  def test_one_value_of_any_column(self, name):
    changed = columns()
    last = changed[name][-1]
    # The last event of a log: it is in the test split alone.
    changed[name][-1] = 1 - last if name == 'clicked' else last + 1
    if name == 'country':
      changed[name][changed['user'] == changed['user'][-1]] = 5
    self.assertNotEqual(of(changed), of(columns()))

  def test_names_of_users(self):
    text = {**columns(), 'user': [f'u{u}' for u in columns()['user']]}
    other = {**columns(), 'user': [f'v{u}' for u in columns()['user']]}
    self.assertNotEqual(of(text), of(other))

  def test_of_texts_is_what_it_was(self):
    text = {**columns(), 'user': [f'u{u}' for u in columns()['user']]}
    self.assertEqual(
      of(text),
      '9ba57e7fe0ebe7cfc57e64d998c22e2af81d055807827815cf9463d2ab171390',
    )

  @parameterized.parameters('u0\0', 'u0' + 'x' * 300, 'u0' + 'x' * 300 + '\0')
  def test_names_that_end_in_zeros_or_are_long(self, name):
    texts = [f'u{u}' if u < 5 else 'longest' for u in columns()['user']]
    found = {
      of({**columns(), 'user': [first if t == 'u0' else t for t in texts]})
      for first in (name, name + '\0', 'u0')
    }
    self.assertLen(found, 3)

  def test_memory_of_one_long_name(self):
    names = [f'u{i}' for i in range(500)] + ['x' * 20_000]  # Padded: 40 MB.
    size = len(names)
    values = {**{k: np.resize(v, size) for k, v in columns().items()}}
    values |= {'user': names, 'country': [0] * size}
    values['request'] = np.arange(size)
    log = EventLog.from_columns(values, SCHEMA)
    splits = {k: make_rows(log, m, ROWS) for k, m in SPLIT.masks(log).items()}
    dataset = datasets.Dataset(log.schema, splits, log)
    tracemalloc.start()
    fingerprint(dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    self.assertLess(peak, 4e6)

  def test_two_values_swapped(self):
    changed = columns()
    a, b = 3, 4
    changed['item'][[a, b]] = changed['item'][[b, a]]
    self.assertNotEqual(changed['item'][a], changed['item'][b])
    self.assertNotEqual(of(changed), of(columns()))

  def test_splits_and_rows(self):
    self.assertNotEqual(
      of(columns(), split=FractionSplit(0.7, 0.2)), of(columns())
    )
    self.assertNotEqual(
      of(columns(), rows=RowConfig(history_length=2)), of(columns())
    )

  def test_labels_of_one_split(self):
    config = datasets.DataConfig(
      datasets.Synthetic(num_users=8, requests_per_user=4)
    )
    dataset = datasets.load(config)
    self.assertEqual(fingerprint(dataset), fingerprint(datasets.load(config)))
    log = dataset.log
    labels = {k: 1 - v for k, v in log.labels.items()}
    flipped = dataclasses.replace(log, labels=labels)
    test = dataclasses.replace(dataset.splits['test'], log=flipped)
    other = dataclasses.replace(
      dataset, splits={**dataset.splits, 'test': test}
    )
    self.assertNotEqual(fingerprint(other), fingerprint(dataset))


if __name__ == '__main__':
  absltest.main()
