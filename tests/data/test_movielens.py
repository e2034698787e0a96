"""MovieLens 1M, from small files in the official layout."""

import hashlib
import http.server
import os
import pathlib
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest
from tensorflow_datasets.core.download import checksums

from histjax.data import movielens, sources
from histjax.data.rows import RowConfig, make_rows
from tests.data import official

URL = movielens.SOURCE.url


@pytest.fixture
def places(tmp_path, monkeypatch):
  """Folders for prepared data and for official files."""
  monkeypatch.delenv(sources.DATA_DIR_VARIABLE, raising=False)
  (tmp_path / 'manual').mkdir()
  return {
    'data_dir': str(tmp_path / 'data'),
    'manual_dir': str(tmp_path / 'manual'),
  }


def put_folder(places, files=None):
  official.write_folder(
    pathlib.Path(places['manual_dir']),
    'ml-1m',
    files or official.movielens_files(),
  )


def put_archive(places, content: bytes):
  (pathlib.Path(places['manual_dir']) / 'ml-1m.zip').write_bytes(content)


def expect(content: bytes, url: str = URL):
  """Takes `content` for the official archive."""
  info = checksums.UrlInfo(
    len(content), hashlib.sha256(content).hexdigest(), 'ml-1m.zip'
  )
  return mock.patch.object(movielens.Ml1m, 'url_infos', {url: info})


def archive() -> bytes:
  return official.zip_archive('ml-1m', official.movielens_files())


def check(log):
  """The log of the small files."""
  assert log.keys.tolist() == [1, 3]  # User 2 has no ratings.
  features = {k: v.tolist() for k, v in log.features.items()}
  assert features == {
    'user_id': [1, 1, 1, 3],
    'gender': [0, 0, 0, 1],
    'age': [0, 0, 0, 2],
    'occupation': [10, 10, 10, 15],
    'movie_id': [3952, 7, 1, 1],
    'genre_0': [1, 5, 3, 3],
    'genre_1': [2, 0, 4, 4],
    'genre_2': [5, 0, 5, 5],
    'year': [19, 101, 95, 95],
    'rating': [4, 5, 3, 2],
  }
  assert log.labels['like'].tolist() == [1, 1, 0, 0]


def test_extracted_files(places):
  put_folder(places)
  check(movielens.load(**places))
  check(movielens.load(data_dir=places['data_dir']))  # Prepared already.
  check(movielens.load(**places))


def test_environment_names_the_folder(places, monkeypatch):
  put_folder(places)
  monkeypatch.setenv(sources.DATA_DIR_VARIABLE, places.pop('manual_dir'))
  check(movielens.load(**places))


def test_archive(places):
  put_archive(places, archive())
  with expect(archive()):
    check(movielens.load(**places))


def test_no_feature_of_time_and_no_action_in_candidates(places):
  put_folder(places)
  log = movielens.load(**places)
  names = [f.name for f in log.schema.features]
  assert 'time_gap' not in names and 'timestamp' not in names
  row = make_rows(log, np.ones(4, bool), RowConfig())[0]
  assert 'rating' in row.history and 'rating' not in row.candidates


def test_example_is_a_user(places):
  put_folder(places)
  builder = sources.prepare(movielens.Ml1m, movielens.SOURCE, **places)
  first, last = builder.as_data_source(split='events')
  assert first['zip_code'] == b'48067'
  assert first['movie_id'].tolist() == [7, 1, 3952]
  assert first['timestamp'].tolist() == [978300760, 978300760, 978300000]
  assert last['genres'].tolist() == [[3, 4, 5, 0, 0, 0]]
  assert builder.info.splits['events'].num_examples == 2


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    found = self.path == '/ml-1m.zip'
    self.send_response(200 if found else 404)
    self.end_headers()
    self.wfile.write(archive() if found else b'')

  def log_message(self, *args):
    del args


@pytest.fixture
def address():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield f'http://127.0.0.1:{server.server_port}'
  server.shutdown()
  server.server_close()
  thread.join()


def download(places, url):
  source = sources.Source(url, 'ml-1m', movielens.SOURCE.files)
  with mock.patch.object(movielens, 'SOURCE', source):
    return movielens.load(data_dir=places['data_dir'])


def test_download(places, address):
  url = f'{address}/ml-1m.zip'
  with expect(archive(), url):
    check(download(places, url))


def test_download_of_other_content(places, address):
  url = f'{address}/ml-1m.zip'
  with expect(archive() + b'!', url):
    with pytest.raises(ValueError, match='wrong checksum'):
      download(places, url)


def test_download_fails(places, address):
  url = f'{address}/elsewhere/ml-1m.zip'
  with expect(archive(), url):
    with pytest.raises(ValueError, match=r'404.*\n.*Put ml-1m\.zip from'):
      download(places, url)


def test_official_checksum():
  # As TFDS has it for the builder of its own (which needs TensorFlow).
  package = pathlib.Path(checksums.__file__).parents[2]
  theirs = checksums.load_url_infos(package / 'url_checksums/movielens.txt')
  assert movielens.Ml1m.url_infos[URL] == theirs[URL]
  assert movielens.Ml1m.url_infos[URL].size == 5_917_549


def message(places) -> str:
  with pytest.raises(ValueError) as error:
    movielens.load(**places)
  return str(error.value)


def test_wrong_checksum(places):
  put_archive(places, archive())
  found = message(places)
  assert 'wrong checksum' in found and URL in found


def test_corrupt_archive(places):
  broken = archive()[:-30]
  put_archive(places, broken)
  with expect(broken):
    assert 'is corrupt' in message(places)


def test_archive_without_a_file(places):
  files = official.movielens_files()
  del files['users.dat']
  content = official.zip_archive('ml-1m', files)
  put_archive(places, content)
  with expect(content):
    assert 'lacks ml-1m/users.dat' in message(places)


def test_folder_without_a_file(places):
  put_folder(places)
  (pathlib.Path(places['manual_dir']) / 'ml-1m' / 'movies.dat').unlink()
  assert 'movies.dat is missing' in message(places)


def test_nothing_there(places):
  assert 'holds neither ml-1m/ nor ml-1m.zip' in message(places)
  places['manual_dir'] += '/nowhere'
  assert 'is no folder' in message(places)


@pytest.mark.parametrize(
  ('name', 'old', 'new', 'wanted'),
  [
    ('ratings.dat', '1::7::5', '1::8::5', 'movie 8 is not in movies.dat'),
    ('ratings.dat', '3::1::2', '4::1::2', 'user 4 is not in users.dat'),
    ('ratings.dat', '::978301968\n', '\n', 'line 4 has 3 fields'),
    ('users.dat', '::M::', '::X::', "gender 'X' is none of"),
    ('movies.dat', 'Children', 'Toddler', 'genre .* is none of'),
    ('movies.dat', '(1919)', '', 'does not end in a year'),
  ],
)
def test_bad_content(places, name, old, new, wanted):
  files = official.movielens_files()
  files[name] = files[name].replace(old.encode(), new.encode())
  put_folder(places, files)
  with pytest.raises(ValueError, match=wanted):
    movielens.load(**places)
  # Nothing half-made is left: with the right files all is well.
  put_folder(places)
  check(movielens.load(**places))


def test_data_dir_cannot_be_written(places, tmp_path):
  put_folder(places)
  (tmp_path / 'data').write_text('a file, not a folder')
  found = message(places)
  assert 'could not be prepared in data_dir' in found
  assert 'must be writable' in found


def test_another_process_was_faster(places):
  put_folder(places)
  split, started = movielens.Ml1m._split_generators, []

  def after_the_other(self, *args):
    if not started:
      started.append(True)
      check(movielens.load(**places))
    return split(self, *args)

  with mock.patch.object(movielens.Ml1m, '_split_generators', after_the_other):
    check(movielens.load(**places))
  assert started
  assert not list(pathlib.Path(places['data_dir']).rglob('*incomplete*'))


def test_prepared_from_other_files(places):
  put_folder(places)
  movielens.load(**places)
  files = official.movielens_files()
  files['ratings.dat'] += b'3::7::5::978301969\n'
  put_folder(places, files)
  assert 'was prepared from other files' in message(places)


def test_tensorflow_is_never_imported(places, tmp_path):
  """Even where it is installed: here, a package that says so."""
  put_folder(places)
  package = tmp_path / 'site' / 'tensorflow'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text("print('TENSORFLOW')\nraise ImportError")
  code = (
    'from histjax.data import movielens;'
    f'print(len(movielens.load(**{places!r})))'
  )
  root = str(pathlib.Path(__file__).parents[2])
  result = subprocess.run(
    [sys.executable, '-c', code],
    env={
      **os.environ,
      'PYTHONPATH': os.pathsep.join([str(tmp_path / 'site'), root]),
    },
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.splitlines()[-1] == '4'
  assert 'TENSORFLOW' not in result.stdout
