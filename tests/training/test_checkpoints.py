"""Checkpoints: what comes back, and what damage does."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histjax.models import ranker
from histjax.training import checkpoints, optimizer, sharding, state
from tests import support

MODEL = ranker.Ranker(support.config(encoder__num_layers=1))
TX = optimizer.make_optimizer(optimizer.OptimizerConfig())
META = {'best_step': None, 'config': {'a': [1, 2.5, None]}}


def new_state(model=MODEL, tx=TX, seed=0):
  """A state of the right shapes, and random in all its numbers."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(
    lambda: state.create_state(model, tx, model.config.schema, 0)
  )

  def draw(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.key(seed)
    value = rng.integers(1, 9, x.shape) + rng.random(x.shape)
    return jnp.asarray(value.astype(x.dtype))

  return jax.tree.map(draw, shapes)


def as_numpy(tree):
  return jax.device_get(tree.replace(rng=jax.random.key_data(tree.rng)))


def at(current, step_number):
  return current.replace(step=np.asarray(step_number, np.int32))


def save_some(workdir, steps, *, best=None):
  """Saves states whose seed is their step; returns the last."""
  with checkpoints.Checkpoints(workdir) as manager:
    for s in steps:
      current = at(new_state(seed=s), s)
      manager.save(current, {**META, 'best_step': best, 'at': s})
  return current


def steps_in(workdir):
  return sorted(
    int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()
  )


def files_in(workdir):
  return sorted(str(p) for p in workdir.rglob('*'))


class TestSaveAndRestore:
  def test_everything_comes_back(self, tmp_path):
    mesh = sharding.data_mesh()
    current = sharding.replicate(new_state(), mesh)
    overwrite = jax.jit(
      lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0
    )
    with checkpoints.Checkpoints(tmp_path) as manager:
      manager.save(current, META)
      # Donated at once: what is being saved must not change under it.
      params = current.params
      for _ in range(3):
        params = overwrite(params)
      with pytest.raises(RuntimeError, match='donated'):
        jax.block_until_ready(current.params)
    template = sharding.replicate(new_state(seed=9), mesh)
    with checkpoints.Checkpoints(tmp_path) as manager:
      found, meta = manager.restore(template)
    assert meta == META
    with checkpoints.Checkpoints(tmp_path) as manager:
      assert manager.latest_meta() == META
    chex.assert_trees_all_equal(as_numpy(found), as_numpy(new_state()))
    assert found.tables['tables']['item'].sharding.mesh == mesh
    jax.random.fold_in(found.rng, 0)  # A typed key again.

  def test_nothing_there(self, tmp_path):
    with checkpoints.Checkpoints(tmp_path / 'new' / 'run') as manager:
      assert manager.latest_meta() is None
      assert manager.restore(new_state()) is None

  def test_keeps_the_latest_and_the_best(self, tmp_path):
    save_some(tmp_path, [1, 2, 3, 4, 5], best=2)
    assert steps_in(tmp_path) == [2, 4, 5]
    save_some(tmp_path, [6], best=6)
    assert steps_in(tmp_path) == [5, 6]

  def test_params_for_scoring(self, tmp_path):
    last = save_some(tmp_path, [1, 2, 3], best=2)
    variables, config = checkpoints.load_variables(tmp_path, 'latest')
    chex.assert_trees_all_equal(variables, last.variables)
    assert config == META['config']
    variables, _ = checkpoints.load_variables(
      str(tmp_path), template=last.variables
    )
    chex.assert_trees_all_equal(variables, new_state(seed=2).variables)
    with checkpoints.Checkpoints(tmp_path) as manager:
      variables = manager.restore_variables(2, last.variables)
    chex.assert_trees_all_equal(variables, new_state(seed=2).variables)

  def test_bad_requests(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="none' has no folder 'check"):
      checkpoints.load_variables(tmp_path / 'none')
    (tmp_path / 'file').touch()
    with pytest.raises(FileNotFoundError, match="file' is a file"):
      checkpoints.load_variables(tmp_path / 'file')
    for load in (checkpoints.load_variables, checkpoints.load_meta):
      with pytest.raises(ValueError, match='is a URL'):
        load('gs://bucket/run')
    (tmp_path / 'empty' / 'checkpoints').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='no complete checkpoint'):
      checkpoints.load_variables(tmp_path / 'empty')
    save_some(tmp_path, [1])
    with pytest.raises(FileNotFoundError, match='not validated yet'):
      checkpoints.load_variables(tmp_path)
    save_some(tmp_path, [2], best=1)
    shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'variables' / 'd')
    with pytest.raises(FileNotFoundError, match=r'of step 1, is missing or'):
      checkpoints.load_variables(tmp_path)
    with pytest.raises(ValueError, match="'best' or 'latest'"):
      checkpoints.load_variables(tmp_path, 'last')
    with pytest.raises(ValueError, match='keep_checkpoints=0'):
      checkpoints.Checkpoints(tmp_path, keep=0)

  def test_to_read_warns_of_nothing(self, tmp_path):
    save_some(tmp_path, [1], best=1)
    with unittest.TestCase().assertNoLogs('absl', 'WARNING'):
      checkpoints.load_variables(tmp_path)


class TestReplace:
  def test_the_same_step_again(self, tmp_path):
    save_some(tmp_path, [1, 2])
    with checkpoints.Checkpoints(tmp_path) as manager:
      manager.save(at(new_state(seed=9), 2), {**META, 'best_step': 2})
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1', '2']
    chex.assert_trees_all_equal(
      checkpoints.load_variables(tmp_path)[0], new_state(seed=9).variables
    )

  def test_killed_before_the_new_one_is_complete(self, tmp_path):
    last = save_some(tmp_path, [1, 2])
    folder = tmp_path / 'checkpoints'
    (folder / '2').rename(folder / 'replaced-2')
    with checkpoints.Checkpoints(tmp_path) as manager:
      found, _ = manager.restore(new_state())
    chex.assert_trees_all_equal(as_numpy(found), as_numpy(last))

  def test_killed_before_the_old_one_is_deleted(self, tmp_path):
    last = save_some(tmp_path, [1, 2])
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '1', folder / 'replaced-2')
    with checkpoints.Checkpoints(tmp_path) as manager:
      found, _ = manager.restore(new_state())
    chex.assert_trees_all_equal(as_numpy(found), as_numpy(last))
    assert sorted(os.listdir(folder)) == ['1', '2']


class TestOtherConfig:
  def test_other_keys_are_both_shown(self, tmp_path):
    save_some(tmp_path, [1])
    model = ranker.Ranker(support.config())
    template = new_state(model)
    with (
      checkpoints.Checkpoints(tmp_path) as manager,
      pytest.raises(ValueError) as error,
    ):
      manager.restore(template)
    message = str(error.value)
    assert 'Keys of the checkpoint: [' in message
    assert 'Keys of the config: [' in message
    only = message.split('Only in the config: ')[1].splitlines()[0]
    assert 'blocks_1.query.kernel' in only and 'blocks_0' not in only
    with pytest.raises(ValueError, match='Only in the checkpoint'):
      checkpoints.load_variables(
        tmp_path, 'latest', template=template.variables
      )

  def test_other_shapes_are_shown(self, tmp_path):
    save_some(tmp_path, [1])
    template = new_state(
      ranker.Ranker(support.config(encoder__num_layers=1, embedding_dim=4))
    )
    with (
      checkpoints.Checkpoints(tmp_path) as manager,
      pytest.raises(
        ValueError,
        match=r'tables\.tables\.item: float32\[40, 8\] in the checkpoint, '
        r'float32\[40, 4\] by the config',
      ),
    ):
      manager.restore(template)

  def test_other_optimizer(self, tmp_path):
    save_some(tmp_path, [1])
    tx = optimizer.make_optimizer(
      optimizer.OptimizerConfig(table_optimizer='lazy_adam')
    )
    with (
      checkpoints.Checkpoints(tmp_path) as manager,
      pytest.raises(ValueError, match=r'table_state\.item\.accumulator'),
    ):
      manager.restore(new_state(tx=tx))


class TestDamage:
  @pytest.mark.parametrize('item', ['variables', 'state', 'meta', 'arrays'])
  def test_a_truncated_step_is_passed_over(self, tmp_path, item):
    save_some(tmp_path, [1, 2])
    folder = tmp_path / 'checkpoints' / '2'
    if item == 'arrays':
      shutil.rmtree(folder / 'variables' / 'd')
    else:
      shutil.rmtree(folder / item)
    variables, _ = checkpoints.load_variables(tmp_path, 'latest')
    chex.assert_trees_all_equal(variables, new_state(seed=1).variables)
    assert folder.is_dir()  # Reading changes nothing.
    with checkpoints.Checkpoints(tmp_path) as manager:
      found, meta = manager.restore(new_state())
      assert int(found.step) == meta['at'] == 1
      assert folder.is_dir()
      manager.save(at(new_state(seed=7), 2), META)
    chex.assert_trees_all_equal(
      checkpoints.load_variables(tmp_path, 'latest')[0],
      new_state(seed=7).variables,
    )
    assert (folder.parent / 'incomplete-2').is_dir()

  def test_killed_in_the_middle_of_a_save(self, tmp_path):
    save_some(tmp_path, [1])
    code = textwrap.dedent(f"""
      import os, signal, sys
      sys.path.insert(0, {str(pathlib.Path.cwd())!r})
      from tests.training import test_checkpoints as t
      from histjax.training import checkpoints
      folder = {str(tmp_path / 'checkpoints')!r}
      def on_event(event, arguments):
        if event == 'os.rename' and str(arguments[0]).startswith(folder):
          os.kill(os.getpid(), signal.SIGKILL)  # All but the last step is done.
      sys.addaudithook(on_event)
      with checkpoints.Checkpoints({str(tmp_path)!r}) as manager:
        manager.save(t.at(t.new_state(seed=2), 2), t.META)
    """)
    process = subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    assert process.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path / 'checkpoints')
    assert any('tmp' in name for name in left), left
    variables, _ = checkpoints.load_variables(tmp_path, 'latest')
    chex.assert_trees_all_equal(variables, new_state(seed=1).variables)
    last = save_some(tmp_path, [2])
    with checkpoints.Checkpoints(tmp_path) as manager:
      found, _ = manager.restore(new_state())
    chex.assert_trees_all_equal(as_numpy(found), as_numpy(last))
    left = os.listdir(tmp_path / 'checkpoints')
    assert not any('tmp' in name for name in left), left

  def test_what_is_not_whole_is_left_and_makes_room(self, tmp_path, caplog):
    folder = tmp_path / 'checkpoints'
    save_some(tmp_path, [1])
    for name in ('incomplete-2', 'incomplete-2-2', 'incomplete-2-3'):
      save_some(tmp_path, [2])
      (folder / '2' / 'variables' / '_METADATA').unlink()
      before = files_in(tmp_path)
      with checkpoints.Checkpoints(tmp_path) as manager:
        assert manager.restore(new_state())[1]['at'] == 1
        assert files_in(tmp_path) == before
        assert re.search(
          r'/2 is not complete \(variables/_METADATA is missing\). It is left '
          'there, and that of step 1 is used',
          caplog.text,
        )
        caplog.clear()
        manager.save(at(new_state(seed=2), 2), META)
      assert (folder / name / 'variables' / 'manifest.ocdbt').exists()
      assert checkpoints.load_meta(tmp_path) == {**META, 'step': 2}
    assert steps_in(tmp_path) == [1, 2]

  @pytest.mark.parametrize('keep', [1, 2])
  def test_what_is_not_whole_is_neither_counted_nor_deleted(
    self, tmp_path, keep
  ):
    save_some(tmp_path, [1, 9])
    (tmp_path / 'checkpoints' / '9' / 'variables' / '_METADATA').unlink()
    with checkpoints.Checkpoints(tmp_path, keep=keep) as manager:
      assert manager.restore(new_state())[1]['at'] == 1
      for step in (2, 3, 4):
        manager.save(at(new_state(), step), {**META, 'at': step})
    assert steps_in(tmp_path) == [*range(5 - keep, 5), 9]
    assert checkpoints.load_meta(tmp_path)['at'] == 4

  def test_none_is_whole(self, tmp_path):
    save_some(tmp_path, [1, 2])
    for step in '12':
      (tmp_path / 'checkpoints' / step / 'state' / '_METADATA').unlink()
    before = files_in(tmp_path)
    with (
      checkpoints.Checkpoints(tmp_path) as manager,
      pytest.raises(
        FileNotFoundError,
        match=r'none of the checkpoints .* whole \(state/_METADATA is missing '
        'in that of step 2',
      ),
    ):
      manager.restore(new_state())
    assert files_in(tmp_path) == before

  def test_a_file_that_was_cut_off(self, tmp_path):
    last = save_some(tmp_path, [1])
    save_some(tmp_path, [2])
    found = max(
      (tmp_path / 'checkpoints' / '2' / 'state').rglob('d/*'),
      key=lambda p: p.stat().st_size,
    )
    os.truncate(found, found.stat().st_size - 1)
    with checkpoints.Checkpoints(tmp_path) as manager:
      state, _ = manager.restore(new_state())
    chex.assert_trees_all_equal(as_numpy(state), as_numpy(last))

  @pytest.mark.parametrize('cut', [0, 20, None])
  def test_a_copy_without_all_of_its_list(self, tmp_path, cut):
    save_some(tmp_path, [1, 2])
    path = tmp_path / 'checkpoints' / '2' / 'files.json'
    path.unlink() if cut is None else os.truncate(path, cut)
    with checkpoints.Checkpoints(tmp_path) as manager:
      assert manager.latest_meta()['at'] == 1

  @pytest.mark.parametrize('best_is', ['gone', 'damaged'])
  def test_the_best_is_lost(self, tmp_path, best_is):
    save_some(tmp_path, [1, 2, 3], best=1)
    folder = tmp_path / 'checkpoints' / '1'
    shutil.rmtree(folder if best_is == 'gone' else folder / 'variables')
    before = files_in(tmp_path)
    with (
      checkpoints.Checkpoints(tmp_path) as manager,
      pytest.raises(FileNotFoundError, match='the best on validation before'),
    ):
      manager.restore(new_state())
    assert files_in(tmp_path) == before

  def test_neither_the_replaced_nor_its_replacement_is_complete(self, tmp_path):
    save_some(tmp_path, [1, 2])
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '2', folder / 'replaced-2')
    for name in ('2', 'replaced-2'):
      shutil.rmtree(folder / name / 'state')
    before = files_in(tmp_path)
    with checkpoints.Checkpoints(tmp_path) as manager:
      assert manager.restore(new_state())[1]['at'] == 1
    assert files_in(tmp_path) == before

  def test_a_replacement_that_is_not_complete(self, tmp_path):
    last = save_some(tmp_path, [1, 2])
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '2', folder / 'replaced-2')
    shutil.rmtree(folder / '2' / 'state')
    with checkpoints.Checkpoints(tmp_path) as manager:
      found, _ = manager.restore(new_state())
    chex.assert_trees_all_equal(as_numpy(found), as_numpy(last))
    assert sorted(os.listdir(folder)) == ['1', '2', 'incomplete-2']
