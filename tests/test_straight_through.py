"""straight_through: the value is that of `hard` and nothing else, the derivative that
of `soft`, and `soft` is not there where nothing is differentiated.

Under every transformation, and in all nestings: the tests of the laws. What it raises:
test_errors.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import smooth_step, softplus, straight_through


def hard_step(x, temperature=1.0):
    return jnp.heaviside(x, jnp.asarray(0.5, x.dtype))


def soft_step(x, temperature=1.0):
    return smooth_step(x, temperature=temperature)


step = straight_through(hard_step, soft_step)
X = jnp.array([-1.5, 0.0, 0.25, 3.0])


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_value_of_hard_derivative_of_soft(jit):
    np.testing.assert_array_equal(jit(step)(X), hard_step(X))
    g = jnp.array([1.0, 2.0, -1.0, 0.5])

    def pulled(f, x):
        value, pull = jax.vjp(f, x)
        return value, pull(g)[0]

    def pushed(f, x):
        return jax.jvp(f, (x,), (g,))

    for derivative in (pulled, pushed):
        value, slope = jit(lambda x, d=derivative: d(step, x))(X)
        _, wanted = jit(lambda x, d=derivative: d(soft_step, x))(X)
        np.testing.assert_array_equal(value, hard_step(X))
        np.testing.assert_allclose(slope, wanted, rtol=1e-6)


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


def test_what_does_not_move_is_not_computed():
    """A matrix that soft closes over costs nothing but its own product."""
    weights = jnp.ones((3, 3))
    f = straight_through(jnp.sign, lambda x: jnp.tanh(x @ weights))
    program = str(jax.make_jaxpr(lambda x: jax.jvp(f, (x,), (x,)))(jnp.ones((2, 3))))
    assert program.count("dot_general[") == 2


def test_random_keys_and_half_precision():
    def hard(key, x):
        is_one = jax.random.uniform(key, x.shape, x.dtype) < soft_step(x)
        return is_one.astype(x.dtype)

    sample = straight_through(hard, lambda key, x: soft_step(x))
    key, x = jax.random.key(0), jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)
    assert sample(key, x).dtype == jnp.bfloat16
    slope = jax.jit(jax.grad(lambda x, k: jnp.sum(sample(k, x))))(x, key)
    np.testing.assert_array_equal(slope, jax.vmap(jax.grad(soft_step))(x))
    keys = jax.random.split(key, 3)
    np.testing.assert_array_equal(
        jax.vmap(sample, (0, None))(keys, x)[1], sample(keys[1], x)
    )


def test_the_wrapped_function_keeps_the_name_of_hard():
    assert step.__name__ == "hard_step"
