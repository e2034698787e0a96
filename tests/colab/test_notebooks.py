"""The notebooks run from top to bottom, and only use the library."""

import ast
import base64
import re

import jax
import nbformat
import pytest

from colab import execute

NOTEBOOKS = execute.paths()
# What each compiles, and so is compiled for a TPU v5e, see `ahead`.
TRAINED = {'train', 'eval', 'encode', 'score'}
COMPILED = {
  'amortized_scoring': {'init', 'plain', 'joint', 'encode', 'score', 'extend'},
  'quickstart': {*TRAINED, 'extend', 'last_attention'},
  'your_own_data': {*TRAINED, 'paged_encode_and_score'},
}


def read(path):
  return nbformat.read(path, as_version=4)


def code_of(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def kinds(cell):
  """Of a cell's outputs: `[(stream or types)]`."""
  return [
    output.get('name') or sorted(output.get('data', ['error']))
    for output in cell.outputs
  ]


def test_there_are_notebooks():
  assert [n.stem for n in NOTEBOOKS] == list(COMPILED)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
  notebook = read(path)
  assert f'colab/{path.name})' in notebook.cells[0].source
  for cell in notebook.cells:
    assert not re.search(r'^\s*(def|class) ', cell.source, re.MULTILINE), (
      'notebooks import the library; they define nothing'
    )
    assert not cell.metadata
  assert notebook.metadata.language_info == {'name': 'python'}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_those_of_one_run(path):
  cells = code_of(read(path))
  numbers = [cell.execution_count for cell in cells]
  assert numbers == list(range(1, len(cells) + 1)), 'run `make notebooks`'
  found = [output for cell in cells for output in cell.outputs]
  assert all(output.output_type != 'error' for output in found)
  pictures = [
    base64.b64decode(output.data['image/png'])
    for output in found
    if 'image/png' in output.get('data', {})
  ]
  assert pictures
  assert max(map(len, pictures)) < 60_000
  printed = ''.join(output.get('text', '') for output in found)
  assert not re.search(r'/(home|root|tmp|Users)/', printed)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_imports_is_there(path):
  code = '\n'.join(cell.source for cell in code_of(read(path)))
  code = re.sub(r'^(\s*)[%!].*', r'\1pass', code, flags=re.MULTILINE)
  imports = [
    ast.unparse(node)
    for node in ast.walk(ast.parse(code))
    if isinstance(node, ast.ImportFrom) and node.module.startswith('histjax')
  ]
  assert len(imports) > 1
  for line in imports:
    exec(line, {})


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # Of Jupyter, not of the notebook.
def test_notebooks_run(tmp_path, monkeypatch, pytestconfig):
  """As they are committed; what they compile is compiled for a TPU as well."""
  # As a user runs it, on one device; compiled fast, once for all runs.
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  cache = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
  monkeypatch.setenv('HOME', str(tmp_path))
  # Beside what `pip install -e` says: the checkout with these tests.
  monkeypatch.setenv('PYTHONPATH', str(pytestconfig.rootpath))
  notebooks = {path.stem: read(path) for path in NOTEBOOKS}
  committed = {
    name: [kinds(cell) for cell in code_of(notebook)]
    for name, notebook in notebooks.items()
  }
  compiled = execute.run(
    notebooks,
    tmp_path,
    'from tests.colab import ahead\nahead.compile_all(globals())',
  )
  for name, notebook in notebooks.items():
    found = [kinds(cell) for cell in code_of(notebook)]
    assert found == committed[name], f'{name}: run `make notebooks`'
    assert not any('stderr' in x for x in found), name
    lines = [line.split(': ', 1) for line in compiled[name].splitlines()]
    assert {line[0] for line in lines} == COMPILED[name]
    assert 'pallas_tpu' in dict(lines)['score']
