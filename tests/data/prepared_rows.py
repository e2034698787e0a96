"""Compares prepared rows with those of a log in memory."""

import numpy as np

from histjax import features as features_lib
from histjax.data import datasets
from histjax.schema import categorical


def by_user(rows) -> dict[str, list]:
  """`{user: [everything about a row]}`, bit by bit, in no order of users."""
  keys = rows.keys
  found: dict[str, list] = {}
  for row in rows:
    view = {
      f'{kind}/{name}': (np.asarray(x).dtype.str, np.asarray(x).tobytes())
      for kind in ('context', 'history', 'candidates', 'labels')
      for name, x in getattr(row, kind).items()
    }
    view['visible'] = (row.visible.dtype.str, row.visible.tobytes())
    found.setdefault(str(keys[row.group]), []).append(view)
  return found


def _check_flat(test, prepared, memory):
  """Candidates by themselves, and the users and ids that they have."""
  names = [f.name for f in categorical(memory.schema.item)]

  def of(rows):
    users, found = set(rows.keys[rows.seen_users()].astype(str)), []
    for group, features, labels in rows.flat(names):
      columns = [rows.keys[group].astype(str), *features.values()]
      columns += labels.values()
      found += zip(*(c.tolist() for c in columns), strict=True)
    return users, sorted(found), [rows.seen_ids(n).tolist() for n in names]

  test.assertEqual(of(prepared), of(memory))


def check_same(test, prepared: datasets.Dataset, memory: datasets.Dataset):
  """Splits have the same rows, and features the same states."""
  test.assertEqual(prepared.schema, memory.schema)
  test.assertEqual(prepared.features.digest(), memory.features.digest())
  for found, wanted in zip(prepared.ids, memory.ids, strict=True):
    if wanted.ids == 'vocabulary':
      test.assertEqual(found, wanted)
    else:
      test.assertTrue(found.estimated)
      test.assertEqual(found.feature, wanted.feature)
  test.assertIsInstance(prepared.features, features_lib.FittedFeatures)
  for split, rows in memory.splits.items():
    found, wanted = by_user(prepared.splits[split]), by_user(rows)
    test.assertEqual(found.keys(), wanted.keys())
    for user in wanted:
      test.assertEqual(found[user], wanted[user], f'{split}, user {user}')
    for task in memory.schema.tasks:
      test.assertEqual(
        prepared.splits[split].label_summary(task.name),
        rows.label_summary(task.name),
      )
    _check_flat(test, prepared.splits[split], rows)
    test.assertEqual(
      sorted(prepared.splits[split].history_lengths),
      sorted(rows.history_lengths),
    )
