"""KuaiRand-Pure: a TFDS builder without TensorFlow, and its schema.

Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with
Randomly Exposed Videos, CIKM 2022. CC BY-SA 4.0.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import tensorflow_datasets as tfds

from histjax.data import sources
from histjax.data.events import EventLog
from histjax.schema import Categorical, Dense, Schema, Task

_LATE_LOG = 'data/log_standard_4_22_to_5_08_pure.csv'
_EARLY_LOG = 'data/log_standard_4_08_to_4_21_pure.csv'
_USERS = 'data/user_features_pure.csv'
_VIDEOS = 'data/video_features_basic_pure.csv'

SOURCE = sources.Source(
  url='https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz',
  folder='KuaiRand-Pure',
  files=(_LATE_LOG, _USERS, _VIDEOS),
  optional=(_EARLY_LOG,),
)

MISSING = -1
"""In the prepared data: the files have no value (an empty field, UNKNOWN, or
-124, which the files use likewise). The schema reads each as id 0."""

VALIDATION_DATE = 20220501
TEST_DATE = 20220503
"""The protocol `kuairand`: the first dates of validation and of testing."""

MAX_TAGS = 3
_MILLISECONDS_EAST = 8 * 3_600_000  # The log's clock is China's.

VOCABULARIES = {
  'user_active_degree': (
    *('full_active', 'high_active', 'middle_active', 'low_active'),
    *('single_low_active', '30day_retention', '2_14_day_new', 'day_new'),
  ),
  'follow_user_num_range': (
    *('0', '(0,10]', '(10,50]', '(50,100]', '(100,150]', '(150,250]'),
    *('(250,500]', '500+'),
  ),
  'fans_user_num_range': (
    *('0', '[1,10)', '[10,100)', '[100,1k)', '[1k,5k)', '[5k,1w)'),
    *('[1w,10w)', '[10w,100w)', '[100w,1000w)'),
  ),
  'friend_user_num_range': (
    *('0', '[1,5)', '[5,30)', '[30,60)', '[60,120)', '[120,250)', '250+'),
  ),
  'register_days_range': (
    *('-7', '8-14', '15-30', '31-60', '61-90', '91-180', '181-365'),
    *('366-730', '730+'),
  ),
  'video_type': ('NORMAL', 'AD'),
  'upload_type': (
    *('LongImport', 'ShortImport', 'Web', 'Kmovie', 'LongPicture'),
    *('PictureSet', 'LongCamera', 'ShortCamera', 'ShareFromOtherApp'),
    *('FollowShoot', 'AiCutVideo', 'PhotoCopy', 'LipsSync'),
  ),
}
"""The files' names of each value; prepared data holds their positions."""

_ONEHOT_SIZES = (2, 7, 50, 1471, 15, 34, 3, 118, 454, 7, 5, 5, 2, 2, 2, 2, 2, 2)
_USER_COLUMNS = {
  **{
    name: len(VOCABULARIES[name])
    for name in (
      'user_active_degree',
      'follow_user_num_range',
      'fans_user_num_range',
      'friend_user_num_range',
      'register_days_range',
    )
  },
  'is_live_streamer': 2,
  'is_video_author': 2,
  **{f'onehot_feat{i}': size for i, size in enumerate(_ONEHOT_SIZES)},
}
_VIDEO_COLUMNS = {
  'video_type': len(VOCABULARIES['video_type']),
  'upload_type': len(VOCABULARIES['upload_type']),
  'music_type': 12,
}
_FEEDBACK = (
  *('is_like', 'is_follow', 'is_comment', 'is_forward', 'is_hate'),
  'is_profile_enter',
)
_LOG_COLUMNS = (
  *('video_id', 'date', 'hourmin', 'time_ms', 'is_click', 'long_view'),
  *('play_time_ms', 'duration_ms', 'profile_stay_time', 'comment_stay_time'),
  *('is_rand', 'tab', *_FEEDBACK),
)
IMPRESSION_COLUMNS = (
  *_LOG_COLUMNS,
  'author_id',
  *_VIDEO_COLUMNS,
  *(f'tag_{i}' for i in range(MAX_TAGS)),
)
"""The columns of the prepared impressions."""

SCHEMA = Schema(
  user='user_id',
  time='time_ms',
  time_unit=1e-3,
  context=(
    Categorical('user_id', 27285),
    *(Categorical(name, 1 + size) for name, size in _USER_COLUMNS.items()),
  ),
  item=(
    Categorical('video_id', 7583),
    Categorical('author_id', 2**14, ids='hash'),
    *(Categorical(f'tag_{i}', 70, table='tag') for i in range(MAX_TAGS)),
    *(Categorical(name, 1 + size) for name, size in _VIDEO_COLUMNS.items()),
    Categorical('duration_bucket', 24),
    Dense('duration', log=True, offset=3.5, scale=1.0),
    Categorical('tab', 15),
    Categorical('hour', 24),
  ),
  action=(
    Categorical('is_click', 2),
    Categorical('long_view', 2),
    Categorical('feedback', 2 ** len(_FEEDBACK)),
    Categorical('play_ratio', 12),
  ),
  tasks=(Task('click', column='is_click'), Task('long_view')),
)
"""Id 0 of a user or video feature is a missing value. `duration` is that of
the video, in seconds; `duration_bucket` 0 that it is not known. `feedback` has
a bit for like, follow, comment, forward, hate and visit of the profile.
`play_ratio` is in tenths of the duration, 11 longer than it, 0 unknown. What
follows the impression is `action` alone: no candidate has it."""


class KuairandPure(tfds.core.GeneratorBasedBuilder):
  """KuaiRand-Pure, one example a user, impressions in the order of the files.

  The logs of the standard policy; the one of 8 to 21 April if it is there.
  Every line is kept, those that repeat (user, video, time) included: the
  protocol counts them.
  """

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = SOURCE.instructions

  def _info(self) -> tfds.core.DatasetInfo:
    # Two matrices, not fifty columns: a column costs microseconds an example.
    return tfds.core.DatasetInfo(
      builder=self,
      description='Impressions of short videos with twelve kinds of feedback.',
      homepage='https://kuairand.com',
      features=tfds.features.FeaturesDict(
        {
          'user_id': np.int64,
          'user': tfds.features.Tensor(
            shape=(len(_USER_COLUMNS),),
            dtype=np.int64,
            doc=f'Columns: {", ".join(_USER_COLUMNS)}',
          ),
          'impressions': tfds.features.Tensor(
            shape=(None, len(IMPRESSION_COLUMNS)),
            dtype=np.int64,
            doc=f'Columns: {", ".join(IMPRESSION_COLUMNS)}',
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
    users = _read(contents, _USERS, ('user_id', *_USER_COLUMNS))
    videos = _videos(contents)
    names = [n for n in (_EARLY_LOG, _LATE_LOG) if n in contents]
    logs = [_read(contents, n, ('user_id', *_LOG_COLUMNS)) for n in names]
    log = {n: np.concatenate([part[n] for part in logs]) for n in logs[0]}
    order = np.argsort(log['user_id'], kind='stable')
    log = {name: values[order] for name, values in log.items()}
    place = _lookup(videos['video_id'], log['video_id'], 'video', _VIDEOS)
    for name, values in videos.items():
      log[name] = values[place]
    keys, starts = np.unique(log['user_id'], return_index=True)
    place = _lookup(users['user_id'], keys, 'user', _USERS)
    facts = np.stack([users[name][place] for name in _USER_COLUMNS], 1)
    matrix = np.stack([log[name] for name in IMPRESSION_COLUMNS], 1)
    parts = np.split(matrix, starts[1:])
    for key, fact, part in zip(keys, facts, parts, strict=True):
      yield int(key), {'user_id': key, 'user': fact, 'impressions': part}


def load(*, data_dir: str = '', manual_dir: str = '') -> EventLog:
  """The impressions as a log, prepared first if need be.

  Rows need ties='strict': some lines occur twice, and one copy must not see
  the other.

  Args:
    data_dir: see `sources.prepare`.
    manual_dir: see `sources.prepare`.

  Returns:
    The log; `extra['date']` is the date in the files, which the protocol
    splits by (near midnight it is not always that of the time).

  Raises:
    ValueError: the data is not to be had; see `sources.prepare`.
  """
  columns = load_columns(data_dir=data_dir, manual_dir=manual_dir)
  return EventLog.from_columns(columns, SCHEMA, extra=['date'])


def load_columns(
  *, data_dir: str = '', manual_dir: str = ''
) -> dict[str, np.ndarray]:
  """The impressions as the columns that `SCHEMA` names, `{name: [n]}`.

  Args:
    data_dir: see `sources.prepare`.
    manual_dir: see `sources.prepare`.

  Raises:
    ValueError: the data is not to be had; see `sources.prepare`.
  """
  builder = sources.prepare(
    KuairandPure, SOURCE, data_dir=data_dir, manual_dir=manual_dir
  )
  return features_of(_columns(builder))


def _columns(builder: tfds.core.DatasetBuilder) -> dict[str, np.ndarray]:
  users = sources.examples(builder)
  lengths = [len(user['impressions']) for user in users]
  facts = np.repeat([user['user'] for user in users], lengths, axis=0)
  impressions = np.concatenate([user['impressions'] for user in users])
  return {
    'user_id': np.repeat([user['user_id'] for user in users], lengths),
    **dict(zip(_USER_COLUMNS, facts.T, strict=True)),
    **dict(zip(IMPRESSION_COLUMNS, impressions.T, strict=True)),
  }


def features_of(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The columns of `SCHEMA` from those of the prepared data."""
  columns = dict(raw)
  for name in (*_USER_COLUMNS, *_VIDEO_COLUMNS):
    columns[name] = raw[name] - MISSING
  for i in range(MAX_TAGS):
    columns[f'tag_{i}'] = raw[f'tag_{i}'] - MISSING
  seconds = np.maximum(raw['duration_ms'], 0) / 1000
  known = seconds > 0
  columns['duration'] = seconds
  columns['duration_bucket'] = np.where(
    known, np.clip(1 + 2 * np.log2(np.maximum(seconds, 1)), 1, 23), 0
  ).astype(np.int64)
  local = raw['time_ms'] + _MILLISECONDS_EAST
  columns['hour'] = local // 3_600_000 % 24
  bits = [raw[name] << bit for bit, name in enumerate(_FEEDBACK)]
  columns['feedback'] = np.sum(bits, axis=0)
  ratio = raw['play_time_ms'] * 10 // np.maximum(raw['duration_ms'], 1)
  columns['play_ratio'] = np.where(known, 1 + np.clip(ratio, 0, 10), 0)
  return columns


def masks(log: EventLog) -> dict[str, np.ndarray]:
  """The splits of the protocol `kuairand`: `{split: bool [n]}`, by date."""
  date = log.extra['date']
  return {
    'train': date < VALIDATION_DATE,
    'validation': (date >= VALIDATION_DATE) & (date < TEST_DATE),
    'test': date >= TEST_DATE,
  }


def _read(contents, name: str, wanted: Sequence[str]) -> dict[str, np.ndarray]:
  """Columns of a file as int64, with `MISSING` where there is no value."""
  table = _table(contents, name, wanted)
  columns = {}
  for column in wanted:
    values = table[column].combine_chunks()
    if column in VOCABULARIES:
      values = _codes(values, column, name)
    try:
      numbers = pc.fill_null(values.cast(pa.float64()), MISSING).to_numpy()
    except pa.ArrowInvalid as error:
      raise ValueError(f'{name}: column {column!r}: {error}') from error
    numbers = np.where(numbers == -124, MISSING, numbers).astype(np.int64)
    if column in _USER_COLUMNS | _VIDEO_COLUMNS:
      size = (_USER_COLUMNS | _VIDEO_COLUMNS)[column]
      _check_range(numbers, MISSING, size, column, name)
    columns[column] = numbers
  return columns


def _table(contents, name: str, wanted: Sequence[str]) -> pa.Table:
  # '' and 'UNKNOWN' as nulls, in strings, too.
  options = pa_csv.ConvertOptions(
    include_columns=list(wanted),
    null_values=['', 'UNKNOWN'],
    strings_can_be_null=True,
    quoted_strings_can_be_null=True,
    column_types={c: pa.string() for c in (*VOCABULARIES, 'tag')},
  )
  try:
    return pa_csv.read_csv(io.BytesIO(contents[name]), convert_options=options)
  except (pa.ArrowInvalid, KeyError) as error:
    raise ValueError(
      f'{name} is not the official file: {error}; extract '
      f'{SOURCE.archive} again'
    ) from error


def _codes(values: pa.Array, column: str, name: str) -> pa.Array:
  vocabulary = pa.array(VOCABULARIES[column])
  codes = pc.index_in(values, vocabulary)
  unknown = pc.and_(pc.is_valid(values), pc.is_null(codes)).to_numpy(False)
  if unknown.any():
    value = values[int(np.flatnonzero(unknown)[0])].as_py()
    raise ValueError(
      f'{name}: column {column!r} holds {value!r}, which is none of '
      f'{VOCABULARIES[column]}'
    )
  return codes


def _videos(contents) -> dict[str, np.ndarray]:
  wanted = ('video_id', 'author_id', *_VIDEO_COLUMNS)
  videos = _read(contents, _VIDEOS, wanted)
  fields = _table(contents, _VIDEOS, ['tag'])['tag'].to_pylist()
  tags = np.full((len(fields), MAX_TAGS), MISSING)
  for row, field in enumerate(fields):
    ids = [int(tag) for tag in field.split(',')] if field else []
    tags[row, : len(ids)] = ids[:MAX_TAGS]
  _check_range(tags, MISSING, 69, 'tag', _VIDEOS)
  return videos | {f'tag_{i}': tags[:, i] for i in range(MAX_TAGS)}


def _check_range(values, low: int, size: int, column: str, name: str) -> None:
  bad = values[(values < low) | (values >= size)]
  if bad.size:
    raise ValueError(
      f'{name}: column {column!r} holds {bad[0]}, outside [{low}, {size})'
    )


def _lookup(known, wanted, what: str, name: str) -> np.ndarray:
  """Where each of `wanted` is in `known`."""
  order = np.argsort(known)
  place = np.searchsorted(known[order], wanted)
  found = order[np.minimum(place, len(known) - 1)]
  bad = known[found] != wanted
  if bad.any():
    raise ValueError(
      f'the log has {what} {wanted[bad][0]}, which is not in {name}; the '
      'files are not of one data set'
    )
  return found
