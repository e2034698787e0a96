"""The notebooks run from top to bottom, and only use the library."""

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


@pytest.mark.filterwarnings('default')  # Of Jupyter, not of the notebook.
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # As a user runs it: one device.
  monkeypatch.setenv('MPLBACKEND', 'agg')
  notebook = nbformat.read(path, as_version=4)
  assert f'colab/{path.name})' in notebook.cells[0].source
  for cell in notebook.cells:
    assert not cell.get('outputs'), 'commit notebooks without outputs'
    assert not re.search(r'^\s*(def|class) ', cell.source, re.MULTILINE), (
      'notebooks import the library; they define nothing'
    )
  client = nbclient.NotebookClient(
    notebook,
    timeout=240,
    kernel_name='python3',
    resources={'metadata': {'path': str(tmp_path)}},
  )
  client.execute()
