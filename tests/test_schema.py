"""What a schema refuses, and what it makes of column types."""

import dataclasses

from absl.testing import absltest, parameterized

from histjax import config as config_lib
from histjax.schema import Categorical, Dense, Schema, Task


def schema(**kwargs) -> Schema:
  return Schema(
    'user',
    'time',
    item=(
      Categorical('item', 10, ids='hash'),
      Categorical('tab', 10),
      Dense('price'),
    ),
    tasks=(Task('click'),),
    request='request',
    **kwargs,
  )


class SchemaTest(parameterized.TestCase):
  @parameterized.parameters('hash', 'index')
  def test_ids_fit_int32(self, ids):
    self.assertEqual(Categorical('item', 2**31 - 1, ids=ids).size, 2**31 - 1)
    for size in (2**31, 2**33, 0, -1):
      with self.assertRaisesRegex(
        ValueError, f"'item': size={size} must be between 1 and 2147483647"
      ):
        Categorical('item', size, ids=ids)

  def test_table_is_no_path(self):
    message = "'item': table='shop/item' has a '/'.*name it without"
    with self.assertRaisesRegex(ValueError, message):
      Categorical('item', 10, table='shop/item')
    self.assertEqual(Categorical('item', 10, table='shop-item').size, 10)

  @parameterized.parameters(
    {'scale': 0.0}, {'scale': float('inf')}, {'offset': float('nan')}
  )
  def test_dense(self, **kwargs):
    with self.assertRaisesRegex(ValueError, "'price': scale=.*finite"):
      Dense('price', **kwargs)

  def test_threshold_and_unit(self):
    with self.assertRaisesRegex(ValueError, "'y': threshold=nan must be"):
      Task('y', threshold=float('nan'))
    with self.assertRaisesRegex(ValueError, 'time_unit=inf must be positive'):
      schema(time_unit=float('inf'))

  @parameterized.parameters(
    ({'user': ''}, 'user is empty; name its column'),
    ({'time': ''}, 'time is empty; name its column'),
    ({'user': 'a', 'time': 'a'}, "user and time are one column, 'a'"),
    ({'user': 'a', 'request': 'a'}, "user and request are one column, 'a'"),
  )
  def test_keys_are_columns_of_their_own(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(schema(), **fields)

  @parameterized.parameters(
    ('item', "feature 'y' of item"),
    ('context', "feature 'y' of context"),
    ('hidden', "feature 'y' of hidden"),
    ('user', 'the user'),
    ('time', 'the time'),
    ('request', 'the request'),
  )
  def test_a_label_is_no_input(self, part, use):
    value = 'liked'
    if part in ('item', 'context', 'hidden'):
      value = (Categorical('y', 2, column='liked'),)
    fields = {
      'user': 'user',
      'time': 'time',
      'item': (Categorical('item', 10),),
      'tasks': (Task('click'), Task('like', column='liked')),
    }
    Schema(**fields, action=(Categorical('y', 2, column='liked'),))
    message = f"'liked' is the label of task 'like' and {use}, which is known"
    with self.assertRaisesRegex(ValueError, message):
      Schema(**{**fields, part: value})

  @parameterized.parameters('context', 'item', 'hidden')
  def test_an_action_is_no_input(self, part):
    fields = {'item': (Categorical('item', 9),), 'tasks': (Task('like'),)}
    action = (Dense('seconds', column='dwell'),)
    if part == 'item':
      fields[part] += (Dense('dwell'),)
    else:
      fields[part] = (Categorical('dwell', 9),)
    Schema('user', 'time', **fields)
    message = f"'dwell' is feature 'seconds' of action and .* of {part}, which"
    with self.assertRaisesRegex(ValueError, message):
      Schema('user', 'time', action=action, **fields)

  def test_column_types(self):
    found = schema(column_types={'user': 'integer', 'time': 'timestamp'})
    self.assertEqual(found.types, {'user': 'integer', 'time': 'timestamp'})
    hash(found)  # Modules have it as an attribute.
    values = config_lib.to_dict(found)
    self.assertEqual(config_lib.from_dict(Schema, values), found)
    pairs = (('user', 'integer'), ('time', 'timestamp'))
    self.assertEqual(schema(column_types=pairs), found)

  @parameterized.parameters(
    ('user', 'timestamp', "as user it can be one of .'text', 'integer'"),
    ('request', 'number', 'as request it can be'),
    ('item', 'number', "as feature 'item' it can be"),
    ('tab', 'text', "as feature 'tab' it can be one of .'number', 'integer'"),
    ('price', 'timestamp', "as feature 'price'"),
    ('click', 'text', "as task 'click'"),
    ('time', 'text', 'as time it can be one of .*timestamp'),
    ('item', 'int', "column_types.item='int' must be one of"),
  )
  def test_column_types_that_do_not_fit(self, column, kind, message):
    with self.assertRaisesRegex(ValueError, message):
      schema(column_types={column: kind})

  def test_a_column_declared_twice(self):
    with self.assertRaisesRegex(ValueError, 'declares a column twice'):
      schema(column_types=(('user', 'text'), ('user', 'integer')))

  @parameterized.parameters('null_values', 'column_types')
  def test_one_text_is_no_tuple(self, field):
    message = f"{field}='NA' is of type str; it must be a list"
    with self.assertRaisesRegex(ValueError, message):
      schema(**{field: 'NA'})


if __name__ == '__main__':
  absltest.main()
