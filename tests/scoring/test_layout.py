"""What is written to a request's views is what its program unpacks."""

import numpy as np
from absl.testing import absltest
from hypothesis import given
from hypothesis import strategies as st

from histjax import schema as schema_lib
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
