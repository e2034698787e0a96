"""Dependencies between modules go one way."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[1] / 'histjax'
MODULES = {
  '.'.join(path.relative_to(ROOT.parent).with_suffix('').parts).removesuffix(
    '.__init__'
  ): path
  for path in sorted(ROOT.rglob('*.py'))
}
# A module may import from its own layer and from those before it.
LAYERS = (
  (
    'buckets',
    'config',
    'types',
    'schema',
    'key_range',
    'metrics',
    'quantization',
    'cache',
    'mixing',
    'progress',
    'vocabulary',
  ),
  ('testing',),
  ('ops',),
  ('features',),
  ('nn',),
  ('models',),
  ('data',),
  ('training',),
  ('scoring',),
  ('serving',),
)


def layer(module: str) -> int:
  """The index of a module's layer; the longest matching prefix decides."""
  found = [
    (len(prefix), i)
    for i, prefixes in enumerate(LAYERS)
    for prefix in prefixes
    if f'{module}.'.startswith(f'histjax.{prefix}.')
  ]
  if not found:
    raise AssertionError(f'{module} is in no layer; add it to LAYERS')
  return max(found)[1]


def imports(path: pathlib.Path):
  """The histjax modules that a file imports, at any depth of its code."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      base = node.module or ''
      names = [f'{base}.{alias.name}' for alias in node.names]
    else:
      continue
    yield from (n for n in names if n.split('.')[0] == 'histjax')


def target(name: str) -> str:
  """The module that an import of `name` reads: a file, not what is in it."""
  return name if name in MODULES else name.rpartition('.')[0]


def find_circle(graph: dict[str, set[str]]) -> str | None:
  """A circle of a graph `{module: modules that it imports}`, None without."""
  done: set[str] = set()

  def visit(module, path):
    if module in path:
      return ' -> '.join([*path[path.index(module) :], module])
    if module in done:
      return None
    for imported in sorted(graph.get(module, ())):
      circle = visit(imported, [*path, module])
      if circle is not None:
        return circle
    done.add(module)
    return None

  for module in sorted(graph):
    circle = visit(module, [])
    if circle is not None:
      return circle
  return None


class ImportTest(absltest.TestCase):
  def test_layers(self):
    for module, path in MODULES.items():
      if module == 'histjax':
        continue
      for name in imports(path):
        self.assertLessEqual(
          layer(name),
          layer(module),
          f'{module} imports {name}, which stands above it',
        )

  def test_no_circles(self):
    """Not inside a layer either, nor for the sake of types alone."""
    graph = {
      module: {target(n) for n in imports(path)} - {module}
      for module, path in MODULES.items()
    }
    circle = find_circle(graph)
    self.assertIsNone(circle, f'modules import each other: {circle}')

  def test_finds_circles(self):
    self.assertIsNone(find_circle({'a': {'b', 'c'}, 'b': {'c'}, 'c': set()}))
    found = find_circle({'a': {'b'}, 'b': {'c'}, 'c': {'d'}, 'd': {'b'}})
    self.assertEqual(found, 'b -> c -> d -> b')

  def test_libtpu_comes_with_nothing_but_its_extra(self):
    """Where JAX can import it, it looks for a TPU, however long that takes."""
    parser = configparser.ConfigParser()
    parser.read(ROOT.parent / 'setup.cfg')
    extras = parser['options.extras_require']
    found = [name for name in extras if re.search('tpu', extras[name])]
    self.assertEqual(found, ['tpu'])

  def test_serving_needs_no_data_or_training_package(self):
    code = (
      'import sys, histjax, histjax.training.workdir;'
      'print([m for m in ("grain", "tensorflow_datasets", "pyarrow",'
      ' "orbax", "optax", "tensorflow", "msgspec", "starlette", "uvicorn",'
      ' "prometheus_client", "httpx", "safetensors", "ray",'
      ' "histjax.serving")'
      ' if m in sys.modules])'
    )
    result = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    self.assertEqual(result.stdout.strip(), '[]')
