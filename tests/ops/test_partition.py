"""Functions of independent rows over devices, with a stand-in for a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from histjax.ops import partition

NUM_DEVICES = jax.device_count()
ROWS = 2 * NUM_DEVICES


def kernel(x, y, weight):
  """`[B, Q, H]`, `[H, B]`, `[H, K]` to `[B, Q, K]`, `[K, B]`, `[B]`.

  The last is the number of rows that were computed at once.
  """
  number = jnp.full((x.shape[0],), x.shape[0], x.dtype)
  return jnp.sort(x, axis=1) @ weight, weight.T @ y, number


def by_rows():
  return partition.by_rows(kernel, (0, 1, None), (0, 1, 0))


@jax.custom_vjp
def scaled(x, weight):
  return forward(x, weight)[0]


def forward(x, weight):
  out = partition.by_rows(lambda x, w: jnp.sort(x * w, 1), (0, None), 0)(
    x, weight
  )
  return out, (x, weight)


def backward(residuals, cotangent):
  x, weight = residuals

  def kernel(x, weight, cotangent):
    order = jnp.argsort(x * weight, axis=1)
    inverse = jnp.argsort(order, axis=1)
    d_product = jnp.take_along_axis(cotangent, inverse, axis=1)
    return d_product * weight, jnp.sum(d_product * x, axis=(1, 2))

  d_x, d_weight = partition.by_rows(kernel, (0, None, 0), (0, 0))(
    x, weight, cotangent
  )
  return d_x, d_weight.sum()


scaled.defvjp(forward, backward)


class ByRowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x, self.y, self.weight = (
      rng.normal(size=shape).astype(np.float32)
      for shape in ((ROWS, 5, 4), (4, ROWS), (4, 3))
    )
    self.mesh = jax.make_mesh(
      (NUM_DEVICES,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
    )

  def put(self, x, *spec):
    return jax.device_put(x, jax.NamedSharding(self.mesh, jax.P(*spec)))

  def check(self, out, rows_at_once, x=None):
    expected = jax.jit(kernel)(self.x if x is None else x, self.y, self.weight)
    np.testing.assert_allclose(out[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[1], expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[2], rows_at_once)

  @parameterized.parameters(True, False)
  def test_one_device(self, jit):
    function = jax.jit(by_rows()) if jit else by_rows()
    self.check(function(self.x, self.y, self.weight), ROWS)

  def test_rows_stay_where_they_are(self):
    arguments = (
      self.put(self.x, 'data'),
      self.put(self.y, None, 'data'),
      self.put(self.weight),
    )
    program = jax.jit(by_rows()).lower(*arguments).compile()
    out = program(*arguments)
    self.check(out, 2)
    for x, spec in zip(
      out, (('data',), (None, 'data'), ('data',)), strict=True
    ):
      expected = jax.NamedSharding(self.mesh, jax.P(*spec))
      self.assertTrue(x.sharding.is_equivalent_to(expected, x.ndim))
    for collective in ('all-gather', 'all-reduce', 'all-to-all', 'permute'):
      self.assertNotIn(collective, program.as_text())

  def test_other_axes_are_gathered(self):
    mesh = jax.make_mesh(
      (NUM_DEVICES // 2, 2),
      ('data', 'model'),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )

    def put(x, *spec):
      return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    out = jax.jit(by_rows())(
      put(self.x, 'data', None, 'model'),
      put(self.y, 'model', 'data'),
      put(self.weight, 'model'),
    )
    self.check(out, ROWS // (NUM_DEVICES // 2))

  def test_rows_from_the_middle_of_a_program(self):
    function = by_rows()

    @jax.jit
    def run(x, y, weight):
      out = function(2 * x, y, weight)
      return out[0] / 2, *out[1:]

    # Only one operand says how its rows are split.
    out = run(self.put(self.x, 'data'), self.put(self.y), self.put(self.weight))
    self.check(out, 2)

  def test_shard_map(self):
    data = jax.P('data')
    out = jax.jit(
      jax.shard_map(
        by_rows(),
        mesh=self.mesh,
        in_specs=(data, jax.P(None, 'data'), jax.P()),
        out_specs=(data, jax.P(None, 'data'), data),
      )
    )(self.x, self.y, self.weight)
    self.check(out, 2)

  @parameterized.parameters(True, False)
  def test_vmap_makes_rows(self, sharded):
    put = self.put if sharded else lambda x, *spec: x
    stacked = np.stack([self.x, 2 * self.x, 3 * self.x])
    function = jax.jit(jax.vmap(by_rows(), (0, None, None)))
    out = function(
      put(stacked, None, 'data'), put(self.y, None, 'data'), put(self.weight)
    )
    for i, x in enumerate(stacked):
      rows = 6 if sharded else 3 * ROWS
      self.check([value[i] for value in out], rows, x)

  def test_vmap_over_weights(self):
    stacked = np.stack([self.weight, self.weight + 1])
    function = jax.jit(jax.vmap(by_rows(), (None, 1, 0)))
    out = function(self.x, np.stack([self.y, self.y], 1), stacked)
    for i, weight in enumerate(stacked):
      self.weight = weight
      self.check([value[i] for value in out], ROWS)

  @parameterized.parameters('data', None)
  def test_gradients(self, axis):
    weight = np.float32(1.5)

    def loss(function, x, weight):
      out = function(x, weight)
      return jnp.sum(jnp.sin(out) * jnp.cos(x))

    gradients = functools.partial(jax.grad, argnums=(1, 2))
    actual = jax.jit(gradients(loss), static_argnums=0)(
      scaled, self.put(self.x, axis), self.put(weight)
    )
    expected = jax.jit(gradients(loss), static_argnums=0)(
      lambda x, w: jnp.sort(x * w, axis=1), self.x, weight
    )
    for a, e in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


if __name__ == '__main__':
  absltest.main()
