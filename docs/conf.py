"""How Sphinx builds the site: `make docs`."""

import pathlib
import re

import docutils.nodes
from sphinx.util import nodes

import histjax

ROOT = pathlib.Path(__file__).parents[1]

project = 'histjax'
author = 'The histjax authors'
project_copyright = f'2026, {author}'
version = release = histjax.__version__

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]
exclude_patterns = ['_build']
nitpicky = False
suppress_warnings = ['myst.header']

myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_inherit_docstrings = False
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Single backquotes: code, and a link if it is the name of something public.
default_role = 'py:obj'

html_theme = 'furo'
pygments_style = 'default'
html_title = 'histjax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {
  'source_repository': 'https://github.com/histjax/histjax/',
  'source_branch': 'main',
  'source_directory': 'docs/',
}
html_copy_source = False
html_show_sphinx = False


def _mark_code(app, what, name, obj, options, lines):
  """Makes literal blocks of what docstrings indent by four, as Markdown does.

  Their other text is Markdown, too: one pair of backquotes is code.
  """
  del app, name, obj, options
  marked: list[str] = []
  if what in ('attribute', 'data', 'property'):
    # An empty comment: Napoleon takes a first line's `text:` for a type.
    marked += ['..', '']
  code = False
  indent = 0  # Of the text before.
  for line in lines:
    depth = len(line) - len(line.lstrip())
    if line.strip():
      after_blank = not marked or not marked[-1].strip()
      if code and depth < indent + 4:
        code = False
      elif not code and after_blank and depth >= indent + 4:
        code = True
        marked += [' ' * indent + '::', '']
      if not code:
        indent = depth
        line = _escape(line)
    marked.append(line)
  lines[:] = marked


def _escape(line: str) -> str:
  """Escapes what is markup in reStructuredText and not in Markdown."""
  parts = re.split(r'(`[^`]*`)', line)
  line = ''.join(_code(p) if p.startswith('`') else _text(p) for p in parts)
  return re.sub(r'(?<=`)(?=s\b)', r'\\ ', line)  # The plural of code.


def _code(part: str) -> str:
  """A name may become a link; other code may have colons."""
  return part if re.fullmatch(r'`[\w.]+`', part) else f'`{part}`'


def _text(part: str) -> str:
  """Bullets and `*emphasis*` are the same in both."""
  same = r'(^\s*\* |\*\w[^*`]*\*)'
  return ''.join(
    x if re.fullmatch(same, x) else re.sub(r'([*|]|_(?=\W|$))', r'\\\1', x)
    for x in re.split(same, part)
  )


def _resolve(app, env, node, contnode):
  """Links what is the end of a public name, as `Scorer.score`."""
  target = node.get('reftarget', '')
  if node.get('refdomain') != 'py' or not re.fullmatch(r'[\w.]+', target):
    return None
  return _link(app, env, node['refdoc'], target, contnode)


def _link(app, env, docname, target, content):
  """A link to the only public object whose name ends so, or None."""
  end = target.removeprefix('histjax.')
  found = {
    name: entry
    for name, entry in env.get_domain('py').objects.items()
    if name == end or name.endswith(f'.{end}')
  }
  if not found:
    return None
  least = min(name.count('.') for name in found)
  found = {n: e for n, e in found.items() if n.count('.') == least}
  ((name, entry), *others) = found.items()
  bare = '.' not in end and end[0].islower()  # As `length`, any attribute.
  if others or (bare and entry.objtype != 'function'):
    return None
  return nodes.make_refnode(
    app.builder, docname, entry.docname, entry.node_id, content, name
  )


def _skip(app, what, name, obj, skip, options):
  """Every Flax dataclass has `replace`."""
  del app, what, obj, options
  return True if name == 'replace' else skip


def _link_pages(app, doctree, docname):
  """Links the full names of public objects in the code of pages."""
  for field in doctree.findall(docutils.nodes.field_name):
    if field.astext() == 'Variables':
      field.children = [docutils.nodes.Text('Attributes')]
  for node in list(doctree.findall(docutils.nodes.literal)):
    name = re.fullmatch(r'(histjax\.[\w.]+|Scorer\.\w+)', node.astext())
    if name and not isinstance(node.parent, docutils.nodes.reference):
      link = _link(app, app.env, docname, name[0], node.deepcopy())
      if link is not None:
        node.replace_self(link)


def _first_page(app, docname, source):
  """README up to its mark, and of the list of pages those that are there.

  A name with a question mark is of a page that may not be.
  """
  if docname != 'index':
    return
  app.env.note_dependency(str(ROOT / 'README.md'))
  readme = (ROOT / 'README.md').read_text(encoding='utf-8')
  readme, _, rest = readme.partition('<!-- end of the first page -->')
  if not rest:
    raise ValueError('README.md lacks <!-- end of the first page -->')
  readme = re.sub(r'\]\((?!https?:|#)', '](../', readme)
  readme = readme.replace('](../docs/', '](')
  lines = source[0].replace('<!-- README -->', readme).splitlines()
  docs = ROOT / 'docs'
  source[0] = '\n'.join(
    line.rstrip('?')
    for line in lines
    if not re.fullmatch(r'\w+\?', line)
    or (docs / f'{line.rstrip("?")}.md').is_file()
  )


def _notes(app, docname, source):
  """Links the sections of the notes, as GitHub has them, to their page."""
  del app, docname
  source[0] = re.sub(
    r'\]\((?:\.\./)*histjax/ops/NOTES\.md#', '](/notes.md#', source[0]
  )


def _sign(app, what, name, obj, options, signature, annotation):
  """Leaves out what Linen adds to the signature of every module."""
  del app, what, name, obj, options
  if signature:
    signature = re.sub(r', parent[:=].*, name: .* = None', '', signature)
  return signature, annotation


def setup(app):
  """Called by Sphinx."""
  app.connect('autodoc-process-docstring', _mark_code, priority=400)
  app.connect('autodoc-process-signature', _sign)
  app.connect('autodoc-skip-member', _skip)
  app.connect('missing-reference', _resolve)
  app.connect('doctree-resolved', _link_pages)
  app.connect('source-read', _first_page)
  app.connect('source-read', _notes)
