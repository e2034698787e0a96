"""Joins, contexts and checks of the candidates that `score` ranks."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from absl.testing import absltest
from pyarrow import csv, parquet

import ranking
from histjax import Scorer
from histjax.data.events import EventLog
from histjax.data.rows import RowConfig
from histjax.features import TimeGap
from histjax.schema import MAX_DENSE, Categorical, Dense, Schema, Task
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
  _, params = support.init(model)
  join = ranking.Join(model.schema, RowConfig('pointwise'), fitted)
  return Scorer(model, params), join


@pytest.fixture
def scores_of(trained, tmp_path):
  scorer, join = trained

  def scores(log=LOG, shown=SHOWN, ending='.parquet', rows_per_batch=8):
    paths = []
    for name, data in (('log', log), ('shown', shown)):
      path = tmp_path / f'{name}{ending}'
      table = pa.table(data)
      if ending == '.csv':
        csv.write_csv(table, path)
      else:
        parquet.write_table(table, path)
      paths.append([str(path)])
    tables = ranking.read(join, *paths)
    found = ranking.score(scorer, join, *tables, rows_per_batch=rows_per_batch)
    return found['click'], *tables

  return scores


def with_columns(data, **columns):
  return {**data, **columns}


def text(data, *columns):
  return {
    k: [str(v) for v in x] if k in columns else x for k, x in data.items()
  }


def test_users_are_joined_across_types_and_formats(scores_of):
  wanted, log, shown = scores_of()
  assert ranking.check_known(log, shown) == 3
  assert len(np.unique(wanted)) == len(wanted)
  nobody, _, shown = scores_of(shown=with_columns(SHOWN, user=list('abcde')))
  assert np.abs(nobody - wanted).min() > 1e-4
  for log in (LOG, text(LOG, 'user')):
    for data in (SHOWN, text(SHOWN, 'user')):
      for ending in ('.parquet', '.csv'):
        found, _, _ = scores_of(log, data, ending)
        close(found, wanted)


def test_a_guest_among_integers(scores_of):
  wanted, _, _ = scores_of()
  nobody, _, _ = scores_of(shown=with_columns(SHOWN, user=[4, 4, 4, 4, 4]))
  users = ['2', '1', '2', '1', 'guest']
  for ending in ('.parquet', '.csv'):
    found, log, shown = scores_of(
      shown=with_columns(SHOWN, user=users), ending=ending
    )
    assert ranking.check_known(log, shown) == 2
    close(found[:4], wanted[:4])
    close(found[4:], nobody[4:])


def test_spellings_are_users_of_their_own(scores_of):
  wanted, _, _ = scores_of()
  found, log, shown = scores_of(
    shown=with_columns(SHOWN, user=['2', '001', '2', '01', '3']), ending='.csv'
  )
  assert ranking.check_known(log, shown) == 2
  same = [0, 2, 4]
  close(found[same], wanted[same])
  assert (np.abs(found - wanted)[[1, 3]] > 1e-4).all()


def test_no_user_is_known(scores_of):
  _, log, shown = scores_of(shown=with_columns(SHOWN, user=list('abcde')))
  with pytest.raises(
    ValueError, match=r"none of the 5 users.*'a', is in the log.*'1'.*--allow"
  ):
    ranking.check_known(log, shown)


def test_every_context_has_its_own_row(scores_of):
  """As if every candidate had been asked for alone."""
  both, _, shown = scores_of()
  assert [len(g) for g in ranking.groups(SCHEMA, shown)] == [2, 1, 1, 1]
  for land in ('de', 'us'):
    one, _, _ = scores_of(shown=with_columns(SHOWN, land=[land] * 5))
    same = np.array(SHOWN['land']) == land
    # Other shapes sum in another order: a few units in the last place.
    np.testing.assert_allclose(both[same], one[same], rtol=1e-6)
    assert (np.abs(both - one)[~same] > 1e-5).all()
  few, _, _ = scores_of(rows_per_batch=1)
  np.testing.assert_allclose(few, both, rtol=1e-6)


@pytest.mark.parametrize('unit', ['s', 'ms', 'ns'])
def test_one_clock(scores_of, unit):
  wanted, _, _ = scores_of()
  times = SHOWN['time'].astype(f'datetime64[{unit}]')
  found, _, _ = scores_of(shown=with_columns(SHOWN, time=times))
  close(found, wanted)
  zoned = pa.array(times, pa.timestamp(unit, 'Asia/Tokyo'))
  found, _, _ = scores_of(shown=with_columns(SHOWN, time=zoned))
  close(found, wanted)
  texts = [f'{t}+00:00' for t in np.datetime_as_string(times)]
  found, _, _ = scores_of(shown=with_columns(SHOWN, time=texts), ending='.csv')
  close(found, wanted)


@pytest.mark.parametrize(
  ('column', 'values', 'message'),
  [
    ('price', [0, 0, 0, 3e38, 0], r'shown\.csv row 3 holds 3e\+38: too large'),
    ('price', [0, 0, 0, 1e39, 0], r'row 3 holds 1e\+39: too large'),
    ('price', [0, 0, 'x', 0.5, 0], "row 2 holds 'x': a number is needed"),
    ('land', ['de', '', 'de', 'de', 'de'], 'row 1 has no value'),
    ('time', [1, 2, 3, 4, 5], 'timestamps in the log and numbers in the cand'),
    ('time', ['2022-04-01'] * 5, "user '1': .*candidate 0 is earlier"),
  ],
)
def test_bad_candidates(scores_of, column, values, message):
  values = [str(v) for v in values]
  with pytest.raises(ValueError, match=message):
    scores_of(shown=with_columns(SHOWN, **{column: values}), ending='.csv')


def test_the_largest_values_have_finite_scores(scores_of):
  largest = [MAX_DENSE, -MAX_DENSE] * 3
  found, _, _ = scores_of(
    with_columns(LOG, price=largest), with_columns(SHOWN, price=largest[:5])
  )
  assert np.isfinite(found).all()


def test_no_score_is_nan(trained, scores_of, monkeypatch):
  scorer, _ = trained
  whole = scorer.score

  def broken(cache, candidates, context):
    logits = whole(cache, candidates, context)
    bad = np.asarray(candidates.features['price']) == np.float32(0.4)
    return {k: np.where(bad, np.nan, v) for k, v in logits.items()}

  monkeypatch.setattr(scorer, 'score', broken)
  with pytest.raises(
    ValueError,
    match=r"user '1': the score '(click|buy)' of .*parquet row 3 is nan",
  ):
    scores_of()


def test_ranked(scores_of):
  _, _, shown = scores_of()
  scores = {
    'click': np.array([0.1, 0.2, 0.9, 0.2, 0.5], np.float32),
    'buy': np.arange(5, dtype=np.float32),
  }
  table = ranking.ranked(SCHEMA, shown, scores, 'click', 2)
  assert {k: v.tolist() for k, v in table.items()} == {
    'user': [1, 1, 2, 2, 3],
    'rank': [1, 2, 1, 2, 1],
    'row': [1, 3, 2, 0, 4],  # Ties in the order of the file.
    'score_click': scores['click'][[1, 3, 2, 0, 4]].tolist(),
    'score_buy': [1, 3, 2, 0, 4],
  }
  table = ranking.ranked(SCHEMA, shown, scores, 'buy', 1)
  assert table['row'].tolist() == [3, 2, 4]


@pytest.mark.parametrize('user', ['rank', 'row', 'score_click', 'score_buy'])
def test_names_of_the_output(user):
  ranking.check_output(SCHEMA)
  with pytest.raises(ValueError, match=f"named '{user}', as one of the output"):
    ranking.check_output(dataclasses.replace(SCHEMA, user=user))


def test_output_is_checked_first(tmp_path):
  source = tmp_path / 'in.csv'
  source.write_text('')
  (tmp_path / 'x.csv').mkdir()
  ranking.check_path(tmp_path / 'out.csv', [str(source)])
  for path, message in (
    (tmp_path / 'out.txt', 'must end in .csv or .parquet'),
    (tmp_path / 'absent/out.csv', 'absent is no folder; make it'),
    (tmp_path / 'in.csv/out.csv', 'in.csv is no folder'),
    (tmp_path / 'x.csv', 'is a folder; name a file in it'),
    (source, 'would be among the inputs'),
  ):
    with pytest.raises(ValueError, match=message):
      ranking.check_path(path, [str(source)])
  with pytest.raises(ValueError, match='would be among the inputs'):
    ranking.check_path(tmp_path / 'out.csv', [str(tmp_path)])


def test_written_whole_or_not_at_all(tmp_path):
  columns = {'user': np.array(['a', '7'], object), 'rank': np.array([1, 2])}
  for path in (tmp_path / 'out.csv', tmp_path / 'out.parquet'):
    ranking.write(path, columns)
    read = csv.read_csv if path.suffix == '.csv' else parquet.read_table
    assert read(path).to_pydict() == {'user': ['a', '7'], 'rank': [1, 2]}
    with pytest.raises(pa.ArrowInvalid):
      ranking.write(path, {'a': np.array([1]), 'b': np.array([1, 2])})
    assert read(path).num_rows == 2
  assert len(list(tmp_path.iterdir())) == 2


def test_progress(capsys):
  assert list(ranking.progress([1, 2, 3], 2)) == [[1, 2], [3]]
  assert '3/3 requests' in capsys.readouterr().out


if __name__ == '__main__':
  absltest.main()
