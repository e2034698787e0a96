"""Vocabularies of training ids: fitted, saved, applied, and reported."""

import collections
import dataclasses
import pathlib
import tempfile

import hypothesis
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from histjax import features, vocabulary
from histjax import schema as schema_lib
from histjax.data import datasets, hashing, requests
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig, make_rows
from histjax.features import FittedFeatures
from histjax.schema import Categorical, Task

KEYS = st.sampled_from(['a', 'b', '7', '007', 'NaN', '1e5', 'é', '12:30'])


def schema(size=5, min_count=2, **fields):
  sku = Categorical('sku', size, ids='vocabulary', min_count=min_count)
  return schema_lib.Schema(
    user='uid', time='ts', item=(sku,), tasks=(Task('click'),), **fields
  )


def encoded(columns, log_schema, moment=5):
  """The log with its vocabulary, which events before `moment` have told."""
  log = EventLog.from_columns(columns, log_schema, extra=['sku'])
  train = log.time < moment
  masks = {'train': train, 'validation': ~train, 'test': ~train}
  counted = vocabulary.count(log_schema, log.features, masks)
  known = vocabulary.fit(log_schema, counted)
  return log.with_vocabularies(known), known, counted, masks


@st.composite
def columns(draw, min_size=1):
  size = draw(st.integers(min_size, 30))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  return {
    'uid': rng.integers(0, 3, size),
    'ts': rng.integers(0, 9, size),
    'sku': draw(st.lists(KEYS, min_size=size, max_size=size)),
    'click': rng.integers(0, 2, size),
  }


@dataclasses.dataclass(frozen=True)
class Held(datasets.Source):
  """A log in memory, half of it to train on."""

  log: EventLog

  def load(self, tasks):
    train = self.log.time < len(self.log) // 2
    even = self.log.time % 2 == 0
    return self.log, {
      'train': train,
      'validation': ~train & even,
      'test': ~train & ~even,
    }


class VocabularyTest(parameterized.TestCase):
  @hypothesis.given(columns(), st.integers(2, 9), st.integers(1, 3))
  def test_equals_the_oracle(self, data, size, min_count):
    log_schema = schema(size, min_count)
    log, known, counted, masks = encoded(data, log_schema)
    raw = np.array(log.extra['sku'])
    number = collections.Counter(raw[masks['train']].tolist())
    digest = {k: int(hashing.digests(np.array([k], object))[0]) for k in raw}
    kept = sorted(
      (k for k, n in number.items() if n >= min_count),
      key=lambda k: (-number[k], digest[k]),
    )[: size - 1]
    row = {k: i for i, k in enumerate(kept)}
    ids = log.features['sku']
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual(ids.tolist(), [row.get(k, size - 1) for k in raw])

    (counts,) = vocabulary.id_counts(log_schema, counted, known)
    self.assertEqual((counts.known, counts.distinct), (len(kept), len(number)))
    for split, mask in masks.items():
      outside = [k for k in raw[mask].tolist() if k not in row]
      self.assertEqual(
        dataclasses.astuple(counts.unseen[split]),
        (len(set(outside)), len(outside), mask.sum()),
      )

  @hypothesis.given(columns(min_size=2), st.integers(1, 29))
  def test_parts_tell_what_the_whole_tells(self, data, cut):
    log_schema = schema()
    log = EventLog.from_columns(data, log_schema)
    train = log.time < 5
    masks = {'train': train, 'validation': ~train, 'test': np.zeros_like(train)}
    whole = vocabulary.count(log_schema, log.features, masks)
    parts = [
      vocabulary.count(
        log_schema,
        {'sku': log.features['sku'][some]},
        {split: mask[some] for split, mask in masks.items()},
      )
      for some in (slice(cut), slice(cut, None))
    ]
    merged = vocabulary.merge(log_schema, parts)
    for name, values in whole.items():
      np.testing.assert_array_equal(merged[name], values)

  def test_a_shared_table_has_one_vocabulary(self):
    last = Categorical(
      'last', 5, column='last_sku', table='sku', ids='vocabulary'
    )
    log_schema = schema(hidden=(last,))
    data = {
      'uid': [1, 1],
      'ts': [1, 2],
      'sku': ['a', 'b'],
      'last_sku': ['b', 'c'],
      'click': [0, 1],
    }
    log, known, _, _ = encoded(data, log_schema)  # Of them b is there twice.
    self.assertEqual(list(known), ['sku'])
    self.assertEqual(log.features['sku'].tolist(), [4, 0])
    self.assertEqual(log.features['last'].tolist(), [0, 4])

  @hypothesis.given(columns(min_size=4))
  def test_a_request_has_the_ids_of_the_log(self, data):
    log_schema = schema()
    log, known, _, _ = encoded(data, log_schema)
    with tempfile.TemporaryDirectory() as folder:
      FittedFeatures(vocabularies=known).save(pathlib.Path(folder))
      loaded = features.load(pathlib.Path(folder))
    self.assertEqual(
      loaded.digest(), FittedFeatures(vocabularies=known).digest()
    )
    every = np.ones(len(log), bool)
    rows = make_rows(log, every, RowConfig('streaming'), loaded)
    for r, row in enumerate(rows):
      events = rows.candidate_events(r)
      shown = {'sku': log.extra['sku'][events].tolist()}
      asked = requests.make_row(
        log_schema,
        context={},
        history=shown,
        candidates=shown,
        features=loaded,
      )
      for part in (asked.history, asked.candidates):
        np.testing.assert_array_equal(part['sku'], row.candidates['sku'])

  def test_without_the_vocabulary(self):
    data = {'uid': [1], 'ts': [1], 'sku': ['a'], 'click': [1]}
    log = EventLog.from_columns(data, schema())
    with pytest.raises(ValueError, match=r"'sku' has a vocabulary.*with_vocab"):
      make_rows(log, np.ones(1, bool), RowConfig())
    with pytest.raises(ValueError, match=r"'sku' has a vocabulary.*load"):
      requests.make_row(
        schema(), context={}, history=[], candidates=[{'sku': 'a'}]
      )

  @parameterized.parameters(
    ({'ids': 'vocab'}, "ids='vocab' must be"),
    ({'ids': 'vocabulary', 'size': 1}, r'size=1 .* at least 2'),
    ({'ids': 'vocabulary', 'min_count': 0}, 'min_count=0 .* at least 1'),
    ({'ids': 'hash', 'min_count': 3}, "min_count=3 with ids='hash'"),
    ({'ids': 'vocabulary', 'out_of_vocabulary': True}, 'out_of_vocabulary'),
  )
  def test_bad_options(self, fields, message):
    with pytest.raises(ValueError, match=message):
      Categorical('x', **{'size': 9, **fields})

  @parameterized.parameters(
    (Categorical('y', 5, table='sku', ids='hash'), "'y'.*has ids='hash'"),
    (
      Categorical('y', 5, table='sku', ids='vocabulary', min_count=9),
      r'disagree on size and min_count: \(5, 9\) and \(5, 2\)',
    ),
  )
  def test_tables_that_cannot_be_shared(self, other, message):
    with pytest.raises(ValueError, match=message):
      schema(context=(other,))


class CollisionsTest(parameterized.TestCase):
  @hypothesis.given(columns(), st.integers(1, 12))
  def test_counted_as_by_hand(self, data, size):
    item = Categorical('sku', size, ids='hash')
    log_schema = dataclasses.replace(schema(), item=(item,))
    (counts,) = EventLog.from_columns(data, log_schema).hashed
    keys = sorted(set(data['sku']))
    rows = hashing.hash_strings(keys, size).tolist()
    self.assertEqual(counts.distinct, len(keys))
    self.assertEqual(counts.sharing, sum(rows.count(r) > 1 for r in rows))

  @parameterized.parameters((1000, 300), (1000, 2500), (2**20, 5000))
  def test_estimated_from_rows_alone(self, size, number):
    item = Categorical('sku', size, ids='hash')
    digests = hashing.digests(np.arange(number))
    exact = vocabulary.of_hash(item, digests)
    rows = len(np.unique(hashing.rows(digests, size)))
    found = vocabulary.of_rows(item, rows)
    self.assertEqual(exact.distinct, number)
    # Linear counting: its standard error at a load of 2.5 is 9 % at worst here.
    self.assertAlmostEqual(found.distinct, number, delta=0.09 * number)
    # Pairs of equal rows are about Poisson, and each is two ids.
    self.assertAlmostEqual(
      found.sharing, exact.sharing, delta=4 * (2 * exact.sharing) ** 0.5
    )
    self.assertIn(f'about {found.distinct} distinct', str(found))

  @parameterized.parameters((1, 0, 0), (1, 1, 1), (9, 0, 0), (9, 1, 1))
  def test_few_rows(self, size, occupied, distinct):
    item = Categorical('sku', size, ids='hash')
    found = vocabulary.of_rows(item, occupied)
    self.assertEqual((found.distinct, found.sharing), (distinct, 0))

  def test_no_row_is_free(self):
    item = Categorical('sku', 9, ids='hash')
    found = vocabulary.of_rows(item, 9)
    # More than of one free row: half a one is taken to be.
    self.assertGreater(found.distinct, vocabulary.of_rows(item, 8).distinct)
    self.assertGreater(found.sharing, 9)

  def test_a_dataset_says_both(self):
    size = 40
    rng = np.random.default_rng(0)
    log = EventLog.from_columns(
      {
        'uid': rng.integers(0, 4, size),
        'ts': np.arange(size),
        'sku': rng.integers(0, 9, size),
        'shop': [f's{i % 3}' for i in range(size)],
        'click': rng.integers(0, 2, size),
      },
      schema(context=(Categorical('shop', 1, ids='hash'),)),
    )
    config = datasets.DataConfig(Held(log), RowConfig('pointwise'))
    unknown, shared = datasets.load(config).ids
    self.assertRegex(
      str(unknown),
      r'^sku: a vocabulary of 4 of 9 training ids, in 5 rows; not in it: '
      r'train 5 ids \(\d+\.\d\d% of 20 events\), validation ',
    )
    self.assertEqual(
      str(shared),
      'shop: 3 distinct ids hashed to 1 rows; 3 (100.00%) share theirs with '
      'another id',
    )


if __name__ == '__main__':
  absltest.main()
