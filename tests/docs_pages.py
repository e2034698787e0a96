"""The code and commands of the README and of `docs/`."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
  str(path.relative_to(ROOT)): path.read_text(encoding='utf-8')
  for path in (
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    *sorted(ROOT.glob('docs/**/*.md')),
  )
  if '_build' not in path.parts
}
_FENCE = re.compile(r'^( *)```(\w+)\n(.*?)^\1```$', re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r'(?<!`)`([^`]+)`(?!`)')


def blocks(page: str, language: str) -> list[str]:
  """The fenced blocks of a page in a language, as they are printed."""
  return [
    re.sub(rf'^{indent}', '', body, flags=re.MULTILINE)
    for indent, found, body in _FENCE.findall(PAGES[page])
    if found == language
  ]


@dataclasses.dataclass(frozen=True)
class Command:
  """A line of a shell, continued ones as one."""

  page: str
  text: str

  @property
  def words(self) -> list[str]:
    return shlex.split(self.text, comments=True)

  @property
  def binary(self) -> str | None:
    """`train` of `python experiments/train.py`."""
    found = re.match(r'python experiments/(\w+)\.py', self.text)
    return found and found[1]

  @property
  def flags(self) -> list[str]:
    return [w for w in self.words if w.startswith('--')]


def commands() -> list[Command]:
  """Those of the shell blocks, and the binaries' in the text."""
  found = []
  for page, text in PAGES.items():
    for block in blocks(page, 'sh'):
      found += [Command(page, line) for line in _lines(block)]
    without = _FENCE.sub('', text)
    for code in _INLINE.findall(without):
      code = ' '.join(code.split())
      if code.startswith('python experiments/'):
        found.append(Command(page, code))
  return found


def _lines(block: str) -> Iterator[str]:
  """Commands, each until its quotes, parentheses and backslashes close."""
  text = ''
  for line in block.replace('\\\n', ' ').splitlines():
    text = f'{text}\n{line}' if text else line
    try:
      shlex.split(text, comments=True)
    except ValueError:
      continue
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", '', text)
    if bare.count('(') > bare.count(')') or bare.rstrip().endswith('|'):
      continue
    yield from re.split(r' && ', text) if "'" not in text else [text]
    text = ''
  if text:
    raise ValueError(f'a command of the documentation does not end: {text}')
