"""What is written to a request's views is what its program unpacks."""

from unittest import mock

import numpy as np
from absl.testing import absltest
from hypothesis import example, given
from hypothesis import strategies as st

from histjax import schema as schema_lib
from histjax.schema import MAX_DENSE
from histjax.scoring import layout as layout_lib


@st.composite
def parts(draw):
  """Features and numbers of random shapes; some parts hold nothing."""
  found = []
  shapes = st.lists(st.integers(0, 4), min_size=1, max_size=2)
  for i in range(draw(st.integers(1, 4))):
    name = f'part{i}'
    # All parts of a request have the rows as their first axis.
    shape = tuple(draw(shapes))
    if draw(st.booleans()):
      found.append(layout_lib.numbers(name, shape))
      continue
    kinds = draw(st.lists(st.booleans(), max_size=4))
    spec = tuple(
      schema_lib.Categorical(f'f{j}', 2**31 - 1)
      if is_id
      else schema_lib.Dense(f'f{j}')
      for j, is_id in enumerate(kinds)
    )
    found.append(layout_lib.features(name, spec, shape))
  return tuple(found)


class LayoutTest(absltest.TestCase):
  @given(parts=parts(), seed=st.integers(0, 2**32 - 1))
  def test_round_trip(self, parts, seed):
    rng = np.random.default_rng(seed)
    layout = layout_lib.Layout(parts)
    buffer = np.full(layout.size, -1, np.int32)
    expected = {}
    for name, view in layout.views(buffer).items():
      expected[name] = {}
      for feature, out in view.features.items():
        bits = rng.integers(-(2**31), 2**31, out.shape, dtype=np.int32)
        out[...] = bits.view(out.dtype)
        expected[name][feature] = bits.view(out.dtype)
      self.assertEqual(view.ids.shape[1:], view.part.shape)
      self.assertEqual(len(view.dense), len(view.part.dense))
    found = layout.unpack(buffer)
    self.assertEqual(list(found), [part.name for part in parts])
    for part in parts:
      features = found[part.name]
      if part.sizes is None:
        features = {part.name: features}
      self.assertEqual(set(features), set(expected[part.name]))
      for name, value in features.items():
        value, wanted = np.asarray(value), expected[part.name][name]
        self.assertEqual(value.dtype, wanted.dtype)
        np.testing.assert_array_equal(  # Bit for bit, NaN as well.
          value.view(np.int32), wanted.view(np.int32)
        )

  @given(
    size=st.integers(1, 2**31 - 1),
    ids=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
  )
  @example(size=3, ids=[2], bits=[0xCCBEBC20])  # The largest of each, negated.
  @example(size=3, ids=[2], bits=[0x4CBEBC21])
  @example(size=3, ids=[3], bits=[0])
  @example(size=3, ids=[-1], bits=[0])
  @example(size=3, ids=[0], bits=[0xFF800000])  # Minus infinity.
  @example(size=3, ids=[0], bits=[0x7F800001])  # A NaN.
  def test_bad_values_are_found(self, size, ids, bits):
    dense = np.array(bits, np.uint32).view(np.float32)
    layout = layout_lib.Layout(
      (
        layout_lib.numbers('length', (2,)),
        layout_lib.features(
          'a',
          (schema_lib.Categorical('w', 1), schema_lib.Categorical('x', size)),
          (len(ids),),
        ),
        layout_lib.features('b', (schema_lib.Dense('y'),), (len(bits),)),
      )
    )
    buffer = np.full(layout.size, -1, np.int32)  # Lengths may be any number.
    views = layout.views(buffer)
    views['a'].features['w'][...] = 0
    views['a'].features['x'][...] = ids
    views['b'].features['y'][...] = dense
    good = all(0 <= i < size for i in ids) and bool(
      (np.abs(dense) <= MAX_DENSE).all()
    )
    # All at once; part by part, as arrays and as lists.
    for few, as_list in ((2**13, 0), (0, 0), (0, 32)):
      with mock.patch.multiple(layout_lib, _FEW=few, _AS_LIST=as_list):
        views = layout.views(buffer)
        self.assertEqual(layout.is_good(buffer, views), good)

  @given(parts=parts(), requests=st.integers(1, 3))
  def test_requests_share_the_rows(self, parts, requests):
    parts = tuple(
      x._replace(shape=(x.shape[0] * requests, *x.shape[1:])) for x in parts
    )
    layout = layout_lib.Layout(parts, requests)
    views = layout.views(np.zeros(layout.size, np.int32))
    for i, own in enumerate(layout.split(views)):
      for view in own.values():
        self.assertEqual(view.ids.shape[1:], view.part.shape)
        view.ids.fill(i)
        view.dense.fill(i)
    for part in parts:
      rows = np.arange(requests).repeat(part.shape[0] // requests)
      expected = rows.reshape(-1, *(1 for _ in part.shape[1:]))
      for value in views[part.name].features.values():
        np.testing.assert_array_equal(
          value, np.broadcast_to(expected, part.shape)
        )


if __name__ == '__main__':
  absltest.main()
