"""KuaiRand-Pure, from small files in the official layout."""

import hashlib
import pathlib
from unittest import mock

import numpy as np
import pytest
from tensorflow_datasets.core.download import checksums

from histjax.data import kuairand, sources
from histjax.data.rows import RowConfig, make_rows
from histjax.features import TimeGap
from tests.data import logs, official

FOLDER = 'KuaiRand-Pure'


@pytest.fixture
def places(tmp_path, monkeypatch):
  monkeypatch.delenv(sources.DATA_DIR_VARIABLE, raising=False)
  (tmp_path / 'manual').mkdir()
  return {
    'data_dir': str(tmp_path / 'data'),
    'manual_dir': str(tmp_path / 'manual'),
  }


def put_folder(places, files=None):
  official.write_folder(
    pathlib.Path(places['manual_dir']),
    FOLDER,
    files or official.kuairand_files(),
  )


def load(places):
  put_folder(places)
  return kuairand.load(**places)


def values(log, *names):
  return {name: log.features[name].tolist() for name in names}


def test_features(places):
  log = load(places)
  assert log.keys.tolist() == [0, 5]
  assert values(
    log,
    *('user_active_degree', 'is_live_streamer', 'is_video_author'),
    *('fans_user_num_range', 'register_days_range', 'onehot_feat3'),
    *('onehot_feat4', 'onehot_feat12'),
  ) == {
    # The second user's are UNKNOWN, -124 and empty: 0, a missing value.
    'user_active_degree': [1, 1, 1, 1, 0],
    'is_live_streamer': [2, 2, 2, 2, 0],
    'is_video_author': [2, 2, 2, 2, 1],
    'fans_user_num_range': [4, 4, 4, 4, 1],
    'register_days_range': [9, 9, 9, 9, 2],
    'onehot_feat3': [950, 950, 950, 950, 1471],
    'onehot_feat4': [2, 2, 2, 2, 0],
    'onehot_feat12': [1, 1, 1, 1, 0],
  }
  assert values(
    log,
    *('video_id', 'tag_0', 'tag_1', 'tag_2', 'video_type', 'upload_type'),
    *('music_type', 'duration_bucket', 'tab', 'hour'),
  ) == {
    'video_id': [0, 3, 3, 9, 9],
    'tag_0': [40, 0, 0, 69, 69],
    'tag_1': [0, 0, 0, 3, 3],
    'tag_2': [0, 0, 0, 2, 2],
    'video_type': [1, 0, 0, 2, 2],
    'upload_type': [1, 0, 0, 3, 3],
    'music_type': [10, 0, 0, 12, 12],
    # 87.4 s: 1 + 2 log2(87.4) = 13.9; 5 s: 5.6; 0: not known.
    'duration_bucket': [13, 0, 0, 5, 5],
    'tab': [1, 2, 2, 14, 0],
    'hour': [7, 8, 8, 9, 1],
  }
  np.testing.assert_allclose(
    log.features['duration'],
    np.log1p([87.433, 0, 0, 5, 5]) - 3.5,
    rtol=1e-5,
  )
  assert values(log, 'is_click', 'long_view', 'feedback', 'play_ratio') == {
    'is_click': [1, 0, 0, 1, 1],
    'long_view': [1, 0, 0, 0, 1],
    'feedback': [0b1, 0, 0, 0b100000, 0b10],
    # Played 10, 3 and 18 tenths; the duration is not known of the others.
    'play_ratio': [11, 0, 0, 4, 11],
  }
  assert log.labels['click'].tolist() == [1, 0, 0, 1, 1]
  assert log.labels['long_view'].tolist() == [1, 0, 0, 0, 1]


def test_splits_by_the_date_of_the_files(places):
  log = load(places)
  masks = kuairand.masks(log)
  assert {k: v.tolist() for k, v in masks.items()} == {
    'train': [True, False, False, False, False],
    'validation': [False, True, True, False, True],
    'test': [False, False, False, True, False],
  }


def test_repeated_lines_are_kept_and_do_not_see_each_other(places):
  log = load(places)
  log, gaps = logs.derive(log, TimeGap(24))
  rows = make_rows(log, np.ones(5, bool), RowConfig(ties='strict'), gaps)
  assert rows[0].candidates['video_id'].tolist() == [0, 3, 3, 9]
  assert rows[0].visible.tolist() == [0, 1, 1, 3]
  # 1 s, twice; 176400 s: floor(log2(176401)) = 17.
  assert rows[0].candidates['time_gap'].tolist() == [0, 1, 1, 17]


def test_candidates_have_nothing_of_after_the_impression(places):
  row = make_rows(load(places), np.ones(5, bool), RowConfig())[0]
  after = {'is_click', 'long_view', 'feedback', 'play_ratio'}
  assert after < set(row.history)
  assert not after & set(row.candidates)
  assert set(row.candidates) == set(row.history) - after


def test_early_log_comes_first(places):
  put_folder(places, official.kuairand_files(early=True))
  log = kuairand.load(**places)
  assert log.features['video_id'].tolist() == [0, 3, 3, 9, 0, 9]
  assert kuairand.masks(log)['train'].tolist() == [1, 0, 0, 0, 1, 0]


def archived(places, files):
  content = official.tar_archive(FOLDER, files)
  path = pathlib.Path(places['manual_dir']) / 'KuaiRand-Pure.tar.gz'
  path.write_bytes(content)
  return content


def expect(content: bytes):
  info = checksums.UrlInfo(
    len(content), hashlib.sha256(content).hexdigest(), 'KuaiRand-Pure.tar.gz'
  )
  return mock.patch.object(
    kuairand.KuairandPure, 'url_infos', {kuairand.SOURCE.url: info}
  )


def test_archive(places):
  content = archived(places, official.kuairand_files(early=True))
  with expect(content):
    assert len(kuairand.load(**places)) == 6


def test_wrong_checksum(places):
  archived(places, official.kuairand_files())
  with pytest.raises(ValueError, match='wrong checksum'):
    kuairand.load(**places)


@pytest.mark.parametrize('cut', [200, 600])
def test_corrupt_archive(places, cut):
  content = archived(places, official.kuairand_files())[:-cut]
  path = pathlib.Path(places['manual_dir']) / 'KuaiRand-Pure.tar.gz'
  path.write_bytes(content)
  with expect(content), pytest.raises(ValueError, match='is corrupt'):
    kuairand.load(**places)


def test_archive_without_a_file(places):
  files = official.kuairand_files()
  del files['data/user_features_pure.csv']
  with expect(archived(places, files)):
    with pytest.raises(ValueError, match=r'lacks .*user_features_pure\.csv'):
      kuairand.load(**places)


@pytest.mark.parametrize(
  ('name', 'old', 'new', 'wanted'),
  [
    ('user_features', 'full_active', 'idle', "'user_active_degree'.*'idle'"),
    ('user_features', '0,full', '8,full', 'has user 0, which is not in'),
    ('user_features', ',949,', ',1471,', "'onehot_feat3' holds 1471, outside"),
    ('video_features', '\n9,', '\n8,', 'has video 9, which is not in'),
    ('video_features', '"68,', '"70,', "'tag' holds 70, outside"),
    ('video_features', 'tag\n', 'tags\n', 'is not the official file'),
    ('log_standard', ',87433,87433,', ',long,87433,', "'play_time_ms'"),
    ('log_standard', ',1,2\n', '\n', 'is not the official file'),
  ],
)
def test_bad_content(places, name, old, new, wanted):
  files = official.kuairand_files()
  (path,) = (n for n in files if name in n)
  changed = files[path].replace(old.encode(), new.encode())
  if name == 'log_standard' and new == '\n':
    changed = files[path].replace(b'0,0,0,0,2\n', b'0\n')
  assert changed != files[path]
  put_folder(places, {**files, path: changed})
  with pytest.raises(ValueError, match=wanted):
    kuairand.load(**places)


def test_official_checksum():
  (url,) = (u for u in kuairand.KuairandPure.url_infos if 'zenodo' in u)
  assert url == kuairand.SOURCE.url
  info = kuairand.KuairandPure.url_infos[url]
  assert (info.size, info.filename) == (47_432_272, kuairand.SOURCE.archive)
  assert info.checksum.startswith('c814bf6f3624c0cf')
