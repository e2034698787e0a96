"""Configs to dicts and back, strictly."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from histjax import config as config_lib
from histjax import features, scoring
from histjax import schema as schema_lib
from histjax.data import datasets, pipeline, rows
from histjax.models import ranker
from histjax.nn import encoder, interaction
from histjax.serving import batcher, engine, export, known, messages
from histjax.training import losses, optimizer

SCHEMA = {
  'user': 'u',
  'time': 't',
  'item': (schema_lib.Categorical('item', 9),),
  'tasks': (schema_lib.Task('click'),),
}
FEATURES = (
  (features.Activity, {'spans': (60,)}),
  (features.HistoryRates, {'by': ('item',)}),
  (features.Rates, {'by': ('item',)}),
  (features.RecentRates, {'last': 3}),
  (features.RecentShares, {'of': ('item@3',)}),
  (features.TimeGap, {}),
)


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int = 1
  rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Other:
  name: str = 'x'


@dataclasses.dataclass(frozen=True)
class Outer:
  needed: int
  inner: Inner = Inner()
  either: Inner | Other = Inner()
  many: tuple[Inner | Other, ...] = ()
  maybe: int | None = None
  nested: Inner | None = None
  mode: Literal['a', 'b', 1] = 'a'
  pair: tuple[int, str] = (1, 'x')
  number: int | float = 1
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  on: bool = False
  anything: Any = None
  kinds: tuple[tuple[str, Literal['a', 'b']], ...] = ()


_inner = st.builds(Inner, st.integers(), st.floats(allow_nan=False))
_other = st.builds(Other, st.text())
_outer = st.builds(
  Outer,
  needed=st.integers(),
  inner=_inner,
  either=_inner | _other,
  many=st.lists(_inner | _other, max_size=3).map(tuple),
  maybe=st.none() | st.integers(),
  nested=st.none() | _inner,
  mode=st.sampled_from(['a', 'b', 1]),
  pair=st.tuples(st.integers(), st.text()),
  number=st.integers() | st.floats(allow_nan=False),
  weights=st.dictionaries(st.text(), st.floats(allow_nan=False)),
  on=st.booleans(),
  anything=st.none() | st.integers() | st.lists(st.text()),
)


class RoundTripTest(parameterized.TestCase):
  @given(_outer)
  def test_through_json(self, value):
    text = json.dumps(config_lib.to_dict(value))
    back = config_lib.from_dict(Outer, json.loads(text))
    self.assertEqual(back, value)
    self.assertEqual(type(back.number), type(value.number))
    self.assertEqual(config_lib.loads(Outer, config_lib.dumps(value)), value)

  def test_model_and_schema(self):
    model = ranker.RankerConfig(
      schema=schema_lib.Schema(
        user='u',
        time='t',
        item=(
          schema_lib.Categorical('item', 9, column='i', ids='hash'),
          schema_lib.Dense('price', log=True, scale=2),
        ),
        action=(schema_lib.Categorical('rating', 5),),
        tasks=(schema_lib.Task('like', threshold=4.0),),
        derived=(schema_lib.Categorical('time_gap', 3),),
      ),
      encoder=encoder.EncoderConfig(window=7),
      interaction=interaction.InteractionConfig(),
    )
    values = json.loads(config_lib.dumps(model))
    self.assertEqual(values['schema']['item'][0]['type'], 'categorical')
    self.assertEqual(values['schema']['item'][1]['type'], 'dense')
    self.assertEqual(config_lib.from_dict(ranker.RankerConfig, values), model)
    hash(config_lib.from_dict(ranker.RankerConfig, values))

  def test_takes_instances_defaults_and_converts_only_what_is_safe(self):
    value = config_lib.from_dict(
      Outer,
      {'needed': 2, 'inner': Inner(7), 'weights': {'a': 1}, 'pair': [3, 'y']},
    )
    self.assertEqual(value.inner, Inner(7))
    self.assertIs(type(value.weights['a']), float)
    self.assertEqual(value.pair, (3, 'y'))
    self.assertEqual(value.mode, 'a')

  def test_a_type_may_be_said_where_there_is_one(self):
    values = {'needed': 1, 'inner': {'type': 'inner', 'size': 7}}
    self.assertEqual(config_lib.from_dict(Outer, values).inner, Inner(7))

  def test_pairs_may_be_a_mapping(self):
    for kinds in ({'x': 'a', 'y': 'b'}, [['x', 'a'], ['y', 'b']]):
      value = config_lib.from_dict(Outer, {'needed': 1, 'kinds': kinds})
      self.assertEqual(value.kinds, (('x', 'a'), ('y', 'b')))
    column_types = {'column_types': {'user': 'integer'}}
    schema = config_lib.from_dict(
      schema_lib.Schema,
      {
        'user': 'user',
        'time': 'time',
        'item': [{'type': 'dense', 'name': 'price'}],
        'tasks': [{'name': 'click'}],
        **column_types,
      },
    )
    self.assertEqual(schema.types, column_types['column_types'])


class StrictTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, r'needed is missing; Outer needs it'),
    (
      {'needed': 1, 'inner': {'siz': 2}},
      r"inner\.siz is not a field of Inner; did you mean 'inner\.size'\?.*"
      r"\['size', 'rate'\]",
    ),
    ({'needed': 1, 'zzz': 2}, r'zzz is not a field of Outer; it has'),
    ({'needed': 1, 'rate': 2}, r"of Outer; did you mean 'inner\.rate'\?"),
    ({'needed': 1.0}, r'needed=1\.0 is of type float; it must be int'),
    ({'needed': True}, r'needed=True is of type bool; it must be int'),
    ({'needed': '1'}, r"needed='1' is of type str; it must be int"),
    ({'needed': 1, 'on': 1}, r'on=1 is of type int; it must be bool'),
    ({'needed': 1, 'inner': {'rate': 'x'}}, r"inner\.rate='x'.*float"),
    ({'needed': 1, 'inner': {'rate': True}}, r'inner\.rate=True.*float'),
    (
      {'needed': 1, 'inner': {'type': 'other', 'size': 2}},
      r"inner\.type='other' must be 'inner', or be left out",
    ),
    ({'needed': 1, 'inner': 3}, r'inner=3 is of type int; it must be Inner'),
    ({'needed': 1, 'inner': None}, r'inner=None.*must be Inner'),
    ({'needed': 1, 'mode': 'c'}, r"mode='c' must be one of \['a', 'b', 1\]"),
    ({'needed': 1, 'mode': True}, r'mode=True must be one of'),
    ({'needed': 1, 'maybe': 'x'}, r"maybe='x'.*must be int"),
    ({'needed': 1, 'pair': [1]}, r'pair=\[1\] has 1 values, 2 are needed'),
    ({'needed': 1, 'pair': 'ab'}, r"pair='ab'.*must be a list"),
    ({'needed': 1, 'many': [{'size': 1}]}, r'many\.0\.type=None must be one'),
    (
      {'needed': 1, 'either': {'type': 'inner', 'name': 'x'}},
      r'either\.name is not a field of Inner',
    ),
    ({'needed': 1, 'either': 3}, r'either=3.*must be Inner \| Other'),
    ({'needed': 1, 'weights': {'a': 'x'}}, r"weights\.a='x'.*float"),
    ({'needed': 1, 'weights': [1]}, r'weights=\[1\] is of type list'),
    ({'needed': 1, 'kinds': {'x': 'c'}}, r"kinds\.x='c' must be one of"),
    ({'needed': 1, 'pair': {'x': 'c'}}, r'pair=.*must be a list'),
    (3, r'config=3 is of type int; it must be Outer'),
  )
  def test_refuses(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      config_lib.from_dict(Outer, values)

  def test_what_json_cannot_hold(self):
    with self.assertRaisesRegex(ValueError, 'anything=.*object'):
      config_lib.to_dict(Outer(1, anything=object()))

  @parameterized.parameters('', '{', "{'needed': 1}", '[1', '{"needed": 1}}')
  def test_text_that_is_no_json(self, text):
    with self.assertRaisesRegex(
      ValueError, 'the Outer is no JSON.*begins with'
    ):
      config_lib.loads(Outer, text)

  def test_checks_of_the_dataclass_itself_run(self):
    with self.assertRaisesRegex(ValueError, 'size=0 must be between 1'):
      config_lib.from_dict(
        schema_lib.Schema,
        {
          'user': 'u',
          'time': 't',
          'item': [{'type': 'categorical', 'name': 'item', 'size': 0}],
          'tasks': [{'name': 'y'}],
        },
      )


class NormalizeTest(parameterized.TestCase):
  @parameterized.parameters(
    (schema_lib.Categorical, {'name': 'item', 'size': 9}),
    (schema_lib.Dense, {'name': 'price'}),
    (schema_lib.Task, {'name': 'click'}),
    (schema_lib.Schema, SCHEMA),
    (ranker.RankerConfig, {'schema': schema_lib.Schema(**SCHEMA)}),
    (encoder.EncoderConfig, {}),
    (interaction.InteractionConfig, {}),
    (scoring.ScorerConfig, {}),
    (export.ExportConfig, {}),
    (engine.EngineConfig, {}),
    (known.StoreConfig, {}),
    (batcher.BatcherConfig, {}),
    (messages.Limits, {}),
    (optimizer.OptimizerConfig, {}),
    (losses.RankLossConfig, {}),
    (pipeline.PipelineConfig, {}),
    (rows.RowConfig, {}),
    (datasets.DataConfig, {}),
    (datasets.Synthetic, {}),
    (
      datasets.Events,
      {'paths': ('a.csv',), 'schema': schema_lib.Schema(**SCHEMA)},
    ),
    *FEATURES,
  )
  def test_every_field_has_its_type(self, cls, values):
    cls(**values)
    for field in dataclasses.fields(cls):
      for bad in (object(), 0.5j):
        message = rf'{cls.__name__}\.{field.name}=.*must be'
        with self.assertRaisesRegex(ValueError, message):
          cls(**{**values, field.name: bad})

  @parameterized.parameters(
    (encoder.EncoderConfig, 'causal', 'no'),
    (encoder.EncoderConfig, 'num_layers', True),
    (encoder.EncoderConfig, 'width', 64.0),
    (interaction.InteractionConfig, 'mlp_widths', (8.0,)),
    (scoring.ScorerConfig, 'microbatch', float('inf')),
    (scoring.ScorerConfig, 'row_buckets', '8'),
    (schema_lib.Categorical, 'size', np.int64(9)),
  )
  def test_what_is_nearly_of_a_type(self, cls, field, bad):
    values = {'name': 'x', 'size': 9} if cls is schema_lib.Categorical else {}
    with self.assertRaisesRegex(ValueError, f'{cls.__name__}.{field}.*is of'):
      cls(**{**values, field: bad})

  @parameterized.parameters('attention', 'candidate_tower')
  def test_an_unknown_implementation(self, field):
    with self.assertRaisesRegex(
      ValueError, f"encoder.{field}='flash' is unknown; use one of .*'xla'"
    ):
      encoder.EncoderConfig(**{field: 'flash'})

  def test_equal_configs_are_equal_as_json(self):
    whole = schema_lib.Dense('price', scale=2, offset=-1)
    self.assertEqual(whole, schema_lib.Dense('price', scale=2.0, offset=-1.0))
    values = config_lib.dumps(whole)
    back = config_lib.loads(schema_lib.Dense, values)
    self.assertEqual(config_lib.dumps(back), values)

  def test_a_dict_becomes_the_dataclass(self):
    config = ranker.RankerConfig(
      schema=schema_lib.Schema(**SCHEMA), encoder={'width': 32}
    )
    self.assertEqual(config.encoder, encoder.EncoderConfig(width=32))


class DifferencesTest(absltest.TestCase):
  def test_names_each_field(self):
    old = config_lib.to_dict(Outer(1, many=(Inner(),), maybe=3))
    new = config_lib.to_dict(Outer(1, inner=Inner(2), many=(Other(),)))
    self.assertEqual(
      config_lib.differences(old, new, ('there', 'here')),
      [
        'inner.size: 1 (there), 2 (here)',
        "many.0.type: 'inner' (there), 'other' (here)",
        "many.0.size: 1 (there), 'absent' (here)",
        "many.0.rate: 0.5 (there), 'absent' (here)",
        'maybe: 3 (there), None (here)',
        "many.0.name: 'absent' (there), 'x' (here)",
      ],
    )
    self.assertEqual(config_lib.differences(old, old), [])
