"""MovieLens 1M: a TFDS builder without TensorFlow, and its schema.

Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. Its licence
allows research and forbids redistribution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from histjax.data import sources
from histjax.data.events import EventLog
from histjax.data.splits import FractionSplit
from histjax.schema import Categorical, Schema, Task

SOURCE = sources.Source(
  url='https://files.grouplens.org/datasets/movielens/ml-1m.zip',
  folder='ml-1m',
  files=('ratings.dat', 'users.dat', 'movies.dat'),
)

GENDERS = ('F', 'M')
AGES = (1, 18, 25, 35, 45, 50, 56)
"""The lower ends of the age groups, as the files write them."""
GENRES = (
  *('Action', 'Adventure', 'Animation', "Children's", 'Comedy', 'Crime'),
  *('Documentary', 'Drama', 'Fantasy', 'Film-Noir', 'Horror', 'Musical'),
  *('Mystery', 'Romance', 'Sci-Fi', 'Thriller', 'War', 'Western'),
)
MAX_GENRES = 6
"""The most genres that a movie has."""
FIRST_YEAR = 1900
NUM_YEARS = 128

SPLIT = FractionSplit(train=0.8, validation=0.1)
"""The protocol `ml1m`: by number, per user, in time order."""

SCHEMA = Schema(
  user='user_id',
  time='timestamp',
  context=(
    Categorical('user_id', 6041),
    Categorical('gender', len(GENDERS)),
    Categorical('age', len(AGES)),
    Categorical('occupation', 21),
  ),
  item=(
    Categorical('movie_id', 3953),
    *(
      Categorical(f'genre_{i}', len(GENRES) + 1, table='genre')
      for i in range(3)
    ),
    Categorical('year', NUM_YEARS),
  ),
  action=(Categorical('rating', 6),),
  tasks=(
    Task('like', column='rating', threshold=4),
    *(Task(f'rating_{n}', column='rating', threshold=n) for n in (2, 3, 5)),
  ),
)
"""No time gaps: see `load`. Movies have up to six genres; the first three, in
the alphabetical order of the files, are read (all there are for 97 % of the
movies). Genre 0 stands for none."""


class Ml1m(tfds.core.GeneratorBasedBuilder):
  """MovieLens 1M, one example a user, ratings in the order of the file."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = SOURCE.instructions

  def _info(self) -> tfds.core.DatasetInfo:
    ragged = tfds.features.Tensor(shape=(None,), dtype=np.int64)
    return tfds.core.DatasetInfo(
      builder=self,
      description='1,000,209 ratings of movies by 6,040 users, 2000-2003.',
      homepage='https://grouplens.org/datasets/movielens/1m/',
      features=tfds.features.FeaturesDict(
        {
          'user_id': np.int64,
          'gender': np.int64,
          'age': np.int64,
          'occupation': np.int64,
          'zip_code': tfds.features.Text(),
          'movie_id': ragged,
          'rating': ragged,
          'timestamp': ragged,
          'year': ragged,
          'genres': tfds.features.Tensor(
            shape=(None, MAX_GENRES), dtype=np.int64
          ),
        }
      ),
      metadata=tfds.core.MetadataDict(),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    contents = SOURCE.read(dl_manager)
    self.info.metadata['files'] = sources.fingerprint(contents)
    return {'events': self._generate_examples(contents)}

  def _generate_examples(self, contents) -> Iterator[tuple[int, dict]]:
    users = {
      int(user): {
        'user_id': int(user),
        'gender': _position(GENDERS, gender, 'users.dat', 'gender'),
        'age': _position(AGES, int(age), 'users.dat', 'age'),
        'occupation': int(occupation),
        'zip_code': zip_code,
      }
      for user, gender, age, occupation, zip_code in _records(
        contents, 'users.dat', 5
      )
    }
    movies = {
      int(movie): (_year(title), _genres(genres))
      for movie, title, genres in _records(contents, 'movies.dat', 3)
    }
    ratings = np.array(list(_records(contents, 'ratings.dat', 4)), np.int64)
    user = ratings[:, 0]
    order = np.argsort(user, kind='stable')
    ratings = ratings[order]
    ids, starts = np.unique(ratings[:, 0], return_index=True)
    for key, part in zip(ids, np.split(ratings, starts[1:]), strict=True):
      _check_known(users, [key], 'user', 'users.dat')
      _check_known(movies, part[:, 1], 'movie', 'movies.dat')
      facts = [movies[movie] for movie in part[:, 1].tolist()]
      yield (
        int(key),
        {
          **users[int(key)],
          'movie_id': part[:, 1],
          'rating': part[:, 2],
          'timestamp': part[:, 3],
          'year': np.array([year for year, _ in facts]),
          'genres': np.array([genres for _, genres in facts]),
        },
      )


def load(*, data_dir: str = '', manual_dir: str = '') -> EventLog:
  """The ratings as a log, prepared first if need be.

  The schema has the order of a user's ratings and no feature made of the
  values of their times: users rated many movies at one sitting, and in some
  copies of the files part of the times is reconstructed.

  Args:
    data_dir: see `sources.prepare`.
    manual_dir: see `sources.prepare`.

  Raises:
    ValueError: the data is not to be had; see `sources.prepare`.
  """
  builder = sources.prepare(
    Ml1m, SOURCE, data_dir=data_dir, manual_dir=manual_dir
  )
  columns = sources.columns_of(builder)
  for i in range(3):
    columns[f'genre_{i}'] = columns['genres'][:, i]
  return EventLog.from_columns(columns, SCHEMA)


def _records(contents, name: str, fields: int) -> Iterator[list[str]]:
  # The files are Latin-1, in which every byte is a character. Not splitlines:
  # it would also split at some of them.
  lines = contents[name].decode('latin-1').rstrip('\r\n').split('\n')
  for number, line in enumerate(lines, 1):
    record = line.rstrip('\r').split('::')
    if len(record) != fields:
      raise ValueError(
        f'{name} line {number} has {len(record)} fields in place of {fields}: '
        f'{line[:80]!r}; the file is cut short or of another data set'
      )
    yield record


def _position(values: tuple, value, name: str, field: str) -> int:
  if value not in values:
    raise ValueError(f'{name}: {field} {value!r} is none of {values}')
  return values.index(value)


def _year(title: str) -> int:
  found = re.search(r'\((\d{4})\)\s*$', title)
  if not found or not 0 < int(found[1]) - FIRST_YEAR < NUM_YEARS:
    raise ValueError(f'movies.dat: title {title!r} does not end in a year')
  return int(found[1]) - FIRST_YEAR


def _genres(field: str) -> list[int]:
  names = field.split('|')
  if len(names) > MAX_GENRES:
    raise ValueError(f'movies.dat: {field!r} has over {MAX_GENRES} genres')
  ids = [1 + _position(GENRES, n, 'movies.dat', 'genre') for n in names]
  return ids + [0] * (MAX_GENRES - len(ids))


def _check_known(table: dict, ids, what: str, name: str) -> None:
  for key in ids:
    if int(key) not in table:
      raise ValueError(
        f'ratings.dat: {what} {int(key)} is not in {name}; the files are not '
        'of one data set'
      )
