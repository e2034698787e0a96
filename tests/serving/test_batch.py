"""Joins, contexts and checks of candidates that are ranked from files."""

import dataclasses
import itertools
import sys
from unittest import mock

import jax
import numpy as np
import pyarrow as pa
import pytest
from absl.testing import absltest
from pyarrow import csv, parquet

from histjax import Scorer
from histjax.data import files, joins, requests, rows
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig
from histjax.features import TimeGap
from histjax.schema import MAX_DENSE, Categorical, Dense, Schema, Task
from histjax.serving import batch
from tests import support
from tests.data import logs

SCHEMA = Schema(
  'user',
  'time',
  context=(Categorical('land', 50, ids='hash'),),
  item=(Categorical('sku', 97, ids='hash'), Dense('price')),
  action=(Categorical('clicked', 2),),
  tasks=(Task('click', column='clicked'), Task('buy')),
)
TIME = np.datetime64('2022-05-01T10:00:00', 'us')
SECOND = np.timedelta64(1, 's')
LOG = {
  'user': [1, 2, 1, 3, 2, 1],
  'time': TIME + SECOND * np.array([5, 1, 3, 2, 9, 4]),
  'sku': ['007', '7', 'a', 'b', 'c', '07'],
  'price': [0.5, 1.0, 0.2, 0.1, 0.7, 0.9],
  'clicked': [1, 0, 1, 0, 1, 0],
}
SHOWN = {
  'user': [2, 1, 2, 1, 3],
  'time': np.full(5, TIME + 60 * SECOND),
  'sku': ['7', '007', 'x', '7', 'b'],
  'price': [0.1, 0.2, 0.3, 0.4, 0.5],
  'land': ['de', 'us', 'us', 'us', 'de'],
}


def close(found, wanted):
  """Equal but for sums in another order, of batches of another shape."""
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.fixture(scope='module')
def trained():
  events = {**LOG, 'land': ['de'] * 6, 'buy': [0] * 6}
  log, fitted = logs.derive(EventLog.from_columns(events, SCHEMA), TimeGap(8))
  model = support.config(schema=log.schema)
  _, variables = support.init(model)
  join = joins.Join(model.schema, RowConfig('pointwise'), fitted)
  return batch.Model(model, variables, join)


@pytest.fixture
def rank(trained, tmp_path):
  """`rank(log, shown, ending)`: the table that is written, with all rows."""
  number = itertools.count()

  def rank(log=LOG, shown=SHOWN, ending='.parquet', model=trained, **options):
    paths = []
    for name, data in (('log', log), ('shown', shown)):
      path = tmp_path / f'{name}{ending}'
      table = pa.table(data)
      if ending == '.csv':
        csv.write_csv(table, path)
      else:
        parquet.write_table(table, path)
      paths.append([str(path)])
    output = tmp_path / f'out{next(number)}.parquet'
    options = {'top_k': 99, 'users_per_batch': 8, **options}
    batch.rank_files(lambda: model, *paths, output, batch.Options(**options))
    return parquet.read_table(output)

  return rank


@pytest.fixture
def scores_of(rank):
  """As `rank`, the first task's score of each candidate."""

  def scores(*args, **options):
    table = rank(*args, **options)
    found = np.empty(table.num_rows)
    found[table['row'].to_numpy()] = table['score_click'].to_numpy()
    return found

  return scores


def with_columns(data, **columns):
  return {**data, **columns}


def text(data, *columns):
  return {
    k: [str(v) for v in x] if k in columns else x for k, x in data.items()
  }


def test_users_are_joined_across_types_and_formats(scores_of, capsys):
  wanted = scores_of()
  assert '3 of 3 users are in the log' in capsys.readouterr().out
  assert len(np.unique(wanted)) == len(wanted)
  nobody = scores_of(
    shown=with_columns(SHOWN, user=list('abcde')), allow_new_users=True
  )
  assert np.abs(nobody - wanted).min() > 1e-4
  for log in (LOG, text(LOG, 'user')):
    for data in (SHOWN, text(SHOWN, 'user')):
      for ending in ('.parquet', '.csv'):
        close(scores_of(log, data, ending), wanted)


def test_a_guest_among_integers(scores_of, capsys):
  wanted = scores_of()
  nobody = scores_of(
    shown=with_columns(SHOWN, user=[4, 4, 4, 4, 4]), allow_new_users=True
  )
  users = ['2', '1', '2', '1', 'guest']
  for ending in ('.parquet', '.csv'):
    found = scores_of(shown=with_columns(SHOWN, user=users), ending=ending)
    assert '2 of 3 users are in the log' in capsys.readouterr().out
    close(found[:4], wanted[:4])
    close(found[4:], nobody[4:])


def test_spellings_are_users_of_their_own(scores_of, capsys):
  wanted = scores_of()
  capsys.readouterr()
  found = scores_of(
    shown=with_columns(SHOWN, user=['2', '001', '2', '01', '3']), ending='.csv'
  )
  assert '2 of 4 users are in the log' in capsys.readouterr().out
  same = [0, 2, 4]
  close(found[same], wanted[same])
  assert (np.abs(found - wanted)[[1, 3]] > 1e-4).all()


@pytest.mark.parametrize(
  ('users', 'kind'),
  [
    ([2, 1, 2, 1, 3], pa.int64()),
    (np.array([2, 1, 2**64 - 1, 1, 3], np.uint64), pa.uint64()),
    (['2', '1', '2', '1', '3'], pa.string()),
    (['2', '1', 'x', '-1', '10'], pa.string()),
  ],
)
def test_users_come_in_order_as_the_file_has_them(rank, users, kind):
  table = rank(shown=with_columns(SHOWN, user=users), users_per_shard=1)
  assert table.schema.field('user').type == kind
  keys = list(dict.fromkeys(table['user'].to_pylist()))
  assert keys == sorted(set(np.array(users).tolist()), key=order_of)


def order_of(key):
  try:
    return (0, int(key), '')
  except ValueError:
    return (1, 0, key)


@pytest.mark.parametrize(
  ('values', 'kind', 'ending'),
  [
    ([5, -7, 2**62, 0, 5], pa.int64(), '.parquet'),
    (np.array([5, 7, 2**64 - 1, 0, 5], np.uint64), pa.uint64(), '.parquet'),
    (['007', 'a,"b"', 'NA', '1e5', '7'], pa.large_string(), '.csv'),
  ],
)
def test_columns_to_keep(trained, rank, values, kind, ending):
  """Each candidate's own, whatever its shard, as the files have them."""
  keep = ('gtin', 'sku')
  model = dataclasses.replace(
    trained, join=dataclasses.replace(trained.join, keep=keep)
  )
  shown = with_columns(SHOWN, gtin=values)
  plain = rank(shown=shown, ending=ending)
  found = rank(shown=shown, ending=ending, model=model, users_per_shard=1)
  rows = found['row'].to_numpy()
  assert found['sku'].to_pylist() == [SHOWN['sku'][r] for r in rows]
  assert found['gtin'].to_pylist() == [values[r] for r in rows]
  assert found.schema.field('gtin').type == kind
  assert found.column_names[:5] == ['user', 'rank', 'row', *keep]
  assert found.drop_columns(keep).column_names == plain.column_names
  assert rows.tolist() == plain['row'].to_pylist()


def test_columns_to_keep_of_files_that_differ(trained, tmp_path):
  keep = ('gtin',)
  paths = []
  for name, values in (('a', [1, 2, 3, 4, 5]), ('b', list('vwxyz'))):
    paths.append(str(tmp_path / f'{name}.parquet'))
    parquet.write_table(pa.table({**SHOWN, 'gtin': values}), paths[-1])
  parquet.write_table(pa.table(LOG), tmp_path / 'log.parquet')
  model = dataclasses.replace(
    trained, join=dataclasses.replace(trained.join, keep=keep)
  )
  args = [str(tmp_path / 'log.parquet')], paths, tmp_path / 'out.csv'
  batch.rank_files(lambda: model, *args, batch.Options(users_per_shard=1))
  found = csv.read_csv(tmp_path / 'out.csv')
  wanted = [*'12345', *'vwxyz']
  assert found['gtin'].to_pylist() == [
    wanted[r] for r in found['row'].to_pylist()
  ]


@pytest.mark.parametrize(
  ('keep', 'message'),
  [
    (('user',), "--keep=user: the output has a column 'user' already"),
    (('row',), "has a column 'row' already"),
    (('sku', 'sku'), "--keep=sku,sku: the output has a column 'sku' already"),
    (('skuu',), r"'skuu' is not in .*mean 'sku'\?. It is to be kept; give it"),
    (('price',), "'price': .*row 0 holds 0.1: of type double, which is no key"),
  ],
)
def test_columns_that_cannot_be_kept(trained, rank, tmp_path, keep, message):
  model = dataclasses.replace(
    trained, join=dataclasses.replace(trained.join, keep=keep)
  )
  with pytest.raises(ValueError, match=message):
    rank(model=model)
  assert not list(tmp_path.glob('out*'))


def test_a_type_of_a_column_that_the_model_does_not_read(trained, rank):
  """As of a feature in `data.without`, or the label of another task."""
  wanted = rank()
  schema = dataclasses.replace(
    trained.join.schema, column_types={'gone': 'integer'}
  )
  join = dataclasses.replace(trained.join, schema=schema)
  assert rank(model=dataclasses.replace(trained, join=join)) == wanted


def test_no_user_is_known(scores_of, tmp_path):
  with pytest.raises(
    ValueError, match=r"none of the 5 users.*'a', is in the log.*'1'.*--allow"
  ):
    scores_of(shown=with_columns(SHOWN, user=list('abcde')))
  assert not list(tmp_path.glob('out*'))


def test_every_context_has_its_own_row(scores_of):
  """As if every candidate had been asked for alone."""
  both = scores_of()
  for land in ('de', 'us'):
    one = scores_of(shown=with_columns(SHOWN, land=[land] * 5))
    same = np.array(SHOWN['land']) == land
    # Other shapes sum in another order: a few units in the last place.
    np.testing.assert_allclose(both[same], one[same], rtol=1e-6)
    assert (np.abs(both - one)[~same] > 1e-5).all()
  few = scores_of(users_per_batch=1)
  np.testing.assert_allclose(few, both, rtol=1e-6)


@pytest.mark.parametrize('unit', ['s', 'ms', 'ns'])
def test_one_clock(scores_of, unit):
  wanted = scores_of()
  times = SHOWN['time'].astype(f'datetime64[{unit}]')
  close(scores_of(shown=with_columns(SHOWN, time=times)), wanted)
  zoned = pa.array(times, pa.timestamp(unit, 'Asia/Tokyo'))
  close(scores_of(shown=with_columns(SHOWN, time=zoned)), wanted)
  texts = [f'{t}+00:00' for t in np.datetime_as_string(times)]
  found = scores_of(shown=with_columns(SHOWN, time=texts), ending='.csv')
  close(found, wanted)


@pytest.mark.parametrize(
  ('column', 'values', 'message'),
  [
    ('price', [0, 0, 0, 3e38, 0], r'shown\.csv row 3 holds 3e\+38: too large'),
    ('price', [0, 0, 0, 1e39, 0], r'row 3 holds 1e\+39: too large'),
    ('price', [0, 0, 'x', 0.5, 0], "row 2 holds 'x': a number is needed"),
    ('land', ['de', '', 'de', 'de', 'de'], 'row 1 has no value'),
    ('time', [1, 2, 3, 4, 5], 'timestamps in the log and numbers in the cand'),
    ('time', [1, 2, 3, 4, 5], 'timestamps in the training log and '),
    (
      'time',
      ['2022-04-01'] * 5,
      r"user '2': .*shown\.csv row 0 is earlier than .*events after it$",
    ),
  ],
)
def test_bad_candidates(scores_of, tmp_path, column, values, message):
  values = [str(v) for v in values]
  with pytest.raises(ValueError, match=message):
    scores_of(shown=with_columns(SHOWN, **{column: values}), ending='.csv')
  assert not list(tmp_path.glob('out*'))  # It can be run again at once.


def test_candidates_of_one_row_see_different_histories(trained, rank):
  """With strict ties; the row is longer than `history_length`."""
  config = RowConfig('pointwise', history_length=8, ties='strict')
  join = dataclasses.replace(trained.join, config=config)
  log = {name: np.repeat(values, 5) for name, values in LOG.items()}
  found = rank(log, LATE, model=dataclasses.replace(trained, join=join))
  events = np.argsort(log['time'], kind='stable')
  row = requests.make_row(
    join.schema,
    context={'land': 'de'},
    history={
      name: [values[i] for i in events if log['user'][i] == 1]
      for name, values in log.items()
    },
    candidates=LATE,
    config=config,
    features=join.features,
  )
  assert len(row.history['sku']) == 13
  wanted = Scorer(trained.config, trained.variables).score_plain(
    rows.collate([row])
  )
  close(
    found.sort_by('row')['score_click'].to_numpy(),
    1 / (1 + np.exp(-wanted['click'][0])),
  )


# One is as old as the user's last event, which it does not see.
LATE = {
  'user': [1, 1],
  'time': TIME + SECOND * np.array([60, 5]),
  'sku': ['7', '7'],
  'price': [0.1, 0.1],
  'land': ['de', 'de'],
}


def test_a_bad_event_is_found_first(scores_of, monkeypatch):
  monkeypatch.setattr(Scorer, 'encode', None)
  log = with_columns(LOG, price=[0, 0, 0, 3e38, 0, 0])
  with pytest.raises(ValueError, match=r'log\.csv row 3 holds 3e\+38: too lar'):
    scores_of(log, ending='.csv')


@pytest.mark.parametrize(
  ('of', 'column', 'use'),
  [
    ('log', 'price', "feature 'price'"),
    ('log', 'time', 'the time'),
    ('shown', 'price', "feature 'price'"),
    ('shown', 'user', 'the user'),
    ('shown', 'time', 'the time, which a derived feature, .* needs'),
  ],
)
def test_a_missing_column_is_found_before_any_file_is_gone_through(
  scores_of, monkeypatch, of, column, use
):
  monkeypatch.setattr(files, 'digest', None)
  data = {'log': LOG, 'shown': SHOWN}
  data[of] = {k: v for k, v in data[of].items() if k != column}
  said = rf"'{column}' is not in .*{of}\..*\. It is {use}; give it$"
  with pytest.raises(ValueError, match=said):
    scores_of(**data)


def test_another_name_of_a_folder_is_another_input(trained, tmp_path):
  log, shown = tmp_path / 'log.parquet', tmp_path / 'shown'
  parquet.write_table(pa.table(LOG), log)
  (shown / 'land=de').mkdir(parents=True)
  data = {k: v for k, v in SHOWN.items() if k != 'land'}
  parquet.write_table(pa.table(data), shown / 'land=de' / 'x.parquet')
  args = (lambda: trained, [str(log)], [str(shown)], tmp_path / 'out')
  options = batch.Options(top_k=99, users_per_batch=8)
  batch.rank_files(*args, options)
  batch.rank_files(*args, options)
  (shown / 'land=de').rename(shown / 'land=us')
  with pytest.raises(ValueError, match='candidates'):
    batch.rank_files(*args, options)


def test_a_user_that_is_larger_than_a_shard(rank):
  many = {name: np.repeat(values, 9000) for name, values in SHOWN.items()}
  with pytest.raises(
    ValueError, match=r"user '1' has 3 events and 18000 cand.*memory=1 MiB"
  ):
    rank(shown=many, memory=2.0**20)


def test_the_largest_values_have_finite_scores(scores_of):
  largest = [MAX_DENSE, -MAX_DENSE] * 3
  found = scores_of(
    with_columns(LOG, price=largest), with_columns(SHOWN, price=largest[:5])
  )
  assert np.isfinite(found).all()


def test_no_score_is_nan(scores_of, monkeypatch):
  whole = Scorer.score_async

  def broken(self, cache, candidates, context):
    bad = np.asarray(candidates.features['price']) == np.float32(0.4)
    if bad.any():
      raise_ = mock.Mock()
      raise_.result.side_effect = ValueError("the logit 'click' is nan")
      return raise_
    return whole(self, cache, candidates, context)

  monkeypatch.setattr(Scorer, 'score_async', broken)
  with pytest.raises(
    ValueError, match=r"user '1': .*shown\.parquet row 3: the logit .* is nan"
  ):
    scores_of()


def test_probabilities_of_1_are_ranked_by_their_logits(rank, trained):
  """As a server ranks them."""
  wanted = rank()['row'].to_pylist()
  high = jax.tree.map(np.array, trained.variables)
  high['params']['head']['logits']['bias'] += 30
  model = dataclasses.replace(trained, variables=high)
  found = rank(model=model)
  assert set(found['score_click'].to_pylist()) == {1.0}
  assert found['row'].to_pylist() == wanted
  # In one of both orders of the file it is not the file's.
  back = {name: values[::-1] for name, values in SHOWN.items()}
  found = rank(model=model, shown=back)['row'].to_pylist()
  assert found == [4 - row for row in wanted]


def test_ranks(rank):
  wanted = rank().to_pydict()
  for task in ('click', 'buy'):
    for top_k in (1, 2):
      found = rank(task=task, top_k=top_k, users_per_shard=2).to_pylist()
      rows = [
        dict(zip(wanted, values, strict=True))
        for values in zip(*wanted.values(), strict=True)
      ]
      rows.sort(key=lambda r: (r['user'], -r[f'score_{task}'], r['row']))
      best = []
      for _, own in itertools.groupby(rows, key=lambda r: r['user']):
        best += [{**r, 'rank': i + 1} for i, r in enumerate(own) if i < top_k]
      assert [(r['user'], r['rank'], r['row']) for r in found] == [
        (r['user'], r['rank'], r['row']) for r in best
      ]
  with pytest.raises(ValueError, match=r"--task=sell is not a task.*'buy'"):
    rank(task='sell')


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('top_k', 0, 'top_k=0 must be >= 1'),
    ('users_per_batch', 0, 'users_per_batch=0 must be >= 1'),
    ('users_per_shard', 0, 'users_per_shard=0 must be >= 1'),
    ('memory', float('inf'), 'memory=inf bytes .*, and finite; give'),
    ('memory', 1000.0, r'memory=1000 bytes \(9.3\S+e-07 GiB\).*--memory=0.001'),
  ],
)
def test_options(field, value, message):
  with pytest.raises(ValueError, match=message):
    batch.Options(**{field: value})


def test_ray_is_an_extra(rank, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'ray', None)
  with pytest.raises(
    ImportError, match=r"install the extra: .*'histjax\[ray\]'"
  ):
    batch.rank_files(
      None, ['absent'], ['absent'], tmp_path / 'x', engine=batch.Ray()
    )


if __name__ == '__main__':
  absltest.main()
