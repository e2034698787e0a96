"""The notebooks run from top to bottom, and only use the library."""

import ast
import pathlib
import re

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parents[2] / 'colab').glob('*.ipynb')
)


def test_there_are_notebooks():
  assert [n.stem for n in NOTEBOOKS] == ['amortized_scoring', 'quickstart']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
  notebook = nbformat.read(path, as_version=4)
  assert f'colab/{path.name})' in notebook.cells[0].source
  for cell in notebook.cells:
    assert not cell.get('outputs'), 'commit notebooks without outputs'
    assert not re.search(r'^\s*(def|class) ', cell.source, re.MULTILINE), (
      'notebooks import the library; they define nothing'
    )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_imports_is_there(path):
  notebook = nbformat.read(path, as_version=4)
  code = '\n'.join(c.source for c in notebook.cells if c.cell_type == 'code')
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
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # As a user runs it: one device.
  monkeypatch.setenv('MPLBACKEND', 'agg')
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=None,  # However busy the machine is.
    kernel_name='python3',
    resources={'metadata': {'path': str(tmp_path)}},
  )
  client.execute()
