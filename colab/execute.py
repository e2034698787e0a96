"""Runs the notebooks from top to bottom and keeps their outputs.

python colab/execute.py   # `make notebooks`
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Mapping

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent


def paths() -> list[pathlib.Path]:
  """The notebooks, in the order of their names."""
  return sorted(FOLDER.glob('*.ipynb'))


def run(
  notebooks: Mapping[str, nbformat.NotebookNode],
  folder: pathlib.Path,
  last: str = '',
) -> dict[str, str]:
  """Runs notebooks in one kernel, each without the names of the others.

  One kernel, since to start one and to import JAX takes seconds.

  Args:
    notebooks: by name; their outputs are put into them.
    folder: each runs in a folder of its name in it.
    last: code to run after each, in its namespace.

  Returns:
    What `last` printed, by name.
  """
  cells, after = [], {}
  for name, notebook in notebooks.items():
    where = folder / name
    where.mkdir()
    for number, cell in enumerate(notebook.cells):
      cell.id = f'{name}-{number}'  # Of one notebook they must differ.
    start = f'%reset -f\nimport os\nos.chdir({str(where)!r})\ndel os'
    after[name] = nbformat.v4.new_code_cell(last)
    cells += [nbformat.v4.new_code_cell(start), *_code(notebook), after[name]]
  client = nbclient.NotebookClient(
    nbformat.v4.new_notebook(cells=cells),
    timeout=None,  # However busy the machine is.
    kernel_name='python3',
    record_timing=False,
    resources={'metadata': {'path': str(folder)}},
  )
  client.execute()
  for notebook in notebooks.values():
    for number, cell in enumerate(_code(notebook), 1):
      cell.outputs = _joined(cell.outputs)
      for x in (cell, *cell.outputs):
        if 'execution_count' in x:
          x.execution_count = number
  return {
    name: ''.join(x.text for x in cell.outputs if x.get('name') == 'stdout')
    for name, cell in after.items()
  }


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def _joined(outputs):
  """What was printed in a row, and flushed at times, is one output."""
  found: list = []
  for output in outputs:
    if found and output.get('name', 0) == found[-1].get('name', 1):
      found[-1].text += output.text
    else:
      found.append(output)
  return found


def main() -> None:
  notebooks = {path.stem: nbformat.read(path, as_version=4) for path in paths()}
  with tempfile.TemporaryDirectory() as folder:
    run(notebooks, pathlib.Path(folder))
  for path in paths():
    nbformat.write(notebooks[path.stem], path)


if __name__ == '__main__':
  sys.exit(main())
