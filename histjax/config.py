"""Frozen dataclasses to plain dicts and back, strictly.

    config = from_dict(TrainConfig, {'seed': 1, 'optimizer': {...}})
    assert from_dict(TrainConfig, to_dict(config)) == config

`to_dict` gives only dicts, lists, strings, numbers, booleans and None, so that
`json.dumps` takes it. Where a field may be one of several dataclasses, as a
feature is `Categorical | Dense`, the dict has one more key, `type`: the name
of the class in snake case, `{'type': 'categorical', 'name': 'item', ...}`. A
field of an abstract dataclass may be any subclass that is imported.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

T = TypeVar('T')

TYPE = 'type'


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
  """Builds the dataclass `cls` from a dict.

  Fields that are absent get their defaults. An int is taken for a float, and
  a list for a tuple; nothing else is converted. A value that already is the
  dataclass that a field asks for is taken as it is.

  Args:
    cls: a dataclass. Its fields may be of scalar types, dataclasses, tuples,
      `Mapping[str, ...]`, `Literal`s, `Any`, and unions of these.
    values: `{field: value}`, dataclasses being dicts themselves.

  Returns:
    The dataclass.

  Raises:
    ValueError: an unknown field (the message has the closest name and all
      names), a missing one, or a value of the wrong type.
  """
  return _decode(cls, values, '')


def to_dict(config: Any) -> dict[str, Any]:
  """The dataclass `config` as JSON-able dicts and lists; see `from_dict`.

  Raises:
    ValueError: a value that JSON has no form for.
  """
  return _encode(type(config), config, '')


def normalize(config: Any) -> None:
  """Makes the fields of a dataclass what `from_dict` makes of them.

  For `__post_init__`: then equal configs are equal as JSON, too.

  Args:
    config: a dataclass, frozen or not; its fields are as `from_dict` takes
      them.

  Raises:
    ValueError: a field has a value of a wrong type.
  """
  cls: type = type(config)
  for field in dataclasses.fields(cls):
    path = f'{cls.__name__}.{field.name}'
    value = _decode(_hints(cls)[field.name], getattr(config, field.name), path)
    object.__setattr__(config, field.name, value)


def dumps(config: Any) -> str:
  """The dataclass `config` as indented JSON."""
  return json.dumps(to_dict(config), indent=2) + '\n'


def loads(cls: type[T], text: str) -> T:
  """Builds the dataclass `cls` from JSON; the inverse of `dumps`.

  Raises:
    ValueError: the text is no JSON, or as of `from_dict`.
  """
  try:
    values = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'the {cls.__name__} is no JSON ({error}): it begins with {text[:40]!r}; '
      'write it anew, as by `dumps`'
    ) from error
  return from_dict(cls, values)


def differences(
  old: Any, new: Any, names: tuple[str, str] = ('old', 'new')
) -> list[str]:
  """One line per field in which two results of `to_dict` differ.

  Args:
    old: a dict, list or scalar.
    new: the same of another config.
    names: what to call the two.

  Returns:
    Lines as `optimizer.learning_rate: 0.1 (old), 0.2 (new)`, in the order of
    the fields; empty if there is no difference.
  """
  a, b = _flatten(old, ''), _flatten(new, '')
  return [
    f'{path}: {a.get(path, "absent")!r} ({names[0]}), '
    f'{b.get(path, "absent")!r} ({names[1]})'
    for path in a | b
    if path not in a or path not in b or a[path] != b[path]
  ]


def _flatten(value: Any, path: str) -> dict[str, Any]:
  items: Any = None
  if isinstance(value, Mapping):
    items = value.items()
  elif isinstance(value, (list, tuple)):
    items = enumerate(value)
  if not items:
    return {path: value}
  flat = {}
  for key, item in items:
    flat.update(_flatten(item, _join(path, str(key))))
  return flat


def _decode(hint: Any, value: Any, path: str) -> Any:
  """`value` as the type `hint`; `path` names the field in errors."""
  if hint is Any:
    return value
  if _is_abstract(hint):
    return _decode_union(hint, value, path)
  if _is_dataclass(hint):
    return _decode_dataclass(hint, value, path)
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (Union, types.UnionType):
    return _decode_union(hint, value, path)
  if origin is Literal:
    if not any(value == a and type(value) is type(a) for a in args):
      raise ValueError(f'{path}={value!r} must be one of {list(args)}')
    return value
  if hint is tuple or origin is tuple:
    return _decode_tuple(args, value, path)
  if origin in (dict, collections.abc.Mapping):
    if not isinstance(value, Mapping):
      raise _wrong_type(hint, value, path)
    return {
      _decode(args[0], k, f'{path} (key)'): _decode(
        args[1], v, _join(path, str(k))
      )
      for k, v in value.items()
    }
  return _decode_scalar(hint, value, path)


def _decode_scalar(hint: Any, value: Any, path: str) -> Any:
  if hint in (None, type(None)):
    if value is not None:
      raise _wrong_type(hint, value, path)
  elif hint is float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise _wrong_type(hint, value, path)
    return float(value)
  elif hint in (int, str, bool):
    if type(value) is not hint:  # A bool is an int, but no count of anything.
      raise _wrong_type(hint, value, path)
  else:
    raise TypeError(f'{path}: fields of type {hint} are not supported')
  return value


def _decode_dataclass(cls: type, value: Any, path: str) -> Any:
  if isinstance(value, cls):
    return value
  if not isinstance(value, Mapping):
    raise _wrong_type(cls, value, path)
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  if TYPE in value and TYPE not in fields:  # As in a union; it need not be.
    name = _snake_case(cls.__name__)
    if value[TYPE] != name:
      raise ValueError(
        f'{_join(path, TYPE)}={value[TYPE]!r} must be {name!r}, or be left '
        f'out: {path!r} can be nothing else'
      )
    value = {k: v for k, v in value.items() if k != TYPE}
  for name in value:
    if name not in fields:
      raise unknown_field(cls, str(name), path)
  for name, field in fields.items():
    if name not in value and (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ValueError(
        f'{_join(path, name)} is missing; {cls.__name__} needs it'
      )
  hints = _hints(cls)
  return cls(
    **{k: _decode(hints[k], v, _join(path, k)) for k, v in value.items()}
  )


def _decode_tuple(args: tuple, value: Any, path: str) -> tuple:
  if isinstance(value, Mapping) and _are_pairs(args):
    key, item = typing.get_args(args[0])
    return tuple(
      (_decode(key, k, f'{path} (key)'), _decode(item, v, _join(path, str(k))))
      for k, v in value.items()
    )
  if isinstance(value, str) or not isinstance(value, Sequence):
    raise _wrong_type('a list', value, path)
  if not args:
    args = (Any, ...)
  if len(args) == 2 and args[1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise ValueError(
      f'{path}={value!r} has {len(value)} values, {len(args)} are needed'
    )
  return tuple(
    _decode(a, v, _join(path, str(i)))
    for i, (a, v) in enumerate(zip(args, value, strict=True))
  )


def _are_pairs(args: tuple) -> bool:
  """Whether a tuple is of pairs, for which a mapping may be given."""
  if len(args) != 2 or args[1] is not Ellipsis:
    return False
  pair = typing.get_args(args[0])
  is_tuple = typing.get_origin(args[0]) is tuple
  return is_tuple and len(pair) == 2 and Ellipsis not in pair


def _decode_union(hint: Any, value: Any, path: str) -> Any:
  args = typing.get_args(hint)
  if value is None and type(None) in args:
    return None
  known = members(hint)
  if any(isinstance(value, cls) for cls in known.values()):
    return value
  if known and isinstance(value, Mapping):
    if len(known) == 1 and not _is_abstract(hint):
      return _decode(next(iter(known.values())), value, path)
    if value.get(TYPE) not in known:
      hint_of_class = '' if args else '; import the module of a class of yours'
      raise ValueError(
        f'{_join(path, TYPE)}={value.get(TYPE)!r} must be one of '
        f'{list(known)}: it says which of them {path!r} is{hint_of_class}'
      )
    rest = {k: v for k, v in value.items() if k != TYPE}
    return _decode(known[value[TYPE]], rest, path)
  errors = []
  for arg in sorted(args, key=lambda a: a is float):  # An int stays an int.
    if arg is type(None) or arg in known.values():
      continue
    try:
      return _decode(arg, value, path)
    except ValueError as e:
      errors.append(e)
  if len(errors) == 1 and not known:
    raise errors[0]
  raise _wrong_type(' | '.join(map(_name, args or known.values())), value, path)


def _encode(hint: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    hints = _hints(type(value))
    encoded = {
      f.name: _encode(
        hints[f.name], getattr(value, f.name), _join(path, f.name)
      )
      for f in dataclasses.fields(value)
      if f.init
    }
    if len(members(hint)) > 1 or _is_abstract(hint):
      encoded = {TYPE: _snake_case(type(value).__name__), **encoded}
    return encoded
  if isinstance(value, Mapping):
    args = _args(hint, (dict, collections.abc.Mapping))
    item = args[1] if args else Any
    return {
      str(k): _encode(item, v, _join(path, str(k))) for k, v in value.items()
    }
  if isinstance(value, (tuple, list)):
    args = _args(hint, (tuple,)) or (Any, ...)
    if len(args) == 2 and args[1] is Ellipsis:
      args = (args[0],) * len(value)
    return [
      _encode(a, v, _join(path, str(i)))
      for i, (a, v) in enumerate(zip(args, value, strict=True))
    ]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ValueError(f'{path}={value!r} cannot be written as JSON')


def _args(hint: Any, origins: tuple) -> tuple:
  """The arguments of `hint`, or of the union member that has such an origin."""
  if typing.get_origin(hint) in origins:
    return typing.get_args(hint)
  if typing.get_origin(hint) in (Union, types.UnionType):
    for member in typing.get_args(hint):
      if typing.get_origin(member) in origins:
        return typing.get_args(member)
  return ()


def members(hint: Any) -> dict[str, type]:
  """`{type: class}` of the dataclasses that a field may hold one of.

  Args:
    hint: the field's type: a union, of which the dataclasses count, or an
      abstract dataclass, of which all subclasses that are imported do.

  Returns:
    Their classes by the `type` that says in a dict which it is; empty for any
    other type.
  """
  if _is_abstract(hint):
    found = [c for c in _subclasses(hint) if not inspect.isabstract(c)]
  elif typing.get_origin(hint) in (Union, types.UnionType):
    found = [a for a in typing.get_args(hint) if _is_dataclass(a)]
  else:
    found = []
  return {_snake_case(c.__name__): c for c in found}


def _subclasses(cls: type) -> list[type]:
  below: list[type] = cls.__subclasses__()
  return below + [c for b in below for c in _subclasses(b)]


def _is_abstract(hint: Any) -> bool:
  return isinstance(hint, type) and inspect.isabstract(hint)


def _is_dataclass(hint: Any) -> bool:
  return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _snake_case(name: str) -> str:
  return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name


def _name(hint: Any) -> str:
  return hint.__name__ if isinstance(hint, type) else str(hint)


def _wrong_type(hint: Any, value: Any, path: str) -> ValueError:
  return ValueError(
    f'{path or "config"}={value!r} is of type {type(value).__name__}; it must '
    f'be {_name(hint)}'
  )


def unknown_field(cls: type, name: str, path: str) -> ValueError:
  """The error of a field that `cls` has not, with the one that was meant.

  Args:
    cls: a dataclass.
    name: as it was given.
    path: of `cls` in the config.
  """
  known = _fields(cls)
  close = nearest(name, known)
  meant = [*paths_of(cls, name, path)]
  if close and not meant:
    meant = [_join(path, close)]
  hint = f'did you mean {meant[0]!r}? It' if meant else 'it'
  return ValueError(
    f'{_join(path, name)} is not a field of {cls.__name__}; {hint} has {known}'
  )


def nearest(name: str, known: Iterable[str]) -> str | None:
  """The one of `known` that was probably meant, in whatever case, if any is."""
  folded = {k.casefold(): k for k in known}
  close = difflib.get_close_matches(name.casefold(), folded, 1)
  return folded[close[0]] if close else None


def _fields(cls: Any) -> list[str]:
  return [f.name for f in dataclasses.fields(cls) if f.init]


def paths_of(cls: type, name: str, path: str = '') -> Iterator[str]:
  """The paths of the fields called `name`, of `cls` and what it holds."""
  if name in _fields(cls):
    yield _join(path, name)
  for field in _fields(cls):
    hint = _hints(cls)[field]
    for inner in [*members(hint).values()] or [hint] * _is_dataclass(hint):
      yield from paths_of(inner, name, _join(path, field))
