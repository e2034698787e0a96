"""Fields of a config from the command line, by the dataclasses' type hints.

    --config.optimizer.learning_rate=3e-4     a scalar
    --config.model.encoder.window=None        where None is allowed
    --config.data.source.split.type=time_split       another member of a union,
    --config.data.source.split.test_start=2022-05-03   with its fields alone
    --config.select.gauc=0.3                  a key of a mapping
    --config.data.source.schema.item.0.size=500      an element of a tuple
    --config.data.source.paths=a.csv,b.csv    a tuple, or as '("a.csv",)'
    --config.data.source.schema.column_types="{'uid': 'integer'}"      pairs
    --config.data.rows="{'kind': 'request'}"  all of a dataclass

Where two fields exclude each other (the field's metadata has `instead_of`),
setting one makes the other None.
"""

from __future__ import annotations

import ast
import collections.abc
import copy
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from histjax import config as config_lib

_BOOLS = {'true': True, 't': True, '1': True, 'yes': True}
_BOOLS |= {'false': False, 'f': False, '0': False, 'no': False}


def split_argv(
  argv: Sequence[str], name: str
) -> tuple[list[str], list[tuple[str, str | None]]]:
  """What is an override of the flag `name`, and what is not.

  Args:
    argv: of the process.
    name: of the flag, as 'config'.

  Returns:
    `(rest, overrides)`; an override is `(path, text)`, as written after
    `--<name>.`; the text is None for `--config.tensorboard` alone, a bool.
  """
  rest: list[str] = []
  found: list[tuple[str, str | None]] = []
  index = 0
  while index < len(argv):
    arg = argv[index]
    index += 1
    flag, equals, text = arg.partition('=')
    bare = flag.lstrip('-')
    dashes = len(flag) - len(bare)
    if arg == '--':
      return [*rest, *argv[index - 1 :]], found
    if dashes in (1, 2) and bare.startswith(f'no{name}.') and not equals:
      found.append((bare.removeprefix(f'no{name}.'), 'False'))
    elif dashes not in (1, 2) or not bare.startswith(f'{name}.'):
      rest.append(arg)
    elif equals:
      found.append((bare.removeprefix(f'{name}.'), text))
    elif index < len(argv) and not argv[index].startswith('--'):
      found.append((bare.removeprefix(f'{name}.'), argv[index]))
      index += 1
    else:
      found.append((bare.removeprefix(f'{name}.'), None))
  return rest, found


def apply(
  cls: type, values: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
  """A config with some fields set; the whole is checked by `from_dict`.

  Args:
    cls: the config's dataclass.
    values: `{field: value}`, as `config.from_dict` takes.
    overrides: `(path, text)` of each, see `split_argv`; later ones win, but
      types of unions come first.

  Raises:
    ValueError: there is no such field (the message has the closest name), or
      the text is no value of its type.
  """
  result: Any = copy.deepcopy(dict(values))
  tag = f'.{config_lib.TYPE}'
  tags = [o for o in overrides if f'.{o[0]}'.endswith(tag)]
  tags.sort(key=lambda o: o[0].count('.'))  # Outer ones decide of inner ones.
  others = [o for o in overrides if not f'.{o[0]}'.endswith(tag)]
  given = {path for path, _ in overrides}
  for path, text in (*tags, *others):
    names = path.split('.')
    result = _set(cls, result, names, text, '')
    for parent, other in _excluded(cls, result, names):
      if '.'.join([*names[:-1], other]) not in given:
        parent[other] = None
  return result


def _set(hint, value, names: list[str], text, path: str):
  """`value`, of type `hint`, with its part `names` set."""
  if not names:
    return _parse(hint, text, path, value)
  name, at = names[0], _join(path, names[0])
  value, cls = _open(hint, value, path)
  if name == config_lib.TYPE and len(names) == 1 and len(_classes(hint)) > 1:
    return _switch(hint, value, text, at)
  if cls is not None:
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    if name not in fields:
      raise config_lib.unknown_field(cls, name, path)
    value[name] = _set(hints[name], value.get(name), names[1:], text, at)
  elif isinstance(value, dict):
    value[name] = _set(_item(hint), value.get(name), names[1:], text, at)
  elif isinstance(value, list):
    if not name.isdecimal() or int(name) >= len(value):
      raise ValueError(
        f'{at}: {path!r} has the elements 0 to {len(value) - 1}, or is set as '
        'a whole'
      )
    i = int(name)
    value[i] = _set(_item(hint, i), value[i], names[1:], text, at)
  else:
    raise ValueError(f'{at}: {path!r} has no fields; it is {value!r}')
  return value


def _open(hint, value, path: str):
  """`(value, its dataclass or None)`; what was None gets an empty value."""
  classes = _classes(hint)
  if isinstance(value, (list, tuple)):
    return list(value), None
  if isinstance(value, Mapping):
    value = dict(value)
    if not classes:
      return value, None
    found = value.get(config_lib.TYPE, next(iter(classes)))
    if len(classes) > 1 and found not in classes:
      raise ValueError(
        f'{_join(path, config_lib.TYPE)}={found!r} must be one of '
        f'{list(classes)}'
      )
    return value, classes[found if len(classes) > 1 else next(iter(classes))]
  if len(classes) == 1:
    return {}, next(iter(classes.values()))
  if classes:
    return {}, None  # Until its type is set.
  if _mapping(hint) is not None:
    return {}, None
  return value, None


def _switch(hint, value, text, path: str) -> dict[str, Any]:
  """Another member of a union, with its defaults."""
  classes = _classes(hint)
  if text not in classes:
    close = config_lib.nearest(str(text), classes)
    raise ValueError(
      f'{path}={text!r} must be one of {list(classes)}'
      + (f'; did you mean {close!r}?' if close else '')
    )
  if isinstance(value, dict) and value.get(config_lib.TYPE) == text:
    return value
  return {config_lib.TYPE: text}


def _excluded(cls, values, names: list[str]):
  """`(dict, field)` to make None, after the field `names` was set."""
  hint: Any = cls
  for name in names[:-1]:
    classes = _classes(hint)
    if not isinstance(values, dict) or not classes:
      return
    found = classes.get(
      str(values.get(config_lib.TYPE)), next(iter(classes.values()))
    )
    hint, values = typing.get_type_hints(found).get(name), values.get(name)
  for found in _classes(hint).values():
    for field in dataclasses.fields(found):
      other = field.metadata.get('instead_of')
      if (
        field.name == names[-1] and other and values.get(field.name) is not None
      ):
        yield values, other


def _parse(hint, text, path: str, old):
  """The value that `text` means for the type `hint`."""
  if text is None:
    if bool not in _members(hint):
      raise ValueError(f'{path} has no value; write it as {path}=..')
    return True
  members = _members(hint)
  if text == 'None' and (type(None) in members or hint is Any):
    return None
  if hint is Any:
    return _guess(text, old)
  for member in sorted(members, key=_narrowness):
    try:
      return _as(member, text)
    except (ValueError, SyntaxError, TypeError):
      continue
  names = ' or '.join(map(_name, members))
  raise ValueError(f'{path}={text!r} must be {names}')


def _name(member) -> str:
  if member is type(None):
    return 'None'
  if typing.get_origin(member) is typing.Literal:
    return f'one of {list(typing.get_args(member))}'
  plain = isinstance(member, type) and not typing.get_args(member)
  return member.__name__ if plain else str(member)


def _narrowness(member) -> int:
  """The narrower first: 1 is an int before it is a float or a string."""
  order = (type(None), bool, int, float)
  if member in order:
    return order.index(member)
  return 6 if member is str else 5


def _as(member, text: str):
  """`text` as one type that is no union; raises if it is not of it."""
  if member is type(None):
    raise ValueError(text)
  if member is bool:
    if text.lower() not in _BOOLS:
      raise ValueError(text)
    return _BOOLS[text.lower()]
  if member in (int, float, str):
    return member(text)
  origin, args = typing.get_origin(member), typing.get_args(member)
  if origin is typing.Literal:
    choices = {str(a): a for a in args}
    if text not in choices:
      raise ValueError(text)
    return choices[text]
  if origin is tuple or member is tuple:
    return _as_tuple(args, text)
  value = ast.literal_eval(text)  # A dataclass, or a mapping.
  if not isinstance(value, dict):
    raise ValueError(text)
  return value


def _as_tuple(args, text: str) -> list:
  item = args[0] if args else Any
  if _classes(item) or _mapping(item) is not None:
    return list(ast.literal_eval(text))
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = None
  if isinstance(value, dict) and typing.get_origin(item) is tuple:
    value = tuple(value.items())
  # '1,2' are two strings where strings are due, and not two numbers.
  if isinstance(value, (tuple, list)) and (
    str not in _members(item)
    or text.strip()[:1] in '(['
    or all(isinstance(v, str) for v in value)
  ):
    parts = [v if isinstance(v, str) else repr(v) for v in value]
  else:
    parts = [p.strip() for p in text.split(',')] if text.strip() else []
  fixed = bool(args) and args[-1] is not Ellipsis
  if fixed and len(parts) != len(args):
    raise ValueError(text)
  return [
    _parse(args[i] if fixed else item, part, '', None)
    for i, part in enumerate(parts)
  ]


def _guess(text: str, old):
  """Where a config has no types: as the value that was there, or a literal."""
  if isinstance(old, str):
    return text
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    if isinstance(old, bool) and text.lower() in _BOOLS:
      return _BOOLS[text.lower()]
    return text


def _members(hint) -> tuple:
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def _classes(hint) -> dict[str, type]:
  """`{type: dataclass}` of those that the hint allows."""
  found = config_lib.members(hint)
  if not found and dataclasses.is_dataclass(hint):
    found = {'': typing.cast(type, hint)}
  return found


def _mapping(hint):
  """The mapping among the members of a hint, or None."""
  for member in _members(hint):
    if typing.get_origin(member) in (dict, collections.abc.Mapping):
      return member
  return None


def _item(hint, index: int = -1):
  """The type of the elements of a mapping or tuple."""
  for member in _members(hint):
    args = typing.get_args(member)
    if typing.get_origin(member) in (dict, collections.abc.Mapping):
      return args[1]
    if typing.get_origin(member) is tuple:
      return args[0] if args[-1] is Ellipsis else args[index]
  return Any


def _join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name
