"""The best candidates of each user, and where they are written."""

import dataclasses
from unittest import mock

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from absl.testing import absltest
from hypothesis import strategies as st
from pyarrow import csv, parquet

from histjax.data import locks
from histjax.serving import ranked_files
from tests.serving import full_disk, many_users


@hypothesis.given(
  st.integers(0, 2**32 - 1),
  st.integers(1, 6),
  st.integers(1, 40),
  st.sampled_from([1, 2, 1000]),
  st.integers(1, 12),
)
def test_the_best_of_each_user(seed, num_users, size, num_scores, top_k):
  """Ties in the order of the file."""
  rng = np.random.default_rng(seed)
  user = rng.integers(0, num_users, size)
  row = rng.permutation(size)
  scores = {
    'a': (rng.integers(-num_scores, num_scores, size) / 9).astype(np.float32),
    'b': rng.normal(size=size).astype(np.float32),
  }
  scores['a'][rng.random(size) < 0.1] = -0.0
  keys = np.array([f'u{u}' for u in range(num_users)], object)
  table = ranked_files.ranked(
    'uid', keys, user, row, scores, scores['a'], top_k
  )
  wanted = []
  for u in range(num_users):
    own = sorted(
      np.flatnonzero(user == u), key=lambda i: (-scores['a'][i], row[i])
    )
    wanted += [(u, k + 1, i) for k, i in enumerate(own[:top_k])]
  assert table.to_pydict() == {
    'uid': [f'u{u}' for u, _, _ in wanted],
    'rank': [k for _, k, _ in wanted],
    'row': [row[i] for _, _, i in wanted],
    'score_a': [scores['a'][i] for _, _, i in wanted],
    'score_b': [scores['b'][i] for _, _, i in wanted],
  }


@pytest.mark.parametrize('user', ['rank', 'row', 'score_click'])
def test_names_of_the_output(user):
  ranked_files.check_columns(many_users.SCHEMA)
  schema = dataclasses.replace(many_users.SCHEMA, user=user)
  with pytest.raises(ValueError, match=f"named '{user}', as one of the output"):
    ranked_files.check_columns(schema)


def test_output_is_checked_first(tmp_path):
  source = tmp_path / 'in.csv'
  source.write_text('')
  (tmp_path / 'x.csv').mkdir()
  (tmp_path / 'log').mkdir()
  inputs = [str(source), str(tmp_path / 'log')]
  target = ranked_files.Target.of(tmp_path / 'out.csv', inputs)
  assert target.folder == tmp_path / 'out.csv.parts'
  assert ranked_files.Target.of(tmp_path / 'out', inputs).file is None
  (tmp_path / 'plain').touch()
  (tmp_path / 'done.csv').touch()
  for path, message in (
    (tmp_path / 'out.txt', r'must end in \.csv or \.parquet, or be a folder'),
    (tmp_path / 'absent/out.csv', 'absent is no folder; make it'),
    (tmp_path / 'absent/out', 'absent is no folder; make it'),
    (tmp_path / 'in.csv/out.csv', 'in.csv is no folder'),
    (tmp_path / 'x.csv', 'is a folder; name a file in it'),
    (tmp_path / 'plain', 'is a file; name a folder'),
    (tmp_path / 'done.csv', r'done\.csv exists; delete it, or name another'),
    (source, 'would be among the inputs'),
    (tmp_path / 'log/out.csv', 'would be among the inputs'),
    (tmp_path / 'log', 'would be among the inputs'),
    (tmp_path / 'log/out', 'would be among the inputs'),
  ):
    with pytest.raises(ValueError, match=message):
      ranked_files.Target.of(path, inputs)


def test_written_whole_or_not_at_all(tmp_path):
  score = np.random.default_rng(0).normal(size=1000)
  table = pa.table({'user': ['a', '7'] * 500, 'click': score})
  for name, read in (
    ('out.csv', csv.read_csv),
    ('out.parquet', parquet.read_table),
  ):
    path = tmp_path / name
    target = ranked_files.Target.of(path, [])
    lock = locks.FolderLock(target.folder)
    parts = ranked_files.Parts.open(lock, {'model': 'x'})
    parts.plan(2)
    for shard in range(2):
      assert not parts.complete
      parts.write(shard, table)
    path.write_text('before')
    with (
      full_disk.files_of_at_most(4096),
      pytest.raises(OSError, match=full_disk.REFUSED),
    ):
      target.finish(parts, lock)
    assert path.read_text() == 'before' and target.folder.is_dir()
    assert target.finish(parts, lock) == 2000
    lock.release()
    assert read(path).to_pydict() == pa.concat_tables([table] * 2).to_pydict()
  assert {p.name for p in tmp_path.iterdir()} == {'out.csv', 'out.parquet'}


def test_a_part_that_cannot_be_written(tmp_path):
  lock = locks.FolderLock(tmp_path / 'parts')
  parts = ranked_files.Parts.open(lock, {'model': 'x'})
  parts.plan(1)
  table = pa.table({'click': np.random.default_rng(0).normal(size=1000)})
  with (
    full_disk.files_of_at_most(4096),
    pytest.raises(OSError, match=full_disk.REFUSED),
  ):
    parts.write(0, table)
  assert lock.names() == {'_manifest.json'}


def test_links_to_folders(tmp_path):
  """What is deleted in the end is a folder, and no link to one."""
  real = tmp_path / 'disk/real'
  real.mkdir(parents=True)
  for name in ('out', 'out.csv.parts'):
    (tmp_path / name).symlink_to('disk/real')
  for name, file in (('out', None), ('out.csv', tmp_path / 'out.csv')):
    target = ranked_files.Target.of(tmp_path / name, [])
    assert target == ranked_files.Target(file, real.resolve())
    with locks.FolderLock(target.folder) as lock:
      ranked_files.Parts.open(lock, {}).discard(lock)
    assert list(real.iterdir()) == []
  (tmp_path / 'lost').symlink_to('absent/out')
  with pytest.raises(ValueError, match='absent is no folder; make it'):
    ranked_files.Target.of(tmp_path / 'lost', [])


def test_what_cannot_be_discarded(tmp_path):
  """The error on the way is the one that is told."""
  with locks.FolderLock(tmp_path / 'out') as lock:
    parts = ranked_files.Parts.open(lock, {})
    with mock.patch.object(lock, 'clear', side_effect=OSError('busy')):
      parts.discard(lock)
    assert lock.names() == {'_manifest.json'}


if __name__ == '__main__':
  absltest.main()
