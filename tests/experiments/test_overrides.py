"""Every field of a config can be set from the command line."""

import dataclasses
import typing
from collections.abc import Mapping

import pytest

import config_util
import overrides
from fusion_study.config import StudyConfig
from histjax import config as config_lib
from histjax.schema import Schema
from histjax.training.config import TrainConfig

BASE = config_util.config_dict({'num_epochs': 3}).to_dict()


def put(*flags, cls=TrainConfig, base=BASE):
  """The config with these flags."""
  rest, found = overrides.split_argv(['train', *flags], 'config')
  assert rest == ['train']
  return overrides.apply(cls, base, found)


def at(values, path):
  for name in path.split('.'):
    values = values[int(name)] if isinstance(values, list) else values[name]
  return values


def leaves(cls, path='', tags=()):
  """`(path, type, tags)` of all fields that are no dataclass.

  `tags` are the flags that choose members of unions on the way.
  """
  for name, hint in typing.get_type_hints(cls).items():
    classes = overrides._classes(hint)
    if hint is Schema or name == 'features':
      continue  # Which columns there are is for the file to say.
    if not classes:
      yield f'{path}{name}', hint, tags
    for tag, member in classes.items():
      start, chosen = f'{path}{name}.', tags
      if len(classes) > 1:
        yield f'{start}type', tag, tags
        chosen = (*tags, f'--config.{start}type={tag}')
      yield from leaves(member, start, chosen)


def others(hint):
  """`(text, value)` of values of a type, as they are written."""
  if hint in OTHERS:
    yield from OTHERS[hint]
  elif typing.get_origin(hint) is typing.Literal:
    yield from ((str(a), a) for a in typing.get_args(hint))
  elif typing.get_origin(hint) is tuple:
    (item, _) = typing.get_args(hint)
    texts, values = zip(*others(item), strict=True)
    yield ','.join(texts), list(values)
    yield repr(tuple(values)), list(values)
    yield repr(list(values)), list(values)
    yield texts[0], [values[0]]
    yield '', []
  elif typing.get_origin(hint) in (dict, Mapping):
    for text, value in others(typing.get_args(hint)[1]):
      yield f"{{'auc': {text}}}", {'auc': value}
  else:
    members = typing.get_args(hint)
    assert members, hint
    for member in members:
      yield from others(member)


OTHERS = {
  int: [('7', 7), ('1_000', 1000)],
  float: [('0.25', 0.25), ('3e-4', 3e-4)],
  bool: [('True', True), ('false', False), ('1', True)],
  str: [('some/path', 'some/path'), ('b', 'b')],
  type(None): [('None', None)],
}
LEAVES = list(leaves(TrainConfig))


@pytest.mark.parametrize(
  'path, hint, tags', LEAVES, ids=[path for path, *_ in LEAVES]
)
def test_every_field(path, hint, tags):
  if isinstance(hint, str):  # The tag of a union.
    assert at(put(*tags, f'--config.{path}={hint}'), path) == hint
    return
  tried = list(others(hint))
  assert tried
  for text, value in tried:
    found = at(put(*tags, f'--config.{path}={text}'), path)
    assert found == value and type(found) is type(value), text
    config_lib._decode(hint, found, path)  # As `from_dict` wants it.


def test_there_are_all_fields():
  names = {path.partition('.')[0] for path, *_ in LEAVES}
  assert names == {f.name for f in dataclasses.fields(TrainConfig)}
  assert len(LEAVES) > 70


@pytest.mark.parametrize(
  'flags, path, value',
  [
    (['--config.num_steps=100'], 'num_epochs', None),
    (['--config.num_epochs=2'], 'num_steps', None),
    (['--config.num_epochs=None', '--config.num_steps=9'], 'num_steps', 9),
    (['--config.num_steps=None', '--config.num_epochs=9'], 'num_epochs', 9),
    (['--config.model.encoder.window=None'], 'model.encoder.window', None),
    (['--config.select.gauc=0.3'], 'select', {'auc': 1.0, 'gauc': 0.3}),
    (['--config.select.like/ne=1'], 'select.like/ne', 1.0),
    (['--config.task_weights.like=2'], 'task_weights', {'like': 2.0}),
    (
      ['--config.data.eval_rows.kind=request'],
      'data.eval_rows.kind',
      'request',
    ),
    (['--config.tensorboard'], 'tensorboard', True),
    (['--noconfig.tensorboard'], 'tensorboard', False),
    (['-config.seed', '5'], 'seed', 5),
    (['--config.seed=1', '--config.seed=2'], 'seed', 2),
    (['--config.data.without=("a,b", "c")'], 'data.without', ['a,b', 'c']),
    (['--config.average=0'], 'average', 0.0),
    (['--config.data.without=1,2'], 'data.without', ['1', '2']),
  ],
)
def test_values(flags, path, value):
  values = put(*flags)
  assert at(values, path) == value
  config_util.config_dict(values)  # Is a config.


def test_names_of_the_dataset_are_checked_against_it():
  flags = ['select.like/auc=1', 'task_weights.like=2', 'max_unique_ids.item=9']
  values = put(*(f'--config.{flag}' for flag in flags))
  values['max_unique_ids']['category'] = 5
  values['data']['source'] = {'type': 'synthetic', 'num_users': 3}
  full = config_util.config_dict(values).to_dict()
  assert full['max_unique_ids'] == {'item': 9, 'category': 5}
  config, _ = config_util.load(values)
  assert config.max_unique_ids == {'item': 9, 'category': 5}
  values['max_unique_ids'] = {'genre': 5}
  with pytest.raises(ValueError, match=r"'genre': 5; .*'category', 'click'"):
    config_util.load(values)


EVENTS = {
  'source': {
    'type': 'events',
    'paths': ['log.csv'],
    'schema': {
      'user': 'user',
      'time': 'time',
      'item': [{'type': 'categorical', 'name': 'a', 'size': 3}],
      'tasks': [{'name': 'y'}],
    },
    'split': {'type': 'fraction_split', 'train': 0.5},
  }
}


def test_a_union_has_the_fields_of_its_type_alone():
  base = {**BASE, 'data': EVENTS}
  split = '--config.data.source.split'
  # In any order.
  values = put(
    f'{split}.test_start=2022-05-03',
    f'{split}.type=time_split',
    f'{split}.validation_start=17',
    base=base,
  )
  assert values['data']['source']['split'] == {
    'type': 'time_split',
    'validation_start': 17,
    'test_start': '2022-05-03',
  }
  config_util.config_dict(values)
  back = put(f'{split}.type=fraction_split', base=values)
  assert back['data']['source']['split'] == {'type': 'fraction_split'}
  assert put(f'{split}.type=time_split', base=values) == values
  assert EVENTS['source']['split']['train'] == 0.5  # Untouched.
  other = put('--config.data.source.type=kuairand', base=values)
  assert other['data']['source'] == {'type': 'kuairand'}


@dataclasses.dataclass(frozen=True)
class Planted:
  size: int = 3


@dataclasses.dataclass(frozen=True)
class Files:
  paths: tuple[str, ...]
  split: int | float | str = 0.5


@dataclasses.dataclass(frozen=True)
class Data:
  source: Planted | Files = dataclasses.field(default_factory=Planted)
  other: Planted | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  data: Data = dataclasses.field(default_factory=Data)


def test_any_union():
  base = config_lib.to_dict(Run())
  values = put(
    '--config.data.source.type=files',
    '--config.data.source.paths=a.csv,b.csv',
    '--config.data.source.split=2022-05-01',
    '--config.data.other.size=4',
    cls=Run,
    base=base,
  )
  assert config_lib.from_dict(Run, values) == Run(
    Data(Files(('a.csv', 'b.csv'), '2022-05-01'), Planted(4))
  )
  with pytest.raises(ValueError, match=r'source\.paths is not a field of Plan'):
    put('--config.data.source.paths=a', cls=Run, base=base)


def test_elements_of_a_tuple_of_dataclasses():
  flag = '--config.data.source.schema.item'
  values = put(f'{flag}.0.size=9', base={'data': EVENTS})
  assert values['data']['source']['schema']['item'][0]['size'] == 9
  with pytest.raises(ValueError, match='has the elements 0 to 0'):
    put(f'{flag}.1.size=9', base={'data': EVENTS})


@pytest.mark.parametrize(
  'text', ["{'uid': 'integer'}", "(('uid', 'integer'),)"]
)
def test_pairs(text):
  flag = '--config.data.source.schema.column_types'
  values = put(f'{flag}={text}', base={'data': EVENTS})
  assert values['data']['source']['schema']['column_types'] == [
    ['uid', 'integer']
  ]


def test_a_study():
  base = {'datasets': {'ml1m': {'run': BASE, 'windows': (50,)}}, 'seeds': (0,)}
  values = put(
    '--config.margin=0.01',
    '--config.datasets.ml1m.windows=5,10',
    '--config.datasets.ml1m.run.num_epochs=1',
    '--config.datasets.ml1m.run.model.encoder.positions=recency',
    cls=StudyConfig,
    base=base,
  )
  assert values['margin'] == 0.01
  assert values['datasets']['ml1m']['windows'] == [5, 10]
  run = values['datasets']['ml1m']['run']
  assert run['num_epochs'] == 1
  assert run['model']['encoder']['positions'] == 'recency'


@pytest.mark.parametrize(
  'flag, message',
  [
    ('optimizer.learning_rat=1', "did you mean 'optimizer.learning_rate'"),
    ('sed=1', "sed is not a field of TrainConfig; did you mean 'seed'"),
    ('learning_rate=1', "did you mean 'optimizer.learning_rate'"),
    ('model.window=1', "did you mean 'model.encoder.window'"),
    ('zzz=1', 'zzz is not a field of TrainConfig; it has'),
    ('seed.x=1', "'seed' has no fields"),
    ('seed=1.5', "seed='1.5' must be int"),
    ('seed=None', "seed='None' must be int"),
    ('seed=', "seed='' must be int"),
    ('seed', 'seed has no value; write it as seed='),
    ('patience=two', "patience='two' must be int or None"),
    ('tensorboard=maybe', "tensorboard='maybe' must be bool"),
    ('average=x', "average='x' must be float or None"),
    ('data.rows.kind=streming', "must be one of .*'streaming'"),
    ('data.source.type=syntetic', "did you mean 'synthetic'"),
    ('data.source.paths=a', 'is not a field of Synthetic'),
    ('pipeline.history_buckets=8,x', r'must be tuple\[int'),
    ('optimizer=3', "optimizer='3' must be OptimizerConfig"),
    ('select=auc', "select='auc' must be"),
  ],
)
def test_refused(flag, message):
  with pytest.raises(ValueError, match=message):
    put(f'--config.{flag}')


def test_what_is_no_override():
  argv = ['train', '--config=a.py', '--workdir', 'x', 'y', '--configs.a=1']
  assert overrides.split_argv(argv, 'config') == (argv, [])
  argv = ['train', '--', '--config.seed=1']
  assert overrides.split_argv(argv, 'config') == (argv, [])
