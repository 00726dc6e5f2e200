"""straight_through: the value is that of `hard` and nothing else, the derivative that
of `soft`, and `soft` is not there where nothing is differentiated."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxsoft import smooth_step, softplus, straight_through


def hard_step(x, temperature=1.0):
    return jnp.heaviside(x, jnp.asarray(0.5, x.dtype))


def soft_step(x, temperature=1.0):
    return smooth_step(x, temperature=temperature)


step = straight_through(hard_step, soft_step)
X = jnp.array([-1.5, 0.0, 0.25, 3.0])


class TestValueAndDerivatives(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_value_of_hard_derivative_of_soft(self):
        np.testing.assert_array_equal(self.variant(step)(X), hard_step(X))
        g = jnp.array([1.0, 2.0, -1.0, 0.5])

        def pulled(f, x):
            value, pull = jax.vjp(f, x)
            return value, pull(g)[0]

        def pushed(f, x):
            return jax.jvp(f, (x,), (g,))

        for derivative in (pulled, pushed):
            value, slope = self.variant(lambda x, d=derivative: d(step, x))(X)
            _, wanted = jax.jit(lambda x, d=derivative: d(soft_step, x))(X)
            np.testing.assert_array_equal(value, hard_step(X))
            np.testing.assert_allclose(slope, wanted, rtol=1e-6)


def test_every_nesting_is_that_of_soft(x64):
    x = jnp.array([0.3, -0.2])

    def hard(x):
        return jnp.sum(jnp.abs(x)) * x

    def soft(x):
        return jnp.sum(jnp.sin(x)) * x

    f = straight_through(hard, soft)
    modes = (jax.jacfwd, jax.jacrev)

    @functools.partial(jax.jit, static_argnums=0)
    def every_nesting(f, x):
        seconds = [outer(inner(f))(x) for outer in modes for inner in modes]
        third = jax.jacfwd(jax.jacrev(jax.jacrev(f)))(x)
        return *seconds, jax.linearize(f, x)[1](x), third

    for actual, wanted in zip(every_nesting(f, x), every_nesting(soft, x)):
        # The last is the third derivative.
        rtol = 1e-13 if wanted.ndim == 4 else 1e-14
        np.testing.assert_allclose(actual, wanted, rtol=rtol)


def test_values_are_bit_exact_where_sums_would_not_be():
    values = jnp.array([jnp.inf, -jnp.inf, jnp.nan, -0.0, 1e-45, 1.0, 1e8])
    f = straight_through(lambda x: x, lambda x: softplus(x) + 1e9)
    for call in (
        f,
        jax.jit(f),
        lambda x: jax.vjp(f, x)[0],
        lambda x: jax.jvp(f, (x,), (x,))[0],
    ):
        bits = jax.lax.bitcast_convert_type(call(values), jnp.int32)
        np.testing.assert_array_equal(
            bits, jax.lax.bitcast_convert_type(values, jnp.int32)
        )
    slope = jax.grad(lambda x: jnp.sum(f(x)))(values.at[2].set(0))
    np.testing.assert_array_equal(
        slope, jax.grad(lambda x: jnp.sum(softplus(x)))(values.at[2].set(0))
    )


def test_forward_program_has_nothing_of_soft():
    f = straight_through(jnp.sign, lambda x: jnp.tanh(x) + jnp.sum(jnp.cos(x)))
    for program in (
        str(jax.make_jaxpr(f)(X)),
        jax.jit(f).lower(X).as_text(),
        jax.jit(jax.vmap(f)).lower(jnp.stack([X, X])).compile().as_text(),
    ):
        assert "sign" in program
        assert "tanh" not in program
        assert "cos" not in program
    differentiated = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(f(x))))(X))
    assert "sin" in differentiated


def test_hard_need_not_be_differentiable():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    def refuse(*_):
        raise AssertionError("hard is differentiated")

    rounded.defvjp(refuse, refuse)

    def hard(x):
        host = jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return jax.lax.while_loop(lambda v: v[0] > 1, lambda v: v - 1, rounded(host))

    f = straight_through(hard, lambda x: x**2)
    x = jnp.array([3.2, 1.2])
    np.testing.assert_array_equal(f(x), [1.0, -1.0])
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(f(x)))(x), 2 * x)
    np.testing.assert_allclose(jax.jacfwd(f)(x), np.diag(2 * x))

    def value_times_tangent(x):
        value, tangent = jax.jvp(f, (x,), (jnp.ones_like(x),))
        return jnp.sum(value * tangent)

    # (h s')' = s' s' + h s''
    wanted = 4 * x**2 + 2 * jnp.array([1.0, -1.0])
    np.testing.assert_allclose(jax.grad(value_times_tangent)(x), wanted)


def test_arguments_and_results_are_pytrees():
    def hard(tree, n, *, scale):
        flag = tree["a"] > 0
        return {
            "flag": flag,
            "out": (jax.nn.one_hot(jnp.argmax(tree["a"]), n) * scale, tree["k"]),
        }

    def soft(tree, n, *, scale):
        p = jax.nn.softmax(tree["a"] * scale)
        assert p.shape == (n,)  # n is a number
        return {"flag": tree["a"] > 1, "out": (p, tree["k"])}

    f = straight_through(hard, soft)
    tree = {"a": jnp.array([0.1, 2.0, -1.0]), "k": jnp.arange(2), "nothing": None}
    out = f(tree, 3, scale=2.0)
    chex.assert_trees_all_equal(out, hard(tree, 3, scale=2.0))

    def total(f, a, scale):
        return f(tree | {"a": a}, 3, scale=scale)["out"][0][1]

    slopes = jax.grad(total, (1, 2))(f, tree["a"], 2.0)
    wanted = jax.grad(total, (1, 2))(soft, tree["a"], 2.0)
    chex.assert_trees_all_close(slopes, wanted, rtol=1e-6)
    in_tree = jax.grad(lambda t: f(t, 3, scale=2.0)["out"][0][1], allow_int=True)(tree)
    np.testing.assert_allclose(in_tree["a"], wanted[0], rtol=1e-6)
    value, tangent = jax.jvp(
        lambda a: f(tree | {"a": a}, 3, scale=1.0), (tree["a"],), (tree["a"],)
    )
    assert tangent["flag"].dtype == jax.dtypes.float0
    assert value["flag"].dtype == bool


def test_what_the_functions_close_over_is_differentiated():
    def loss(w, v, x):
        f = straight_through(lambda x: jnp.round(w * x), lambda x: w * x * v)
        return jnp.sum(f(x) ** 2)

    w, v, x = 1.7, 3.0, jnp.array([0.4, 1.1])
    value = jax.jit(loss)(w, v, x)
    np.testing.assert_array_equal(value, jnp.sum(jnp.round(w * x) ** 2))
    outer = 2 * jnp.round(w * x)
    wanted = (jnp.sum(outer * x * v), jnp.sum(outer * w * x), outer * w * v)
    for grad in (jax.grad(loss, (0, 1, 2)), jax.jit(jax.grad(loss, (0, 1, 2)))):
        chex.assert_trees_all_close(grad(w, v, x), wanted, rtol=1e-6)
    many = jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None))(
        jnp.array([w, -w]), v, x
    )
    np.testing.assert_allclose(many[0][0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(many[2][0], wanted[2], rtol=1e-6)


def test_what_does_not_move_is_not_computed():
    """A matrix that soft closes over costs nothing but its own product."""
    weights = jnp.ones((3, 3))
    f = straight_through(jnp.sign, lambda x: jnp.tanh(x @ weights))
    program = str(jax.make_jaxpr(lambda x: jax.jvp(f, (x,), (x,)))(jnp.ones((2, 3))))
    assert program.count("dot_general[") == 2


def test_under_the_transformations_of_a_training_loop():
    def through(x):
        return jnp.sum(step(x, temperature=0.5) * jnp.arange(4.0))

    def soft_through(x):
        return jnp.sum(soft_step(x, 0.5) * jnp.arange(4.0))

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c + through(x), None), 0.0, length=3)[0]

    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("i")
    sharded = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)

    @jax.jit
    def slopes(x, g):
        wanted = jax.grad(soft_through)(x)
        of_rows = jax.vmap(jax.grad(through))(jnp.stack([x, x[::-1]]))
        of_sharded, of_soft = (jax.vjp(f, x)[1](g)[0] for f in (sharded, soft_step))
        return [
            (jax.grad(jax.checkpoint(through))(x), wanted),
            (of_rows[0], wanted),
            (jax.grad(scanned)(x), 3 * wanted),
            (of_sharded, of_soft),
        ]

    for ours, of_soft in slopes(X, jnp.arange(4.0)):
        np.testing.assert_allclose(ours, of_soft, rtol=1e-6)


def test_random_keys_and_half_precision():
    def hard(key, x):
        return (jax.random.uniform(key, x.shape, x.dtype) < soft_step(x)).astype(
            x.dtype
        )

    sample = straight_through(hard, lambda key, x: soft_step(x))
    key, x = jax.random.key(0), jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)
    assert sample(key, x).dtype == jnp.bfloat16
    slope = jax.jit(jax.grad(lambda x, k: jnp.sum(sample(k, x))))(x, key)
    np.testing.assert_array_equal(slope, jax.vmap(jax.grad(soft_step))(x))
    keys = jax.random.split(key, 3)
    np.testing.assert_array_equal(
        jax.vmap(sample, (0, None))(keys, x)[1], sample(keys[1], x)
    )


@pytest.mark.parametrize(
    ("error", "hard", "soft", "text"),
    [
        (TypeError, jnp.sign, 1.0, "soft must be a function; got float"),
        (TypeError, None, jnp.sign, "hard must be a function; got NoneType"),
        (
            ValueError,
            jnp.sign,
            jnp.sum,
            "hard and soft must return the same shapes; got (4,) and ()",
        ),
        (
            TypeError,
            jnp.argmax,
            jnp.sum,
            "hard and soft must return the same dtypes; got int32 and float32",
        ),
        (
            TypeError,
            jnp.sign,
            lambda x: (x,),
            "hard and soft must return the same tree; "
            "got PyTreeDef(*) and PyTreeDef((*,))",
        ),
    ],
)
def test_errors_name_what_differs(error, hard, soft, text):
    with pytest.raises(error) as raised:
        straight_through(hard, soft)(X)
    assert str(raised.value) == f"straight_through: {text}"


def test_the_wrapped_function_keeps_the_name_of_hard():
    assert step.__name__ == "hard_step"
